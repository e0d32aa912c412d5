// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An external snapshot: an overlay takes the place of a node, and the node becomes its backing file.
//!
//! It is done in two steps, so that several can be done together or not at all. [`Graph::overlay`] checks everything and changes
//! the books alone: who uses what. [`Graph::show`] tells the drivers, and cannot fail; until then requests go where they went.
//! In between no request may be under way in the exports that [`Graph::exports_above`] names, which then get the overlay as
//! their node.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::claims::{Use, User, Writes};
use crate::graph::{Edge, Entry, Graph, Link};
use crate::{Error, ErrorKind, Result};

/// An overlay in the books.
#[derive(Clone, Debug)]
pub struct Overlaid {
    node: String,
    overlay: String,
    /// Claims that were on the node and are on the overlay now.
    moved: Vec<u64>,
    /// The overlay's claim on the node.
    claim: u64,
}

impl Graph {
    /// Ids of the exports whose requests come to a node, through nodes above it or straight.
    pub fn exports_above(&self, name: &str) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let mut names = vec![name];
        while let Some(name) = names.pop() {
            for usage in self.nodes.get(name).iter().flat_map(|entry| entry.claims.values()) {
                match &usage.user {
                    User::Export { id } => drop(found.insert(id.clone())),
                    User::Node { name, .. } => names.push(name),
                    User::Job { .. } => {}
                }
            }
        }
        found
    }

    /// Ids of the exports that have a node itself.
    pub fn exports_of(&self, name: &str) -> Vec<String> {
        let claims = self.nodes.get(name).into_iter().flat_map(|entry| entry.claims.values());
        claims
            .filter_map(|usage| match &usage.user {
                User::Export { id } => Some(id.clone()),
                User::Node { .. } | User::Job { .. } => None,
            })
            .collect()
    }

    /// Whether a node can become the backing file of an overlay.
    ///
    /// # Errors
    /// QEMU's words: there is no such node, or it is the backing file of another.
    pub fn check_base(&self, name: &str) -> Result<()> {
        let entry = self.nodes.get(name).ok_or_else(|| unknown(name))?;
        let backs = |usage: &Use| match &usage.user {
            User::Node { name, edge: "backing" } => Some(name.clone()),
            _ => None,
        };
        match entry.claims.values().find_map(backs) {
            Some(above) => Err(Error::new(
                ErrorKind::InUse,
                format!("Node '{name}' is busy: node is used as backing hd of '{above}'"),
            )),
            None => Ok(()),
        }
    }

    /// Puts `overlay` in the place of `node`, and `node` below it, in the books. On an error nothing has changed.
    ///
    /// # Errors
    /// QEMU's words: there is no such node; the overlay is in use, has a backing file, cannot have one, or cannot be written and
    /// somebody writes; a node above cannot change what is below it.
    pub fn overlay(&mut self, node: &str, overlay: &str) -> Result<Overlaid> {
        self.check_base(node)?;
        let moved = self.check_overlay(node, overlay)?;
        let claim = self.next_claim;
        self.next_claim += 1;
        let usage = Writes::Never.usage(User::Node { name: overlay.to_owned(), edge: "backing" }, false);
        self.move_claims(node, overlay, &moved);
        if let Some(entry) = self.nodes.get_mut(node) {
            entry.claims.insert(claim, usage);
        }
        if let Some(entry) = self.nodes.get_mut(overlay) {
            let edge = Edge { name: "backing", child: node.to_owned() };
            entry.links.push(Link { edge, claim, writes: Writes::Never });
        }
        Ok(Overlaid { node: node.to_owned(), overlay: overlay.to_owned(), moved, claim })
    }

    /// Takes an overlay out of the books.
    pub fn take_back(&mut self, overlaid: Overlaid) {
        let Overlaid { node, overlay, moved, claim } = overlaid;
        if let Some(entry) = self.nodes.get_mut(&overlay) {
            entry.links.retain(|link| link.claim != claim);
        }
        if let Some(entry) = self.nodes.get_mut(&node) {
            entry.claims.remove(&claim);
        }
        self.move_claims(&overlay, &node, &moved);
    }

    /// Tells the drivers what the books say: nodes above use the overlay, the overlay the node below it, and that is read-only from
    /// now on. Exports are the caller's business.
    pub fn show(&mut self, overlaid: &Overlaid) {
        let (Some(below), Some(above)) = (self.nodes.get(&overlaid.node), self.nodes.get(&overlaid.overlay)) else {
            return;
        };
        let overlay = Arc::clone(&above.node);
        above.node.driver().attach("backing", Arc::clone(&below.node));
        for usage in overlaid.moved.iter().filter_map(|id| above.claims.get(id)) {
            if let User::Node { name, edge } = &usage.user
                && let Some(parent) = self.nodes.get(name)
            {
                parent.node.driver().attach(edge, Arc::clone(&overlay));
            }
        }
        for name in [&overlaid.overlay, &overlaid.node] {
            if let Err(e) = self.settle(name) {
                tracing::warn!(node = name, "after an overlay: {e}");
            }
        }
        self.end_writing(&overlaid.node);
    }

    /// Makes a node that nobody writes to read-only, and what was made for it. A set that has no descriptor for reading alone
    /// leaves the one that there is in use: it is not written any more.
    fn end_writing(&mut self, name: &str) {
        if let Err(e) = self.set_writable(name, false) {
            tracing::info!(node = name, "it keeps its descriptor for writing and is not written: {e}");
        }
        let Some(entry) = self.nodes.get(name) else { return };
        entry.node.set_writable(false);
        let owned = |link: &&Link| self.nodes.get(&link.edge.child).is_some_and(|child| child.owned);
        let children: Vec<String> = entry.links.iter().filter(owned).map(|link| link.edge.child.clone()).collect();
        for child in children {
            let is_written = |entry: &Entry| entry.claims.values().any(|usage| usage.writes);
            if self.nodes.get(&child).is_some_and(|entry| entry.node.writable() && !is_written(entry)) {
                self.end_writing(&child);
            }
        }
    }

    /// The claims that go from the node to the overlay.
    fn check_overlay(&self, node: &str, overlay: &str) -> Result<Vec<u64>> {
        let above = self.nodes.get(overlay).ok_or_else(|| unknown(overlay))?;
        if self.is_read(overlay) {
            return Err(Error::new(ErrorKind::InUse, "The overlay is already in use"));
        }
        if above.links.iter().any(|link| link.edge.name == "backing") {
            return Err(Error::invalid("The overlay already has a backing image"));
        }
        if !above.node.driver().attaches("backing") {
            return Err(Error::unsupported("The overlay does not support backing images"));
        }
        if self.reaches(overlay, node) || self.reaches(node, overlay) {
            return Err(Error::invalid(format!("Making '{node}' a backing child of '{overlay}' would create a cycle")));
        }
        let claims = &self.entry(node)?.claims;
        if claims.values().any(|usage| usage.writes) && !above.node.writable() {
            return Err(Error::invalid("Block node is read-only"));
        }
        for usage in claims.values() {
            if let User::Job { id } = &usage.user {
                return Err(Error::new(ErrorKind::InUse, format!("Node '{node}' is busy: job '{id}' works on it")));
            }
            if let User::Node { name, edge } = &usage.user
                && !self.nodes.get(name).is_some_and(|parent| parent.node.driver().attaches(edge))
            {
                return Err(Error::new(
                    ErrorKind::InUse,
                    format!(
                        "Node '{node}' is busy: node '{name}' uses it as '{edge}' and cannot change to an overlay while it is open"
                    ),
                ));
            }
        }
        Ok(claims.keys().copied().collect())
    }

    /// Whether somebody counts on what a node holds. A node above without users does not, unless it keeps an image there.
    fn is_read(&self, name: &str) -> bool {
        let Some(entry) = self.nodes.get(name) else { return false };
        entry.claims.iter().any(|(id, usage)| match &usage.user {
            User::Export { .. } | User::Job { .. } => true,
            User::Node { name, .. } => {
                let parent = self.nodes.get(name).into_iter().flat_map(|parent| &parent.links);
                let keeps = |link: &Link| link.claim == *id && link.writes == Writes::Metadata;
                parent.clone().any(keeps) || self.is_read(name)
            }
        })
    }

    /// Whether `below` is `name`, or somewhere below it.
    fn reaches(&self, name: &str, below: &str) -> bool {
        name == below || self.edges(name).any(|edge| self.reaches(&edge.child, below))
    }

    fn move_claims(&mut self, from: &str, to: &str, ids: &[u64]) {
        for id in ids {
            let Some(usage) = self.nodes.get_mut(from).and_then(|entry| entry.claims.remove(id)) else { continue };
            if let User::Node { name, edge } = &usage.user
                && let Some(parent) = self.nodes.get_mut(name)
            {
                let links = parent.links.iter_mut().filter(|link| link.claim == *id && link.edge.name == *edge);
                links.for_each(|link| to.clone_into(&mut link.edge.child));
            }
            if let Some(entry) = self.nodes.get_mut(to) {
                entry.claims.insert(*id, usage);
            }
        }
    }
}

fn unknown(name: &str) -> Error {
    Error::invalid(format!("Cannot find device='{name}' nor node-name='{name}'"))
}
