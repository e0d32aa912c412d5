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
/// What is said when there is none after all.
const NOTHING: &[u8] = b"nothing\n";
/// What the process that waits says first: from now on no signal ends it.
const READY: &[u8] = b"ready\n";

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
        let mut command = Command::new(Program::THIS);
        command.arg("publish").args([&temporary, &path]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let waiting = command.spawn().context("could not start the process that publishes the file")?;
        let mut unpublished = Unpublished { waiting };
        // Not before somebody is there who removes it, whenever this process is ended.
        unpublished.hear(READY)?;
        let file = File::options().read(true).write(true).create_new(true).open(&temporary);
        let file = match file {
            Ok(file) => file,
            Err(e) => {
                unpublished.say(NOTHING)?;
                return Err(e).with_context(|| format!("could not create '{}'", temporary.display()));
            }
        };
        if let Ok(before) = std::fs::metadata(&path) {
            file.set_permissions(before.permissions())?;
        }
        Ok((unpublished, file))
    }

    fn hear(&mut self, word: &[u8]) -> anyhow::Result<()> {
        let mut heard = vec![0; word.len()];
        let out = self.waiting.stdout.as_mut().context("nobody to hear")?;
        out.read_exact(&mut heard).context("the process that publishes the file has gone")?;
        if heard == word { Ok(()) } else { bail!("the process that publishes the file does not say that it is ready") }
    }

    /// The last word.
    fn say(&mut self, word: &[u8]) -> anyhow::Result<()> {
        match self.waiting.stdin.take() {
            Some(mut ask) => ask.write_all(word).context("the process that publishes the file has gone"),
            None => Ok(()),
        }
    }

    /// The file is whole. Returns when it has its name.
    pub fn publish(mut self) -> anyhow::Result<()> {
        self.say(WHOLE)?;
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
    let mut out = std::io::stdout();
    out.write_all(READY).and_then(|()| out.flush())?;
    let mut said = Vec::new();
    std::io::stdin().read_to_end(&mut said)?;
    if said == NOTHING {
        return Ok(());
    }
    if said != WHOLE {
        return match std::fs::remove_file(temporary) {
            // Its maker was ended before it made the file.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            removed => Ok(removed?),
        };
    }
    let answer = match std::fs::rename(temporary, path) {
        Ok(()) => "published\n".to_owned(),
        Err(e) => {
            let _ = std::fs::remove_file(temporary);
            format!("could not give '{}' its name: {e}\n", path.display())
        }
    };
    Ok(out.write_all(answer.as_bytes())?)
}
