// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The audit log: a line of JSON for every decision, written before it takes effect. What cannot be written down is refused.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::{Asker, Refusal};
use crate::opening::Rights;
use crate::{Error, Result};

/// A decision.
#[derive(Debug)]
pub struct Decision<'a> {
    /// Who asked.
    pub asker: Asker,
    /// For which file.
    pub path: &'a Path,
    /// Device and inode, if it was reached.
    pub identity: Option<(u64, u64)>,
    /// To do what.
    pub rights: Rights,
    /// By which rule, if one was found.
    pub rule: Option<&'a str>,
    /// Why not, if it was refused.
    pub refusal: Option<&'a Refusal>,
}

/// Where decisions are written to.
#[derive(Debug)]
pub struct Audit {
    path: PathBuf,
    /// `None` keeps nothing: a dry run.
    file: Option<File>,
}

impl Audit {
    /// Appends to a file, which only this user may read if it is new.
    ///
    /// # Errors
    /// It cannot be opened, or is no file that only grows.
    pub fn append(path: &Path) -> Result<Audit> {
        let failed = |source| Error::Open { path: path.to_owned(), purpose: " as an audit log", source };
        let file = File::options().append(true).create(true).mode(0o600).open(path).map_err(failed)?;
        Ok(Audit { path: path.to_owned(), file: Some(file) })
    }

    /// Writes nothing down.
    pub fn none() -> Audit {
        Audit { path: PathBuf::new(), file: None }
    }

    /// Opens its file again under its name: for whoever rotates logs.
    ///
    /// # Errors
    /// Those of [`append`](Audit::append); then the old one stays.
    pub fn reopen(&mut self) -> Result<()> {
        if self.file.is_some() {
            *self = Audit::append(&self.path)?;
        }
        Ok(())
    }

    /// Writes a decision down.
    ///
    /// # Errors
    /// It cannot be written: then it must not take effect.
    pub fn note(&mut self, decision: &Decision<'_>) -> Result<()> {
        let Decision { asker, path, identity, rights, rule, refusal } = decision;
        let mut line = Map::from_iter([
            ("path".to_owned(), json!(path.to_string_lossy())),
            ("rights".into(), json!(if *rights == Rights::ReadOnly { "read-only" } else { "read-write" })),
            ("decision".into(), json!(if refusal.is_some() { "refused" } else { "allowed" })),
        ]);
        if let Some((device, inode)) = identity {
            line.insert("device".into(), json!(device));
            line.insert("inode".into(), json!(inode));
        }
        if let Some(rule) = rule {
            line.insert("rule".into(), json!(rule));
        }
        if let Some(Refusal { check, text }) = refusal {
            line.insert("check".into(), json!(check.word()));
            line.insert("reason".into(), json!(text));
        }
        self.write(*asker, line)
    }

    /// Writes down that something else happened: `event` in a word.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn event(&mut self, asker: Asker, event: &str, mut details: Map<String, Value>) -> Result<()> {
        details.insert("event".into(), json!(event));
        self.write(asker, details)
    }

    fn write(&mut self, asker: Asker, mut line: Map<String, Value>) -> Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        line.insert("time".into(), json!((now.as_secs_f64() * 1000.0).round() / 1000.0));
        line.insert("pid".into(), json!(asker.pid));
        line.insert("uid".into(), json!(asker.uid));
        line.insert("gid".into(), json!(asker.gid));
        let text = format!("{}\n", Value::Object(line));
        // One write, so that lines of several writers do not mix.
        let written = file.write_all(text.as_bytes());
        written.map_err(|source| Error::Open { path: self.path.clone(), purpose: " to write down a decision", source })
    }
}
