// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tables under [`FdSets`](crate::FdSets). Every look-up is by key, so ten thousand sets cost what ten do.
//!
//! Nothing is closed here: what leaves the tables is returned, and the caller closes it without the lock. A number is
//! struck from the index before its descriptor can be closed, so it never names another thread's new file.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use crate::error::{Held, SetsSeen};
use crate::ids::FreeIds;
use crate::lifetime::Keepers;
use crate::{
    Access, Added, DupInfo, Error, FdInfo, Identity, InUse, Limit, Peer, Provenance, Quotas, Rights, SetInfo, Settings,
};

#[derive(Debug)]
pub(crate) struct State {
    sets: BTreeMap<i64, Set>,
    free: FreeIds,
    /// Set and serial of each descriptor, by number.
    by_number: HashMap<i32, (i64, u64)>,
    /// How many descriptors each user has passed.
    by_user: HashMap<u32, usize>,
    /// Grows with every descriptor and dup: the order of age.
    next_serial: u64,
    pub(crate) keepers: Keepers,
    in_use: InUse,
}

/// Both by serial, the oldest first.
#[derive(Debug, Default)]
struct Set {
    fds: BTreeMap<u64, Descriptor>,
    dups: BTreeMap<u64, DupEntry>,
}

#[derive(Debug)]
pub(crate) struct Descriptor {
    pub(crate) fd: OwnedFd,
    /// Of the time of adding. Only the mode is certain to stay.
    pub(crate) rights: Rights,
    pub(crate) identity: Option<Identity>,
    pub(crate) opaque: Option<String>,
    pub(crate) provenance: Provenance,
    pub(crate) dups: usize,
}

#[derive(Debug)]
struct DupEntry {
    info: DupInfo,
    /// The serial of the descriptor that it was made from.
    descriptor: u64,
}

/// A descriptor that fits.
pub(crate) struct Found<'a> {
    pub(crate) fd: BorrowedFd<'a>,
    pub(crate) number: i32,
    pub(crate) serial: u64,
    pub(crate) rights: Rights,
}

