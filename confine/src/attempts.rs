// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Attempts to get out, made from inside. One line of the table is one attempt; each is harmless if it succeeds.
//!
//! With [`Denial::Kill`](crate::Denial::Kill) the first attempt ends the process: that is the answer, seen from outside.

use std::cell::RefCell;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::OFlags;
use rustix::io::Errno;
use sys::attempt;
use sys::ring::Ring;

use crate::{Layer, Report};

/// What the attempts aim at. Everything in it exists, and outside of confinement it can be reached.
#[derive(Debug, Default)]
pub struct Bait<'a> {
    /// Files by path; what people call each.
    pub paths: Vec<(String, CString)>,
    /// Descriptors that the process was given read-only: images, memfds, directories; what people call each.
    pub read_only: Vec<(String, BorrowedFd<'a>)>,
    /// Another process: whoever started this one.
    pub process: Option<i32>,
    /// A unix socket's path, where somebody listens.
    pub socket: Option<CString>,
    /// A unix socket's abstract name, without the zero byte, where somebody listens.
    pub abstract_socket: Option<CString>,
    /// A TCP port of this host, where somebody listens; the same number is tried over UDP.
    pub port: Option<u16>,
    /// An io_uring of the process, with nothing under way in it.
    pub ring: Option<RefCell<&'a mut Ring>>,
}

/// What became of an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The attempt's name, from its line in the table.
    pub name: &'static str,
    /// What was tried on what, for people.
    pub what: String,
    /// On what, as the bait calls it; empty if on nothing in particular.
    pub on: String,
    /// Whether it failed for want of permission, or because what it aims at cannot be found from here. An attempt that failed
    /// for another reason got past whoever denies.
    pub denied: bool,
    /// The kernel's errno; `None` if it succeeded.
    pub errno: Option<i32>,
    /// The kernel's answer for people.
    pub answer: String,
}

