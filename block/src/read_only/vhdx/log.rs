// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The log of a VHDX ([MS-VHDX] 2.3): what a writer that died had promised to write, applied in memory.
//!
//! ```text
//! entry: "loge", u32 CRC, u32 length, u32 tail, u64 sequence number, u32 descriptors, u32, GUID, u64 flushed, u64 last offset
//! descriptors from 64 on, 32 bytes each: "desc" data of one sector, "zero" a run of zeroes; then the data sectors
//! ```
//!
//! Entries lie in a ring of sectors of 4 KiB. The active sequence is the newest of entries without a gap whose tail is its first.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use super::layout::{HEADERS, Header, Layout, MIB, Region, crc};
use crate::read_only::{u32_le, u64_le};
use crate::{BlockNode, Error, Result, Wait};

const SECTOR: u64 = 4096;
/// A log that says more is not replayed: no writer has that much metadata on the way.
const MOST_SECTORS: usize = 64 << 10;

/// A sector as the log has it; `None` for zeroes.
type Logged = Option<Box<[u8]>>;

/// The file as it is when the log has been applied.
pub struct Replayed {
    file: Arc<BlockNode>,
    log: Region,
    /// By byte offset.
    sectors: BTreeMap<u64, Logged>,
    dirty: bool,
}

/// An entry of the log.
struct LogEntry {
    /// The ring's sector where it begins, and how many it has.
    first: u64,
    count: u64,
    tail: u64,
    sequence: u64,
    /// The file was at least as long when it was written.
    flushed: u64,
    bytes: Vec<u8>,
}

impl Replayed {
    /// Reads the log, if it has anything.
    pub fn open(file: Arc<BlockNode>, header: &Header) -> Result<Replayed> {
        let dirty = header.log_guid != [0; 16];
        let mut replayed = Replayed { file, log: header.log, sectors: BTreeMap::new(), dirty };
        if dirty {
            if header.log.len == 0 || header.log.end() > replayed.file.len() {
                return Err(Error::corrupt("the log of the VHDX is not in the file"));
            }
            let active = replayed.active(header)?;
            for entry in &active {
                if entry.flushed > replayed.file.len() {
                    return Err(Error::corrupt(format!(
                        "the VHDX was cut off: its log knows of {} bytes, the file has {}",
                        entry.flushed,
                        replayed.file.len()
                    )));
                }
                replayed.apply(entry)?;
            }
        }
        Ok(replayed)
    }

    pub fn len(&self) -> u64 {
        self.file.len()
    }

    pub fn log(&self) -> Region {
        self.log
    }

    pub fn is_dirty(&self) -> bool {
        self.dirty
    }

    /// The first byte that the log changes and that is no metadata.
    pub fn writes_outside(&self, layout: &Layout) -> Option<u64> {
        let regions = [Region { offset: 0, len: MIB }, layout.table, layout.metadata];
        let is_inside = |at: &u64| regions.iter().any(|region| (region.offset..region.end()).contains(at));
        self.sectors.keys().copied().find(|at| !is_inside(at) || HEADERS.contains(at))
    }

