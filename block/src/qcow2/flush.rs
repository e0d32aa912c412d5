// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From memory to disk, in the order that keeps the promise: after a crash at any moment everything flushed is there, and
//! nothing in the image names a cluster that is not its own. Leaked clusters are all that a crash can leave.
//!
//! ```text
//!  1  data (written by the requests themselves), refcount pages, room at the end of the file        then: fdatasync
//!     (new refcount blocks are on disk before the refcount table names them: one fdatasync more, seldom)
//!  2  L2 slices and L1 entries                                                                      then: fdatasync
//!  3  what no mapping names any more may be given back: counts go down in memory, for the next time
//! ```
//!
//! A new L2 table is initialised before step 1, so in step 2 its slices and the L1 entry that names it need no order. A write in
//! step 2 may tear between sectors: an entry never lies in two.
//!
//! What is given back waits for two turns of the [gate](crate::gate) more, until no request is under way that saw the old mapping.
//! Counts that are too high after a crash are leaks.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use rustix::io::Errno;

use super::Qcow2;
use super::entry::{Kind, L1Entry};
use super::meta::{Meta, Unnamed};
use super::places::Structure;
use crate::{BlockNode, Preallocation};

/// What one round writes: a consistent picture of a moment.
struct Round {
    /// Host offset and bytes.
    pages: Vec<(u64, u64, Box<[u8]>)>,
    /// Refcount table: index and entry.
    blocks: Vec<(usize, u64)>,
    table_offset: u64,
    /// Number, host offset and words.
    slices: Vec<(u64, u64, Arc<[u64]>)>,
    l1: BTreeMap<usize, L1Entry>,
    unnamed: Vec<Unnamed>,
}

impl Qcow2 {
    /// Everything acknowledged is on stable storage on return. Callers at the same time share the work.
    pub fn flush_all(&self) -> io::Result<()> {
        self.flushes.run(|| self.write_back())
    }

    /// Writes what has changed, with data first. One at a time.
    pub fn write_back(&self) -> io::Result<()> {
        let _order = self.writing_back.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.write_round()
    }

    /// The same when nobody has written data since the last time: what is clean is left alone.
    pub fn write_rest(&self) -> io::Result<()> {
        let _order = self.writing_back.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.begin_round()?.map_or(Ok(()), |round| self.end_round(round))
    }

    fn write_round(&self) -> io::Result<()> {
        match self.begin_round()? {
            Some(round) => self.end_round(round),
            None => self.flush_data(),
        }
    }

    fn end_round(&self, round: Round) -> io::Result<()> {
        let outcome = self.write(&round);
        let mut meta = self.meta();
        meta.round = false;
        if let Some(counts) = &mut meta.refcounts {
            counts.writing_pages.clear();
        }
        match outcome {
            Ok(()) => {
                meta.writing.clear();
                meta.written += 1;
                let turns = self.gate.turns();
                if !round.unnamed.is_empty() {
                    meta.limbo.push((turns, round.unnamed));
                }
                drop(meta);
                self.give_back()
            }
            Err(e) => {
                undo(&mut meta, round);
                Err(e)
            }
        }
    }

    fn flush_data(&self) -> io::Result<()> {
        self.data.flush()?;
        if self.rules.external_data { self.file.flush() } else { Ok(()) }
    }

