// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A seccomp profile for a container around all of it, as container runtimes and Kubernetes read it: what the manager and the start
//! of the daemon need, and the calls of the daemon's own table. The daemon's own filter comes on top and checks arguments.

/// The calls of [`crate::rules`], by name. Those of one architecture alone are below.
const CALLS: &[(&str, i64)] = &[
    ("accept4", libc::SYS_accept4),
    ("brk", libc::SYS_brk),
    ("clock_getres", libc::SYS_clock_getres),
    ("clock_gettime", libc::SYS_clock_gettime),
    ("clock_nanosleep", libc::SYS_clock_nanosleep),
    ("clone", libc::SYS_clone),
    ("clone3", libc::SYS_clone3),
    ("close", libc::SYS_close),
    ("dup3", libc::SYS_dup3),
    ("epoll_create1", libc::SYS_epoll_create1),
    ("epoll_ctl", libc::SYS_epoll_ctl),
    ("epoll_pwait", libc::SYS_epoll_pwait),
    ("eventfd2", libc::SYS_eventfd2),
    ("exit", libc::SYS_exit),
    ("exit_group", libc::SYS_exit_group),
    ("fallocate", libc::SYS_fallocate),
    ("fcntl", libc::SYS_fcntl),
    ("fdatasync", libc::SYS_fdatasync),
    ("fstat", libc::SYS_fstat),
    ("fstatfs", libc::SYS_fstatfs),
    ("fsync", libc::SYS_fsync),
    ("ftruncate", libc::SYS_ftruncate),
    ("futex", libc::SYS_futex),
    ("getpeername", libc::SYS_getpeername),
    ("getpid", libc::SYS_getpid),
    ("getppid", libc::SYS_getppid),
    ("getrandom", libc::SYS_getrandom),
    ("getsockname", libc::SYS_getsockname),
    ("getsockopt", libc::SYS_getsockopt),
    ("gettid", libc::SYS_gettid),
    ("ioctl", libc::SYS_ioctl),
    ("lseek", libc::SYS_lseek),
    ("madvise", libc::SYS_madvise),
    ("mmap", libc::SYS_mmap),
    ("mprotect", libc::SYS_mprotect),
    ("mremap", libc::SYS_mremap),
    ("munmap", libc::SYS_munmap),
    ("ppoll", libc::SYS_ppoll),
    ("prctl", libc::SYS_prctl),
    ("pread64", libc::SYS_pread64),
    ("preadv", libc::SYS_preadv),
    ("preadv2", libc::SYS_preadv2),
    ("pwrite64", libc::SYS_pwrite64),
    ("pwritev", libc::SYS_pwritev),
    ("pwritev2", libc::SYS_pwritev2),
    ("read", libc::SYS_read),
    ("readv", libc::SYS_readv),
    ("recvfrom", libc::SYS_recvfrom),
    ("recvmsg", libc::SYS_recvmsg),
    ("restart_syscall", libc::SYS_restart_syscall),
    ("rseq", libc::SYS_rseq),
    ("rt_sigaction", libc::SYS_rt_sigaction),
    ("rt_sigprocmask", libc::SYS_rt_sigprocmask),
    ("rt_sigreturn", libc::SYS_rt_sigreturn),
    ("sched_getaffinity", libc::SYS_sched_getaffinity),
    ("sched_yield", libc::SYS_sched_yield),
    ("sendmsg", libc::SYS_sendmsg),
    ("sendto", libc::SYS_sendto),
    ("set_robust_list", libc::SYS_set_robust_list),
    ("setsockopt", libc::SYS_setsockopt),
    ("shutdown", libc::SYS_shutdown),
    ("sigaltstack", libc::SYS_sigaltstack),
    ("sync_file_range", libc::SYS_sync_file_range),
    ("tgkill", libc::SYS_tgkill),
    ("timerfd_create", libc::SYS_timerfd_create),
    ("timerfd_settime", libc::SYS_timerfd_settime),
    ("write", libc::SYS_write),
    ("writev", libc::SYS_writev),
];

