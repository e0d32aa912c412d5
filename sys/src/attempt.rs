// SPDX-License-Identifier: Apache-2.0 OR MIT
//! System calls that a confined process must not be able to make, as it would make them: raw, with nothing in between.
//!
//! Every function is harmless if it succeeds: what it opened is closed, what it changed it changes to what it was, and what
//! could not be undone is asked for with an argument that the kernel refuses once it has granted permission. So only `EPERM`
//! and `EACCES` (or `ENOSYS`: there is no such call) mean that the way is closed; any other error means that it is open.
#![allow(clippy::missing_errors_doc, reason = "every function here answers with the errno of the call that it names")]

pub mod ring;
pub mod sockets;

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use libc::{c_int, c_long};

/// A name that nothing has.
const NO_SUCH_NAME: &CStr = c"doorless-no-such-name";

/// The outcome of a raw call: a number that is no errno.
fn outcome(result: c_long) -> io::Result<c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Closes a descriptor that an attempt should not have got.
fn close(result: c_long) -> io::Result<()> {
    let fd = outcome(result)?;
    // SAFETY: the number was returned by the kernel a moment ago and nothing else knows it.
    unsafe { libc::syscall(libc::SYS_close, fd) };
    Ok(())
}

fn number(fd: &impl AsFd) -> c_int {
    fd.as_fd().as_raw_fd()
}

// ---- by path

/// open(2) or, where the architecture has none, openat(2).
pub fn open(path: &CStr, flags: i32) -> io::Result<()> {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    return close(unsafe { libc::syscall(libc::SYS_open, path.as_ptr(), flags | libc::O_CLOEXEC, 0) });
    #[cfg(not(target_arch = "x86_64"))]
    openat(path, flags)
}

/// openat(2) from the working directory.
pub fn openat(path: &CStr, flags: i32) -> io::Result<()> {
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    close(unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags | libc::O_CLOEXEC, 0) })
}

/// open(2) by the number that the x32 ABI gives to openat(2), which is a second door to the same room.
#[cfg(target_arch = "x86_64")]
pub fn x32_openat(path: &CStr) -> io::Result<()> {
    let x32 = 0x4000_0000 | libc::SYS_openat;
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    close(unsafe { libc::syscall(x32, libc::AT_FDCWD, path.as_ptr(), libc::O_CLOEXEC, 0) })
}

/// openat2(2) from the working directory, read-only.
pub fn openat2(path: &CStr) -> io::Result<()> {
    // struct open_how: flags, mode, resolve.
    let how = [libc::O_CLOEXEC.unsigned_abs().into(), 0u64, 0];
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    close(unsafe { libc::syscall(libc::SYS_openat2, libc::AT_FDCWD, path.as_ptr(), how.as_ptr(), size_of_val(&how)) })
}

/// open_tree(2), which opens without an open.
pub fn open_tree(path: &CStr) -> io::Result<()> {
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    close(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), libc::O_CLOEXEC) })
}

/// truncate(2) by path, to a length that no file can have: `EINVAL` if allowed.
pub fn truncate(path: &CStr) -> io::Result<()> {
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe { libc::syscall(libc::SYS_truncate, path.as_ptr(), -1i64) }).map(drop)
}

/// newfstatat(2) by path: tells that the file exists.
pub fn stat(path: &CStr) -> io::Result<()> {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe { libc::syscall(libc::SYS_newfstatat, libc::AT_FDCWD, path.as_ptr(), stat.as_mut_ptr(), 0) })
        .map(drop)
}

/// fchmodat(2) of an empty path: `ENOENT` if allowed.
pub fn chmod() -> io::Result<()> {
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe { libc::syscall(libc::SYS_fchmodat, libc::AT_FDCWD, c"".as_ptr(), 0o600) }).map(drop)
}

