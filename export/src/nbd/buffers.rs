// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The two buffers of a connection: requests come in by the batch, replies leave by the batch.
//!
//! Both are allocated once, zeroed by the kernel page by page as they are first touched, and reused from their start
//! whenever they run empty: a client with small requests touches little memory.

use std::io;

use super::channel::Channel;
use super::way::Way;

/// Room for one batch of requests, or for a payload that is written in one piece, bytes.
pub const INBOX: usize = (1 << 20) + (64 << 10);
/// Most bytes received at once: what fits the processor's cache is still there when it is parsed.
const RECEIVE: usize = 256 << 10;
/// Room for replies, bytes: the largest read that is answered in place, and headers.
const OUTBOX: usize = (1 << 20) + (64 << 10);
/// Replies leave when this many bytes have gathered, even in the middle of a batch.
const SEND_AT: usize = 256 << 10;

/// Received and not yet consumed bytes.
pub struct Inbox {
    buf: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Inbox {
    /// With bytes that have come already, [`INBOX`] at most.
    pub fn with(received: &[u8]) -> Inbox {
        let mut buf: Box<[u8]> = vec![0; INBOX].into();
        buf[..received.len()].copy_from_slice(received);
        Inbox { buf, start: 0, end: received.len() }
    }

    /// What is there.
    pub fn bytes(&self) -> &[u8] {
        &self.buf[self.start..self.end]
    }

    /// Forgets the first `count` bytes.
    pub fn consume(&mut self, count: usize) {
        self.start += count;
        debug_assert!(self.start <= self.end);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Receives more, making room so that `wanted` bytes from the start fit ([`INBOX`] at most). Returns the bytes that came;
    /// 0 is the end of the stream.
    pub fn receive(&mut self, channel: &mut Channel, wanted: usize, wait: bool) -> io::Result<usize> {
        if self.start + wanted > self.buf.len() || self.end == self.buf.len() {
            self.buf.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let most = self.buf.len().min(self.end + RECEIVE);
        let came = channel.receive(&mut self.buf[self.end..most], wait)?;
        self.end += came;
        Ok(came)
    }
}

/// Replies that have not left yet.
pub struct Outbox {
    buf: Box<[u8]>,
    filled: usize,
}

impl Outbox {
    /// Largest payload for [`Outbox::reserve`], bytes.
    pub const MOST: usize = OUTBOX - 64;

    pub fn new() -> Outbox {
        Outbox { buf: vec![0; OUTBOX].into(), filled: 0 }
    }

    /// Room for `count` bytes (at most [`Outbox::MOST`] and a header); what is there leaves first if it must.
    /// Nothing of it counts before [`Outbox::commit`].
    pub fn reserve(&mut self, count: usize, way: &mut Way<'_>) -> io::Result<&mut [u8]> {
        if self.filled + count > self.buf.len() {
            self.send(way)?;
        }
        Ok(&mut self.buf[self.filled..self.filled + count])
    }

    /// Adds the first `count` reserved bytes to what will be sent.
    pub fn commit(&mut self, count: usize, way: &mut Way<'_>) -> io::Result<()> {
        self.filled += count;
        if self.filled >= SEND_AT { self.send(way) } else { Ok(()) }
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

    /// Sends what has gathered.
    pub fn send(&mut self, way: &mut Way<'_>) -> io::Result<()> {
        if self.filled > 0 {
            way.write_all(&self.buf[..self.filled])?;
            self.filled = 0;
        }
        Ok(())
    }
}
