// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Clusters that an entry calls zeroes (version 3) become clusters that version 2 knows, in every table, snapshots' included.
//!
//! ```text
//!  the entry's own cluster, if it has one      zeroes are written into it
//!  none or a shared one, over a backing file   a new cluster of zeroes
//!  none or a shared one, over nothing          not allocated, which reads the same
//! ```
//!
//! Zeroes are on disk first, then the counts of new clusters, then the entries: a crash leaves at most leaked clusters.

use super::Check;
use super::tables::{COPIED, OFFSET, Table, ZERO};
use crate::Result;
use crate::qcow2::entry::L2Entry;

/// What becomes of an entry.
enum Fate {
    /// It keeps its cluster, at this offset.
    Keeps(u64),
    /// It gets another cluster.
    Moves,
    /// It loses its cluster.
    Goes,
}

impl Check<'_> {
    /// Its image has standard entries, and was looked at and sound.
    pub(super) fn spell_out_zeroes(&mut self, is_backed: bool) -> Result<()> {
        let bits = self.rules.cluster_bits;
        let zeroes = vec![0; 1 << bits];
        let mut given: Vec<u64> = Vec::new();
        let mut free = 1;
        self.each_table(&mut |check, table| {
            for at in (0..table.bytes.len()).step_by(8) {
                match check.fate(table, at, is_backed) {
                    Some(Fate::Keeps(place)) => check.write(&zeroes, place)?,
                    Some(Fate::Moves) => {
                        free = check.give_out(free, 1)?;
                        check.counts.add(free, table.uses.all - 1)?;
                        check.write(&zeroes, free << bits)?;
                        given.push(free << bits);
                    }
                    Some(Fate::Goes) | None => {}
                }
            }
            Ok(())
        })?;
        self.flush()?;
        if !given.is_empty() {
            self.rebuild_refcounts(self.header.refcount_order)?;
        }
        let mut given = given.into_iter();
        self.each_table(&mut |check, table| {
            for at in (0..table.bytes.len()).step_by(8) {
                let word = table.word(at);
                match check.fate(table, at, is_backed) {
                    Some(Fate::Keeps(_)) => table.put(at, word & !ZERO),
                    Some(Fate::Moves) => {
                        let copied = if table.uses.all == 1 { COPIED } else { 0 };
                        table.put(at, given.next().map_or(word, |place| place | copied));
                    }
                    Some(Fate::Goes) => table.put(at, 0),
                    None => {}
                }
            }
            Ok(())
        })?;
        self.flush()
    }

    /// That of the entry at byte `at`; `None` if it is not one of zeroes. The same before and after others got clusters.
    fn fate(&self, table: &Table<'_>, at: usize, is_backed: bool) -> Option<Fate> {
        let word = table.word(at);
        let entry = L2Entry { word, bitmap: 0 };
        if entry.is_compressed() || word & ZERO == 0 {
            return None;
        }
        let place = word & OFFSET;
        Some(if place != 0 && self.counts.all(place >> self.rules.cluster_bits) == table.uses.all {
            Fate::Keeps(place)
        } else if is_backed {
            Fate::Moves
        } else {
            Fate::Goes
        })
    }
}