/// renameat2(2) of a path to itself, which changes nothing.
pub fn rename(path: &CStr) -> io::Result<()> {
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe {
        libc::syscall(libc::SYS_renameat2, libc::AT_FDCWD, path.as_ptr(), libc::AT_FDCWD, path.as_ptr(), 0)
    })
    .map(drop)
}

/// execve(2) with an argument list at an address where nothing is: `EFAULT` once the file has been opened to be run.
pub fn execve(path: &CStr) -> io::Result<()> {
    let nowhere = 1usize;
    // SAFETY: the path is a C string; the kernel finds nothing at the address of the lists and says so.
    outcome(unsafe { libc::syscall(libc::SYS_execve, path.as_ptr(), nowhere, nowhere) }).map(drop)
}

// ---- through a descriptor that was passed

/// openat(2) of the directory itself: `ENOTDIR` if allowed and the descriptor is no directory.
pub fn openat_through(directory: impl AsFd) -> io::Result<()> {
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    close(unsafe { libc::syscall(libc::SYS_openat, number(&directory), c".".as_ptr(), libc::O_CLOEXEC, 0) })
}

/// mknodat(2) of a file in the directory; it is removed again.
pub fn mknodat(directory: impl AsFd) -> io::Result<()> {
    let directory = number(&directory);
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe { libc::syscall(libc::SYS_mknodat, directory, NO_SUCH_NAME.as_ptr(), libc::S_IFREG | 0o600, 0) })?;
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe { libc::syscall(libc::SYS_unlinkat, directory, NO_SUCH_NAME.as_ptr(), 0) }).map(drop)
}

/// unlinkat(2) of a name that does not exist: `ENOENT` if allowed.
pub fn unlinkat(directory: impl AsFd) -> io::Result<()> {
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe { libc::syscall(libc::SYS_unlinkat, number(&directory), NO_SUCH_NAME.as_ptr(), 0) }).map(drop)
}

/// linkat(2) of the descriptor to a name that exists: `EEXIST` if allowed, `ENOENT` if it would take a capability.
pub fn linkat(fd: impl AsFd) -> io::Result<()> {
    let fd = number(&fd);
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe {
        libc::syscall(libc::SYS_linkat, fd, c"".as_ptr(), libc::AT_FDCWD, c"/".as_ptr(), libc::AT_EMPTY_PATH)
    })
    .map(drop)
}

/// open_tree(2) of the descriptor itself.
pub fn open_tree_through(fd: impl AsFd) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | libc::O_CLOEXEC;
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    close(unsafe { libc::syscall(libc::SYS_open_tree, number(&fd), c"".as_ptr(), flags) })
}

/// execveat(2) of the descriptor, with an argument list at an address where nothing is.
pub fn execveat(fd: impl AsFd) -> io::Result<()> {
    let nowhere = 1usize;
    // SAFETY: the path is a C string; the kernel finds nothing at the address of the lists and says so.
    outcome(unsafe {
        libc::syscall(libc::SYS_execveat, number(&fd), c"".as_ptr(), nowhere, nowhere, libc::AT_EMPTY_PATH)
    })
    .map(drop)
}

/// name_to_handle_at(2): the name that open_by_handle_at takes.
pub fn name_to_handle_at(fd: impl AsFd) -> io::Result<()> {
    // handle_bytes (0: `EOVERFLOW` if allowed), handle_type.
    let mut handle = [0u32, 0];
    let mut mount: c_int = 0;
    let pointer = handle.as_mut_ptr();
    let flags = libc::AT_EMPTY_PATH;
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe {
        libc::syscall(libc::SYS_name_to_handle_at, number(&fd), c"".as_ptr(), pointer, &raw mut mount, flags)
    })
    .map(drop)
}

/// open_by_handle_at(2) with a handle that no file system made.
pub fn open_by_handle_at(mount: impl AsFd) -> io::Result<()> {
    // handle_bytes, handle_type, then eight bytes of handle.
    let mut handle = [8u32, 1, 0, 0];
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    close(unsafe { libc::syscall(libc::SYS_open_by_handle_at, number(&mount), handle.as_mut_ptr(), libc::O_CLOEXEC) })
}

