// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A space-efficient sparse extent of ESX 6.5 and later ("seSparse"), for reading.
//!
//! ```text
//! header, u64 each, in sectors:  0 magic   1 version   2 capacity   3 grain (8)   4 grain table (64)   5 flags (0)
//!  10 volatile header   12 journal header   14 journal   16 directory   18 tables   20 free bitmap   22 back map   24 grains
//!                                                                    (each a start and, behind it, a size)
//! directory entry, u64:  0, or 1 in the top four bits and the number of a table
//! table entry, u64:      top four bits 0 nothing, 1 unmapped, 2 zeroes, 3 a grain; its number is bits 48-59, above those bits 0-47
//! ```

use std::io;
use std::sync::{Arc, OnceLock};

use rustix::io::Errno;

use super::header::SECTOR;
use crate::blocks::Place;
use crate::driver::{Ask, Mapping, Target};
use crate::{BlockNode, Error, Result, Wait};

/// How it begins.
pub const MAGIC: &[u8] = &0xcafe_babe_u64.to_le_bytes();
const VERSION: u64 = 0x2_0000_0001;
const VOLATILE_MAGIC: u64 = 0xcafe_cafe;
const GRAIN: u64 = 8 * SECTOR;
const TABLE: u64 = 64 * SECTOR;
const ENTRIES: u64 = TABLE / 8;
/// 64 TiB, as for the older kind.
const MAX_TABLES: u64 = 4 << 20;

/// The first `size` bytes of an extent, of which byte 0 is byte `start` of the layer below.
pub struct SeSparse {
    pub file: Arc<BlockNode>,
    backing: Option<Arc<BlockNode>>,
    start: u64,
    size: u64,
    /// Bytes that the extent has, at least `size`.
    pub capacity: u64,
    directory: Vec<u64>,
    tables_at: u64,
    grains_at: u64,
    tables: Box<[OnceLock<Box<[u64]>>]>,
}

impl SeSparse {
    pub fn open(file: Arc<BlockNode>, backing: Option<Arc<BlockNode>>, start: u64, size: u64) -> Result<SeSparse> {
        let header = words(&file, 0, 64, "header")?;
        let unsupported = |what: &str, is: u64| Err(Error::unsupported(format!("Unsupported seSparse {what} {is:#x}")));
        if header[0].to_le_bytes() != MAGIC {
            return Err(Error::corrupt("the seSparse extent does not begin like one"));
        }
        for (index, what, wanted) in
            [(1, "version", VERSION), (3, "grain size", 8), (4, "grain table size", 64), (5, "flags", 0)]
        {
            if header[index] != wanted {
                return unsupported(what, header[index]);
            }
        }
        if header[6..10].iter().chain(&header[26..]).any(|&word| word != 0) {
            return Err(Error::unsupported("Unsupported seSparse header: reserved bytes are not zero"));
        }
        let bytes = |what: &str, index: usize| {
            let bytes = header[index].checked_mul(SECTOR).filter(|&bytes| i64::try_from(bytes).is_ok());
            bytes
                .ok_or_else(|| Error::corrupt(format!("the seSparse {what} of {} sectors is too large", header[index])))
        };
        let volatile = words(&file, bytes("volatile header", 10)?, 4, "volatile header")?;
        if volatile[0] != VOLATILE_MAGIC {
            return Err(Error::corrupt("the seSparse extent has no volatile header where its header says"));
        }
        if volatile[3] != 0 {
            return Err(Error::unsupported(
                "seSparse: the image is dirty, and its journal is not replayed: let ESX do that",
            ));
        }
        let capacity = bytes("capacity", 2)?;
        let tables = capacity.div_ceil(ENTRIES * GRAIN);
        if tables > MAX_TABLES {
            return Err(Error::corrupt(format!("L1 size too big: {tables} tables, most is {MAX_TABLES}")));
        }
        let room = bytes("directory", 17)? / 8;
        if room < tables {
            return Err(Error::corrupt(format!("the seSparse directory has {room} entries, the disk needs {tables}")));
        }
        let directory = words(&file, bytes("directory", 16)?, tables, "directory")?;
        Ok(SeSparse {
            backing,
            start,
            size,
            capacity,
            directory,
            tables_at: bytes("tables", 18)?,
            grains_at: bytes("grains", 24)?,
            tables: (0..tables).map(|_| OnceLock::new()).collect(),
            file,
        })
    }

