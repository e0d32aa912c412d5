// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who reads and who writes what: the permissions of QEMU's block layer, as far as they decide anything.
//!
//! A claim says what its user does to a node and what it bears others doing. The graph refuses a claim that another one
//! excludes, in either direction. What a node's users do decides what the node itself must be able to do below: a pass-through
//! node hands its users' wishes down, and a file node takes image locks and, with `auto-read-only`, the descriptor that fits.
//! [`Graph::settle`] brings a node in line with its users, children first.

use std::fmt;
use std::sync::Arc;

use crate::graph::Graph;
use crate::{Error, ErrorKind, Result};

/// Who uses a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum User {
    /// A node above it.
    Node {
        /// The parent.
        name: String,
        /// Its edge to the node.
        edge: &'static str,
    },
    /// An export.
    Export {
        /// Its id.
        id: String,
    },
    /// A job.
    Job {
        /// Its id.
        id: String,
    },
}

impl User {
    fn edge(&self) -> &str {
        match self {
            User::Node { edge, .. } => edge,
            User::Export { .. } | User::Job { .. } => "root",
        }
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            User::Node { name, .. } => write!(f, "node '{name}'"),
            User::Export { id } => write!(f, "export '{id}'"),
            User::Job { id } => write!(f, "job '{id}'"),
        }
    }
}

/// How a claim uses a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Use {
    /// Who.
    pub user: User,
    /// Whether the user writes.
    pub writes: bool,
    /// Whether the user changes its size.
    pub resizes: bool,
    /// Whether the user bears others writing and resizing at the same time.
    pub shares_writes: bool,
}

/// How a driver uses a child (the child roles of QEMU's `bdrv_default_perms`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writes {
    /// It only reads, and bears writers: a backing file.
    Never,
    /// It keeps metadata there: it writes whenever the node is writable, and bears no other writer ever.
    Metadata,
    /// It does what its users do, and bears what they bear.
    AsUsers,
}

impl Writes {
    /// The use of a child by a node without users.
    pub(crate) fn usage(self, user: User, writable: bool) -> Use {
        let writes = self == Writes::Metadata && writable;
        Use { user, writes, resizes: writes, shares_writes: self != Writes::Metadata }
    }
}

/// A use that the graph granted; give it back with [`Graph::release`].
#[derive(Debug)]
pub struct Claim {
    id: u64,
}

impl Claim {
    pub(crate) fn id(&self) -> u64 {
        self.id
    }
}

/// What all users of a node together do to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// Somebody uses it at all.
    pub reads: bool,
    /// Somebody writes.
    pub writes: bool,
    /// Somebody changes its size.
    pub resizes: bool,
    /// Somebody bears no other writer.
    pub excludes_writers: bool,
}

impl Graph {
    /// Claims a node for `usage`. On an error nothing has changed.
    ///
    /// # Errors
    /// `InUse` if another user excludes it, here or further down; `Io` or `Invalid` if the host's file cannot be had or locked
    /// for it.
    pub fn claim(&mut self, name: &str, usage: Use) -> Result<Claim> {
        self.entry(name)?;
        let id = self.next_claim;
        self.next_claim += 1;
        self.change(name, id, usage)?;
        Ok(Claim { id })
    }

