// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From a guest offset to its entry, and entries changed: L1 table, L2 slices, and what of them is not on disk yet.

use std::io;

use rustix::io::Errno;

use super::Qcow2;
use super::entry::{Kind, L1Entry, L2Entry};
use super::meta::{Meta, Unnamed};
use super::places::Structure;
use super::refcounts::Refused;
use crate::{BlockNode, Wait};

/// A run of units of one kind, from the first unit asked for.
pub struct Run {
    pub kind: Kind,
    /// The entry of the first cluster.
    pub entry: L2Entry,
    pub units: u64,
}

/// What a run is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To read: [`Kind::Stored`] wherever there is data.
    Read,
    /// To write: [`Kind::Stored`] only where data may be overwritten in place.
    Overwrite,
}

impl Qcow2 {
    /// The run of units from `first` on (numbered over the whole disk), at most `most`, all within the slice of `first`.
    fn run(&self, word: &dyn Fn(usize) -> u64, first: u64, most: u64, purpose: Purpose) -> Run {
        let rules = self.rules;
        let per_cluster = rules.units_per_cluster();
        let in_slice = rules.slice_entries();
        let unit = |unit: u64| {
            let index = unit / per_cluster % in_slice * rules.entry_words();
            let at = |index: u64| word(usize::try_from(index).unwrap_or(usize::MAX));
            let bitmap = if rules.extended { at(index + 1) } else { 0 };
            let entry = L2Entry { word: at(index), bitmap };
            let kind = match entry.kind(unit % per_cluster, rules) {
                Kind::Stored(_) if purpose == Purpose::Overwrite && !entry.is_exclusive() => Kind::Unallocated,
                kind => kind,
            };
            (entry, kind)
        };
        let (entry, kind) = unit(first);
        let slice_end = (first / (per_cluster * in_slice) + 1) * per_cluster * in_slice;
        let end = slice_end.min(first.saturating_add(most));
        let start_cluster = first / per_cluster;
        let mut next = first + 1;
        while next < end {
            let continues = match (kind, unit(next).1) {
                (Kind::Stored(start), Kind::Stored(here)) => {
                    start.checked_add((next / per_cluster - start_cluster) << rules.cluster_bits) == Some(here)
                }
                // A compressed cluster is inflated by itself.
                (Kind::Compressed, Kind::Compressed) => next / per_cluster == start_cluster,
                (Kind::Zero, Kind::Zero) | (Kind::Unallocated, Kind::Unallocated) => true,
                _ => false,
            };
            if !continues {
                break;
            }
            next += 1;
        }
        Run { kind, entry, units: next - first }
    }

    /// The run at `offset`, from memory or from the file.
    pub fn look_up(&self, offset: u64, len: u64, wait: Wait, purpose: Purpose) -> io::Result<Run> {
        let rules = self.rules;
        let unit_bits = rules.unit_bits();
        let first = offset >> unit_bits;
        let most = ((offset + len - 1) >> unit_bits) - first + 1;
        let cluster = offset >> rules.cluster_bits;
        let l1_index = cluster / rules.l2_entries();
        if self.l1_entry(l1_index).offset() == 0 {
            let units_left = (l1_index + 1) * rules.l2_entries() * rules.units_per_cluster() - first;
            return Ok(Run { kind: Kind::Unallocated, entry: L2Entry::UNALLOCATED, units: most.min(units_left) });
        }
        let number = cluster / rules.slice_entries();
        if let Some(run) = self.slices.with(number, |word| self.run(word, first, most, purpose)) {
            return Ok(run);
        }
        let words = self.load(number, wait)?;
        Ok(self.run(&|index| words.get(index).copied().unwrap_or(0), first, most, purpose))
    }

    pub fn l1_entry(&self, index: u64) -> L1Entry {
        self.l1.get(usize::try_from(index).unwrap_or(usize::MAX))
    }

    /// Brings slice `number` into memory; its words.
    fn load(&self, number: u64, wait: Wait) -> io::Result<Vec<u64>> {
        loop {
            let written = {
                let meta = self.meta();
                if let Some(words) = changed(&meta, number) {
                    self.slices.fill(number, words);
                    return Ok(words.to_vec());
                }
                meta.written
            };
            let words = self.read_slice(number, wait)?;
            let mut meta = self.meta();
            if let Some(words) = changed(&meta, number) {
                self.slices.fill(number, words);
                return Ok(words.to_vec());
            }
            // Changed, written and gone again since: what was read may be older.
            if meta.written == written {
                self.check_places(&mut meta, &words)?;
                self.slices.fill(number, &words);
                return Ok(words);
            }
        }
    }

