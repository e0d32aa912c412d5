// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A file opened with `O_DIRECT`: the device sees whole blocks in aligned memory, the users of the node see bytes.
//!
//! What is aligned already goes straight through; the rest goes over an aligned buffer. A write that covers a block in part
//! reads the block, changes it and writes it back, with every other write of this file kept out meanwhile: without that, two
//! writes to different bytes of one block would undo each other. Writes of whole blocks do not exclude each other.
//!
//! The last block may reach past the end of a regular file. It is written whole and the file cut to its length again, before
//! anybody else writes; a crash in between leaves a file that is longer by zeroes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustix::fs::OFlags;
use rustix::io::Errno;
use sys::file;

/// Blocks that are tried, smallest first, in bytes. Nothing asks for more than a page.
const BLOCKS: [usize; 4] = [512, 1024, 2048, 4096];
/// What memory and offsets are aligned to if nothing can be read to find out: no device here wants more.
const LARGEST: usize = 4096;
/// Most bytes of one buffer: a multiple of every block.
const PIECE: usize = 1 << 20;

/// How a file's blocks are reached.
#[derive(Debug)]
pub(crate) struct Direct {
    /// A power of two: what offsets, lengths and memory are multiples of.
    block: usize,
    /// Whether it is a regular file, which has a length of its own.
    regular: bool,
    /// Shared by writes of whole blocks, exclusive for those of parts.
    writing: RwLock<()>,
}

impl Direct {
    /// How `fd` must be asked; `None` if it goes through the page cache.
    ///
    /// # Errors
    /// The file cannot be read at all.
    pub fn of(fd: impl AsFd, regular: bool) -> io::Result<Option<Direct>> {
        let fd = fd.as_fd();
        if !rustix::fs::fcntl_getfl(fd)?.contains(OFlags::DIRECT) {
            return Ok(None);
        }
        Ok(Some(Direct::with_block(smallest_block(fd)?, regular)))
    }

    fn with_block(block: usize, regular: bool) -> Direct {
        Direct { block, regular, writing: RwLock::default() }
    }

    /// Bytes of a block.
    pub fn block(&self) -> usize {
        self.block
    }

    /// Reads at `offset` until `buf` is full or the file ends; returns the bytes read.
    ///
    /// # Errors
    /// The errno of the read.
    pub fn read(&self, fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        if self.is_aligned(buf, offset) {
            return self.read_blocks(fd, buf, offset);
        }
        let mut bounce = Aligned::new(self.whole(offset, buf.len()).len().min(PIECE), self.block);
        let mut done = 0;
        while done < buf.len() {
            let whole = self.whole(offset + done as u64, buf.len() - done);
            let (skip, piece) = (whole.lead, whole.len().min(bounce.len()));
            let got = self.read_blocks(fd, &mut bounce.bytes()[..piece], whole.start)?;
            let wanted = (buf.len() - done).min(piece - skip);
            let there = got.saturating_sub(skip).min(wanted);
            buf[done..done + there].copy_from_slice(&bounce.bytes()[skip..skip + there]);
            done += there;
            if there < wanted {
                break;
            }
        }
        Ok(done)
    }

    /// Writes all of `buf` at `offset`.
    ///
    /// # Errors
    /// The errno of a write, or of the read of a block that is covered in part. An unknown part of `buf` may have been written.
    pub fn write(&self, fd: BorrowedFd<'_>, buf: &[u8], offset: u64) -> io::Result<()> {
        let whole = self.whole(offset, buf.len());
        if whole.lead != 0 || whole.len() != buf.len() {
            return self.write_parts(fd, buf, offset);
        }
        let _others = self.share();
        if self.is_aligned(buf, offset) {
            return file::write_at(fd, buf, offset, false);
        }
        let mut bounce = Aligned::new(buf.len().min(PIECE), self.block);
        for (index, piece) in buf.chunks(PIECE).enumerate() {
            let room = &mut bounce.bytes()[..piece.len()];
            room.copy_from_slice(piece);
            file::write_at(fd, room, offset + (index * PIECE) as u64, false)?;
        }
        Ok(())
    }

    /// Reads, changes and writes blocks that are covered in part, alone.
    fn write_parts(&self, fd: BorrowedFd<'_>, buf: &[u8], offset: u64) -> io::Result<()> {
        let _alone = self.alone();
        let mut bounce = Aligned::new(self.whole(offset, buf.len()).len().min(PIECE), self.block);
        let mut done = 0;
        while done < buf.len() {
            let whole = self.whole(offset + done as u64, buf.len() - done);
            let (lead, len) = (whole.lead, whole.len().min(bounce.len()));
            let piece = (buf.len() - done).min(len - lead);
            let room = &mut bounce.bytes()[..len];
            if lead > 0 {
                self.fill_block(fd, &mut room[..self.block], whole.start)?;
            }
            // The last block, unless it is the first and there already.
            let last = len - self.block;
            if lead + piece < len && (last > 0 || lead == 0) {
                self.fill_block(fd, &mut room[last..], whole.start + last as u64)?;
            }
            room[lead..lead + piece].copy_from_slice(&buf[done..done + piece]);
            let before = self.end(fd)?;
            file::write_at(fd, room, whole.start, false)?;
            self.cut(fd, before.max(offset + (done + piece) as u64), whole.start + len as u64)?;
            done += piece;
        }
        Ok(())
    }

    /// One block as the file has it, zeroes past its end.
    fn fill_block(&self, fd: BorrowedFd<'_>, block: &mut [u8], offset: u64) -> io::Result<()> {
        let got = self.read_blocks(fd, block, offset)?;
        block[got..].fill(0);
        Ok(())
    }

