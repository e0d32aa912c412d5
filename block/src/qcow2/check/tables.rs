// SPDX-License-Identifier: Apache-2.0 OR MIT
//! L2 tables: each is read once, in the order in which they stand in the file, and counts as often as it is named.

use std::collections::BTreeMap;

use super::Check;
use crate::qcow2::entry::L2Entry;
use crate::{Error, Repair, Result};

/// Most different tables: what a map of them takes stays below 1 GiB.
const MOST_TABLES: usize = 1 << 24;
/// Tables that follow each other are read in pieces of this many bytes.
const PIECE: u64 = 1 << 20;
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
pub const COPIED: u64 = 1 << 63;
pub const ZERO: u64 = 1;
/// Bits of an entry that is not compressed that are reserved.
const RESERVED: u64 = 0x3f00_0000_0000_01fe;
const ALLOCATED: u64 = 0xffff_ffff;

/// How often a table is named.
#[derive(Clone, Copy, Debug, Default)]
pub struct Uses {
    /// By the active L1 table.
    pub active: u64,
    /// By any.
    pub all: u64,
}

/// L2 tables by host offset.
#[derive(Default)]
pub struct Tables(BTreeMap<u64, Uses>);

impl Tables {
    /// Notes that `times` L1 entries name the table at `offset`.
    ///
    /// # Errors
    /// `Unsupported` if there are too many.
    pub fn add(&mut self, offset: u64, times: u64, is_active: bool) -> Result<()> {
        if self.0.len() >= MOST_TABLES && !self.0.contains_key(&offset) {
            return Err(Error::unsupported(format!("the image has more than {MOST_TABLES} L2 tables")));
        }
        let uses = self.0.entry(offset).or_default();
        uses.all += times;
        uses.active += if is_active { times } else { 0 };
        Ok(())
    }
}

/// A table in memory.
pub struct Table<'a> {
    pub uses: Uses,
    /// Nothing else stands where it does, as far as was counted: it may be changed.
    pub is_alone: bool,
    pub bytes: &'a mut [u8],
    /// Bytes from the first to past the last that were changed.
    changed: Option<(usize, usize)>,
}

impl Table<'_> {
    /// Changes the word at byte `at`.
    pub fn put(&mut self, at: usize, word: u64) {
        self.bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
        let (start, end) = self.changed.unwrap_or((at, at + 8));
        self.changed = Some((start.min(at), end.max(at + 8)));
    }

    /// The word at byte `at`.
    pub fn word(&self, at: usize) -> u64 {
        self.bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |word| u64::from_be_bytes(*word))
    }
}

impl<'a> Check<'a> {
    /// Shows every table to `look`, and stores what that changes.
    pub(super) fn each_table(
        &mut self,
        look: &mut dyn FnMut(&mut Check<'a>, &mut Table<'_>) -> Result<()>,
    ) -> Result<()> {
        let size = self.rules.cluster_size();
        let tables = std::mem::take(&mut self.tables);
        let mut rest = tables.0.iter().peekable();
        let mut run: Vec<(u64, Uses)> = Vec::new();
        while let Some((&offset, &uses)) = rest.next() {
            run.push((offset, uses));
            let end = offset + size;
            let follows = rest.peek().is_some_and(|(next, _)| **next == end) && (run.len() as u64 + 1) * size <= PIECE;
            if follows {
                continue;
            }
            match self.bytes(run[0].0, run.len() as u64 * size) {
                Ok(mut bytes) => {
                    let pieces = bytes.chunks_mut(usize::try_from(size).unwrap_or(1));
                    for ((offset, uses), bytes) in run.drain(..).zip(pieces) {
                        let is_alone = self.is_alone(offset, uses.all);
                        let mut table = Table { uses, is_alone, bytes, changed: None };
                        look(self, &mut table)?;
                        if let Some((start, end)) = table.changed {
                            self.write(&table.bytes[start..end], offset + start as u64)?;
                        }
                    }
                }
                Err(e) => {
                    run.clear();
                    self.unreadable("an L2 table", &e);
                }
            }
        }
        self.tables = tables;
        Ok(())
    }

    /// Whether the cluster at `offset` holds a table that is named `times` times, and nothing else, as far as was counted.
    pub(super) fn is_alone(&self, offset: u64, times: u64) -> bool {
        offset.is_multiple_of(self.rules.cluster_size()) && self.counts.all(offset >> self.rules.cluster_bits) == times
    }

    /// Counts what every L2 table names.
    pub(super) fn l2_tables(&mut self) -> Result<()> {
        self.each_table(&mut Check::l2_table)?;
        // What was put right here is on disk before anything builds on it.
        if self.report.corruptions_fixed > 0 { self.flush() } else { Ok(()) }
    }

