// SPDX-License-Identifier: Apache-2.0 OR MIT
//! System calls that a confined process must not be able to make, as it would make them: raw, with nothing in between.
//!
//! Every function is harmless if it succeeds: what it opened is closed, what it changed it changes to what it was.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// The outcome of a raw call: a number that is no errno.
fn outcome(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Closes a descriptor that an attempt should not have got.
fn close(result: libc::c_long) -> io::Result<()> {
    let fd = outcome(result)?;
    // SAFETY: the number was returned by the kernel a moment ago and nothing else knows it.
    unsafe { libc::syscall(libc::SYS_close, fd) };
    Ok(())
}

/// open(2) or, where the architecture has none, openat(2).
pub fn open(path: &CStr, flags: i32) -> io::Result<()> {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the path is a C string that outlives the call.
    return close(unsafe { libc::syscall(libc::SYS_open, path.as_ptr(), flags, 0) });
    #[cfg(not(target_arch = "x86_64"))]
    openat(path, flags)
}

/// openat(2) from the working directory.
pub fn openat(path: &CStr, flags: i32) -> io::Result<()> {
    // SAFETY: the path is a C string that outlives the call.
    close(unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags, 0) })
}

/// openat2(2) from the working directory, read-only.
pub fn openat2(path: &CStr) -> io::Result<()> {
    let how = [0u64; 3];
    // SAFETY: `how` is the zeroed struct open_how (three u64) of the given size; the path outlives the call.
    close(unsafe { libc::syscall(libc::SYS_openat2, libc::AT_FDCWD, path.as_ptr(), how.as_ptr(), size_of_val(&how)) })
}

/// truncate(2) by path, to the length that the file has: none that exists has -1.
pub fn truncate(path: &CStr) -> io::Result<()> {
    // SAFETY: the path is a C string that outlives the call; length -1 is refused by the kernel before anything changes.
    outcome(unsafe { libc::syscall(libc::SYS_truncate, path.as_ptr(), -1i64) }).map(drop)
}

/// io_uring_setup(2).
pub fn io_uring_setup() -> io::Result<()> {
    // struct io_uring_params has 120 bytes.
    let mut params = [0u64; 15];
    // SAFETY: the kernel writes at most 120 bytes through the pointer.
    close(unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) })
}

/// open_by_handle_at(2) with a handle that no file system made.
pub fn open_by_handle_at(mount: impl AsFd) -> io::Result<()> {
    // handle_bytes, handle_type, then eight bytes of handle.
    let mut handle = [8u32, 1, 0, 0];
    let mount = mount.as_fd().as_raw_fd();
    // SAFETY: the handle's size field says how many bytes follow it, and they are there.
    close(unsafe { libc::syscall(libc::SYS_open_by_handle_at, mount, handle.as_mut_ptr(), libc::O_RDONLY) })
}

/// socket(2).
pub fn socket(family: i32, kind: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    close(unsafe { libc::syscall(libc::SYS_socket, family, kind, 0) })
}

/// execve(2) of something that is no program: if the call is allowed, the answer is another error than denial.
pub fn execve(path: &CStr) -> io::Result<()> {
    let none: [*const libc::c_char; 1] = [std::ptr::null()];
    // SAFETY: path, argument and environment lists are terminated as the call wants them.
    outcome(unsafe { libc::syscall(libc::SYS_execve, path.as_ptr(), none.as_ptr(), none.as_ptr()) }).map(drop)
}

/// kill(2) with signal 0: asks for permission and sends nothing.
pub fn kill(pid: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_kill, pid, 0) }).map(drop)
}

/// ptrace(2), PTRACE_SEIZE: attaches without stopping; the kernel lets go when the tracer ends.
pub fn ptrace_seize(pid: i32) -> io::Result<()> {
    // SAFETY: PTRACE_SEIZE takes no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_SEIZE, pid, 0, 0) }).map(drop)
}

/// process_vm_readv(2) of no bytes.
pub fn process_vm_readv(pid: i32) -> io::Result<()> {
    let none = std::ptr::null::<libc::iovec>();
    // SAFETY: both lists have length 0.
    outcome(unsafe { libc::syscall(libc::SYS_process_vm_readv, pid, none, 0, none, 0, 0) }).map(drop)
}

