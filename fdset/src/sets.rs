// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The sets and what can be done with them.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::io::fcntl_dupfd_cloexec;

use crate::dup::Ticket;
use crate::policy::refusal;
use crate::state::State;
use crate::table::About;
use crate::{
    Access, Dup, DupInfo, Error, FdPolicy, Identity, InUse, Keeper, Lifetime, Peer, Provenance, Quotas, Refused,
    Rights, SetInfo, path,
};

/// What the sets allow and how long they keep it. The default is QEMU's: everything, for ever.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    /// Which descriptors are taken.
    pub policy: FdPolicy,
    /// How many.
    pub quotas: Quotas,
    /// What the default [`Keeper`] does when its last client has gone.
    pub lifetime: Lifetime,
    /// What happens then to sets in use.
    pub in_use: InUse,
}

/// Named sets of descriptors; owner of every descriptor that was passed.
///
/// Any thread may call any method; each takes effect at once and as a whole. Descriptors are closed outside the lock, so
/// a slow `close(2)` holds up nobody else. Dropping it closes the sets' descriptors; their [`Dup`]s live on.
#[derive(Debug)]
pub struct FdSets {
    shared: Arc<Shared>,
    settings: Settings,
}

/// Where a descriptor went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Added {
    /// The set, `fdset-id` in QMP.
    pub set_id: i64,
    /// The descriptor's number in this process.
    pub fd: i32,
}

impl Default for FdSets {
    fn default() -> FdSets {
        FdSets::new()
    }
}

impl FdSets {
    /// No sets, with QEMU's settings.
    pub fn new() -> FdSets {
        FdSets::with(Settings::default())
    }

    /// No sets, with other settings.
    pub fn with(settings: Settings) -> FdSets {
        FdSets { shared: Arc::new(Shared(Mutex::new(State::new(&settings)))), settings }
    }

    /// Puts `fd` into the set with id `set`, which is made if it is not there, or into a new set with the lowest free id.
    /// `opaque` is free text to know the descriptor by.
    ///
    /// # Errors
    /// Those of [`add_from`](FdSets::add_from).
    pub fn add(&self, fd: OwnedFd, set: Option<i64>, opaque: Option<String>) -> Result<Added, Error> {
        self.add_from(fd, set, opaque, Provenance::default())
    }

    /// [`add`](FdSets::add), with where the descriptor came from. The kernel is asked what it is, which may wait for a
    /// network or FUSE file system's server.
    ///
    /// # Errors
    /// [`Error::NegativeId`], [`Error::Quota`]; under [`FdPolicy::Strict`] also [`Error::Refused`] and [`Error::Unknown`].
    /// The descriptor is closed then.
    pub fn add_from(
        &self,
        fd: OwnedFd,
        set: Option<i64>,
        opaque: Option<String>,
        provenance: Provenance,
    ) -> Result<Added, Error> {
        if let Some(id) = set.filter(|&id| id < 0) {
            return Err(Error::NegativeId { id });
        }
        let number = fd.as_raw_fd();
        let unknown = |source| Error::Unknown { fd: number, source };
        let rights = Rights::of(&fd).map_err(unknown)?;
        let identity = match (Identity::of(&fd), self.settings.policy) {
            (Ok(identity), FdPolicy::Compat) => Some(identity),
            (Err(_), FdPolicy::Compat) => None,
            (Err(source), FdPolicy::Strict) => return Err(unknown(source)),
            (Ok(identity), FdPolicy::Strict) => match refusal(provenance.role, rights, &identity) {
                Some(reason) => return Err(Error::Refused(Box::new(Refused { fd: number, reason, rights, identity }))),
                None => Some(identity),
            },
        };
        let about = About { identity, opaque, provenance };
        // Declared after the descriptor, hence given up before it: one over quota is closed without the lock.
        let mut state = self.shared.lock();
        let id = state.room_for(set, provenance.peer, &self.settings.quotas)?;
        Ok(state.add(id, fd, rights, about))
    }

