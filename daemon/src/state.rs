// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Everything the commands work on. One thread owns it, so nothing here is locked.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use block::Graph;
use confine::Confined;
use fdset::{Added, FdPolicy, FdSets, Keeper, Lifetime, Peer, Provenance, Role, Settings};
use qmp::{Error, NamedFds};
use serde_json::{Value, json};

use crate::alarms::Alarms;
use crate::exports::Exports;
use crate::jobs::Jobs;
use crate::ledger::Ledger;
use crate::metrics::{self, Metrics};
use crate::objects::Objects;
use crate::remotes::Remotes;
use crate::reserve::Reserve;
use crate::wake::Wake;
use crate::wants::Wants;

/// A monitor, for as long as the daemon lives.
pub type MonitorId = usize;

/// Numbers kept back for monitors' clients.
const RESERVED: usize = 4;

/// Which events about fd sets go out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FdsetEvents {
    /// `FDSET_CHANGED`.
    pub changed: bool,
    /// `FDSET_STRAY_FD`.
    pub stray: bool,
    /// `FDSET_WANTED`, and how long a command then waits.
    pub wanted: Option<Duration>,
}

impl Default for FdsetEvents {
    fn default() -> FdsetEvents {
        FdsetEvents { changed: true, stray: true, wanted: None }
    }
}

/// Who gives the command that runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Speaker {
    /// Its monitor.
    pub monitor: MonitorId,
    /// Whose leaving ends the life of what it passes.
    pub keeper: Keeper,
    /// The process at the other end; `None` for the command line and for sockets that cannot tell.
    pub peer: Option<Peer>,
}

/// The control state. There is none without proof that the process is confined.
pub struct Daemon {
    /// The proof, and what it consists of.
    pub confined: Confined,
    /// What became of the attempts that it made to get out when it started, if it made any.
    pub attested: Option<Vec<confine::attempts::Outcome>>,
    /// What was passed for nodes.
    pub fdsets: Arc<FdSets>,
    /// What the sets refuse.
    pub policy: FdPolicy,
    /// What opens wanted and did not find.
    pub wants: Wants,
    /// Which events about fd sets go out.
    pub fdset_events: FdsetEvents,
    /// The nodes.
    pub graph: Graph,
    /// What drivers found wrong with images.
    alarms: Alarms,
    /// The exports.
    pub exports: Exports,
    /// Who tells scrapers.
    pub metrics: Metrics,
    /// Sockets to servers that nodes use.
    pub remotes: Remotes,
    /// Work that goes on after its command has answered.
    pub jobs: Jobs,
    /// Objects that commands refer to by id.
    pub objects: Objects,
    /// Whether the daemon should end.
    pub quit: bool,
    /// Events that no monitor has been told yet.
    pub events: Vec<(&'static str, Value)>,
    /// Whom descriptors belong to.
    pub ledger: Ledger,
    /// Numbers kept back.
    pub reserve: Reserve,
    /// Grows whenever something is passed into a set: commands that wait for it are tried again.
    pub additions: u64,
    wake: Arc<Wake>,
    /// What was passed for everything else, by monitor: names outlive the client that gave them.
    named: BTreeMap<MonitorId, NamedFds>,
    speaker: Speaker,
}

impl Daemon {
    /// A daemon with nothing in it. `wake` is told when something changes behind the control thread's back.
    pub fn new(confined: Confined, settings: Settings, wake: Arc<Wake>) -> Daemon {
        let fdsets = Arc::new(FdSets::with(settings));
        // What the command line passes belongs to no client that could leave.
        let keeper = fdsets.keeper(Lifetime::Explicit);
        let alarms = Alarms::default();
        let mut ledger = Ledger::default();
        for (stream, what) in ["standard input", "standard output", "standard error"].into_iter().enumerate() {
            ledger.enter(i32::try_from(stream).unwrap_or(0), what);
        }
        ledger.enter(wake.as_fd().as_raw_fd(), "wake-ups");
        Daemon {
            confined,
            attested: None,
            fdsets,
            policy: settings.policy,
            wants: Wants::default(),
            fdset_events: FdsetEvents::default(),
            graph: Graph::with_alarm(alarms.alarm(Arc::clone(&wake))),
            alarms,
            exports: Exports::new(Arc::clone(&wake)),
            remotes: Remotes::new(Arc::clone(&wake)),
            metrics: Metrics::default(),
            jobs: Jobs::new(Arc::clone(&wake)),
            objects: Objects::default(),
            quit: false,
            events: Vec::new(),
            ledger,
            reserve: Reserve::new(&*wake, RESERVED),
            additions: 0,
            wake,
            named: BTreeMap::new(),
            speaker: Speaker { keeper, ..Speaker::default() },
        }
    }

