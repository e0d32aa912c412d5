// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Attempts to get out, made from inside. One line of the table is one attempt; each is harmless if it succeeds.
//!
//! With [`Denial::Kill`](crate::Denial::Kill) the first attempt ends the process: that is the answer, seen from outside.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::OFlags;
use rustix::io::Errno;
use sys::attempt;

use crate::{Layer, Report};

/// What the attempts aim at.
#[derive(Debug, Default)]
pub struct Bait<'a> {
    /// Files by path, which the caller knows to exist.
    pub paths: Vec<CString>,
    /// Descriptors that the process was given read-only: images, memfds, directories.
    pub read_only: Vec<BorrowedFd<'a>>,
}

/// What became of an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The attempt's name, from its line in the table.
    pub name: &'static str,
    /// What was tried on what, for people.
    pub what: String,
    /// Whether it failed for want of permission. An attempt that failed for another reason got past whoever denies.
    pub denied: bool,
    /// The kernel's errno; `None` if it succeeded.
    pub errno: Option<i32>,
    /// The kernel's answer for people.
    pub answer: String,
}

impl Outcome {
    /// The layer that must have denied it, given what is in force. `None` if it was not denied, or by what applies to every
    /// process: ownership, or a capability that an ordinary user has not got.
    pub fn denied_by(&self, report: &Report) -> Option<Layer> {
        let in_force = |layer| report.in_force(layer).then_some(layer);
        match self.errno.map(Errno::from_raw_os_error) {
            // The filter is asked before the call is looked at.
            Some(Errno::PERM | Errno::NOSYS) if report.in_force(Layer::Seccomp) => Some(Layer::Seccomp),
            Some(Errno::ACCESS) => in_force(Layer::Landlock),
            // Landlock's answer about processes and mounts, but also that of a missing capability.
            Some(Errno::PERM) => in_force(Layer::Landlock).or_else(|| in_force(Layer::Capabilities)),
            _ => None,
        }
    }
}

/// A way out.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    /// A short name that stays.
    pub name: &'static str,
    /// What it does, for people; what it is done to follows in [`Outcome::what`].
    pub what: &'static str,
    aim: Aim,
}

