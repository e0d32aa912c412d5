// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How replies come back from worker threads: the connection's own thread sends them, so no worker waits for a client.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

/// Finished replies of one connection, and a descriptor that is readable while there may be some.
pub struct Completions {
    replies: Mutex<Vec<Reply>>,
    event: OwnedFd,
}

/// The bytes of a reply, and what its request counted against the connection's limits.
pub struct Reply {
    pub bytes: Vec<u8>,
    pub charge: usize,
}

impl Completions {
    pub fn new() -> io::Result<Arc<Completions>> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Completions { replies: Mutex::default(), event }))
    }

    /// The place for one reply; if it is dropped unused (a panic in a worker), `otherwise` is sent.
    pub fn slot(self: &Arc<Completions>, charge: usize, otherwise: Vec<u8>) -> Slot {
        Slot { completions: Arc::clone(self), charge, reply: otherwise }
    }

    /// A number that no other connection has as long as this one is there.
    pub fn number(self: &Arc<Completions>) -> usize {
        Arc::as_ptr(self).addr()
    }

    /// Takes what has finished.
    pub fn take(&self) -> Vec<Reply> {
        let mut count = [0; 8];
        // Before the queue is looked at: a reply that comes in between leaves the descriptor readable.
        let _ = rustix::io::read(&self.event, &mut count);
        std::mem::take(&mut self.replies.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl AsFd for Completions {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// A reply to come.
pub struct Slot {
    completions: Arc<Completions>,
    charge: usize,
    reply: Vec<u8>,
}

impl Slot {
    /// Hands over the reply.
    pub fn fill(mut self, bytes: Vec<u8>) {
        self.reply = bytes;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let reply = Reply { bytes: std::mem::take(&mut self.reply), charge: self.charge };
        self.completions.replies.lock().unwrap_or_else(PoisonError::into_inner).push(reply);
        // Cannot fail: the counter would have to reach 2^64.
        let _ = rustix::io::write(&self.completions.event, &1u64.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_that_is_dropped_unused_answers_all_the_same() {
        let completions = Completions::new().expect("an eventfd");
        drop(completions.slot(5, b"error".to_vec()));
        completions.slot(1, Vec::new()).fill(b"fine".to_vec());
        let replies = completions.take();
        assert_eq!(
            replies.iter().map(|r| (&r.bytes[..], r.charge)).collect::<Vec<_>>(),
            [(&b"error"[..], 5), (&b"fine"[..], 1)]
        );
        assert!(completions.take().is_empty());
    }
}
