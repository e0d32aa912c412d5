// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The service manager (systemd), if there is one: it is told when all is ready, and keeps listening sockets over a restart
//! (sd_notify(3), `FDSTORE=1`).

use std::collections::BTreeMap;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    sendmsg_addr, socket_with,
};

/// The first number of passed descriptors (`SD_LISTEN_FDS_START`).
const FIRST: i32 = 3;

/// Sockets that were kept over the restart, by name.
#[derive(Debug, Default)]
pub struct Stored(BTreeMap<String, OwnedFd>);

impl Stored {
    /// What this process was passed. Only the first call finds something.
    pub fn inherited() -> Stored {
        let text = |name: &str| std::env::var(name).unwrap_or_default();
        if text("LISTEN_PID").parse() != Ok(std::process::id()) {
            return Stored::default();
        }
        let names = text("LISTEN_FDNAMES");
        let count = text("LISTEN_FDS").parse().unwrap_or(0);
        let numbers = (FIRST..).zip(names.split(':')).take(count);
        Stored(numbers.filter_map(|(number, name)| Some((name.to_owned(), sys::fd::inherited(number).ok()?))).collect())
    }

    /// Takes a daemon's socket out.
    pub fn take(&mut self, daemon: &str, kind: &str) -> Option<OwnedFd> {
        self.0.remove(&format!("{daemon}.{kind}"))
    }

    /// Leaves a daemon's socket with the service manager.
    pub fn leave(&self, daemon: &str, kind: &str, socket: BorrowedFd<'_>) {
        tell(&format!("FDSTORE=1\nFDNAME={daemon}.{kind}\n"), &[socket]);
    }

    /// Has the service manager let go of a daemon's sockets.
    pub fn forget(&mut self, daemon: &str) {
        for kind in ["monitor", "nbd"] {
            drop(self.take(daemon, kind));
            tell(&format!("FDSTOREREMOVE=1\nFDNAME={daemon}.{kind}\n"), &[]);
        }
    }
}

/// Says that all is ready.
pub fn ready() {
    tell("READY=1\n", &[]);
}

/// Without a service manager nobody listens, and nothing depends on it.
fn tell(text: &str, fds: &[BorrowedFd<'_>]) {
    let Some(place) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match place.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddrUnix::new_abstract_name(name),
        None => SocketAddrUnix::new(place.as_bytes()),
    };
    let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
    if let (Ok(address), Ok(socket)) = (address, socket) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let _ = sendmsg_addr(socket, &address, &[IoSlice::new(text.as_bytes())], &mut control, SendFlags::NOSIGNAL);
    }
}
