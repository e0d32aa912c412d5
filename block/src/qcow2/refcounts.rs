// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which host clusters are in use, and how often (qcow2.txt, "Host cluster management").
//!
//! The refcount table is in memory. Refcount blocks come in pages of at most 4 KiB and change in memory alone; [`flush`] writes
//! what has changed, in the order that a crash cannot hurt. So a count here runs ahead of the one on disk, never behind: a crash
//! leaks clusters, it loses none.
//!
//! Clusters are given out from the lowest free one on. Past the end of the file they are known to hold zeroes, which saves writing
//! them: [`Room::is_zero`].
//!
//! [`flush`]: super::flush

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use super::places::{Places, Structure};
use crate::{BlockNode, Wait};

/// Bytes in a page of a refcount block, unless a whole block is smaller.
const PAGE: u64 = 4096;
/// Pages without changes that are kept: 4 MiB.
const KEPT_PAGES: usize = 1024;
/// Host offsets are below this (L1 and L2 entries have 56 bits).
pub const MAX_OFFSET: u64 = 1 << 56;

pub struct Refcounts {
    pub file: Arc<BlockNode>,
    pub cluster_bits: u32,
    /// A count has 2^order bits.
    pub order: u32,
    /// Offset of the refcount block for each run of clusters; 0 is none.
    pub table: Vec<u64>,
    pub table_offset: u64,
    pages: HashMap<u64, Box<[u8]>>,
    pub dirty_pages: BTreeSet<u64>,
    /// Being written at the moment: what is on disk may be out of date.
    pub writing_pages: BTreeSet<u64>,
    pub dirty_table: BTreeSet<usize>,
    /// No cluster below is free.
    cursor: u64,
    /// Clusters from here on were never given out and lie past the end of the file: zeroes.
    virgin: u64,
    /// Where metadata stands, and nothing else may.
    pub metadata: Places,
}

/// A run of clusters, given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Of the first, in bytes.
    pub offset: u64,
    pub clusters: u64,
    /// Whether they are known to hold zeroes.
    pub is_zero: bool,
}

/// Why there is no room.
#[derive(Debug)]
pub enum Refused {
    /// Of the host, or no room at all.
    Io(io::Error),
    /// The refcount table must grow first.
    TableFull,
    /// Somebody is filling room for the same cluster: wait until that is done.
    Busy,
    /// The image breaks the rules: what is wrong and at which host offset.
    Corrupt(String, u64),
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Refused {
        Refused::Io(error)
    }
}

impl Refcounts {
    /// The counts of the image in `file`; `table` is what stands at `table_offset`.
    pub fn new(file: Arc<BlockNode>, cluster_bits: u32, order: u32, table: Vec<u64>, table_offset: u64) -> Refcounts {
        // Only files that grow have holes past their end. A device holds whatever was there.
        let virgin = if file.grows() { file.len().div_ceil(1 << cluster_bits) } else { u64::MAX };
        Refcounts {
            file,
            cluster_bits,
            order,
            table,
            table_offset,
            pages: HashMap::new(),
            dirty_pages: BTreeSet::new(),
            writing_pages: BTreeSet::new(),
            dirty_table: BTreeSet::new(),
            cursor: 0,
            virgin,
            metadata: Places::default(),
        }
    }

    /// Clusters that one refcount block covers.
    pub fn per_block(&self) -> u64 {
        (8 << self.cluster_bits) >> self.order
    }

