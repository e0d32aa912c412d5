// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Zeroes and discards: entries that say it, without a byte of data.

use std::io;

use rustix::io::Errno;

use super::Qcow2;
use super::entry::{Kind, L2Entry};
use super::meta::{MOST_DIRTY, Meta, Unnamed};
use super::refcounts::Refused;
use crate::driver::ZeroFlags;

/// What a range becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Zeroes; clusters keep their room.
    Zero,
    /// Zeroes that take no room.
    Unmapped,
    /// Of no further use.
    Discarded,
}

impl Qcow2 {
    /// Makes whole units zeroes: see [`crate::Driver::write_zeroes`].
    pub fn zero(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        if self.rules.version == 2 && self.backing.get().is_some_and(|backing| offset < backing.len()) {
            // Version 2 cannot say that zeroes hide what is below.
            return Err(Errno::OPNOTSUPP.into());
        }
        if self.header.data_file_raw {
            // Who reads the data file alone must see zeroes, too.
            let there = len.min(self.data.len().saturating_sub(offset));
            if there > 0 {
                self.data.write_zeroes(offset, there, flags, false)?;
            }
        }
        let wish = if flags.may_unmap { Wish::Unmapped } else { Wish::Zero };
        self.change_units(offset, len, wish, self.size().max(offset + len))
    }

    /// Lets go of whole units: see [`crate::Driver::discard`].
    pub fn drop_units(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.rules.version == 2 && self.backing.get().is_some_and(|backing| offset < backing.len()) {
            return Ok(());
        }
        if self.header.data_file_raw {
            let there = len.min(self.data.len().saturating_sub(offset));
            return if there == 0 { Ok(()) } else { self.data.discard(offset, there) };
        }
        self.change_units(offset, len, Wish::Discarded, self.size())
    }

    /// `size` is the disk's: its last cluster may be cut.
    fn change_units(&self, offset: u64, len: u64, wish: Wish, size: u64) -> io::Result<()> {
        let rules = self.rules;
        let (mut at, end) = (offset, offset + len);
        let _hold = self.gate.enter();
        while at < end {
            let cluster = at >> rules.cluster_bits;
            let cluster_end = ((cluster + 1) << rules.cluster_bits).min(size);
            let piece_end = end.min(cluster_end);
            let mask = self.units_between(at, piece_end, size);
            let (next, crowded) = self.with_room(|meta| {
                // A table that does not exist holds nothing to change.
                let l1_index = cluster / rules.l2_entries();
                if self.l1_entry(l1_index).offset() == 0 && self.backing.get().is_none() {
                    return Ok((((l1_index + 1) * rules.l2_entries()) << rules.cluster_bits, false));
                }
                meta.check_flights(cluster)?;
                self.change_entry(meta, cluster, mask, wish)?;
                Ok((piece_end, meta.dirty.len() >= MOST_DIRTY))
            })?;
            if crowded {
                self.write_back()?;
            }
            at = next;
        }
        Ok(())
    }

    /// Units of a cluster from guest offset `start` to `end`, as bits. The image's end counts as the end of its cluster.
    fn units_between(&self, start: u64, end: u64, size: u64) -> u32 {
        let rules = self.rules;
        let unit = |at: u64| (at & (rules.cluster_size() - 1)) >> rules.unit_bits();
        let last = if end == size { rules.units_per_cluster() - 1 } else { unit(end - 1) };
        (unit(start)..=last).fold(0, |bits, unit| bits | 1 << unit)
    }

    fn change_entry(&self, meta: &mut Meta, cluster: u64, mask: u32, wish: Wish) -> Result<(), Refused> {
        let rules = self.rules;
        let old = self.entry(meta, cluster)?;
        let all = mask == u32::MAX >> (32 - rules.units_per_cluster());
        let units = (0..rules.units_per_cluster()).filter(|unit| mask >> unit & 1 == 1);
        let kinds: Vec<Kind> = units.map(|unit| old.kind(unit, rules)).collect();
        if kinds.contains(&Kind::Invalid) {
            return Err(Refused::Corrupt("an L2 entry breaks the rules".into(), 0));
        }
        let is_zero = |kind: &Kind| match kind {
            Kind::Zero => true,
            // Without a layer below it reads as zeroes and takes no room.
            Kind::Unallocated => self.backing.get().is_none(),
            _ => false,
        };
        let keeps_room = old.place(rules).is_some() && old.is_exclusive();
        if kinds.iter().all(is_zero) && (wish == Wish::Zero || old.place(rules).is_none() || !all) {
            return Ok(());
        }
        let new = match (all, wish) {
            (true, Wish::Zero) if keeps_room && rules.version > 2 => L2Entry::zero(old.place(rules), rules),
            (true, Wish::Discarded) if self.discard_no_unref && keeps_room && rules.version > 2 => {
                L2Entry::zero(old.place(rules), rules)
            }
            (true, _) if rules.version == 2 => L2Entry::UNALLOCATED,
            (true, _) => L2Entry::zero(None, rules),
            // Half a cluster can be zeroes where it is not compressed and nobody else uses it.
            (false, _) if old.is_compressed() => return not_so(wish),
            (false, _) if old.place(rules).is_some() && !old.is_exclusive() => return not_so(wish),
            (false, _) => old.with_units(0, mask),
        };
        self.writable_table(meta, cluster)?;
        self.set_entry(meta, cluster, new)?;
        if new.place(rules).is_none() {
            meta.unnamed.extend(self.host_bytes(old, cluster));
        } else if wish == Wish::Discarded && all {
            let place = self.host_bytes(old, cluster);
            meta.unnamed.extend(place.map(|place| Unnamed { stays_of: Some(cluster), ..place }));
        }
        Ok(())
    }
}

/// Part of a cluster that cannot be zeroes by itself: a discard may do nothing, zeroes must be written.
fn not_so(wish: Wish) -> Result<(), Refused> {
    if wish == Wish::Discarded { Ok(()) } else { Err(io::Error::from(Errno::OPNOTSUPP).into()) }
}
