// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A differencing disk: what its parent holds shows through, sector by sector. In a block that is there, a bit of the bitmap is
//! set for each sector that the block has; others are the parent's.
//!
//! Blocks made here have all of their sectors. One of another program's that lacks some is completed before its first write: the
//! parent's sectors go in, to disk, and only then the bitmap says so.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;

use super::{Header, SECTOR, Table, u32_at, u64_at};
use crate::blocks::{Blocks, Place};
use crate::driver::{Ask, Driver, Info, InfoValue, Mapping, Prepared, Target, ZeroFlags};
use crate::{BlockNode, Error, Result, Wait};

/// Bitmaps that are kept in memory, at most.
const MOST_KEPT: usize = 4096;
/// Bytes of a parent's name that are read.
const MAX_NAME: u64 = 4096;

/// What the disk says of its parent.
pub struct Parent {
    /// Its name in this system's way of writing: untrusted text.
    pub name: Option<String>,
}

impl Parent {
    /// Reads it, and holds it against the node that is given.
    ///
    /// # Errors
    /// No node is given, or another disk's.
    pub fn read(
        file: &BlockNode,
        header: &Header,
        backing: Option<&Arc<BlockNode>>,
        is_detached: bool,
    ) -> Result<Parent> {
        let name = name(file, header).or_else(|| {
            let text: Vec<u16> =
                header.bytes[64..576].as_chunks::<2>().0.iter().map(|c| u16::from_be_bytes(*c)).collect();
            plain(&text)
        });
        let uuid: [u8; 16] = header.bytes[40..].first_chunk().copied().unwrap_or_default();
        let Some(parent) = backing else {
            let shown: String =
                name.iter().flat_map(|name| name.chars().take(200)).flat_map(char::escape_debug).collect();
            return if is_detached {
                Ok(Parent { name })
            } else {
                Err(Error::invalid(format!(
                    "the VHD has the parent '{shown}': give 'backing' a node, or null to read what only the parent holds as zeroes"
                )))
            };
        };
        let theirs = parent.info().uuid.filter(|_| parent.driver_name() == "vpc");
        if theirs.is_some_and(|theirs| theirs != uuid) {
            return Err(Error::invalid(format!(
                "the VHD was made over the disk {}, and the node '{}' is {}",
                uuid_text(&uuid),
                parent.name(),
                uuid_text(&theirs.unwrap_or_default())
            )));
        }
        Ok(Parent { name })
    }
}

/// The name in one of the header's eight locators: relative before absolute, as a name on another machine's disk says nothing.
fn name(file: &BlockNode, header: &Header) -> Option<String> {
    let locators = || (0..8).map(|number| &header.bytes[576 + number * 24..][..24]);
    [b"W2ru", b"W2ku"].into_iter().find_map(|platform| {
        let locator = locators().find(|locator| locator.starts_with(platform))?;
        let (len, at) = (u64::from(u32_at(locator, 8)).min(MAX_NAME), u64_at(locator, 16));
        let mut bytes = vec![0; usize::try_from(len).ok()?];
        file.read(&mut bytes, at, Wait::Allowed).ok()?;
        let text: Vec<u16> = bytes.as_chunks::<2>().0.iter().map(|c| u16::from_le_bytes(*c)).collect();
        plain(&text)
    })
}

/// A name of Windows as one of this system, up to its first NUL.
fn plain(text: &[u16]) -> Option<String> {
    let text = String::from_utf16_lossy(text.split(|&c| c == 0).next().unwrap_or_default()).replace('\\', "/");
    let text = text.strip_prefix("./").map_or(text.clone(), str::to_owned);
    Some(text).filter(|text| !text.is_empty())
}

fn uuid_text(uuid: &[u8; 16]) -> String {
    uuid.iter().enumerate().fold(String::new(), |mut text, (index, byte)| {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text + &format!("{byte:02x}")
    })
}

pub struct Differencing {
    blocks: Blocks<Table>,
    backing: Option<Arc<BlockNode>>,
    parent: Parent,
    uuid: [u8; 16],
    /// Bitmaps of blocks; `None` for one that has all of its sectors.
    bitmaps: Mutex<BTreeMap<u64, Option<Arc<[u8]>>>>,
    completing: Mutex<()>,
}

impl Differencing {
    pub fn new(blocks: Blocks<Table>, backing: Option<Arc<BlockNode>>, parent: Parent, uuid: [u8; 16]) -> Differencing {
        let (bitmaps, completing) = (Mutex::default(), Mutex::default());
        Differencing { blocks, backing, parent, uuid, bitmaps, completing }
    }

    /// Which sectors the block at `place` has; `None` for all.
    fn bitmap(&self, block: u64, place: u64, wait: Wait) -> io::Result<Option<Arc<[u8]>>> {
        if let Some(known) = self.bitmaps.lock().unwrap_or_else(PoisonError::into_inner).get(&block) {
            return Ok(known.clone());
        }
        let table = &self.blocks.layout;
        let bits = table.block_size / SECTOR;
        let mut bytes = vec![0; usize::try_from(bits.div_ceil(8)).map_err(|_| Errno::IO)?];
        self.blocks.file.read_or_zero(&mut bytes, place, wait)?;
        let is_whole = (0..bits).all(|bit| is_set(&bytes, bit));
        let bitmap: Option<Arc<[u8]>> = if is_whole { None } else { Some(bytes.into()) };
        let mut bitmaps = self.bitmaps.lock().unwrap_or_else(PoisonError::into_inner);
        if bitmaps.len() >= MOST_KEPT {
            bitmaps.clear();
        }
        // Somebody may have completed the block meanwhile.
        Ok(bitmaps.entry(block).or_insert(bitmap).clone())
    }

