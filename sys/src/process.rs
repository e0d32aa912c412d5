// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who a process is: itself to others, and the other end of a unix socket to it.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::OnceLock;

use rustix::io::Errno;

/// The process id under which those who can see /proc know this process. In a pid namespace of its own `getpid` says 1. Ask
/// once before /proc is out of reach: the answer is kept.
pub fn id() -> u32 {
    static ID: OnceLock<u32> = OnceLock::new();
    *ID.get_or_init(|| {
        let link = std::fs::read_link("/proc/self").ok();
        link.and_then(|link| link.to_str()?.parse().ok()).unwrap_or_else(std::process::id)
    })
}

/// The process that started this one, as [`id`] would call it: also if it lives outside of this one's pid namespace. Ask once
/// before /proc is out of reach: the answer is kept. `None` if that process has ended.
pub fn parent() -> Option<i32> {
    static PARENT: OnceLock<Option<i32>> = OnceLock::new();
    *PARENT.get_or_init(|| {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()?;
        (parent > 0).then_some(parent)
    })
}

/// The process that connected a unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its id; 0 if it lives outside of this process's pid namespace.
    pub pid: i32,
    /// Its user; 65534 if this process's user namespace has no such user.
    pub uid: u32,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            0 => write!(f, "user {}", self.uid),
            pid => write!(f, "process {pid}, user {}", self.uid),
        }
    }
}

/// Who is at the other end (`SO_PEERCRED`).
///
/// # Errors
/// It is no unix socket, or not connected.
pub fn peer(socket: impl AsFd) -> io::Result<Peer> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len: libc::socklen_t = 12;
    // SAFETY: the pointers are to locals, the first of the 12 bytes that `len` gives.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    };
    match result {
        0 => Ok(Peer { pid: peer.pid, uid: peer.uid }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Leaves the namespaces of mounts, network, IPC, host names and control groups, and with `user` also that of users, for new
/// ones. The process must have one thread.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN, or where users may not make namespaces; `EINVAL` if the kernel lacks one of them; `ENOSPC`
/// past their limit.
pub fn leave_namespaces(user: bool) -> Result<(), Errno> {
    let mut flags =
        libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP;
    if user {
        flags |= libc::CLONE_NEWUSER;
    }
    // SAFETY: no pointers; only what names mean to this process changes, not its memory or descriptors.
    match unsafe { libc::unshare(flags) } {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}