    /// Takes what a block wrote past `end` off the file again.
    fn cut(&self, fd: BorrowedFd<'_>, end: u64, written: u64) -> io::Result<()> {
        if self.regular && written > end {
            rustix::fs::ftruncate(fd, end)?;
        }
        Ok(())
    }

    /// The end of a regular file; of what cannot grow, as far as there is.
    fn end(&self, fd: BorrowedFd<'_>) -> io::Result<u64> {
        if !self.regular {
            return Ok(u64::MAX);
        }
        Ok(u64::try_from(rustix::fs::fstat(fd)?.st_size).unwrap_or(0))
    }

    /// Everything aligned. A read that stops within a block has met the end of the file.
    fn read_blocks(&self, fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buf.len() && done.is_multiple_of(self.block) {
            match rustix::io::pread(fd, &mut buf[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(got) => done += got,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(done)
    }

    fn is_aligned(&self, buf: &[u8], offset: u64) -> bool {
        let whole = self.whole(offset, buf.len());
        whole.lead == 0 && whole.len() == buf.len() && buf.as_ptr().addr().is_multiple_of(self.block)
    }

    /// The blocks that a range touches.
    fn whole(&self, offset: u64, len: usize) -> Whole {
        let block = self.block as u64;
        let start = offset / block * block;
        // Below a block, so it fits.
        let lead = usize::try_from(offset - start).unwrap_or(0);
        Whole { start, lead, len: (lead + len).next_multiple_of(self.block) }
    }

    /// For what changes whole blocks, or tells the file system to.
    pub fn share(&self) -> RwLockReadGuard<'_, ()> {
        self.writing.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// For what changes parts of blocks, or the file's length.
    pub fn alone(&self) -> RwLockWriteGuard<'_, ()> {
        self.writing.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whole blocks around a range.
#[derive(Clone, Copy)]
struct Whole {
    start: u64,
    /// Bytes before the range.
    lead: usize,
    len: usize,
}

impl Whole {
    fn len(self) -> usize {
        self.len
    }
}

/// The smallest block that the file can be read by.
fn smallest_block(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut memory = Aligned::new(LARGEST, LARGEST);
    for block in BLOCKS {
        match rustix::io::pread(fd, &mut memory.bytes()[..block], 0) {
            // Nothing to read: nothing is known.
            Ok(0) => return Ok(LARGEST),
            Ok(_) => return Ok(block),
            Err(Errno::INVAL) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Err(Errno::INVAL.into())
}

/// Memory that begins at a multiple of a power of two.
struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize, to: usize) -> Aligned {
        let memory = vec![0; len + to - 1];
        let start = memory.as_ptr().addr().next_multiple_of(to) - memory.as_ptr().addr();
        Aligned { memory, start, len }
    }

    fn len(&self) -> usize {
        self.len
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
    use super::*;
    use std::io::Write;
    use sys::file::Wait;

    fn file(content: &[u8]) -> std::fs::File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    fn content(file: &std::fs::File) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file::read_at(file, &mut bytes, 0, Wait::Allowed).unwrap();
        bytes
    }

    #[test]
    fn any_range_is_read_and_written_as_bytes() {
        let mut model: Vec<u8> = (0..3 * PIECE + 700).map(|at| (at % 251) as u8).collect();
        let file = file(&model);
        let direct = Direct::with_block(4096, true);
        let ranges = [
            (0, 1),
            (4095, 2),
            (100, 50),
            (4096, 4096),
            (8192, 8192),
            (5000, 9000),
            (1, PIECE),
            (4097, 2 * PIECE + 4000),
            (4096, 2 * PIECE),
            (3 * PIECE + 600, 100),
        ];
        for (round, (offset, len)) in ranges.into_iter().enumerate() {
            let bytes: Vec<u8> = (0..len).map(|at| (at % 241 + round) as u8).collect();
            direct.write(file.as_fd(), &bytes, offset as u64).unwrap();
            model[offset..offset + len].copy_from_slice(&bytes);
            let mut back = vec![0; len + 10];
            let got = direct.read(file.as_fd(), &mut back, offset as u64).unwrap();
            assert_eq!(got, (len + 10).min(model.len() - offset));
            assert!(back[..got] == model[offset..offset + got], "{offset}+{len}");
            assert!(content(&file) == model, "{offset}+{len}");
        }
    }

    #[test]
    fn a_write_past_the_end_makes_the_file_as_long_as_it_says() {
        let file = file(&[7; 5000]);
        let direct = Direct::with_block(4096, true);
        direct.write(file.as_fd(), &[8; 10], 4995).unwrap();
        assert_eq!(content(&file), [&[7; 4995][..], &[8; 10]].concat());
        direct.write(file.as_fd(), &[9; 1], 12_000).unwrap();
        assert_eq!(content(&file).len(), 12_001);
        assert_eq!(content(&file)[5005..12_000], [0; 12_000 - 5005]);
    }

    #[test]
    fn parts_of_one_block_do_not_undo_each_other() {
        let file = file(&[0; 8192]);
        let direct = Direct::with_block(4096, true);
        std::thread::scope(|scope| {
            for part in 0..4u64 {
                let (file, direct) = (&file, &direct);
                scope.spawn(move || {
                    for round in 1..=200 {
                        direct.write(file.as_fd(), &[round; 700], 3000 + part * 700).unwrap();
                        let mut back = [0; 700];
                        direct.read(file.as_fd(), &mut back, 3000 + part * 700).unwrap();
                        assert_eq!(back, [round; 700]);
                    }
                });
            }
        });
    }

    #[test]
    fn a_file_through_the_page_cache_needs_none_of_this() {
        assert!(Direct::of(file(b"x"), true).unwrap().is_none());
    }
}
