// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Asking the confined inspector about an image: the manager itself never looks at a byte of it.
//!
//! The inspector is this same program, started once per image with the image as its standard input and nothing else. It
//! confines itself, reads the header, answers one JSON object, and ends.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use rustix::pipe::{PipeFlags, pipe_with};
use serde::Deserialize;
use sys::spawn::{self, Child, Launch};

use crate::{Error, Result};

/// Longest answer that is read, bytes: most of it is the names of extents.
const MAX_ANSWER: usize = 2 << 20;

/// What an image says about itself. Names are untrusted text.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub struct Inspection {
    /// The driver that reads it.
    pub format: String,
    /// Bytes that a guest sees.
    pub virtual_size: u64,
    /// Whether the driver can write such images.
    pub writable: bool,
    /// The backing file's name.
    pub backing: Option<String>,
    /// The backing file's format.
    pub backing_format: Option<String>,
    /// The external data file's name.
    pub data_file: Option<String>,
    /// The names of the extents that are files of their own, in order.
    #[serde(default)]
    pub extents: Vec<String>,
    /// Which content this is, for formats that say it.
    pub cid: Option<u32>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Answer {
    Error { error: String },
    Inspection(Inspection),
}

/// How the programs of this project are started.
#[derive(Clone, Debug)]
pub struct Program {
    /// The program; [`Program::THIS`] is the running one.
    pub executable: PathBuf,
    /// Arguments for every started process that say how it confines itself.
    pub confinement: Vec<String>,
}

impl Program {
    /// The running program: the same binary even if its file was replaced meanwhile.
    pub const THIS: &str = "/proc/self/exe";

    /// The program whose file lies where the running one's lies when this is called: later, what has replaced it.
    pub fn successor(&self) -> Program {
        let this = || std::env::current_exe().ok().filter(|_| self.executable == Path::new(Program::THIS));
        Program { executable: this().unwrap_or_else(|| self.executable.clone()), ..self.clone() }
    }

    /// The program, started with a verb in a pid namespace of its own where the kernel grants one.
    pub(crate) fn isolated(
        &self,
        verb: &str,
        arguments: Vec<String>,
        stdin: BorrowedFd<'_>,
        stdout: BorrowedFd<'_>,
        own_group: bool,
    ) -> io::Result<Child> {
        let words = std::iter::once(verb.to_owned()).chain(self.confinement.iter().cloned()).chain(arguments);
        let arguments = words.map(CString::new).collect::<std::result::Result<_, _>>()?;
        spawn::start(&Launch { program: self.executable.as_os_str(), arguments, stdin, stdout, own_group, alone: true })
    }

    /// What the image in `file` says about itself; `format` keeps the inspector from guessing.
    ///
    /// # Errors
    /// The inspector cannot be started, or refuses the image.
    pub fn inspect(&self, file: &File, path: &Path, format: Option<&str>) -> Result<Inspection> {
        let doing = "could not run the confined inspector";
        let arguments = format.map(|format| vec!["--format".to_owned(), format.to_owned()]).unwrap_or_default();
        let (answer, theirs) = pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from).map_err(Error::process(doing))?;
        let mut child =
            self.isolated("inspect", arguments, file.as_fd(), theirs.as_fd(), false).map_err(Error::process(doing))?;
        drop(theirs);
        let mut said = Vec::new();
        // One byte more than is taken: the rest ends the inspector, whom nobody listens to any more.
        let most = MAX_ANSWER as u64 + 1;
        let read = File::from(answer).take(most).read_to_end(&mut said);
        let status = child.wait().map_err(Error::process(doing))?;
        read.map_err(Error::process(doing))?;
        let refused = |text: String| Error::Image { path: path.to_owned(), text };
        if said.len() > MAX_ANSWER {
            return Err(refused("the inspector's answer is too long".into()));
        }
        match serde_json::from_slice(&said) {
            Ok(Answer::Inspection(inspection)) => Ok(inspection),
            Ok(Answer::Error { error }) => Err(refused(error)),
            Err(_) => Err(refused(format!("the inspector ended without an answer ({status})"))),
        }
    }
}
