// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A new file under its final name only once it is whole. A confined process can rename nothing, so another one waits beside it:
//! it renames when it is told to, and removes the half file when whoever made it has gone without a word.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail};
use manager::inspector::Program;
use sys::signal::{self, Signals};

/// What is said when the file is whole.
const WHOLE: &[u8] = b"whole\n";

/// A file under a temporary name, and the process that waits for it.
pub struct Unpublished {
    waiting: Child,
}

impl Unpublished {
    /// Makes a file beside `path`, to be published there. Call it before the process is confined.
    pub fn create(path: &Path) -> anyhow::Result<(Unpublished, File)> {
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let name = path.file_name().with_context(|| format!("'{}' names no file", path.display()))?;
        let hidden = format!(".{}.{}.part", name.display(), std::process::id());
        let temporary = path.with_file_name(hidden);
        let file = File::options().read(true).write(true).create_new(true).open(&temporary);
        let file = file.with_context(|| format!("could not create '{}'", temporary.display()))?;
        if let Ok(before) = std::fs::metadata(&path) {
            file.set_permissions(before.permissions())?;
        }
        let mut command = Command::new(Program::THIS);
        command.arg("publish").args([&temporary, &path]).stdin(Stdio::piped()).stdout(Stdio::piped());
        match command.spawn() {
            Ok(waiting) => Ok((Unpublished { waiting }, file)),
            Err(e) => {
                let _ = std::fs::remove_file(&temporary);
                Err(e).context("could not start the process that publishes the file")
            }
        }
    }

    /// The file is whole. Returns when it has its name.
    pub fn publish(mut self) -> anyhow::Result<()> {
        if let Some(mut ask) = self.waiting.stdin.take() {
            ask.write_all(WHOLE).context("the process that publishes the file has gone")?;
        }
        let mut answer = String::new();
        if let Some(mut out) = self.waiting.stdout.take() {
            out.read_to_string(&mut answer)?;
        }
        if answer == "published\n" { Ok(()) } else { bail!("{}", answer.trim_end()) }
    }
}

/// Waits for the word, in the other process.
pub fn finish(temporary: &Path, path: &PathBuf) -> anyhow::Result<()> {
    // Ctrl-C is for the other one, whose end is heard here.
    let _blocked = Signals::block(&[signal::INT, signal::TERM, signal::HUP])?;
    let mut said = Vec::new();
    std::io::stdin().read_to_end(&mut said)?;
    if said != WHOLE {
        return Ok(std::fs::remove_file(temporary)?);
    }
    let answer = match std::fs::rename(temporary, path) {
        Ok(()) => "published\n".to_owned(),
        Err(e) => {
            let _ = std::fs::remove_file(temporary);
            format!("could not give '{}' its name: {e}\n", path.display())
        }
    };
    Ok(std::io::stdout().write_all(answer.as_bytes())?)
}
