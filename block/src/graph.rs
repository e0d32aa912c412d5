// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The nodes and the edges between them.
//!
//! One owner, the control thread. A node's children exist before it does, so a loop cannot be written down. Who may write to
//! what is the business of [`claims`](crate::claims): parents and exports hold a [`Claim`] on each node they use.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::alarm::Alarm;
use crate::claims::{Claim, Use, User, Writes};
use crate::drivers::{Children, OpenRequest, Options, driver_named};
use crate::host::{Descriptor, Host};
use crate::node::NodeAccess;
use crate::{BlockNode, Error, ErrorKind, Result};

/// A node to be made.
pub struct NodeSpec {
    /// Its node-name; `None` lets the graph choose `#blockNNN`.
    pub name: Option<String>,
    /// The driver's name.
    pub driver: &'static str,
    /// What requests may do to it.
    pub access: NodeAccess,
    /// Where its descriptors come from, for a driver that takes one.
    pub host: Option<Host>,
    /// What the user called the descriptor.
    pub filename: String,
    /// Edge name to node-name.
    pub children: BTreeMap<&'static str, String>,
    /// Edges that the caller says there are none of, although the image may name one (QAPI's `null`).
    pub detached: BTreeSet<&'static str>,
    /// Checked options.
    pub options: Options,
}

/// An edge, as queries show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edge {
    /// Edge name: `file`, `backing`, `data-file`.
    pub name: &'static str,
    /// The child's node-name.
    pub child: String,
}

pub(crate) struct Entry {
    pub(crate) node: Arc<BlockNode>,
    /// Grows with every node: queries list the newest first.
    age: u64,
    pub(crate) claims: BTreeMap<u64, Use>,
    pub(crate) links: Vec<Link>,
    pub(crate) host: Option<Host>,
    /// As they were given.
    options: Options,
    /// Made for its parent and removed with it.
    pub(crate) owned: bool,
}

/// An edge and the claim that the parent holds on the child for it.
pub(crate) struct Link {
    pub(crate) edge: Edge,
    pub(crate) claim: u64,
    pub(crate) writes: Writes,
}

/// All nodes by name.
#[derive(Default)]
pub struct Graph {
    pub(crate) nodes: BTreeMap<String, Entry>,
    pub(crate) next_claim: u64,
    next_age: u64,
    next_name: u32,
    alarm: Alarm,
    /// Whether another process goes on with what is removed.
    handing_over: bool,
}

impl Graph {
    /// An empty graph.
    pub fn new() -> Graph {
        Graph::default()
    }

    /// An empty graph whose drivers tell `alarm` about damaged images.
    pub fn with_alarm(alarm: Alarm) -> Graph {
        Graph { alarm, ..Graph::default() }
    }

    /// Opens a node and attaches it to its children. On an error nothing has changed.
    ///
    /// # Errors
    /// `Invalid` for a bad or taken name, a missing child or driver; `InUse` if a child's other user excludes this one; the
    /// driver's own error otherwise.
    pub fn add(&mut self, mut spec: NodeSpec) -> Result<Arc<BlockNode>> {
        let driver = driver_named(spec.driver)
            .ok_or_else(|| Error::invalid(format!("Parameter 'driver' does not accept value '{}'", spec.driver)))?;
        let name = match spec.name {
            Some(name) => self.checked_name(name)?,
            None => self.generated_name(),
        };
        let mut children = Children::new();
        let mut links = Vec::new();
        let edges = driver.children.iter().flat_map(|child| child.edges().iter().map(move |&edge| (child, edge)));
        for (child, edge_name) in edges {
            let Some(node_name) = spec.children.get(edge_name) else { continue };
            let user = User::Node { name: name.clone(), edge: edge_name };
            match self.claim(node_name, child.writes.usage(user, spec.access.writable)) {
                Ok(claim) => {
                    let edge = Edge { name: edge_name, child: node_name.clone() };
                    children.insert(edge_name, Arc::clone(&self.nodes[node_name].node));
                    links.push(Link { edge, claim: claim.id(), writes: child.writes });
                }
                Err(e) => {
                    self.release_links(links);
                    return Err(e);
                }
            }
        }
        let filename = match children.get("file") {
            Some(file) => file.filename().to_owned(),
            None => spec.filename,
        };
        let options = spec.options;
        let alarm = self.alarm.for_host(spec.host.as_ref().and_then(Host::lost));
        let files = spec.host.as_mut().map(Host::files).unwrap_or_default();
        let request = |descriptor| OpenRequest {
            descriptor,
            files,
            filename: filename.clone(),
            children,
            detached: spec.detached,
            options: options.clone(),
            writable: spec.access.writable,
            facts_only: false,
            node_name: name.clone(),
            alarm: alarm.clone(),
        };
        let single = spec.host.as_mut().filter(|host| !host.is_directory());
        let descriptor = single.map(|host| host.first(spec.access.writable, &name)).transpose();
        match descriptor.and_then(|descriptor| (driver.open)(request(descriptor))) {
            Ok(opened) => {
                let flushes = spec.host.as_ref().is_none_or(Host::flushes);
                let node = BlockNode::new(name.clone(), driver.name, filename, spec.access, opened);
                let node = Arc::new(if flushes { node } else { node.unflushed() });
                let entry = Entry {
                    node: Arc::clone(&node),
                    age: self.next_age,
                    claims: BTreeMap::new(),
                    links,
                    host: spec.host,
                    options,
                    owned: false,
                };
                self.next_age += 1;
                self.nodes.insert(name, entry);
                Ok(node)
            }
            Err(e) => {
                self.release_links(links);
                Err(e)
            }
        }
    }

