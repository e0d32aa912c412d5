// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One run of some work for all who want it at the same time: flushes.

use std::io;
use std::sync::{Condvar, Mutex, PoisonError};

use rustix::io::Errno;

/// Work that serves every caller who came before it began.
#[derive(Default)]
pub struct Coalesced {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Default)]
struct State {
    begun: u64,
    ended: u64,
    running: bool,
    /// The last run that failed, and how.
    failed: Option<(u64, Errno)>,
}

impl Coalesced {
    /// Returns when `work` has been done once from start to end since the call, by this caller or by another.
    ///
    /// # Errors
    /// Any run's since the call.
    pub fn run(&self, work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = state.begun + 1;
        loop {
            if state.ended >= wanted {
                return match state.failed {
                    Some((run, errno)) if run >= wanted => Err(errno.into()),
                    _ => Ok(()),
                };
            }
            if !state.running {
                break;
            }
            state = self.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.running = true;
        state.begun += 1;
        drop(state);
        // Callers must not wait for ever for a run that broke down.
        let mut run = Run { coalesced: self, outcome: Err(Errno::IO.into()) };
        run.outcome = work();
        let outcome = run.outcome.as_ref().map_err(errno).copied();
        drop(run);
        Ok(outcome?)
    }
}

struct Run<'a> {
    coalesced: &'a Coalesced,
    outcome: io::Result<()>,
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        let mut state = self.coalesced.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.running = false;
        state.ended = state.begun;
        if let Err(e) = &self.outcome {
            state.failed = Some((state.ended, errno(e)));
        }
        self.coalesced.ended.notify_all();
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn callers_at_the_same_time_share_a_run_that_began_after_they_came() {
        let (coalesced, runs) = (Coalesced::default(), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let before = runs.load(Ordering::SeqCst);
                        coalesced
                            .run(|| {
                                std::thread::yield_now();
                                runs.fetch_add(1, Ordering::SeqCst);
                                Ok(())
                            })
                            .unwrap();
                        assert!(runs.load(Ordering::SeqCst) > before);
                    }
                });
            }
        });
        assert!(runs.load(Ordering::SeqCst) <= 2000);
    }

    #[test]
    fn a_failed_run_is_told_to_its_callers_and_not_to_later_ones() {
        let coalesced = Coalesced::default();
        let failed = coalesced.run(|| Err(Errno::NOSPC.into())).unwrap_err();
        assert_eq!(failed.raw_os_error(), Some(28));
        coalesced.run(|| Ok(())).unwrap();
    }
}
