// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An io_uring that can do one thing: read open files at an offset.
//!
//! Seccomp does not see what a ring is asked for. So the ring is made disabled, restricted to `IORING_OP_READ` without any
//! flag and without any further registration, and only then enabled; after that the kernel itself refuses the rest, and takes
//! the restriction back for nobody (io_uring_register(2), `IORING_REGISTER_RESTRICTIONS`).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use io_uring::register::Restriction;
use io_uring::squeue::Entry;
use io_uring::{IoUring, opcode, types};

use crate::buffer::Buffer;

mod attempts;

/// A ring, and the buffers that the kernel is filling.
pub struct Ring {
    ring: IoUring,
    /// Buffers under way, by the number that the kernel calls a read by.
    slots: Vec<Option<(u64, Buffer)>>,
    free: Vec<u32>,
    queued: usize,
}

/// A read that has ended.
#[derive(Debug)]
pub struct Done {
    /// What the caller called it.
    pub token: u64,
    /// Where the bytes are.
    pub buffer: Buffer,
    /// How many were read: fewer than asked for at the end of a file, or wherever the kernel felt like it.
    pub result: io::Result<usize>,
}

impl Ring {
    /// A ring for `most` reads at once, restricted and enabled. Call it before the process is confined.
    ///
    /// # Errors
    /// `EPERM` or `ENOSYS` where io_uring is refused, `EINVAL` for a kernel without restrictions (before Linux 5.10), `ENOMEM`.
    pub fn new(most: u32) -> io::Result<Ring> {
        let ring = IoUring::builder().setup_r_disabled().dontfork().build(most)?;
        ring.submitter().register_restrictions(&mut [Restriction::sqe_op(opcode::Read::CODE)])?;
        ring.submitter().register_enable_rings()?;
        Ok(Ring { ring, slots: (0..most).map(|_| None).collect(), free: (0..most).rev().collect(), queued: 0 })
    }

    /// Whether another read can be queued.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Reads that have not been taken back.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Queues a read of as many bytes as `buffer` has. Nothing happens before [`Ring::submit`].
    ///
    /// # Errors
    /// The buffer, if there is no room ([`Ring::has_room`]) or it is longer than a read can be.
    pub fn read(&mut self, fd: BorrowedFd<'_>, offset: u64, token: u64, mut buffer: Buffer) -> Result<(), Buffer> {
        let Ok(len) = u32::try_from(buffer.len()) else { return Err(buffer) };
        let Some(slot) = self.free.pop() else { return Err(buffer) };
        let at = buffer.bytes().as_mut_ptr();
        let entry = opcode::Read::new(types::Fd(fd.as_raw_fd()), at, len).offset(offset).build();
        if self.push(&entry.user_data(slot.into())) {
            self.slots[slot as usize] = Some((token, buffer));
            return Ok(());
        }
        self.free.push(slot);
        Err(buffer)
    }

    fn push(&mut self, entry: &Entry) -> bool {
        // SAFETY: the buffer stays in its slot, whose heap memory does not move, until the kernel has said that it is done.
        let pushed = unsafe { self.ring.submission().push(entry) }.is_ok();
        self.queued += usize::from(pushed);
        pushed
    }

