// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the kernel is answered (`linux/fuse.h`): a header of 16 bytes, and what was asked for.

use std::io;

use rustix::io::Errno;

use super::request::MAX_WRITE;

/// `struct fuse_out_header`.
pub const HEADER_LEN: usize = 16;
/// Room for any reply.
pub const REPLY_ROOM: usize = HEADER_LEN + MAX_WRITE;
/// Error numbers end here; beyond are the kernel's own, which it does not take from outside.
const LAST_ERRNO: i32 = 511;

/// A reply in the making, in a buffer of [`REPLY_ROOM`] bytes.
pub struct Reply<'a> {
    room: &'a mut [u8],
    filled: usize,
}

impl<'a> Reply<'a> {
    /// Nothing yet. `room` has [`REPLY_ROOM`] bytes.
    pub fn new(room: &'a mut [u8]) -> Reply<'a> {
        Reply { room, filled: HEADER_LEN }
    }

    pub fn u16(&mut self, value: u16) {
        self.bytes(&value.to_ne_bytes());
    }

    pub fn u32(&mut self, value: u32) {
        self.bytes(&value.to_ne_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.bytes(&value.to_ne_bytes());
    }

    /// `count` zero bytes.
    pub fn padding(&mut self, count: usize) {
        self.data(count).fill(0);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.data(bytes.len()).copy_from_slice(bytes);
    }

    /// Room for the next `count` bytes; together at most [`MAX_WRITE`].
    pub fn data(&mut self, count: usize) -> &mut [u8] {
        let start = self.filled;
        self.filled += count;
        &mut self.room[start..self.filled]
    }

    /// Puts the header on; the reply's length. An error has nothing but the header.
    pub fn finish(mut self, unique: u64, outcome: Result<(), Errno>) -> usize {
        let error = match outcome {
            Ok(()) => 0,
            Err(errno) => {
                self.filled = HEADER_LEN;
                -errno.raw_os_error().clamp(1, LAST_ERRNO)
            }
        };
        // At most REPLY_ROOM.
        let len = u32::try_from(self.filled).unwrap_or(u32::MAX);
        self.room[0..4].copy_from_slice(&len.to_ne_bytes());
        self.room[4..8].copy_from_slice(&error.to_ne_bytes());
        self.room[8..16].copy_from_slice(&unique.to_ne_bytes());
        self.filled
    }
}

/// The error number of a failed operation on a node. `ENOSYS` would tell the kernel never to ask again.
pub fn errno(error: &io::Error) -> Errno {
    match Errno::from_io_error(error) {
        Some(Errno::NOSYS) => Errno::IO,
        Some(errno) => errno,
        None if error.kind() == io::ErrorKind::Unsupported => Errno::OPNOTSUPP,
        None if error.kind() == io::ErrorKind::WriteZero => Errno::NOSPC,
        None => Errno::IO,
    }
}
