// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Positioned file I/O straight into and out of a guest's memory, piece by piece as its buffers lie.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use crate::file::Wait;
use crate::guest::Slice;

/// Most pieces in one call (readv(2), `IOV_MAX`).
const MOST: usize = 1024;

/// Reads at `offset` until `into` is full or the file ends; returns the bytes read (preadv2(2)).
///
/// # Errors
/// As [`crate::file::read_at`]; `EFAULT` for memory that is gone.
pub fn read_at(fd: impl AsFd, into: &[Slice<'_>], offset: u64, wait: Wait) -> io::Result<usize> {
    let fd = fd.as_fd().as_raw_fd();
    let mut flags = if wait == Wait::Never { libc::RWF_NOWAIT } else { 0 };
    let transfer = |slices: &[Slice<'_>], at| loop {
        // SAFETY: the vectors describe mapped memory that outlives the call (`Slice`'s lifetime), and only the kernel writes it.
        let got = unsafe { libc::preadv2(fd, Slice::vectors(slices), count(slices), at, flags) };
        if let Ok(got) = usize::try_from(got) {
            return Ok(got);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            // A file system without RWF_NOWAIT: the caller must assume the worst.
            Some(libc::EOPNOTSUPP | libc::EINVAL) if flags != 0 => {
                if wait == Wait::Never {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                flags = 0;
            }
            _ => return Err(error),
        }
    };
    all(into, offset, transfer)
}

/// Writes all of `from` at `offset`; `durable` as in [`crate::file::write_at`].
///
/// # Errors
/// As [`crate::file::write_at`]; `EFAULT` for memory that is gone.
pub fn write_at(fd: impl AsFd, from: &[Slice<'_>], offset: u64, durable: bool) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    let flags = if durable { libc::RWF_DSYNC } else { 0 };
    let transfer = |slices: &[Slice<'_>], at| loop {
        // SAFETY: as in `read_at`; the kernel only reads.
        let put = unsafe { libc::pwritev2(fd, Slice::vectors(slices), count(slices), at, flags) };
        match usize::try_from(put) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(put) => return Ok(put),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    };
    all(from, offset, transfer).map(drop)
}

/// Bytes of all pieces together.
pub fn len(slices: &[Slice<'_>]) -> usize {
    slices.iter().map(Slice::len).fold(0, usize::saturating_add)
}

/// The pieces of `len` bytes from byte `at`; fewer if there are not so many.
pub fn part<'a>(slices: &[Slice<'a>], mut at: usize, mut len: usize) -> Vec<Slice<'a>> {
    let mut parts = Vec::new();
    for slice in slices {
        if at >= slice.len() {
            at -= slice.len();
            continue;
        }
        let piece = len.min(slice.len() - at);
        parts.extend(slice.part(at, piece).filter(|part| !part.is_empty()));
        (at, len) = (0, len - piece);
        if len == 0 {
            break;
        }
    }
    parts
}

/// Copies out of the pieces, from the front; the bytes copied.
pub fn copy_to(slices: &[Slice<'_>], to: &mut [u8]) -> usize {
    slices.iter().fold(0, |done, slice| done + slice.copy_to(&mut to[done..]))
}

/// Copies into the pieces, from the front; the bytes copied.
pub fn copy_from(slices: &[Slice<'_>], from: &[u8]) -> usize {
    slices.iter().fold(0, |done, slice| done + slice.copy_from(&from[done..]))
}

/// Repeats `transfer` until all is done or nothing more comes; the bytes transferred.
fn all(
    slices: &[Slice<'_>],
    offset: u64,
    mut transfer: impl FnMut(&[Slice<'_>], libc::off_t) -> io::Result<usize>,
) -> io::Result<usize> {
    let total = len(slices);
    let mut done = 0;
    while done < total {
        let at = offset.checked_add(done as u64).and_then(|at| libc::off_t::try_from(at).ok());
        let at = at.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        let moved = if done == 0 { transfer(slices, at)? } else { transfer(&part(slices, done, total - done), at)? };
        if moved == 0 {
            break;
        }
        done += moved;
    }
    Ok(done)
}

fn count(slices: &[Slice<'_>]) -> libc::c_int {
    libc::c_int::try_from(slices.len().min(MOST)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::guest::Mapping;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn memory(len: u64) -> std::os::fd::OwnedFd {
        let fd = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, len).unwrap();
        fd
    }

    #[test]
    fn more_pieces_than_a_call_takes_are_all_read_and_written() {
        let guest = Mapping::new(memory(1 << 20), 0, 1 << 20).unwrap();
        let pieces: Vec<Slice<'_>> = (0..3000).map(|at| guest.slice(at * 300 + at % 7, at % 61 + 1).unwrap()).collect();
        let bytes: Vec<u8> = (0..len(&pieces)).map(|at| (at % 253) as u8).collect();
        assert_eq!(copy_from(&pieces, &bytes), bytes.len());
        let file = memory(0);
        write_at(&file, &pieces, 10, false).unwrap();
        pieces.iter().for_each(Slice::clear);
        assert_eq!(read_at(&file, &pieces, 10, Wait::Allowed).unwrap(), bytes.len());
        let mut back = vec![0; bytes.len()];
        copy_to(&pieces, &mut back);
        assert!(back == bytes);
        // Short at the end of the file.
        assert_eq!(read_at(&file, &pieces, 11, Wait::Allowed).unwrap(), bytes.len() - 1);
    }

    #[test]
    fn a_part_keeps_order_and_ends() {
        let guest = Mapping::new(memory(4096), 0, 4096).unwrap();
        let pieces = [guest.slice(0, 5).unwrap(), guest.slice(100, 0).unwrap(), guest.slice(200, 10).unwrap()];
        let lengths = |at, len| part(&pieces, at, len).iter().map(Slice::len).collect::<Vec<_>>();
        assert_eq!(lengths(0, 15), [5, 10]);
        assert_eq!(lengths(3, 4), [2, 2]);
        assert_eq!(lengths(5, 1), [1]);
        assert_eq!(lengths(14, 9), [1]);
        assert_eq!(lengths(15, 9), [0usize; 0]);
    }

    #[test]
    fn memory_that_is_gone_is_an_error_of_the_call() {
        let fd = memory(1 << 20);
        let guest = Mapping::new(&fd, 0, 1 << 20).unwrap();
        ftruncate(&fd, 0).unwrap();
        let file = memory(8192);
        let error = read_at(&file, &[guest.slice(8192, 4096).unwrap()], 0, Wait::Allowed).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    }
}
