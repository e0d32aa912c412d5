// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The confined daemon as the manager sees it: a child process with one socket.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ExitStatus, Stdio};

use qmp::Client;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde_json::{Map, Value};

use crate::inspector::Program;
use crate::{Error, Result};

/// What a daemon is started with besides its first monitor.
#[derive(Debug, Default)]
pub struct Launch {
    /// A second monitor, whose clients come over this listener.
    pub monitor: Option<OwnedFd>,
    /// Whether it ends when the last NBD client has left.
    pub ends_with_clients: bool,
    /// Whether it lets go of standard error once it is ready.
    pub background: bool,
    /// Whether a Ctrl-C is for its manager alone, which has something to do before the daemon ends.
    pub deaf_to_terminal: bool,
}

/// A running daemon. Dropping it closes the socket, and then the daemon ends by itself.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    client: Client,
}

impl Daemon {
    /// Starts a daemon whose standard input is its monitor, and waits for its greeting: by then it is confined.
    ///
    /// # Errors
    /// It cannot be started, or ends before it greets (its own message is on standard error).
    pub fn start(program: &Program) -> Result<Daemon> {
        Daemon::start_with(program, &Launch::default())
    }

    /// The same with more to it.
    ///
    /// # Errors
    /// Those of [`start`](Daemon::start).
    pub fn start_with(program: &Program, launch: &Launch) -> Result<Daemon> {
        let doing = "could not start the confined daemon";
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(io::Error::from)
            .map_err(Error::process(doing))?;
        let mut command = program.verb("daemon");
        command.args(["--chardev", "socket,id=manager,fd=0", "--monitor", "manager", "--ends-with-monitors"]);
        let pipe = if launch.background { Some(sys::background::pipe().map_err(Error::process(doing))?) } else { None };
        if let Some((_, theirs)) = &pipe {
            command.arg(format!("--ready-fd={}", theirs.as_raw_fd()));
        }
        if launch.ends_with_clients {
            command.arg("--ends-with-clients");
        }
        if let Some(listener) = &launch.monitor {
            // The one descriptor besides the standard streams that the daemon inherits.
            fcntl_setfd(listener, FdFlags::empty()).map_err(io::Error::from).map_err(Error::process(doing))?;
            let chardev = format!("socket,id=others,fd={},server=on,wait=off", listener.as_raw_fd());
            command.args(["--chardev", &chardev, "--monitor", "others"]);
        }
        command.stdin(Stdio::from(theirs)).stdout(Stdio::null());
        if launch.deaf_to_terminal {
            command.process_group(0);
        }
        let child = command.spawn().map_err(Error::process(doing))?;
        // The pipe's other end stays open until the daemon has greeted, and so has written to it.
        // Our copy of the daemon's end goes with the command: if the daemon dies, the socket says so.
        drop(command);
        let client = Client::new(ours).map_err(|source| Error::Daemon { command: "the connection".into(), source })?;
        Ok(Daemon { child, client })
    }

    /// The daemon's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Runs a command and passes `fds` with it.
    ///
    /// # Errors
    /// The daemon refuses, or has gone.
    pub fn execute(&mut self, command: &str, arguments: Value, fds: &[BorrowedFd<'_>]) -> Result<Value> {
        let arguments = match arguments {
            Value::Object(arguments) => arguments,
            _ => Map::new(),
        };
        self.client
            .execute(command, arguments, fds)
            .map_err(|source| Error::Daemon { command: command.to_owned(), source })
    }

    /// Waits for the next event: its name and what it tells.
    ///
    /// # Errors
    /// The daemon has gone.
    pub fn next_event(&mut self) -> Result<(String, Value)> {
        let event = self.client.wait_event();
        let event = event.map_err(|source| Error::Daemon { command: "waiting for an event".into(), source })?;
        Ok((event.name, event.data))
    }

    /// A descriptor that is readable once the daemon has ended.
    ///
    /// # Errors
    /// `ESRCH` if it is gone already.
    pub fn pidfd(&self) -> io::Result<OwnedFd> {
        let pid = rustix::process::Pid::from_child(&self.child);
        Ok(rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?)
    }

    /// Asks the daemon to end, and waits for it.
    ///
    /// # Errors
    /// Waiting failed.
    pub fn stop(mut self) -> io::Result<ExitStatus> {
        // A daemon that got the same Ctrl-C has gone already.
        let _ = self.client.execute("quit", Map::new(), &[]);
        self.child.wait()
    }

    /// Waits until the daemon has ended.
    ///
    /// # Errors
    /// Waiting failed.
    pub fn wait(mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }
}
