// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The two buffers of a connection: requests come in by the batch, replies leave by the batch.
//!
//! A client has them while it has something in them. Meanwhile others use the same ones, the last used first: what a thousand
//! clients pass through is then the little memory that the processor's cache still has. Nothing of a buffer counts that its
//! holder has not put there, so nobody sees what another client left.

use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::channel::Channel;
use super::way::Way;

/// Room for one batch of requests, or for a payload that is written in one piece, bytes.
pub const INBOX: usize = BUFFER;
/// Bytes of every buffer: the largest read that is answered in place, the largest write that is done in one piece, and headers.
/// They are zeroed by the kernel page by page as they are first touched.
const BUFFER: usize = (1 << 20) + (64 << 10);
/// Most bytes received at once: what fits the processor's cache is still there when it is parsed.
const RECEIVE: usize = 256 << 10;
/// Replies leave when this many bytes have been moved for them, even in the middle of a batch: the client, on a processor of its
/// own, goes through these while the rest is being made, and has asked for more before there is nothing left to do.
const SEND_AT: usize = 64 << 10;

/// Buffers that nobody uses: no more than there are who may come to need one, however many were in use at once before.
#[derive(Clone, Default)]
pub struct Spares(Arc<Mutex<Vec<Box<[u8]>>>>);

impl Spares {
    fn lend(&self) -> Lent {
        let spare = lock(&self.0).pop();
        Lent { buf: spare.unwrap_or_else(|| vec![0; BUFFER].into()), back: Arc::clone(&self.0) }
    }
}

impl Drop for Spares {
    fn drop(&mut self) {
        let mut spares = lock(&self.0);
        let excess = (spares.len() + 1).saturating_sub(Arc::strong_count(&self.0));
        let excess: Vec<_> = spares.drain(..excess).collect();
        drop(spares);
        drop(excess);
    }
}

/// A buffer in use; it goes back when it is dropped.
struct Lent {
    buf: Box<[u8]>,
    back: Arc<Mutex<Vec<Box<[u8]>>>>,
}

impl Deref for Lent {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buf
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.buf
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        lock(&self.back).push(std::mem::take(&mut self.buf));
    }
}

fn lock(spares: &Mutex<Vec<Box<[u8]>>>) -> MutexGuard<'_, Vec<Box<[u8]>>> {
    spares.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Received and not yet consumed bytes.
pub struct Inbox {
    buf: Option<Lent>,
    /// After `buf`, which goes back first.
    spares: Spares,
    start: usize,
    end: usize,
}

impl Inbox {
    /// With bytes that have come already, [`INBOX`] at most.
    pub fn with(received: &[u8], spares: &Spares) -> Inbox {
        let mut inbox = Inbox { spares: spares.clone(), buf: None, start: 0, end: 0 };
        if !received.is_empty() {
            inbox.buf.insert(spares.lend())[..received.len()].copy_from_slice(received);
            inbox.end = received.len();
        }
        inbox
    }

    /// What is there.
    pub fn bytes(&self) -> &[u8] {
        self.buf.as_ref().map_or(&[], |buf| &buf[self.start..self.end])
    }

    /// Forgets the first `count` bytes.
    pub fn consume(&mut self, count: usize) {
        self.start += count;
        debug_assert!(self.start <= self.end);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Lets others use the buffer until something comes.
    pub fn rest(&mut self) {
        if self.end == 0 {
            self.buf = None;
        }
    }

    /// Receives more, making room so that `wanted` bytes from the start fit ([`INBOX`] at most). Returns the bytes that came;
    /// 0 is the end of the stream.
    pub fn receive(&mut self, channel: &mut Channel, wanted: usize, wait: bool) -> io::Result<usize> {
        let buf = self.buf.get_or_insert_with(|| self.spares.lend());
        if self.start + wanted > buf.len() || self.end == buf.len() {
            buf.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let most = buf.len().min(self.end + RECEIVE);
        let came = channel.receive(&mut buf[self.end..most], wait)?;
        self.end += came;
        Ok(came)
    }
}

/// Replies that have not left yet.
pub struct Outbox {
    buf: Option<Lent>,
    /// After `buf`, which goes back first.
    spares: Spares,
    filled: usize,
    /// Bytes moved since the last time.
    moved: usize,
}

impl Outbox {
    /// Largest payload for [`Outbox::reserve`], bytes.
    pub const MOST: usize = BUFFER - 64;

    pub fn new(spares: &Spares) -> Outbox {
        Outbox { spares: spares.clone(), buf: None, filled: 0, moved: 0 }
    }

    /// Room for `count` bytes (at most [`Outbox::MOST`] and a header); what is there leaves first if it must.
    /// Nothing of it counts before [`Outbox::commit`].
    pub fn reserve(&mut self, count: usize, way: &mut Way<'_>) -> io::Result<&mut [u8]> {
        if self.filled + count > BUFFER {
            self.send(way)?;
        }
        let buf = self.buf.get_or_insert_with(|| self.spares.lend());
        Ok(&mut buf[self.filled..self.filled + count])
    }

    /// Adds the first `count` reserved bytes to what will be sent.
    pub fn commit(&mut self, count: usize, way: &mut Way<'_>) -> io::Result<()> {
        self.filled += count;
        self.moved += count;
        if self.moved >= SEND_AT { self.send(way) } else { Ok(()) }
    }

    /// Counts bytes that were received and written; their reply comes next.
    pub fn note_written(&mut self, count: usize) {
        self.moved += count;
    }

    /// Adds bytes of any length.
    pub fn push(&mut self, bytes: &[u8], way: &mut Way<'_>) -> io::Result<()> {
        if bytes.len() > Outbox::MOST {
            self.send(way)?;
            return way.write_all(bytes);
        }
        self.reserve(bytes.len(), way)?.copy_from_slice(bytes);
        self.commit(bytes.len(), way)
    }

    /// Sends what has gathered, and lets others use the buffer.
    pub fn send(&mut self, way: &mut Way<'_>) -> io::Result<()> {
        if let Some(buf) = &self.buf
            && self.filled > 0
        {
            way.write_all(&buf[..self.filled])?;
            self.filled = 0;
        }
        self.moved = 0;
        self.buf = None;
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_last_is_used_next() {
        let spares = Spares::default();
        let (mut first, second) = (spares.lend(), spares.lend());
        first[0] = 7;
        drop(second);
        drop(first);
        assert_eq!(spares.lend()[0], 7);
    }

    #[test]
    fn no_more_is_kept_than_may_be_needed() {
        let spares = Spares::default();
        let clients: Vec<Spares> = (0..20).map(|_| spares.clone()).collect();
        let lent: Vec<Lent> = clients.iter().map(Spares::lend).collect();
        drop(lent);
        assert_eq!(lock(&spares.0).len(), 20);
        let mut clients = clients.into_iter();
        clients.by_ref().take(15).for_each(drop);
        assert!((5..=6).contains(&lock(&spares.0).len()));
        clients.for_each(drop);
        assert!(lock(&spares.0).len() <= 1);
    }
}