    /// Takes a picture of what has changed; `None` if nothing has.
    fn begin_round(&self) -> io::Result<Option<Round>> {
        self.give_back()?;
        let mut meta = self.meta();
        if meta.is_clean() {
            return Ok(None);
        }
        // What memory says is not to be trusted any more.
        if meta.corrupt {
            return Err(Errno::IO.into());
        }
        let counts = meta.refcounts.as_ref().ok_or(Errno::ROFS)?;
        // Under the lock nobody gets room behind what counts as the end now: this cuts nothing off that is being written.
        if self.file.len() < counts.end() {
            self.file.resize(counts.end(), Preallocation::Off).map_err(crate::Error::into_io)?;
        }
        meta.round = true;
        let dirty = std::mem::take(&mut meta.dirty);
        let mut slices = Vec::with_capacity(dirty.len());
        for (number, words) in dirty {
            let words: Arc<[u64]> = words.into();
            let table = self.l1_entry(number / self.rules.slices_per_table()).offset();
            slices.push((number, table + self.slice_in_table(number), Arc::clone(&words)));
            meta.writing.insert(number, words);
        }
        // Runs on disk in one direction.
        slices.sort_by_key(|(_, offset, _)| *offset);
        let (l1, unnamed) = (std::mem::take(&mut meta.dirty_l1), std::mem::take(&mut meta.unnamed));
        let counts = meta.refcounts.as_mut().ok_or(Errno::ROFS)?;
        counts.writing_pages = std::mem::take(&mut counts.dirty_pages);
        let pages = counts
            .writing_pages
            .iter()
            .filter_map(|&page| Some((page, counts.page_offset(page)?, counts.page(page)?.to_vec().into_boxed_slice())))
            .collect();
        let dirty_table = std::mem::take(&mut counts.dirty_table);
        let blocks = dirty_table.into_iter().map(|index| (index, counts.table[index])).collect();
        let table_offset = counts.table_offset;
        let round = Round { pages, blocks, table_offset, slices, l1, unnamed };
        match self.overlap(&meta, &round) {
            None => Ok(Some(round)),
            Some((kind, offset)) => {
                undo(&mut meta, round);
                meta.round = false;
                let text = format!("a {} was to be written at {offset:#x}, where none stands", kind.name());
                Err(self.corrupt(&mut meta, text, Some(offset)))
            }
        }
    }

    /// The first place of a round where something else stands than what is written.
    fn overlap(&self, meta: &Meta, round: &Round) -> Option<(Structure, u64)> {
        let metadata = &meta.refcounts.as_ref()?.metadata;
        let bits = self.rules.cluster_bits;
        let l1_offset = self.l1_offset.load(std::sync::atomic::Ordering::Relaxed);
        let pages = round.pages.iter().map(|(_, offset, _)| (Structure::RefcountBlock, *offset));
        let blocks = round.blocks.iter();
        let blocks = blocks.map(|(index, _)| (Structure::RefcountTable, round.table_offset + *index as u64 * 8));
        let slices = round.slices.iter().map(|(_, offset, _)| (Structure::L2Table, *offset));
        let l1 = round.l1.keys().map(|index| (Structure::L1Table, l1_offset + *index as u64 * 8));
        let mut all = pages.chain(blocks).chain(slices).chain(l1);
        all.find(|(kind, offset)| metadata.at(offset >> bits) != Some(*kind))
    }

    fn write(&self, round: &Round) -> io::Result<()> {
        for (_, offset, bytes) in &round.pages {
            self.file.write_growing(bytes, *offset, false)?;
        }
        if !round.blocks.is_empty() {
            self.file.flush()?;
            for &(index, block) in &round.blocks {
                self.file.write_growing(&block.to_be_bytes(), round.table_offset + index as u64 * 8, false)?;
            }
        }
        self.flush_data()?;
        if round.slices.is_empty() && round.l1.is_empty() {
            return Ok(());
        }
        for (_, offset, words) in &round.slices {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
            self.file.write_growing(&bytes, *offset, false)?;
        }
        let l1_offset = self.l1_offset.load(std::sync::atomic::Ordering::Relaxed);
        for (&index, entry) in &round.l1 {
            self.file.write_growing(&entry.0.to_be_bytes(), l1_offset + index as u64 * 8, false)?;
        }
        self.file.flush()
    }

    /// Gives back what no request can see any more. One at a time: it stands in the order of rounds.
    fn give_back(&self) -> io::Result<()> {
        let over = self.take_over();
        // The host's room goes first, without the lock: as long as a cluster is counted nobody else gets it.
        for range in self.last_used(&over)? {
            self.discard_host(&self.file, range.start, range.end - range.start);
        }
        for unnamed in over {
            self.release(&mut self.meta(), unnamed)?;
        }
        Ok(())
    }

    /// What has waited for two turns of the gate.
    fn take_over(&self) -> Vec<Unnamed> {
        let mut meta = self.meta();
        if meta.corrupt {
            return Vec::new();
        }
        while meta.limbo.iter().any(|(since, _)| self.gate.turns() < since + 2) && self.gate.turn() {}
        let turns = self.gate.turns();
        let (over, waiting): (Vec<_>, _) =
            std::mem::take(&mut meta.limbo).into_iter().partition(|(since, _)| turns >= since + 2);
        meta.limbo = waiting;
        over.into_iter().flat_map(|(_, unnamed)| unnamed).collect()
    }

