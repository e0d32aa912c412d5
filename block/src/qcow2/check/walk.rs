// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Everything that names host clusters, from the header on, except what L2 tables name.

use std::collections::BTreeMap;

use super::{Check, words};
use crate::Result;
use crate::qcow2::rewrite::EXT_BITMAPS;

/// Bits of an L1 entry that are reserved.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of a refcount table entry that are reserved.
const BLOCK_RESERVED: u64 = 0x1ff;
/// Bits of a bitmap table entry that are reserved.
const BITMAP_RESERVED: u64 = 0xff00_0000_0000_01fe;
/// Most bytes of L1 tables that are read: they are all different, and no image needs so many.
const MOST_L1_BYTES: u64 = 1 << 30;
/// Most bytes of a snapshot table, of the extra data of one snapshot, and of a bitmap directory, as in QEMU.
const MOST_SNAPSHOT_BYTES: u64 = 64 << 20;
const MOST_EXTRA: u32 = 1024;
const MOST_DIRECTORY: u64 = 64 << 20;
/// Most entries of a bitmap's table, as in QEMU.
const MOST_BITMAP_ENTRIES: u32 = 0x800_0000;
/// Header extensions that name clusters.
const EXT_LUKS: u32 = 0x0537_be77;
/// The autoclear bit that says that the bitmaps are in step with the disk.
const BITMAPS: u64 = 1 << 0;

