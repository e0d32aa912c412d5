// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Locks on byte ranges that belong to an open file (`F_OFD_SETLK`, fcntl_locking(2)).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Takes a shared lock on the byte at `offset`.
///
/// # Errors
/// `EAGAIN` if somebody holds it exclusively; `EINVAL` or `ENOLCK` where the file system has no such locks.
pub fn share(fd: impl AsFd, offset: u64) -> io::Result<()> {
    request(&fd, libc::F_OFD_SETLK, libc::F_RDLCK, offset).map(drop)
}

/// Takes an exclusive lock on the byte at `offset`.
///
/// # Errors
/// As [`share`]; `EAGAIN` if anybody else holds one of any kind.
pub fn exclude(fd: impl AsFd, offset: u64) -> io::Result<()> {
    request(&fd, libc::F_OFD_SETLK, libc::F_WRLCK, offset).map(drop)
}

/// Gives the lock on the byte at `offset` back.
///
/// # Errors
/// As [`share`], but never `EAGAIN`.
pub fn unlock(fd: impl AsFd, offset: u64) -> io::Result<()> {
    request(&fd, libc::F_OFD_SETLK, libc::F_UNLCK, offset).map(drop)
}

/// Whether another open file holds a lock of any kind on the byte at `offset`.
///
/// # Errors
/// As [`share`], but never `EAGAIN`.
pub fn is_held_by_another(fd: impl AsFd, offset: u64) -> io::Result<bool> {
    let found = request(&fd, libc::F_OFD_GETLK, libc::F_WRLCK, offset)?;
    Ok(i32::from(found.l_type) != libc::F_UNLCK)
}

fn request(fd: &impl AsFd, command: libc::c_int, kind: libc::c_int, offset: u64) -> io::Result<libc::flock> {
    let invalid = |_| io::Error::from_raw_os_error(libc::EINVAL);
    let mut lock = libc::flock {
        l_type: libc::c_short::try_from(kind).map_err(invalid)?,
        l_whence: 0,
        l_start: libc::off_t::try_from(offset).map_err(invalid)?,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: the three commands read and write one struct flock through the pointer, which is valid for the call.
    let result = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), command, &raw mut lock) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(lock) }
}
