// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Every descriptor of this process and whom it belongs to: what `query-descriptors` tells, and what anybody can compare with
//! `/proc/PID/fd` from outside.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::state::{Daemon, MonitorId};

/// Whom a descriptor belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Nobody but the process: standard streams, signals, wake-ups, the reserve.
    Process,
    /// A monitor: its listener, its client's connection.
    Monitor,
    /// A client's message, until a command claims it.
    Message,
    /// A name that `getfd` gave.
    Name,
    /// An fd set.
    Fdset,
    /// A node, which opened it from an fd set.
    Dup,
    /// An export server: its listener, its clients' connections.
    Export,
    /// A node: the socket to its server.
    Node,
}

impl Owner {
    /// Every owner's word, in the order of the enumeration.
    pub const WORDS: [&'static str; 8] = ["process", "monitor", "message", "name", "fdset", "dup", "export", "node"];

    /// The word in QMP.
    pub fn word(self) -> &'static str {
        Owner::WORDS[self as usize]
    }
}

/// A descriptor in the books.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Its number.
    pub fd: i32,
    /// Whom it belongs to.
    pub owner: Owner,
    /// Which of the owner's it is.
    pub what: String,
}

impl Held {
    /// An entry.
    pub fn new(fd: impl AsRawFd, owner: Owner, what: impl Into<String>) -> Held {
        Held { fd: fd.as_raw_fd(), owner, what: what.into() }
    }
}

/// Books for what neither fd sets nor servers can tell themselves.
#[derive(Debug, Default)]
pub struct Ledger {
    process: Vec<Held>,
    kept: Vec<OwnedFd>,
    monitors: BTreeMap<MonitorId, Vec<Held>>,
}

impl Ledger {
    /// Enters something that the process keeps to its end.
    pub fn enter(&mut self, fd: impl AsRawFd, what: &str) {
        self.process.push(Held::new(fd, Owner::Process, what));
    }

    /// Enters something and keeps it open to the end.
    pub fn keep(&mut self, fd: OwnedFd, what: &str) {
        self.enter(fd.as_raw_fd(), what);
        self.kept.push(fd);
    }

    /// Enters all that a monitor has now, in place of what it had.
    pub fn set_monitor(&mut self, monitor: MonitorId, held: Vec<Held>) {
        self.monitors.insert(monitor, held);
    }
}

/// Everything that `daemon` holds, by number. `unclaimed` came with the command that asks.
pub fn all(daemon: &Daemon, unclaimed: Vec<i32>) -> Vec<Held> {
    let mut held = daemon.ledger.process.clone();
    held.extend(daemon.reserve.numbers().map(|fd| Held::new(fd, Owner::Process, "reserve")));
    held.extend(daemon.exports.inflight().map(|fd| Held::new(fd, Owner::Process, "reserve of in-flight memory")));
    let workers = daemon.exports.workers();
    held.extend(workers.rings().descriptors().map(|fd| Held::new(fd, Owner::Process, "a ring for reads")));
    held.extend(daemon.ledger.monitors.values().flatten().cloned());
    held.extend(unclaimed.into_iter().map(|fd| Held::new(fd, Owner::Message, "the command that asks")));
    held.extend(daemon.named().map(|(monitor, name, fd)| {
        Held::new(fd, Owner::Name, format!("'{}' of monitor {monitor}", name.escape_debug()))
    }));
    for set in daemon.fdsets.list() {
        held.extend(set.fds().map(|fd| Held::new(fd.number(), Owner::Fdset, format!("set {}", set.id()))));
        held.extend(set.dups().map(|dup| {
            let user = dup.user().unwrap_or("somebody");
            Held::new(dup.number(), Owner::Dup, format!("node '{user}', from set {}", set.id()))
        }));
    }
    held.extend(daemon.metrics.descriptors().into_iter().map(|(fd, what)| Held::new(fd, Owner::Export, what)));
    held.extend(daemon.remotes.descriptors().into_iter().map(|(fd, what)| Held::new(fd, Owner::Node, what)));
    held.extend(daemon.exports.descriptors().into_iter().map(|(fd, what)| Held::new(fd, Owner::Export, what)));
    held.sort_by_key(|held| held.fd);
    held
}