    fn read_slice(&self, number: u64, wait: Wait) -> io::Result<Vec<u64>> {
        let rules = self.rules;
        let table = self.l1_entry(number / rules.slices_per_table()).offset();
        if table == 0 {
            return Ok(vec![0; usize::try_from(rules.slice_words()).unwrap_or(0)]);
        }
        if !table.is_multiple_of(rules.cluster_size()) {
            let mut meta = self.meta();
            return Err(self.corrupt(&mut meta, format!("L2 table offset {table:#x} unaligned"), Some(table)));
        }
        read_words(&self.file, table + self.slice_in_table(number), rules.slice_words(), wait)
    }

    /// Offset in bytes of a slice in its table.
    pub fn slice_in_table(&self, number: u64) -> u64 {
        number % self.rules.slices_per_table() * self.rules.slice_words() * 8
    }

    /// The entry of a guest cluster.
    pub fn entry(&self, meta: &mut Meta, cluster: u64) -> io::Result<L2Entry> {
        let rules = self.rules;
        let number = cluster / rules.slice_entries();
        let at = usize::try_from(cluster % rules.slice_entries() * rules.entry_words()).unwrap_or(usize::MAX);
        let entry = |word: &dyn Fn(usize) -> u64| L2Entry {
            word: word(at),
            bitmap: if rules.extended { word(at + 1) } else { 0 },
        };
        if self.l1_entry(cluster / rules.l2_entries()).offset() == 0 {
            return Ok(L2Entry::UNALLOCATED);
        }
        if let Some(words) = changed(meta, number) {
            return Ok(entry(&|at| words.get(at).copied().unwrap_or(0)));
        }
        if let Some(entry) = self.slices.with(number, |word| entry(word)) {
            return Ok(entry);
        }
        let words = self.slice_words(meta, number)?;
        Ok(entry(&|at| words.get(at).copied().unwrap_or(0)))
    }

    /// The words of a slice, with the lock held: read from the file if need be.
    fn slice_words(&self, meta: &mut Meta, number: u64) -> io::Result<Vec<u64>> {
        if let Some(words) = changed(meta, number) {
            return Ok(words.to_vec());
        }
        let count = usize::try_from(self.rules.slice_words()).unwrap_or(0);
        if let Some(words) = self.slices.with(number, |word| (0..count).map(word).collect()) {
            return Ok(words);
        }
        let table = self.l1_entry(number / self.rules.slices_per_table()).offset();
        if !table.is_multiple_of(self.rules.cluster_size()) {
            return Err(self.corrupt(meta, format!("L2 table offset {table:#x} unaligned"), Some(table)));
        }
        let words = self.read_slice(number, Wait::Allowed)?;
        self.check_places(meta, &words)?;
        self.slices.fill(number, &words);
        Ok(words)
    }

    /// Changes the entry of a guest cluster. Its table is [writable](Qcow2::writable_table) already.
    pub fn set_entry(&self, meta: &mut Meta, cluster: u64, entry: L2Entry) -> io::Result<()> {
        let rules = self.rules;
        let number = cluster / rules.slice_entries();
        let at = usize::try_from(cluster % rules.slice_entries() * rules.entry_words()).unwrap_or(usize::MAX);
        if !meta.dirty.contains_key(&number) {
            let words = self.slice_words(meta, number)?;
            self.slices.fill(number, &words);
            meta.dirty.insert(number, words.into());
        }
        let words = meta.dirty.get_mut(&number).ok_or(Errno::IO)?;
        let changed = &[entry.word, entry.bitmap][..if rules.extended { 2 } else { 1 }];
        words.get_mut(at..at + changed.len()).ok_or(Errno::IO)?.copy_from_slice(changed);
        self.slices.update(number, at, changed);
        Ok(())
    }

