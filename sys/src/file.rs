// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Positioned file I/O: the descriptor's shared offset and status flags are never touched.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::AsFd;

use rustix::io::{Errno, ReadWriteFlags};

/// Whether a call may sleep until a device answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Sleep as long as it takes.
    Allowed,
    /// Answer at once or with [`io::ErrorKind::WouldBlock`]; the caller tries again where sleeping is allowed.
    Never,
}

/// Reads at `offset` until `buf` is full or the file ends; returns the bytes read (preadv2(2)).
///
/// # Errors
/// The errno of the read; `WouldBlock` only with [`Wait::Never`]. What was read before an error is in `buf`, uncounted.
pub fn read_at(fd: impl AsFd, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<usize> {
    let fd = fd.as_fd();
    let mut done = 0;
    let mut flags = match wait {
        Wait::Allowed => ReadWriteFlags::empty(),
        Wait::Never => ReadWriteFlags::NOWAIT,
    };
    while done < buf.len() {
        let at = offset + done as u64;
        match rustix::io::preadv2(fd, &mut [IoSliceMut::new(&mut buf[done..])], at, flags) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            // A file system without RWF_NOWAIT (tmpfs before 6.x, FUSE, some block drivers): the caller must assume the worst.
            Err(Errno::OPNOTSUPP | Errno::INVAL) if flags == ReadWriteFlags::NOWAIT => {
                if wait == Wait::Never {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                flags = ReadWriteFlags::empty();
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(done)
}

/// Writes all of `buf` at `offset`; with `durable`, data and the metadata needed to read it are on stable storage on return
/// (pwritev2(2), `RWF_DSYNC`).
///
/// # Errors
/// The errno of the write. An unknown part of `buf` may have been written.
pub fn write_at(fd: impl AsFd, buf: &[u8], offset: u64, durable: bool) -> io::Result<()> {
    let fd = fd.as_fd();
    let flags = if durable { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() };
    let mut done = 0;
    while done < buf.len() {
        match rustix::io::pwritev2(fd, &[IoSlice::new(&buf[done..])], offset + done as u64, flags) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}
