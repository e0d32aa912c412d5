// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Formats that find blocks of one size through one table and put new blocks at the end: VDI, dynamic VHD, sparse VMDK.
//!
//! A [`Layout`] says where the table stands, what an entry means, and what else must be on disk before the table may name a new
//! block. [`Blocks`] does the rest: entries in memory, read by chunks and without a lock; room for new blocks; the order on
//! disk. A new block is named in memory when its bytes are written and on disk by the next flush, after them:
//!
//! ```text
//!  1  data (written by the requests), what the layout keeps besides the table (counters, footer)       then: fdatasync
//!  2  table entries                                                                                    then: fdatasync
//! ```
//!
//! A failed write leaves no entry behind, and its room goes to the next block. No block ever changes its place.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::io::Errno;

use crate::coalesce::Coalesced;
use crate::driver::{Ask, Mapping, Pending, Prepared, Target, ZeroFlags};
use crate::gate::Hold;
use crate::{BlockNode, Error, Preallocation, Wait};

/// What an entry of the table says about its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nothing: the layer below decides.
    None,
    /// Zeroes.
    Zero,
    /// It stands at this byte of the file; what the layout puts before the data not counted.
    At(u64),
    /// Against the rules.
    Invalid,
}

/// How a format lays its table and its blocks out.
pub trait Layout: Send + Sync {
    /// Bytes of a block's data.
    fn block_size(&self) -> u64;

    /// Bytes that stand in front of the data of each block.
    fn lead(&self) -> u64 {
        0
    }

    /// Bytes from a block's place to that of one that stands right behind it.
    fn step(&self) -> u64 {
        self.block_size() + self.lead()
    }

    /// Entries that stand together and are read together.
    fn chunk_entries(&self) -> u64 {
        1024
    }

    /// Where a chunk of the table stands, byte of the file; `None` if there is none of it.
    fn chunk_at(&self, chunk: u64) -> Option<u64>;

    /// Where a second copy of the chunk stands.
    fn copy_at(&self, _chunk: u64) -> Option<u64> {
        None
    }

    /// What the four bytes of an entry mean.
    fn decode(&self, entry: [u8; 4]) -> Place;

    /// The entry for a block at byte `place`; `None` if it cannot name that place.
    fn encode(&self, place: u64) -> Option<[u8; 4]>;

    /// The entry of a block that is not there.
    fn none(&self) -> [u8; 4];

    /// Where a new block goes: at `end` or not far behind.
    fn next_place(&self, end: u64) -> u64 {
        end
    }

    /// How long the file is when the next new block would go to `end`.
    fn file_len(&self, end: u64) -> u64 {
        end
    }

    /// Writes what stands before the data of a new block at `place`.
    ///
    /// # Errors
    /// The file's.
    fn begin_block(&self, _place: u64) -> io::Result<()> {
        Ok(())
    }

    /// Writes what must be on disk before the table names blocks up to `end`, where the next block would go.
    ///
    /// # Errors
    /// The file's.
    fn publish(&self, _end: u64) -> io::Result<()> {
        Ok(())
    }
}

/// An image of blocks.
pub struct Blocks<L: Layout> {
    pub layout: L,
    pub file: Arc<BlockNode>,
    backing: Option<Arc<BlockNode>>,
    /// Where in the layer below the image's first byte is, for an image that is a part of another.
    pub backing_start: u64,
    /// Bytes that a guest sees.
    size: AtomicU64,
    chunks: Box<[OnceLock<Box<[AtomicU32]>>]>,
    state: Mutex<State>,
    landed: Condvar,
    flushes: Coalesced,
    writing_back: Mutex<()>,
}

#[derive(Default)]
struct State {
    /// Where the next block goes.
    end: u64,
    /// Room of blocks that were never filled.
    spare: Vec<u64>,
    /// Blocks whose entry is not on disk yet.
    dirty: BTreeSet<u64>,
    /// Blocks that are being filled.
    flights: BTreeSet<u64>,
}

impl<L: Layout> Blocks<L> {
    /// The image of `size` bytes in `file`, with a table that has room for `room` blocks if that is more; the next new block goes
    /// to `end`.
    pub fn new(
        layout: L,
        file: Arc<BlockNode>,
        backing: Option<Arc<BlockNode>>,
        size: u64,
        room: u64,
        end: u64,
    ) -> Blocks<L> {
        let chunks = size.div_ceil(layout.block_size()).max(room).div_ceil(layout.chunk_entries());
        Blocks {
            layout,
            file,
            backing,
            backing_start: 0,
            size: AtomicU64::new(size),
            chunks: (0..chunks).map(|_| OnceLock::new()).collect(),
            state: Mutex::new(State { end, ..State::default() }),
            landed: Condvar::new(),
            flushes: Coalesced::default(),
            writing_back: Mutex::new(()),
        }
    }

