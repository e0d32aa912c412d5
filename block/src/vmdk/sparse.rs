// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A sparse extent: grains found through grain tables, plain ones that can be written, compressed ones that are read.
//!
//! A compressed grain is stored as `u64 its first sector, u32 size, zlib stream`; without markers it is the stream alone.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::{Decompress, FlushDecompress, Status};
use rustix::io::Errno;

use super::header::{Header, SECTOR};
use crate::blocks::{Blocks, Layout, Place};
use crate::driver::{Ask, Mapping, Target};
use crate::inflated::Inflated;
use crate::{BlockNode, Error, Result, Wait};

const NONE: u32 = 0;
const ZERO: u32 = 1;
const MARKER: usize = 12;

pub struct Sparse {
    pub blocks: Blocks<GrainTables>,
    pub header: Header,
    /// Grains of an extent that stores them compressed.
    inflated: Option<Inflated>,
}

/// The tables of an extent. Its directories are in memory.
pub struct GrainTables {
    entries: u64,
    grain: u64,
    tables: Vec<u64>,
    copies: Vec<u64>,
    zero_grains: bool,
    /// Bytes that the file has at least.
    overhead: u64,
    /// Where the file's last byte was when it was opened, or where the last new grain ends: no grain begins behind it.
    end: AtomicU64,
}

impl Layout for GrainTables {
    fn block_size(&self) -> u64 {
        self.grain
    }

    fn chunk_entries(&self) -> u64 {
        self.entries
    }

    fn file_len(&self, end: u64) -> u64 {
        end.max(self.overhead)
    }

    fn chunk_at(&self, chunk: u64) -> Option<u64> {
        self.tables.get(usize::try_from(chunk).ok()?).copied().filter(|&at| at != 0)
    }

    fn copy_at(&self, chunk: u64) -> Option<u64> {
        self.copies.get(usize::try_from(chunk).ok()?).copied().filter(|&at| at != 0)
    }

    fn decode(&self, entry: [u8; 4]) -> Place {
        match u32::from_le_bytes(entry) {
            NONE => Place::None,
            ZERO if self.zero_grains => Place::Zero,
            sector => {
                let at = u64::from(sector) * SECTOR;
                if sector > ZERO && at < self.end.load(Ordering::Relaxed) { Place::At(at) } else { Place::Invalid }
            }
        }
    }

    fn encode(&self, place: u64) -> Option<[u8; 4]> {
        u32::try_from(place / SECTOR).ok().filter(|&sector| sector > ZERO).map(u32::to_le_bytes)
    }

    fn none(&self) -> [u8; 4] {
        NONE.to_le_bytes()
    }

    fn begin_block(&self, place: u64) -> io::Result<()> {
        self.end.fetch_max(place + self.grain, Ordering::Relaxed);
        Ok(())
    }
}

impl Sparse {
    /// The first `size` bytes of the extent in `file`, of which byte 0 is byte `start` of the layer below.
    pub fn new(header: Header, file: Arc<BlockNode>, backing: Option<Arc<BlockNode>>, start: u64, size: u64) -> Sparse {
        let end = file.len();
        let layout = GrainTables {
            entries: header.entries,
            grain: header.grain,
            tables: header.tables.clone(),
            copies: header.copies.clone(),
            zero_grains: header.zero_grains,
            overhead: header.overhead,
            end: AtomicU64::new(end),
        };
        let inflated = header.compressed.then(|| Inflated::new(usize::try_from(header.grain).unwrap_or(usize::MAX)));
        let next = end.max(header.overhead).next_multiple_of(header.grain);
        let mut blocks = Blocks::new(layout, file, backing, size, 0, next);
        blocks.backing_start = start;
        Sparse { blocks, header, inflated }
    }

    /// Whether the extent can be written: looks at every table, since one grain too many in one place costs data.
    pub fn check_writable(&self) -> Result<()> {
        let header = &self.header;
        if header.compressed {
            return Err(Error::unsupported(
                "compressed VMDK extents are read-only: open the node with 'read-only': true",
            ));
        }
        if header.cowd {
            return Err(Error::unsupported("ESX sparse extents (COWD) can be read only"));
        }
        if header.version == 3 {
            return Err(Error::unsupported("VMDK version 3 must be read only"));
        }
        self.check_tables()?;
        let tables = header.tables.iter().chain(&header.copies).max().map_or(0, |table| table + header.entries * 4);
        let metadata = tables.max(header.descriptor.0 + header.descriptor.1);
        self.survey(metadata.max(SECTOR))
    }

    /// Whether every table is there and none over another.
    pub fn check_tables(&self) -> Result<()> {
        if self.header.tables.iter().chain(&self.header.copies).any(|&at| at == 0) {
            return Err(Error::unsupported("some of the VMDK's grain tables are missing; it can be read only"));
        }
        self.check_shared_tables()
    }

