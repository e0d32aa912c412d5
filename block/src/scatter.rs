// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reading a node straight into a guest's memory, and writing it from there.
//!
//! The same walk over mappings as [`BlockNode::read`] and [`BlockNode::write`]: what lives in a host file is moved by the
//! kernel between the file and the guest's pages, and no byte passes through memory of ours. Only what must be computed
//! (compressed or encrypted clusters) takes the way over a buffer.

use std::io;

use rustix::io::Errno;
use sys::file::Wait;
use sys::guest::Slice;
use sys::scatter;

use crate::BlockNode;
use crate::driver::{Ask, Detail, Mapping, Target};
use crate::node::bounded;

/// Computed bytes go over a buffer in pieces of at most this many bytes.
const BUFFER: usize = 2 << 20;

impl BlockNode {
    /// Fills the pieces from `offset`, in order. [`scatter::len`] of them is the length.
    ///
    /// # Errors
    /// As [`BlockNode::read`]; `EFAULT` for a guest's memory that is gone.
    pub fn read_scattered(&self, into: &[Slice<'_>], mut offset: u64, wait: Wait) -> io::Result<()> {
        let len = scatter::len(into);
        self.check_range(offset, len as u64)?;
        let ask = Ask { detail: Detail::Place, wait };
        let mut done = 0;
        while done < len {
            let left = len - done;
            let Mapping { target, len: mapped, hold: _hold } = self.driver().map(offset, left as u64, ask)?;
            let piece = bounded(mapped, left)?;
            let part;
            let into = if piece == len {
                into
            } else {
                part = scatter::part(into, done, piece);
                &part
            };
            match target {
                Target::Fd { fd, offset: at } => {
                    let got = scatter::read_at(fd, into, at, wait)?;
                    if got < piece {
                        scatter::part(into, got, piece - got).iter().for_each(Slice::clear);
                    }
                }
                Target::Data { node, offset: at } | Target::Child { node, offset: at } => {
                    node.read_scattered_or_zero(into, at, wait)?;
                }
                Target::Zero | Target::Absent => into.iter().for_each(Slice::clear),
                Target::Computed if wait == Wait::Never => return Err(io::ErrorKind::WouldBlock.into()),
                Target::Computed => {
                    read_through_buffer(into, |piece, inside| self.driver().read_computed(piece, offset + inside))?;
                }
                Target::Encrypted { node, offset: at, encryption } => {
                    read_through_buffer(into, |piece, inside| encryption.read(node, piece, at + inside, wait))?;
                }
            }
            offset += piece as u64;
            done += piece;
        }
        Ok(())
    }

    fn read_scattered_or_zero(&self, into: &[Slice<'_>], offset: u64, wait: Wait) -> io::Result<()> {
        let len = scatter::len(into);
        let there = usize::try_from(self.len().saturating_sub(offset)).unwrap_or(usize::MAX);
        if len <= there {
            return self.read_scattered(into, offset, wait);
        }
        scatter::part(into, there, len - there).iter().for_each(Slice::clear);
        if there == 0 { Ok(()) } else { self.read_scattered(&scatter::part(into, 0, there), offset, wait) }
    }

    /// Writes the pieces at `offset`, in order; with `durable` they are on stable storage on return.
    ///
    /// # Errors
    /// As [`BlockNode::write`]; `EFAULT` for a guest's memory that is gone.
    pub fn write_scattered(&self, from: &[Slice<'_>], offset: u64, durable: bool) -> io::Result<()> {
        self.check_write(offset, scatter::len(from) as u64)?;
        self.write_scattered_checked(from, offset, durable)
    }

    fn write_scattered_growing(&self, from: &[Slice<'_>], offset: u64, durable: bool) -> io::Result<()> {
        let end = offset.checked_add(scatter::len(from) as u64).filter(|&end| i64::try_from(end).is_ok());
        if self.writable() && self.driver().grows() && end.is_some() {
            return self.write_scattered_checked(from, offset, durable);
        }
        self.write_scattered(from, offset, durable)
    }

    fn write_scattered_checked(&self, from: &[Slice<'_>], offset: u64, durable: bool) -> io::Result<()> {
        let len = scatter::len(from);
        self.reaches(offset + len as u64);
        let written = self.write_scattered_pieces(from, offset, durable);
        self.bitmaps().mark(offset, len as u64);
        written
    }

    fn write_scattered_pieces(&self, from: &[Slice<'_>], mut offset: u64, durable: bool) -> io::Result<()> {
        let len = scatter::len(from);
        let mut flush = false;
        let mut done = 0;
        while done < len {
            let left = len - done;
            let prepared = self.driver().prepare_write(offset, left as u64)?;
            let piece = bounded(prepared.len, left)?;
            let part;
            let from = if piece == len {
                from
            } else {
                part = scatter::part(from, done, piece);
                &part
            };
            // What becomes content only by a commit is durable only by a flush after it.
            let in_place = prepared.pending.is_none();
            match prepared.target {
                Target::Fd { fd, offset: at } => scatter::write_at(fd, from, at, durable && in_place)?,
                Target::Data { node, offset: at } | Target::Child { node, offset: at } => {
                    node.write_scattered_growing(from, at, durable && in_place)?;
                }
                Target::Computed => {
                    self.driver().write_computed(&copied(from), offset)?;
                    flush |= durable;
                }
                Target::Encrypted { node, offset: at, encryption } => {
                    encryption.write(node, &copied(from), at, durable && in_place)?;
                }
                Target::Zero | Target::Absent => return Err(Errno::IO.into()),
            }
            prepared.commit()?;
            flush |= durable && !(in_place && self.driver().is_settled());
            offset += piece as u64;
            done += piece;
        }
        if flush { self.flush() } else { Ok(()) }
    }
}

/// Fills the pieces with what `read` puts into a buffer; it is told how far into them.
fn read_through_buffer(into: &[Slice<'_>], read: impl Fn(&mut [u8], u64) -> io::Result<()>) -> io::Result<()> {
    let len = scatter::len(into);
    let mut buffer = vec![0; len.min(BUFFER)];
    let mut done = 0;
    while done < len {
        let piece = &mut buffer[..(len - done).min(BUFFER)];
        read(piece, done as u64)?;
        done += scatter::copy_from(&scatter::part(into, done, piece.len()), piece);
    }
    Ok(())
}

/// One copy of the pieces: the guest may change its memory meanwhile.
fn copied(from: &[Slice<'_>]) -> Vec<u8> {
    let mut buffer = vec![0; scatter::len(from)];
    scatter::copy_to(from, &mut buffer);
    buffer
}
