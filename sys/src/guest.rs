// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory that another process shares with this one and changes whenever it likes: a guest's.
//!
//! It is never referred to as `&[u8]` or `&mut [u8]`: such a reference promises what only this process could keep. It is
//! reached by volatile copies, by atomic loads and stores, and by the kernel, which is given its address
//! ([`crate::scatter`]). What was copied out of it is ours, and only that may be checked and then used.
//!
//! The other process may also shorten the file behind the memory. Touching what is gone would end this process by SIGBUS;
//! [`crate::sigbus`] puts empty memory there instead, and [`Mapping::is_broken`] tells.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU16, Ordering};

use rustix::fs::FileType;
use rustix::io::Errno;

use crate::sigbus::Guard;

/// `f_type` of huge pages (statfs(2)).
const HUGETLBFS: i64 = 0x9584_58f6;

/// A part of a memory file, mapped shared, to be read and written, never to be executed.
#[derive(Debug)]
pub struct Mapping {
    /// First mapped byte, and the bytes that are mapped: whole pages around what was asked for.
    base: *mut u8,
    mapped: usize,
    /// Where what was asked for begins, and its length.
    start: usize,
    len: usize,
    guard: Guard,
}

// SAFETY: the memory belongs to no thread; every access to it is a volatile copy, an atomic or a system call.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of a memory file (memfd, tmpfs, hugetlbfs) from `offset`. Bytes past its end can be mapped; touching
    /// them breaks the mapping.
    ///
    /// # Errors
    /// `EINVAL` for an empty or overflowing range or what is no regular file; else those of mmap(2), `EACCES` for a descriptor
    /// that is not open for reading and writing.
    pub fn new(fd: impl AsFd, offset: u64, len: u64) -> io::Result<Mapping> {
        let fd = fd.as_fd();
        if FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode) != FileType::RegularFile {
            return Err(Errno::INVAL.into());
        }
        let page = page_size(fd)?;
        let begin = offset - offset % page;
        let end = offset.checked_add(len).and_then(|end| end.checked_next_multiple_of(page));
        let mapped = end.and_then(|end| usize::try_from(end - begin).ok());
        let (Some(mapped), Ok(at), true) = (mapped, libc::off_t::try_from(begin), len > 0) else {
            return Err(Errno::INVAL.into());
        };
        if isize::try_from(mapped).is_err() {
            return Err(Errno::INVAL.into());
        }
        let (rights, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_NORESERVE);
        // SAFETY: without MAP_FIXED the kernel chooses addresses that nothing else in this process uses.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), mapped, rights, kind, fd.as_raw_fd(), at) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // `start` is less than a page and `len` no more than `mapped`, which is a usize.
        let within = |bytes: u64| usize::try_from(bytes).map_err(|_| io::Error::from(Errno::INVAL));
        let (start, len) = (within(offset - begin)?, within(len)?);
        // SAFETY: the range was just mapped, and `Drop` gives the guard back before it unmaps.
        let guard = unsafe { Guard::new(base.cast(), mapped) };
        Ok(Mapping { base: base.cast(), mapped, start, len, guard })
    }

    /// `len` bytes from `at`; `None` if they are not all in the mapping.
    pub fn slice(&self, at: u64, len: u64) -> Option<Slice<'_>> {
        let (at, len) = (usize::try_from(at).ok()?, usize::try_from(len).ok()?);
        if at.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: start + at + len lies within the mapped range.
        let base = unsafe { self.base.add(self.start + at) };
        Some(Slice { vec: libc::iovec { iov_base: base.cast(), iov_len: len }, mapping: PhantomData })
    }

    /// Whether memory was missing when it was touched: what has been read since may be zeroes, what was written may be lost.
    pub fn is_broken(&self) -> bool {
        self.guard.has_fired()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.guard.release();
        // SAFETY: the range was mapped by `new`, and no `Slice` outlives the borrow of this value.
        unsafe { libc::munmap(self.base.cast(), self.mapped) };
    }
}

/// What offsets and lengths of mappings of this file are multiples of.
fn page_size(fd: impl AsFd) -> io::Result<u64> {
    let fs = rustix::fs::fstatfs(fd)?;
    let huge = if fs.f_type == HUGETLBFS { u64::try_from(fs.f_bsize).unwrap_or(0) } else { 0 };
    // SAFETY: sysconf takes no pointer; the C library has known the answer since the process began, and opens nothing for it.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    Ok(huge.max(u64::try_from(page).unwrap_or(4096)))
}

/// Some bytes of a [`Mapping`]. As an array it is what the kernel calls an I/O vector.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Slice<'a> {
    vec: libc::iovec,
    mapping: PhantomData<&'a Mapping>,
}

// SAFETY: it is an address and a length; for access see `Mapping`.
unsafe impl Send for Slice<'_> {}
// SAFETY: as above.
unsafe impl Sync for Slice<'_> {}

