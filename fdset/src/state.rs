// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tables under [`FdSets`](crate::FdSets). Every look-up is by key, so ten thousand sets cost what ten do; what a
//! search touches lies apart from what only listings need, so that it stays in the cache.
//!
//! Nothing is closed here: what leaves the tables is returned, and the caller closes it without the lock. A number is
//! struck from the index before its descriptor can be closed, so it never names another thread's new file.

use std::collections::{BTreeMap, HashMap, VecDeque};
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
    sets: HashMap<i64, Set>,
    /// By serial: new entries go to the end.
    abouts: BTreeMap<u64, About>,
    /// Also knows the order of the sets.
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
    fds: VecDeque<Descriptor>,
    dups: BTreeMap<u64, DupEntry>,
}

/// What a search looks at.
#[derive(Debug)]
struct Descriptor {
    serial: u64,
    fd: OwnedFd,
    /// Of the time of adding. Only the mode is certain to stay.
    rights: Rights,
    dups: usize,
}

/// What else is known of a descriptor.
#[derive(Debug)]
pub(crate) struct About {
    pub(crate) identity: Option<Identity>,
    pub(crate) opaque: Option<String>,
    pub(crate) provenance: Provenance,
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
            sets: HashMap::new(),
            abouts: BTreeMap::new(),
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

    /// Puts `fd` into set `id`, which is made if it is not there.
    pub(crate) fn add(&mut self, id: i64, fd: OwnedFd, rights: Rights, about: About) -> Added {
        if let Some(peer) = about.provenance.peer {
            *self.by_user.entry(peer.uid).or_default() += 1;
        }
        let serial = self.serial();
        let number = fd.as_raw_fd();
        self.by_number.insert(number, (id, serial));
        self.abouts.insert(serial, about);
        let set = self.sets.entry(id).or_insert_with(|| {
            self.free.take(id);
            Set::default()
        });
        set.fds.push_back(Descriptor { serial, fd, rights, dups: 0 });
        Added { set_id: id, fd: number }
    }

    /// Takes out descriptor number `fd`, or all of the set; for `by`, only what that user passed.
    pub(crate) fn remove(&mut self, id: i64, fd: Option<i64>, by: Option<Peer>) -> Result<Vec<OwnedFd>, Error> {
        let set = self.sets.get(&id);
        let serials: Vec<u64> = match (set, fd) {
            (None, None) => return Err(Error::SetNotFound { id, sets: self.seen() }),
            (Some(set), None) => set.serials(),
            (set, Some(fd)) => {
                let place = i32::try_from(fd).ok().and_then(|number| self.by_number.get(&number));
                match place {
                    Some(&(owner, serial)) if owner == id => vec![serial],
                    _ => return Err(Error::FdNotFound { id, fd, held: set.map(Set::held) }),
                }
            }
        };
        if let (Some(peer), Some(set)) = (by, set) {
            let owner =
                |descriptor: &Descriptor| self.abouts.get(&descriptor.serial).and_then(|about| about.provenance.peer);
            let concerned = set.fds.iter().filter(|descriptor| serials.binary_search(&descriptor.serial).is_ok());
            for descriptor in concerned {
                let owner = owner(descriptor);
                if owner.map(|owner| owner.uid) != Some(peer.uid) {
                    return Err(Error::NotYours { id, fd: descriptor.fd.as_raw_fd(), owner, peer });
                }
            }
        }
        Ok(self.take_out(id, &serials))
    }