    /// Bytes that a guest sees.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Gives out these places, which no entry names, before those at the end.
    pub fn reuse(&self, places: Vec<u64>) {
        self.state().spare = places;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where block `block` stands.
    ///
    /// # Errors
    /// `WouldBlock` as `wait` says; those of reading the table.
    pub fn place(&self, block: u64, wait: Wait) -> io::Result<Place> {
        Ok(match self.entry(block, wait)? {
            Some(entry) => self.layout.decode(entry.load(Ordering::Acquire).to_ne_bytes()),
            None => Place::None,
        })
    }

    /// The entry of a block in memory; `None` if the table has no such part.
    fn entry(&self, block: u64, wait: Wait) -> io::Result<Option<&AtomicU32>> {
        let per_chunk = self.layout.chunk_entries();
        let number = block / per_chunk;
        let slot = usize::try_from(number).ok().and_then(|number| self.chunks.get(number)).ok_or(Errno::IO)?;
        let chunk = match slot.get() {
            Some(chunk) => chunk,
            None => {
                let Some(at) = self.layout.chunk_at(number) else { return Ok(None) };
                let mut bytes = vec![0; usize::try_from(per_chunk * 4).map_err(|_| Errno::IO)?];
                self.file.read_or_zero(&mut bytes, at, wait)?;
                let entries = bytes.as_chunks::<4>().0.iter().map(|entry| AtomicU32::new(u32::from_ne_bytes(*entry)));
                slot.get_or_init(|| entries.collect())
            }
        };
        Ok(chunk.get(usize::try_from(block % per_chunk).unwrap_or(usize::MAX)))
    }

    /// See [`crate::Driver::map`].
    pub fn map(&self, offset: u64, len: u64, ask: Ask) -> io::Result<Mapping<'_>> {
        let size = self.layout.block_size();
        let first = offset / size;
        let place = self.place(first, ask.wait)?;
        let mut end = (first + 1) * size;
        let step = self.layout.step();
        // Runs of one kind are told together; blocks that stand in a row only where nothing stands between them.
        while end < offset + len {
            let next = match self.place(end / size, Wait::Never) {
                Ok(next) => next,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            };
            let continues = match (place, next) {
                (Place::At(start), Place::At(here)) => {
                    self.layout.lead() == 0 && start.checked_add((end / size - first) * step) == Some(here)
                }
                (Place::None, Place::None) | (Place::Zero, Place::Zero) => true,
                _ => false,
            };
            if !continues {
                break;
            }
            end += size;
        }
        let len = len.min(end - offset);
        let target = match place {
            Place::None => match &self.backing {
                Some(node) => Target::Child { node, offset: self.backing_start + offset },
                None => Target::Zero,
            },
            Place::Zero => Target::Zero,
            Place::At(at) => {
                let offset = at.checked_add(self.layout.lead() + offset % size).ok_or(Errno::IO)?;
                Target::Data { node: &self.file, offset }
            }
            Place::Invalid => return Err(Errno::IO.into()),
        };
        Ok(Mapping::fixed(target, len))
    }

