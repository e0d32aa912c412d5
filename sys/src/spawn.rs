// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A child that is the first process of its own pid namespace: it sees and can signal no process but itself.
//!
//! A process cannot move itself there, so whoever starts it must. std has no such start: this is a fork and an exec by hand.
//! Root makes the namespace as it is; an ordinary user makes a user namespace around it, in which it is who it was.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use libc::{c_char, c_int, c_long};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, getegid, geteuid, waitpid};

/// What to start. The environment of the child is empty, its signals are as a program expects them, standard error is the
/// parent's, and so is every descriptor that is not close-on-exec.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The program's path.
    pub program: &'a OsStr,
    /// Its arguments, without its own name.
    pub arguments: Vec<CString>,
    /// Standard input.
    pub stdin: BorrowedFd<'a>,
    /// Standard output.
    pub stdout: BorrowedFd<'a>,
    /// Whether it leads a process group of its own, which the terminal's signals do not reach.
    pub own_group: bool,
    /// Whether it is to be the first process of a pid namespace.
    pub alone: bool,
}

/// A child that is waited for.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    ended: Option<ExitStatus>,
}

impl Child {
    /// Its process id, here.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Ends it, if it has not ended: it is still to be waited for.
    ///
    /// # Errors
    /// It belongs to another user by now.
    pub fn kill(&mut self) -> io::Result<()> {
        match self.ended {
            Some(_) => Ok(()),
            None => Ok(rustix::process::kill_process(self.pid, rustix::process::Signal::KILL)?),
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// `ECHILD`: somebody else has waited for it.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        loop {
            match waitpid(Some(self.pid), WaitOptions::empty()) {
                Ok(Some((_, status))) => {
                    let status = ExitStatus::from_raw(status.as_raw());
                    self.ended = Some(status);
                    return Ok(status);
                }
                Ok(None) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// Starts it, if it is to be alone in a pid namespace of its own, or where the kernel refuses one, without: the child can tell, its process id is 1
/// in the one case only.
///
/// # Errors
/// Those of fork(2) and execve(2), `EMFILE`, or an argument with a NUL byte in it.
pub fn start(launch: &Launch<'_>) -> io::Result<Child> {
    let namespaces = match geteuid().is_root() {
        _ if !launch.alone => 0,
        true => libc::CLONE_NEWPID,
        false => libc::CLONE_NEWPID | libc::CLONE_NEWUSER,
    };
    match start_in(launch, namespaces)? {
        Ok(child) => Ok(child),
        Err(_) => start_in(launch, 0)?,
    }
}

/// The outer error has nothing to do with the namespaces.
fn start_in(launch: &Launch<'_>, namespaces: c_int) -> io::Result<io::Result<Child>> {
    let program = CString::new(launch.program.as_bytes())?;
    let arguments: Vec<*const c_char> = std::iter::once(&program)
        .chain(&launch.arguments)
        .map(|argument| argument.as_ptr())
        .chain([std::ptr::null()])
        .collect();
    let (news, report) = pipe_with(PipeFlags::CLOEXEC)?;
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let maps = [
        (c"/proc/self/setgroups", "deny".to_owned()),
        (c"/proc/self/uid_map", format!("{uid} {uid} 1\n")),
        (c"/proc/self/gid_map", format!("{gid} {gid} 1\n")),
    ];
    let maps = if namespaces & libc::CLONE_NEWUSER == 0 { &[][..] } else { &maps[..] };
    // SAFETY: a fork without a new stack, as fork(2) does. Until it execs or ends, the child makes raw system calls with
    // what was prepared above and nothing else: no lock, no allocation.
    let pid = unsafe { libc::syscall(libc::SYS_clone, namespaces | libc::SIGCHLD, 0, 0, 0, 0) };
    match pid {
        ..0 => return Ok(Err(io::Error::last_os_error())),
        0 => child(launch, &program, &arguments, maps, report.as_raw_fd()),
        _ => {}
    }
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
    drop(report);
    let mut child = Child { pid, ended: None };
    let mut said = Vec::new();
    // At exec the pipe closes and says nothing.
    File::from(news).read_to_end(&mut said)?;
    let Some((&what, errno)) = said.split_first() else { return Ok(Ok(child)) };
    child.wait()?;
    let error = io::Error::from_raw_os_error(errno.try_into().map_or(libc::EIO, i32::from_ne_bytes));
    if what == MAPPING { Ok(Err(error)) } else { Err(error) }
}

/// What the child could not do.
const MAPPING: u8 = 0;
const EXEC: u8 = 1;

/// The child's part: raw calls only. A panic would be one too many, so nothing here can.
fn child(
    launch: &Launch<'_>,
    program: &CString,
    arguments: &[*const c_char],
    maps: &[(&std::ffi::CStr, String)],
    report: c_int,
) -> ! {
    let result = |result: c_long| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) };
    let write = |fd: c_long, bytes: &[u8]| {
        // SAFETY: the pointer and the length are those of a slice.
        result(unsafe { libc::syscall(libc::SYS_write, fd, bytes.as_ptr(), bytes.len()) })
    };
    let fail = |what: u8, error: &io::Error| -> ! {
        let errno = error.raw_os_error().unwrap_or(libc::EIO).to_ne_bytes();
        let _ = write(report.into(), &[what, errno[0], errno[1], errno[2], errno[3]]);
        // SAFETY: ends the child; nothing of the parent's copy runs.
        unsafe { libc::_exit(127) }
    };
    for (path, text) in maps {
        // SAFETY: the path is a C string.
        let opened = result(unsafe {
            libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC, 0)
        });
        if let Err(e) = opened.and_then(|fd| write(fd, text.as_bytes())) {
            fail(MAPPING, &e);
        }
    }
    // SAFETY: no pointers but to locals of the sizes that the calls expect; both descriptors are the caller's, open, and
    // not 0 to 2, so dup2 clears their close-on-exec flag. A signal set of zeroes is the empty one.
    unsafe {
        let none: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        libc::dup2(launch.stdin.as_raw_fd(), 0);
        libc::dup2(launch.stdout.as_raw_fd(), 1);
        if launch.own_group {
            libc::setpgid(0, 0);
        }
        let nothing: [*const c_char; 1] = [std::ptr::null()];
        libc::execve(program.as_ptr(), arguments.as_ptr(), nothing.as_ptr());
    }
    fail(EXEC, &io::Error::last_os_error())
}
