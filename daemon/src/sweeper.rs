// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Removes what a daemon leaves in the file system: the files of sockets that its command line asked for, and its PID file.
//!
//! A confined process can remove nothing, and must not be given the right. So a child that is started before, and that hears
//! nothing but the end of a stream, does it: at a proper end while the daemon waits, and also after a daemon that was killed.

use std::ffi::OsString;
use std::fs::{Metadata, symlink_metadata};
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sys::signal::{self, Signals};

/// The program's verb for the child; not for users.
pub const VERB: &str = "sweep";

/// The child, from the daemon's side.
#[derive(Debug)]
pub struct Sweeper(UnixStream);

impl Sweeper {
    /// Starts the child for `files` as they are now; what others put in their places later stays. Call it before the process is
    /// confined.
    ///
    /// # Errors
    /// A file is not there, or there is no process to be had.
    pub fn start(files: &[PathBuf]) -> io::Result<Sweeper> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut command = Command::new("/proc/self/exe");
        command.arg(VERB);
        for file in files {
            command.arg(identity(&symlink_metadata(file)?)).arg(std::path::absolute(file)?);
        }
        // Nothing else of ours: whoever waits for the end of our streams must not wait for the child's.
        command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn()?;
        Ok(Sweeper(ours))
    }
}

impl Drop for Sweeper {
    /// Returns when the files are gone.
    fn drop(&mut self) {
        // A child that was killed has closed its end.
        let _ = self.0.shutdown(Shutdown::Write);
        let _ = self.0.read(&mut [0]);
    }
}

impl AsFd for Sweeper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The child: waits for the end of standard input and removes the files. `arguments` are identities and paths in turn.
///
/// # Errors
/// Standard input cannot be read.
pub fn run(arguments: &[OsString]) -> io::Result<()> {
    // What ends the daemon must not end this one before; it ends with the stream.
    let _blocked = Signals::block(&[signal::INT, signal::TERM, signal::HUP])?;
    io::copy(&mut io::stdin().lock(), &mut io::sink())?;
    for file in arguments.chunks_exact(2) {
        let path = Path::new(&file[1]);
        if symlink_metadata(path).is_ok_and(|metadata| file[0] == identity(&metadata).as_str()) {
            let _ = std::fs::remove_file(path);
        }
    }
    Ok(())
}

fn identity(metadata: &Metadata) -> String {
    format!("{}:{}", metadata.dev(), metadata.ino())
}
