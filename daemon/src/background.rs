// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `--daemonize` and `--pidfile`: telling whoever waits that everything on the command line is done.
//!
//! The daemon does not fork. The process that was started starts itself again with the same descriptors, waits on a pipe until
//! that one is ready, and ends; so the one that stays has had one thread and one memory all along.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Command, Stdio};

use fdset::FdPolicy;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::command_line::{Style, UsageError};
use crate::state::Daemon;

/// The option by which the starting process names its pipe; not for users.
pub const READY_OPTION: &str = "ready-fd";

/// What the pipe says when all is well.
const READY: &[u8] = b"ready";

/// Starts `doorless daemon` with `arguments` and returns when it is ready.
///
/// # Errors
/// It cannot be started, or ended before it was ready: then it has said why.
pub fn start(style: Style, arguments: impl Iterator<Item = OsString>) -> Result<(), UsageError> {
    let failed = |e: &dyn std::fmt::Display| UsageError(format!("could not go into the background: {e}"));
    let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| failed(&e))?;
    fcntl_setfd(&theirs, FdFlags::empty()).map_err(|e| failed(&e))?;
    let mut command = Command::new("/proc/self/exe");
    let policy = match style.fd_policy {
        FdPolicy::Strict => "strict",
        FdPolicy::Compat => "compat",
    };
    command.args(["daemon".into(), format!("--{READY_OPTION}={}", theirs.as_raw_fd())]);
    command.arg(format!("--fd-policy={policy}")).args(arguments);
    // Standard input may be a monitor's socket; what the daemon has to say before it is ready still goes to the terminal.
    command.stdout(Stdio::null());
    let mut child = command.spawn().map_err(|e| failed(&e))?;
    drop(theirs);
    let mut said = Vec::new();
    File::from(ours).read_to_end(&mut said).map_err(|e| failed(&e))?;
    if said == READY {
        return Ok(());
    }
    let status = child.wait().map_err(|e| failed(&e))?;
    Err(failed(&format_args!("it ended before it was ready ({status})")))
}

/// What is announced once every option has taken effect. Opened before confinement.
#[derive(Debug, Default)]
pub struct Announcement {
    pidfile: Option<(String, File)>,
    ready: Option<(OwnedFd, File)>,
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

    /// Takes the pipe of the process that waits, and leaves the terminal.
    ///
    /// # Errors
    /// The number is no descriptor, or there is no `/dev/null`.
    pub fn ready(&mut self, number: &str) -> Result<(), UsageError> {
        let failed = |e: &dyn std::fmt::Display| UsageError(format!("could not go into the background: {e}"));
        let number: i32 = number.parse().map_err(|e| failed(&e))?;
        let pipe = sys::fd::inherited(number).map_err(|e| failed(&e))?;
        rustix::process::setsid().map_err(|e| failed(&e))?;
        let null = File::options().write(true).open("/dev/null").map_err(|e| failed(&e))?;
        self.ready = Some((pipe, null));
        Ok(())
    }

    /// Writes the process id and says that the daemon is ready.
    ///
    /// # Errors
    /// Nothing can be written.
    pub fn make(self, daemon: &mut Daemon) -> Result<(), UsageError> {
        if let Some((path, mut file)) = self.pidfile {
            let written = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
            written.map_err(|e| UsageError(format!("cannot create PID file: {path}: {e}")))?;
            // Stays open: its lock says that the process lives.
            daemon.ledger.keep(file.into(), "the PID file");
        }
        if let Some((pipe, null)) = self.ready {
            let failed = |e: &dyn std::fmt::Display| UsageError(format!("could not go into the background: {e}"));
            sys::fd::replace(std::io::stderr().as_fd(), null.as_fd()).map_err(|e| failed(&e))?;
            File::from(pipe).write_all(READY).map_err(|e| failed(&e))?;
        }
        Ok(())
    }
}