    fn l2_table(&mut self, table: &mut Table<'_>) -> Result<()> {
        let rules = self.rules;
        let entry_size = usize::try_from(rules.entry_words() * 8).unwrap_or(8);
        let mut next = 0;
        for at in (0..table.bytes.len()).step_by(entry_size) {
            let word = table.word(at);
            let bitmap = if rules.extended { table.word(at + 8) } else { 0 };
            let entry = L2Entry { word, bitmap };
            if entry.is_compressed() {
                self.compressed(table, at, entry)?;
            } else if word != 0 || bitmap != 0 {
                self.standard(table, at, entry, &mut next)?;
            }
        }
        Ok(())
    }

    fn compressed(&mut self, table: &mut Table<'_>, at: usize, entry: L2Entry) -> Result<()> {
        let Uses { all, active } = table.uses;
        if entry.is_exclusive() {
            let text = format!("coffset={:#x}: copied flag must never be set for compressed clusters", entry.word);
            if self.repair == Repair::All && table.is_alone {
                self.say(&format!("Repairing {text}"));
                self.report.corruptions_fixed += all;
                table.put(at, entry.word & !COPIED);
            } else {
                self.say(&format!("ERROR: {text}"));
                self.report.corruptions += all;
            }
        }
        let against = match (self.rules.external_data, entry.bitmap) {
            (true, _) => Some("with data file"),
            (false, 0) => None,
            (false, _) => Some("with non-zero subcluster allocation bitmap"),
        };
        if let Some(against) = against {
            self.report.corruptions += all;
            self.say(&format!("ERROR compressed cluster {against}, entry={:#x}", entry.word));
            return Ok(());
        }
        let (offset, len) = entry.compressed_range(self.rules.cluster_bits);
        self.count(offset, len, all)?;
        self.report.allocated_clusters += active;
        self.report.compressed_clusters += active;
        self.report.fragmented_clusters += active;
        Ok(())
    }

    /// `next` is where the next cluster would follow the one before.
    fn standard(&mut self, table: &mut Table<'_>, at: usize, entry: L2Entry, next: &mut u64) -> Result<()> {
        let L2Entry { word, bitmap } = entry;
        let rules = self.rules;
        let Uses { all, active } = table.uses;
        if word & RESERVED != 0 {
            self.report.corruptions += all;
            self.say(&format!("ERROR found l2 entry with reserved bits set: {word:x}"));
        }
        let offset = word & OFFSET;
        let is_zero = word & ZERO != 0 && !rules.extended;
        let has_place = offset != 0 || (rules.external_data && word & COPIED != 0 && !is_zero);
        if !has_place {
            if bitmap & ALLOCATED != 0 {
                self.report.corruptions += all;
                self.say("ERROR: Unallocated cluster has non-zero subcluster allocation map");
            }
            return Ok(());
        }
        if bitmap >> 32 & bitmap != 0 {
            self.report.corruptions += all;
            self.say(&format!(
                "ERROR offset={offset:x}: Allocated cluster with corrupted subcluster allocation bitmap"
            ));
        }
        self.report.allocated_clusters += active;
        if *next != 0 && offset != *next {
            self.report.fragmented_clusters += active;
        }
        *next = offset + rules.cluster_size();
        if offset.is_multiple_of(rules.cluster_size()) {
            // The way of nearly every entry.
            if rules.external_data {
                return Ok(());
            }
            if offset < self.len && self.counts.add(offset >> rules.cluster_bits, all)? == 0 {
                return Ok(());
            }
            return self.count_again(offset, all);
        }
        let has_data = if rules.extended { bitmap & ALLOCATED != 0 } else { !is_zero };
        if has_data {
            self.report.corruptions += all;
            self.say(&format!("ERROR offset={offset:x}: Data cluster is not properly aligned; L2 entry corrupted."));
        } else if self.repair == Repair::All && table.is_alone {
            self.say(&format!("Repairing offset={offset:x}: Preallocated cluster is not properly aligned"));
            self.report.corruptions_fixed += all;
            if rules.extended {
                table.put(at, 0);
            } else {
                table.put(at, ZERO);
            }
            return Ok(());
        } else {
            self.report.corruptions += all;
            self.say(&format!(
                "ERROR offset={offset:x}: Preallocated cluster is not properly aligned; L2 entry corrupted."
            ));
        }
        if rules.external_data { Ok(()) } else { self.count(offset, rules.cluster_size(), all) }
    }

    /// The slow way, with words, for a cluster whose count failed.
    fn count_again(&mut self, offset: u64, times: u64) -> Result<()> {
        if offset < self.len {
            self.report.corruptions += times;
            self.say(&format!("ERROR: overflow cluster offset={offset:#x}"));
            return Ok(());
        }
        self.count(offset, self.rules.cluster_size(), times)
    }
}
