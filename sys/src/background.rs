// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Going on in the background once all is ready, without a fork of a process that may have threads: the program that was
//! started starts itself again, waits on a pipe until that one says it is ready, and ends.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Command, Stdio};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};

/// What the pipe says when all is well.
const READY: &[u8] = b"ready";

/// Runs `command` with `OPTION=N` as one more argument, N being the pipe for [`Ready::take`], and returns when it is ready.
/// Its standard error is still the caller's until then.
///
/// # Errors
/// It cannot be started, or ended before it was ready: then it has said why itself.
pub fn start(mut command: Command, option: &str) -> io::Result<()> {
    let (ours, theirs) = pipe()?;
    command.arg(format!("{option}={}", theirs.as_raw_fd())).stdout(Stdio::null());
    let mut child = command.spawn()?;
    drop(theirs);
    let mut said = Vec::new();
    File::from(ours).read_to_end(&mut said)?;
    if said == READY {
        return Ok(());
    }
    Err(io::Error::other(format!("it ended before it was ready ({})", child.wait()?)))
}

/// A pipe for [`Ready::take`]: the end that is kept, and the end that a child inherits by its number.
///
/// # Errors
/// `EMFILE`.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
    fcntl_setfd(&theirs, FdFlags::empty())?;
    Ok((ours, theirs))
}

/// The other end: the process that goes on.
#[derive(Debug)]
pub struct Ready {
    pipe: OwnedFd,
    null: File,
}

impl Ready {
    /// Takes the pipe and leaves the terminal's session. Call it before the process is confined.
    ///
    /// # Errors
    /// The number is no inherited descriptor, or there is no `/dev/null`.
    pub fn take(number: i32) -> io::Result<Ready> {
        let pipe = crate::fd::inherited(number)?;
        rustix::process::setsid()?;
        Ok(Ready { pipe, null: File::options().write(true).open("/dev/null")? })
    }

    /// Lets go of standard error, and says that all is ready.
    ///
    /// # Errors
    /// Those of the two calls; whoever waits may have gone.
    pub fn tell(self) -> io::Result<()> {
        crate::fd::replace(io::stderr().as_fd(), self.null.as_fd())?;
        File::from(self.pipe).write_all(READY)
    }
}