    /// Closes descriptor number `fd` of a set, or all its descriptors; tells how many. Dups live on and keep the id taken;
    /// without any, an emptied set is gone. A dup's number names no descriptor here.
    ///
    /// # Errors
    /// [`Error::SetNotFound`], [`Error::FdNotFound`].
    pub fn remove(&self, set: i64, fd: Option<i64>) -> Result<usize, Error> {
        let closed = self.shared.lock().remove(set, fd, None)?;
        Ok(closed.len())
    }

    /// [`remove`](FdSets::remove), for `peer` alone: nothing is closed if anything of it was passed by another user. For
    /// programs whose clients do not trust each other.
    ///
    /// # Errors
    /// Those of `remove`, and [`Error::NotYours`].
    pub fn remove_by(&self, peer: Peer, set: i64, fd: Option<i64>) -> Result<usize, Error> {
        let closed = self.shared.lock().remove(set, fd, Some(peer))?;
        Ok(closed.len())
    }

    /// Duplicates the newest descriptor of a set whose access mode and `O_DIRECT` are exactly those of `access`.
    ///
    /// The duplicate is close-on-exec and gets **no flags set**. QEMU sets the wanted flags on it (`F_SETFL`), but they
    /// belong to the open file description: that clears `O_APPEND` and `O_NONBLOCK` for the client that passed the
    /// descriptor too, and lets one user of a set change what another one's writes do. Here an open changes nothing.
    /// Likewise nothing is truncated: with `O_TRUNC` in mind, truncate the dup.
    ///
    /// # Errors
    /// [`Error::NoSuchSet`]; [`Error::NoMatch`]; [`Error::Dup`] with `EINVAL` if the match was opened with other `O_SYNC` or
    /// `O_DSYNC` bits, with `EMFILE` if the process has no number left.
    pub fn open(&self, id: i64, access: Access) -> Result<Dup, Error> {
        self.open_as(id, access, None, None)
    }

    /// [`open`](FdSets::open), saying who will use the dup: listings show it.
    ///
    /// # Errors
    /// Those of `open`.
    pub fn open_for(&self, id: i64, access: Access, user: &str) -> Result<Dup, Error> {
        self.open_as(id, access, None, Some(user.into()))
    }

    /// [`open_for`](FdSets::open_for) among the descriptors whose opaque text is `opaque` alone. So a set can stand for a
    /// directory, with the text as the name in it.
    ///
    /// # Errors
    /// Those of `open`.
    pub fn open_named(&self, id: i64, opaque: &str, access: Access, user: &str) -> Result<Dup, Error> {
        self.open_as(id, access, Some(opaque), Some(user.into()))
    }

    /// Duplicates every descriptor of a set, the oldest first, each with its opaque text: for a set that stands for a whole
    /// directory. One pass, however many there are.
    ///
    /// # Errors
    /// Those of `open`, if one of them does not fit or cannot be duplicated: then none is kept.
    pub fn open_all(&self, id: i64, access: Access, user: &str) -> Result<Vec<(Option<String>, Dup)>, Error> {
        // Declared first: dups that are dropped take the lock, which is given up before.
        let mut dups = Vec::new();
        let mut state = self.shared.lock();
        for (number, opaque) in state.all_fitting(id, access)? {
            let found = state.numbered(number).ok_or(Error::FdNotFound { id, fd: number.into(), held: None })?;
            let rights = found.rights;
            let fd = fcntl_dupfd_cloexec(&found.fd, 0).map_err(|errno| Error::Dup {
                id,
                fd: number,
                access,
                rights,
                source: errno.into(),
            })?;
            let serial =
                state.track(id, DupInfo { number: fd.as_raw_fd(), opened_from: number, user: Some(user.into()) });
            dups.push((opaque, Dup::new(fd, Ticket { sets: Arc::downgrade(&self.shared), set: id, serial }, number)));
        }
        Ok(dups)
    }