    /// The clusters among `unnamed` that have no other user, in runs of bytes.
    fn last_used(&self, unnamed: &[Unnamed]) -> io::Result<Vec<Range<u64>>> {
        let size = self.rules.cluster_size();
        let mut places: Vec<u64> = unnamed
            .iter()
            .filter(|unnamed| unnamed.stays_of.is_none() && unnamed.offset.is_multiple_of(size))
            .flat_map(|unnamed| {
                (unnamed.offset..unnamed.offset + unnamed.len / size * size).step_by(1 << self.rules.cluster_bits)
            })
            .collect();
        places.sort_unstable();
        let mut runs: Vec<Range<u64>> = Vec::new();
        for place in places {
            let mut meta = self.meta();
            let Some(counts) = &mut meta.refcounts else { return Ok(runs) };
            match counts.get(place >> self.rules.cluster_bits) {
                Ok(1) => match runs.last_mut() {
                    Some(run) if run.end == place => run.end += size,
                    _ => runs.push(place..place + size),
                },
                Ok(_) => {}
                Err(refused) => return Err(self.refusal(&mut meta, refused)),
            }
        }
        Ok(runs)
    }

    /// One user less for the clusters of some host bytes.
    fn release(&self, meta: &mut Meta, unnamed: Unnamed) -> io::Result<()> {
        let bits = self.rules.cluster_bits;
        let Unnamed { offset, len, stays_of, of } = unnamed;
        if let Some(cluster) = stays_of {
            // Somebody may have written there again.
            let entry = self.entry(meta, cluster)?;
            let is_unused = meta.check_flights(cluster).is_ok()
                && (0..self.rules.units_per_cluster())
                    .all(|unit| matches!(entry.kind(unit, self.rules), Kind::Zero | Kind::Unallocated));
            if is_unused {
                self.discard_host(&self.data, offset, len);
            }
            return Ok(());
        }
        for cluster in offset >> bits..=(offset + len - 1) >> bits {
            if meta.refcounts.is_none() {
                return Ok(());
            }
            self.drop_user(meta, cluster, of)?;
        }
        Ok(())
    }

    /// Whether a structure of kind `of`, or a guest's data if `None`, can stand in `cluster`.
    ///
    /// # Errors
    /// Something else stands there: the image is damaged.
    pub fn check_place(&self, meta: &mut Meta, cluster: u64, of: Option<Structure>) -> io::Result<()> {
        let counts = meta.refcounts.as_ref().ok_or(Errno::ROFS)?;
        if counts.metadata.lets_go(cluster, of) {
            return Ok(());
        }
        let found = counts.metadata.at(cluster).map_or("metadata", Structure::name);
        let (what, offset) = (of.map_or("a guest's data", Structure::name), cluster << self.rules.cluster_bits);
        Err(self.corrupt(meta, format!("{what} at {offset:#x}, where the {found} stands"), Some(offset)))
    }

    /// One user of a host cluster less, which held a structure of kind `of`, or a guest's data; how many are left. Nothing more is
    /// packed into a cluster that has none.
    pub fn drop_user(&self, meta: &mut Meta, cluster: u64, of: Option<Structure>) -> io::Result<u64> {
        self.check_place(meta, cluster, of)?;
        let counts = meta.refcounts.as_mut().ok_or(Errno::ROFS)?;
        match counts.drop_user(cluster) {
            Ok(left) => {
                if left == 0 && meta.compressed_end.is_some_and(|end| end >> self.rules.cluster_bits == cluster) {
                    meta.compressed_end = None;
                }
                Ok(left)
            }
            Err(refused) => Err(self.refusal(meta, refused)),
        }
    }

    /// A hint to the node below, which decides whether it gives room back.
    pub fn discard_host(&self, node: &BlockNode, offset: u64, len: u64) {
        let there = node.len().saturating_sub(offset).min(len);
        if there > 0
            && let Err(e) = node.discard(offset, there)
        {
            tracing::debug!(node = self.node_name, offset, "discard: {e}");
        }
    }