    /// Sees to it that the L2 table of a guest cluster exists and belongs to the active image alone.
    pub fn writable_table(&self, meta: &mut Meta, cluster: u64) -> Result<(), Refused> {
        let rules = self.rules;
        let l1_index = cluster / rules.l2_entries();
        let old = self.l1_entry(l1_index);
        if old.offset() != 0 && old.is_exclusive() {
            return Ok(());
        }
        let first_slice = l1_index * rules.slices_per_table();
        let mut content = Vec::new();
        if old.offset() != 0 {
            for number in first_slice..first_slice + rules.slices_per_table() {
                content.extend(self.slice_words(meta, number)?);
            }
        }
        let counts = meta.refcounts.as_mut().ok_or(Errno::ROFS).map_err(io::Error::from)?;
        let room = counts.allocate(1)?;
        let written = if content.is_empty() && room.is_zero {
            Ok(())
        } else {
            content.resize(usize::try_from(rules.cluster_size() / 8).unwrap_or(0), 0);
            let bytes: Vec<u8> = content.iter().flat_map(|word| word.to_be_bytes()).collect();
            self.file.write_growing(&bytes, room.offset, false)
        };
        if let Err(e) = written {
            counts.drop_user(room.offset >> rules.cluster_bits)?;
            return Err(e.into());
        }
        let cluster = room.offset >> rules.cluster_bits;
        counts.metadata.add(cluster..cluster + 1, Structure::L2Table);
        let index = usize::try_from(l1_index).map_err(|_| io::Error::from(Errno::IO))?;
        let entry = L1Entry::exclusive(room.offset);
        self.l1.set(index, entry);
        meta.dirty_l1.insert(index, entry);
        if old.offset() != 0 {
            meta.unnamed.push(Unnamed::structure(old.offset(), rules.cluster_size(), Structure::L2Table));
        }
        Ok(())
    }

    /// Room in a row for a table, where nothing but metadata may stand from now on; its offset.
    pub fn table_room(&self, clusters: u64, kind: Structure) -> io::Result<u64> {
        self.with_room(|meta| {
            let counts = meta.refcounts.as_mut().ok_or(Errno::ROFS).map_err(io::Error::from)?;
            let room = counts.allocate_row(clusters)?;
            let first = room.offset >> self.rules.cluster_bits;
            counts.metadata.add(first..first + clusters, kind);
            Ok(room.offset)
        })
    }

    /// Writes a table in new room; its offset. Nobody names it yet.
    pub fn put_table(&self, bytes: &[u8], kind: Structure) -> io::Result<u64> {
        let size = self.rules.cluster_size();
        let clusters = (bytes.len() as u64).div_ceil(size).max(1);
        let place = self.table_room(clusters, kind)?;
        let mut padded = bytes.to_vec();
        padded.resize(usize::try_from(clusters * size).map_err(|_| Errno::FBIG)?, 0);
        self.file.write_growing(&padded, place, false)?;
        Ok(place)
    }

    /// Host bytes that the entry of guest cluster `cluster` names, to be let go.
    pub fn host_bytes(&self, entry: L2Entry, cluster: u64) -> Option<Unnamed> {
        if entry.is_compressed() {
            let (offset, len) = entry.compressed_range(self.rules.cluster_bits);
            return Some(Unnamed::data(offset, len));
        }
        let place = entry.place(self.rules)?;
        let stays_of = self.rules.external_data.then_some(cluster);
        Some(Unnamed { stays_of, ..Unnamed::data(place, self.rules.cluster_size()) })
    }

    /// No entry of a slice may name a place where metadata stands: a guest would write over it.
    fn check_places(&self, meta: &mut Meta, words: &[u64]) -> io::Result<()> {
        let Some(counts) = &meta.refcounts else { return Ok(()) };
        if self.rules.external_data {
            return Ok(());
        }
        let rules = self.rules;
        let entries = words.chunks(if rules.extended { 2 } else { 1 });
        let mut places = entries.filter_map(|entry| L2Entry { word: entry[0], bitmap: 0 }.place(rules));
        // Clusters that follow each other are asked for at once.
        let mut run = 0..0;
        let bad = loop {
            let next = places.next().map(|place| place >> rules.cluster_bits);
            if next == Some(run.end) {
                run.end += 1;
                continue;
            }
            if let Some((cluster, _)) = counts.metadata.first_in(run.clone()) {
                break Some(cluster);
            }
            let Some(next) = next else { break None };
            run = next..next + 1;
        };
        match bad {
            Some(cluster) => {
                let offset = cluster << rules.cluster_bits;
                Err(self.corrupt(meta, format!("an L2 entry names {offset:#x}, where metadata stands"), Some(offset)))
            }
            None => Ok(()),
        }
    }
}

/// `count` words of a table at byte `offset` of `file`, with zeroes past its end.
pub fn read_words(file: &BlockNode, offset: u64, count: u64, wait: Wait) -> io::Result<Vec<u64>> {
    let len = count.checked_mul(8).and_then(|bytes| usize::try_from(bytes).ok());
    let mut bytes = vec![0; len.ok_or(Errno::FBIG)?];
    file.read_or_zero(&mut bytes, offset, wait)?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word)).collect())
}

/// A slice that is not on disk yet.
fn changed(meta: &Meta, number: u64) -> Option<&[u64]> {
    meta.dirty.get(&number).map(|words| &**words).or_else(|| meta.writing.get(&number).map(|words| &**words))
}