/// fchmod(2) to the mode that the file has.
pub fn fchmod(fd: impl AsFd) -> io::Result<()> {
    let mode = rustix::fs::fstat(&fd)?.st_mode & 0o7777;
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_fchmod, number(&fd), mode) }).map(drop)
}

/// fchown(2) to nobody else: -1 leaves both as they are.
pub fn fchown(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_fchown, number(&fd), -1, -1) }).map(drop)
}

/// utimensat(2) that omits both times.
pub fn utimens(fd: impl AsFd) -> io::Result<()> {
    let omit = libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT };
    let times = [omit, omit];
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe { libc::syscall(libc::SYS_utimensat, number(&fd), std::ptr::null::<u8>(), times.as_ptr(), 0) })
        .map(drop)
}

/// fsetxattr(2) that replaces an attribute that is not there: `ENODATA` if allowed.
pub fn fsetxattr(fd: impl AsFd) -> io::Result<()> {
    let name = c"user.doorless-no-such-name";
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe {
        libc::syscall(libc::SYS_fsetxattr, number(&fd), name.as_ptr(), c"".as_ptr(), 0, libc::XATTR_REPLACE)
    })
    .map(drop)
}

/// ioctl(2), `FS_IOC_SETFLAGS` of the flags that the file has.
pub fn set_inode_flags(fd: impl AsFd) -> io::Result<()> {
    // _IOR('f', 1, long) and _IOW('f', 2, long); both move an int.
    let mut flags: c_int = 0;
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe { libc::syscall(libc::SYS_ioctl, number(&fd), 0x8008_6601u64, &raw mut flags) })?;
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe { libc::syscall(libc::SYS_ioctl, number(&fd), 0x4008_6602u64, &raw mut flags) }).map(drop)
}

/// ioctl(2), `FICLONE` from no descriptor: `EBADF` if allowed.
pub fn clone_file(fd: impl AsFd) -> io::Result<()> {
    // _IOW(0x94, 9, int)
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_ioctl, number(&fd), 0x4004_9409u64, -1) }).map(drop)
}

/// fcntl(2), F_SETFL with O_APPEND, and back: the flags are shared with whoever passed the descriptor.
pub fn set_append(fd: impl AsFd) -> io::Result<()> {
    let fd = number(&fd);
    // SAFETY: no pointers.
    let flags = outcome(unsafe { libc::syscall(libc::SYS_fcntl, fd, libc::F_GETFL) })?;
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_fcntl, fd, libc::F_SETFL, flags | c_long::from(libc::O_APPEND)) })?;
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_fcntl, fd, libc::F_SETFL, flags) }).map(drop)
}

/// fcntl(2), F_SETOWN to nobody: who gets the signals of a descriptor.
pub fn set_owner(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_fcntl, number(&fd), libc::F_SETOWN, 0) }).map(drop)
}

/// fcntl(2), F_SETLEASE that gives up a lease that there is not: `EAGAIN` if allowed.
pub fn set_lease(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_fcntl, number(&fd), libc::F_SETLEASE, libc::F_UNLCK) }).map(drop)
}

/// flock(2): a lock that others obey, taken and given back.
pub fn flock(fd: impl AsFd) -> io::Result<()> {
    let fd = number(&fd);
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_flock, fd, libc::LOCK_SH | libc::LOCK_NB) })?;
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_flock, fd, libc::LOCK_UN) }).map(drop)
}

/// mmap(2) of the file's first page to execute it.
pub fn map_file_executable(fd: impl AsFd) -> io::Result<()> {
    map(libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE, number(&fd))
}

// ---- out to the network

/// socket(2).
pub fn socket(family: i32, kind: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    close(unsafe { libc::syscall(libc::SYS_socket, family, kind | libc::SOCK_CLOEXEC, 0) })
}