impl State {
    pub(crate) fn new(settings: &Settings) -> State {
        State {
            sets: BTreeMap::new(),
            free: FreeIds::all(),
            by_number: HashMap::new(),
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

    /// Puts `descriptor` into set `id`, which is made if it is not there.
    pub(crate) fn add(&mut self, id: i64, descriptor: Descriptor) -> Added {
        if let Some(peer) = descriptor.provenance.peer {
            *self.by_user.entry(peer.uid).or_default() += 1;
        }
        let serial = self.serial();
        let number = descriptor.fd.as_raw_fd();
        self.by_number.insert(number, (id, serial));
        self.free.take(id);
        self.sets.entry(id).or_default().fds.insert(serial, descriptor);
        Added { set_id: id, fd: number }
    }

    /// Takes out descriptor number `fd`, or all of the set; for `by`, only what that user passed.
    pub(crate) fn remove(&mut self, id: i64, fd: Option<i64>, by: Option<Peer>) -> Result<Vec<OwnedFd>, Error> {
        let set = self.sets.get(&id);
        let serials: Vec<u64> = match (set, fd) {
            (None, None) => return Err(Error::SetNotFound { id, sets: self.seen() }),
            (Some(set), None) => set.fds.keys().copied().collect(),
            (set, Some(fd)) => {
                let place = i32::try_from(fd).ok().and_then(|number| self.by_number.get(&number));
                match place {
                    Some(&(owner, serial)) if owner == id => vec![serial],
                    _ => return Err(Error::FdNotFound { id, fd, held: set.map(Set::held) }),
                }
            }
        };
        if let (Some(peer), Some(set)) = (by, set) {
            let foreign =
                |descriptor: &&Descriptor| descriptor.provenance.peer.map(|owner| owner.uid) != Some(peer.uid);
            if let Some(descriptor) = serials.iter().filter_map(|serial| set.fds.get(serial)).find(foreign) {
                let (fd, owner) = (descriptor.fd.as_raw_fd(), descriptor.provenance.peer);
                return Err(Error::NotYours { id, fd, owner, peer });
            }
        }
        Ok(self.take_out(id, &serials))
    }

    /// The newest descriptor of a set that `access` matches.
    pub(crate) fn find(&self, id: i64, access: Access) -> Result<Found<'_>, Error> {
        let set = self.sets.get(&id).ok_or_else(|| Error::NoSuchSet { id, sets: self.seen() })?;
        // The mode is fixed for good, so the kernel is asked for the flags of fitting descriptors only.
        let fitting = set.fds.iter().rev().filter(|(_, descriptor)| descriptor.rights.mode() == access.mode());
        for (&serial, descriptor) in fitting {
            let rights = descriptor.rights_now();
            if access.matches(rights) {
                let number = descriptor.fd.as_raw_fd();
                return Ok(Found { fd: descriptor.fd.as_fd(), number, serial, rights });
            }
        }
        Err(Error::NoMatch { id, access, held: set.held() })
    }

    /// Enters a dup, which came from `descriptor` of set `id`, and gives it a serial.
    pub(crate) fn track(&mut self, id: i64, descriptor: u64, number: i32, opened_from: i32) -> u64 {
        let serial = self.serial();
        if let Some(set) = self.sets.get_mut(&id) {
            set.dups.insert(serial, DupEntry { info: DupInfo { number, opened_from }, descriptor });
            if let Some(descriptor) = set.fds.get_mut(&descriptor) {
                descriptor.dups += 1;
            }
        }
        serial
    }

    /// Strikes a dup. If it was the set's last, the set goes too if it is empty, and so do descriptors whose keeper has
    /// lapsed while the set was in use.
    pub(crate) fn untrack(&mut self, id: i64, serial: u64) -> Vec<OwnedFd> {
        let Some(set) = self.sets.get_mut(&id) else { return Vec::new() };
        let Some(dup) = set.dups.remove(&serial) else { return Vec::new() };
        if let Some(descriptor) = set.fds.get_mut(&dup.descriptor) {
            descriptor.dups -= 1;
        }
        if !set.dups.is_empty() {
            return Vec::new();
        }
        let lapsed = if self.in_use == InUse::Keep { set.lapsed(&self.keepers) } else { Vec::new() };
        self.take_out(id, &lapsed)
    }

    /// Lets leases end, and takes out what they kept. Tells which sets changed.
    pub(crate) fn expire(&mut self, now: Instant, closed: &mut Vec<OwnedFd>) -> Vec<i64> {
        if !self.keepers.expire(now) {
            return Vec::new();
        }
        let lapsed: Vec<(i64, Vec<u64>)> = self
            .sets
            .iter()
            .filter(|(_, set)| self.in_use == InUse::Close || set.dups.is_empty())
            .map(|(&id, set)| (id, set.lapsed(&self.keepers)))
            .filter(|(_, serials)| !serials.is_empty())
            .collect();
        for (id, serials) in &lapsed {
            closed.append(&mut self.take_out(*id, serials));
        }
        lapsed.into_iter().map(|(id, _)| id).collect()
    }

    /// Takes out everything; dups stay entered.
    pub(crate) fn clear(&mut self) -> Vec<OwnedFd> {
        let all: Vec<(i64, Vec<u64>)> =
            self.sets.iter().map(|(&id, set)| (id, set.fds.keys().copied().collect())).collect();
        all.into_iter().flat_map(|(id, serials)| self.take_out(id, &serials)).collect()
    }

    pub(crate) fn list(&self) -> Vec<SetInfo> {
        self.sets.iter().rev().map(|(&id, set)| set.info(id)).collect()
    }

    pub(crate) fn info(&self, id: i64) -> Option<SetInfo> {
        self.sets.get(&id).map(|set| set.info(id))
    }

    pub(crate) fn len(&self) -> usize {
        self.by_number.len()
    }

    pub(crate) fn refresh(&mut self) {
        for descriptor in self.sets.values_mut().flat_map(|set| set.fds.values_mut()) {
            descriptor.rights = descriptor.rights_now();
            if let Ok(identity) = Identity::of(&descriptor.fd) {
                descriptor.identity = Some(identity);
            }
        }
    }

    /// The one place where descriptors leave and emptied sets go.
    fn take_out(&mut self, id: i64, serials: &[u64]) -> Vec<OwnedFd> {
        let Some(set) = self.sets.get_mut(&id) else { return Vec::new() };
        let mut out = Vec::with_capacity(serials.len());
        for descriptor in serials.iter().filter_map(|serial| set.fds.remove(serial)) {
            self.by_number.remove(&descriptor.fd.as_raw_fd());
            if let Some(uid) = descriptor.provenance.peer.map(|peer| peer.uid)
                && let Some(passed) = self.by_user.get_mut(&uid)
            {
                *passed -= 1;
                if *passed == 0 {
                    self.by_user.remove(&uid);
                }
            }
            out.push(descriptor.fd);
        }
        if set.fds.is_empty() && set.dups.is_empty() {
            self.sets.remove(&id);
            self.free.give(id);
        }
        out
    }

    fn serial(&mut self) -> u64 {
        self.next_serial += 1;
        self.next_serial
    }

    fn seen(&self) -> SetsSeen {
        SetsSeen::new(self.sets.keys())
    }
}

impl Set {
    fn held(&self) -> Held {
        let fds = self.fds.values().map(|descriptor| (descriptor.fd.as_raw_fd(), descriptor.rights_now()));
        Held::new(fds, self.dups.len())
    }

    fn lapsed(&self, keepers: &Keepers) -> Vec<u64> {
        let lapsed = |(_, descriptor): &(&u64, &Descriptor)| keepers.lapsed(descriptor.provenance.keeper);
        self.fds.iter().filter(lapsed).map(|(&serial, _)| serial).collect()
    }

    fn info(&self, id: i64) -> SetInfo {
        SetInfo {
            id,
            fds: self.fds.values().map(Descriptor::info).collect(),
            dups: self.dups.values().map(|dup| dup.info).collect(),
        }
    }
}

impl Descriptor {
    /// The flags of this moment: `O_DIRECT` may have been set or cleared by whoever shares the description.
    fn rights_now(&self) -> Rights {
        Rights::of(&self.fd).unwrap_or(self.rights)
    }

    fn info(&self) -> FdInfo {
        FdInfo {
            number: self.fd.as_raw_fd(),
            opaque: self.opaque.clone(),
            rights: self.rights,
            identity: self.identity,
            provenance: self.provenance,
            dups: self.dups,
        }
    }
}
