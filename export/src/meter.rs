// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where a client's requests are counted.

use std::sync::Arc;
use std::time::Instant;

use block::Root;
use block::stats::{Kind, Stats, Tally};

/// A client's counters, those of its export, and those of its node. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Meter {
    client: Arc<Stats>,
    export: Arc<Stats>,
    root: Arc<Root>,
}

impl Meter {
    /// A new client's.
    pub fn new(export: Arc<Stats>, root: Arc<Root>) -> Meter {
        Meter { client: Arc::default(), export, root }
    }

    /// The client's own counters.
    pub fn client(&self) -> &Arc<Stats> {
        &self.client
    }

    /// Counts one request that began at `started` and has ended now.
    pub fn record(&self, kind: Kind, bytes: u64, failed: bool, started: Instant) {
        let mut tally = Tally::default();
        tally.note(kind, bytes, failed);
        self.settle(&mut tally, started);
    }

    /// Counts a batch that began at `started` and has been answered now.
    pub fn settle(&self, tally: &mut Tally, started: Instant) {
        if !tally.is_empty() {
            // The client last: who sees a request there finds it in the others.
            tally.settle(started.elapsed(), [self.root.look().stats(), &*self.export, &*self.client]);
        }
    }
}
