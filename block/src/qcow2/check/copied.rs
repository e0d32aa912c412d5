// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The copied flags of the active tables: an entry may be overwritten in place if, and only if, its count is one.

use super::Check;
use super::tables::{COPIED, OFFSET, Table, Uses};
use crate::{Repair, Result};

const COMPRESSED: u64 = 1 << 62;

impl Check<'_> {
    /// Holds the flags against the counts, and puts them right if that is wanted.
    pub(super) fn check_copied_flags(&mut self) -> Result<()> {
        let fixed = self.report.corruptions_fixed;
        self.l1_flags()?;
        self.each_table(&mut Check::l2_flags)?;
        if self.report.corruptions_fixed > fixed { self.flush() } else { Ok(()) }
    }

    /// Whether flags are put right. With leaks alone to be repaired, they are wrong only as a consequence of that.
    fn fixes_flags(&self) -> bool {
        match self.repair {
            Repair::Nothing => false,
            Repair::Leaks => self.report.check_errors == 0 && self.report.corruptions == 0 && self.report.leaks == 0,
            Repair::All => true,
        }
    }

    fn l1_flags(&mut self) -> Result<()> {
        let mut l1 = std::mem::take(&mut self.l1);
        let clusters = (l1.len() as u64 * 8).div_ceil(self.rules.cluster_size());
        let places = (0..clusters).map(|index| self.header.l1_offset + (index << self.rules.cluster_bits));
        let fix = self.fixes_flags() && places.into_iter().all(|place| self.is_alone(place, 1));
        let mut changed: Option<(usize, usize)> = None;
        for (index, entry) in l1.iter_mut().enumerate().filter(|(_, entry)| **entry & OFFSET != 0) {
            let Some(is_one) = self.is_one((*entry & OFFSET) >> self.rules.cluster_bits) else { continue };
            if is_one != (*entry & COPIED != 0) {
                let what = format!("L2 cluster: l1_index={index} l1_entry={entry:x}");
                self.wrong_flag(&what, is_one, 1, fix);
                if fix {
                    *entry ^= COPIED;
                    changed = Some((changed.map_or(index, |(start, _)| start), index + 1));
                }
            }
        }
        if let Some((start, end)) = changed {
            let bytes: Vec<u8> = l1[start..end].iter().flat_map(|entry| entry.to_be_bytes()).collect();
            self.write(&bytes, self.header.l1_offset + start as u64 * 8)?;
        }
        self.l1 = l1;
        Ok(())
    }

    fn l2_flags(&mut self, table: &mut Table<'_>) -> Result<()> {
        let Uses { active, .. } = table.uses;
        // What a data file stores is never shared, and has no count.
        if active == 0 {
            return Ok(());
        }
        let fix = self.fixes_flags() && table.is_alone;
        let entry_size = usize::try_from(self.rules.entry_words() * 8).unwrap_or(8);
        for at in (0..table.bytes.len()).step_by(entry_size) {
            let word = table.word(at);
            if word & OFFSET == 0 || word & COMPRESSED != 0 {
                continue;
            }
            let is_one = if self.rules.external_data {
                Some(true)
            } else {
                self.is_one((word & OFFSET) >> self.rules.cluster_bits)
            };
            if is_one.is_some_and(|is_one| is_one != (word & COPIED != 0)) {
                self.wrong_flag(&format!("data cluster: l2_entry={word:x}"), is_one == Some(true), active, fix);
                if fix {
                    table.put(at, word ^ COPIED);
                }
            }
        }
        Ok(())
    }

    /// Whether the stored count of a cluster is one; `None` if nobody can tell.
    fn is_one(&self, cluster: u64) -> Option<bool> {
        if cluster < self.clusters && self.unknown == 0 {
            Some(self.ones.contains(cluster))
        } else {
            Some(self.stored(cluster)? == 1)
        }
    }

    fn wrong_flag(&mut self, what: &str, is_one: bool, times: u64, fix: bool) {
        let refcount = if is_one { "1" } else { "not 1" };
        if fix {
            self.report.corruptions_fixed += times;
            self.say(&format!("Repairing OFLAG_COPIED {what} refcount={refcount}"));
        } else {
            self.report.corruptions += times;
            self.say(&format!("ERROR OFLAG_COPIED {what} refcount={refcount}"));
        }
    }
}