    /// See [`crate::Driver::prepare_write`].
    pub fn prepare_write(&self, offset: u64, len: u64) -> io::Result<Prepared<'_>> {
        let size = self.layout.block_size();
        let block = offset / size;
        let len = len.min((block + 1) * size - offset);
        let mut state = None;
        loop {
            let old = self.place(block, Wait::Allowed)?;
            if let Place::At(at) = old {
                let offset = at.checked_add(self.layout.lead() + offset % size).ok_or(Errno::IO)?;
                return Ok(Prepared::in_place(Target::Data { node: &self.file, offset }, len));
            }
            // The second look is under the lock: nobody fills the block now.
            match state.take() {
                None => state = Some(self.state()),
                Some(locked) => {
                    let mut locked: MutexGuard<'_, State> = locked;
                    if locked.flights.contains(&block) {
                        state = Some(self.landed.wait(locked).unwrap_or_else(PoisonError::into_inner));
                        continue;
                    }
                    let room = self.room(&mut locked, block)?;
                    drop(locked);
                    let filled = NewBlock { blocks: self, block, place: room, landed: false };
                    filled.fill(offset % size..offset % size + len, old)?;
                    let offset = room + self.layout.lead() + offset % size;
                    let target = Target::Data { node: &self.file, offset };
                    return Ok(Prepared { target, len, hold: Hold::NONE, pending: Some(Box::new(filled)) });
                }
            }
        }
    }

    fn room(&self, state: &mut State, block: u64) -> io::Result<u64> {
        if self.entry(block, Wait::Allowed)?.is_none() || self.place(block, Wait::Allowed)? == Place::Invalid {
            return Err(Errno::IO.into());
        }
        let place = state.spare.pop().unwrap_or_else(|| self.layout.next_place(state.end));
        let end = place.checked_add(self.layout.step()).ok_or(Errno::FBIG)?;
        if self.layout.encode(place).is_none() {
            state.spare.push(place);
            return Err(Errno::FBIG.into());
        }
        state.end = state.end.max(end);
        state.flights.insert(block);
        Ok(place)
    }

    /// See [`crate::Driver::write_zeroes`]: blocks without a place read as zeroes already, the others keep their room in the table
    /// and give it back in the host's file.
    pub fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        let pieces = self.stored_pieces(offset, len)?;
        // Nothing is changed before it is sure that all of it can be.
        for piece in pieces.ok_or(Errno::OPNOTSUPP)? {
            self.file.write_zeroes(piece.start, piece.end - piece.start, flags, false)?;
        }
        Ok(())
    }

    /// See [`crate::Driver::discard`].
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        for piece in self.stored_pieces(offset, len)?.unwrap_or_default() {
            self.file.discard(piece.start, piece.end - piece.start)?;
        }
        Ok(())
    }

    /// Where the stored parts of a range stand in the file; `None` if some of it comes from the layer below.
    fn stored_pieces(&self, offset: u64, len: u64) -> io::Result<Option<Vec<Range<u64>>>> {
        let size = self.layout.block_size();
        let mut pieces = Vec::new();
        let mut at = offset;
        while at < offset + len {
            let end = (offset + len).min((at / size + 1) * size);
            match self.place(at / size, Wait::Allowed)? {
                Place::None if self.is_backed(at) => return Ok(None),
                Place::None | Place::Zero => {}
                Place::At(place) => {
                    let start = place.checked_add(self.layout.lead() + at % size).ok_or(Errno::IO)?;
                    // What lies past the end of the file reads as zeroes already.
                    let end = start.saturating_add(end - at).min(self.file.len());
                    pieces.extend((start < end).then_some(start..end));
                }
                Place::Invalid => return Err(Errno::IO.into()),
            }
            at = end;
        }
        Ok(Some(pieces))
    }

    /// Makes an entry say another place, or nothing; it is on disk with the next flush.
    pub fn set(&self, block: u64, place: Option<u64>) -> io::Result<()> {
        let entry = match place {
            Some(place) => self.layout.encode(place).ok_or(Errno::FBIG)?,
            None => self.layout.none(),
        };
        let mut state = self.state();
        self.entry(block, Wait::Allowed)?.ok_or(Errno::IO)?.store(u32::from_ne_bytes(entry), Ordering::Release);
        state.dirty.insert(block);
        Ok(())
    }

    /// Where the next new block goes, if it goes to the end.
    pub fn end(&self) -> u64 {
        self.state().end
    }

    /// Lets the next new block go elsewhere: nothing that an entry names stands behind it.
    pub fn set_end(&self, end: u64) {
        self.state().end = end;
    }

    /// Whether the layer below has bytes at `offset`.
    fn is_backed(&self, offset: u64) -> bool {
        self.backing.as_ref().is_some_and(|backing| self.backing_start + offset < backing.len())
    }

    /// Makes the image `len` bytes long, which is more than it has. New entries say nothing, on disk too, before `header` writes
    /// what tells the new size, given where the next block goes.
    pub fn grow(&self, len: u64, header: impl FnOnce(u64) -> io::Result<()>) -> io::Result<()> {
        let _order = self.writing_back.lock().unwrap_or_else(PoisonError::into_inner);
        let (old, block) = (self.size(), self.layout.block_size());
        let tail = old.next_multiple_of(block).min(len) - old;
        if tail > 0 {
            // Behind the end there may be anything.
            self.write_zeroes(old, tail, ZeroFlags::default())?;
        }
        let per_chunk = self.layout.chunk_entries();
        let (first, end) = (old.div_ceil(block), len.div_ceil(block));
        let mut at = first;
        while at < end {
            let chunk = at / per_chunk;
            let stop = end.min((chunk + 1) * per_chunk);
            let table = self.layout.chunk_at(chunk).ok_or(Errno::IO)?;
            let bytes = self.layout.none().repeat(usize::try_from(stop - at).map_err(|_| Errno::FBIG)?);
            self.file.write_growing(&bytes, table + at % per_chunk * 4, false)?;
            for number in at..stop {
                let entry = self.entry(number, Wait::Allowed)?.ok_or(Errno::IO)?;
                entry.store(u32::from_ne_bytes(self.layout.none()), Ordering::Release);
            }
            at = stop;
        }
        self.file.flush()?;
        header(self.state().end)?;
        self.file.flush()?;
        self.size.store(len, Ordering::Release);
        Ok(())
    }

    /// See [`crate::Driver::flush`].
    pub fn flush(&self) -> io::Result<()> {
        self.flushes.run(|| self.write_back())
    }

    fn write_back(&self) -> io::Result<()> {
        let _order = self.writing_back.lock().unwrap_or_else(PoisonError::into_inner);
        let dirty = {
            let mut state = self.state();
            if state.dirty.is_empty() {
                drop(state);
                return self.file.flush();
            }
            // Nobody writes behind the end while the lock is held. A block that begins later would be cut off, or lie under what is
            // published.
            if self.file.len() < state.end {
                self.file.resize(state.end, Preallocation::Off).map_err(Error::into_io)?;
            }
            self.layout.publish(state.end)?;
            std::mem::take(&mut state.dirty)
        };
        let written = self.write_entries(&dirty);
        if written.is_err() {
            self.state().dirty.extend(dirty);
        }
        written
    }

    fn write_entries(&self, dirty: &BTreeSet<u64>) -> io::Result<()> {
        // As they are now: their data is written, and so is flushed with the rest.
        let mut entries: BTreeMap<u64, [u8; 4]> = BTreeMap::new();
        let per_chunk = self.layout.chunk_entries();
        for &block in dirty {
            let entry = self.entry(block, Wait::Allowed)?.ok_or(Errno::IO)?.load(Ordering::Acquire).to_ne_bytes();
            let tables = [self.layout.chunk_at(block / per_chunk), self.layout.copy_at(block / per_chunk)];
            entries.extend(tables.into_iter().flatten().map(|table| (table + block % per_chunk * 4, entry)));
        }
        self.file.flush()?;
        let mut entries = entries.into_iter().peekable();
        while let Some((at, entry)) = entries.next() {
            let mut run = entry.to_vec();
            while let Some((_, entry)) = entries.next_if(|(next, _)| *next == at + run.len() as u64) {
                run.extend(entry);
            }
            self.file.write_growing(&run, at, false)?;
        }
        self.file.flush()
    }
}