    /// Says whose commands run from now on.
    pub fn enter(&mut self, speaker: Speaker) {
        self.speaker = speaker;
    }

    /// The descriptors that the current monitor's clients have named.
    pub fn named_fds(&mut self) -> &mut NamedFds {
        self.named.entry(self.speaker.monitor).or_default()
    }

    /// Every named descriptor: its monitor, name and number.
    pub fn named(&self) -> impl Iterator<Item = (MonitorId, &str, i32)> {
        self.named.iter().flat_map(|(&monitor, named)| named.numbers().map(move |(name, fd)| (monitor, name, fd)))
    }

    /// Adds a descriptor to a set, or to a new one.
    ///
    /// # Errors
    /// Those of [`FdSets::add`]; the descriptor is then closed.
    pub fn add_fd(&mut self, fd: OwnedFd, set: Option<i64>, opaque: Option<String>) -> Result<Added, Error> {
        let Speaker { keeper, peer, .. } = self.speaker;
        let provenance = Provenance { peer, at: Some(SystemTime::now()), role: Role::default(), keeper };
        let added = self.fdsets.add_from(fd, set, opaque, provenance).map_err(|e| {
            tracing::info!("add-fd: {}", e.detail());
            Error::generic(e.to_string())
        })?;
        self.additions += 1;
        self.fdset_changed(added.set_id, "added");
        Ok(added)
    }

    /// Says that a set has changed.
    pub fn fdset_changed(&mut self, set: i64, change: &'static str) {
        if self.fdset_events.changed {
            self.events.push(("FDSET_CHANGED", json!({ "fdset-id": set, "change": change })));
        }
    }

    /// Says that descriptors came which nobody claimed, and were closed.
    pub fn strayed(&mut self, monitor: MonitorId, count: usize) {
        if count > 0 {
            tracing::info!(monitor, count, "descriptors that no command claimed were closed");
            if self.fdset_events.stray {
                self.events.push(("FDSET_STRAY_FD", json!({ "monitor": monitor, "count": count })));
            }
        }
    }

    /// A client has left: what lived for it goes.
    pub fn monitor_left(&mut self, keeper: Keeper) {
        for set in self.fdsets.monitor_disconnected(keeper, Instant::now()) {
            self.fdset_changed(set, "expired");
        }
        self.reserve.refill(&*self.wake);
    }

    /// Ends leases that are over.
    pub fn expire_leases(&mut self) {
        for set in self.fdsets.expire(Instant::now()) {
            self.fdset_changed(set, "expired");
        }
    }

    /// Whom other threads wake.
    pub fn wake(&self) -> Arc<Wake> {
        Arc::clone(&self.wake)
    }

    /// Gives scrapers what they wait for.
    pub fn answer_scrapers(&self) {
        let waiting = self.metrics.waiting();
        if !waiting.is_empty() {
            let text = metrics::render(self);
            for scraper in waiting {
                // It may have lost its patience.
                let _ = scraper.send(text.clone());
            }
        }
    }

    /// Asks for other sockets in place of lost ones.
    pub fn ask_for_sockets(&mut self) {
        for node in self.remotes.take_lost() {
            self.events.push(("BLOCK_NBD_DISCONNECTED", json!({ "node-name": node })));
        }
    }

    /// Says what drivers found wrong with images.
    pub fn hear_alarms(&mut self) {
        self.events.extend(self.alarms.take().into_iter().map(|found| ("BLOCK_IMAGE_CORRUPTED", found)));
    }

    /// Lets go of what jobs used that have ended.
    pub fn release_jobs(&mut self) {
        for claim in self.jobs.reap() {
            self.graph.release(claim);
        }
    }

    /// Lets go of exports that have ended, and says so.
    pub fn reap_exports(&mut self) {
        for (id, claim) in self.exports.reap() {
            self.graph.release(claim);
            self.events.push(("BLOCK_EXPORT_DELETED", json!({ "id": id })));
        }
    }
}
