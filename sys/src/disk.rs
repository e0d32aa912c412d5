// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Block device requests (`linux/fs.h`).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// `_IOR(0x12, 114, size_t)`: device size in bytes.
pub const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
/// Size of a block device in bytes.
///
/// # Errors
/// `ENOTTY` if `fd` is no block device.
pub fn size(fd: impl AsFd) -> io::Result<u64> {
    let mut bytes = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64 through the pointer, which is valid for the call.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKGETSIZE64, &raw mut bytes) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes) }
}