    /// The newest descriptor of a set that `access` matches.
    pub(crate) fn find(&self, id: i64, access: Access) -> Result<Found<'_>, Error> {
        let set = self.sets.get(&id).ok_or_else(|| Error::NoSuchSet { id, sets: self.seen() })?;
        // The mode is fixed for good, so the kernel is asked for the flags of fitting descriptors only.
        let fitting = set.fds.iter().rev().filter(|descriptor| descriptor.rights.mode() == access.mode());
        for descriptor in fitting {
            let rights = descriptor.rights_now();
            if access.matches(rights) {
                let number = descriptor.fd.as_raw_fd();
                return Ok(Found { fd: descriptor.fd.as_fd(), number, serial: descriptor.serial, rights });
            }
        }
        Err(Error::NoMatch { id, access, held: set.held() })
    }

    /// Enters a dup, which came from `descriptor` of set `id`, and gives it a serial.
    pub(crate) fn track(&mut self, id: i64, descriptor: u64, number: i32, opened_from: i32) -> u64 {
        let serial = self.serial();
        if let Some(set) = self.sets.get_mut(&id) {
            set.dups.insert(serial, DupEntry { info: DupInfo { number, opened_from }, descriptor });
            if let Some(descriptor) = set.descriptor(descriptor) {
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
        if let Some(descriptor) = set.descriptor(dup.descriptor) {
            descriptor.dups -= 1;
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
        let all: Vec<(i64, Vec<u64>)> = self.sets.iter().map(|(&id, set)| (id, set.serials())).collect();
        all.into_iter().flat_map(|(id, serials)| self.take_out(id, &serials)).collect()
    }

    pub(crate) fn list(&self) -> Vec<SetInfo> {
        let mut list: Vec<SetInfo> = self.free.taken().filter_map(|id| self.info(id)).collect();
        list.reverse();
        list
    }

    pub(crate) fn info(&self, id: i64) -> Option<SetInfo> {
        let set = self.sets.get(&id)?;
        let info = |descriptor: &Descriptor| {
            let about = self.abouts.get(&descriptor.serial)?;
            Some(FdInfo {
                number: descriptor.fd.as_raw_fd(),
                opaque: about.opaque.clone(),
                rights: descriptor.rights,
                identity: about.identity,
                provenance: about.provenance,
                dups: descriptor.dups,
            })
        };
        Some(SetInfo {
            id,
            fds: set.fds.iter().filter_map(info).collect(),
            dups: set.dups.values().map(|dup| dup.info).collect(),
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.by_number.len()
    }

    pub(crate) fn refresh(&mut self) {
        for descriptor in self.sets.values_mut().flat_map(|set| &mut set.fds) {
            descriptor.rights = descriptor.rights_now();
            if let (Ok(identity), Some(about)) = (Identity::of(&descriptor.fd), self.abouts.get_mut(&descriptor.serial))
            {
                about.identity = Some(identity);
            }
        }
    }

    /// The one place where descriptors leave and emptied sets go.
    fn take_out(&mut self, id: i64, serials: &[u64]) -> Vec<OwnedFd> {
        let Some(set) = self.sets.get_mut(&id) else { return Vec::new() };
        let mut out = Vec::with_capacity(serials.len());
        for serial in serials {
            let Ok(place) = set.fds.binary_search_by_key(serial, |descriptor| descriptor.serial) else { continue };
            let Some(descriptor) = set.fds.remove(place) else { continue };
            self.by_number.remove(&descriptor.fd.as_raw_fd());
            let about = self.abouts.remove(serial);
            if let Some(uid) = about.and_then(|about| about.provenance.peer).map(|peer| peer.uid)
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

    /// Serials of the set's descriptors whose keeper has lapsed.
    fn lapsed(&self, id: i64) -> Vec<u64> {
        let mut serials = self.sets.get(&id).map_or_else(Vec::new, Set::serials);
        let lapsed = |about: &About| self.keepers.lapsed(about.provenance.keeper);
        serials.retain(|serial| self.abouts.get(serial).is_some_and(lapsed));
        serials
    }

    fn seen(&self) -> SetsSeen {
        SetsSeen::new(self.free.taken(), self.sets.len())
    }
}

impl Set {
    fn held(&self) -> Held {
        let fds = self.fds.iter().map(|descriptor| (descriptor.fd.as_raw_fd(), descriptor.rights_now()));
        Held::new(fds, self.dups.len())
    }

    fn serials(&self) -> Vec<u64> {
        self.fds.iter().map(|descriptor| descriptor.serial).collect()
    }

    fn descriptor(&mut self, serial: u64) -> Option<&mut Descriptor> {
        let place = self.fds.binary_search_by_key(&serial, |descriptor| descriptor.serial).ok()?;
        self.fds.get_mut(place)
    }
}

impl Descriptor {
    /// The flags of this moment: `O_DIRECT` may have been set or cleared by whoever shares the description.
    fn rights_now(&self) -> Rights {
        Rights::of(&self.fd).unwrap_or(self.rights)
    }
}
