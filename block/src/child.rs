// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An edge to a node that another node may take the place of while the parent is open.
//!
//! Requests borrow the node without a lock, so a node that was there stays in memory until the edge itself goes. It is below the
//! one that came after it, which the parent keeps open anyway.

use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use crate::BlockNode;

/// The node that is there now, and those that were.
#[derive(Debug)]
pub struct Child {
    node: Arc<BlockNode>,
    next: OnceLock<Box<Child>>,
}

impl Child {
    /// An edge to `node`.
    pub fn new(node: Arc<BlockNode>) -> Child {
        Child { node, next: OnceLock::new() }
    }

    /// Puts `node` in place.
    pub fn put(&self, node: Arc<BlockNode>) {
        let mut new = Box::new(Child::new(node));
        while let Err(back) = self.last().next.set(new) {
            new = back;
        }
    }

    fn last(&self) -> &Child {
        let mut last = self;
        while let Some(next) = last.next.get() {
            last = next;
        }
        last
    }
}

impl Deref for Child {
    type Target = BlockNode;

    fn deref(&self) -> &BlockNode {
        &self.last().node
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // One by one: a long row must not take a stack's depth.
        let mut next = self.next.take();
        while let Some(mut child) = next {
            next = child.next.take();
        }
    }
}