    /// Marks a node as made for its parent: it goes when its last user goes, and cannot be removed by name.
    pub fn set_owned(&mut self, name: &str) {
        if let Some(entry) = self.nodes.get_mut(name) {
            entry.owned = true;
        }
    }

    /// Removes a node that nobody uses, and the nodes that were made for it.
    ///
    /// # Errors
    /// QEMU's words: `Failed to find node with node-name='X'`; `Block device X is in use` for a parent's node, `Node X is in
    /// use` for an export's.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        let entry = self.entry(name)?;
        // As the backing file of another it is more than in use.
        self.check_base(name)?;
        if let Some(usage) = entry.claims.values().next() {
            let text = match usage.user {
                User::Node { .. } => format!("Block device {name} is in use"),
                User::Export { .. } | User::Job { .. } => format!("Node {name} is in use"),
            };
            return Err(Error::new(ErrorKind::InUse, text));
        }
        self.forget(name);
        Ok(())
    }

    /// Says whether another process goes on with the open files of nodes that are removed from now on; then nobody waits until
    /// what they wrote is on disk.
    pub fn hand_over(&mut self, handing_over: bool) {
        self.handing_over = handing_over;
    }

    /// The node called `name`.
    ///
    /// # Errors
    /// QEMU's words if there is none.
    pub fn get(&self, name: &str) -> Result<&Arc<BlockNode>> {
        Ok(&self.entry(name)?.node)
    }

    /// Gives a claim back; a node that was made for the claim's holder goes with it.
    pub fn release(&mut self, claim: Claim) {
        // An overlay may have taken the place of the node that was claimed.
        let holds = |(_, entry): &(&String, &Entry)| entry.claims.contains_key(&claim.id());
        if let Some(name) = self.nodes.iter().find(holds).map(|(name, _)| name.clone()) {
            self.release_id(&name, claim.id());
        }
    }

    /// Puts another socket in place of a node's lost connection, or of the one that it has.
    ///
    /// # Errors
    /// There is no such node, it has no connection, or the new socket does not lead to the same export.
    pub fn reconnect(&self, name: &str, socket: Descriptor) -> Result<()> {
        self.entry(name)?.node.driver().reconnect(socket)
    }

    /// The driver's options that a node was made with.
    ///
    /// # Errors
    /// QEMU's words if there is no such node.
    pub fn options(&self, name: &str) -> Result<&Options> {
        Ok(&self.entry(name)?.options)
    }

    /// The edges of a node.
    pub fn edges(&self, name: &str) -> impl Iterator<Item = &Edge> {
        self.nodes.get(name).into_iter().flat_map(|entry| entry.links.iter().map(|link| &link.edge))
    }

    /// Every node, the newest first.
    pub fn nodes(&self) -> Vec<&Arc<BlockNode>> {
        let mut entries: Vec<&Entry> = self.nodes.values().collect();
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.age));
        entries.iter().map(|entry| &entry.node).collect()
    }

    /// Number of layers below a node: how far its `backing` edges go.
    pub fn backing_depth(&self, name: &str) -> u32 {
        let backing = self.edges(name).find(|edge| edge.name == "backing");
        backing.map_or(0, |edge| 1 + self.backing_depth(&edge.child))
    }

    pub(crate) fn entry(&self, name: &str) -> Result<&Entry> {
        self.nodes.get(name).ok_or_else(|| Error::invalid(format!("Failed to find node with node-name='{name}'")))
    }

    fn release_id(&mut self, name: &str, id: u64) {
        let Some(entry) = self.nodes.get_mut(name) else { return };
        entry.claims.remove(&id);
        if entry.owned && entry.claims.is_empty() {
            self.forget(name);
        } else if let Err(e) = self.settle(name) {
            // A node that keeps more rights than it needs now is no harm to anyone.
            tracing::warn!(node = name, "after a user left: {e}");
        }
    }

    fn forget(&mut self, name: &str) {
        if let Some(entry) = self.nodes.remove(name) {
            let driver = entry.node.driver();
            let end = || if self.handing_over { driver.hand_over() } else { driver.close() };
            if entry.node.writable()
                && let Err(e) = end()
            {
                tracing::error!(node = name, "while it was closed: {e}");
            }
            self.release_links(entry.links);
        }
    }

    fn release_links(&mut self, links: Vec<Link>) {
        for link in links {
            self.release_id(&link.edge.child, link.claim);
        }
    }

    /// QEMU's rules for node-names.
    fn checked_name(&self, name: String) -> Result<String> {
        if !id_is_well_formed(&name) {
            return Err(Error::invalid(format!("Invalid node-name: '{name}'")));
        }
        if name.len() > 31 {
            return Err(Error::invalid("Node name too long"));
        }
        if self.nodes.contains_key(&name) {
            return Err(Error::invalid(format!("Duplicate nodes with node-name='{name}'")));
        }
        Ok(name)
    }

    fn generated_name(&mut self) -> String {
        loop {
            let name = format!("#block{:03}", self.next_name);
            self.next_name += 1;
            if !self.nodes.contains_key(&name) {
                return name;
            }
        }
    }
}

/// QEMU's rule for ids that users choose (`id_wellformed`): a letter, then letters, digits, `-`, `.` and `_`.
pub fn id_is_well_formed(id: &str) -> bool {
    id.bytes().next().is_some_and(|b| b.is_ascii_alphabetic())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
}