/// socket(2) of unix datagrams.
pub fn unix_socket() -> io::Result<()> {
    socket(libc::AF_UNIX, libc::SOCK_DGRAM)
}

/// socket(2) of UDP.
pub fn udp_socket() -> io::Result<()> {
    socket(libc::AF_INET, libc::SOCK_DGRAM)
}

/// socket(2) of netlink, which talks to the kernel about the network.
pub fn netlink_socket() -> io::Result<()> {
    socket(libc::AF_NETLINK, libc::SOCK_RAW)
}

/// A TCP socket with connect(2) to a port of this host where nobody listens: `ECONNREFUSED` if allowed.
pub fn tcp_connect() -> io::Result<()> {
    tcp(libc::SYS_connect, 1)
}

/// A TCP socket with bind(2) to any port of this host.
pub fn tcp_bind() -> io::Result<()> {
    tcp(libc::SYS_bind, 0)
}

fn tcp(call: c_long, port: u16) -> io::Result<()> {
    // SAFETY: no pointers.
    let socket =
        outcome(unsafe { libc::syscall(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    let family = libc::AF_INET.unsigned_abs() as libc::sa_family_t;
    let here = libc::in_addr { s_addr: u32::from(std::net::Ipv4Addr::LOCALHOST).to_be() };
    let address = libc::sockaddr_in { sin_family: family, sin_port: port.to_be(), sin_addr: here, sin_zero: [0; 8] };
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    let done = outcome(unsafe { libc::syscall(call, socket, &raw const address, size_of_val(&address)) }).map(drop);
    close(socket)?;
    done
}

/// connect(2) of a descriptor that is no socket: `ENOTSOCK` if allowed.
pub fn connect(fd: impl AsFd) -> io::Result<()> {
    let address = [0u16; 8];
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe { libc::syscall(libc::SYS_connect, number(&fd), address.as_ptr(), size_of_val(&address)) }).map(drop)
}

/// bind(2) of a descriptor that is no socket: `ENOTSOCK` if allowed.
pub fn bind(fd: impl AsFd) -> io::Result<()> {
    let address = [0u16; 8];
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe { libc::syscall(libc::SYS_bind, number(&fd), address.as_ptr(), size_of_val(&address)) }).map(drop)
}

// ---- to another process

/// kill(2) with signal 0: asks for permission and sends nothing.
pub fn kill(pid: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_kill, pid, 0) }).map(drop)
}

/// tgkill(2) with signal 0 to the process's first thread.
pub fn tgkill(pid: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_tgkill, pid, pid, 0) }).map(drop)
}

/// ptrace(2), PTRACE_SEIZE; the process is let go again, after a stop of a moment.
pub fn ptrace_seize(pid: i32) -> io::Result<()> {
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_SEIZE, pid, 0, 0) })?;
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_INTERRUPT, pid, 0, 0) })?;
    wait(c_long::from(pid))?;
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_DETACH, pid, 0, 0) }).map(drop)
}

/// process_vm_readv(2) of one byte at an address where nothing is: `EFAULT` if allowed.
pub fn process_vm_readv(pid: i32) -> io::Result<()> {
    let mut byte = 0u8;
    let here = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let there = libc::iovec { iov_base: std::ptr::without_provenance_mut(1), iov_len: 1 };
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe { libc::syscall(libc::SYS_process_vm_readv, pid, &raw const here, 1, &raw const there, 1, 0) })
        .map(drop)
}

/// pidfd_open(2).
pub fn pidfd_open(pid: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    close(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// pidfd_getfd(2) of the process's standard error: its descriptor, opened with its rights.
pub fn pidfd_getfd(pid: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    let pidfd = outcome(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: no pointers.
    let taken = outcome(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd, 2, 0) }).and_then(close);
    close(pidfd)?;
    taken
}

/// prlimit64(2) that reads another process's limits.
pub fn prlimit(pid: i32) -> io::Result<()> {
    let mut limits = [0u64; 2];
    let none = std::ptr::null::<u64>();
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe { libc::syscall(libc::SYS_prlimit64, pid, libc::RLIMIT_NOFILE, none, limits.as_mut_ptr()) })
        .map(drop)
}

