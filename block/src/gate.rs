// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests under way, counted: so that room is not used again while somebody may still read or write it, and so that a driver
//! can have itself alone for a moment.
//!
//! A request [enters](Gate::enter) before it looks where bytes live and leaves when its I/O is done. That is one atomic addition
//! on a cache line that few threads share, and one subtraction. Whoever takes a place away from the mapping waits for two
//! [turns](Gate::turn) before the place is given to others: by then every request that may have seen the old mapping has left.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Counters, spread over threads.
pub(crate) const SHARDS: usize = 16;

/// How long [`Gate::close`] sleeps between two looks at the counters.
const LOOK_AGAIN: Duration = Duration::from_micros(50);

#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard {
    /// Requests inside, by the last bit of the turn in which they entered.
    inside: [AtomicU64; 2],
}

/// Counts the requests that are inside.
#[derive(Debug, Default)]
pub struct Gate {
    shards: [Shard; SHARDS],
    turns: AtomicUsize,
    closed: AtomicBool,
    /// Held by whoever has closed the gate.
    closing: Mutex<()>,
    waiting: Mutex<()>,
    opened: Condvar,
}

/// A request that is inside; dropping it leaves.
#[derive(Debug)]
pub struct Hold<'a>(Option<&'a AtomicU64>);

/// A gate that nobody is inside of; dropping it opens the gate.
#[derive(Debug)]
pub struct Closed<'a> {
    gate: &'a Gate,
    _alone: std::sync::MutexGuard<'a, ()>,
}

impl Gate {
    /// Enters; sleeps while the gate is closed. Who is inside already must not enter again: it would wait for itself.
    pub fn enter(&self) -> Hold<'_> {
        loop {
            let count = &self.shards[shard()].inside[self.turns.load(SeqCst) & 1];
            count.fetch_add(1, SeqCst);
            if !self.closed.load(SeqCst) {
                return Hold(Some(count));
            }
            count.fetch_sub(1, SeqCst);
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            while self.closed.load(SeqCst) {
                waiting = self.opened.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Begins a new turn if all who entered in the turn before the present one have left; whether it did. Never waits.
    pub fn turn(&self) -> bool {
        let turns = self.turns.load(SeqCst);
        if self.inside((turns + 1) & 1) > 0 {
            return false;
        }
        self.turns.compare_exchange(turns, turns + 1, SeqCst, SeqCst).is_ok()
    }

    /// Number of turns so far.
    pub fn turns(&self) -> usize {
        self.turns.load(SeqCst)
    }

    /// Keeps others out and waits until those inside have left.
    pub fn close(&self) -> Closed<'_> {
        let alone = self.closing.lock().unwrap_or_else(PoisonError::into_inner);
        self.closed.store(true, SeqCst);
        while self.inside(0) + self.inside(1) > 0 {
            std::thread::sleep(LOOK_AGAIN);
        }
        Closed { gate: self, _alone: alone }
    }

    fn inside(&self, parity: usize) -> u64 {
        self.shards.iter().map(|shard| shard.inside[parity].load(SeqCst)).sum()
    }
}

impl Hold<'_> {
    /// For drivers whose places never change hands.
    pub const NONE: Hold<'static> = Hold(None);

    /// Whether it holds nothing.
    pub fn is_none(&self) -> bool {
        self.0.is_none()
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        if let Some(count) = self.0 {
            count.fetch_sub(1, SeqCst);
        }
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        // Under the lock: nobody is between its look at `closed` and its sleep.
        let _waiting = self.gate.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        self.gate.closed.store(false, SeqCst);
        self.gate.opened.notify_all();
    }
}

/// The present thread's shard.
pub(crate) fn shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static SHARD: Cell<Option<usize>> = const { Cell::new(None) });
    SHARD.with(|shard| {
        shard.get().unwrap_or_else(|| {
            let own = NEXT.fetch_add(1, SeqCst) % SHARDS;
            shard.set(Some(own));
            own
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn two_turns_have_passed_only_when_those_who_were_inside_have_left() {
        let gate = Gate::default();
        let early = gate.enter();
        assert!(gate.turn());
        let late = gate.enter();
        assert!(!gate.turn());
        drop(early);
        assert!(gate.turn() && !gate.turn());
        drop(late);
        assert!(gate.turn() && gate.turn());
    }

    #[test]
    fn who_has_closed_the_gate_is_alone() {
        let gate = Gate::default();
        let inside = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        let _hold = gate.enter();
                        inside.fetch_add(1, SeqCst);
                        std::thread::yield_now();
                        inside.fetch_sub(1, SeqCst);
                    }
                });
            }
            for _ in 0..20 {
                let _closed = gate.close();
                assert_eq!(inside.load(SeqCst), 0);
            }
        });
    }
}