/// What is needed besides: to start, to open, to listen, to watch a child. No mount, no namespace, no other user: a container grants
/// none of that.
const STARTING: &[&str] = &[
    "access",
    "arch_prctl",
    "bind",
    "capget",
    "capset",
    "connect",
    "dup2",
    "epoll_wait",
    "execve",
    "faccessat",
    "faccessat2",
    "fchmod",
    "fchown",
    "flock",
    "getcwd",
    "getdents64",
    "getegid",
    "geteuid",
    "getgid",
    "getgroups",
    "getuid",
    "kill",
    "landlock_create_ruleset",
    "landlock_restrict_self",
    "linkat",
    "listen",
    "memfd_create",
    "mkdir",
    "mkdirat",
    "newfstatat",
    "open",
    "openat",
    "openat2",
    "pidfd_open",
    "pidfd_send_signal",
    "pipe2",
    "poll",
    "prlimit64",
    "readlink",
    "readlinkat",
    "rename",
    "renameat",
    "renameat2",
    "rmdir",
    "seccomp",
    "set_tid_address",
    "setpgid",
    "setsid",
    "signalfd4",
    "socket",
    "socketpair",
    "statx",
    "symlinkat",
    "umask",
    "uname",
    "unlink",
    "unlinkat",
    "utimensat",
    "wait4",
    "waitid",
];

/// The profile, as JSON. Names that an architecture does not have are passed over by those who read it.
pub fn container_profile() -> String {
    let mut names: Vec<&str> = CALLS.iter().map(|(name, _)| *name).chain(STARTING.iter().copied()).collect();
    names.sort_unstable();
    let names: Vec<String> = names.iter().map(|name| format!("        \"{name}\"")).collect();
    format!(
        "{{\n  \"defaultAction\": \"SCMP_ACT_ERRNO\",\n  \"defaultErrnoRet\": 1,\n  \"architectures\": [\"SCMP_ARCH_X86_64\", \
         \"SCMP_ARCH_AARCH64\"],\n  \"syscalls\": [\n    {{\n      \"action\": \"SCMP_ACT_ALLOW\",\n      \"names\": [\n{}\n      \
         ]\n    }}\n  ]\n}}\n",
        names.join(",\n")
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{Role, rules};

    #[test]
    fn every_call_of_the_daemons_table_has_a_name_here_and_nothing_else_has() {
        let mut calls: Vec<i64> =
            rules::of(Role::Daemon).iter().copied().flatten().map(|allowed| allowed.call).collect();
        #[cfg(target_arch = "x86_64")]
        calls.retain(|&call| call != libc::SYS_poll && call != libc::SYS_epoll_wait);
        let unnamed: Vec<_> = calls.iter().filter(|call| !CALLS.iter().any(|(_, number)| number == *call)).collect();
        assert!(unnamed.is_empty(), "{unnamed:?}");
        let needless: Vec<_> = CALLS.iter().filter(|(_, number)| !calls.contains(number)).collect();
        assert!(needless.is_empty(), "{needless:?}");
    }

    #[test]
    fn the_packaged_profile_is_made_from_the_table() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/kubernetes/seccomp.json");
        if std::env::var_os("BLESS").is_some() {
            std::fs::write(&path, container_profile()).unwrap();
        }
        let packaged = std::fs::read_to_string(path).unwrap();
        assert_eq!(packaged, container_profile(), "run BLESS=1 cargo test -p doorless-confine profile");
    }

    #[test]
    fn the_container_can_make_no_namespace_and_trace_nobody() {
        for never in ["unshare", "setns", "mount", "ptrace", "bpf", "io_uring_setup", "keyctl", "setuid", "setresuid"] {
            assert!(!container_profile().contains(&format!("\"{never}\"")), "{never}");
        }
    }
}
