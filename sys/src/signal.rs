// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Signals as a descriptor that becomes readable: no handler ever interrupts anything.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Interrupt from the keyboard.
pub const INT: i32 = libc::SIGINT;
/// Polite request to end.
pub const TERM: i32 = libc::SIGTERM;
/// The terminal has gone.
pub const HUP: i32 = libc::SIGHUP;
/// Whatever the program makes of it.
pub const USR1: i32 = libc::SIGUSR1;
/// The end at once.
pub const KILL: i32 = libc::SIGKILL;
/// A child has ended.
pub const CHLD: i32 = libc::SIGCHLD;

/// Signals that are blocked in this thread, and in those it starts from now on, and wait to be read here (signalfd(2)).
#[derive(Debug)]
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks `signals` and collects them. Call it before the process starts threads.
    ///
    /// # Errors
    /// `EMFILE` and friends.
    pub fn block(signals: &[i32]) -> io::Result<Signals> {
        let set = mask(signals);
        // SAFETY: `set` is initialised by sigemptyset and only read here; the old mask is not asked for.
        let blocked = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if blocked != 0 {
            return Err(io::Error::from_raw_os_error(blocked));
        }
        // SAFETY: -1 asks for a new descriptor; `set` is only read.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: signalfd just returned this descriptor, so nothing else owns it.
        Ok(Signals(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The next pending signal's number, or `None` if there is none.
    ///
    /// # Errors
    /// The errno of the read.
    pub fn next(&self) -> io::Result<Option<i32>> {
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        match rustix::io::read(&self.0, &mut info) {
            // ssi_signo is the first u32 of the record.
            Ok(n) if n == info.len() => Ok(Some(i32::from_ne_bytes([info[0], info[1], info[2], info[3]]))),
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Ignores SIGPIPE in this process, so that a vanished peer is an `EPIPE` of the write.
/// (Rust does this before `main`; a program loaded by something else may not.)
pub fn ignore_pipe() {
    // SAFETY: SIG_IGN installs no handler, so no code of ours can run in signal context.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

pub(crate) fn mask(signals: &[i32]) -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set before sigaddset reads it.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for &signal in signals {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}

/// Sends `signal` to the process behind `pidfd` (pidfd_send_signal(2)): never the wrong process.
///
/// # Errors
/// `ESRCH` if it has ended.
pub fn send(pidfd: impl AsFd, signal: i32) -> io::Result<()> {
    // SAFETY: no pointer is passed but a null siginfo, which the call allows.
    let sent = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_fd().as_raw_fd(), signal, std::ptr::null::<u8>(), 0)
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
