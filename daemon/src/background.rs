// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `--daemonize` and `--pidfile`: telling whoever waits that everything on the command line is done.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use fdset::FdPolicy;
use sys::background::Ready;

use crate::command_line::{Style, UsageError};
use crate::state::Daemon;

/// The option by which the starting process names its pipe; not for users.
pub const READY_OPTION: &str = "ready-fd";

/// Starts `doorless daemon` with `arguments` and returns when it is ready.
///
/// # Errors
/// It cannot be started, or ended before it was ready: then it has said why.
pub fn start(style: Style, arguments: impl Iterator<Item = OsString>) -> Result<(), UsageError> {
    let mut command = Command::new("/proc/self/exe");
    let policy = match style.fd_policy {
        FdPolicy::Strict => "strict",
        FdPolicy::Compat => "compat",
    };
    // Standard input stays: it may be a monitor's socket.
    command.arg("daemon").arg(format!("--fd-policy={policy}")).args(arguments);
    sys::background::start(command, &format!("--{READY_OPTION}")).map_err(|e| failed(&e))
}

fn failed(e: &dyn std::fmt::Display) -> UsageError {
    UsageError(format!("could not go into the background: {e}"))
}

/// What is announced once every option has taken effect. Opened before confinement.
#[derive(Debug, Default)]
pub struct Announcement {
    pidfile: Option<(String, File)>,
    ready: Option<Ready>,
}

impl Announcement {
    /// Opens the file for the process id.
    ///
    /// # Errors
    /// A sentence for the user.
    pub fn pidfile(&mut self, path: String) -> Result<(), UsageError> {
        let file = File::options().write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(|e| UsageError(format!("cannot create PID file: Cannot open pid file {path}: {e}")))?;
        let mine = sys::lock::exclude(&file, 0);
        mine.map_err(|_| UsageError(format!("cannot create PID file: {path} belongs to a process that runs")))?;
        self.pidfile = Some((path, file));
        Ok(())
    }

    /// The PID file's path.
    pub fn file(&self) -> Option<&Path> {
        self.pidfile.as_ref().map(|(path, _)| Path::new(path))
    }

    /// Takes the pipe of the process that waits.
    ///
    /// # Errors
    /// The number is no descriptor, or there is no `/dev/null`.
    pub fn ready(&mut self, number: &str) -> Result<(), UsageError> {
        let number = number.parse().map_err(|e| failed(&e))?;
        self.ready = Some(Ready::take(number).map_err(|e| failed(&e))?);
        Ok(())
    }

    /// Writes the process id and says that the daemon is ready.
    ///
    /// # Errors
    /// Nothing can be written.
    pub fn make(self, daemon: &mut Daemon) -> Result<(), UsageError> {
        if let Some((path, mut file)) = self.pidfile {
            let written = file.set_len(0).and_then(|()| writeln!(file, "{}", sys::process::id()));
            written.map_err(|e| UsageError(format!("cannot create PID file: {path}: {e}")))?;
            // Stays open: its lock says that the process lives.
            daemon.ledger.keep(file.into(), "the PID file");
        }
        if let Some(ready) = self.ready {
            ready.tell().map_err(|e| failed(&e))?;
        }
        Ok(())
    }
}
