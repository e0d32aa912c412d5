// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A new refcount table with new blocks, where nothing stood that anybody names. The header names it when all of it is on disk;
//! until then the image is what it was.

use std::collections::BTreeMap;

use super::Check;
use super::counts::{CHUNK, Ones};
use crate::qcow2::header::{AT_REFCOUNT_ORDER, AT_REFCOUNT_TABLE, MAX_REFCOUNT_TABLE_BYTES};
use crate::qcow2::refcounts::set_count_at;
use crate::{Error, Result};

impl Check<'_> {
    /// Stores what was counted in a new structure, with 2^`order` bits to a count.
    pub(super) fn rebuild_refcounts(&mut self, order: u32) -> Result<()> {
        let (bits, size) = (self.rules.cluster_bits, self.rules.cluster_size());
        let per_block = (8 << bits) >> order;
        // New clusters come from those that nothing names, the old structure included: it counts until the header changes.
        let mut blocks: BTreeMap<u64, u64> = BTreeMap::new();
        let (mut table, mut table_clusters) = (0, 0);
        let mut free = 1;
        loop {
            let missing: Vec<u64> =
                self.counted_blocks(per_block).filter(|block| !blocks.contains_key(block)).collect();
            for block in &missing {
                free = self.give_out(free, 1)?;
                blocks.insert(*block, free << bits);
            }
            let entries = blocks.last_key_value().map_or(0, |(last, _)| last + 1);
            let needed = (entries * 8).div_ceil(size).max(1);
            if needed > table_clusters {
                for cluster in table >> bits..(table >> bits) + table_clusters {
                    self.counts.take(cluster);
                }
                if needed * size > MAX_REFCOUNT_TABLE_BYTES {
                    return Err(Error::unsupported("the image needs a refcount table of more than 8 MiB"));
                }
                // Room for what comes to be covered on the way.
                table_clusters = needed;
                table = self.give_out(1, table_clusters)? << bits;
            } else if missing.is_empty() {
                break;
            }
        }
        let old_table = self.header.refcount_table_offset >> bits;
        for cluster in old_table..old_table + u64::from(self.header.refcount_table_clusters) {
            self.counts.take(cluster);
        }
        for block in std::mem::take(&mut self.sound_blocks) {
            self.counts.take(block >> bits);
        }
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
        for (&index, &offset) in &blocks {
            bytes.fill(0);
            for at in 0..per_block {
                let count = self.counts.get(index * per_block + at);
                if count != 0 {
                    set_count_at(&mut bytes, at, order, count);
                }
            }
            self.write(&bytes, offset)?;
        }
        let mut entries = vec![0u8; usize::try_from(table_clusters * size).unwrap_or(0)];
        for (&index, &offset) in &blocks {
            let at = usize::try_from(index * 8).unwrap_or(usize::MAX);
            entries.get_mut(at..at + 8).unwrap_or_default().copy_from_slice(&offset.to_be_bytes());
        }
        self.write(&entries, table)?;
        self.flush()?;
        let mut field = table.to_be_bytes().to_vec();
        field.extend(u32::try_from(table_clusters).unwrap_or(u32::MAX).to_be_bytes());
        if order != self.header.refcount_order {
            // Table and width stand in one sector: a crash leaves the old structure or the new one.
            let from = AT_REFCOUNT_TABLE + field.len() as u64;
            field.extend(self.bytes(from, AT_REFCOUNT_ORDER - from).map_err(|e| Error::io("read the header", e))?);
            field.extend(order.to_be_bytes());
            self.header.refcount_order = order;
        }
        self.write(&field, AT_REFCOUNT_TABLE)?;
        self.flush()?;
        self.take_over(table, &entries);
        Ok(())
    }

    /// What is stored now is what was counted.
    fn take_over(&mut self, table: u64, entries: &[u8]) {
        let size = self.rules.cluster_size();
        self.header.refcount_table_offset = table;
        self.header.refcount_table_clusters = u32::try_from(entries.len() as u64 / size).unwrap_or(u32::MAX);
        self.blocks = super::words(entries).collect();
        self.len = self.file.len();
        self.clusters = self.len.div_ceil(size);
        self.end = self.clusters;
        self.ones = Ones::default();
        let mut cluster = 0;
        while cluster < self.clusters {
            if self.counts.is_blank(cluster) {
                cluster = (cluster / CHUNK + 1) * CHUNK;
                continue;
            }
            let count = self.counts.get(cluster);
            if count == 1 {
                self.ones.set(cluster);
            }
            if count > 0 {
                self.report.image_end_offset = (cluster + 1) * size;
            }
            cluster += 1;
        }
    }

    /// The blocks that cover a cluster with a count, by index.
    fn counted_blocks(&self, per_block: u64) -> impl Iterator<Item = u64> {
        let mut found = Vec::new();
        let mut cluster = 0;
        while cluster < self.counts.end() {
            if self.counts.is_blank(cluster) {
                cluster = (cluster / CHUNK + 1) * CHUNK;
            } else if self.counts.get(cluster) > 0 {
                found.push(cluster / per_block);
                cluster = (cluster / per_block + 1) * per_block;
            } else {
                cluster += 1;
            }
        }
        found.into_iter()
    }

    /// Counts the first free run of `clusters` clusters as used; the first of them.
    pub(super) fn give_out(&mut self, from: u64, clusters: u64) -> Result<u64> {
        let first = self.counts.free_row(from, clusters);
        let end = (first + clusters) << self.rules.cluster_bits;
        if !self.file.grows() && end > self.len {
            return Err(Error::io("repair the image", rustix::io::Errno::NOSPC.into()));
        }
        for cluster in first..first + clusters {
            self.counts.add(cluster, 1)?;
        }
        Ok(first)
    }
}
