// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writing: in place where the active image owns the cluster, else into new room.
//!
//! An overwrite needs no more than a look at the mapping. New room is given out under the lock; then, without it, what the write
//! leaves of a cluster is filled from where it came from (backing file, snapshot's cluster, compressed data, zeroes), the guest's
//! bytes are written, and [`Allocation::commit`] names the place in the mapping. Two requests that want to allocate the same
//! cluster meet at the flight of the first; those for different clusters run side by side.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::Qcow2;
use super::entry::{Kind, L2Entry};
use super::meta::{MOST_DIRTY, Meta};
use super::refcounts::Refused;
use super::tables::Purpose;
use crate::Wait;
use crate::driver::{Pending, Prepared, ZeroFlags};

/// Most bytes that one allocation covers: bounds what a crash can leak and what one flight keeps others from.
const MOST_AT_ONCE: u64 = 8 << 20;

/// What a write does with a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// All of it is data of its own already.
    InPlace,
    /// It has a place of its own, with content that counts in part or not at all.
    Fill(u64),
    /// It needs a place.
    New,
}

/// New room for a run of guest clusters.
struct Allocation<'a> {
    image: &'a Qcow2,
    /// Guest clusters.
    clusters: Range<u64>,
    /// Host offset of the first.
    place: u64,
    /// Whether the place was given out for this write.
    is_new: bool,
    /// Whether the place is known to hold zeroes.
    is_zero: bool,
    old: Vec<L2Entry>,
    /// Guest bytes that the write covers.
    bytes: Range<u64>,
    landed: bool,
}

