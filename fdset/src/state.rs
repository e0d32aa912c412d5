// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is under [`FdSets`](crate::FdSets): sets by id, descriptors by number. Nothing is searched but a set's own
//! descriptors.
//!
//! Nothing is closed here: what leaves is returned, and the caller closes it without the lock. A number is struck from the
//! table before its descriptor can be closed, so it never names another thread's new file.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use crate::error::{Held, SetsSeen};
use crate::ids::FreeIds;
use crate::lifetime::Keepers;
use crate::table::{About, Chain, Descriptor, Table};
use crate::{Access, Added, DupInfo, Error, FdInfo, InUse, Limit, Peer, Quotas, Rights, SetInfo, Settings};

#[derive(Debug)]
pub(crate) struct State {
    sets: HashMap<i64, Set>,
    /// Also knows the order of the sets.
    free: FreeIds,
    table: Table,
    /// How many descriptors each user has passed.
    by_user: HashMap<u32, usize>,
    /// Grows with every descriptor and dup: the order of age.
    next_serial: u64,
    pub(crate) keepers: Keepers,
    in_use: InUse,
}

#[derive(Debug, Default)]
struct Set {
    fds: Chain,
    /// By serial, the oldest first.
    dups: BTreeMap<u64, DupEntry>,
}

#[derive(Debug)]
struct DupEntry {
    info: DupInfo,
    /// The serial of the descriptor that it was made from: the number may be another's by now.
    origin: u64,
}

/// A descriptor that fits.
pub(crate) struct Found<'a> {
    pub(crate) fd: BorrowedFd<'a>,
    pub(crate) number: i32,
    pub(crate) rights: Rights,
}

impl State {
    pub(crate) fn new(settings: &Settings) -> State {
        State {
            sets: HashMap::new(),
            free: FreeIds::all(),
            table: Table::default(),
            by_user: HashMap::new(),
            next_serial: 0,
            keepers: Keepers::new(settings.lifetime),
            in_use: settings.in_use,
        }
    }

    /// The id under which one more descriptor from `peer` fits: `set`, which is not negative, or the lowest free one.
    pub(crate) fn room_for(&self, set: Option<i64>, peer: Option<Peer>, quotas: &Quotas) -> Result<i64, Error> {
        let id = set.unwrap_or_else(|| self.free.lowest());
        let held = self.sets.get(&id).map_or(0, |set| set.fds.len());
        let passed = peer.and_then(|peer| self.by_user.get(&peer.uid)).copied().unwrap_or(0);
        let limits = [
            (Some(Limit::Set(id)), held, quotas.per_set),
            (peer.map(Limit::Peer), passed, quotas.per_peer),
            (Some(Limit::Total), self.len(), quotas.total),
        ];
        for limit in limits {
            if let (Some(limit), used, Some(allowed)) = limit
                && used >= allowed
            {
                return Err(Error::Quota { limit, allowed });
            }
        }
        Ok(id)
    }

    /// Puts `fd` into set `id`, which is made if it is not there.
    pub(crate) fn add(&mut self, id: i64, fd: OwnedFd, rights: Rights, about: About) -> Added {
        if let Some(peer) = about.provenance.peer {
            *self.by_user.entry(peer.uid).or_default() += 1;
        }
        let serial = self.serial();
        let descriptor = Descriptor::new(fd, rights, id, serial);
        let added = Added { set_id: id, fd: descriptor.number() };
        let set = self.sets.entry(id).or_insert_with(|| {
            self.free.take(id);
            Set::default()
        });
        self.table.push(&mut set.fds, descriptor, about);
        added
    }