    /// Puts into the blocks of a range what they lack.
    fn complete(&self, offset: u64, len: u64) -> io::Result<()> {
        let size = self.blocks.layout.block_size;
        for block in offset / size..(offset + len).div_ceil(size) {
            let Place::At(place) = self.blocks.place(block, Wait::Allowed)? else { continue };
            if self.bitmap(block, place, Wait::Allowed)?.is_none() {
                continue;
            }
            let _one = self.completing.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(bitmap) = self.bitmap(block, place, Wait::Allowed)? else { continue };
            let data = place + self.blocks.layout.bitmap;
            let mut at = 0;
            while at < size {
                let run = run(&bitmap, at, size);
                if !is_set(&bitmap, at / SECTOR) {
                    let mut content = vec![0; usize::try_from(run.end - run.start).map_err(|_| Errno::IO)?];
                    if let Some(parent) = &self.backing {
                        parent.read_or_zero(&mut content, block * size + run.start, Wait::Allowed)?;
                    }
                    self.blocks.file.write_growing(&content, data + run.start, false)?;
                }
                at = run.end;
            }
            self.blocks.file.flush()?;
            let whole = vec![0xff; usize::try_from(self.blocks.layout.bitmap).map_err(|_| Errno::IO)?];
            self.blocks.file.write(&whole, place, false)?;
            self.bitmaps.lock().unwrap_or_else(PoisonError::into_inner).insert(block, None);
        }
        Ok(())
    }
}

/// The first sector of a block is the highest bit of the first byte.
fn is_set(bitmap: &[u8], sector: u64) -> bool {
    let byte = usize::try_from(sector / 8).ok().and_then(|at| bitmap.get(at));
    byte.is_some_and(|byte| byte & (0x80 >> (sector % 8)) != 0)
}

/// The bytes from `at` to where the bits change, at most to `end`.
fn run(bitmap: &[u8], at: u64, end: u64) -> Range<u64> {
    let first = at / SECTOR;
    let kind = is_set(bitmap, first);
    let next = (first + 1..end.div_ceil(SECTOR)).find(|&sector| is_set(bitmap, sector) != kind);
    at..next.map_or(end, |sector| sector * SECTOR)
}

impl Driver for Differencing {
    fn len(&self) -> u64 {
        self.blocks.size()
    }

    fn map(&self, offset: u64, len: u64, ask: Ask) -> io::Result<Mapping<'_>> {
        let size = self.blocks.layout.block_size;
        let (block, at) = (offset / size, offset % size);
        let Place::At(place) = self.blocks.place(block, ask.wait)? else {
            return self.blocks.map(offset, len, ask);
        };
        let len = len.min(size - at);
        let is_there = match self.bitmap(block, place, ask.wait)? {
            None => return self.blocks.map(offset, len, ask),
            Some(bitmap) => {
                let run = run(&bitmap, at, at + len);
                (is_set(&bitmap, at / SECTOR), run.end - at)
            }
        };
        let target = match (is_there.0, &self.backing) {
            (true, _) => {
                let offset = place.checked_add(self.blocks.layout.bitmap + at).ok_or(Errno::IO)?;
                Target::Data { node: &self.blocks.file, offset }
            }
            (false, Some(node)) => Target::Child { node, offset },
            (false, None) => Target::Zero,
        };
        Ok(Mapping::fixed(target, is_there.1))
    }

    fn prepare_write(&self, offset: u64, len: u64) -> io::Result<Prepared<'_>> {
        let size = self.blocks.layout.block_size;
        self.complete(offset, len.min(size - offset % size))?;
        self.blocks.prepare_write(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.complete(offset, len)?;
        self.blocks.write_zeroes(offset, len, flags)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.blocks.discard(offset, len)
    }

    fn bypasses_cache(&self) -> bool {
        self.blocks.file.bypasses_cache()
    }

    fn flush(&self) -> io::Result<()> {
        self.blocks.flush()
    }

    fn resize(&self, len: u64, _: crate::Preallocation) -> Result<()> {
        if len == self.len() {
            return Ok(());
        }
        Err(Error::unsupported("a differencing VHD is as large as its parent"))
    }

    fn info(&self) -> Info {
        Info {
            allocated_size: self.blocks.file.info().allocated_size,
            cluster_size: Some(self.blocks.layout.block_size),
            backing_name: self.parent.name.clone(),
            backing_format: self.parent.name.is_some().then(|| "vpc".to_owned()),
            uuid: Some(self.uuid),
            specifics: vec![("subformat", InfoValue::Str("differencing".into()))],
            ..Info::default()
        }
    }
}
