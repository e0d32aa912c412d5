// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Everything the commands work on. One thread owns it, so nothing here is locked.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use block::Graph;
use confine::Confined;
use fdset::{Added, FdPolicy, FdSets, Settings};
use qmp::{Error, NamedFds};
use serde_json::{Value, json};

use crate::exports::Exports;
use crate::wake::Wake;

/// A monitor, for as long as the daemon lives.
pub type MonitorId = usize;

/// The control state. There is none without proof that the process is confined.
pub struct Daemon {
    /// The proof, and what it consists of.
    pub confined: Confined,
    /// What was passed for nodes.
    pub fdsets: Arc<FdSets>,
    /// What the sets refuse.
    pub policy: FdPolicy,
    /// The nodes.
    pub graph: Graph,
    /// The exports.
    pub exports: Exports,
    /// Whether the daemon should end.
    pub quit: bool,
    /// Events that no monitor has been told yet.
    pub events: Vec<(&'static str, Value)>,
    /// What was passed for everything else, by monitor: names outlive the client that gave them.
    named: BTreeMap<MonitorId, NamedFds>,
    /// The monitor whose command runs.
    current: MonitorId,
}

impl Daemon {
    /// A daemon with nothing in it. `wake` is told when something changes behind the control thread's back.
    pub fn new(confined: Confined, settings: Settings, wake: Arc<Wake>) -> Daemon {
        Daemon {
            confined,
            fdsets: Arc::new(FdSets::with(settings)),
            policy: settings.policy,
            graph: Graph::new(),
            exports: Exports::new(wake),
            quit: false,
            events: Vec::new(),
            named: BTreeMap::new(),
            current: 0,
        }
    }

    /// Says whose commands run from now on.
    pub fn enter(&mut self, monitor: MonitorId) {
        self.current = monitor;
    }

    /// The descriptors that the current monitor's clients have named.
    pub fn named_fds(&mut self) -> &mut NamedFds {
        self.named.entry(self.current).or_default()
    }

    /// Adds a descriptor to a set, or to a new one.
    ///
    /// # Errors
    /// Those of [`FdSets::add`]; the descriptor is then closed.
    pub fn add_fd(&mut self, fd: OwnedFd, set: Option<i64>, opaque: Option<String>) -> Result<Added, Error> {
        self.fdsets.add(fd, set, opaque).map_err(|e| {
            tracing::info!("add-fd: {}", e.detail());
            Error::generic(e.to_string())
        })
    }

    /// Lets go of exports that have ended, and says so.
    pub fn reap_exports(&mut self) {
        for (id, claim) in self.exports.reap() {
            self.graph.release(claim);
            self.events.push(("BLOCK_EXPORT_DELETED", json!({ "id": id })));
        }
    }
}
