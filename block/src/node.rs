// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An open image with a name: the one place where mapped bytes are read and written.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::io::Errno;
use sys::file::{self, Wait};

use crate::bitmap::{self, Bitmaps};
use crate::driver::{Ask, Detail, Driver, Info, Mapping, Target, ZeroFlags};
use crate::stats::Stats;
use crate::vvfat::Vvfat;
use crate::{Error, Preallocation, Result, Snapshots};

/// Zeroes are written as data in pieces of this many bytes.
const ZERO_PIECE: usize = 64 << 10;

/// An open image. Requests come from any thread, in any order; offsets and lengths are bytes.
pub struct BlockNode {
    name: String,
    driver_name: &'static str,
    filename: String,
    writable: AtomicBool,
    unmap: AtomicBool,
    flushes: bool,
    stats: Stats,
    /// The end of the write that went furthest.
    furthest: AtomicU64,
    bitmaps: Arc<Bitmaps>,
    driver: Box<dyn Driver>,
}

impl std::fmt::Debug for BlockNode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockNode").field("name", &self.name).field("driver", &self.driver_name).finish_non_exhaustive()
    }
}

/// What requests may do to a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeAccess {
    /// They may change it.
    pub writable: bool,
    /// They may give room back (QAPI's `discard: unmap`). Without it a discard does nothing and zeroes keep their room.
    pub unmap: bool,
}

/// A run of bytes of one kind, as block status tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, at least 1.
    pub len: u64,
    /// What is there.
    pub kind: ExtentKind,
    /// Which layer has it stored: 1 is this one, 2 its backing file; 0 is none. Past the end of a short layer that one has it.
    pub depth: u32,
}

/// What a run of bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Stored data.
    Data,
    /// Reads as zeroes and takes no room.
    Zero,
}

impl BlockNode {
    /// A node over an opened driver. `filename` is what queries show: of a descriptor, or of the `file` child.
    pub fn new(
        name: impl Into<String>,
        driver_name: &'static str,
        filename: impl Into<String>,
        access: NodeAccess,
        driver: Box<dyn Driver>,
    ) -> BlockNode {
        BlockNode {
            name: name.into(),
            driver_name,
            filename: filename.into(),
            writable: AtomicBool::new(access.writable),
            unmap: AtomicBool::new(access.unmap),
            flushes: true,
            stats: Stats::default(),
            furthest: AtomicU64::new(0),
            bitmaps: driver.bitmaps().cloned().unwrap_or_default(),
            driver,
        }
    }

    /// The same, but flushes do nothing.
    #[must_use]
    pub(crate) fn unflushed(self) -> BlockNode {
        BlockNode { flushes: false, ..self }
    }