impl Check<'_> {
    /// Counts what everything names.
    pub(super) fn walk(&mut self) -> Result<()> {
        let size = self.rules.cluster_size();
        self.count(0, size, 1)?;
        let (offset, entries) = (self.header.l1_offset, self.header.l1_room);
        self.l1_table(offset, entries, 1, true)?;
        self.snapshots()?;
        let bytes = u64::from(self.header.refcount_table_clusters) * size;
        self.count(self.header.refcount_table_offset, bytes, 1)?;
        for (kind, data) in self.extensions()? {
            match (kind, data.len()) {
                (EXT_LUKS, 16) => self.count(be64(&data, 0), be64(&data, 8), 1)?,
                // Without the bit, somebody has written who knows nothing of bitmaps: what they were is of no use.
                (EXT_BITMAPS, 24) if self.header.autoclear & BITMAPS != 0 => {
                    self.bitmaps(be32(&data, 0), be64(&data, 8), be64(&data, 16))?;
                }
                _ => {}
            }
        }
        self.l2_tables()?;
        self.refcount_blocks()
    }

    /// Counts the clusters of some host bytes.
    pub(super) fn count(&mut self, offset: u64, len: u64, times: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let (bits, size) = (self.rules.cluster_bits, self.rules.cluster_size());
        // The last cluster of a file may be cut short.
        let end = offset.checked_add(len).filter(|&end| end < self.len.saturating_add(size));
        let Some(end) = end else {
            self.report.corruptions += times;
            self.say(&format!(
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset {offset:#x} \
                 size {len:#x}"
            ));
            return Ok(());
        };
        self.end = self.end.max(((end - 1) >> bits) + 1);
        for cluster in offset >> bits..=(end - 1) >> bits {
            let too_many = self.counts.add(cluster, times)?;
            if too_many > 0 {
                self.report.corruptions += too_many;
                self.say(&format!(
                    "ERROR: overflow cluster offset={:#x}: use amend to increase the refcount entry width, or convert to make a \
                     clean copy",
                    cluster << bits
                ));
            }
        }
        Ok(())
    }

    /// An L1 table that `times` headers or snapshots name.
    fn l1_table(&mut self, offset: u64, entries: u32, times: u64, is_active: bool) -> Result<()> {
        let len = u64::from(entries) * 8;
        self.count(offset, len, times)?;
        let table: Vec<u64> = match self.bytes(offset, len) {
            Ok(bytes) => words(&bytes).collect(),
            Err(e) => {
                self.unreadable("an L1 table", &e);
                return Ok(());
            }
        };
        for &entry in table.iter().filter(|&&entry| entry != 0) {
            if entry & L1_RESERVED != 0 {
                self.report.corruptions += times;
                self.say(&format!("ERROR found L1 entry with reserved bits set: {entry:x}"));
            }
            let l2 = entry & OFFSET;
            if l2 == 0 {
                self.report.corruptions += times;
                self.say(&format!("ERROR found L1 entry without a table: {entry:x}"));
                continue;
            }
            self.count(l2, self.rules.cluster_size(), times)?;
            if !l2.is_multiple_of(self.rules.cluster_size()) {
                self.report.corruptions += times;
                self.say(&format!("ERROR l2_offset={l2:x}: Table is not cluster aligned; L1 entry corrupted"));
            }
            if l2 < self.len {
                self.tables.add(l2, times, is_active)?;
            }
        }
        if is_active {
            self.l1 = table;
        }
        Ok(())
    }

    /// The snapshot table and the L1 tables that it names.
    fn snapshots(&mut self) -> Result<()> {
        let (start, count) = (self.header.snapshots_offset, self.header.snapshots);
        let mut at = start;
        // Snapshots may share a table.
        let mut l1_tables: BTreeMap<(u64, u32), u64> = BTreeMap::new();
        for index in 0..count {
            at = at.next_multiple_of(8);
            let entry = match self.bytes(at, 40) {
                Ok(entry) => entry,
                Err(e) => {
                    self.unreadable("the snapshot table", &e);
                    break;
                }
            };
            let extra = be32(&entry, 36);
            let names = u64::from(be16(&entry, 12)) + u64::from(be16(&entry, 14));
            if extra > MOST_EXTRA {
                self.corruption(&format!("ERROR snapshot {index}: {extra} bytes of extra metadata are too many"));
            } else if self.header.version > 2 && extra < 16 {
                self.corruption(&format!("ERROR snapshot {index} is incomplete: {extra} bytes of extra metadata"));
            }
            at += 40 + u64::from(extra) + names;
            if at - start > MOST_SNAPSHOT_BYTES || at > self.len {
                self.corruption(&format!("ERROR the snapshot table has no end: snapshot {index} of {count}"));
                self.incomplete = true;
                break;
            }
            *l1_tables.entry((be64(&entry, 0), be32(&entry, 8))).or_default() += 1;
        }
        let mut read = 0;
        for ((offset, entries), times) in l1_tables {
            let len = u64::from(entries) * 8;
            read += len;
            if !offset.is_multiple_of(self.rules.cluster_size()) {
                self.report.corruptions += times;
                self.say(&format!("ERROR snapshot l1_offset={offset:#x}: L1 table is not cluster aligned"));
                self.incomplete = true;
            } else if len > super::super::header::MAX_L1_BYTES || read > MOST_L1_BYTES {
                self.report.corruptions += times;
                self.say(&format!("ERROR snapshot L1 table too large: {entries} entries at {offset:#x}"));
                self.incomplete = true;
            } else {
                self.l1_table(offset, entries, times, false)?;
            }
        }
        self.count(start, if count == 0 { 0 } else { at - start }, 1)
    }

    /// The refcount blocks. One that cannot be followed, or where something else stands, means that all counts are lost.
    fn refcount_blocks(&mut self) -> Result<()> {
        let (bits, size) = (self.rules.cluster_bits, self.rules.cluster_size());
        let bytes = u64::from(self.header.refcount_table_clusters) * size;
        let table: Vec<u64> = match self.bytes(self.header.refcount_table_offset, bytes) {
            Ok(bytes) => words(&bytes).collect(),
            Err(e) => {
                self.unreadable("the refcount table", &e);
                return Ok(());
            }
        };
        self.blocks = table;
        for index in 0..self.blocks.len() {
            let block = self.blocks[index];
            let broken = if block & BLOCK_RESERVED != 0 {
                Some(format!("ERROR refcount table entry {index} has reserved bits set"))
            } else if !block.is_multiple_of(size) {
                Some(format!("ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted"))
            } else if block >> bits >= self.clusters && block != 0 {
                Some(format!("ERROR refcount block {index} is outside image"))
            } else {
                None
            };
            // Its counts are compared all the same, where they can be found.
            self.blocks[index] = block & !BLOCK_RESERVED;
            if let Some(text) = broken {
                self.broken_block(&text);
            } else if block != 0 {
                self.count(block, size, 1)?;
                self.sound_blocks.push(block);
                let count = self.counts.get(block >> bits);
                if count != 1 {
                    self.broken_block(&format!("ERROR refcount block {index} refcount={count}"));
                }
            }
        }
        Ok(())
    }

    fn broken_block(&mut self, text: &str) {
        self.corruption(text);
        self.wrong_counts += 1;
        self.rebuild = true;
    }

    /// The directory of persistent bitmaps, their tables and what these name.
    fn bitmaps(&mut self, count: u32, len: u64, offset: u64) -> Result<()> {
        self.count(offset, len, 1)?;
        if len > MOST_DIRECTORY {
            self.corruption(&format!("ERROR the bitmap directory is too large: {len} bytes"));
            self.incomplete = true;
            return Ok(());
        }
        let directory = match self.bytes(offset, len) {
            Ok(directory) => directory,
            Err(e) => {
                self.unreadable("the bitmap directory", &e);
                return Ok(());
            }
        };
        let mut rest = &directory[..];
        for index in 0..count {
            let whole = rest.get(..24).map(|entry| 24 + u64::from(be16(entry, 18)) + u64::from(be32(entry, 20)));
            let whole = whole.and_then(|len| usize::try_from(len.next_multiple_of(8)).ok());
            let Some((entry, after)) = whole.and_then(|len| rest.split_at_checked(len)) else {
                self.corruption(&format!("ERROR the bitmap directory ends in bitmap {index} of {count}"));
                self.incomplete = true;
                return Ok(());
            };
            rest = after;
            let (table, entries) = (be64(entry, 0), be32(entry, 8));
            if entries > MOST_BITMAP_ENTRIES || !table.is_multiple_of(self.rules.cluster_size()) {
                self.corruption(&format!("ERROR bitmap {index} has an invalid table: {entries} entries at {table:#x}"));
                self.incomplete = true;
                continue;
            }
            self.bitmap_table(index, table, u64::from(entries) * 8)?;
        }
        Ok(())
    }

    fn bitmap_table(&mut self, index: u32, offset: u64, len: u64) -> Result<()> {
        self.count(offset, len, 1)?;
        // Past the end of the file there is nothing to read.
        let end = offset.saturating_add(len).min(self.len);
        let mut at = offset;
        while at < end {
            let piece = (end - at).min(1 << 20);
            let bytes = match self.bytes(at, piece) {
                Ok(bytes) => bytes,
                Err(e) => {
                    self.unreadable("a bitmap's table", &e);
                    return Ok(());
                }
            };
            for entry in words(&bytes) {
                let place = entry & OFFSET;
                let is_bad = entry & BITMAP_RESERVED != 0
                    || (place != 0 && (entry & 1 == 1 || !place.is_multiple_of(self.rules.cluster_size())));
                if is_bad {
                    self.corruption(&format!("ERROR bitmap {index} has an invalid table entry: {entry:x}"));
                } else if place != 0 {
                    self.count(place, self.rules.cluster_size(), 1)?;
                }
            }
            at += piece;
        }
        Ok(())
    }

    /// The header's extensions, as far as they are whole: type and data.
    fn extensions(&mut self) -> Result<Vec<(u32, Vec<u8>)>> {
        let first = match self.bytes(0, self.rules.cluster_size()) {
            Ok(first) => first,
            Err(e) => {
                self.unreadable("the header", &e);
                return Ok(Vec::new());
            }
        };
        let length = if self.header.version == 2 { 72 } else { be32(&first, 100) };
        let end = match usize::try_from(be64(&first, 8)) {
            Ok(name) if 0 < name && name < first.len() => name,
            _ => first.len(),
        };
        let mut rest = first.get(length as usize..end).unwrap_or_default();
        let mut found = Vec::new();
        while let Some((head, after)) = rest.split_first_chunk::<8>() {
            let (kind, len) = (be32(head, 0), be32(head, 4) as usize);
            let Some(data) = after.get(..len).filter(|_| kind != 0) else { break };
            found.push((kind, data.to_vec()));
            rest = after.get(len.next_multiple_of(8)..).unwrap_or_default();
        }
        Ok(found)
    }
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from(be16(bytes, at)) << 16 | u32::from(be16(bytes, at + 2))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}