    /// Lets the header name another table; `before` is what stands there.
    ///
    /// # Errors
    /// Then `before` stands there as ever, or nothing is written any more.
    pub fn switch(&self, meta: &mut Meta, at: u64, field: &[u8], before: &[u8]) -> io::Result<()> {
        let put = |field: &[u8]| self.file.write(field, at, false).and_then(|()| self.file.flush());
        let Err(e) = put(field) else { return Ok(()) };
        if put(before).is_err() {
            // Nobody knows which table counts: what is written from now on could be lost.
            self.give_up(meta);
        }
        Err(e)
    }

    /// Makes the refcount table large enough for what comes next: twice what it is, written whole in a new place.
    pub fn grow_refcount_table(&self) -> io::Result<()> {
        let _order = self.writing_back.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // The new table names only blocks that are on disk.
        self.write_round()?;
        let mut meta = self.meta();
        let bits = self.rules.cluster_bits;
        let size = self.rules.cluster_size();
        let counts = meta.refcounts.as_mut().ok_or(Errno::ROFS)?;
        if !counts.dirty_pages.is_empty() || !counts.dirty_table.is_empty() {
            // Somebody allocated in between: the next try finds less to do.
            return Ok(());
        }
        let old_len = counts.table.len() as u64;
        let per_block = counts.per_block();
        let first = old_len * per_block;
        // Table and blocks stand at the start of what only the new table covers; each needs the other to be large enough.
        let (mut table_clusters, mut blocks) = (1, 1);
        loop {
            let entries = (old_len + old_len / 2).max(old_len + blocks + 1);
            let (more_table, more_blocks) =
                ((entries * 8).div_ceil(size), (table_clusters + blocks).div_ceil(per_block));
            if more_table <= table_clusters && more_blocks <= blocks {
                break;
            }
            (table_clusters, blocks) = (more_table.max(table_clusters), more_blocks.max(blocks));
        }
        if table_clusters * size > super::header::MAX_REFCOUNT_TABLE_BYTES {
            return Err(Errno::FBIG.into());
        }
        let (table_offset, end) = ((first + blocks) << bits, (first + blocks + table_clusters) << bits);
        let mut table = counts.table.clone();
        table.resize(usize::try_from(table_clusters * size / 8).unwrap_or(0), 0);
        let order = counts.order;
        let mut block = vec![0; usize::try_from(blocks * size).unwrap_or(0)];
        for at in 0..blocks + table_clusters {
            super::refcounts::set_count_at(&mut block, at, order, 1);
        }
        for at in 0..blocks {
            table[usize::try_from(old_len + at).unwrap_or(usize::MAX)] = (first + at) << bits;
        }
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        self.file.write_growing(&block, first << bits, false)?;
        self.file.write_growing(&bytes, table_offset, false)?;
        self.file.flush()?;
        let field = |offset: u64, clusters: u64| {
            let clusters = u32::try_from(clusters).unwrap_or(u32::MAX).to_be_bytes();
            [&offset.to_be_bytes()[..], &clusters].concat()
        };
        let before = field(counts.table_offset, (old_len * 8).div_ceil(size));
        self.switch(&mut meta, super::header::AT_REFCOUNT_TABLE, &field(table_offset, table_clusters), &before)?;
        let counts = meta.refcounts.as_mut().ok_or(Errno::ROFS)?;
        let old_len = (old_len * 8).next_multiple_of(size);
        let old = Unnamed::structure(counts.table_offset, old_len, Structure::RefcountTable);
        counts.replace_table(table, table_offset, end);
        counts.metadata.add(first..first + blocks, Structure::RefcountBlock);
        counts.metadata.add(first + blocks..first + blocks + table_clusters, Structure::RefcountTable);
        meta.unnamed.push(old);
        Ok(())
    }
}

/// Takes a round that failed back: what it was to write is to be written.
fn undo(meta: &mut Meta, round: Round) {
    meta.writing.clear();
    meta.written += 1;
    for (number, _, words) in round.slices {
        meta.dirty.entry(number).or_insert_with(|| words.to_vec().into());
    }
    for (index, entry) in round.l1 {
        meta.dirty_l1.entry(index).or_insert(entry);
    }
    meta.unnamed.extend(round.unnamed);
    if let Some(counts) = &mut meta.refcounts {
        counts.dirty_pages.extend(round.pages.iter().map(|(page, ..)| page));
        counts.dirty_table.extend(round.blocks.iter().map(|(index, _)| index));
    }
}