    /// Whether no table is over another, or over what is no table; so many tables have room in the file.
    pub fn check_shared_tables(&self) -> Result<()> {
        let header = &self.header;
        let bytes = header.entries * 4;
        let tables = header.tables.iter().chain(&header.copies).filter(|&&at| at != 0).map(|&at| (at, bytes));
        let mut all: Vec<(u64, u64)> = tables.collect();
        all.sort_unstable();
        if all.windows(2).any(|pair| pair[0].0 + bytes > pair[1].0) {
            return Err(Error::corrupt("two of the VMDK's grain tables share their place; it can be read only"));
        }
        let is_over =
            |&(at, len): &(u64, u64)| all.iter().any(|&(table, bytes)| table < at + len && at < table + bytes);
        if header.fixed.iter().any(is_over) {
            return Err(Error::corrupt(
                "one of the VMDK's grain tables is over its header, descriptor or directory; it can be read only",
            ));
        }
        Ok(())
    }

    /// Refuses grains in front of `data`, past the end of the file, and over each other.
    fn survey(&self, data: u64) -> Result<()> {
        let Sparse { blocks, header, .. } = self;
        let grains = blocks.file.len().min(u64::from(u32::MAX) * SECTOR) / header.grain + 1;
        let mut seen = vec![0u64; usize::try_from(grains.div_ceil(64)).unwrap_or(0)];
        let mut table = vec![0; usize::try_from(header.entries * 4).unwrap_or(0)];
        for &at in &header.tables {
            blocks.file.read_or_zero(&mut table, at, Wait::Allowed).map_err(|e| Error::io("read a grain table", e))?;
            for entry in table.as_chunks::<4>().0 {
                let place = match blocks.layout.decode(*entry) {
                    Place::None | Place::Zero => continue,
                    Place::At(place) if place >= data => place,
                    Place::At(_) | Place::Invalid => {
                        let place = u64::from(u32::from_le_bytes(*entry)) * SECTOR;
                        return Err(Error::corrupt(format!(
                            "a grain at {place:#x} is not in the VMDK's data area; it can be read only"
                        )));
                    }
                };
                let number = place / header.grain;
                let word = usize::try_from(number / 64).ok().and_then(|word| seen.get_mut(word));
                let Some(word) = word else { continue };
                if *word & (1 << (number % 64)) != 0 {
                    return Err(Error::corrupt("two guest grains share one grain of the VMDK; it can be read only"));
                }
                *word |= 1 << (number % 64);
            }
        }
        Ok(())
    }

    pub fn map(&self, offset: u64, len: u64, ask: Ask) -> io::Result<Mapping<'_>> {
        let grain = self.header.grain;
        if self.inflated.is_some() && matches!(self.blocks.place(offset / grain, ask.wait)?, Place::At(_)) {
            return Ok(Mapping::fixed(Target::Computed, len.min(grain - offset % grain)));
        }
        self.blocks.map(offset, len, ask)
    }

    /// Fills `buf` from a range within one compressed grain.
    pub fn read_computed(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let (grain, number) = (self.header.grain, offset / self.header.grain);
        let (Place::At(at), Some(inflated)) = (self.blocks.place(number, Wait::Allowed)?, &self.inflated) else {
            return Err(Errno::IO.into());
        };
        let content = inflated.whole(at, || self.load(number, at))?;
        let start = usize::try_from(offset % grain).map_err(|_| Errno::IO)?;
        buf.copy_from_slice(content.get(start..start + buf.len()).ok_or(Errno::IO)?);
        Ok(())
    }

    /// The compressed grain `number`, stored at `at`.
    pub fn load(&self, number: u64, at: u64) -> io::Result<Vec<u8>> {
        let grain = self.header.grain;
        let (data, size) = if self.header.markers {
            let mut marker = [0; MARKER];
            self.blocks.file.read_or_zero(&mut marker, at, Wait::Allowed)?;
            let [sector @ .., a, b, c, d] = marker;
            // A table that names another grain's place shows one guest block in the place of another.
            if u64::from_le_bytes(sector) != number * (grain / SECTOR) {
                return Err(Errno::IO.into());
            }
            (at + MARKER as u64, u64::from(u32::from_le_bytes([a, b, c, d])))
        } else {
            (at, (2 * grain).min(self.blocks.file.len().saturating_sub(at)))
        };
        if !(1..=2 * grain).contains(&size) {
            return Err(Errno::IO.into());
        }
        let mut stored = vec![0; usize::try_from(size).map_err(|_| Errno::IO)?];
        self.blocks.file.read_or_zero(&mut stored, data, Wait::Allowed)?;
        let len = usize::try_from(grain).map_err(|_| Errno::IO)?;
        // One byte more than a grain has, so that a stream that is too long shows.
        let mut content = vec![0; len + 1];
        let mut inflater = Decompress::new(true);
        let status = inflater.decompress(&stored, &mut content, FlushDecompress::Finish);
        let needed = grain.min(self.blocks.size().saturating_sub(number * grain));
        if !matches!(status, Ok(Status::StreamEnd)) || !(needed..=grain).contains(&inflater.total_out()) {
            return Err(Errno::IO.into());
        }
        content.truncate(len);
        Ok(content)
    }
}
