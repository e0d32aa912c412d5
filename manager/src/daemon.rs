// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The confined daemon as the manager sees it: a child process with one socket.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitStatus;
use std::time::Duration;

use qmp::{Client, ClientError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde_json::{Map, Value, json};
use sys::spawn::Child;

use crate::inspector::Program;
use crate::{Error, Result};

/// What a daemon is started with besides its first monitor.
#[derive(Debug, Default)]
pub struct Launch {
    /// A second monitor, whose clients come over this listener.
    pub monitor: Option<OwnedFd>,
    /// Who waits for reads (`doorless daemon --aio`); `None` is its default.
    pub aio: Option<String>,
    /// Whether it ends when the last NBD client has left.
    pub ends_with_clients: bool,
    /// Whether it lets go of standard error once it is ready.
    pub background: bool,
    /// Whether it tries every way out before it serves, and ends if one is open.
    pub attest: bool,
    /// Whether a Ctrl-C is for its manager alone, which has something to do before the daemon ends.
    pub deaf_to_terminal: bool,
    /// Whether it goes on when its manager has gone.
    pub survives: bool,
    /// How long it may take to answer.
    pub patience: Option<Duration>,
}

/// A running daemon. Dropping it closes the socket, and then the daemon ends by itself, unless it was started to survive.
#[derive(Debug)]
pub struct Daemon {
    process: Process,
    client: Client,
}

#[derive(Debug)]
enum Process {
    Child(Child),
    /// Another manager's child; that manager has gone.
    Adopted {
        pid: u32,
        pidfd: OwnedFd,
    },
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
        let mut arguments: Vec<String> =
            ["--chardev", "socket,id=manager,fd=0", "--monitor", "manager"].map(str::to_owned).to_vec();
        if !launch.survives {
            arguments.push("--ends-with-monitors".into());
        }
        if launch.attest {
            arguments.push("--attest".into());
        }
        let pipe = if launch.background { Some(sys::background::pipe().map_err(Error::process(doing))?) } else { None };
        if let Some((_, theirs)) = &pipe {
            arguments.push(format!("--ready-fd={}", theirs.as_raw_fd()));
        }
        if let Some(aio) = &launch.aio {
            arguments.push(format!("--aio={aio}"));
        }
        if launch.ends_with_clients {
            arguments.push("--ends-with-clients".into());
        }
        if let Some(listener) = &launch.monitor {
            // The one descriptor besides the standard streams that the daemon inherits.
            fcntl_setfd(listener, FdFlags::empty()).map_err(io::Error::from).map_err(Error::process(doing))?;
            let chardev = format!("socket,id=others,fd={},server=on,wait=off", listener.as_raw_fd());
            arguments.extend(["--chardev".into(), chardev, "--monitor".into(), "others".into()]);
        }
        let null = File::options().write(true).open("/dev/null").map_err(Error::process(doing))?;
        let spawned = program.isolated("daemon", arguments, theirs.as_fd(), null.as_fd(), launch.deaf_to_terminal);
        if let Some(listener) = &launch.monitor {
            // It stays here for the next daemon, and is none of other children's business.
            fcntl_setfd(listener, FdFlags::CLOEXEC).map_err(io::Error::from).map_err(Error::process(doing))?;
        }
        let child = spawned.map_err(Error::process(doing))?;
        // The pipe's other end stays open until the daemon has greeted, and so has written to it.
        // Our copy of the daemon's end goes: if the daemon dies, the socket says so.
        drop(theirs);
        match Client::with_timeout(ours, launch.patience) {
            Ok(client) => Ok(Daemon { process: Process::Child(child), client }),
            Err(source) => {
                // It has ended, or is of no use: reaped, because nobody else waits for it.
                let mut child = child;
                let _ = child.kill();
                let _ = child.wait();
                Err(Error::Daemon { command: "the connection".into(), source })
            }
        }
    }

    /// Takes over a daemon whose manager has gone: the process `pid` that began at `began` (see [`began`](Daemon::began)), by
    /// another of its monitors.
    ///
    /// # Errors
    /// That process is no more, or its monitor does not answer within `patience`.
    pub fn adopt(pid: u32, began: u64, monitor: &Path, patience: Duration) -> Result<Daemon> {
        let doing = "could not adopt a daemon";
        let gone = || Error::process(doing)(io::Error::from(io::ErrorKind::NotFound));
        let number = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).ok_or_else(gone)?;
        let pidfd = rustix::process::pidfd_open(number, rustix::process::PidfdFlags::empty()).map_err(|_| gone())?;
        // Looked at once the process cannot be mistaken for another any more.
        if started(pid) != Some(began) {
            return Err(gone());
        }
        let talk = || {
            let socket = UnixStream::connect(monitor).map_err(Error::process(doing))?;
            let client = Client::with_timeout(socket, Some(patience));
            client.map_err(|source| Error::Daemon { command: "the connection".into(), source })
        };
        // One that was killed a moment ago still has its number, but nobody listens any more.
        let client = talk().map_err(|e| if ends_soon(&pidfd) { gone() } else { e })?;
        Ok(Daemon { process: Process::Adopted { pid, pidfd }, client })
    }

    /// The daemon's process id.
    pub fn pid(&self) -> u32 {
        match &self.process {
            Process::Child(child) => child.pid().as_raw_nonzero().get().unsigned_abs(),
            Process::Adopted { pid, .. } => *pid,
        }
    }

    /// When its process began, in clock ticks since the machine started: with its number, what it is known by. `None` if it
    /// has gone.
    pub fn began(&self) -> Option<u64> {
        started(self.pid())
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

    /// The layers of confinement that are not in force: names, and why not.
    ///
    /// # Errors
    /// The daemon has gone.
    pub fn missing_layers(&mut self) -> Result<Vec<String>> {
        let confinement = self.execute("query-confinement", Value::Null, &[])?;
        let layers = confinement["layers"].as_array().into_iter().flatten();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let missing = layers.filter(|layer| layer["in-force"] != true);
        Ok(missing.map(|layer| format!("{}: {}", text(&layer["name"]), text(&layer["detail"]))).collect())
    }

    /// Closes an export on its clients, and returns when its node is free.
    ///
    /// # Errors
    /// The daemon refuses, or has gone.
    pub fn end_export(&mut self, id: &Value) -> Result<()> {
        drop(self.client.take_events());
        self.execute("block-export-del", json!({ "id": id, "mode": "hard" }), &[])?;
        let gone = |(event, data): &(String, Value)| event == "BLOCK_EXPORT_DELETED" && data.get("id") == Some(id);
        while !gone(&self.next_event()?) {}
        Ok(())
    }

    /// Closes all exports on their clients, and returns when there are none.
    ///
    /// # Errors
    /// The daemon has gone.
    pub fn end_exports(&mut self) -> Result<()> {
        loop {
            let exports = self.execute("query-block-exports", json!({}), &[])?;
            let exports = exports.as_array().map_or(&[][..], Vec::as_slice);
            if exports.is_empty() {
                return Ok(());
            }
            for export in exports.iter().filter(|export| export["shutting-down"] != true) {
                // One that ends by itself at this moment refuses; its end is told all the same.
                let _ = self.execute("block-export-del", json!({ "id": export["id"], "mode": "hard" }), &[]);
            }
            self.next_event()?;
        }
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
        match &self.process {
            Process::Child(child) => {
                Ok(rustix::process::pidfd_open(child.pid(), rustix::process::PidfdFlags::empty())?)
            }
            Process::Adopted { pidfd, .. } => pidfd.try_clone(),
        }
    }

    /// Asks the daemon to end, and waits for it.
    ///
    /// # Errors
    /// Waiting failed.
    pub fn stop(mut self) -> io::Result<Option<ExitStatus>> {
        // A daemon that got the same Ctrl-C has gone already.
        let asked = self.client.execute("quit", Map::new(), &[]);
        match asked {
            Err(ClientError::Io(e)) if e.kind() == io::ErrorKind::TimedOut => self.kill(),
            _ => self.wait(),
        }
    }

    /// Ends a daemon that may not be able to listen any more, and waits for it.
    ///
    /// # Errors
    /// Waiting failed.
    pub fn kill(mut self) -> io::Result<Option<ExitStatus>> {
        match &mut self.process {
            Process::Child(child) => child.kill()?,
            // It may have ended just now.
            Process::Adopted { pidfd, .. } => drop(sys::signal::send(pidfd, sys::signal::KILL)),
        }
        self.wait()
    }

    /// Waits until the daemon has ended; with what, if it is this process's own child.
    ///
    /// # Errors
    /// Waiting failed.
    pub fn wait(mut self) -> io::Result<Option<ExitStatus>> {
        match &mut self.process {
            Process::Child(child) => child.wait().map(Some),
            Process::Adopted { pidfd, .. } => {
                while poll(&mut [PollFd::new(pidfd, PollFlags::IN)], None) == Err(Errno::INTR) {}
                Ok(None)
            }
        }
    }
}

/// Whether a process has ended, or does within a second.
fn ends_soon(pidfd: &OwnedFd) -> bool {
    let second = Timespec { tv_sec: 1, tv_nsec: 0 };
    poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&second)).is_ok_and(|ended| ended > 0)
}

/// When a process that lives began (proc_pid_stat(5), field 22).
fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before may have blanks and brackets in it.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    // One that nobody has waited for yet is no more, all the same.
    let living = fields.next().is_some_and(|state| !matches!(state, "Z" | "X"));
    fields.nth(18).filter(|_| living)?.parse().ok()
}