    /// The largest count.
    pub fn most(&self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.order))
    }

    fn page_bytes(&self) -> u64 {
        PAGE.min(1 << self.cluster_bits)
    }

    /// Clusters that a page covers.
    fn per_page(&self) -> u64 {
        (self.page_bytes() * 8) >> self.order
    }

    /// Offset in the file of page `page`, if its block exists.
    pub fn page_offset(&self, page: u64) -> Option<u64> {
        let pages = (1 << self.cluster_bits) / self.page_bytes();
        self.block_of(page)?.checked_add(page % pages * self.page_bytes())
    }

    /// Offset of the block that page `page` is in, if it exists.
    fn block_of(&self, page: u64) -> Option<u64> {
        let pages = (1 << self.cluster_bits) / self.page_bytes();
        let block = usize::try_from(page / pages).ok().and_then(|index| self.table.get(index)).copied();
        block.filter(|&block| block != 0)
    }

    /// The content of a page that is in memory.
    pub fn page(&self, page: u64) -> Option<&[u8]> {
        self.pages.get(&page).map(|bytes| &**bytes)
    }

    fn load(&mut self, page: u64) -> Result<&mut Box<[u8]>, Refused> {
        if !self.pages.contains_key(&page) {
            let block = self.block_of(page).ok_or(Errno::IO).map_err(io::Error::from)?;
            if !block.is_multiple_of(1 << self.cluster_bits) || block >= MAX_OFFSET {
                return Err(Refused::Corrupt(format!("Refblock offset {block:#x} unaligned"), block));
            }
            let offset = self.page_offset(page).ok_or(Errno::IO).map_err(io::Error::from)?;
            let mut bytes = vec![0; usize::try_from(self.page_bytes()).unwrap_or(0)].into_boxed_slice();
            self.file.read_or_zero(&mut bytes, offset, Wait::Allowed)?;
            if self.pages.len() >= KEPT_PAGES + self.dirty_pages.len() + self.writing_pages.len() {
                let (dirty, writing) = (&self.dirty_pages, &self.writing_pages);
                self.pages.retain(|page, _| dirty.contains(page) || writing.contains(page));
            }
            self.pages.insert(page, bytes);
        }
        self.pages.get_mut(&page).ok_or_else(|| io::Error::from(Errno::IO).into())
    }

    fn block_exists(&self, cluster: u64) -> bool {
        let index = usize::try_from(cluster / self.per_block()).ok();
        index.and_then(|index| self.table.get(index)).is_some_and(|&block| block != 0)
    }

    /// How often `cluster` is in use.
    ///
    /// # Errors
    /// Those of reading, or broken tables.
    pub fn get(&mut self, cluster: u64) -> Result<u64, Refused> {
        if !self.block_exists(cluster) {
            return Ok(0);
        }
        let (page, at, order) = (cluster / self.per_page(), cluster % self.per_page(), self.order);
        Ok(count_at(self.load(page)?, at, order))
    }

    fn set(&mut self, cluster: u64, count: u64) -> Result<(), Refused> {
        let (page, at, order) = (cluster / self.per_page(), cluster % self.per_page(), self.order);
        set_count_at(self.load(page)?, at, order, count);
        self.dirty_pages.insert(page);
        Ok(())
    }

    /// One more user of a cluster in use.
    ///
    /// # Errors
    /// `EINVAL` if the count cannot be larger: the caller takes another way.
    pub fn add_user(&mut self, cluster: u64) -> Result<(), Refused> {
        let count = self.get(cluster)?;
        if count == 0 {
            return Err(Refused::Corrupt("a cluster in use is counted as free".into(), cluster << self.cluster_bits));
        }
        if count == self.most() {
            return Err(io::Error::from(Errno::INVAL).into());
        }
        self.set(cluster, count + 1)
    }

    /// One user of a cluster less; how many are left. A cluster without users may be given out at once.
    ///
    /// # Errors
    /// Those of reading, or broken tables.
    pub fn drop_user(&mut self, cluster: u64) -> Result<u64, Refused> {
        let count = self.get(cluster)?;
        let Some(left) = count.checked_sub(1) else {
            return Err(Refused::Corrupt("a cluster in use is counted as free".into(), cluster << self.cluster_bits));
        };
        self.set(cluster, left)?;
        if left == 0 {
            self.cursor = self.cursor.min(cluster);
            self.metadata.remove(cluster);
        }
        Ok(left)
    }

    /// Gives out at least one and at most `most` clusters in a row.
    ///
    /// # Errors
    /// `ENOSPC` if the file cannot hold more; see [`Refused`].
    pub fn allocate(&mut self, most: u64) -> Result<Room, Refused> {
        let first = self.next_free(self.cursor)?;
        let mut clusters = 1;
        while clusters < most && self.block_exists(first + clusters) && self.get(first + clusters)? == 0 {
            clusters += 1;
        }
        self.give_out(first, clusters)
    }

    /// Gives out exactly `clusters` clusters in a row.
    ///
    /// # Errors
    /// As [`Refcounts::allocate`].
    pub fn allocate_row(&mut self, clusters: u64) -> Result<Room, Refused> {
        let mut from = self.cursor;
        loop {
            let first = self.next_free(from)?;
            let mut found = 1;
            while found < clusters && self.next_free(first + found)? == first + found {
                found += 1;
            }
            if found == clusters {
                let cursor = self.cursor;
                let room = self.give_out(first, clusters)?;
                // What lies below may still be free.
                self.cursor = if first == cursor { self.cursor } else { cursor };
                return Ok(room);
            }
            from = first + found;
        }
    }

    /// Gives out the cluster behind `cluster` if it is free.
    ///
    /// # Errors
    /// As [`Refcounts::allocate`].
    pub fn allocate_at(&mut self, cluster: u64) -> Result<Option<Room>, Refused> {
        if self.next_free(cluster)? != cluster {
            return Ok(None);
        }
        let cursor = self.cursor;
        let room = self.give_out(cluster, 1)?;
        self.cursor = if cluster == cursor { self.cursor } else { cursor };
        Ok(Some(room))
    }

    fn give_out(&mut self, first: u64, clusters: u64) -> Result<Room, Refused> {
        let end = (first + clusters).checked_mul(1 << self.cluster_bits).filter(|&end| end <= MAX_OFFSET);
        let Some(end) = end else { return Err(io::Error::from(Errno::FBIG).into()) };
        if !self.file.grows() && end > self.file.len() {
            return Err(io::Error::from(Errno::NOSPC).into());
        }
        for cluster in first..first + clusters {
            if let Some(found) = self.metadata.at(cluster).or((cluster == 0).then_some(Structure::Header)) {
                let text = format!("the {} stands in a cluster that is counted as free", found.name());
                return Err(Refused::Corrupt(text, cluster << self.cluster_bits));
            }
            self.set(cluster, 1)?;
        }
        let is_zero = first >= self.virgin;
        self.virgin = self.virgin.max(if self.virgin == u64::MAX { 0 } else { first + clusters });
        self.cursor = first + clusters;
        Ok(Room { offset: first << self.cluster_bits, clusters, is_zero })
    }

    /// The first free cluster from `from` on; its refcount block exists.
    fn next_free(&mut self, from: u64) -> Result<u64, Refused> {
        let mut cluster = from;
        loop {
            if !self.block_exists(cluster) {
                if usize::try_from(cluster / self.per_block()).is_ok_and(|index| index >= self.table.len()) {
                    return Err(Refused::TableFull);
                }
                self.add_block(cluster)?;
            }
            let (page, at, order) = (cluster / self.per_page(), cluster % self.per_page(), self.order);
            let (per_page, bytes) = (self.per_page(), self.load(page)?);
            match (at..per_page).find(|&at| count_at(bytes, at, order) == 0) {
                Some(found) => return Ok(page * per_page + found),
                None => cluster = (page + 1) * per_page,
            }
        }
    }

    /// Makes the refcount block that covers `cluster`, in `cluster` itself.
    fn add_block(&mut self, cluster: u64) -> Result<(), Refused> {
        let (offset, size) = (cluster << self.cluster_bits, 1u64 << self.cluster_bits);
        if cluster == 0 {
            return Err(Refused::Corrupt("the header's cluster is counted as free".into(), 0));
        }
        if cluster < self.virgin {
            self.file.write_growing(&vec![0; usize::try_from(size).unwrap_or(0)], offset, false)?;
        }
        let Ok(index) = usize::try_from(cluster / self.per_block()) else { return Err(Refused::TableFull) };
        self.table[index] = offset;
        match self.give_out(cluster, 1) {
            Ok(_) => {
                self.dirty_table.insert(index);
                self.metadata.add(cluster..cluster + 1, Structure::RefcountBlock);
                Ok(())
            }
            Err(e) => {
                self.table[index] = 0;
                Err(e)
            }
        }
    }

    /// Where the file must end at least so that everything given out lies within it.
    pub fn end(&self) -> u64 {
        if self.virgin == u64::MAX { 0 } else { self.virgin << self.cluster_bits }
    }

    /// Takes another table in use, which covers more.
    pub fn replace_table(&mut self, table: Vec<u64>, offset: u64, new_end: u64) {
        self.table = table;
        self.table_offset = offset;
        self.virgin = self.virgin.max(if self.virgin == u64::MAX { 0 } else { new_end >> self.cluster_bits });
    }
}

