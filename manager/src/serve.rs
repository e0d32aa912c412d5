// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A disk image on an NBD socket: open, pass, export.

use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, poll};
use serde_json::json;
use sys::signal::{self, Signals};

use crate::chain::{self, Chain, Policy};
use crate::daemon::Daemon;
use crate::disk;
use crate::inspector::Program;
use crate::opening::Rights;
use crate::{Error, Result};

/// The node and export id of the one disk.
const DISK: &str = "disk";

/// What to serve, and where.
#[derive(Clone, Debug)]
pub struct Request {
    /// The image.
    pub image: PathBuf,
    /// What may be opened, and how.
    pub policy: Policy,
    /// Where the socket will be.
    pub socket: PathBuf,
    /// The export's name; empty is the default export.
    pub name: String,
    /// Where others find a monitor of the daemon.
    pub monitor: Option<PathBuf>,
}

/// A disk that is being served.
#[derive(Debug)]
pub struct Served {
    /// The daemon.
    pub daemon: Daemon,
    /// What it serves.
    pub chain: Chain,
    sockets: Vec<PathBuf>,
}

/// Opens the image, starts a confined daemon, passes it everything, and exports the disk.
///
/// # Errors
/// Any step's; nothing is left behind.
pub fn serve(program: &Program, request: &Request) -> Result<Served> {
    let chain = chain::open(program, &request.image, &request.policy)?;
    let monitor = request.monitor.as_deref().map(listen).transpose()?;
    let mut daemon = Daemon::start_with(program, monitor)?;
    let node = disk::attach(&mut daemon, &chain, DISK)?;
    let listener = listen(&request.socket)?;
    let sockets = [Some(request.socket.clone()), request.monitor.clone()].into_iter().flatten().collect();
    let served = Served { daemon, chain, sockets };
    served.export(&listener, &node, &request.name)
}

impl Served {
    fn export(mut self, listener: &UnixListener, node: &str, name: &str) -> Result<Served> {
        self.daemon.execute("getfd", json!({ "fdname": "nbd" }), &[listener.as_fd()])?;
        self.daemon.execute("nbd-server-start", json!({ "addr": { "type": "fd", "data": { "str": "nbd" } } }), &[])?;
        let writable = self.chain.layers[0].image.rights == Rights::ReadWrite;
        let export = json!({ "type": "nbd", "id": DISK, "node-name": node, "name": name, "writable": writable });
        self.daemon.execute("block-export-add", export, &[])?;
        Ok(self)
    }

    /// Ends the daemon properly and removes its sockets.
    ///
    /// # Errors
    /// The daemon cannot be waited for.
    pub fn stop(self) -> Result<()> {
        for socket in &self.sockets {
            let _ = std::fs::remove_file(socket);
        }
        self.daemon.stop().map(drop).map_err(Error::process("could not wait for the daemon"))
    }
}

/// Waits for what ends a served disk. Made before anything is started, so that no signal is missed.
#[derive(Debug)]
pub struct Waiting(Signals);

impl Waiting {
    /// Collects SIGINT, SIGTERM and SIGHUP from now on.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn new() -> std::io::Result<Waiting> {
        Ok(Waiting(Signals::block(&[signal::INT, signal::TERM, signal::HUP])?))
    }

    /// Returns at a signal.
    ///
    /// # Errors
    /// The daemon has ended.
    pub fn until_signal_or_end(&self, daemon: &Daemon) -> Result<()> {
        let failed = Error::process("could not wait for the daemon");
        let pidfd = daemon.pidfd().map_err(failed)?;
        loop {
            let mut fds = [PollFd::new(&self.0, PollFlags::IN), PollFd::new(&pidfd, PollFlags::IN)];
            let polled = poll(&mut fds, None).map_err(std::io::Error::from);
            let [signal, ended] = fds.map(|fd| !fd.revents().is_empty());
            polled.map_err(Error::process("could not wait for the daemon"))?;
            // A Ctrl-C reaches both: then the end of the daemon is no accident.
            if signal && self.0.next().map_err(Error::process("could not read a signal"))?.is_some() {
                return Ok(());
            }
            if ended {
                return Err(Error::Refused("the daemon has ended; its own message says why".into()));
            }
        }
    }
}

/// The URI of an export on a unix socket (NBD uri.md), with what URIs do not allow escaped.
pub fn uri(socket: &Path, name: &str) -> String {
    let escape = |text: &str| {
        text.bytes().fold(String::new(), |mut out, byte| {
            if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
                out.push(byte.into());
            } else {
                out.push_str(&format!("%{byte:02X}"));
            }
            out
        })
    };
    format!("nbd+unix:///{}?socket={}", escape(name), escape(&socket.to_string_lossy()))
}

/// Binds the socket. One that nobody listens on any more is replaced; a living one is not.
fn listen(path: &Path) -> Result<UnixListener> {
    let failed = |source| Error::Open { path: path.to_owned(), purpose: " to listen there", source };
    match UnixListener::bind(path) {
        Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
            // Connecting to a file that is no socket is refused in the same way, and a file is not ours to remove.
            let dead = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
                && UnixStream::connect(path).is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused);
            if !dead {
                return Err(failed(e));
            }
            std::fs::remove_file(path).map_err(failed)?;
            UnixListener::bind(path).map_err(failed)
        }
        other => other.map_err(failed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_escapes_what_it_must() {
        assert_eq!(uri(Path::new("/tmp/a b&c"), "x?y"), "nbd+unix:///x%3Fy?socket=/tmp/a%20b%26c");
    }
}