    fn open_as(&self, id: i64, access: Access, opaque: Option<&str>, user: Option<Box<str>>) -> Result<Dup, Error> {
        let mut state = self.shared.lock();
        let found = state.find(id, access, opaque)?;
        let refused = |source| Error::Dup { id, fd: found.number, access, rights: found.rights, source };
        if !access.agrees_on_sync(found.rights) {
            return Err(refused(rustix::io::Errno::INVAL.into()));
        }
        let fd = fcntl_dupfd_cloexec(found.fd, 0).map_err(|errno| refused(errno.into()))?;
        let opened_from = found.number;
        let serial = state.track(id, DupInfo { number: fd.as_raw_fd(), opened_from, user });
        let ticket = Ticket { sets: Arc::downgrade(&self.shared), set: id, serial };
        Ok(Dup::new(fd, ticket, opened_from))
    }

    /// [`open`](FdSets::open) by the path `/dev/fdset/N`.
    ///
    /// # Errors
    /// Those of `open` and of [`path::set_id`].
    pub fn open_path(&self, path: &str, access: Access) -> Result<Dup, Error> {
        self.open(path::set_id(path)?, access)
    }

    /// All sets, by descending id as QEMU lists them.
    pub fn list(&self) -> impl ExactSizeIterator<Item = SetInfo> + use<> {
        self.shared.lock().list().into_iter()
    }

    /// One set, if it is there.
    pub fn set(&self, id: i64) -> Option<SetInfo> {
        self.shared.lock().info(id)
    }

    /// How many descriptors the sets own, dups not counted.
    pub fn len(&self) -> usize {
        self.shared.lock().len()
    }

    /// Whether the sets own no descriptor. There may be sets that live on for their dups.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Asks the kernel again what every descriptor is, for listings that show sizes and names lost since. Other calls and
    /// drops of dups wait meanwhile.
    pub fn refresh(&self) {
        self.shared.lock().refresh();
    }

    /// A keeper of its own for descriptors of one monitor, or of several that share a fate. One per monitor, not per
    /// connection: keepers are never given back.
    pub fn keeper(&self, lifetime: Lifetime) -> Keeper {
        self.shared.lock().keepers.add(lifetime)
    }

    /// A client of the keeper's monitor has come.
    pub fn monitor_connected(&self, keeper: Keeper) {
        self.shared.lock().keepers.connected(keeper);
    }

    /// A client has gone. If it was the last and the lifetime is [`Lifetime::Monitor`], descriptors are closed at once.
    /// Tells which sets changed, in ascending order.
    pub fn monitor_disconnected(&self, keeper: Keeper, now: Instant) -> Vec<i64> {
        self.shared.lock().keepers.disconnected(keeper, now);
        self.expire(now)
    }

    /// Closes the descriptors whose lease has ended. Tells which sets changed, in ascending order.
    pub fn expire(&self, now: Instant) -> Vec<i64> {
        let mut closed = Vec::new();
        let changed = self.shared.lock().expire(now, &mut closed);
        drop(closed);
        changed
    }

    /// When [`expire`](FdSets::expire) should be called next, if at all. Clients that come and go change it.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.shared.lock().keepers.next_deadline()
    }
}

impl Drop for FdSets {
    fn drop(&mut self) {
        // A dup that is being dropped right now may keep the state alive for a moment; the descriptors go here.
        let closed = self.shared.lock().clear();
        drop(closed);
    }
}

/// The state, shared with the dups.
#[derive(Debug)]
pub(crate) struct Shared(Mutex<State>);

impl Shared {
    /// No call leaves the state half changed, so a thread that panicked while holding the lock does no harm.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A dup has been closed.
    pub(crate) fn give_up(&self, set: i64, serial: u64) {
        let closed = self.lock().untrack(set, serial);
        drop(closed);
    }
}
