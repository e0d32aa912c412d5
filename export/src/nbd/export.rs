// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A node under a name that NBD clients can choose.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::stats::Stats;
use block::{BlockNode, Root};

use super::context::Bitmap;
use super::proto::flag;
use super::reply::Style;
use super::stream::Stream;
use crate::meter::Meter;
use crate::running::{ClientShown, Running};

/// What an export is made of.
#[derive(Debug)]
pub struct Settings {
    /// The name that clients ask for, at most 4096 bytes.
    pub name: String,
    /// Free text for `NBD_OPT_LIST`.
    pub description: Option<String>,
    /// The node to begin with.
    pub node: Arc<BlockNode>,
    /// Whether clients may change it; the node is then writable too.
    pub writable: bool,
    /// Whether every change is on stable storage before it is answered.
    pub writethrough: bool,
    /// Whether clients may learn how many layers down data is stored.
    pub allocation_depth: bool,
    /// Bitmaps that clients may read.
    pub bitmaps: Vec<Bitmap>,
}

impl Settings {
    /// A read-only export of `node`, without anything that needs asking for.
    pub fn new(name: impl Into<String>, node: Arc<BlockNode>) -> Settings {
        Settings {
            name: name.into(),
            description: None,
            node,
            writable: false,
            writethrough: false,
            allocation_depth: false,
            bitmaps: Vec::new(),
        }
    }
}

/// A served node and its clients.
#[derive(Debug)]
pub struct Export {
    settings: Settings,
    root: Arc<Root>,
    /// The server takes one client at a time: a second connection of the same client would wait for ever.
    single: bool,
    stats: Arc<Stats>,
    clients: Mutex<Clients>,
}

#[derive(Debug, Default)]
struct Clients {
    closing: bool,
    present: BTreeMap<u64, (Arc<Stream>, Meter)>,
}

impl Export {
    pub(super) fn new(settings: Settings, single: bool) -> Export {
        let root = Root::new(Arc::clone(&settings.node));
        Export { settings, root, single, stats: Arc::default(), clients: Mutex::default() }
    }

    /// The name that clients ask for.
    pub fn name(&self) -> &str {
        &self.settings.name
    }

    /// Free text.
    pub fn description(&self) -> Option<&str> {
        self.settings.description.as_deref()
    }

    /// The node at this moment.
    pub fn node(&self) -> Arc<BlockNode> {
        self.root.node()
    }

    /// Whether clients may change the node.
    pub fn writable(&self) -> bool {
        self.settings.writable
    }

    /// Whether every change is on stable storage before it is answered.
    pub fn writethrough(&self) -> bool {
        self.settings.writethrough
    }

    /// Whether clients may learn how many layers down data is stored.
    pub fn tells_depth(&self) -> bool {
        self.settings.allocation_depth
    }

    /// Bitmaps that clients may read.
    pub fn bitmaps(&self) -> &[Bitmap] {
        &self.settings.bitmaps
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.node().len()
    }

    /// Smallest request in bytes.
    pub fn block_size(&self) -> u32 {
        self.node().block_size()
    }

    /// Transmission flags for a client with replies in `style`. Several connections see each other's writes: they share the node and its host file.
    pub fn flags(&self, style: Style) -> u16 {
        let always = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::SEND_CACHE;
        let several = if self.single { 0 } else { flag::CAN_MULTI_CONN };
        let changing = if self.writable() {
            flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO
        } else {
            flag::READ_ONLY
        };
        let negotiated = match style {
            Style::Simple => 0,
            Style::Structured => flag::SEND_DF,
            Style::Extended => flag::SEND_DF | flag::BLOCK_STAT_PAYLOAD,
        };
        always | several | changing | negotiated
    }

    /// Number of clients in transmission.
    pub fn clients(&self) -> usize {
        self.lock().present.len()
    }

    /// No new clients from now on; those there are hung up on. They are gone when [`Export::clients`] is 0.
    pub(super) fn close(&self) {
        let mut clients = self.lock();
        clients.closing = true;
        for (stream, _) in clients.present.values() {
            stream.hang_up();
        }
    }

    /// Lets a client in, unless the export is closing; where its requests are counted.
    pub(super) fn enter(&self, client: u64, stream: &Arc<Stream>) -> Option<Meter> {
        let mut clients = self.lock();
        if clients.closing {
            return None;
        }
        let meter = Meter::new(Arc::clone(&self.stats), Arc::clone(&self.root));
        clients.present.insert(client, (Arc::clone(stream), meter.clone()));
        Some(meter)
    }

    pub(super) fn leave(&self, client: u64) {
        self.lock().present.remove(&client);
    }

    fn lock(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Running for Export {
    fn root(&self) -> &Arc<Root> {
        &self.root
    }

    fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    fn clients(&self) -> Vec<ClientShown> {
        let clients = self.lock();
        let shown = |(&id, (stream, meter)): (&u64, &(Arc<Stream>, Meter))| ClientShown {
            id,
            peer: stream.peer(),
            stats: Arc::clone(meter.client()),
        };
        clients.present.iter().map(shown).collect()
    }

    fn is_in_use(&self) -> bool {
        Export::clients(self) > 0
    }

    fn close(&self) {
        Export::close(self);
    }

    fn is_over(&self) -> bool {
        Export::clients(self) == 0
    }
}