impl Qcow2 {
    /// Room for a write: see [`crate::Driver::prepare_write`].
    pub fn prepare(&self, offset: u64, len: u64) -> io::Result<Prepared<'_>> {
        let inside = offset & (self.rules.cluster_size() - 1);
        loop {
            let hold = self.gate.enter();
            if self.damaged.load(Ordering::SeqCst) {
                return Err(Errno::IO.into());
            }
            let run = self.look_up(offset, len, Wait::Allowed, Purpose::Overwrite)?;
            if let Kind::Stored(cluster) = run.kind {
                let unit_bits = self.rules.unit_bits();
                let end = ((offset >> unit_bits) + run.units) << unit_bits;
                let target = self.place(cluster + inside);
                return Ok(Prepared { target, len: len.min(end - offset), hold, pending: None });
            }
            // None: somebody else's allocation has made it an overwrite meanwhile.
            if let Some(allocation) = self.with_room(|meta| self.allocate(meta, offset, len))? {
                allocation.fill()?;
                let len = allocation.bytes.end - offset;
                let target = self.place(allocation.place + inside);
                return Ok(Prepared { target, len, hold, pending: Some(Box::new(allocation)) });
            }
        }
    }

    /// Runs `work` under the lock, and again where it must wait for a flight or for a larger refcount table.
    pub fn with_room<T>(&self, mut work: impl FnMut(&mut Meta) -> Result<T, Refused>) -> io::Result<T> {
        let mut meta = self.meta();
        loop {
            self.check_writable(&meta)?;
            match work(&mut meta) {
                Ok(done) => return Ok(done),
                Err(Refused::Busy) => {
                    meta = self.landed.wait(meta).unwrap_or_else(std::sync::PoisonError::into_inner);
                }
                Err(Refused::TableFull) => {
                    drop(meta);
                    self.grow_refcount_table()?;
                    meta = self.meta();
                }
                Err(refused) => return Err(self.refusal(&mut meta, refused)),
            }
        }
    }

    /// The error of a request that was refused for good.
    pub fn refusal(&self, meta: &mut Meta, refused: Refused) -> io::Error {
        match refused {
            Refused::Io(e) => e,
            Refused::Corrupt(text, offset) => self.corrupt(meta, text, Some(offset)),
            Refused::TableFull | Refused::Busy => Errno::IO.into(),
        }
    }

    /// Gives out room for the start of a range, and keeps others from its clusters. `None` if it needs none any more.
    fn allocate(&self, meta: &mut Meta, offset: u64, len: u64) -> Result<Option<Allocation<'_>>, Refused> {
        let rules = self.rules;
        let first = offset >> rules.cluster_bits;
        meta.check_flights(first)?;
        let last = (offset + len - 1) >> rules.cluster_bits;
        let slice_end = (first / rules.slice_entries() + 1) * rules.slice_entries();
        let mut end = (last + 1).min(slice_end).min(first + (MOST_AT_ONCE >> rules.cluster_bits).max(1));
        if let Some(flight) = meta.flight_in(&(first..end)) {
            end = flight.start;
        }
        let covered = |cluster: u64| {
            let start = cluster << rules.cluster_bits;
            offset.max(start)..(offset + len).min(start + rules.cluster_size())
        };
        let entry = self.entry(meta, first)?;
        let way = self.way(meta, entry, &covered(first))?;
        if way == Way::InPlace {
            return Ok(None);
        }
        let mut old = vec![entry];
        while way == Way::New && first + (old.len() as u64) < end {
            let cluster = first + old.len() as u64;
            let entry = self.entry(meta, cluster)?;
            if self.way(meta, entry, &covered(cluster))? != Way::New {
                break;
            }
            old.push(entry);
        }
        self.writable_table(meta, first)?;
        let (place, is_zero) = match way {
            Way::Fill(place) => (place, false),
            _ if rules.external_data => (first << rules.cluster_bits, false),
            _ => {
                let counts = meta.refcounts.as_mut().ok_or(Errno::ROFS).map_err(io::Error::from)?;
                let room = counts.allocate(old.len() as u64)?;
                old.truncate(usize::try_from(room.clusters).unwrap_or(old.len()));
                (room.offset, room.is_zero)
            }
        };
        let clusters = first..first + old.len() as u64;
        meta.flights.push(clusters.clone());
        let bytes = offset..(offset + len).min(clusters.end << rules.cluster_bits);
        let is_new = way == Way::New && !rules.external_data;
        Ok(Some(Allocation { image: self, clusters, place, is_new, is_zero, old, bytes, landed: false }))
    }

    /// What a write of some bytes of a cluster (guest offsets) does with it.
    fn way(&self, meta: &mut Meta, entry: L2Entry, bytes: &Range<u64>) -> io::Result<Way> {
        let rules = self.rules;
        let unit = |at: u64| at >> rules.unit_bits() & (rules.units_per_cluster() - 1);
        let mut all_stored = true;
        for unit in unit(bytes.start)..=unit(bytes.end - 1) {
            match entry.kind(unit, rules) {
                Kind::Invalid => return Err(self.corrupt(meta, "an L2 entry breaks the rules".into(), None)),
                Kind::Stored(_) => {}
                Kind::Unallocated | Kind::Zero | Kind::Compressed => all_stored = false,
            }
        }
        Ok(match entry.place(rules) {
            Some(_) if entry.is_exclusive() && all_stored => Way::InPlace,
            Some(place) if entry.is_exclusive() => Way::Fill(place),
            _ => Way::New,
        })
    }

    /// Fills `buf` with what a cluster holds from guest offset `at` on, all in one unit, according to its old entry. False,
    /// and `buf` as it was, if that is zeroes.
    pub fn read_old(&self, entry: L2Entry, at: u64, buf: &mut [u8]) -> io::Result<bool> {
        let rules = self.rules;
        let unit = at >> rules.unit_bits() & (rules.units_per_cluster() - 1);
        let inside = at & (rules.cluster_size() - 1);
        match entry.kind(unit, rules) {
            Kind::Unallocated => match self.backing.get() {
                Some(backing) if at < backing.len() => backing.read_or_zero(buf, at, Wait::Allowed)?,
                _ => return Ok(false),
            },
            Kind::Zero => return Ok(false),
            Kind::Stored(place) => self.read_place(buf, place + inside)?,
            Kind::Compressed => {
                let inside = usize::try_from(inside).unwrap_or(usize::MAX);
                let end = inside.saturating_add(buf.len());
                buf.copy_from_slice(self.inflate(entry, end)?.get(inside..end).ok_or(Errno::IO)?);
            }
            Kind::Invalid => return Err(Errno::IO.into()),
        }
        Ok(buf.iter().any(|&byte| byte != 0))
    }
}