    /// Takes out descriptor number `fd`, or all of the set; for `by`, only what that user passed.
    pub(crate) fn remove(&mut self, id: i64, fd: Option<i64>, by: Option<Peer>) -> Result<Vec<OwnedFd>, Error> {
        let set = self.sets.get(&id);
        let numbers: Vec<i32> = match (set, fd) {
            (None, None) => return Err(Error::SetNotFound { id, sets: self.seen() }),
            (Some(set), None) => self.numbers(set),
            (set, Some(fd)) => match i32::try_from(fd).ok().and_then(|number| self.table.at(number)) {
                Some(descriptor) if descriptor.set == id => vec![descriptor.number()],
                _ => return Err(Error::FdNotFound { id, fd, held: set.map(|set| self.held(set)) }),
            },
        };
        if let Some(peer) = by {
            for &fd in &numbers {
                let owner = self.table.about(fd).and_then(|about| about.provenance.peer);
                if owner.map(|owner| owner.uid) != Some(peer.uid) {
                    return Err(Error::NotYours { id, fd, owner, peer });
                }
            }
        }
        Ok(self.take_out(id, &numbers))
    }

    /// The newest descriptor of a set that `access` matches, among those with this opaque text if one is given.
    pub(crate) fn find(&self, id: i64, access: Access, opaque: Option<&str>) -> Result<Found<'_>, Error> {
        let set = self.sets.get(&id).ok_or_else(|| Error::NoSuchSet { id, sets: self.seen() })?;
        // The mode is fixed for good, so the kernel is asked for the flags of fitting descriptors only.
        let named = |descriptor: &Descriptor| {
            opaque.is_none()
                || self.table.about(descriptor.number()).is_some_and(|about| about.opaque.as_deref() == opaque)
        };
        let fitting = self
            .table
            .newest_first(&set.fds)
            .filter(|descriptor| descriptor.rights.mode() == access.mode() && named(descriptor));
        for descriptor in fitting {
            let rights = descriptor.rights_now();
            if access.matches(rights) {
                return Ok(Found { fd: descriptor.fd.as_fd(), number: descriptor.number(), rights });
            }
        }
        Err(Error::NoMatch { id, access, held: self.held(set) })
    }

    /// Numbers and opaque texts of a set's descriptors, the oldest first, all of which `access` must match.
    pub(crate) fn all_fitting(&self, id: i64, access: Access) -> Result<Vec<(i32, Option<String>)>, Error> {
        let set = self.sets.get(&id).ok_or_else(|| Error::NoSuchSet { id, sets: self.seen() })?;
        let mut all = Vec::with_capacity(set.fds.len());
        for descriptor in self.table.oldest_first(&set.fds) {
            let rights = descriptor.rights_now();
            if !access.matches(rights) || !access.agrees_on_sync(rights) {
                return Err(Error::NoMatch { id, access, held: self.held(set) });
            }
            let opaque = self.table.about(descriptor.number()).and_then(|about| about.opaque.clone());
            all.push((descriptor.number(), opaque));
        }
        Ok(all)
    }

    /// The descriptor of this number.
    pub(crate) fn numbered(&self, number: i32) -> Option<&Descriptor> {
        self.table.at(number)
    }

    /// Enters a dup of set `id`, and gives it a serial.
    pub(crate) fn track(&mut self, id: i64, info: DupInfo) -> u64 {
        let serial = self.serial();
        if let (Some(set), Some(origin)) = (self.sets.get_mut(&id), self.table.at_mut(info.opened_from)) {
            origin.dups += 1;
            set.dups.insert(serial, DupEntry { info, origin: origin.serial });
        }
        serial
    }

    /// Strikes a dup. If it was the set's last, the set goes too if it is empty, and so do descriptors whose keeper has
    /// lapsed while the set was in use.
    pub(crate) fn untrack(&mut self, id: i64, serial: u64) -> Vec<OwnedFd> {
        let Some(set) = self.sets.get_mut(&id) else { return Vec::new() };
        let Some(dup) = set.dups.remove(&serial) else { return Vec::new() };
        let origin = self.table.at_mut(dup.info.opened_from).filter(|origin| origin.serial == dup.origin);
        if let Some(origin) = origin {
            origin.dups -= 1;
        }
        if !set.dups.is_empty() {
            return Vec::new();
        }
        let lapsed = if self.in_use == InUse::Keep { self.lapsed(id) } else { Vec::new() };
        self.take_out(id, &lapsed)
    }

    /// Lets leases end, and takes out what they kept. Tells which sets changed.
    pub(crate) fn expire(&mut self, now: Instant, closed: &mut Vec<OwnedFd>) -> Vec<i64> {
        if !self.keepers.expire(now) {
            return Vec::new();
        }
        let spared = |id: &i64| self.in_use == InUse::Keep && self.sets.get(id).is_some_and(|set| !set.dups.is_empty());
        let ids: Vec<i64> = self.free.taken().filter(|id| !spared(id)).collect();
        let mut changed = Vec::new();
        for id in ids {
            let lapsed = self.lapsed(id);
            if !lapsed.is_empty() {
                closed.append(&mut self.take_out(id, &lapsed));
                changed.push(id);
            }
        }
        changed
    }

    /// Takes out everything; dups stay entered.
    pub(crate) fn clear(&mut self) -> Vec<OwnedFd> {
        let all: Vec<(i64, Vec<i32>)> = self.sets.iter().map(|(&id, set)| (id, self.numbers(set))).collect();
        all.into_iter().flat_map(|(id, numbers)| self.take_out(id, &numbers)).collect()
    }

    pub(crate) fn list(&self) -> Vec<SetInfo> {
        let mut list: Vec<SetInfo> = self.free.taken().filter_map(|id| self.info(id)).collect();
        list.reverse();
        list
    }

    pub(crate) fn info(&self, id: i64) -> Option<SetInfo> {
        let set = self.sets.get(&id)?;
        let info = |descriptor: &Descriptor| {
            let about = self.table.about(descriptor.number())?;
            Some(FdInfo {
                number: descriptor.number(),
                opaque: about.opaque.clone(),
                rights: descriptor.rights,
                identity: about.identity,
                provenance: about.provenance,
                dups: descriptor.dups,
            })
        };
        Some(SetInfo {
            id,
            fds: self.table.oldest_first(&set.fds).filter_map(info).collect(),
            dups: set.dups.values().map(|dup| dup.info.clone()).collect(),
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    pub(crate) fn refresh(&mut self) {
        self.table.refresh();
    }

    /// The one place where descriptors leave and emptied sets go.
    fn take_out(&mut self, id: i64, numbers: &[i32]) -> Vec<OwnedFd> {
        let Some(set) = self.sets.get_mut(&id) else { return Vec::new() };
        let mut out = Vec::with_capacity(numbers.len());
        for &number in numbers {
            let Some((descriptor, about)) = self.table.take(&mut set.fds, number) else { continue };
            if let Some(peer) = about.provenance.peer
                && let Some(passed) = self.by_user.get_mut(&peer.uid)
            {
                *passed -= 1;
                if *passed == 0 {
                    self.by_user.remove(&peer.uid);
                }
            }
            out.push(descriptor.fd);
        }
        if set.fds.len() == 0 && set.dups.is_empty() {
            self.sets.remove(&id);
            self.free.give(id);
        }
        out
    }

    fn serial(&mut self) -> u64 {
        self.next_serial += 1;
        self.next_serial
    }

    fn numbers(&self, set: &Set) -> Vec<i32> {
        self.table.oldest_first(&set.fds).map(Descriptor::number).collect()
    }

    /// Numbers of the set's descriptors whose keeper has lapsed.
    fn lapsed(&self, id: i64) -> Vec<i32> {
        let mut numbers = self.sets.get(&id).map_or_else(Vec::new, |set| self.numbers(set));
        let lapsed = |about: &About| self.keepers.lapsed(about.provenance.keeper);
        numbers.retain(|&number| self.table.about(number).is_some_and(lapsed));
        numbers
    }

    fn held(&self, set: &Set) -> Held {
        let fds = self.table.oldest_first(&set.fds).map(|descriptor| (descriptor.number(), descriptor.rights_now()));
        Held::new(fds, set.fds.len(), set.dups.len())
    }

    fn seen(&self) -> SetsSeen {
        SetsSeen::new(self.free.taken(), self.sets.len())
    }
}