impl Outcome {
    /// The layer that must have denied it, given what is in force. `None` if it was not denied, or by what applies to every
    /// process: ownership, a capability that an ordinary user has not got, a call that the kernel lacks.
    pub fn denied_by(&self, report: &Report) -> Option<Layer> {
        let in_force = |layer| report.in_force(layer).then_some(layer);
        let first = |layers: &[Layer]| layers.iter().find_map(|&layer| in_force(layer));
        if !self.denied {
            return None;
        }
        match self.errno.map(Errno::from_raw_os_error) {
            // The filter is asked before the call is looked at.
            Some(Errno::PERM | Errno::NOSYS) if report.in_force(Layer::Seccomp) => Some(Layer::Seccomp),
            // What a ring's own restriction refuses is none of the layers' business.
            Some(Errno::ACCESS) if self.name.starts_with("ring-") => None,
            Some(Errno::ACCESS) => first(&[Layer::Landlock, Layer::User, Layer::Capabilities]),
            // Landlock's answer about processes and mounts, but also that of a missing capability.
            Some(Errno::PERM) => first(&[Layer::Landlock, Layer::Capabilities, Layer::User, Layer::NotDumpable]),
            Some(Errno::SRCH) => in_force(Layer::PidNamespace),
            Some(Errno::NOSYS | Errno::NOTDIR) => None,
            // What is not there any more.
            _ => first(&[Layer::Namespaces, Layer::Capabilities]),
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
    /// The path of a descriptor in procfs.
    Reopen(fn(&CStr) -> io::Result<()>),
    Descriptor(fn(BorrowedFd<'_>) -> io::Result<()>),
    /// A name in a directory: there is none to be had through anything else.
    Beneath(fn(BorrowedFd<'_>) -> io::Result<()>),
    /// Where `ENOENT` is the kernel's word for a missing capability.
    Linked(fn(BorrowedFd<'_>) -> io::Result<()>),
    Process(fn(i32) -> io::Result<()>),
    Socket(fn(&CStr) -> io::Result<()>),
    AbstractSocket(fn(&CStr) -> io::Result<()>),
    Port(fn(u16) -> io::Result<()>),
    Nothing(fn() -> io::Result<()>),
    OwnRing(fn(&mut Ring) -> io::Result<()>),
    OwnRingOn(fn(&mut Ring, BorrowedFd<'_>) -> io::Result<()>),
}
use Aim::{
    AbstractSocket, Beneath, Descriptor, Linked, Nothing, OwnRing, OwnRingOn, Path, Port, Process, Reopen, Socket,
};

impl Aim {
    /// Errnos that mean that what is aimed at is out of reach, though it exists.
    fn out_of_reach(self) -> &'static [Errno] {
        match self {
            Path(_) | Reopen(_) | Linked(_) | Socket(_) => &[Errno::NOENT],
            AbstractSocket(_) => &[Errno::CONNREFUSED],
            Process(_) => &[Errno::SRCH],
            Port(_) => &[Errno::NETUNREACH, Errno::CONNREFUSED],
            Beneath(_) => &[Errno::NOTDIR],
            Descriptor(_) | Nothing(_) | OwnRing(_) | OwnRingOn(_) => &[],
        }
    }
}

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
    line("io-uring-openat", "open to write through io_uring", Path(attempt::ring::openat)),
    line(
        "tmpfile",
        "make a file without a name in the place of (O_TMPFILE)",
        Path(|path| attempt::openat(path, TMPFILE)),
    ),
    line("reopen", "open to write, by /proc/self/fd,", Reopen(|path| attempt::openat(path, READ_WRITE))),
    line("reopen-openat2", "open by openat2 and /proc/self/fd", Reopen(attempt::openat2)),
    line("reopen-path", "open as a place (O_PATH), by /proc/self/fd,", Reopen(|path| attempt::openat(path, PATH))),
    line("reopen-io-uring", "open to write through io_uring, by /proc/self/fd,", Reopen(attempt::ring::openat)),
    line("reopen-truncate", "truncate, by /proc/self/fd,", Reopen(attempt::truncate)),
    line("openat-through", "open beneath (openat)", Beneath(|fd| attempt::openat_through(fd))),
    line("mknodat", "make a file beneath (mknodat)", Beneath(|fd| attempt::mknodat(fd))),
    line("unlinkat", "remove a file beneath (unlinkat)", Beneath(|fd| attempt::unlinkat(fd))),
    line("linkat", "give another name to (linkat)", Linked(|fd| attempt::linkat(fd))),
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
    line("kill", "signal (kill)", Process(attempt::kill)),
    line("tgkill", "signal a thread of (tgkill)", Process(attempt::tgkill)),
    line("ptrace", "trace (ptrace)", Process(attempt::ptrace_seize)),
    line("process-vm-readv", "read the memory of (process_vm_readv)", Process(attempt::process_vm_readv)),
    line("pidfd-open", "get hold of (pidfd_open)", Process(attempt::pidfd_open)),
    line("pidfd-getfd", "take a descriptor of (pidfd_getfd)", Process(attempt::pidfd_getfd)),
    line("prlimit", "read the limits of (prlimit64)", Process(attempt::prlimit)),
    line("openat-root", "list the root directory (openat)", Nothing(|| attempt::openat(c"/", DIRECTORY))),
    line("chmod", "change a mode by path (fchmodat)", Nothing(attempt::chmod)),
    line("chroot", "change the root (chroot)", Nothing(attempt::chroot)),
    line("io-uring", "make an io_uring, which seccomp does not see into", Nothing(attempt::io_uring_setup)),
    line("ring-openat", "open through its own io_uring", OwnRing(Ring::attempt_openat)),
    line("ring-openat2", "open by openat2 through its own io_uring", OwnRing(Ring::attempt_openat2)),
    line("ring-socket", "make a socket through its own io_uring", OwnRing(Ring::attempt_socket)),
    line("ring-connect", "connect, through its own io_uring,", OwnRingOn(Ring::attempt_connect)),
    line("ring-write", "write, through its own io_uring, to", OwnRingOn(Ring::attempt_write)),
    line("ring-unlinkat", "remove a name through its own io_uring", OwnRing(Ring::attempt_unlinkat)),
    line("ring-link", "chain requests in its own io_uring, with a read of", OwnRingOn(Ring::attempt_link)),
    line("ring-register", "change its own io_uring (io_uring_register)", OwnRing(Ring::attempt_register)),
    line("clone", "start a process (clone)", Nothing(attempt::fork)),
    line("clone3", "start a process (clone3)", Nothing(attempt::clone3)),
    line("socket-unix", "make a unix socket", Nothing(attempt::unix_socket)),
    line("socket-udp", "make a UDP socket", Nothing(attempt::udp_socket)),
    line("socket-netlink", "make a netlink socket", Nothing(attempt::netlink_socket)),
    line("unix-connect", "connect to", Socket(attempt::sockets::unix_path)),
    line("abstract-connect", "connect to", AbstractSocket(attempt::sockets::unix_abstract)),
    line("port-connect", "connect to", Port(attempt::sockets::tcp)),
    line("port-udp", "send a packet to", Port(attempt::sockets::udp)),
    line("tcp-connect", "connect over TCP to where nobody listens", Nothing(attempt::tcp_connect)),
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
const TMPFILE: i32 = OFlags::TMPFILE.bits().cast_signed() | READ_WRITE;
const DIRECTORY: i32 = OFlags::DIRECTORY.bits().cast_signed();

/// Makes every attempt on every bait that it fits.
pub fn run(bait: &Bait<'_>) -> Vec<Outcome> {
    run_these(ATTEMPTS, bait)
}

/// Makes `attempts`, each on every bait that it fits: one that wants a path is not made if there is none.
pub fn run_these(attempts: &[Attempt], bait: &Bait<'_>) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for &Attempt { name, what, aim } in attempts {
        let mut record = |target: &str, result: io::Result<()>| {
            let what = if target.is_empty() { what.to_owned() } else { format!("{what} {target}") };
            let on = target.to_owned();
            outcomes.push(Outcome { on, ..outcome(name, what, &result, aim.out_of_reach()) });
        };
        match aim {
            Path(run) => bait.paths.iter().for_each(|(called, path)| record(called, run(path))),
            Reopen(run) => {
                bait.read_only.iter().for_each(|(called, fd)| record(called, run(&of_descriptor(*fd))));
            }
            Descriptor(run) | Linked(run) | Beneath(run) => {
                bait.read_only.iter().for_each(|(called, fd)| record(called, run(*fd)));
            }
            Process(run) => bait.process.iter().for_each(|&pid| record("the process that started it", run(pid))),
            Socket(run) => bait.socket.iter().for_each(|path| record("a unix socket by its path", run(path))),
            AbstractSocket(run) => {
                bait.abstract_socket.iter().for_each(|name| record("a unix socket by its abstract name", run(name)));
            }
            Port(run) => bait.port.iter().for_each(|&port| record("a port of this host", run(port))),
            Nothing(run) => record("", run()),
            OwnRing(run) => bait.ring.iter().for_each(|ring| record("", run(&mut ring.borrow_mut()))),
            OwnRingOn(run) => {
                if let Some(ring) = &bait.ring {
                    bait.read_only.iter().for_each(|(called, fd)| record(called, run(&mut ring.borrow_mut(), *fd)));
                }
            }
        }
    }
    outcomes
}

fn outcome(name: &'static str, what: String, result: &io::Result<()>, out_of_reach: &[Errno]) -> Outcome {
    let (denied, errno, answer) = match result {
        Ok(()) => (false, None, "it worked".to_owned()),
        Err(e) => match Errno::from_io_error(e) {
            Some(errno @ (Errno::PERM | Errno::ACCESS | Errno::NOSYS)) => (true, Some(errno), name_of(errno)),
            Some(errno) if out_of_reach.contains(&errno) => (true, Some(errno), name_of(errno)),
            errno => (false, errno, format!("not a denial: {e}")),
        },
    };
    Outcome { name, what, on: String::new(), denied, errno: errno.map(Errno::raw_os_error), answer }
}

fn name_of(errno: Errno) -> String {
    let name = match errno {
        Errno::PERM => "EPERM",
        Errno::ACCESS => "EACCES",
        Errno::NOSYS => "ENOSYS",
        Errno::NOENT => "ENOENT",
        Errno::NOTDIR => "ENOTDIR",
        Errno::SRCH => "ESRCH",
        Errno::NETUNREACH => "ENETUNREACH",
        Errno::CONNREFUSED => "ECONNREFUSED",
        other => return format!("errno {}", other.raw_os_error()),
    };
    name.to_owned()
}

/// The name under which procfs would open a descriptor again.
fn of_descriptor(fd: BorrowedFd<'_>) -> CString {
    CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap_or_default()
}

/// The number of a system call that attempts make, by its name: the holes that a filter may be given to show that they are found.
pub fn call(name: &str) -> Option<i64> {
    let calls = [
        ("bpf", libc::SYS_bpf),
        ("connect", libc::SYS_connect),
        ("execve", libc::SYS_execve),
        ("fchmod", libc::SYS_fchmod),
        ("flock", libc::SYS_flock),
        ("io_uring_register", libc::SYS_io_uring_register),
        ("io_uring_setup", libc::SYS_io_uring_setup),
        ("memfd_create", libc::SYS_memfd_create),
        ("mmap", libc::SYS_mmap),
        ("openat", libc::SYS_openat),
        ("socket", libc::SYS_socket),
        ("unshare", libc::SYS_unshare),
        ("userfaultfd", libc::SYS_userfaultfd),
    ];
    calls.into_iter().find_map(|(called, number)| (called == name).then_some(number))
}