impl Allocation<'_> {
    fn rules(&self) -> super::entry::Rules {
        self.image.rules
    }

    /// Guest bytes of unit `unit` of the `index`th cluster.
    fn unit_bytes(&self, index: u64, unit: u64) -> Range<u64> {
        let rules = self.rules();
        let start = ((self.clusters.start + index) << rules.cluster_bits) + (unit << rules.unit_bits());
        start..start + (1 << rules.unit_bits())
    }

    /// Whether unit `unit` of the `index`th cluster will be data: it is written to, or must move along with its cluster.
    fn becomes_data(&self, index: u64, unit: u64) -> bool {
        let bytes = self.unit_bytes(index, unit);
        let written = bytes.start < self.bytes.end && self.bytes.start < bytes.end;
        let old = self.old[usize::try_from(index).unwrap_or(usize::MAX)];
        let moves = matches!(old.kind(unit, self.rules()), Kind::Stored(_) | Kind::Compressed | Kind::Invalid);
        written || (moves && !self.stays(index, unit))
    }

    /// Whether the unit is in its place already.
    fn stays(&self, index: u64, unit: u64) -> bool {
        let old = self.old[usize::try_from(index).unwrap_or(usize::MAX)];
        !self.is_new && old.is_exclusive() && matches!(old.kind(unit, self.rules()), Kind::Stored(_))
    }

    /// Puts into the new room what the write leaves of the units that become data.
    fn fill(&self) -> io::Result<()> {
        let last = self.clusters.end - self.clusters.start - 1;
        // Between the first and the last cluster everything is written over.
        for index in if last == 0 { vec![0] } else { vec![0, last] } {
            for unit in 0..self.rules().units_per_cluster() {
                if self.becomes_data(index, unit) && !self.stays(index, unit) {
                    let unit = self.unit_bytes(index, unit);
                    self.fill_part(index, unit.start..unit.end.min(self.bytes.start.max(unit.start)))?;
                    self.fill_part(index, unit.start.max(self.bytes.end.min(unit.end))..unit.end)?;
                }
            }
        }
        Ok(())
    }

    fn fill_part(&self, index: u64, part: Range<u64>) -> io::Result<()> {
        if part.is_empty() {
            return Ok(());
        }
        let old = self.old[usize::try_from(index).unwrap_or(usize::MAX)];
        // At most a cluster, 2 MiB.
        let mut content = vec![0; usize::try_from(part.end - part.start).unwrap_or(0)];
        let place = self.place + (part.start - (self.clusters.start << self.rules().cluster_bits));
        let data = &self.image.data;
        // Zeroes must be written encrypted: what is not written decrypts to noise.
        if self.image.read_old(old, part.start, &mut content)? || self.image.encryption.is_some() {
            return self.image.write_place(&content, place);
        }
        // What lies past the end of the file reads as zeroes already.
        let there = data.len().saturating_sub(place).min(part.end - part.start);
        if self.is_zero || there == 0 {
            return Ok(());
        }
        data.write_zeroes(place, there, ZeroFlags { may_unmap: true, fast_only: false }, false)
    }

    /// The entry of the `index`th cluster once it is written.
    fn new_entry(&self, index: u64) -> L2Entry {
        let rules = self.rules();
        let place = self.place + (index << rules.cluster_bits);
        let whole = L2Entry::stored(place, rules);
        if !rules.extended {
            return whole;
        }
        let old = self.old[usize::try_from(index).unwrap_or(usize::MAX)];
        let stored = (0..rules.units_per_cluster())
            .filter(|&unit| self.becomes_data(index, unit) || self.stays(index, unit))
            .fold(0, |bits: u32, unit| bits | 1 << unit);
        L2Entry { word: whole.word, bitmap: old.bitmap }.with_units(stored, 0)
    }

    /// Takes the flight off the list and lets those go on who waited.
    fn land(&mut self, meta: &mut Meta) {
        meta.land(&self.clusters);
        self.landed = true;
        self.image.landed.notify_all();
    }
}

impl Pending for Allocation<'_> {
    fn commit(mut self: Box<Self>) -> io::Result<()> {
        let image = self.image;
        let mut meta = image.meta();
        image.check_writable(&meta)?;
        for index in 0..self.clusters.end - self.clusters.start {
            let old = self.old[usize::try_from(index).unwrap_or(usize::MAX)];
            image.set_entry(&mut meta, self.clusters.start + index, self.new_entry(index))?;
            if self.is_new {
                meta.unnamed.extend(image.host_bytes(old, self.clusters.start + index));
            }
        }
        self.land(&mut meta);
        let crowded = meta.dirty.len() >= MOST_DIRTY;
        drop(meta);
        drop(self);
        if crowded {
            // What cannot be written now stays in memory; the next flush says what is wrong.
            let _ = image.write_back();
        }
        Ok(())
    }
}

impl Drop for Allocation<'_> {
    fn drop(&mut self) {
        if self.landed {
            return;
        }
        let image = self.image;
        let mut meta = image.meta();
        self.land(&mut meta);
        if self.is_new
            && let Some(counts) = &mut meta.refcounts
        {
            let first = self.place >> image.rules.cluster_bits;
            for cluster in first..first + (self.clusters.end - self.clusters.start) {
                // Failing costs a leaked cluster.
                let _ = counts.drop_user(cluster);
            }
        }
    }
}
