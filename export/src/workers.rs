// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Threads for what may sleep: a read that missed the page cache, a flush, a hole to punch.
//!
//! The pool grows when every thread is busy and shrinks when threads idle, so one hung file (NFS, FUSE) takes threads from
//! nobody until [`MOST`] of them hang. Callers bound what they have in flight.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::rings::Rings;

/// Most threads at once.
const MOST: usize = 64;
/// An idle thread ends after this long.
const IDLE: Duration = Duration::from_secs(10);
/// Stack of a worker in bytes.
const STACK: usize = 256 << 10;

/// A piece of work; it reports its outcome itself.
pub type Job = Box<dyn FnOnce() + Send>;

/// The pool. Cloning shares it.
#[derive(Clone, Default)]
pub struct Workers(Arc<Shared>, Rings);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

impl Workers {
    /// A pool without threads: they come with the first jobs.
    pub fn new() -> Workers {
        Workers::default()
    }

    /// The same with rings for those who can do without a worker.
    pub fn with_rings(rings: Rings) -> Workers {
        Workers(Arc::default(), rings)
    }

    /// Those rings.
    pub fn rings(&self) -> &Rings {
        &self.1
    }

    /// Runs `job` on some thread, soon. If no thread can be had at all, it runs here and now: late beats never.
    pub fn submit(&self, job: Job) {
        let mut state = self.0.lock();
        state.jobs.push_back(job);
        if state.idle >= state.jobs.len() {
            self.0.wake.notify_one();
            return;
        }
        if state.threads < MOST {
            let shared = Arc::clone(&self.0);
            let started = thread::Builder::new().name("worker".into()).stack_size(STACK).spawn(move || shared.work());
            if started.is_ok() {
                state.threads += 1;
            } else if state.threads == 0 {
                let job = state.jobs.pop_back();
                drop(state);
                if let Some(job) = job {
                    job();
                }
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                // A panic is a bug of ours; it must cost one request, not one thread of everybody's.
                let _ = catch_unwind(AssertUnwindSafe(job));
                state = self.lock();
                continue;
            }
            state.idle += 1;
            let (guard, waited) = self.wake.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
            state = guard;
            state.idle -= 1;
            if waited.timed_out() && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::mpsc::channel;

    #[test]
    fn jobs_that_wait_for_each_other_all_run() {
        let workers = Workers::new();
        let barrier = Arc::new(Barrier::new(8));
        let (done, all) = channel();
        for _ in 0..8 {
            let (barrier, done) = (Arc::clone(&barrier), done.clone());
            workers.submit(Box::new(move || {
                barrier.wait();
                done.send(()).expect("the receiver outlives the jobs");
            }));
        }
        drop(done);
        assert_eq!(all.iter().count(), 8);
    }
}
