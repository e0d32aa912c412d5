// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a [`Ring`] must refuse, asked of it: each is harmless if it succeeds.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::squeue::{Entry, Flags};
use io_uring::{opcode, types};

use super::Ring;

/// `IORING_REGISTER_PERSONALITY`: keeps the caller's rights for requests to come.
const REGISTER_PERSONALITY: u32 = 9;
/// A name that no file has.
const NO_SUCH_NAME: &std::ffi::CStr = c"doorless-attempt-no-such-name";

impl Ring {
    /// Asks for something that this ring must refuse, with nothing else under way.
    fn ask(&mut self, entry: Entry) -> io::Result<i32> {
        if !self.push(&entry.user_data(u64::MAX)) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.ring.submit_and_wait(1)?;
        self.queued = 0;
        let answer = self.ring.completion().next().map_or(0, |ended| ended.result());
        if answer < 0 { Err(io::Error::from_raw_os_error(-answer)) } else { Ok(answer) }
    }

    /// Closes what an attempt has opened.
    fn ask_and_close(&mut self, entry: Entry) -> io::Result<()> {
        let opened = self.ask(entry)?;
        // SAFETY: the number was returned by the kernel a moment ago and nothing else knows it.
        unsafe { libc::close(opened) };
        Ok(())
    }

    /// openat(2) through this ring.
    ///
    /// # Errors
    /// As it should be: `EACCES`.
    pub fn attempt_openat(&mut self) -> io::Result<()> {
        self.ask_and_close(opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/".as_ptr()).flags(libc::O_RDONLY).build())
    }

    /// openat2(2) through this ring.
    ///
    /// # Errors
    /// As it should be: `EACCES`.
    pub fn attempt_openat2(&mut self) -> io::Result<()> {
        let how = types::OpenHow::new();
        self.ask_and_close(opcode::OpenAt2::new(types::Fd(libc::AT_FDCWD), c"/".as_ptr(), &raw const how).build())
    }

    /// socket(2) through this ring.
    ///
    /// # Errors
    /// As it should be: `EACCES`.
    pub fn attempt_socket(&mut self) -> io::Result<()> {
        self.ask_and_close(opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build())
    }

    /// connect(2) of a descriptor through this ring, to an address of no family: `ENOTSOCK` or worse if allowed.
    ///
    /// # Errors
    /// As it should be: `EACCES`.
    pub fn attempt_connect(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let nobody = libc::sockaddr { sa_family: 0, sa_data: [0; 14] };
        let size = size_of_val(&nobody) as libc::socklen_t;
        self.ask(opcode::Connect::new(types::Fd(fd.as_raw_fd()), &raw const nobody, size).build()).map(drop)
    }

    /// A write of no byte through this ring.
    ///
    /// # Errors
    /// As it should be: `EACCES`.
    pub fn attempt_write(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.ask(opcode::Write::new(types::Fd(fd.as_raw_fd()), std::ptr::null(), 0).build()).map(drop)
    }

    /// unlinkat(2) of a name that does not exist, through this ring: `ENOENT` if allowed.
    ///
    /// # Errors
    /// As it should be: `EACCES`.
    pub fn attempt_unlinkat(&mut self) -> io::Result<()> {
        self.ask(opcode::UnlinkAt::new(types::Fd(libc::AT_FDCWD), NO_SUCH_NAME.as_ptr()).build()).map(drop)
    }

    /// A read of no byte that the next request is to wait for: reads are all that the ring does, but not with every flag.
    ///
    /// # Errors
    /// As it should be: `EACCES`.
    pub fn attempt_link(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let read = opcode::Read::new(types::Fd(fd.as_raw_fd()), std::ptr::null_mut(), 0).build();
        self.ask(read.flags(Flags::IO_LINK)).map(drop)
    }

    /// io_uring_register(2) of this ring: seccomp's to refuse, else the ring's own.
    ///
    /// # Errors
    /// As it should be: `EPERM`, or `EACCES`.
    pub fn attempt_register(&mut self) -> io::Result<()> {
        let nothing = std::ptr::null::<libc::c_void>();
        // SAFETY: this request takes no argument; a number that it gives goes with the ring.
        let answer = unsafe {
            libc::syscall(libc::SYS_io_uring_register, self.ring.as_raw_fd(), REGISTER_PERSONALITY, nothing, 0)
        };
        if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