// ---- to new processes

/// clone(2) of a process, which ends at once.
pub fn fork() -> io::Result<()> {
    // SAFETY: a fork without a new stack, as fork(2) does; the child runs one raw call and nothing of ours.
    let child = outcome(unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) })?;
    end_child(child)
}

/// clone3(2) of a process, which ends at once. Its arguments are behind a pointer, where no filter can see them.
pub fn clone3() -> io::Result<()> {
    // struct clone_args up to tls; exit_signal is the fifth field.
    let mut arguments = [0u64; 8];
    arguments[4] = libc::SIGCHLD.unsigned_abs().into();
    // SAFETY: the arguments have the size that is given and ask for a fork without a new stack; see fork above.
    let child = outcome(unsafe { libc::syscall(libc::SYS_clone3, arguments.as_ptr(), size_of_val(&arguments)) })?;
    end_child(child)
}

fn end_child(child: c_long) -> io::Result<()> {
    if child == 0 {
        // SAFETY: ends the child; no destructor or exit handler of the parent's copy runs.
        unsafe { libc::syscall(libc::SYS_exit_group, 0) };
    }
    wait(child)
}

/// wait4(2) for a child or a traced process to end or stop.
fn wait(pid: c_long) -> io::Result<()> {
    let mut status: c_int = 0;
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe { libc::syscall(libc::SYS_wait4, pid, &raw mut status, libc::__WALL, 0) }).map(drop)
}

// ---- to mounts and namespaces

/// unshare(2) of the user namespace, from a second thread, where the kernel refuses it with `EINVAL` if it is allowed.
pub fn unshare() -> io::Result<()> {
    // SAFETY: no pointers.
    let attempt = || outcome(unsafe { libc::syscall(libc::SYS_unshare, libc::CLONE_NEWUSER) }).map(drop);
    match std::thread::Builder::new().spawn(attempt)?.join() {
        Ok(attempted) => attempted,
        Err(_) => Err(io::ErrorKind::Other.into()),
    }
}

/// setns(2) to a descriptor that is no namespace: `EBADF` if allowed.
pub fn setns() -> io::Result<()> {
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_setns, -1, 0) }).map(drop)
}

/// mount(2) of a file system that does not exist: `ENODEV` if allowed.
pub fn mount() -> io::Result<()> {
    let no = NO_SUCH_NAME.as_ptr();
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe { libc::syscall(libc::SYS_mount, no, c"/".as_ptr(), no, 0, 0) }).map(drop)
}

/// fsopen(2) of procfs.
pub fn fsopen() -> io::Result<()> {
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    close(unsafe { libc::syscall(libc::SYS_fsopen, c"proc".as_ptr(), 1) })
}

/// fsmount(2) of no descriptor: `EBADF` if allowed.
pub fn fsmount() -> io::Result<()> {
    // SAFETY: no pointers.
    close(unsafe { libc::syscall(libc::SYS_fsmount, -1, 0, 0) })
}

/// chroot(2) to the root that the process has.
pub fn chroot() -> io::Result<()> {
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe { libc::syscall(libc::SYS_chroot, c"/".as_ptr()) }).map(drop)
}

// ---- to the kernel's less known rooms

/// io_uring_setup(2).
pub fn io_uring_setup() -> io::Result<()> {
    // struct io_uring_params has 120 bytes.
    let mut params = [0u64; 15];
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    close(unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) })
}

/// memfd_create(2).
pub fn memfd_create() -> io::Result<()> {
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    close(unsafe { libc::syscall(libc::SYS_memfd_create, c"attempt".as_ptr(), libc::MFD_CLOEXEC) })
}

/// userfaultfd(2).
pub fn userfaultfd() -> io::Result<()> {
    // UFFD_USER_MODE_ONLY (1): what an ordinary user may ask for.
    // SAFETY: no pointers.
    close(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1) })
}