impl std::fmt::Debug for Slice<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slice").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl<'a> Slice<'a> {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.vec.iov_len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `len` bytes from `at`; `None` if they are not all here.
    pub fn part(&self, at: usize, len: usize) -> Option<Slice<'a>> {
        if at.checked_add(len)? > self.len() {
            return None;
        }
        // SAFETY: at + len lies within this slice.
        let base = unsafe { self.base().add(at) };
        Some(Slice { vec: libc::iovec { iov_base: base.cast(), iov_len: len }, mapping: PhantomData })
    }

    /// Copies from the front into `to`, as much as both hold; the bytes copied.
    pub fn copy_to(&self, to: &mut [u8]) -> usize {
        let len = self.len().min(to.len());
        let mut at = 0;
        while at < len {
            // SAFETY: at < len, within the slice.
            let from = unsafe { self.base().add(at) };
            if from.cast::<u64>().is_aligned() && len - at >= 8 {
                // SAFETY: eight aligned bytes within the slice.
                let word = unsafe { from.cast::<u64>().read_volatile() };
                to[at..at + 8].copy_from_slice(&word.to_ne_bytes());
                at += 8;
            } else if from.cast::<u32>().is_aligned() && len - at >= 4 {
                // SAFETY: four aligned bytes within the slice.
                let word = unsafe { from.cast::<u32>().read_volatile() };
                to[at..at + 4].copy_from_slice(&word.to_ne_bytes());
                at += 4;
            } else {
                // SAFETY: a byte within the slice.
                to[at] = unsafe { from.read_volatile() };
                at += 1;
            }
        }
        len
    }

    /// Copies `from` to the front, as much as both hold; the bytes copied.
    pub fn copy_from(&self, from: &[u8]) -> usize {
        let len = self.len().min(from.len());
        let mut at = 0;
        while at < len {
            // SAFETY: at < len, within the slice.
            let to = unsafe { self.base().add(at) };
            let rest = &from[at..len];
            if let (Some(word), true) = (rest.first_chunk(), to.cast::<u64>().is_aligned()) {
                // SAFETY: eight aligned bytes within the slice.
                unsafe { to.cast::<u64>().write_volatile(u64::from_ne_bytes(*word)) };
                at += 8;
            } else if let (Some(word), true) = (rest.first_chunk(), to.cast::<u32>().is_aligned()) {
                // SAFETY: four aligned bytes within the slice.
                unsafe { to.cast::<u32>().write_volatile(u32::from_ne_bytes(*word)) };
                at += 4;
            } else {
                // SAFETY: a byte within the slice.
                unsafe { to.write_volatile(from[at]) };
                at += 1;
            }
        }
        len
    }

    /// Makes every byte zero.
    pub fn clear(&self) {
        let zeroes = [0; 4096];
        let mut at = 0;
        while let Some(rest) = self.part(at, self.len() - at).filter(|rest| !rest.is_empty()) {
            at += rest.copy_from(&zeroes);
        }
    }

    /// The little-endian number at byte `at`; `None` if it is not all here or not aligned.
    pub fn load_u16(&self, at: usize, order: Ordering) -> Option<u16> {
        self.atomic_u16(at).map(|number| u16::from_le(number.load(order)))
    }

    /// Puts a little-endian number at byte `at`; `None` if it would not be all here or not aligned.
    pub fn store_u16(&self, at: usize, number: u16, order: Ordering) -> Option<()> {
        self.atomic_u16(at).map(|place| place.store(number.to_le(), order))
    }

    fn atomic_u16(&self, at: usize) -> Option<&'a AtomicU16> {
        let place = self.part(at, 2)?.base().cast::<u16>();
        // SAFETY: two mapped bytes, aligned; whoever else reaches them in this process does so through this function too.
        place.is_aligned().then(|| unsafe { AtomicU16::from_ptr(place) })
    }

    fn base(&self) -> *mut u8 {
        self.vec.iov_base.cast()
    }

    /// The array as the kernel wants it.
    pub(crate) fn vectors(slices: &[Slice<'_>]) -> *const libc::iovec {
        slices.as_ptr().cast()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn memory(len: u64) -> std::os::fd::OwnedFd {
        let fd = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, len).unwrap();
        fd
    }

    #[test]
    fn bytes_go_in_and_come_out_at_any_alignment() {
        let mapping = Mapping::new(memory(8192), 100, 8000).unwrap();
        let bytes: Vec<u8> = (0..251).collect();
        for at in [0, 1, 7, 4000, 7749] {
            let slice = mapping.slice(at, 251).unwrap();
            assert_eq!(slice.copy_from(&bytes), 251);
            let mut back = [0; 251];
            assert_eq!(slice.copy_to(&mut back), 251);
            assert_eq!(&back[..], &bytes[..]);
        }
        assert!(mapping.slice(7750, 251).is_none());
        assert!(mapping.slice(u64::MAX, 2).is_none());
    }

    #[test]
    fn what_was_cut_off_the_file_reads_as_zeroes_and_is_told() {
        let fd = memory(1 << 20);
        let mapping = Mapping::new(&fd, 0, 1 << 20).unwrap();
        let slice = mapping.slice(1 << 19, 8).unwrap();
        slice.copy_from(b"guestbyt");
        assert!(!mapping.is_broken());
        ftruncate(&fd, 4096).unwrap();
        let mut bytes = [1; 8];
        slice.copy_to(&mut bytes);
        assert_eq!(bytes, [0; 8]);
        assert!(mapping.is_broken());
        slice.copy_from(b"lost....");
        slice.clear();
    }

    #[test]
    fn what_is_no_memory_file_is_refused() {
        let (pipe, _other) = rustix::pipe::pipe().unwrap();
        assert_eq!(Mapping::new(pipe, 0, 4096).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(Mapping::new(memory(1), 0, 0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert!(Mapping::new(memory(1), u64::MAX - 1, 4096).is_err());
        assert!(Mapping::new(memory(1), 0, u64::MAX).is_err());
    }

    #[test]
    fn numbers_must_be_aligned_and_inside() {
        let mapping = Mapping::new(memory(4096), 0, 4096).unwrap();
        let slice = mapping.slice(0, 4096).unwrap();
        assert_eq!(slice.store_u16(2, 0x1234, Ordering::Release), Some(()));
        assert_eq!(slice.load_u16(2, Ordering::Acquire), Some(0x1234));
        assert_eq!(slice.load_u16(3, Ordering::Acquire), None);
        assert_eq!(slice.load_u16(4095, Ordering::Acquire), None);
        assert_eq!(slice.load_u16(4096, Ordering::Acquire), None);
    }
}
