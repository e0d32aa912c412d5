// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `doorless img` and qemu-img, asked the same.
#![allow(dead_code, missing_docs, clippy::unwrap_used, unreachable_pub)]

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::harness::DOORLESS;

pub fn ours(directory: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(DOORLESS);
    command.arg("img").args(arguments).current_dir(directory).stdin(Stdio::null()).output().unwrap()
}

pub fn theirs(directory: &Path, arguments: &[&str]) -> Output {
    Command::new("qemu-img").args(arguments).current_dir(directory).stdin(Stdio::null()).output().unwrap()
}

pub fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What we print, having succeeded.
pub fn done(directory: &Path, arguments: &[&str]) -> String {
    let output = ours(directory, arguments);
    assert!(output.status.success(), "{arguments:?}: {}{}", out(&output), err(&output));
    out(&output)
}

pub fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// The directories of both: each works on images of its own.
pub struct Pair<'a> {
    pub ours: &'a Path,
    pub theirs: &'a Path,
}

impl Pair<'_> {
    /// Both do the same: with the same exit status, the same words on standard output, and the same reason on standard error.
    /// Blanks and numbers that are measured are for the caller to keep apart. What ours said.
    pub fn same(&self, arguments: &[&str]) -> String {
        let (ours, theirs) = (ours(self.ours, arguments), theirs(self.theirs, arguments));
        let said = format!("{arguments:?}: {}{}, and qemu-img: {}", out(&ours), err(&ours), err(&theirs));
        assert_eq!(ours.status.code(), theirs.status.code(), "{said}");
        assert_eq!(out(&ours), out(&theirs), "{said}");
        if !theirs.status.success() {
            let their = err(&theirs);
            let mut their = their.lines().filter(|line| line.starts_with("qemu-img:"));
            let reason = their.next_back().unwrap_or_default().trim_start_matches("qemu-img: ");
            assert!(err(&ours).contains(reason), "{said}");
        }
        out(&ours)
    }
}
