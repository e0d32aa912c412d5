// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The control side of exports: ids, the NBD server, and what is on its way out.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use block::{Claim, Root};
use export::nbd::tls::Tls;
use export::nbd::{Admission, Limits, Moved, Server, Settings};
use export::{Rings, Running, Workers};
use qmp::Error;

use crate::wake::Wake;

/// An export as queries show it.
#[derive(Debug)]
pub struct Shown<'a> {
    /// Its id.
    pub id: &'a str,
    /// Its kind.
    pub kind: &'static str,
    /// Its node.
    pub node_name: String,
    /// Whether it is being removed.
    pub shutting_down: bool,
}

struct Entry {
    /// Grows from export to export.
    age: u64,
    kind: &'static str,
    export: Arc<dyn Running>,
    /// The name in the NBD server, for those that it serves.
    nbd_name: Option<String>,
    claim: Claim,
    shutting_down: bool,
}

/// All exports by id.
pub struct Exports {
    nbd: Option<Server>,
    entries: BTreeMap<String, Entry>,
    next_age: u64,
    workers: Workers,
    inflight: Vec<OwnedFd>,
    /// Where front ends come from for exports to be, by id.
    awaited: BTreeMap<String, OwnedFd>,
    wake: Arc<Wake>,
    /// NBD clients are not let in yet.
    closed: bool,
}

impl Exports {
    /// None yet. `wake` is told when a client has left.
    pub fn new(wake: Arc<Wake>) -> Exports {
        Exports {
            nbd: None,
            entries: BTreeMap::new(),
            next_age: 0,
            workers: Workers::new(),
            inflight: Vec::new(),
            awaited: BTreeMap::new(),
            wake,
            closed: false,
        }
    }

    /// From now on NBD clients wait: they must not hear that an export is not there which the command line goes on to make.
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// Lets NBD clients in.
    pub fn open(&mut self) {
        self.closed = false;
        if let Some(server) = &self.nbd {
            server.admit();
        }
    }

    /// Whether there is an NBD server.
    pub fn nbd_is_running(&self) -> bool {
        self.nbd.is_some()
    }

    /// Serves NBD on a listening socket, with `tls` only to clients that begin it.
    ///
    /// # Errors
    /// The descriptor is no listening stream socket, or there is no thread for it.
    pub fn start_nbd(&mut self, listener: OwnedFd, mut limits: Limits, tls: Option<Tls>) -> Result<(), Error> {
        if !rustix::net::sockopt::socket_acceptconn(&listener).unwrap_or(false) {
            return Err(Error::generic("The passed descriptor is not a listening socket"));
        }
        if self.closed {
            limits.admission = Admission::WhenTold;
        }
        let wake = Arc::clone(&self.wake);
        let server = Server::start(listener, limits, tls, self.workers.clone(), move || wake.up())
            .map_err(|e| Error::generic(format!("Could not start the NBD server: {e}")))?;
        self.nbd = Some(server);
        Ok(())
    }

    /// Stops the NBD server; its exports are on their way out.
    ///
    /// # Errors
    /// There is none.
    pub fn stop_nbd(&mut self) -> Result<(), Error> {
        let server = self.nbd.take().ok_or_else(|| Error::generic("NBD server not running"))?;
        server.stop();
        for entry in self.entries.values_mut().filter(|entry| entry.nbd_name.is_some()) {
            entry.shutting_down = true;
        }
        Ok(())
    }

    /// Stops the NBD server as [`stop_nbd`](Exports::stop_nbd) does, but gives its clients away; see [`Server::move_clients`].
    ///
    /// # Errors
    /// There is none.
    pub fn move_nbd(&mut self, patience: Duration) -> Result<Vec<Moved>, Error> {
        let server = self.nbd.take().ok_or_else(|| Error::generic("NBD server not running"))?;
        let moved = server.move_clients(patience);
        for entry in self.entries.values_mut().filter(|entry| entry.nbd_name.is_some()) {
            entry.shutting_down = true;
        }
        Ok(moved)
    }

    /// Goes on with another daemon's client; the inner error says why that cannot be.
    ///
    /// # Errors
    /// There is no NBD server.
    pub fn take_nbd_client(&self, client: Moved) -> Result<Result<(), String>, Error> {
        let server = self.nbd.as_ref().ok_or_else(|| Error::generic("NBD server not running"))?;
        Ok(server.take_client(client))
    }

    /// Whether an export has that id.
    pub fn contains(&self, id: &str) -> bool {
        self.entries.contains_key(id)
    }

    /// Adds an NBD export whose node is claimed.
    ///
    /// # Errors
    /// There is no server, or the export's name is taken; the claim comes back.
    pub fn add_nbd(&mut self, id: String, settings: Settings, claim: Claim) -> Result<(), (Error, Claim)> {
        let Some(server) = &self.nbd else { return Err((Error::generic("NBD server not running"), claim)) };
        let taken = format!("NBD server already has export named '{}'", settings.name);
        let Some(export) = server.add(settings) else { return Err((Error::generic(taken), claim)) };
        let name = export.name().to_owned();
        self.insert(id, "nbd", export, Some(name), claim);
        Ok(())
    }