/// pidfd_open(2).
pub fn pidfd_open(pid: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    close(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// unshare(2) of user and mount namespace.
pub fn unshare() -> io::Result<()> {
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_unshare, libc::CLONE_NEWUSER | libc::CLONE_NEWNS) }).map(drop)
}

/// fsopen(2) of procfs.
pub fn fsopen() -> io::Result<()> {
    // SAFETY: the name is a C string.
    close(unsafe { libc::syscall(libc::SYS_fsopen, c"proc".as_ptr(), 0) })
}

/// open_tree(2) of the root.
pub fn open_tree(path: &CStr) -> io::Result<()> {
    // SAFETY: the path is a C string that outlives the call.
    close(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), 0) })
}

/// memfd_create(2).
pub fn memfd_create() -> io::Result<()> {
    // SAFETY: the name is a C string.
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
    // SAFETY: the attributes are there in the given size and only read.
    close(unsafe { libc::syscall(libc::SYS_bpf, 0, attributes.as_ptr(), size_of_val(&attributes)) })
}

/// keyctl(2), KEYCTL_GET_KEYRING_ID of the session keyring, without making one.
pub fn keyctl() -> io::Result<()> {
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_keyctl, 0, -3, 0) }).map(drop)
}

/// fchmod(2) to the mode that the file has.
pub fn fchmod(fd: impl AsFd) -> io::Result<()> {
    let mode = rustix::fs::fstat(&fd)?.st_mode & 0o7777;
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_fchmod, fd.as_fd().as_raw_fd(), mode) }).map(drop)
}

/// fchown(2) to nobody else: -1 leaves both as they are.
pub fn fchown(fd: impl AsFd) -> io::Result<()> {
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_fchown, fd.as_fd().as_raw_fd(), -1, -1) }).map(drop)
}

/// fcntl(2), F_SETFL with O_APPEND, and back.
pub fn set_append(fd: impl AsFd) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: fcntl with F_GETFL and F_SETFL takes no pointers.
    let flags = outcome(unsafe { libc::syscall(libc::SYS_fcntl, fd, libc::F_GETFL) })?;
    let append = flags | libc::c_long::from(libc::O_APPEND);
    // SAFETY: as above.
    outcome(unsafe { libc::syscall(libc::SYS_fcntl, fd, libc::F_SETFL, append) })?;
    // SAFETY: as above.
    outcome(unsafe { libc::syscall(libc::SYS_fcntl, fd, libc::F_SETFL, flags) }).map(drop)
}

/// flock(2): a lock that others obey, taken and given back.
pub fn flock(fd: impl AsFd) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_flock, fd, libc::LOCK_SH | libc::LOCK_NB) })?;
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_flock, fd, libc::LOCK_UN) }).map(drop)
}

/// mmap(2) of an anonymous page that can be executed.
pub fn map_executable() -> io::Result<()> {
    let protection = libc::PROT_READ | libc::PROT_EXEC;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: the kernel chooses the place of a new mapping; nothing existing is touched.
    let page = outcome(unsafe { libc::syscall(libc::SYS_mmap, 0, 4096, protection, flags, -1, 0) })?;
    // SAFETY: exactly the page that was mapped a moment ago and that nothing refers to.
    outcome(unsafe { libc::syscall(libc::SYS_munmap, page, 4096) }).map(drop)
}

/// unlink of a name, relative to the working directory, that does not exist.
pub fn unlink(path: &CStr) -> io::Result<()> {
    // SAFETY: the path is a C string that outlives the call.
    outcome(unsafe { libc::syscall(libc::SYS_unlinkat, libc::AT_FDCWD, path.as_ptr(), 0) }).map(drop)
}

/// clone(2) of a process.
pub fn fork() -> io::Result<()> {
    // SAFETY: a fork without a new stack; a child, if there is one, ends at once without running anything of ours.
    let child = outcome(unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) })?;
    if child == 0 {
        // SAFETY: ends the child; no destructor or exit handler of the parent's copy runs.
        unsafe { libc::syscall(libc::SYS_exit_group, 0) };
    }
    let mut status = 0;
    // SAFETY: the status is written through a valid pointer; the child exists.
    unsafe { libc::syscall(libc::SYS_wait4, child, &raw mut status, 0, 0) };
    Ok(())
}
