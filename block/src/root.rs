// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where an export finds its node, which another node may take the place of: an overlay.
//!
//! A request [enters](Root::enter), uses the node that is there, and leaves. That is a lock for reading, spread over threads, so
//! that two of them never share a cache line. Who exchanges the node [drains](Root::drain) the root first: no request is then
//! under way, and those that come wait. So each request sees one node, and what it did there is done before the next node is.

use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock, RwLockReadGuard, TryLockError};
use std::time::{Duration, Instant};

use crate::BlockNode;
use crate::gate::{SHARDS, shard};

/// How long [`Root::drain`] sleeps between two looks at a request under way.
const LOOK_AGAIN: Duration = Duration::from_micros(50);

#[derive(Debug)]
#[repr(align(128))]
struct Shard(RwLock<Arc<BlockNode>>);

/// An export's place in the graph.
#[derive(Debug)]
pub struct Root {
    /// The node, the same in each. Nobody ever waits for a lock of writing: [`Root::drain`] tries.
    shards: [Shard; SHARDS],
    /// How many keep requests out at present.
    drains: AtomicUsize,
    waiting: Mutex<()>,
    opened: Condvar,
}

/// The node, for one request or look; dropping it leaves.
#[derive(Debug)]
pub struct Entered<'a>(RwLockReadGuard<'a, Arc<BlockNode>>);

/// No request is under way, and none begins; dropping it lets them in.
#[derive(Debug)]
pub struct Drained(Arc<Root>);

impl Root {
    /// A root at `node`.
    pub fn new(node: Arc<BlockNode>) -> Arc<Root> {
        Arc::new(Root {
            shards: std::array::from_fn(|_| Shard(RwLock::new(Arc::clone(&node)))),
            drains: AtomicUsize::new(0),
            waiting: Mutex::default(),
            opened: Condvar::new(),
        })
    }

    /// The node at this moment, for everything that is no request. Never waits.
    pub fn node(&self) -> Arc<BlockNode> {
        Arc::clone(&self.read())
    }

    /// The node at this moment, for a look that is no request. Kept for that long only.
    pub fn look(&self) -> Entered<'_> {
        Entered(self.read())
    }

    /// Begins a request; sleeps while the root is drained. Who is inside must not enter again: it could wait for itself.
    pub fn enter(&self) -> Entered<'_> {
        loop {
            let node = self.read();
            // Either this is seen to be 0 before a drain begins, and it then finds the lock taken, or the drain is seen.
            if self.drains.load(SeqCst) == 0 {
                return Entered(node);
            }
            drop(node);
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            while self.drains.load(SeqCst) > 0 {
                waiting = self.opened.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Whether somebody keeps requests out, or waits for those under way to end.
    pub fn is_drained(&self) -> bool {
        self.drains.load(SeqCst) > 0
    }

    /// Keeps requests out and waits until those under way have ended; `None` if some have not after `limit`.
    pub fn drain(self: &Arc<Root>, limit: Duration) -> Option<Drained> {
        self.drains.fetch_add(1, SeqCst);
        let drained = Drained(Arc::clone(self));
        let begun = Instant::now();
        for shard in &self.shards {
            while let Err(TryLockError::WouldBlock) = shard.0.try_write() {
                if begun.elapsed() > limit {
                    return None;
                }
                std::thread::sleep(LOOK_AGAIN);
            }
        }
        Some(drained)
    }

    fn read(&self) -> RwLockReadGuard<'_, Arc<BlockNode>> {
        self.shards[shard()].0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drained {
    /// Puts another node in place.
    pub fn replace(&self, node: &Arc<BlockNode>) {
        for shard in &self.0.shards {
            // Held by nobody longer than it takes to look.
            *shard.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(node);
        }
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        // Under the lock: nobody is between its look at `drains` and its sleep.
        let _waiting = self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if self.0.drains.fetch_sub(1, SeqCst) == 1 {
            self.0.opened.notify_all();
        }
    }
}

impl Deref for Entered<'_> {
    type Target = BlockNode;

    fn deref(&self) -> &BlockNode {
        &self.0
    }
}