/// The count at index `at` of a page (qcow2.txt, "Host cluster management": narrow counts fill a byte from its low bits).
pub fn count_at(page: &[u8], at: u64, order: u32) -> u64 {
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    if order < 3 {
        let per_byte = 8 >> order;
        let mask = (1u8 << (1 << order)) - 1;
        return u64::from(page[at / per_byte] >> ((at % per_byte) << order) & mask);
    }
    let width = 1 << (order - 3);
    page[at * width..(at + 1) * width].iter().fold(0, |count, &byte| count << 8 | u64::from(byte))
}

/// Changes the count at index `at` of a page; `count` fits.
pub fn set_count_at(page: &mut [u8], at: u64, order: u32, count: u64) {
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    if order < 3 {
        let per_byte = 8 >> order;
        let shift = (at % per_byte) << order;
        let mask = (1u8 << (1 << order)) - 1;
        let byte = &mut page[at / per_byte];
        *byte = *byte & !(mask << shift) | u8::try_from(count).unwrap_or(mask) << shift;
        return;
    }
    let width = 1 << (order - 3);
    page[at * width..(at + 1) * width].copy_from_slice(&count.to_be_bytes()[8 - width..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_are_read_as_they_were_written() {
        for order in 0..=6 {
            let most = u64::MAX >> (64 - (1u32 << order));
            let mut page = vec![0; 64];
            let counts = 512 >> order;
            let count = |at: u64| at.wrapping_mul(0x9e37_79b9_7f4a_7c15) & most;
            for at in 0..counts {
                set_count_at(&mut page, at, order, count(at));
            }
            for at in 0..counts {
                assert_eq!(count_at(&page, at, order), count(at), "order {order}, index {at}");
            }
        }
    }

    #[test]
    fn narrow_counts_fill_a_byte_from_its_low_bits() {
        let mut page = [0; 2];
        set_count_at(&mut page, 1, 0, 1);
        set_count_at(&mut page, 3, 2, 5);
        assert_eq!(page, [0b10, 0x50]);
    }
}