/// bpf(2), creating an array map of one element.
pub fn bpf() -> io::Result<()> {
    // BPF_MAP_CREATE of BPF_MAP_TYPE_ARRAY: map_type, key_size, value_size, max_entries.
    let attributes = [2u32, 4, 4, 1];
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    close(unsafe { libc::syscall(libc::SYS_bpf, 0, attributes.as_ptr(), size_of_val(&attributes)) })
}

/// keyctl(2), KEYCTL_GET_KEYRING_ID of the session keyring, without making one.
pub fn keyctl() -> io::Result<()> {
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_keyctl, 0, -3, 0) }).map(drop)
}

/// perf_event_open(2), counting this thread's processor time.
pub fn perf_event_open() -> io::Result<()> {
    // PERF_TYPE_SOFTWARE (1), the first published size (64), PERF_COUNT_SW_CPU_CLOCK (0); exclude_kernel and exclude_hv.
    let mut attributes = [0u64; 8];
    attributes[0] = 1 | 64 << 32;
    attributes[5] = 1 << 5 | 1 << 6;
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    close(unsafe { libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), 0, -1, -1, 0) })
}

/// inotify_init1(2): watching paths.
pub fn inotify() -> io::Result<()> {
    // SAFETY: no pointers.
    close(unsafe { libc::syscall(libc::SYS_inotify_init1, libc::O_CLOEXEC) })
}

/// init_module(2) of nothing: `EFAULT` or `ENOEXEC` if allowed.
pub fn init_module() -> io::Result<()> {
    // SAFETY: pointers are null or to C strings and locals that outlive the call, of the size that it expects.
    outcome(unsafe { libc::syscall(libc::SYS_init_module, 1usize, 0, c"".as_ptr()) }).map(drop)
}

/// prctl(2), PR_SET_DUMPABLE on and off again: opens the process to debuggers of its user.
pub fn set_dumpable() -> io::Result<()> {
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_prctl, libc::PR_SET_DUMPABLE, 1, 0, 0, 0) })?;
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_prctl, libc::PR_SET_DUMPABLE, 0, 0, 0, 0) }).map(drop)
}

/// personality(2) that asks and changes nothing: it can make every readable page executable.
pub fn personality() -> io::Result<()> {
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_personality, 0xffff_ffffu64) }).map(drop)
}

// ---- to code of its own

/// mmap(2) of an anonymous page that can be executed.
pub fn map_executable() -> io::Result<()> {
    map(libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
}

/// mmap(2) of an anonymous page that can be written and executed.
pub fn map_writable_executable() -> io::Result<()> {
    let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    map(protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
}

/// mprotect(2) of a page, mapped to be written, so that it can be executed.
pub fn protect_executable() -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: address 0 lets the kernel choose the place: no mapping that exists is touched.
    let page =
        outcome(unsafe { libc::syscall(libc::SYS_mmap, 0, PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) })?;
    // SAFETY: exactly the page that was mapped a moment ago and that nothing refers to.
    let done =
        outcome(unsafe { libc::syscall(libc::SYS_mprotect, page, PAGE, libc::PROT_READ | libc::PROT_EXEC) }).map(drop);
    unmap(page)?;
    done
}

/// Every page size of Linux is at least this, so the call covers one page.
const PAGE: usize = 4096;

fn map(protection: c_int, flags: c_int, fd: c_int) -> io::Result<()> {
    // SAFETY: address 0 lets the kernel choose the place: no mapping that exists is touched.
    unmap(outcome(unsafe { libc::syscall(libc::SYS_mmap, 0, PAGE, protection, flags, fd, 0) })?)
}

fn unmap(page: c_long) -> io::Result<()> {
    // SAFETY: exactly the page that was mapped a moment ago and that nothing refers to.
    outcome(unsafe { libc::syscall(libc::SYS_munmap, page, PAGE) }).map(drop)
}
