// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The system calls that are left: a table, one line to a call and what its arguments must be.
//!
//! There is no call in it that takes a path, and none that makes a descriptor of anything but a passed one (eventfd, timerfd
//! and epoll refer to nothing outside; accept4 and recvmsg are how passed sockets bring clients and more descriptors).
//!
//! What arguments cannot show is behind pointers. `sendmsg` may name an address: it matters only for datagram sockets, of
//! which none is passed. `clone3` hides all of its flags: see [`crate::seccomp`].
//!
//! Commands, options and flags are compared in their low 32 bits, which is all that the kernel looks at.

/// What an argument, counted from 0, must be.
#[derive(Clone, Copy, Debug)]
pub enum Check {
    /// One of these numbers.
    OneOf(u8, &'static [i32]),
    /// One of these `ioctl` requests.
    Request(u8, &'static [u64]),
    /// No bit of these.
    Without(u8, i32),
    /// No bit but these.
    Within(u8, i32),
    /// The null pointer.
    Null(u8),
    /// The number of this process.
    OwnProcess(u8),
}
use Check::{Null, OneOf, OwnProcess, Request, Within, Without};

/// A call that is allowed if all of its checks hold. Several lines for one call are alternatives.
#[derive(Clone, Copy, Debug)]
pub struct Allowed {
    pub call: i64,
    pub checks: &'static [Check],
}

const fn always(call: i64) -> Allowed {
    Allowed { call, checks: &[] }
}

const fn when(call: i64, checks: &'static [Check]) -> Allowed {
    Allowed { call, checks }
}

/// What glibc and musl make a thread with, and nothing else: no process, no namespace, no descriptor.
const THREAD: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID;

/// Memory, threads, time, waiting, ending: what the runtime of any Rust program needs.
pub const RUNTIME: &[Allowed] = &[
    always(libc::SYS_brk),
    always(libc::SYS_clock_getres),
    always(libc::SYS_clock_gettime),
    always(libc::SYS_clock_nanosleep),
    when(libc::SYS_clone, &[OneOf(0, &[THREAD, THREAD | libc::CLONE_DETACHED])]),
    // The other filter answers ENOSYS.
    always(libc::SYS_clone3),
    always(libc::SYS_close),
    always(libc::SYS_exit),
    always(libc::SYS_exit_group),
    always(libc::SYS_futex),
    always(libc::SYS_getpid),
    always(libc::SYS_getppid),
    always(libc::SYS_getrandom),
    always(libc::SYS_gettid),
    always(libc::SYS_madvise),
    when(libc::SYS_mmap, &[Without(2, libc::PROT_EXEC)]),
    when(libc::SYS_mprotect, &[Without(2, libc::PROT_EXEC)]),
    always(libc::SYS_mremap),
    always(libc::SYS_munmap),
    #[cfg(target_arch = "x86_64")]
    always(libc::SYS_poll),
    always(libc::SYS_ppoll),
    // Names of threads.
    when(libc::SYS_prctl, &[OneOf(0, &[libc::PR_SET_NAME])]),
    always(libc::SYS_restart_syscall),
    always(libc::SYS_rseq),
    always(libc::SYS_rt_sigaction),
    always(libc::SYS_rt_sigprocmask),
    always(libc::SYS_rt_sigreturn),
    always(libc::SYS_sched_getaffinity),
    always(libc::SYS_sched_yield),
    always(libc::SYS_set_robust_list),
    always(libc::SYS_sigaltstack),
    // How abort ends the process.
    when(libc::SYS_tgkill, &[OwnProcess(0), OneOf(2, &[libc::SIGABRT])]),
];

/// Reading what was passed, asking what it is, and answering on a pipe.
pub const READING: &[Allowed] = &[
    when(
        libc::SYS_fcntl,
        &[OneOf(1, &[libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_GETFL, libc::F_GET_SEALS, libc::F_SETFD])],
    ),
    // By descriptor; the call that glibc would rather make takes a path.
    always(libc::SYS_fstat),
    always(libc::SYS_fstatfs),
    when(libc::SYS_ioctl, &[Request(1, &[sys::disk::BLKGETSIZE64])]),
    always(libc::SYS_lseek),
    always(libc::SYS_pread64),
    always(libc::SYS_preadv),
    always(libc::SYS_preadv2),
    always(libc::SYS_read),
    always(libc::SYS_readv),
    always(libc::SYS_write),
    always(libc::SYS_writev),
];

/// Changing the content of what was passed to be written, and nothing else of it: not its mode, owner, times, attributes,
/// and not the status flags that are shared with whoever passed it (`F_SETFL`).
const WRITING: &[Allowed] = &[
    // Another descriptor behind a number that is in use: the way from one passed file to its successor.
    when(libc::SYS_dup3, &[OneOf(2, &[libc::O_CLOEXEC])]),
    when(
        libc::SYS_fallocate,
        &[Within(1, libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE)],
    ),
    when(libc::SYS_fcntl, &[OneOf(1, &[libc::F_OFD_GETLK, libc::F_OFD_SETLK])]),
    always(libc::SYS_fdatasync),
    always(libc::SYS_fsync),
    always(libc::SYS_ftruncate),
    always(libc::SYS_pwrite64),
    always(libc::SYS_pwritev),
    always(libc::SYS_pwritev2),
    always(libc::SYS_sync_file_range),
];

/// Options of passed sockets. Not among them: filters, devices, marks, passing credentials.
const ASKED_OPTIONS: &[i32] = &[
    libc::SO_ACCEPTCONN,
    libc::SO_DOMAIN,
    libc::SO_ERROR,
    libc::SO_PEERCRED,
    libc::SO_PROTOCOL,
    libc::SO_RCVBUF,
    libc::SO_SNDBUF,
    libc::SO_TYPE,
];
const SET_OPTIONS: &[i32] =
    &[libc::SO_KEEPALIVE, libc::SO_LINGER, libc::SO_RCVBUF, libc::SO_RCVTIMEO, libc::SO_SNDBUF, libc::SO_SNDTIMEO];
const TCP_OPTIONS: &[i32] =
    &[libc::TCP_KEEPCNT, libc::TCP_KEEPIDLE, libc::TCP_KEEPINTVL, libc::TCP_NODELAY, libc::TCP_USER_TIMEOUT];

/// Talking over passed sockets, and over those that come in through them.
const SOCKETS: &[Allowed] = &[
    always(libc::SYS_accept4),
    always(libc::SYS_getpeername),
    always(libc::SYS_getsockname),
    when(libc::SYS_getsockopt, &[OneOf(1, &[libc::SOL_SOCKET]), OneOf(2, ASKED_OPTIONS)]),
    when(libc::SYS_getsockopt, &[OneOf(1, &[libc::IPPROTO_TCP]), OneOf(2, TCP_OPTIONS)]),
    always(libc::SYS_recvfrom),
    always(libc::SYS_recvmsg),
    // MSG_FASTOPEN connects.
    when(libc::SYS_sendmsg, &[Without(2, libc::MSG_FASTOPEN)]),
    when(libc::SYS_sendto, &[Without(3, libc::MSG_FASTOPEN), Null(4)]),
    when(libc::SYS_setsockopt, &[OneOf(1, &[libc::SOL_SOCKET]), OneOf(2, SET_OPTIONS)]),
    when(libc::SYS_setsockopt, &[OneOf(1, &[libc::IPPROTO_TCP]), OneOf(2, TCP_OPTIONS)]),
    always(libc::SYS_shutdown),
];

/// Waking and being woken.
const EVENTS: &[Allowed] = &[
    always(libc::SYS_epoll_create1),
    always(libc::SYS_epoll_ctl),
    always(libc::SYS_epoll_pwait),
    #[cfg(target_arch = "x86_64")]
    always(libc::SYS_epoll_wait),
    always(libc::SYS_eventfd2),
    always(libc::SYS_timerfd_create),
    always(libc::SYS_timerfd_settime),
];

/// `IORING_ENTER_GETEVENTS`: wait for what has ended.
const GETEVENTS: i32 = 1;

/// Asking a ring that was made and restricted before. No other can be made, and this one cannot be changed any more.
pub const RINGS: &[Allowed] = &[when(libc::SYS_io_uring_enter, &[Within(3, GETEVENTS)])];

/// The tables of a role.
pub fn of(role: crate::Role) -> &'static [&'static [Allowed]] {
    match role {
        crate::Role::Daemon => &[RUNTIME, READING, WRITING, SOCKETS, EVENTS],
        crate::Role::Inspector => &[RUNTIME, READING],
        crate::Role::Tool => &[RUNTIME, READING, WRITING],
        crate::Role::Client => &[RUNTIME, READING, SOCKETS],
    }
}
