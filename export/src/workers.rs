// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Threads for what may sleep: a read that missed the page cache, a flush, a hole to punch.
//!
//! The pool grows when every thread is busy and shrinks when threads idle, so one hung file (NFS, FUSE) takes threads from
//! nobody until [`MOST`] of them hang. Even then an export of which nothing is being done gets a thread of its own, which does
//! what is asked of that export until nothing is left. Callers bound what they have in flight.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::rings::Rings;

/// Most threads at once, but for those of exports that would have none.
const MOST: usize = 64;
/// Most threads at all.
const MOST_AT_ALL: usize = 1024;
/// An idle thread ends after this long.
const IDLE: Duration = Duration::from_secs(10);
/// Stack of a worker in bytes.
const STACK: usize = 256 << 10;

/// What a worker does for somebody; it reports its outcome itself.
pub type Work = Box<dyn FnOnce() + Send>;

/// A piece of work.
pub struct Job {
    /// What it is done to: an export, by a number that no other has.
    pub export: usize,
    /// For whom: see [`Workers::leave_out`].
    pub client: usize,
    /// Whether it may be left out when the client is gone.
    pub look: bool,
    /// The work.
    pub work: Work,
}

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
    /// Exports for which something is being done, and how much.
    busy: HashMap<usize, usize>,
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
        let export = job.export;
        let mut state = self.0.lock();
        state.jobs.push_back(job);
        if state.idle >= state.jobs.len() {
            self.0.wake.notify_one();
            return;
        }
        let alone = state.threads >= MOST;
        if alone && (state.threads >= MOST_AT_ALL || state.has_thread(export)) {
            return;
        }
        let shared = Arc::clone(&self.0);
        let work = move || if alone { shared.work_for(export) } else { shared.work() };
        let started = thread::Builder::new().name("worker".into()).stack_size(STACK).spawn(work);
        if started.is_ok() {
            state.threads += 1;
            if alone {
                // It has begun, as far as anybody else is concerned: one is enough.
                *state.busy.entry(export).or_default() += 1;
            }
        } else if state.threads == 0 {
            let job = state.jobs.pop_back();
            drop(state);
            if let Some(job) = job {
                (job.work)();
            }
        }
    }

    /// Leaves out what has not begun of a client's looks: nobody is there to hear of it.
    pub fn leave_out(&self, client: usize) {
        let mut state = self.0.lock();
        let (left_out, kept) = state.jobs.drain(..).partition(|job| job.look && job.client == client);
        state.jobs = kept;
        drop(state);
        // What they hold goes without the lock.
        drop::<VecDeque<Job>>(left_out);
    }
}

impl State {
    fn has_thread(&self, export: usize) -> bool {
        self.busy.contains_key(&export)
    }

    fn ends(&mut self, export: usize) {
        if let Some(count) = self.busy.get_mut(&export) {
            *count -= 1;
            if *count == 0 {
                self.busy.remove(&export);
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
            if let Some(Job { export, work, .. }) = state.jobs.pop_front() {
                *state.busy.entry(export).or_default() += 1;
                drop(state);
                run(work);
                state = self.lock();
                state.ends(export);
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

    /// Does what is asked of one export, until there is nothing left.
    fn work_for(&self, export: usize) {
        let mut state = self.lock();
        while let Some(at) = state.jobs.iter().position(|job| job.export == export)
            && let Some(job) = state.jobs.remove(at)
        {
            drop(state);
            run(job.work);
            state = self.lock();
        }
        state.ends(export);
        state.threads -= 1;
    }
}

/// A panic is a bug of ours; it must cost one request, not one thread of everybody's.
fn run(work: Work) {
    let _ = catch_unwind(AssertUnwindSafe(work));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::mpsc::channel;

    fn job(export: usize, client: usize, work: impl FnOnce() + Send + 'static) -> Job {
        Job { export, client, look: true, work: Box::new(work) }
    }

    /// Gives every worker something for export and client 1 that ends when the barrier is waited for.
    fn all_hang(workers: &Workers) -> Arc<Barrier> {
        let hang = Arc::new(Barrier::new(MOST + 1));
        for _ in 0..MOST {
            let hang = Arc::clone(&hang);
            workers.submit(job(1, 1, move || _ = hang.wait()));
        }
        hang
    }

    #[test]
    fn jobs_that_wait_for_each_other_all_run() {
        let workers = Workers::new();
        let barrier = Arc::new(Barrier::new(8));
        let (done, all) = channel();
        for _ in 0..8 {
            let (barrier, done) = (Arc::clone(&barrier), done.clone());
            workers.submit(job(0, 0, move || {
                barrier.wait();
                done.send(()).expect("the receiver outlives the jobs");
            }));
        }
        drop(done);
        assert_eq!(all.iter().count(), 8);
    }

    #[test]
    fn when_all_hang_an_export_that_has_no_thread_gets_one() {
        let workers = Workers::new();
        let hang = all_hang(&workers);
        let (done, all) = channel();
        for export in [2, 2, 3, 2, 3] {
            let done = done.clone();
            workers.submit(job(export, 2, move || done.send(export).expect("the receiver outlives the jobs")));
        }
        drop(done);
        let mut exports: Vec<usize> = all.iter().collect();
        exports.sort_unstable();
        assert_eq!(exports, [2, 2, 2, 3, 3]);
        hang.wait();
    }

    #[test]
    fn what_a_client_who_is_gone_only_wanted_to_see_is_left_out() {
        let workers = Workers::new();
        let hang = all_hang(&workers);
        let (done, all) = channel();
        for (client, look) in [(2, true), (3, true), (2, false), (2, true)] {
            let done = done.clone();
            let work = move || done.send((client, look)).expect("the receiver outlives the jobs");
            workers.submit(Job { look, ..job(1, client, work) });
        }
        drop(done);
        workers.leave_out(2);
        hang.wait();
        let mut left: Vec<(usize, bool)> = all.iter().collect();
        left.sort_unstable();
        assert_eq!(left, [(2, false), (3, true)]);
    }
}