/// What an attempt is made on, and how.
#[derive(Clone, Copy, Debug)]
enum Aim {
    Path(fn(&CStr) -> io::Result<()>),
    Descriptor(fn(BorrowedFd<'_>) -> io::Result<()>),
    Parent(fn(i32) -> io::Result<()>),
    Nothing(fn() -> io::Result<()>),
}
use Aim::{Descriptor, Nothing, Parent, Path};

const fn line(name: &'static str, what: &'static str, aim: Aim) -> Attempt {
    Attempt { name, what, aim }
}

/// Every attempt, in the order in which they are made.
pub const ATTEMPTS: &[Attempt] = &[
    line("open", "open", Path(|path| attempt::open(path, READ))),
    line("openat-write", "open to write", Path(|path| attempt::openat(path, READ_WRITE))),
    line("openat-path", "open as a place only (O_PATH)", Path(|path| attempt::openat(path, PATH))),
    line("openat2", "open by openat2", Path(attempt::openat2)),
    #[cfg(target_arch = "x86_64")]
    line("x32-openat", "open by the number of another ABI (x32)", Path(attempt::x32_openat)),
    line("open-tree", "open by open_tree", Path(attempt::open_tree)),
    line("truncate", "truncate", Path(attempt::truncate)),
    line("stat", "look whether there is (stat)", Path(attempt::stat)),
    line("rename", "rename to itself", Path(attempt::rename)),
    line("execve", "run as a program (execve)", Path(attempt::execve)),
    line("reopen", "open again, to write", Descriptor(|fd| attempt::openat(&of_descriptor(fd), READ_WRITE))),
    line("openat-through", "open beneath (openat)", Descriptor(|fd| attempt::openat_through(fd))),
    line("mknodat", "make a file beneath (mknodat)", Descriptor(|fd| attempt::mknodat(fd))),
    line("unlinkat", "remove a file beneath (unlinkat)", Descriptor(|fd| attempt::unlinkat(fd))),
    line("linkat", "give another name to (linkat)", Descriptor(|fd| attempt::linkat(fd))),
    line("open-tree-through", "open by open_tree", Descriptor(|fd| attempt::open_tree_through(fd))),
    line("execveat", "run as a program (execveat)", Descriptor(|fd| attempt::execveat(fd))),
    line("name-to-handle-at", "get a handle of", Descriptor(|fd| attempt::name_to_handle_at(fd))),
    line("open-by-handle-at", "open a handle on the file system of", Descriptor(|fd| attempt::open_by_handle_at(fd))),
    line("fchmod", "change the mode of (fchmod)", Descriptor(|fd| attempt::fchmod(fd))),
    line("fchown", "change the owner of (fchown)", Descriptor(|fd| attempt::fchown(fd))),
    line("utimensat", "change the times of (utimensat)", Descriptor(|fd| attempt::utimens(fd))),
    line("fsetxattr", "change an attribute of (fsetxattr)", Descriptor(|fd| attempt::fsetxattr(fd))),
    line("fs-ioc-setflags", "change the inode's flags of (ioctl)", Descriptor(|fd| attempt::set_inode_flags(fd))),
    line("ficlone", "share another file's blocks with (ioctl)", Descriptor(|fd| attempt::clone_file(fd))),
    line("f-setfl", "change the flags shared with its owner of (F_SETFL)", Descriptor(|fd| attempt::set_append(fd))),
    line("f-setown", "direct the signals of (F_SETOWN)", Descriptor(|fd| attempt::set_owner(fd))),
    line("f-setlease", "put a lease on (F_SETLEASE)", Descriptor(|fd| attempt::set_lease(fd))),
    line("flock", "lock against others (flock)", Descriptor(|fd| attempt::flock(fd))),
    line("mmap-file-exec", "map to execute (mmap)", Descriptor(|fd| attempt::map_file_executable(fd))),
    line("connect", "connect (connect)", Descriptor(|fd| attempt::connect(fd))),
    line("bind", "bind to an address (bind)", Descriptor(|fd| attempt::bind(fd))),
    line("kill", "signal (kill)", Parent(attempt::kill)),
    line("tgkill", "signal a thread of (tgkill)", Parent(attempt::tgkill)),
    line("ptrace", "trace (ptrace)", Parent(attempt::ptrace_seize)),
    line("process-vm-readv", "read the memory of (process_vm_readv)", Parent(attempt::process_vm_readv)),
    line("pidfd-open", "get hold of (pidfd_open)", Parent(attempt::pidfd_open)),
    line("pidfd-getfd", "take a descriptor of (pidfd_getfd)", Parent(attempt::pidfd_getfd)),
    line("prlimit", "read the limits of (prlimit64)", Parent(attempt::prlimit)),
    line("openat-root", "list the root directory (openat)", Nothing(|| attempt::openat(c"/", DIRECTORY))),
    line("chmod", "change a mode by path (fchmodat)", Nothing(attempt::chmod)),
    line("chroot", "change the root (chroot)", Nothing(attempt::chroot)),
    line("io-uring", "make an io_uring, which seccomp does not see into", Nothing(attempt::io_uring_setup)),
    line("clone", "start a process (clone)", Nothing(attempt::fork)),
    line("clone3", "start a process (clone3)", Nothing(attempt::clone3)),
    line("socket-unix", "make a unix socket", Nothing(attempt::unix_socket)),
    line("socket-udp", "make a UDP socket", Nothing(attempt::udp_socket)),
    line("socket-netlink", "make a netlink socket", Nothing(attempt::netlink_socket)),
    line("tcp-connect", "connect over TCP", Nothing(attempt::tcp_connect)),
    line("tcp-bind", "listen on TCP", Nothing(attempt::tcp_bind)),
    line("unshare", "make namespaces (unshare)", Nothing(attempt::unshare)),
    line("setns", "enter namespaces (setns)", Nothing(attempt::setns)),
    line("mount", "mount a file system (mount)", Nothing(attempt::mount)),
    line("fsopen", "make a procfs (fsopen)", Nothing(attempt::fsopen)),
    line("fsmount", "mount a file system (fsmount)", Nothing(attempt::fsmount)),
    line("memfd-create", "make a file in memory (memfd_create)", Nothing(attempt::memfd_create)),
    line("userfaultfd", "handle its own page faults (userfaultfd)", Nothing(attempt::userfaultfd)),
    line("bpf", "put data into the kernel (bpf)", Nothing(attempt::bpf)),
    line("keyctl", "use the keyring (keyctl)", Nothing(attempt::keyctl)),
    line("perf-event-open", "count events (perf_event_open)", Nothing(attempt::perf_event_open)),
    line("inotify", "watch files (inotify_init1)", Nothing(attempt::inotify)),
    line("init-module", "load a kernel module (init_module)", Nothing(attempt::init_module)),
    line("set-dumpable", "let others trace this process (prctl)", Nothing(attempt::set_dumpable)),
    line("personality", "become another kind of process (personality)", Nothing(attempt::personality)),
    line("mmap-exec", "map memory to execute (mmap)", Nothing(attempt::map_executable)),
    line("mmap-write-exec", "map memory to write and execute (mmap)", Nothing(attempt::map_writable_executable)),
    line("mprotect-exec", "make memory executable (mprotect)", Nothing(attempt::protect_executable)),
];

const READ: i32 = OFlags::RDONLY.bits().cast_signed();
const READ_WRITE: i32 = OFlags::RDWR.bits().cast_signed();
const PATH: i32 = OFlags::PATH.bits().cast_signed();
const DIRECTORY: i32 = OFlags::DIRECTORY.bits().cast_signed();

/// Makes every attempt on every bait that it fits.
pub fn run(bait: &Bait<'_>) -> Vec<Outcome> {
    run_these(ATTEMPTS, bait)
}

/// Makes `attempts`, each on every bait that it fits: one that wants a path is not made if there is none.
pub fn run_these(attempts: &[Attempt], bait: &Bait<'_>) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for Attempt { name, what, aim } in attempts {
        let mut record = |what: String, result: io::Result<()>| outcomes.push(outcome(name, what, &result));
        match aim {
            Path(run) => {
                for path in &bait.paths {
                    record(format!("{what} {}", path.to_string_lossy()), run(path));
                }
            }
            Descriptor(run) => {
                for &fd in &bait.read_only {
                    record(format!("{what} {}", of_descriptor(fd).to_string_lossy()), run(fd));
                }
            }
            Parent(run) => record(format!("{what} the parent process"), run(parent())),
            Nothing(run) => record((*what).to_owned(), run()),
        }
    }
    outcomes
}

fn outcome(name: &'static str, what: String, result: &io::Result<()>) -> Outcome {
    let (denied, errno, answer) = match result {
        Ok(()) => (false, None, "it worked".to_owned()),
        Err(e) => match Errno::from_io_error(e) {
            Some(errno @ Errno::PERM) => (true, Some(errno), "EPERM".to_owned()),
            Some(errno @ Errno::ACCESS) => (true, Some(errno), "EACCES".to_owned()),
            Some(errno @ Errno::NOSYS) => (true, Some(errno), "ENOSYS".to_owned()),
            errno => (false, errno, format!("not a denial: {e}")),
        },
    };
    Outcome { name, what, denied, errno: errno.map(Errno::raw_os_error), answer }
}

/// The name under which procfs would open a descriptor again.
fn of_descriptor(fd: BorrowedFd<'_>) -> CString {
    CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap_or_default()
}

/// The process that started this one; if it has ended, or is in another namespace, the first process there is.
fn parent() -> i32 {
    rustix::process::getppid().map_or(1, |pid| pid.as_raw_nonzero().get())
}
