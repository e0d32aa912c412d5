// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a guest may find after a crash: for each atom of its disk the values written, in order, and which of them a flush has
//! made last.
//!
//! An atom is half a sector, filled with one number, its tag, which no other write uses: a foreign byte shows at once.
#![allow(dead_code, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "each test takes what it needs")]

use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of an atom.
pub const ATOM: usize = 256;

struct Version {
    /// Any of these; more than one after a discard.
    values: Vec<u64>,
    /// Events of the journal when it began.
    began: usize,
    /// By the clock, when it was acknowledged; `u64::MAX`: not yet, or it failed.
    ended: u64,
    /// Events of the journal when a flush that covers it was acknowledged.
    durable: usize,
}

/// A disk as its guest knows it.
pub struct Guest {
    atoms: Vec<Vec<Version>>,
    /// Sizes in bytes, and from which event to which each is possible.
    sizes: Vec<(u64, usize, usize)>,
    clock: AtomicU64,
    next_tag: u64,
}

/// Bytes of `atoms` many atoms that hold the tags from `tag` on.
pub fn bytes_of(tags: impl IntoIterator<Item = u64>) -> Vec<u8> {
    tags.into_iter().flat_map(|tag| tag.to_le_bytes().repeat(ATOM / 8)).collect()
}

/// The tags of some bytes.
///
/// # Errors
/// The index of an atom that holds more than one number.
pub fn tags_of(bytes: &[u8]) -> Result<Vec<u64>, usize> {
    let atoms = bytes.chunks(ATOM).enumerate().map(|(at, atom)| {
        let (first, rest) = atom.split_first_chunk::<8>().ok_or(at)?;
        if rest.chunks(8).all(|word| word == first) { Ok(u64::from_le_bytes(*first)) } else { Err(at) }
    });
    atoms.collect()
}

impl Guest {
    /// A disk with these tags, all on disk; `most` bytes is the largest that it will be.
    pub fn new(tags: &[u64], most: u64) -> Guest {
        let atoms = most as usize / ATOM;
        let value = |at: usize| tags.get(at).copied().unwrap_or(0);
        let version = |at| Version { values: vec![value(at)], began: 0, ended: 0, durable: 0 };
        Guest {
            atoms: (0..atoms).map(|at| vec![version(at)]).collect(),
            sizes: vec![((tags.len() * ATOM) as u64, 0, usize::MAX)],
            clock: AtomicU64::new(1),
            next_tag: 0,
        }
    }

    pub fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    /// Numbers for a write that were never used: each tells the write and the atom.
    pub fn new_tags(&mut self, first: usize, count: usize) -> Vec<u64> {
        self.next_tag += 1;
        (first..first + count).map(|at| self.next_tag << 24 | at as u64).collect()
    }

    /// The atoms from `first` on begin to become one of `values` each; `now` is the journal's length.
    pub fn begin(&mut self, first: usize, values: Vec<Vec<u64>>, now: usize) {
        for (versions, values) in self.atoms[first..].iter_mut().zip(values) {
            versions.push(Version { values, began: now, ended: u64::MAX, durable: usize::MAX });
        }
    }

    /// The last change of `count` atoms from `first` on was acknowledged.
    pub fn end(&mut self, first: usize, count: usize) {
        let time = self.tick();
        for versions in &mut self.atoms[first..first + count] {
            versions.last_mut().unwrap().ended = time;
        }
    }

    /// What has ended before `since` (by the clock) is on disk, as a flush says that was acknowledged with the journal at `now`.
    pub fn flushed(&mut self, since: u64, now: usize) {
        self.flushed_within(0..self.atoms.len(), since, now);
    }

    /// The same for some atoms only.
    pub fn flushed_within(&mut self, atoms: std::ops::Range<usize>, since: u64, now: usize) {
        for versions in &mut self.atoms[atoms] {
            for version in versions.iter_mut().rev() {
                if version.durable != usize::MAX {
                    break;
                }
                if version.ended < since {
                    version.durable = now;
                }
            }
        }
    }

    /// The disk begins to get another size. What is cut off becomes zeroes, or what `below` has there.
    pub fn begin_resize(&mut self, from: u64, size: u64, below: &[u64], now: usize) {
        self.sizes.push((size, now, usize::MAX));
        for at in size as usize / ATOM..from as usize / ATOM {
            let values = [0].into_iter().chain(below.get(at).copied()).collect();
            self.atoms[at].push(Version { values, began: now, ended: u64::MAX, durable: usize::MAX });
        }
        for at in from as usize / ATOM..size as usize / ATOM {
            let ended = self.tick();
            self.atoms[at].push(Version { values: vec![0], began: now, ended, durable: now });
        }
    }

    /// It has it: that is acknowledged, and on disk.
    pub fn end_resize(&mut self, from: u64, size: u64, now: usize) {
        for other in self.sizes.iter_mut().rev().skip(1) {
            other.2 = other.2.min(now);
        }
        let ended = self.tick();
        for versions in self.atoms[..from as usize / ATOM].iter_mut().skip(size as usize / ATOM) {
            let version = versions.last_mut().unwrap();
            (version.ended, version.durable) = (ended, now);
        }
    }

    /// What an atom may hold now.
    pub fn values(&self, at: usize) -> Vec<u64> {
        let versions = &self.atoms[at];
        let certain = versions.iter().rposition(|version| version.ended != u64::MAX).unwrap_or(0);
        versions[certain..].iter().flat_map(|version| version.values.iter().copied()).collect()
    }

    /// Whether `bytes` can be what the guest sees now.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check_now(&self, bytes: &[u8]) -> Result<(), String> {
        self.check_with(bytes, usize::MAX, |version| version.ended != u64::MAX)
    }

    /// Whether `bytes` can be what a crash at event `at` leaves.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self, bytes: &[u8], at: usize) -> Result<(), String> {
        self.check_with(bytes, at, |version| version.durable <= at)
    }

    /// `is_certain`: nothing older is possible.
    fn check_with(&self, bytes: &[u8], at: usize, is_certain: impl Fn(&Version) -> bool) -> Result<(), String> {
        let size = bytes.len() as u64;
        if !self.sizes.iter().any(|&(one, from, to)| one == size && from <= at && at <= to) {
            return Err(format!("{size} bytes is no size that the disk can have: {:?}", self.sizes));
        }
        let tags = tags_of(bytes).map_err(|atom| format!("atom {atom} holds a mixture"))?;
        for (index, (&tag, versions)) in tags.iter().zip(&self.atoms).enumerate() {
            let possible = versions.iter().rev().scan(false, |over, version| {
                if *over {
                    return None;
                }
                *over = is_certain(version);
                Some(version)
            });
            let mut possible = possible.filter(|version| version.began <= at);
            if !possible.clone().any(|version| version.values.contains(&tag)) {
                let may: Vec<_> = possible.by_ref().map(|version| &version.values).collect();
                let was = versions.iter().position(|version| version.values.contains(&tag));
                return Err(format!("atom {index} holds {tag:#x} (version {was:?}), may hold {may:x?}"));
            }
        }
        Ok(())
    }
}