    fn place(&self, grain: u64, wait: Wait) -> io::Result<Place> {
        let number = usize::try_from(grain / ENTRIES).map_err(|_| Errno::IO)?;
        let (&entry, slot) = self.directory.get(number).zip(self.tables.get(number)).ok_or(Errno::IO)?;
        if entry == 0 {
            return Ok(Place::None);
        }
        if entry >> 32 != 0x1000_0000 {
            return Ok(Place::Invalid);
        }
        let table = match slot.get() {
            Some(table) => table,
            None => {
                let at = (entry & 0xffff_ffff).checked_mul(TABLE).and_then(|at| at.checked_add(self.tables_at));
                let at = at.filter(|at| at.checked_add(TABLE).is_some_and(|end| end <= self.file.len()));
                let mut bytes = vec![0; usize::try_from(TABLE).map_err(|_| Errno::IO)?];
                self.file.read(&mut bytes, at.ok_or(Errno::IO)?, wait)?;
                slot.get_or_init(|| bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_le_bytes(*entry)).collect())
            }
        };
        let entry = table.get(usize::try_from(grain % ENTRIES).unwrap_or(usize::MAX)).copied().ok_or(Errno::IO)?;
        Ok(match entry >> 60 {
            0 if entry == 0 => Place::None,
            1 | 2 => Place::Zero,
            3 => {
                let number = (entry >> 48 & 0xfff) | (entry & 0xffff_ffff_ffff) << 12;
                let at = number.checked_mul(GRAIN).and_then(|at| at.checked_add(self.grains_at));
                // Past the end there is nothing that anybody wrote.
                at.filter(|&at| at < self.file.len()).map_or(Place::Invalid, Place::At)
            }
            _ => Place::Invalid,
        })
    }

    /// As [`crate::Driver::map`].
    pub fn map(&self, offset: u64, len: u64, ask: Ask) -> io::Result<Mapping<'_>> {
        let first = offset / GRAIN;
        let place = self.place(first, ask.wait)?;
        let mut end = (first + 1) * GRAIN;
        while end < (offset + len).min(self.size) {
            let next = match self.place(end / GRAIN, Wait::Never) {
                Ok(next) => next,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            };
            let continues = match (place, next) {
                (Place::At(start), Place::At(here)) => start.checked_add(end - first * GRAIN) == Some(here),
                (first, next) => first == next,
            };
            if !continues {
                break;
            }
            end += GRAIN;
        }
        let len = len.min(end - offset);
        let target = match (place, &self.backing) {
            (Place::None, Some(node)) => Target::Child { node, offset: self.start + offset },
            (Place::None, None) | (Place::Zero, _) => Target::Zero,
            (Place::At(at), _) => Target::Data { node: &self.file, offset: at + offset % GRAIN },
            (Place::Invalid, _) => return Err(Errno::IO.into()),
        };
        Ok(Mapping::fixed(target, len))
    }
}

/// `count` numbers at byte `at`.
fn words(file: &BlockNode, at: u64, count: u64, what: &str) -> Result<Vec<u64>> {
    if at.checked_add(count * 8).is_none_or(|end| end > file.len()) {
        return Err(Error::corrupt(format!("the seSparse {what} at {at:#x} is not within the file")));
    }
    let mut bytes = vec![0; usize::try_from(count * 8).unwrap_or(0)];
    file.read(&mut bytes, at, Wait::Allowed).map_err(|e| Error::io(&format!("read the seSparse {what}"), e))?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect())
}
