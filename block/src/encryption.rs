// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bytes that another node stores encrypted: whole sectors below, any bytes above.
//!
//! A write of less than a sector reads the sector, changes it and writes it back. Meanwhile nobody else may write to that
//! sector, or what he wrote is lost: so writes name their sectors before they begin, and where one of two that meet is such a
//! write, the later waits for the earlier. Writes of whole sectors never wait for each other.

use std::io;
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use zeroize::Zeroizing;

use crate::luks::{Cipher, SECTOR};
use crate::{BlockNode, Wait};

const UNIT: u64 = SECTOR as u64;

/// Most bytes that are encrypted before they are written.
const PIECE: u64 = 256 << 10;

/// A key, and the writes that are under way with it.
#[derive(Debug)]
pub struct Encryption {
    cipher: Cipher,
    /// Where sector 0 is, in bytes: a multiple of a sector.
    start: u64,
    writes: Mutex<Vec<Write>>,
    done: Condvar,
}

/// A write under way.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Write {
    /// In bytes, from a sector's start to a sector's end.
    sectors: Range<u64>,
    /// Whether it writes all that it writes to.
    is_whole: bool,
}

impl Encryption {
    /// Encryption of what stands behind `start`, a multiple of 512: the sector there has the number 0.
    pub fn new(cipher: Cipher, start: u64) -> Encryption {
        Encryption { cipher, start, writes: Mutex::default(), done: Condvar::new() }
    }

    /// Fills `buf` with what is stored at byte `offset` of `node`, which is not before the start; past its end are zeroes, which
    /// decrypt to noise.
    ///
    /// # Errors
    /// As [`BlockNode::read`].
    pub fn read(&self, node: &BlockNode, mut buf: &mut [u8], mut offset: u64, wait: Wait) -> io::Result<()> {
        while !buf.is_empty() {
            let inside = within(offset);
            let whole = buf.len() - buf.len() % SECTOR;
            let len = if inside == 0 && whole > 0 { whole } else { buf.len().min(SECTOR - inside) };
            let (piece, rest) = buf.split_at_mut(len);
            if inside == 0 && whole > 0 {
                node.read_or_zero(piece, offset, wait)?;
                self.cipher.decrypt(self.number(offset), piece);
            } else {
                let sector = self.read_sector(node, offset - inside as u64, wait)?;
                piece.copy_from_slice(&sector[inside..inside + len]);
            }
            offset += len as u64;
            buf = rest;
        }
        Ok(())
    }

    /// Stores `buf` at byte `offset` of `node`, which is not before the start; with `durable` on stable storage.
    ///
    /// # Errors
    /// As [`BlockNode::write_growing`].
    pub fn write(&self, node: &BlockNode, mut buf: &[u8], mut offset: u64, durable: bool) -> io::Result<()> {
        let end = offset + buf.len() as u64;
        let sectors = offset / UNIT * UNIT..end.next_multiple_of(UNIT);
        let is_whole = sectors == (offset..end);
        let _write = self.begin(Write { sectors, is_whole });
        while !buf.is_empty() {
            let inside = within(offset);
            let len = buf.len().min(usize::try_from(PIECE).unwrap_or(SECTOR) - inside);
            let (piece, rest) = buf.split_at(len);
            self.write_piece(node, piece, offset, durable)?;
            offset += len as u64;
            buf = rest;
        }
        Ok(())
    }

    fn write_piece(&self, node: &BlockNode, piece: &[u8], offset: u64, durable: bool) -> io::Result<()> {
        let inside = within(offset);
        let start = offset - inside as u64;
        let mut sectors = Zeroizing::new(vec![0; (inside + piece.len()).next_multiple_of(SECTOR)]);
        let last = sectors.len() - SECTOR;
        if inside > 0 {
            sectors[..SECTOR].copy_from_slice(&*self.read_sector(node, start, Wait::Allowed)?);
        }
        if inside + piece.len() < sectors.len() && (last > 0 || inside == 0) {
            let tail = self.read_sector(node, start + last as u64, Wait::Allowed)?;
            sectors[last..].copy_from_slice(&*tail);
        }
        sectors[inside..inside + piece.len()].copy_from_slice(piece);
        self.cipher.encrypt(self.number(start), &mut sectors);
        node.write_growing(&sectors, start, durable)
    }

    fn read_sector(&self, node: &BlockNode, offset: u64, wait: Wait) -> io::Result<Zeroizing<[u8; SECTOR]>> {
        let mut sector = Zeroizing::new([0; SECTOR]);
        node.read_or_zero(&mut *sector, offset, wait)?;
        self.cipher.decrypt(self.number(offset), &mut *sector);
        Ok(sector)
    }

    fn number(&self, offset: u64) -> u64 {
        offset.wrapping_sub(self.start) / UNIT
    }

    /// Waits until no other write is in the way, and is in the way of others until the value goes.
    fn begin(&self, write: Write) -> UnderWay<'_> {
        let meets = |other: &Write| {
            (!write.is_whole || !other.is_whole)
                && write.sectors.start < other.sectors.end
                && other.sectors.start < write.sectors.end
        };
        let mut writes = self.writes();
        while writes.iter().any(meets) {
            writes = self.done.wait(writes).unwrap_or_else(PoisonError::into_inner);
        }
        writes.push(write.clone());
        UnderWay { encryption: self, write }
    }

    fn writes(&self) -> MutexGuard<'_, Vec<Write>> {
        self.writes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct UnderWay<'a> {
    encryption: &'a Encryption,
    write: Write,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let mut writes = self.encryption.writes();
        if let Some(index) = writes.iter().position(|other| *other == self.write) {
            writes.swap_remove(index);
        }
        drop(writes);
        self.encryption.done.notify_all();
    }
}

/// How far into its sector an offset is.
fn within(offset: u64) -> usize {
    usize::try_from(offset % UNIT).unwrap_or(0)
}