    /// Tells the kernel of what is queued.
    ///
    /// # Errors
    /// The errno of io_uring_enter(2): then it is still queued.
    pub fn submit(&mut self) -> io::Result<()> {
        while self.queued > 0 {
            match self.ring.submit() {
                Ok(taken) => self.queued = self.queued.saturating_sub(taken.max(1)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// A read that has ended, if there is one. The descriptor is readable while there may be some.
    pub fn completed(&mut self) -> Option<Done> {
        loop {
            let ended = self.ring.completion().next()?;
            let slot = usize::try_from(ended.user_data()).ok()?;
            // What a slot does not know is nothing that was asked for.
            let Some((token, buffer)) = self.slots.get_mut(slot).and_then(Option::take) else { continue };
            self.free.push(u32::try_from(slot).ok()?);
            let result = usize::try_from(ended.result()).map_err(|_| io::Error::from_raw_os_error(-ended.result()));
            return Some(Done { token, buffer, result });
        }
    }

    /// Sleeps until a read has ended.
    ///
    /// # Errors
    /// The errno of io_uring_enter(2).
    pub fn wait(&mut self) -> io::Result<()> {
        match self.ring.submit_and_wait(1) {
            Ok(taken) => {
                self.queued = self.queued.saturating_sub(taken);
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(e) => Err(e),
        }
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns the descriptor and outlives the borrow.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("fd", &self.ring.as_raw_fd()).field("in_flight", &self.in_flight()).finish()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // What was never submitted the kernel does not know of.
        while self.in_flight() > self.queued {
            while self.completed().is_some() {}
            if self.in_flight() > self.queued && self.wait().is_err() {
                // The kernel may still write there: better lost than used again.
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    /// A ring, unless this machine has none to give.
    fn ring(most: u32) -> Option<Ring> {
        match Ring::new(most) {
            Ok(ring) => Some(ring),
            Err(e) => {
                eprintln!("skipped: no io_uring here: {e}");
                None
            }
        }
    }

    fn file(content: &[u8]) -> std::os::fd::OwnedFd {
        let fd = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        crate::file::write_at(&fd, content, 0, false).unwrap();
        fd
    }

    #[test]
    fn reads_come_back_with_their_buffers_whatever_their_order() {
        let Some(mut ring) = ring(8) else { return };
        let content: Vec<u8> = (0..40_000u32).flat_map(|at| at.to_ne_bytes()).collect();
        let file = file(&content);
        let mut seen = 0;
        for round in 0..5u64 {
            for read in 0..8 {
                let offset = (round * 8 + read) * 4000;
                ring.read(file.as_fd(), offset, offset, Buffer::new(16, 4000)).unwrap();
            }
            assert!(!ring.has_room());
            assert!(ring.read(file.as_fd(), 0, 0, Buffer::new(0, 1)).is_err());
            ring.submit().unwrap();
            while ring.in_flight() > 0 {
                ring.wait().unwrap();
                while let Some(mut done) = ring.completed() {
                    let at = usize::try_from(done.token).unwrap();
                    assert_eq!(done.result.unwrap(), 4000);
                    assert!(done.buffer.bytes() == &content[at..at + 4000]);
                    seen += 1;
                }
            }
        }
        assert_eq!(seen, 40);
    }

    #[test]
    fn the_end_of_a_file_and_errors_are_told() {
        let Some(mut ring) = ring(2) else { return };
        let file = file(&[1; 100]);
        // The end of a pipe that only takes bytes.
        let (_other, pipe) = rustix::pipe::pipe().unwrap();
        ring.read(file.as_fd(), 60, 1, Buffer::new(0, 4096)).unwrap();
        ring.read(pipe.as_fd(), 60, 2, Buffer::new(0, 4096)).unwrap();
        ring.submit().unwrap();
        while ring.in_flight() > 0 {
            ring.wait().unwrap();
            while let Some(done) = ring.completed() {
                match done.token {
                    1 => assert_eq!(done.result.unwrap(), 40),
                    _ => assert_eq!(done.result.unwrap_err().raw_os_error(), Some(libc::EBADF)),
                }
            }
        }
    }

    #[test]
    fn what_is_under_way_ends_before_the_ring_does() {
        let Some(mut ring) = ring(4) else { return };
        let file = file(&[7; 1 << 20]);
        for token in 0..3 {
            ring.read(file.as_fd(), 0, token, Buffer::new(0, 1 << 20)).unwrap();
        }
        ring.submit().unwrap();
        ring.read(file.as_fd(), 0, 9, Buffer::new(0, 1 << 20)).unwrap();
        drop(ring);
    }

    #[test]
    fn it_does_nothing_but_read() {
        let Some(mut ring) = ring(2) else { return };
        let file = file(b"x");
        let refused = [
            ring.attempt_openat(),
            ring.attempt_openat2(),
            ring.attempt_socket(),
            ring.attempt_connect(file.as_fd()),
            ring.attempt_write(file.as_fd()),
            ring.attempt_unlinkat(),
            ring.attempt_link(file.as_fd()),
            ring.attempt_register(),
        ];
        for (number, refused) in refused.into_iter().enumerate() {
            assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EACCES), "{number}");
        }
        // And still reads.
        ring.read(file.as_fd(), 0, 0, Buffer::new(0, 1)).unwrap();
        ring.wait().unwrap();
        assert_eq!(ring.completed().unwrap().buffer.bytes(), b"x");
    }
}
