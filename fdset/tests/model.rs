// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Random sequences of calls, against a model that is too simple to be wrong: a list of descriptors and a list of dups.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use fdset::{Access, Dup, Error, FdSets, InUse, Keeper, Lifetime, Mode, Settings};
use proptest::prelude::*;
use rustix::fs::OFlags;
use support::Image;

#[derive(Clone, Debug)]
enum Step {
    /// Passes the image opened with the mode, into a set or a new one.
    Add(Option<i64>, Mode),
    /// Removes the n-th descriptor there is (or none), through the set it is in or another.
    RemoveFd(Option<i64>, usize),
    RemoveSet(i64),
    Open(i64, Mode),
    /// Drops the n-th dup there is.
    DropDup(usize),
    Connect,
    Disconnect,
    /// Lets time pass and leases end.
    Wait(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let id = || prop_oneof![12 => 0..6i64, 1 => Just(-1), 1 => Just(i64::MAX)];
    let mode = || prop_oneof![Just(Mode::ReadOnly), Just(Mode::ReadWrite), Just(Mode::WriteOnly)];
    let step = prop_oneof![
        6 => (prop::option::of(id()), mode()).prop_map(|(id, mode)| Step::Add(id, mode)),
        3 => (prop::option::weighted(0.2, id()), 0..12usize).prop_map(|(id, n)| Step::RemoveFd(id, n)),
        2 => id().prop_map(Step::RemoveSet),
        5 => (id(), mode()).prop_map(|(id, mode)| Step::Open(id, mode)),
        4 => (0..8usize).prop_map(Step::DropDup),
        1 => Just(Step::Connect),
        1 => Just(Step::Disconnect),
        1 => (0..15u64).prop_map(Step::Wait),
    ];
    prop::collection::vec(step, 0..80)
}

fn settings() -> impl Strategy<Value = Settings> {
    let lifetime =
        prop_oneof![Just(Lifetime::Explicit), Just(Lifetime::Monitor), Just(Lifetime::Lease(Duration::from_secs(10)))];
    let in_use = prop_oneof![Just(InUse::Close), Just(InUse::Keep)];
    (lifetime, in_use).prop_map(|(lifetime, in_use)| Settings { lifetime, in_use, ..Settings::default() })
}

/// What the sets should be: descriptors by age as (set, number, mode), dups as (set, number of origin).
struct Model {
    settings: Settings,
    fds: Vec<(i64, i32, Mode)>,
    dups: Vec<(i64, i32, Dup)>,
    now: Instant,
    clients: usize,
    /// When the clients' descriptors go.
    due: Option<Instant>,
    lapsed: bool,
}

impl Model {
    fn exists(&self, id: i64) -> bool {
        self.fds.iter().any(|&(set, ..)| set == id) || self.in_use(id)
    }

    fn in_use(&self, id: i64) -> bool {
        self.dups.iter().any(|&(set, ..)| set == id)
    }

    fn lowest_free(&self) -> i64 {
        (0..).find(|&id| !self.exists(id)).unwrap()
    }

    fn listing(&self) -> Vec<(i64, Vec<i32>)> {
        let mut ids: Vec<i64> =
            self.fds.iter().map(|&(set, ..)| set).chain(self.dups.iter().map(|&(set, ..)| set)).collect();
        ids.sort_unstable();
        ids.dedup();
        let fds = |id| self.fds.iter().filter(|&&(set, ..)| set == id).map(|&(_, number, _)| number).collect();
        ids.into_iter().rev().map(|id| (id, fds(id))).collect()
    }

    fn lapse_if_due(&mut self) {
        if self.due.is_some_and(|due| due <= self.now) {
            (self.due, self.lapsed) = (None, true);
            let keep = self.settings.in_use == InUse::Keep;
            let used: Vec<i64> = self.dups.iter().map(|&(set, ..)| set).collect();
            self.fds.retain(|(set, ..)| keep && used.contains(set));
        }
    }