    /// Reads what is there with the log applied; `buf` ends in the file.
    pub fn read(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.file.len()).ok_or(Errno::IO)?;
        self.file.read(buf, offset, wait)?;
        for (&at, logged) in self.sectors.range(offset / SECTOR * SECTOR..end) {
            let (from, to) = (at.max(offset), (at + SECTOR).min(end));
            let place =
                |start: u64| usize::try_from(from - start).unwrap_or(0)..usize::try_from(to - start).unwrap_or(0);
            match logged {
                Some(bytes) => buf[place(offset)].copy_from_slice(&bytes[place(at)]),
                None => buf[place(offset)].fill(0),
            }
        }
        Ok(())
    }

    /// The entries of the active sequence, oldest first.
    fn active(&self, header: &Header) -> Result<Vec<LogEntry>> {
        let ring = header.log.len / SECTOR;
        let (mut best, mut newest) = (Vec::new(), 0);
        let mut first = 0;
        while first < ring {
            let sequence = self.sequence(header, first)?;
            let Some(last) = sequence.last() else {
                first += 1;
                continue;
            };
            // Where to look on: behind it, if the ring does not begin again there.
            let next = last.first + last.count;
            let (number, tail) = (last.sequence, last.tail);
            if number > newest
                && let Some(start) = sequence.iter().position(|entry| entry.first == tail)
            {
                newest = number;
                best = sequence;
                best.drain(..start);
            }
            if next <= first {
                break;
            }
            first = next;
        }
        // None at all: the writer died over its first entry, and without one in the log it has changed nothing in place.
        Ok(best)
    }

    /// Entries one behind the other from sector `first` of the ring on, as far as they are valid.
    fn sequence(&self, header: &Header, first: u64) -> Result<Vec<LogEntry>> {
        let ring = header.log.len / SECTOR;
        let (mut entries, mut at, mut walked) = (Vec::<LogEntry>::new(), first, 0);
        while let Some(entry) = self.entry(header, at)? {
            walked += entry.count;
            if walked > ring || entries.last().is_some_and(|last| last.sequence.checked_add(1) != Some(entry.sequence))
            {
                break;
            }
            at = (at + entry.count) % ring;
            entries.push(entry);
        }
        Ok(entries)
    }

    /// The entry that begins at sector `first` of the ring, if it is whole and of this log.
    fn entry(&self, header: &Header, first: u64) -> Result<Option<LogEntry>> {
        let ring = header.log.len / SECTOR;
        let mut bytes = self.ring(header, first, 1)?;
        let len = u64::from(u32_le(&bytes, 8));
        let (tail, descriptors) = (u64::from(u32_le(&bytes, 12)), u64::from(u32_le(&bytes, 24)));
        let is_entry = bytes.starts_with(b"loge") && bytes[32..48] == header.log_guid;
        let fits = len.is_multiple_of(SECTOR) && (1..=ring).contains(&(len / SECTOR)) && 64 + descriptors * 32 <= len;
        if !is_entry || !fits || !tail.is_multiple_of(SECTOR) {
            return Ok(None);
        }
        bytes = self.ring(header, first, len / SECTOR)?;
        if crc(&bytes, 4) != u32_le(&bytes, 4) {
            return Ok(None);
        }
        let (sequence, flushed) = (u64_le(&bytes, 16), u64_le(&bytes, 48));
        Ok(Some(LogEntry { first, count: len / SECTOR, tail: tail / SECTOR, sequence, flushed, bytes }))
    }

    /// `count` sectors of the ring.
    fn ring(&self, header: &Header, first: u64, count: u64) -> Result<Vec<u8>> {
        let ring = header.log.len / SECTOR;
        let mut bytes = vec![0; usize::try_from(count * SECTOR).unwrap_or(0)];
        let before = usize::try_from(count.min(ring - first) * SECTOR).unwrap_or(0);
        let (start, wrapped) = bytes.split_at_mut(before);
        for (part, at) in [(start, first), (wrapped, 0)] {
            self.file
                .read(part, header.log.offset + at * SECTOR, Wait::Allowed)
                .map_err(|e| Error::io("read the VHDX log", e))?;
        }
        Ok(bytes)
    }

    /// Applies what an entry's descriptors say.
    fn apply(&mut self, entry: &LogEntry) -> Result<()> {
        let broken = || Error::corrupt("an entry of the VHDX log contradicts itself");
        let count = usize::try_from(u32_le(&entry.bytes, 24)).map_err(|_| broken())?;
        let data_at = (64 + count * 32).next_multiple_of(4096);
        let mut data = entry.bytes.get(data_at..).unwrap_or_default().chunks_exact(4096);
        for descriptor in entry.bytes[64..].chunks_exact(32).take(count) {
            let (at, sequence) = (u64_le(descriptor, 16), u64_le(descriptor, 24));
            if !at.is_multiple_of(SECTOR) || sequence != entry.sequence {
                return Err(broken());
            }
            match &descriptor[..4] {
                b"zero" => {
                    let len = u64_le(descriptor, 8);
                    let end = at.checked_add(len).filter(|_| len.is_multiple_of(SECTOR)).ok_or_else(broken)?;
                    let mut at = at;
                    while at < end {
                        self.put(at, None)?;
                        at += SECTOR;
                    }
                }
                b"desc" => {
                    let sector = data.next().ok_or_else(broken)?;
                    let halves = (u64::from(u32_le(sector, 4)) << 32) | u64::from(u32_le(sector, 4092));
                    if !sector.starts_with(b"data") || halves != entry.sequence {
                        return Err(broken());
                    }
                    let mut whole = Vec::with_capacity(4096);
                    whole.extend_from_slice(&descriptor[8..16]);
                    whole.extend_from_slice(&sector[8..4092]);
                    whole.extend_from_slice(&descriptor[4..8]);
                    self.put(at, Some(whole.into()))?;
                }
                _ => return Err(broken()),
            }
        }
        Ok(())
    }

    fn put(&mut self, at: u64, sector: Logged) -> Result<()> {
        self.sectors.insert(at, sector);
        if self.sectors.len() > MOST_SECTORS {
            return Err(Error::unsupported(format!(
                "the log of the VHDX changes more than {} MiB: have it replayed by 'qemu-img check -r all'",
                MOST_SECTORS / 256
            )));
        }
        Ok(())
    }
}