    /// Whom an export tells that it has changed.
    pub fn changed(&self) -> impl Fn() + Send + Sync + 'static {
        let wake = Arc::clone(&self.wake);
        move || wake.up()
    }

    /// Who sleeps in exports' stead.
    pub fn workers(&self) -> Workers {
        self.workers.clone()
    }

    /// Lends rings to exports to be.
    pub fn lend(&mut self, rings: Rings) {
        self.workers = Workers::with_rings(rings);
    }

    /// Keeps memory files for vhost-user exports to be; see [`crate::reserve::inflight`].
    pub fn keep_inflight(&mut self, files: Vec<OwnedFd>) {
        self.inflight = files;
    }

    /// Takes a memory file out of those kept, if there is one left.
    pub fn take_inflight(&mut self) -> Option<OwnedFd> {
        let taken = self.inflight.pop();
        if taken.is_none() {
            tracing::warn!("no memory file is left for what a guest has under way: this export tracks nothing");
        }
        taken
    }

    /// Numbers of the memory files kept.
    pub fn inflight(&self) -> impl Iterator<Item = i32> {
        self.inflight.iter().map(AsRawFd::as_raw_fd)
    }

    /// Adds an export that needs no server, whose node is claimed.
    pub fn add(&mut self, id: String, kind: &'static str, export: Arc<dyn Running>, claim: Claim) {
        self.insert(id, kind, export, None, claim);
    }

    fn insert(
        &mut self,
        id: String,
        kind: &'static str,
        export: Arc<dyn Running>,
        nbd_name: Option<String>,
        claim: Claim,
    ) {
        self.entries.insert(id, Entry { age: self.next_age, kind, export, nbd_name, claim, shutting_down: false });
        self.next_age += 1;
    }

    /// Starts an export's removal.
    ///
    /// # Errors
    /// There is none of that id, it is being removed already, or it has clients and `hard` is false.
    pub fn remove(&mut self, id: &str, hard: bool) -> Result<(), Error> {
        let entry = self.entries.get_mut(id).ok_or_else(|| Error::generic(format!("Export '{id}' is not found")))?;
        if entry.shutting_down {
            return Err(Error::generic(format!("Export '{id}' is already shutting down")));
        }
        if !hard && entry.export.is_in_use() {
            return Err(Error::generic(format!("export '{id}' still in use")));
        }
        entry.shutting_down = true;
        match (&self.nbd, &entry.nbd_name) {
            // The server closes it once nobody can find it any more.
            (Some(server), Some(name)) => server.remove(name),
            _ => entry.export.close(),
        }
        Ok(())
    }

    /// Starts an export's removal; its client is sent on `to`.
    ///
    /// # Errors
    /// There is none of that id, it is being removed already, or its kind cannot do that.
    pub fn move_client(&mut self, id: &str, to: OwnedFd) -> Result<(), Error> {
        let entry = self.entries.get_mut(id).ok_or_else(|| Error::generic(format!("Export '{id}' is not found")))?;
        if entry.shutting_down {
            return Err(Error::generic(format!("Export '{id}' is already shutting down")));
        }
        if !entry.export.move_client(to) {
            return Err(Error::generic(format!("Export '{id}' of type '{}' cannot move its client", entry.kind)));
        }
        entry.shutting_down = true;
        Ok(())
    }

    /// Keeps a socket on which the client comes of an export that is not there yet.
    pub fn await_client(&mut self, id: String, from: OwnedFd) {
        self.awaited.insert(id, from);
    }

    /// Takes such a socket out.
    pub fn take_awaited(&mut self, id: &str) -> Option<OwnedFd> {
        self.awaited.remove(id)
    }

    /// Takes out those that are on their way and have no client any more: their ids and claims.
    pub fn reap(&mut self) -> Vec<(String, Claim)> {
        self.entries
            .extract_if(.., |_, entry| {
                entry.shutting_down |= entry.export.has_ended_itself();
                entry.shutting_down && entry.export.is_over()
            })
            .map(|(id, entry)| (id, entry.claim))
            .collect()
    }

    /// Whether NBD clients have been served and none is connected any more.
    pub fn is_served_out(&self) -> bool {
        self.nbd.as_ref().is_some_and(Server::is_served_out)
    }

    /// Every descriptor of its servers and what it is.
    pub fn descriptors(&self) -> Vec<(i32, String)> {
        let server = self.nbd.as_ref().map(Server::descriptors).unwrap_or_default();
        let awaited = self.awaited.iter().map(|(id, fd)| (fd.as_raw_fd(), format!("way in for export '{id}'")));
        server
            .into_iter()
            .chain(awaited)
            .chain(self.entries.values().flat_map(|entry| entry.export.descriptors()))
            .collect()
    }

    /// Says that a node's size has changed: clients that can be told are.
    pub fn size_changed(&self, node_name: &str) {
        for entry in self.entries.values().filter(|entry| entry.export.node().name() == node_name) {
            entry.export.size_changed();
        }
    }

    /// Where the export called `id` finds its node.
    pub fn root(&self, id: &str) -> Option<&Arc<Root>> {
        self.entries.get(id).map(|entry| entry.export.root())
    }

    /// Every running export by id.
    pub fn running(&self) -> impl Iterator<Item = (&str, &'static str, &dyn Running)> {
        self.entries.iter().map(|(id, entry)| (id.as_str(), entry.kind, &*entry.export))
    }

    /// Every export, the newest first.
    pub fn list(&self) -> impl Iterator<Item = Shown<'_>> {
        let mut entries: Vec<_> = self.entries.iter().collect();
        entries.sort_by_key(|(_, entry)| std::cmp::Reverse(entry.age));
        entries.into_iter().map(|(id, entry)| Shown {
            id,
            kind: entry.kind,
            node_name: entry.export.node().name().to_owned(),
            shutting_down: entry.shutting_down,
        })
    }
}