    fn run(&mut self, sets: &FdSets, image: &Image, step: &Step) -> Result<(), TestCaseError> {
        match *step {
            Step::Add(set, mode) => match (set, sets.add(image.open(flags(mode)), set, None)) {
                (Some(..0), result) => {
                    prop_assert!(fails(result, |e| matches!(e, Error::NegativeId { .. })), "wrong error");
                }
                (set, result) => {
                    let added = result.unwrap();
                    prop_assert_eq!(added.set_id, set.unwrap_or_else(|| self.lowest_free()));
                    self.fds.push((added.set_id, added.fd, mode));
                }
            },
            Step::RemoveFd(set, n) => {
                let Some(&(owner, number, _)) = self.fds.get(n) else { return Ok(()) };
                let set = set.unwrap_or(owner);
                let result = sets.remove(set, Some(number.into()));
                if set == owner {
                    prop_assert_eq!(result.unwrap(), 1);
                    self.fds.remove(n);
                } else {
                    prop_assert!(fails(result, |e| matches!(e, Error::FdNotFound { .. })), "wrong error");
                }
            }
            Step::RemoveSet(id) => {
                let result = sets.remove(id, None);
                if self.exists(id) {
                    prop_assert_eq!(result.unwrap(), self.fds.iter().filter(|&&(set, ..)| set == id).count());
                    self.fds.retain(|&(set, ..)| set != id);
                } else {
                    prop_assert!(fails(result, |e| matches!(e, Error::SetNotFound { .. })), "wrong error");
                }
            }
            Step::Open(id, mode) => {
                let result = sets.open(id, Access::from_open_flags(flags(mode).bits()));
                let newest = self.fds.iter().rfind(|&&(set, _, has)| set == id && has == mode);
                match newest {
                    Some(&(_, number, _)) => {
                        let dup = result.unwrap();
                        prop_assert_eq!((dup.set_id(), dup.opened_from()), (id, number));
                        self.dups.push((id, number, dup));
                    }
                    None if self.exists(id) => {
                        prop_assert!(fails(result, |e| matches!(e, Error::NoMatch { .. })), "wrong error");
                    }
                    None => prop_assert!(fails(result, |e| matches!(e, Error::NoSuchSet { .. })), "wrong error"),
                }
            }
            Step::DropDup(n) => {
                if n < self.dups.len() {
                    let (id, ..) = self.dups.remove(n);
                    if self.lapsed && self.settings.in_use == InUse::Keep && !self.in_use(id) {
                        self.fds.retain(|&(set, ..)| set != id);
                    }
                }
            }
            Step::Connect => {
                sets.monitor_connected(Keeper::default());
                self.clients += 1;
                (self.due, self.lapsed) = (None, false);
            }
            Step::Disconnect => {
                sets.monitor_disconnected(Keeper::default(), self.now);
                if self.clients == 1 {
                    self.due = match self.settings.lifetime {
                        Lifetime::Explicit => None,
                        Lifetime::Monitor => Some(self.now),
                        Lifetime::Lease(grace) => Some(self.now + grace),
                    };
                }
                self.clients = self.clients.saturating_sub(1);
                self.lapse_if_due();
            }
            Step::Wait(seconds) => {
                self.now += Duration::from_secs(seconds);
                sets.expire(self.now);
                self.lapse_if_due();
            }
        }
        Ok(())
    }

    /// Everything that can be seen of the sets.
    fn agrees_with(&self, sets: &FdSets) -> Result<(), TestCaseError> {
        prop_assert_eq!(support::listing(sets), self.listing());
        prop_assert_eq!(sets.len(), self.fds.len());
        prop_assert_eq!(sets.next_deadline(), self.due);
        for set in sets.list() {
            let expected: Vec<(i32, i32)> = self
                .dups
                .iter()
                .filter(|(id, ..)| *id == set.id())
                .map(|(_, number, dup)| (dup.as_raw_fd(), *number))
                .collect();
            let listed: Vec<(i32, i32)> = set.dups().map(|dup| (dup.number(), dup.opened_from())).collect();
            prop_assert_eq!(&listed, &expected);
        }
        for (.., dup) in &self.dups {
            prop_assert!(rustix::fs::fstat(dup.as_fd()).is_ok(), "a dup is open for as long as it lives");
        }
        Ok(())
    }
}

fn fails<T>(result: Result<T, Error>, so: fn(&Error) -> bool) -> bool {
    result.is_err_and(|error| so(&error))
}

fn flags(mode: Mode) -> OFlags {
    match mode {
        Mode::ReadOnly => OFlags::RDONLY,
        Mode::WriteOnly => OFlags::WRONLY,
        Mode::ReadWrite | Mode::Neither => OFlags::RDWR,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn sets_do_what_the_model_does(settings in settings(), steps in steps()) {
        let (image, sets) = (Image::new(), FdSets::with(settings));
        // Numbers in use by others must never be taken for a set's own.
        let _bystander: OwnedFd = image.read_only();
        let mut model = Model {
            settings,
            fds: Vec::new(),
            dups: Vec::new(),
            now: Instant::now(),
            clients: 0,
            due: None,
            lapsed: false,
        };
        for step in &steps {
            model.run(&sets, &image, step)?;
            model.agrees_with(&sets)?;
        }
        // With all dups gone, only what the descriptors hold is left; with all sets removed, nothing.
        for (id, _) in support::listing(&sets) {
            sets.remove(id, None).unwrap();
        }
        prop_assert_eq!(sets.list().filter(|set| set.dups().len() == 0).count(), 0);
        model.dups.clear();
        prop_assert_eq!(sets.list().len(), 0);
    }
}
