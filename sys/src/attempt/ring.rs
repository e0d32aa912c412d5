// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opening through io_uring, whose requests no seccomp filter sees.

use std::ffi::CStr;
use std::io;
use std::sync::atomic::{Ordering, fence};

use libc::c_long;

use super::{close, outcome};

/// struct io_uring_params: entries (2), flags, two of threads, features, wq_fd, three reserved; then ten words of offsets in
/// the submission ring, of which head, tail, ring_mask, ring_entries, flags, dropped and array come first, and ten in the
/// completion ring: head, tail, ring_mask, ring_entries, overflow, cqes.
type Params = [u32; 30];
const SQ_TAIL: usize = 11;
const SQ_ARRAY: usize = 16;
const CQ_CQES: usize = 25;
/// What fits into a page: a ring of one request.
const ROOM: usize = 4096;
const IORING_OFF_SQ_RING: c_long = 0;
const IORING_OFF_SQES: c_long = 0x1000_0000;
const IORING_OP_OPENAT: u64 = 18;
const IORING_ENTER_GETEVENTS: u32 = 1;

/// `IORING_OP_OPENAT` of a path, to write.
pub fn openat(path: &CStr) -> io::Result<()> {
    let mut params: Params = [0; 30];
    // SAFETY: the parameters have the 120 bytes that the call expects.
    let ring = outcome(unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) })?;
    let opened = submit(ring, &params, path);
    close(ring)?;
    close(opened?.into())
}

/// The one completion's result: an open descriptor.
fn submit(ring: c_long, params: &Params, path: &CStr) -> io::Result<i32> {
    let map = |offset: c_long| {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: address 0 lets the kernel choose the place: no mapping that exists is touched.
        outcome(unsafe { libc::syscall(libc::SYS_mmap, 0, ROOM, protection, libc::MAP_SHARED, ring, offset) })
    };
    // One mapping for both rings (IORING_FEAT_SINGLE_MMAP, every kernel since 5.4).
    let (rings, requests) = (map(IORING_OFF_SQ_RING)?, map(IORING_OFF_SQES)?);
    let word = |index: usize| params.get(index).map_or(0, |&offset| offset as usize).min(ROOM - 16);
    let at = |offset: usize| (rings as usize + offset) as *mut u32;
    // struct io_uring_sqe: opcode and file descriptor in the first word, then off, addr, len and open_flags.
    let first = IORING_OP_OPENAT | u64::from(libc::AT_FDCWD.cast_unsigned()) << 32;
    let flags = u64::from((libc::O_RDWR | libc::O_CLOEXEC).unsigned_abs()) << 32;
    let request: [u64; 8] = [first, 0, path.as_ptr() as u64, flags, 0, 0, 0, 0];
    // SAFETY: all of it is inside of the two pages mapped above, at offsets that the kernel gave; the ring is idle.
    unsafe {
        std::ptr::copy_nonoverlapping(request.as_ptr(), requests as *mut u64, request.len());
        at(word(SQ_ARRAY)).write_volatile(0);
        at(word(SQ_TAIL)).write_volatile(1);
    }
    fence(Ordering::SeqCst);
    // SAFETY: the request's path outlives the call, which waits for its completion.
    let entered = outcome(unsafe {
        libc::syscall(libc::SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, std::ptr::null::<u8>(), 0)
    });
    // struct io_uring_cqe: user_data, res, flags.
    // SAFETY: inside of the page, at the offset that the kernel gave.
    let result = unsafe { at(word(CQ_CQES) + 8).read_volatile() }.cast_signed();
    for page in [rings, requests] {
        // SAFETY: exactly what was mapped above and nothing refers to any more.
        outcome(unsafe { libc::syscall(libc::SYS_munmap, page, ROOM) })?;
    }
    entered?;
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result) }
}
