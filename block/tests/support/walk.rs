// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A consistency walk over a qcow2 image in memory, from the specification and without the driver's code: every cluster is
//! counted at least as often as it is used, has one owner, and every table lies in the file.
#![allow(dead_code, clippy::cast_possible_truncation, reason = "each test takes what it needs")]

use std::collections::HashMap;

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

struct Walk<'a> {
    image: &'a [u8],
    bits: u32,
    external: bool,
    extended: bool,
    /// Uses of each cluster, and what it is used as.
    uses: HashMap<u64, (u64, &'static str)>,
}

/// Why `image` is damaged; leaked clusters are no damage.
pub fn walk(image: &[u8]) -> Result<(), String> {
    let u32_at = |at: usize| u32::from_be_bytes(image[at..at + 4].try_into().unwrap_or_default());
    let u64_at = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap_or_default());
    let version = u32_at(4);
    let (incompatible, order) = if version == 2 { (0, 4) } else { (u64_at(72), u32_at(96)) };
    if incompatible & 3 != 0 {
        return Err(format!("the image is marked: {incompatible:#x}"));
    }
    let mut walk = Walk {
        image,
        bits: u32_at(20),
        external: incompatible & 4 != 0,
        extended: incompatible & 16 != 0,
        uses: HashMap::new(),
    };
    let size = 1u64 << walk.bits;
    walk.take(0, 1, "header")?;
    let (table, table_clusters) = (u64_at(48), u64::from(u32_at(56)));
    walk.table(table, table_clusters * size, "refcount table")?;
    let blocks = walk.words(table, table_clusters * size / 8);
    for &block in blocks.iter().filter(|&&block| block != 0) {
        walk.table(block, size, "refcount block")?;
    }
    let (l1, l1_entries) = (u64_at(40), u64::from(u32_at(36)));
    walk.table(l1, l1_entries * 8, "L1 table")?;
    let active = walk.mapping(l1, l1_entries)?;
    let (mut at, snapshots) = (u64_at(64) as usize, u32_at(60));
    if snapshots > 0 {
        let start = at as u64;
        for _ in 0..snapshots {
            let (l1, entries) = (u64_at(at), u64::from(u32_at(at + 8)));
            walk.table(l1, entries * 8, "L1 table")?;
            walk.mapping(l1, entries)?;
            let text = |at: usize| u16::from_be_bytes([image[at], image[at + 1]]) as usize;
            at = (at + 40 + u32_at(at + 36) as usize + text(at + 12) + text(at + 14)).next_multiple_of(8);
        }
        walk.table(start, at as u64 - start, "snapshot table")?;
    }
    let per_block = (8 * size) >> order;
    let count = |cluster: u64| {
        let block = blocks.get((cluster / per_block) as usize).copied().unwrap_or(0);
        if block == 0 {
            return 0;
        }
        let block = &image[block as usize..(block + size) as usize];
        let bit = (cluster % per_block) << order;
        if order < 3 {
            return u64::from(block[(bit / 8) as usize] >> (bit % 8) & ((1u8 << (1 << order)) - 1));
        }
        let bytes = &block[(bit / 8) as usize..(bit / 8) as usize + (1 << (order - 3))];
        bytes.iter().fold(0, |count, &byte| count << 8 | u64::from(byte))
    };
    for (&cluster, &(uses, what)) in &walk.uses {
        if count(cluster) < uses {
            return Err(format!("cluster {cluster:#x} ({what}) is counted {}, used {uses} times", count(cluster)));
        }
    }
    for (cluster, copied, what) in active {
        if copied != (count(cluster) == 1) {
            return Err(format!("{what} {cluster:#x} is counted {}, its copied flag says {copied}", count(cluster)));
        }
    }
    Ok(())
}

impl Walk<'_> {
    /// Some clusters are used once more, as `what`.
    fn take(&mut self, offset: u64, bytes: u64, what: &'static str) -> Result<(), String> {
        for cluster in offset >> self.bits..(offset + bytes).div_ceil(1 << self.bits) {
            let (uses, before) = self.uses.entry(cluster).or_insert((0, what));
            let may_share = matches!(what, "L2 table" | "data" | "compressed data");
            if *uses > 0 && (*before != what || !may_share) {
                return Err(format!("cluster {cluster:#x} is used as {before} and as {what}"));
            }
            *uses += 1;
        }
        Ok(())
    }

    /// The same for a table, which must be aligned and lie in the file.
    fn table(&mut self, offset: u64, bytes: u64, what: &'static str) -> Result<(), String> {
        let end = offset.saturating_add(bytes);
        if !offset.is_multiple_of(1 << self.bits) || end > self.image.len() as u64 {
            return Err(format!("the {what} at {offset:#x} does not lie in the file of {:#x} bytes", self.image.len()));
        }
        self.take(offset, bytes, what)
    }

    fn words(&self, offset: u64, count: u64) -> Vec<u64> {
        let bytes = &self.image[offset as usize..(offset + count * 8) as usize];
        bytes.chunks_exact(8).map(|word| u64::from_be_bytes(word.try_into().unwrap_or_default())).collect()
    }

    /// What an L1 table leads to: cluster, copied flag, what it is.
    fn mapping(&mut self, l1: u64, entries: u64) -> Result<Vec<(u64, bool, &'static str)>, String> {
        let mut found = Vec::new();
        for entry in self.words(l1, entries) {
            let table = entry & OFFSET;
            if table == 0 {
                continue;
            }
            self.table(table, 1 << self.bits, "L2 table")?;
            found.push((table >> self.bits, entry & COPIED != 0, "L2 table"));
            for words in self.words(table, (1 << self.bits) / 8).chunks(if self.extended { 2 } else { 1 }) {
                let word = words[0];
                if word & COMPRESSED != 0 {
                    let shift = 62 - (self.bits - 8);
                    let offset = word & ((1 << shift) - 1);
                    let len = (((word & (COMPRESSED - 1)) >> shift) + 1) * 512 - offset % 512;
                    self.take(offset, len, "compressed data")?;
                    if word & COPIED != 0 {
                        return Err(format!("a compressed cluster at {offset:#x} is marked as copied"));
                    }
                    continue;
                }
                let data = word & OFFSET;
                if data != 0 && !self.external {
                    if !data.is_multiple_of(1 << self.bits) {
                        return Err(format!("an L2 entry names {data:#x}"));
                    }
                    self.take(data, 1, "data")?;
                    found.push((data >> self.bits, word & COPIED != 0, "data"));
                }
                if self.extended && words[1] & words[1] >> 32 & 0xffff_ffff != 0 {
                    return Err("a subcluster is data and zeroes".into());
                }
            }
        }
        Ok(found)
    }
}
