// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `bench`: many requests of one kind, and how long they took.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use block::{BlockNode, Wait};

use confine::Requirement;

use crate::disk::{Disk, Layer, Usage};
use crate::tool::{Error, Result, confine, say};

/// What is asked.
pub struct Request {
    /// The chain; its top is writable for writes.
    pub layers: Vec<Layer>,
    /// Requests.
    pub count: u64,
    /// At once.
    pub depth: usize,
    /// Bytes of each.
    pub size: usize,
    /// Where the first begins, and how far the next one is from there.
    pub offset: u64,
    /// Bytes between the beginnings of requests.
    pub step: u64,
    /// What is written, for writes.
    pub pattern: Option<u8>,
    /// A flush after so many writes; 0 for none.
    pub flush_interval: u64,
    /// A flush waits for the writes before it.
    pub drains: bool,
    /// Others may write at the same time.
    pub force_share: bool,
    /// Which layers of confinement must be had.
    pub confinement: Requirement,
}

/// Measures; the exit status.
///
/// # Errors
/// The image cannot be opened, or a request fails.
pub fn run(request: Request) -> Result<u8> {
    confine(request.confinement)?;
    let writes = request.pattern.is_some();
    let disk =
        Disk::open(request.layers, Usage { writable: writes, force_share: request.force_share, unflushed: false })?;
    say(&format!(
        "Sending {} {} requests, {} bytes each, {} in parallel (starting at offset {}, step size {})\n",
        request.count,
        if writes { "write" } else { "read" },
        request.size,
        request.depth,
        request.offset,
        request.step
    ))?;
    if request.flush_interval > 0 {
        say(&format!("Sending flush every {} requests\n", request.flush_interval))?;
    }
    let bench = Bench {
        node: &disk.node,
        size: request.size,
        step: request.step,
        pattern: request.pattern,
        flush_interval: request.flush_interval,
        drains: request.drains,
        state: Mutex::new(State { left: request.count, at: request.offset, ..State::default() }),
        changed: Condvar::new(),
    };
    let started = Instant::now();
    let threads = request.depth.min(usize::try_from(request.count).unwrap_or(usize::MAX)).max(1);
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| bench.work())).collect();
        let broken = || Err(Error::Text("a thread broke down".into()));
        workers.into_iter().map(|worker| worker.join().unwrap_or_else(|_| broken())).collect()
    });
    results.into_iter().collect::<Result<Vec<()>>>()?;
    let passed = started.elapsed().as_secs_f64();
    disk.close()?;
    say(&format!("Run completed in {passed:.3} seconds.\n"))?;
    Ok(0)
}

#[derive(Default)]
struct State {
    /// Requests that nobody has taken yet.
    left: u64,
    at: u64,
    under_way: u64,
    since_flush: u64,
    failed: bool,
}

struct Bench<'a> {
    node: &'a BlockNode,
    size: usize,
    step: u64,
    pattern: Option<u8>,
    flush_interval: u64,
    drains: bool,
    state: Mutex<State>,
    changed: Condvar,
}

enum Turn {
    Request(u64),
    Flush,
}

impl Bench<'_> {
    fn work(&self) -> Result<()> {
        let mut buffer = vec![self.pattern.unwrap_or(0); self.size];
        while let Some(turn) = self.take() {
            let done = match (turn, self.pattern) {
                (Turn::Flush, _) => self.node.flush(),
                (Turn::Request(at), Some(_)) => self.node.write(&buffer, at, false),
                (Turn::Request(at), None) => self.node.read(&mut buffer, at, Wait::Allowed),
            };
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.under_way -= 1;
            state.failed |= done.is_err();
            self.changed.notify_all();
            drop(state);
            done.map_err(|e| Error::Text(format!("Failed request: {e}")))?;
        }
        Ok(())
    }

    fn take(&self) -> Option<Turn> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if state.failed {
                return None;
            }
            let flushes = self.flush_interval > 0 && state.since_flush >= self.flush_interval;
            if !flushes && state.left == 0 {
                return None;
            }
            // With draining, a flush is alone.
            let must_wait = self.drains && flushes && state.under_way > 0;
            if !must_wait {
                state.under_way += 1;
                if flushes {
                    state.since_flush = 0;
                    return Some(Turn::Flush);
                }
                state.left -= 1;
                state.since_flush += 1;
                let at = state.at;
                state.at = (at.saturating_add(self.step)).checked_rem(self.node.len()).unwrap_or(0);
                return Some(Turn::Request(at));
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