impl<L: Layout> Drop for Blocks<L> {
    fn drop(&mut self) {
        let is_clean = self.state().dirty.is_empty();
        if !is_clean && let Err(e) = self.write_back() {
            tracing::error!("what was not flushed is lost: {e}");
        }
    }
}

/// A block that is being filled.
struct NewBlock<'a, L: Layout> {
    blocks: &'a Blocks<L>,
    block: u64,
    place: u64,
    landed: bool,
}

impl<L: Layout> NewBlock<'_, L> {
    /// Puts in front and behind what the write (of bytes `written` of the block) leaves of what was there.
    fn fill(&self, written: Range<u64>, old: Place) -> io::Result<()> {
        let Blocks { layout, file, backing, backing_start, .. } = self.blocks;
        layout.begin_block(self.place)?;
        let data = self.place + layout.lead();
        let start = self.block * layout.block_size();
        for part in [0..written.start, written.end..layout.block_size()] {
            if part.is_empty() {
                continue;
            }
            let shows_below = old == Place::None
                && start + part.start < self.blocks.size()
                && self.blocks.is_backed(start + part.start);
            if let Some(backing) = backing.as_ref().filter(|_| shows_below) {
                // A block is at most a few MiB: see the formats' checks.
                let mut content = vec![0; usize::try_from(part.end - part.start).map_err(|_| Errno::IO)?];
                backing.read_or_zero(&mut content, backing_start + start + part.start, Wait::Allowed)?;
                file.write_growing(&content, data + part.start, false)?;
            } else {
                // Room that was used before may hold bytes; past the end of the file there are none.
                let end = (data + part.end).min(file.len());
                if data + part.start < end {
                    let flags = ZeroFlags { may_unmap: true, fast_only: false };
                    file.write_zeroes(data + part.start, end - data - part.start, flags, false)?;
                }
            }
        }
        Ok(())
    }
}

impl<L: Layout> Pending for NewBlock<'_, L> {
    fn commit(mut self: Box<Self>) -> io::Result<()> {
        let blocks = self.blocks;
        let entry = blocks.layout.encode(self.place).ok_or(Errno::FBIG)?;
        let mut state = blocks.state();
        blocks.entry(self.block, Wait::Allowed)?.ok_or(Errno::IO)?.store(u32::from_ne_bytes(entry), Ordering::Release);
        state.dirty.insert(self.block);
        state.flights.remove(&self.block);
        self.landed = true;
        blocks.landed.notify_all();
        Ok(())
    }
}

impl<L: Layout> Drop for NewBlock<'_, L> {
    fn drop(&mut self) {
        if !self.landed {
            let mut state = self.blocks.state();
            state.flights.remove(&self.block);
            state.spare.push(self.place);
            self.blocks.landed.notify_all();
        }
    }
}
