// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Descriptors that came by number: inherited over `exec`, or as standard input.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

/// Numbers already handed out by [`inherited`]: one owner each.
static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// Takes ownership of descriptor `number`, which the parent left open across `exec`, and marks it close-on-exec.
///
/// # Errors
/// `EINVAL` for the standard streams and negative numbers, `EBADF` if nothing is open under the number, was opened by
/// this process itself (it is close-on-exec already), or was taken before.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    if number <= 2 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut taken = TAKEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // SAFETY: fcntl with F_GETFD only reads the flags of a number; an unused number answers EBADF.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    // Rust and this project open everything close-on-exec, so a clear flag means: inherited, without an owner here.
    if flags < 0 || flags & libc::FD_CLOEXEC != 0 || !taken.insert(number) {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the number is open, is not owned by anything else in this process (see above), and is owned from here on.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// Closes what the parent left open across `exec` and nobody has [taken](inherited), the standard streams excepted. Call it
/// while the process has one thread, after everything that was passed on purpose has been taken.
///
/// # Errors
/// The process's own descriptors cannot be listed.
pub fn close_inherited() -> io::Result<()> {
    let taken = TAKEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut numbers: Vec<RawFd> = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        numbers.extend(entry?.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()));
    }
    for number in numbers.into_iter().filter(|&number| number > 2 && !taken.contains(&number)) {
        // SAFETY: fcntl with F_GETFD only reads the flags of a number; an unused number answers EBADF.
        let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
        if flags >= 0 && flags & libc::FD_CLOEXEC == 0 {
            // SAFETY: everything that this process opens is close-on-exec, so this was inherited and has no owner here.
            unsafe { libc::close(number) };
        }
    }
    Ok(())
}

/// Takes what stands as standard input, close-on-exec, and leaves `/dev/null` in its place. This is how a parent hands a
/// child its first socket: standard input needs no agreement about numbers.
///
/// # Errors
/// `EMFILE`, or the errno of opening `/dev/null`: call it before the process is confined.
pub fn standard_input() -> io::Result<OwnedFd> {
    let fd = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3)?;
    let null = std::fs::File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(null)?;
    Ok(fd)
}

/// Puts the open file behind `new` also behind the number of `place`, close-on-exec; what was there is closed once no call is
/// under way on it (dup3(2)). The number keeps its owner.
///
/// # Errors
/// Those of dup3; then nothing has changed.
pub fn replace(place: BorrowedFd<'_>, new: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both numbers are open and stay owned by whom they were; only which open file `place` stands for changes.
    let result = unsafe { libc::dup3(new.as_raw_fd(), place.as_raw_fd(), libc::O_CLOEXEC) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