    /// Claims a node that nobody else uses, to make it anew. On an error nothing has changed.
    ///
    /// # Errors
    /// In QEMU's words: it is read-only, or somebody uses it; else as [`Graph::claim`].
    pub fn claim_alone(&mut self, name: &str, usage: Use) -> Result<Claim> {
        let entry = self.entry(name)?;
        if !entry.node.writable() {
            return Err(Error::invalid("Block node is read-only"));
        }
        if let Some(other) = entry.claims.values().next() {
            let uses = |usage: &Use| format!("{} (uses node '{name}' as '{}' child)", usage.user, usage.user.edge());
            return Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "Permission conflict on node '{name}': permissions 'resize' are both required by {} and unshared by {}.",
                    uses(&usage),
                    uses(other)
                ),
            ));
        }
        self.claim(name, usage)
    }

    fn change_all(&mut self, uses: &[(String, u64, Use)]) -> Result<()> {
        uses.iter().try_for_each(|(child, claim, usage)| self.change(child, *claim, usage.clone()))
    }

    /// Puts a use in the place of claim `id`'s.
    fn change(&mut self, name: &str, id: u64, usage: Use) -> Result<()> {
        self.check(name, id, &usage)?;
        let Some(entry) = self.nodes.get_mut(name) else { return Ok(()) };
        let before = entry.claims.insert(id, usage);
        let settled = self.settle(name);
        if settled.is_err()
            && let Some(entry) = self.nodes.get_mut(name)
        {
            match before {
                Some(before) => entry.claims.insert(id, before),
                None => entry.claims.remove(&id),
            };
            // Back to what was in force a moment ago.
            if let Err(e) = self.settle(name) {
                tracing::warn!(node = name, "going back to what was before: {e}");
            }
        }
        settled
    }

    fn check(&self, name: &str, id: u64, usage: &Use) -> Result<()> {
        let entry = self.entry(name)?;
        if usage.writes && !entry.node.writable() {
            return Err(Error::invalid(format!("Block node is read-only: {} wants to write to '{name}'", usage.user)));
        }
        let excludes = |unshared: &Use, required: &Use| required.writes && !unshared.shares_writes;
        for (_, other) in entry.claims.iter().filter(|(other, _)| **other != id) {
            let (required, unshared) = match (excludes(other, usage), excludes(usage, other)) {
                (true, _) => (usage, other),
                (false, true) => (other, usage),
                (false, false) => continue,
            };
            let what = if required.resizes { "write, resize" } else { "write" };
            let uses = |usage: &Use| format!("{} (uses node '{name}' as '{}' child)", usage.user, usage.user.edge());
            return Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "Permission conflict on node '{name}': permissions '{what}' are both required by {} and unshared by {}.",
                    uses(required),
                    uses(unshared)
                ),
            ));
        }
        Ok(())
    }

    /// What the users of a node do to it together.
    fn demand(&self, name: &str) -> Demand {
        let Some(entry) = self.nodes.get(name) else { return Demand::default() };
        let any = |what: fn(&Use) -> bool| entry.claims.values().any(what);
        Demand {
            reads: !entry.claims.is_empty(),
            writes: any(|usage| usage.writes),
            resizes: any(|usage| usage.resizes),
            excludes_writers: any(|usage| !usage.shares_writes),
        }
    }

    /// Brings a node in line with what its users do: its children's claims first, then its own descriptor and locks.
    pub(crate) fn settle(&mut self, name: &str) -> Result<()> {
        let demand = self.demand(name);
        let Some(entry) = self.nodes.get(name) else { return Ok(()) };
        let pass_through = entry.links.iter().filter(|link| link.writes == Writes::AsUsers);
        let changes: Vec<(String, u64, Use)> = pass_through
            .map(|link| {
                let user = User::Node { name: name.to_owned(), edge: link.edge.name };
                let Demand { writes, resizes, excludes_writers, .. } = demand;
                (link.edge.child.clone(), link.claim, Use { user, writes, resizes, shares_writes: !excludes_writers })
            })
            .collect();
        for (child, claim, usage) in changes {
            if self.nodes.get(&child).and_then(|entry| entry.claims.get(&claim)) != Some(&usage) {
                self.change(&child, claim, usage)?;
            }
        }
        match self.nodes.get_mut(name) {
            Some(entry) => match &mut entry.host {
                Some(host) => host.settle(&entry.node, demand),
                None => Ok(()),
            },
            None => Ok(()),
        }
    }

    /// Makes a node writable or read-only (QAPI's `blockdev-reopen`). On an error nothing has changed.
    ///
    /// # Errors
    /// A user writes to a node that is to be read-only, the driver cannot, the host's file cannot be had that way, or a child
    /// is read-only.
    pub fn set_writable(&mut self, name: &str, writable: bool) -> Result<()> {
        let entry = self.entry(name)?;
        if entry.node.writable() == writable {
            return Ok(());
        }
        if let Some(writer) = entry.claims.values().find(|usage| usage.writes && !writable) {
            let text = format!("Cannot make block node read-only, there is a writer on it: {}", writer.user);
            return Err(Error::new(ErrorKind::InUse, text));
        }
        let mut metadata: Vec<(String, u64, Use)> = entry
            .links
            .iter()
            .filter(|link| link.writes == Writes::Metadata)
            .map(|link| {
                let user = User::Node { name: name.to_owned(), edge: link.edge.name };
                (link.edge.child.clone(), link.claim, link.writes.usage(user, writable))
            })
            .collect();
        let driver_of = |graph: &Graph| graph.entry(name).map(|entry| Arc::clone(&entry.node));
        if writable {
            // The driver may have to write before it can go on: to a file that is its own by then.
            self.change_all(&metadata)?;
            if let Err(e) = driver_of(self)?.driver().reopen(true) {
                for (_, _, usage) in &mut metadata {
                    (usage.writes, usage.resizes) = (false, false);
                }
                if let Err(e) = self.change_all(&metadata) {
                    tracing::warn!(node = name, "going back to what was before: {e}");
                }
                return Err(e);
            }
        } else {
            driver_of(self)?.driver().reopen(false)?;
            self.change_all(&metadata)?;
        }
        let demand = self.demand(name);
        let Some(entry) = self.nodes.get_mut(name) else { return Ok(()) };
        if let Some(host) = &mut entry.host {
            host.reopen(&entry.node, writable, demand)?;
        }
        entry.node.set_writable(writable);
        Ok(())
    }
}
