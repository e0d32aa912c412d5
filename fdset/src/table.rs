// SPDX-License-Identifier: Apache-2.0 OR MIT
//! All descriptors of all sets in one vector, at the place of their number; each set is a chain through it by age.
//!
//! Numbers are unique and the kernel gives out the lowest, so the vector is as long as the process has descriptors open,
//! finding one by number is an index, and adding and removing touch at most two others. What a search reads lies close
//! together: with many sets, the time of an open is mostly that of the memory it has to fetch.

use std::os::fd::{AsRawFd, OwnedFd};

use crate::{Identity, Provenance, Rights};

/// The descriptors by number.
#[derive(Debug, Default)]
pub(crate) struct Table {
    places: Vec<Option<Descriptor>>,
    /// At the same places, so that searches need not step over it.
    abouts: Vec<Option<About>>,
    len: usize,
}

/// A set's descriptors in the [`Table`], by their numbers.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    oldest: Option<i32>,
    newest: Option<i32>,
    len: usize,
}

impl Chain {
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

/// A descriptor, as far as a search looks at it.
#[derive(Debug)]
pub(crate) struct Descriptor {
    pub(crate) fd: OwnedFd,
    /// Of the time of adding. Only the mode is certain to stay.
    pub(crate) rights: Rights,
    pub(crate) set: i64,
    /// Tells it from earlier ones of the same number.
    pub(crate) serial: u64,
    pub(crate) dups: usize,
    older: Option<i32>,
    newer: Option<i32>,
}

/// What else is known of a descriptor.
#[derive(Debug)]
pub(crate) struct About {
    pub(crate) identity: Option<Identity>,
    pub(crate) opaque: Option<String>,
    pub(crate) provenance: Provenance,
}

impl Descriptor {
    pub(crate) fn new(fd: OwnedFd, rights: Rights, set: i64, serial: u64) -> Descriptor {
        Descriptor { fd, rights, set, serial, dups: 0, older: None, newer: None }
    }

    pub(crate) fn number(&self) -> i32 {
        self.fd.as_raw_fd()
    }

    /// The flags of this moment: `O_DIRECT` may have been set or cleared by whoever shares the description.
    pub(crate) fn rights_now(&self) -> Rights {
        Rights::of(&self.fd).unwrap_or(self.rights)
    }
}

impl Table {
    /// How many descriptors there are.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn at(&self, number: i32) -> Option<&Descriptor> {
        self.places.get(usize::try_from(number).ok()?)?.as_ref()
    }

    pub(crate) fn about(&self, number: i32) -> Option<&About> {
        self.abouts.get(usize::try_from(number).ok()?)?.as_ref()
    }

    pub(crate) fn at_mut(&mut self, number: i32) -> Option<&mut Descriptor> {
        self.places.get_mut(usize::try_from(number).ok()?)?.as_mut()
    }

    /// Puts `descriptor` at its number's place and at the new end of `chain`.
    pub(crate) fn push(&mut self, chain: &mut Chain, mut descriptor: Descriptor, about: About) {
        let number = descriptor.number();
        // An open descriptor's number is not negative.
        let Ok(place) = usize::try_from(number) else { return };
        descriptor.older = chain.newest;
        match chain.newest.and_then(|newest| self.at_mut(newest)) {
            Some(newest) => newest.newer = Some(number),
            None => chain.oldest = Some(number),
        }
        chain.newest = Some(number);
        chain.len += 1;
        if place >= self.places.len() {
            self.places.resize_with(place + 1, || None);
            self.abouts.resize_with(place + 1, || None);
        }
        self.places[place] = Some(descriptor);
        self.abouts[place] = Some(about);
        self.len += 1;
    }

    /// Takes descriptor `number` out of its place and out of `chain`, which it is in.
    pub(crate) fn take(&mut self, chain: &mut Chain, number: i32) -> Option<(Descriptor, About)> {
        let place = usize::try_from(number).ok()?;
        let about = self.abouts.get_mut(place)?.take()?;
        let taken = self.places.get_mut(place)?.take()?;
        match taken.older.and_then(|older| self.at_mut(older)) {
            Some(older) => older.newer = taken.newer,
            None => chain.oldest = taken.newer,
        }
        match taken.newer.and_then(|newer| self.at_mut(newer)) {
            Some(newer) => newer.older = taken.older,
            None => chain.newest = taken.older,
        }
        chain.len -= 1;
        self.len -= 1;
        Some((taken, about))
    }

    pub(crate) fn oldest_first(&self, chain: &Chain) -> impl Iterator<Item = &Descriptor> {
        let at = |number: Option<i32>| self.at(number?);
        std::iter::successors(at(chain.oldest), move |descriptor| at(descriptor.newer))
    }

    pub(crate) fn newest_first(&self, chain: &Chain) -> impl Iterator<Item = &Descriptor> {
        let at = |number: Option<i32>| self.at(number?);
        std::iter::successors(at(chain.newest), move |descriptor| at(descriptor.older))
    }

    /// Asks the kernel again about every descriptor.
    pub(crate) fn refresh(&mut self) {
        for (descriptor, about) in self.places.iter_mut().flatten().zip(self.abouts.iter_mut().flatten()) {
            descriptor.rights = descriptor.rights_now();
            if let Ok(identity) = Identity::of(&descriptor.fd) {
                about.identity = Some(identity);
            }
        }
    }
}
