// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What every export can be asked, whatever protocol it speaks.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use block::stats::Stats;
use block::{BlockNode, Root};

/// A client as queries show it.
#[derive(Clone, Debug)]
pub struct ClientShown {
    /// Its number, never used twice by one server.
    pub id: u64,
    /// Who it is, as far as the kernel tells.
    pub peer: String,
    /// What it asked.
    pub stats: Arc<Stats>,
}

/// An export that runs, as the control thread sees it. Every call returns at once.
pub trait Running: Send + Sync {
    /// Its place in the graph: where its requests find their node.
    fn root(&self) -> &Arc<Root>;

    /// The node at this moment.
    fn node(&self) -> Arc<BlockNode> {
        self.root().node()
    }

    /// What all of its clients asked since it began.
    fn stats(&self) -> &Arc<Stats>;

    /// The clients that are there now.
    fn clients(&self) -> Vec<ClientShown>;

    /// Whether somebody uses it: then only a hard removal ends it.
    fn is_in_use(&self) -> bool;

    /// Begins its end: no new clients or requests. It is over when [`Running::is_over`] says so; then whoever was told to be
    /// called at changes is called.
    fn close(&self);

    /// The same, but its client is not hung up on: it is sent on a connected stream socket, between two requests, and another
    /// export of the same kind goes on with it. False, and nothing happens, if that is not possible for this kind.
    fn move_client(&self, _to: OwnedFd) -> bool {
        false
    }

    /// Whether nothing of it runs any more and its node is free. Asked after [`Running::close`], and where an export can end
    /// by itself.
    fn is_over(&self) -> bool;

    /// Whether it has ended, or is about to, without having been closed: its client or the kernel let go of it.
    fn has_ended_itself(&self) -> bool {
        false
    }

    /// Says that the node's size may be another one, for exports that tell their clients.
    fn size_changed(&self) {}

    /// Number of every descriptor that it holds for itself, and what it is; what a server holds for several is not among them.
    fn descriptors(&self) -> Vec<(i32, String)> {
        Vec::new()
    }
}