    /// The node-name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The driver's name.
    pub fn driver_name(&self) -> &'static str {
        self.driver_name
    }

    /// The file name that queries show; text only.
    pub fn filename(&self) -> &str {
        &self.filename
    }

    /// Whether requests may change the image.
    pub fn writable(&self) -> bool {
        self.writable.load(Ordering::Relaxed)
    }

    /// Whether requests may give room back from now on.
    pub fn set_unmap(&self, unmap: bool) {
        self.unmap.store(unmap, Ordering::Relaxed);
    }

    pub(crate) fn set_writable(&self, writable: bool) {
        self.writable.store(writable, Ordering::Relaxed);
    }

    /// The directory that it shows as a disk, for the driver `vvfat`.
    pub fn directory(&self) -> Option<&Vvfat> {
        self.driver.directory()
    }

    pub(crate) fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    /// What its exports' clients asked of it. What nodes ask of the nodes below them is not counted.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// The end of the write that went furthest, in bytes; writes of nodes above count.
    pub fn furthest_write(&self) -> u64 {
        self.furthest.load(Ordering::Relaxed)
    }

    /// Its dirty bitmaps.
    pub fn bitmaps(&self) -> &Bitmaps {
        &self.bitmaps
    }

    /// Whether one more bitmap can be stored in the image.
    ///
    /// # Errors
    /// It cannot: QEMU's words.
    pub fn check_new_bitmap(&self, name: &str, granularity_bits: u32) -> Result<()> {
        if self.driver.bitmaps().is_none() {
            return Err(Error::unsupported(format!(
                "Can't store persistent bitmaps to {}: Operation not supported",
                self.name
            )));
        }
        self.driver.check_new_bitmap(name, granularity_bits)
    }

    /// Takes a bitmap out of the image, if it stands there.
    ///
    /// # Errors
    /// The image is read-only; `Io`.
    pub fn remove_stored_bitmap(&self, name: &str) -> Result<()> {
        self.driver.remove_stored_bitmap(name)
    }

    /// Size in bytes.
    #[allow(clippy::len_without_is_empty, reason = "an empty disk is not a special case")]
    pub fn len(&self) -> u64 {
        self.driver.len()
    }

    /// Whether [`BlockNode::write_growing`] can make it longer.
    pub fn grows(&self) -> bool {
        self.driver.grows()
    }

    /// Facts about the image.
    pub fn info(&self) -> Info {
        self.driver.info()
    }

    /// Smallest request in bytes without read-modify-write.
    pub fn block_size(&self) -> u32 {
        self.driver.block_size()
    }

    /// Whether reads and writes wait for the device: then they are better done where sleeping is nobody's loss.
    pub fn bypasses_cache(&self) -> bool {
        self.driver.bypasses_cache()
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// `EINVAL` past the end; `WouldBlock` only with [`Wait::Never`], and then `buf` holds nothing useful; else the errno of
    /// the layer that failed.
    pub fn read(&self, mut buf: &mut [u8], mut offset: u64, wait: Wait) -> io::Result<()> {
        self.check_range(offset, buf.len() as u64)?;
        let ask = Ask { detail: Detail::Place, wait };
        while !buf.is_empty() {
            let Mapping { target, len, hold: _hold } = self.driver.map(offset, buf.len() as u64, ask)?;
            let (piece, rest) = buf.split_at_mut(bounded(len, buf.len())?);
            match target {
                Target::Fd { fd, offset: at } => {
                    let got = file::read_at(fd, piece, at, wait)?;
                    piece[got..].fill(0);
                }
                Target::Data { node, offset: at } | Target::Child { node, offset: at } => {
                    node.read_or_zero(piece, at, wait)?;
                }
                Target::Encrypted { node, offset: at, encryption } => encryption.read(node, piece, at, wait)?,
                Target::Zero | Target::Absent => piece.fill(0),
                Target::Computed if wait == Wait::Never => return Err(io::ErrorKind::WouldBlock.into()),
                Target::Computed => self.driver.read_computed(piece, offset)?,
            }
            offset += piece.len() as u64;
            buf = rest;
        }
        Ok(())
    }

    /// Like [`BlockNode::read`], with zeroes past the end: how a layer reads a shorter layer below it.
    ///
    /// # Errors
    /// As [`BlockNode::read`], but never for the end of the node.
    pub fn read_or_zero(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<()> {
        let there = usize::try_from(self.len().saturating_sub(offset)).unwrap_or(usize::MAX).min(buf.len());
        let (inside, beyond) = buf.split_at_mut(there);
        beyond.fill(0);
        if inside.is_empty() { Ok(()) } else { self.read(inside, offset, wait) }
    }

    /// Writes `buf` at `offset`; with `durable` it is on stable storage on return.
    ///
    /// # Errors
    /// `EPERM` on a read-only node, `ENOSPC` past the end, else the errno of the layer that failed.
    pub fn write(&self, buf: &[u8], offset: u64, durable: bool) -> io::Result<()> {
        self.check_write(offset, buf.len() as u64)?;
        self.write_checked(buf, offset, durable)
    }

    /// Like [`BlockNode::write`], for the format that keeps its image in this node: what passes the end makes the node longer,
    /// where it can be longer.
    ///
    /// # Errors
    /// As [`BlockNode::write`]; `ENOSPC` past the end only if the node cannot grow.
    pub fn write_growing(&self, buf: &[u8], offset: u64, durable: bool) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|&end| i64::try_from(end).is_ok());
        if self.writable() && self.driver.grows() && end.is_some() {
            return self.write_checked(buf, offset, durable);
        }
        self.write(buf, offset, durable)
    }

    fn write_checked(&self, buf: &[u8], offset: u64, durable: bool) -> io::Result<()> {
        self.reaches(offset + buf.len() as u64);
        let written = self.write_pieces(buf, offset, durable);
        // Also of a failure: perhaps a part was written.
        self.bitmaps.mark(offset, buf.len() as u64);
        written
    }

    fn write_pieces(&self, mut buf: &[u8], mut offset: u64, durable: bool) -> io::Result<()> {
        let mut flush = false;
        while !buf.is_empty() {
            let prepared = self.driver.prepare_write(offset, buf.len() as u64)?;
            let (piece, rest) = buf.split_at(bounded(prepared.len, buf.len())?);
            // What becomes content only by a commit is durable only by a flush after it.
            let in_place = prepared.pending.is_none();
            match prepared.target {
                Target::Fd { fd, offset: at } => file::write_at(fd, piece, at, durable && in_place)?,
                Target::Data { node, offset: at } | Target::Child { node, offset: at } => {
                    node.write_growing(piece, at, durable && in_place)?;
                }
                Target::Encrypted { node, offset: at, encryption } => {
                    encryption.write(node, piece, at, durable && in_place)?;
                }
                Target::Computed => {
                    self.driver.write_computed(piece, offset)?;
                    flush |= durable;
                }
                Target::Zero | Target::Absent => return Err(Errno::IO.into()),
            }
            prepared.commit()?;
            flush |= durable && !(in_place && self.driver.is_settled());
            offset += piece.len() as u64;
            buf = rest;
        }
        if flush { self.flush() } else { Ok(()) }
    }

    /// Notes how far a write reaches.
    pub(crate) fn reaches(&self, end: u64) {
        if end > self.furthest.load(Ordering::Relaxed) {
            self.furthest.fetch_max(end, Ordering::Relaxed);
        }
    }

    /// Stores one cluster compressed; see [`Driver::write_compressed`].
    ///
    /// # Errors
    /// As [`BlockNode::write`]; `EOPNOTSUPP` for formats without compression.
    pub fn write_compressed(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.check_write(offset, buf.len() as u64)?;
        let written = self.driver.write_compressed(buf, offset);
        self.bitmaps.mark(offset, buf.len() as u64);
        written
    }

    /// Makes a range read as zeroes; with `durable` that is on stable storage on return.
    ///
    /// # Errors
    /// As [`BlockNode::write`]; `EOPNOTSUPP` only with `flags.fast_only`.
    pub fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags, durable: bool) -> io::Result<()> {
        self.check_write(offset, len)?;
        let flags = ZeroFlags { may_unmap: flags.may_unmap && self.unmap.load(Ordering::Relaxed), ..flags };
        self.reaches(offset + len);
        let written = self.write_zero_units(offset, len, flags);
        self.bitmaps.mark(offset, len);
        written?;
        if durable { self.flush() } else { Ok(()) }
    }

    fn write_zero_units(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        let Units { head, whole, tail } = self.units(offset, len);
        for part in [head, tail] {
            if self.reads_as_zeroes(part.clone())? {
                continue;
            }
            if flags.fast_only {
                return Err(Errno::OPNOTSUPP.into());
            }
            self.write_zero_data(part)?;
        }
        if !whole.is_empty() {
            match self.driver.write_zeroes(whole.start, whole.end - whole.start, flags) {
                Err(e) if is_unsupported(&e) && !flags.fast_only => self.write_zero_data(whole)?,
                other => other?,
            }
        }
        Ok(())
    }

    fn write_zero_data(&self, range: Range<u64>) -> io::Result<()> {
        let zeroes = [0; ZERO_PIECE];
        let mut at = range.start;
        while at < range.end {
            let piece = usize::try_from(range.end - at).unwrap_or(ZERO_PIECE).min(ZERO_PIECE);
            self.write_checked(&zeroes[..piece], at, false)?;
            at += piece as u64;
        }
        Ok(())
    }

    /// Whether block status alone tells that there are only zeroes.
    fn reads_as_zeroes(&self, range: Range<u64>) -> io::Result<bool> {
        let mut at = range.start;
        while at < range.end {
            match self.status(at, range.end - at)? {
                Extent { kind: ExtentKind::Zero, len, .. } => at += len,
                Extent { kind: ExtentKind::Data, .. } => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Says that a range's content is of no further use. A hint: success promises nothing about later reads.
    ///
    /// # Errors
    /// As [`BlockNode::write`].
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_write(offset, len)?;
        let Units { whole, .. } = self.units(offset, len);
        if whole.is_empty() || !self.unmap.load(Ordering::Relaxed) {
            return Ok(());
        }
        let discarded = self.driver.discard(whole.start, whole.end - whole.start);
        self.bitmaps.mark(whole.start, whole.end - whole.start);
        discarded
    }

    /// Makes the node `len` bytes long, as [`Driver::resize`] says.
    ///
    /// # Errors
    /// `Invalid` on a read-only node or for a size over 2^63-1; else the driver's.
    pub fn resize(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        if !self.writable() {
            return Err(Error::invalid(format!("Block node is read-only: '{}'", self.name)));
        }
        if i64::try_from(len).is_err() {
            return Err(Error::invalid(format!("The size must be less than 2^63 bytes, not {len}")));
        }
        for bitmap in self.bitmaps.list() {
            if bitmap.is_busy() {
                return Err(Error::invalid(format!(
                    "Bitmap '{}' is currently in use by another operation and cannot be used",
                    bitmap.name()
                )));
            }
            if len.div_ceil(bitmap.granularity()) > bitmap::MOST_BITS {
                return Err(Error::invalid(format!("bitmap '{}' is too fine for {len} bytes", bitmap.name())));
            }
        }
        self.driver.resize(len, preallocation)?;
        self.bitmaps.resize(len);
        Ok(())
    }

    /// Forgets everything that this layer has, so that all of it is what the backing file has.
    ///
    /// # Errors
    /// The node is read-only; those of [`Driver::empty`].
    pub fn empty(&self) -> Result<()> {
        if !self.writable() {
            return Err(Error::invalid(format!("Block node is read-only: '{}'", self.name)));
        }
        self.driver.empty()
    }

    /// The snapshots that the image keeps.
    ///
    /// # Errors
    /// The format keeps none: QEMU's words.
    pub fn snapshots(&self) -> Result<&dyn Snapshots> {
        self.driver.snapshots().ok_or_else(|| {
            Error::unsupported(format!(
                "Block format '{}' used by device '{}' does not support internal snapshots",
                self.driver_name, self.name
            ))
        })
    }

    /// Splits a range at the driver's units. The last unit of the image counts as whole where the image ends in it.
    fn units(&self, offset: u64, len: u64) -> Units {
        let end = offset + len;
        let unit = self.driver.zero_unit().max(1);
        let start = offset.checked_next_multiple_of(unit).unwrap_or(end).min(end);
        let last = if end == self.len() { end } else { (end / unit * unit).max(start) };
        Units { head: offset..start, whole: start..last, tail: last..end }
    }

    /// Returns when every write acknowledged before this call is on stable storage; at once, if that is left to others
    /// ([`Host::unflushed`](crate::Host::unflushed)).
    ///
    /// # Errors
    /// The errno of the host: then nothing is known about unflushed data.
    pub fn flush(&self) -> io::Result<()> {
        if self.writable() && self.flushes { self.driver.flush() } else { Ok(()) }
    }

    /// What stands at `offset`, for at most `len` bytes: the first run of one kind.
    ///
    /// # Errors
    /// `EINVAL` if the range is empty or passes the end; else the errno of the layer that failed.
    pub fn status(&self, offset: u64, len: u64) -> io::Result<Extent> {
        self.check_range(offset, len)?;
        if len == 0 {
            return Err(Errno::INVAL.into());
        }
        let ask = Ask { detail: Detail::Allocation, wait: Wait::Allowed };
        let Mapping { target, len, hold: _hold } = self.driver.map(offset, len, ask)?;
        let extent = |kind, depth| Ok(Extent { len, kind, depth });
        match target {
            Target::Fd { .. } | Target::Data { .. } | Target::Encrypted { .. } | Target::Computed => {
                extent(ExtentKind::Data, 1)
            }
            Target::Zero => extent(ExtentKind::Zero, 1),
            Target::Absent => extent(ExtentKind::Zero, 0),
            Target::Child { node, offset: at } => {
                let down = u32::from(!self.driver.passes_on());
                match node.len().saturating_sub(at) {
                    0 => extent(ExtentKind::Zero, 1 + down),
                    there => {
                        let below = node.status(at, len.min(there))?;
                        Ok(Extent { depth: if below.depth == 0 { 0 } else { below.depth + down }, ..below })
                    }
                }
            }
        }
    }

    pub(crate) fn check_range(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len() => Ok(()),
            _ => Err(Errno::INVAL.into()),
        }
    }

    pub(crate) fn check_write(&self, offset: u64, len: u64) -> io::Result<()> {
        if !self.writable() {
            return Err(Errno::PERM.into());
        }
        self.check_range(offset, len).map_err(|_| Errno::NOSPC.into())
    }
}

/// A range cut at the units of a driver: what lies before the first whole one, the whole ones, and what is left.
struct Units {
    head: Range<u64>,
    whole: Range<u64>,
    tail: Range<u64>,
}

fn is_unsupported(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error())
}

/// A driver's length as a piece of the request; a driver that breaks its contract is an I/O error, never a panic.
pub(crate) fn bounded(len: u64, most: usize) -> io::Result<usize> {
    match usize::try_from(len) {
        Ok(len) if 0 < len && len <= most => Ok(len),
        _ => Err(Errno::IO.into()),
    }
}
