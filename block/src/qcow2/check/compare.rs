// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Refcounts as they are stored against what was counted; and in place, the way from the one to the other.

use super::Check;
use super::counts::{CHUNK, LARGE, Ones};
use crate::qcow2::refcounts::{count_at, set_count_at};
use crate::{Repair, Result};

/// Which stored counts are changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fix {
    raise: bool,
    lower: bool,
}

impl Check<'_> {
    /// Compares, and puts right what is to be put right.
    pub(super) fn compare(&mut self) -> Result<()> {
        self.pass(Fix { raise: false, lower: false })?;
        // What could not be followed may name clusters that were not counted.
        let is_whole = !self.incomplete && self.report.check_errors == self.unknown;
        let (rebuild, is_wrong) = (self.rebuild, self.wrong_counts > 0 || self.report.leaks > 0);
        match self.repair {
            Repair::Nothing => return Ok(()),
            _ if !is_wrong => return Ok(()),
            Repair::Leaks if rebuild => {
                self.say("ERROR need to rebuild refcount structures");
                return Ok(());
            }
            Repair::All if rebuild && !is_whole => {
                self.say(
                    "ERROR the refcount structures cannot be rebuilt: not everything that names clusters could be read",
                );
                return Ok(());
            }
            Repair::All if rebuild => {
                self.say("Rebuilding refcount structure");
                self.rebuild_refcounts(self.header.refcount_order)?;
                self.report.check_errors -= std::mem::take(&mut self.unknown);
                self.report.corruptions_fixed += self.wrong_counts;
                self.report.corruptions -= self.wrong_counts;
                self.report.leaks_fixed += std::mem::take(&mut self.report.leaks);
            }
            Repair::Leaks => self.pass(Fix { raise: false, lower: is_whole })?,
            Repair::All => self.pass(Fix { raise: true, lower: is_whole })?,
        }
        self.flush()
    }

    /// Looks at every stored count.
    fn pass(&mut self, fix: Fix) -> Result<()> {
        let repairs = fix.raise || fix.lower;
        self.ones = Ones::default();
        let per_block = (8 << self.rules.cluster_bits) >> self.header.refcount_order;
        let mut index = 0;
        let mut first = 0;
        while first < self.end {
            let end = (first + per_block).min(self.end);
            let block = self.blocks.get(index).copied().unwrap_or(0);
            if !block.is_multiple_of(self.rules.cluster_size()) {
                self.unknown += end - first;
                self.report.check_errors += end - first;
                self.say(&format!("Can't get refcount for clusters {first} to {}", end - 1));
                (first, index) = (end, index + 1);
                continue;
            }
            match if block == 0 { Ok(None) } else { self.bytes(block, self.rules.cluster_size()).map(Some) } {
                Ok(Some(mut bytes)) => {
                    let is_changed = self.compare_block(first, end, &mut bytes, fix);
                    if is_changed {
                        self.write(&bytes, block)?;
                    }
                }
                Ok(None) => self.compare_none(first, end, repairs),
                Err(e) => self.unreadable("a refcount block", &e),
            }
            first = end;
            index += 1;
        }
        Ok(())
    }

    fn compare_block(&mut self, first: u64, end: u64, bytes: &mut [u8], fix: Fix) -> bool {
        let order = self.header.refcount_order;
        let mut is_changed = false;
        let mut cluster = first;
        while cluster < end {
            if order == 4 {
                cluster +=
                    self.same_in_row(cluster, end, &bytes[usize::try_from((cluster - first) * 2).unwrap_or(0)..]);
                if cluster == end {
                    break;
                }
            }
            let at = cluster - first;
            let mut stored = count_at(bytes, at, order);
            let counted = self.counts.get(cluster);
            if stored != counted {
                let may = if stored < counted { fix.raise } else { fix.lower };
                if may {
                    set_count_at(bytes, at, order, counted);
                    is_changed = true;
                }
                self.differs(cluster, stored, counted, may, fix.raise || fix.lower);
                stored = if may { counted } else { stored };
            }
            if stored == 1 {
                self.ones.set(cluster);
            }
            if stored > 0 || counted > 0 {
                self.reaches(cluster);
            }
            cluster += 1;
        }
        is_changed
    }

    /// How many clusters from `cluster` on are stored as they were counted, with 16 bits to a count; what [`Check::compare_block`]
    /// would note of them is noted. Fewer than there are at the end of a chunk of counts.
    fn same_in_row(&mut self, cluster: u64, end: u64, stored: &[u8]) -> u64 {
        let Some(counted) = self.counts.small(cluster) else { return 0 };
        let (stored, _) = stored.as_chunks::<2>();
        let most = usize::try_from(end - cluster).unwrap_or(usize::MAX);
        let pairs = stored.iter().map(|count| u16::from_be_bytes(*count)).zip(counted).take(most);
        let same = pairs.take_while(|(stored, counted)| stored == *counted && *stored != LARGE).count();
        let counted = &counted[..same];
        self.ones.set_where_one(cluster, counted);
        if let Some(last) = counted.iter().rposition(|count| *count > 0) {
            self.reaches(cluster + last as u64);
        }
        same as u64
    }

    /// Clusters without a refcount block.
    fn compare_none(&mut self, first: u64, end: u64, repairs: bool) {
        let mut cluster = first;
        while cluster < end {
            if self.counts.is_blank(cluster) {
                cluster = (cluster / CHUNK + 1) * CHUNK;
                continue;
            }
            let counted = self.counts.get(cluster);
            if counted > 0 {
                self.rebuild = true;
                self.differs(cluster, 0, counted, false, repairs);
                self.reaches(cluster);
            }
            cluster += 1;
        }
    }

    fn reaches(&mut self, cluster: u64) {
        let end = (cluster + 1) << self.rules.cluster_bits;
        self.report.image_end_offset = self.report.image_end_offset.max(end);
    }

    /// `is_second`: it was found and counted before.
    fn differs(&mut self, cluster: u64, stored: u64, counted: u64, is_fixed: bool, is_second: bool) {
        let is_low = stored < counted;
        let report = &mut self.report;
        if is_fixed {
            let (left, fixed) = if is_low {
                (&mut report.corruptions, &mut report.corruptions_fixed)
            } else {
                (&mut report.leaks, &mut report.leaks_fixed)
            };
            *left -= 1;
            *fixed += 1;
        } else if is_second {
            return;
        } else if is_low {
            report.corruptions += 1;
            self.wrong_counts += 1;
        } else {
            report.leaks += 1;
        }
        let word = match (is_fixed, is_low) {
            (true, _) => "Repairing",
            (false, true) => "ERROR",
            (false, false) => "Leaked",
        };
        self.say(&format!("{word} cluster {cluster} refcount={stored} reference={counted}"));
    }

    /// The count of a cluster as it is stored, for the seldom case that it is not in memory; `None` if it cannot be read.
    pub(super) fn stored(&self, cluster: u64) -> Option<u64> {
        let per_block = (8 << self.rules.cluster_bits) >> self.header.refcount_order;
        let block = usize::try_from(cluster / per_block).ok().and_then(|index| self.blocks.get(index)).copied();
        match block {
            None | Some(0) => Some(0),
            Some(block) if !block.is_multiple_of(self.rules.cluster_size()) => None,
            Some(block) => {
                let bit = (cluster % per_block) << self.header.refcount_order;
                let word = self.bytes(block + bit / 64 * 8, 8).ok()?;
                Some(count_at(&word, (bit % 64) >> self.header.refcount_order, self.header.refcount_order))
            }
        }
    }
}
