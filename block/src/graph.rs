// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The nodes and the edges between them: who reads and who writes what.
//!
//! One owner, the control thread. Exports and parents hold a [`Claim`]; the graph refuses a claim that another one excludes
//! and the removal of a claimed node. A node's children exist before it does, so a loop cannot be written down.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::sync::Arc;

use crate::driver::{Children, OpenRequest, Options, driver_named};
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
    /// The descriptor, for a driver that takes one.
    pub descriptor: Option<Box<dyn AsFd + Send + Sync>>,
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

/// How a claim uses a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Use {
    /// Who: completes "Node X is used by …".
    pub user: String,
    /// Whether the user writes.
    pub writes: bool,
    /// Whether the user bears others writing at the same time.
    pub shares_writes: bool,
}

/// A use that the graph granted; give it back with [`Graph::release`].
#[derive(Debug)]
pub struct Claim {
    node: String,
    id: u64,
}

struct Entry {
    node: Arc<BlockNode>,
    /// Grows with every node: queries list the newest first.
    age: u64,
    claims: BTreeMap<u64, Use>,
    /// Claims that this node holds on its children.
    edges: Vec<(Edge, Claim)>,
    /// Made for its parent and removed with it.
    owned: bool,
}

/// All nodes by name.
#[derive(Default)]
pub struct Graph {
    nodes: BTreeMap<String, Entry>,
    next_age: u64,
    next_claim: u64,
    next_name: u32,
}

impl Graph {
    /// An empty graph.
    pub fn new() -> Graph {
        Graph::default()
    }

    /// Opens a node and attaches it to its children. On an error nothing has changed.
    ///
    /// # Errors
    /// `Invalid` for a bad or taken name, a missing child or driver; `InUse` if a child's other user excludes this one; the
    /// driver's own error otherwise.
    pub fn add(&mut self, spec: NodeSpec) -> Result<Arc<BlockNode>> {
        let entry = driver_named(spec.driver)
            .ok_or_else(|| Error::invalid(format!("Parameter 'driver' does not accept value '{}'", spec.driver)))?;
        let name = match spec.name {
            Some(name) => self.checked_name(name)?,
            None => self.generated_name(),
        };
        let mut children = Children::new();
        let mut edges = Vec::new();
        for child in entry.children {
            let Some(node_name) = spec.children.get(child.name) else { continue };
            let writes = child.written && spec.access.writable;
            let usage = Use { user: format!("node '{name}' as '{}'", child.name), writes, shares_writes: !writes };
            let claim = match self.claim(node_name, usage) {
                Ok(claim) => claim,
                Err(e) => {
                    self.release_all(edges);
                    return Err(e);
                }
            };
            let edge = Edge { name: child.name, child: node_name.clone() };
            children.insert(child.name, Arc::clone(&self.nodes[node_name].node));
            edges.push((edge, claim));
        }
        let filename = match children.get("file") {
            Some(file) => file.filename().to_owned(),
            None => spec.filename,
        };
        let request = OpenRequest {
            descriptor: spec.descriptor,
            filename: filename.clone(),
            children,
            detached: spec.detached,
            options: spec.options,
            writable: spec.access.writable,
        };
        match (entry.open)(request) {
            Ok(driver) => {
                let node = Arc::new(BlockNode::new(name.clone(), entry.name, filename, spec.access, driver));
                let age = self.next_age;
                self.next_age += 1;
                let entry = Entry { node: Arc::clone(&node), age, claims: BTreeMap::new(), edges, owned: false };
                self.nodes.insert(name, entry);
                Ok(node)
            }
            Err(e) => {
                self.release_all(edges);
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
        if let Some(usage) = entry.claims.values().next() {
            let text = if usage.user.starts_with("node ") {
                format!("Block device {name} is in use")
            } else {
                format!("Node {name} is in use")
            };
            return Err(Error::new(ErrorKind::InUse, text));
        }
        if let Some(entry) = self.nodes.remove(name) {
            self.release_all(entry.edges);
        }
        Ok(())
    }

    /// The node called `name`.
    ///
    /// # Errors
    /// QEMU's words if there is none.
    pub fn get(&self, name: &str) -> Result<&Arc<BlockNode>> {
        Ok(&self.entry(name)?.node)
    }

    /// Claims a node for `usage`.
    ///
    /// # Errors
    /// `InUse` if another user excludes it, in either direction.
    pub fn claim(&mut self, name: &str, usage: Use) -> Result<Claim> {
        let entry = self.entry(name)?;
        if usage.writes && !entry.node.writable() {
            return Err(Error::invalid(format!("Block node '{name}' is read-only, but {} wants to write", usage.user)));
        }
        let excludes = |a: &Use, b: &Use| a.writes && !b.shares_writes;
        if let Some(other) = entry.claims.values().find(|other| excludes(other, &usage) || excludes(&usage, other)) {
            return Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "Block node '{name}' cannot be used by {}: it conflicts with use by {}",
                    usage.user, other.user
                ),
            ));
        }
        let id = self.next_claim;
        self.next_claim += 1;
        if let Some(entry) = self.nodes.get_mut(name) {
            entry.claims.insert(id, usage);
        }
        Ok(Claim { node: name.to_owned(), id })
    }

    /// Gives a claim back; a node that was made for the claim's holder goes with it.
    pub fn release(&mut self, claim: Claim) {
        let Some(entry) = self.nodes.get_mut(&claim.node) else { return };
        entry.claims.remove(&claim.id);
        if entry.owned
            && entry.claims.is_empty()
            && let Some(entry) = self.nodes.remove(&claim.node)
        {
            self.release_all(entry.edges);
        }
    }

    /// Every node and its edges, the newest first.
    pub fn nodes(&self) -> Vec<(&Arc<BlockNode>, Vec<&Edge>)> {
        let mut entries: Vec<&Entry> = self.nodes.values().collect();
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.age));
        entries.iter().map(|entry| (&entry.node, entry.edges.iter().map(|(edge, _)| edge).collect())).collect()
    }

    /// Number of layers below a node: how far its `backing` edges go.
    pub fn backing_depth(&self, name: &str) -> u32 {
        let Some(entry) = self.nodes.get(name) else { return 0 };
        let backing = entry.edges.iter().find(|(edge, _)| edge.name == "backing");
        backing.map_or(0, |(edge, _)| 1 + self.backing_depth(&edge.child))
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.nodes.get(name).ok_or_else(|| Error::invalid(format!("Failed to find node with node-name='{name}'")))
    }

    fn release_all(&mut self, edges: Vec<(Edge, Claim)>) {
        for (_, claim) in edges {
            self.release(claim);
        }
    }

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
