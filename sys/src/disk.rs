// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Block device requests (`linux/fs.h`).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// `_IOR(0x12, 114, size_t)`: device size in bytes.
pub const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
/// `_IO(0x12, 104)`: logical block size in bytes.
pub const BLKSSZGET: libc::c_ulong = 0x1268;
/// `_IO(0x12, 119)`: discard a byte range.
pub const BLKDISCARD: libc::c_ulong = 0x1277;
/// `_IO(0x12, 127)`: zero a byte range.
pub const BLKZEROOUT: libc::c_ulong = 0x127f;

/// Size of a block device in bytes.
///
/// # Errors
/// `ENOTTY` if `fd` is no block device.
pub fn size(fd: impl AsFd) -> io::Result<u64> {
    let mut bytes = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64 through the pointer, which is valid for the call.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKGETSIZE64, &raw mut bytes) })?;
    Ok(bytes)
}

/// Logical block size of a block device in bytes.
///
/// # Errors
/// `ENOTTY` if `fd` is no block device.
pub fn logical_block_size(fd: impl AsFd) -> io::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int through the pointer, which is valid for the call.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKSSZGET, &raw mut bytes) })?;
    u32::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Discards `len` bytes at `offset`; their content is undefined afterwards.
///
/// # Errors
/// `EOPNOTSUPP` if the device cannot, `EINVAL` if the range is not aligned to its sectors.
pub fn discard(fd: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    range_request(fd, BLKDISCARD, offset, len)
}

/// Makes `len` bytes at `offset` read as zeroes, keeping them allocated.
///
/// # Errors
/// `EINVAL` if the range is not aligned to the device's sectors.
pub fn zero_out(fd: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    range_request(fd, BLKZEROOUT, offset, len)
}

fn range_request(fd: impl AsFd, request: libc::c_ulong, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: both requests read two u64 through the pointer, which is valid for the call.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, range.as_ptr()) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
