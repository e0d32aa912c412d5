// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How requests come back from workers: the queue's own thread touches its ring, so no ring is locked.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use super::request::{Outcome, status};
use super::ring::Corrupt;

/// A request that has ended.
#[derive(Debug)]
pub struct Done {
    /// Its head.
    pub head: u16,
    /// Where its status goes.
    pub status_at: u64,
    /// How it ended.
    pub result: Result<Outcome, Corrupt>,
}

/// Ended requests of one queue, and an event that is written for each.
#[derive(Debug)]
pub struct Completions {
    done: Mutex<Vec<Done>>,
    event: OwnedFd,
}

impl Completions {
    /// None.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn new() -> io::Result<Arc<Completions>> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Completions { done: Mutex::default(), event }))
    }

    /// The place for one; if it is dropped unused (a panic in a worker), the request has failed.
    pub fn slot(self: &Arc<Completions>, head: u16, status_at: u64) -> Slot {
        let result = Ok(Outcome { status: status::IOERR, written: 0 });
        Slot { completions: Arc::clone(self), done: Some(Done { head, status_at, result }) }
    }

    /// Takes what there is.
    pub fn take(&self) -> Vec<Done> {
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut done)
    }

    /// The event's number.
    pub fn number(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl AsFd for Completions {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// A result to come.
pub struct Slot {
    completions: Arc<Completions>,
    done: Option<Done>,
}

impl Slot {
    /// Hands over the result.
    pub fn fill(mut self, result: Result<Outcome, Corrupt>) {
        if let Some(done) = &mut self.done {
            done.result = result;
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut done = self.completions.done.lock().unwrap_or_else(PoisonError::into_inner);
        done.extend(self.done.take());
        drop(done);
        // The counter cannot overflow: the thread that waits sees every addition, whatever it adds up to.
        let _ = rustix::io::write(&self.completions.event, &1u64.to_ne_bytes());
    }
}
