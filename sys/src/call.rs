// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Numbers of the running architecture for seccomp filters: system calls, commands and flags.

#![allow(missing_docs, reason = "the kernel's names")]

pub const CLONE: i64 = libc::SYS_clone;
pub const CLONE3: i64 = libc::SYS_clone3;
pub const FCNTL: i64 = libc::SYS_fcntl;
pub const GETSOCKOPT: i64 = libc::SYS_getsockopt;
pub const IOCTL: i64 = libc::SYS_ioctl;
pub const MMAP: i64 = libc::SYS_mmap;
pub const MPROTECT: i64 = libc::SYS_mprotect;
pub const PRCTL: i64 = libc::SYS_prctl;
pub const SETSOCKOPT: i64 = libc::SYS_setsockopt;

pub const PROT_EXEC: u64 = libc::PROT_EXEC as u64;
pub const PR_SET_NAME: u64 = libc::PR_SET_NAME as u64;
/// What makes a clone a thread of this process.
pub const CLONE_THREAD_FLAGS: u64 =
    (libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND | libc::CLONE_THREAD) as u64;

/// Reading flags, duplicating, locking: nothing that others see but locks. F_SETFL is not here.
pub const FCNTLS: &[u64] = &[
    libc::F_GETFD as u64,
    libc::F_SETFD as u64,
    libc::F_GETFL as u64,
    libc::F_DUPFD_CLOEXEC as u64,
    libc::F_OFD_GETLK as u64,
    libc::F_OFD_SETLK as u64,
    libc::F_GET_SEALS as u64,
];

/// Block devices: size, sector, discard, zero.
pub const IOCTLS: &[u64] =
    &[crate::disk::BLKGETSIZE64, crate::disk::BLKSSZGET, crate::disk::BLKDISCARD, crate::disk::BLKZEROOUT];

pub const SOCKET_LEVELS: &[u64] = &[libc::SOL_SOCKET as u64, libc::IPPROTO_TCP as u64];

/// What any program of ours needs: memory, time, reading and writing what it has, ending.
pub const ALWAYS: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_write,
    libc::SYS_writev,
];

/// What serving needs besides: threads, passed sockets, changing passed files.
pub const DAEMON: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_clock_nanosleep,
    libc::SYS_clone3,
    libc::SYS_dup3,
    libc::SYS_eventfd2,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_membarrier,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_shutdown,
];
