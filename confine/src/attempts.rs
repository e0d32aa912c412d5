// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Attempts to get out, made from inside. One line of the table is one attempt; each is harmless if it succeeds.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;
use sys::attempt;

/// What the attempts aim at.
#[derive(Debug, Default)]
pub struct Bait<'a> {
    /// Files by path, which the caller knows to exist.
    pub paths: Vec<CString>,
    /// Descriptors that the process was given read-only.
    pub read_only: Vec<BorrowedFd<'a>>,
}

/// What became of an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// What was tried, for people.
    pub what: String,
    /// Whether it failed for want of permission.
    pub denied: bool,
    /// The kernel's answer: an error's name and number, or that it succeeded.
    pub answer: String,
}

/// A way out that needs no bait.
struct Attempt {
    what: &'static str,
    run: fn() -> io::Result<()>,
}

const fn attempt(what: &'static str, run: fn() -> io::Result<()>) -> Attempt {
    Attempt { what, run }
}

/// Every way out that needs no bait.
const ATTEMPTS: &[Attempt] = &[
    attempt("list the root directory: openat /", || attempt::openat(c"/", libc_flags::DIRECTORY)),
    attempt("make an io_uring, which seccomp does not see into", attempt::io_uring_setup),
    attempt("remove a file: unlinkat", || attempt::unlink(c"/doorless-no-such-file")),
    attempt("run a program: execve", || attempt::execve(c"/bin/sh/no-such-program")),
    attempt("start a process: clone", attempt::fork),
    attempt("connect anywhere: socket of the unix family", || attempt::socket(1, 1)),
    attempt("reach the network: TCP socket", || attempt::socket(2, 1)),
    attempt("send datagrams: UDP socket", || attempt::socket(2, 2)),
    attempt("signal the parent: kill", || attempt::kill(parent())),
    attempt("trace the parent: ptrace", || attempt::ptrace_seize(parent())),
    attempt("read the parent's memory: process_vm_readv", || attempt::process_vm_readv(parent())),
    attempt("take the parent's descriptors: pidfd_open", || attempt::pidfd_open(parent())),
    attempt("make namespaces: unshare", attempt::unshare),
    attempt("mount procfs: fsopen", attempt::fsopen),
    attempt("clone the mount tree: open_tree", || attempt::open_tree(c"/")),
    attempt("make a file in memory: memfd_create", attempt::memfd_create),
    attempt("handle its own page faults: userfaultfd", attempt::userfaultfd),
    attempt("load a program into the kernel: bpf", attempt::bpf),
    attempt("use the keyring: keyctl", attempt::keyctl),
    attempt("map memory to execute: mmap PROT_EXEC", attempt::map_executable),
];

/// Tries everything; the bait's attempts come first.
pub fn run(bait: &Bait<'_>) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    let mut record = |what: String, result: io::Result<()>| outcomes.push(outcome(what, &result));
    for path in &bait.paths {
        let shown = path.to_string_lossy();
        record(format!("open {shown}"), attempt::open(path, libc_flags::READ_ONLY));
        record(format!("openat {shown}, to write"), attempt::openat(path, libc_flags::READ_WRITE));
        record(format!("openat2 {shown}"), attempt::openat2(path));
        record(format!("truncate {shown}"), attempt::truncate(path));
    }
    for fd in &bait.read_only {
        let number = fd.as_raw_fd();
        let path = CString::new(format!("/proc/self/fd/{number}")).unwrap_or_default();
        let reopen = |flags| attempt::openat(&path, flags);
        record(format!("open /proc/self/fd/{number}, read-only there, to write"), reopen(libc_flags::READ_WRITE));
        record(format!("open by handle on descriptor {number}"), attempt::open_by_handle_at(fd));
        record(format!("change the mode of descriptor {number}: fchmod"), attempt::fchmod(fd));
        record(format!("change the owner of descriptor {number}: fchown"), attempt::fchown(fd));
        record(format!("change flags shared with its owner on {number}: F_SETFL"), attempt::set_append(fd));
        record(format!("lock descriptor {number} against others: flock"), attempt::flock(fd));
    }
    for Attempt { what, run } in ATTEMPTS {
        record((*what).to_owned(), run());
    }
    outcomes
}

fn outcome(what: String, result: &io::Result<()>) -> Outcome {
    match result {
        Ok(()) => Outcome { what, denied: false, answer: "it worked".into() },
        Err(e) => {
            let errno = Errno::from_io_error(e);
            let denied = matches!(errno, Some(Errno::PERM | Errno::ACCESS));
            let name = match errno {
                Some(Errno::PERM) => "EPERM",
                Some(Errno::ACCESS) => "EACCES",
                _ => "",
            };
            let answer = if denied { name.to_owned() } else { format!("not a denial: {e}") };
            Outcome { what, denied, answer }
        }
    }
}

fn parent() -> i32 {
    rustix::process::getppid().map_or(1, |pid| pid.as_raw_nonzero().get())
}

/// Flags of open(2) as raw numbers.
mod libc_flags {
    use rustix::fs::OFlags;

    pub const READ_ONLY: i32 = (OFlags::RDONLY.bits() | OFlags::CLOEXEC.bits()).cast_signed();
    pub const READ_WRITE: i32 = (OFlags::RDWR.bits() | OFlags::CLOEXEC.bits()).cast_signed();
    pub const DIRECTORY: i32 = (OFlags::DIRECTORY.bits() | OFlags::CLOEXEC.bits()).cast_signed();
}
