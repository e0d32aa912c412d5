// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A connection's reads that are under way in a ring.
//!
//! The connection's thread queues them while it goes through a batch, tells the kernel of all at once, and takes the bytes back
//! itself: nobody is woken but the thread that sends the replies. The buffer that the kernel fills has room for the reply's
//! header right before the data.
//!
//! The first of them enters the export's root and the last one leaves it, so that the node stays where it is as long as the
//! kernel reads for it. In between the thread must enter no second time, because a drain that has begun would wait for both:
//! whatever it does in place it does [within](Reads::within). And it must not sleep for the client meanwhile: what is sent goes
//! a [`super::way::Way`] that takes the reads back first.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use block::{BlockNode, Entered, Root, Wait};
use rustix::io::Errno;
use sys::buffer::Buffer;
use sys::ring::Done;

use super::reply::To;
use crate::rings::{Borrowed, Rings};

/// Bytes of buffers that are kept for the next reads.
const MOST_SPARE: usize = 1 << 20;

/// Reads under way, and the ring as long as there are some.
pub struct Reads<'a> {
    root: &'a Arc<Root>,
    rings: Rings,
    /// Before `entered`: what is under way ends first when the value goes.
    ring: Option<Borrowed>,
    /// There exactly while the ring has something under way.
    entered: Option<Entered<'a>>,
    asked: Vec<Option<Asked>>,
    /// Taken back and not yet answered.
    finished: VecDeque<Ended>,
    spare: Vec<Buffer>,
    /// Bytes that a header needs.
    lead: usize,
}

/// A read that was asked for.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// What its reply repeats.
    pub to: To,
    /// Bytes.
    pub len: u32,
    /// When.
    pub started: Instant,
}

/// A read that has ended.
pub struct Ended {
    /// What was asked.
    pub asked: Asked,
    /// The bytes, if it succeeded.
    pub buffer: Buffer,
    /// Whether it did.
    pub result: io::Result<()>,
}

impl<'a> Reads<'a> {
    /// None yet.
    pub fn new(root: &'a Arc<Root>, rings: Rings, lead: usize) -> Reads<'a> {
        let (asked, finished, spare) = (Vec::new(), VecDeque::new(), Vec::new());
        Reads { root, rings, ring: None, entered: None, asked, finished, spare, lead }
    }

    /// How many have not been answered.
    pub fn in_flight(&self) -> usize {
        self.in_ring() + self.finished.len()
    }

    fn in_ring(&self) -> usize {
        self.ring.as_ref().map_or(0, |ring| ring.in_flight())
    }

    /// Whether some can be answered now, whatever [`Reads::event`] says.
    pub fn has_finished(&self) -> bool {
        !self.finished.is_empty()
    }

    /// Uses the node, as a request of its own or together with the reads that are under way.
    pub fn within<T>(&self, request: impl FnOnce(&BlockNode) -> T) -> T {
        match &self.entered {
            Some(node) => request(node),
            None => request(&self.root.enter()),
        }
    }

    /// Starts one. False if it cannot be done here: there is no ring or no room in it, the bytes are in no one place, or
    /// somebody waits for the reads under way to end. Then somebody else must read.
    pub fn start(&mut self, to: To, len: u32) -> bool {
        if !self.rings.exist() || (self.entered.is_some() && self.root.is_drained()) {
            return false;
        }
        let entered = self.entered.take().unwrap_or_else(|| self.root.enter());
        let started = self.start_at(&entered, to, len);
        if self.in_ring() > 0 {
            self.entered = Some(entered);
        }
        started
    }

    fn start_at(&mut self, node: &BlockNode, to: To, len: u32) -> bool {
        let size = len as usize;
        let Some(place) = node.locate(to.offset, size) else { return false };
        if self.ring.is_none() {
            self.ring = self.rings.borrow();
        }
        let Some(ring) = self.ring.as_mut().filter(|ring| ring.has_room()) else { return false };
        let buffer = match self.spare.iter().position(|buffer| buffer.len() == size) {
            Some(at) => self.spare.swap_remove(at),
            None => Buffer::new(self.lead, size),
        };
        let number = self.asked.iter().position(Option::is_none).unwrap_or(self.asked.len());
        if ring.read(place.fd, place.offset, number as u64, buffer).is_err() {
            return false;
        }
        let asked = Some(Asked { to, len, started: Instant::now() });
        match self.asked.get_mut(number) {
            Some(slot) => *slot = asked,
            None => self.asked.push(asked),
        }
        true
    }

    /// Tells the kernel of what was started.
    ///
    /// # Errors
    /// It takes nothing.
    pub fn submit(&mut self) -> io::Result<()> {
        self.ring.as_mut().map_or(Ok(()), |ring| ring.submit())
    }

    /// One that has ended.
    pub fn ended(&mut self) -> Option<Ended> {
        self.finished.pop_front().or_else(|| self.take_back())
    }

    /// Waits until the kernel reads nothing any more; what it has read is still to be answered.
    ///
    /// # Errors
    /// The errno of io_uring_enter(2).
    pub fn finish(&mut self) -> io::Result<()> {
        self.submit()?;
        loop {
            while let Some(ended) = self.take_back() {
                self.finished.push_back(ended);
            }
            match self.ring.as_mut().filter(|ring| ring.in_flight() > 0) {
                Some(ring) => ring.wait()?,
                None => return Ok(()),
            }
        }
    }

    /// [Finishes](Reads::finish) if somebody waits for that.
    ///
    /// # Errors
    /// As there.
    pub fn give_way(&mut self) -> io::Result<()> {
        if self.entered.is_some() && self.root.is_drained() { self.finish() } else { Ok(()) }
    }

    /// Takes one back from the kernel, and leaves the root after the last.
    fn take_back(&mut self) -> Option<Ended> {
        let Done { token, mut buffer, result } = self.ring.as_mut()?.completed()?;
        let asked = usize::try_from(token).ok().and_then(|number| self.asked.get_mut(number)?.take())?;
        let result = self.complete(asked.to, &mut buffer, result);
        if self.in_ring() == 0 {
            self.entered = None;
        }
        Some(Ended { asked, buffer, result })
    }

    /// Fills in what a read has left out: at the end of a file, or because the kernel had to be asked otherwise.
    fn complete(&self, to: To, buffer: &mut Buffer, result: io::Result<usize>) -> io::Result<()> {
        let got = match result.map_err(|e| (Errno::from_io_error(&e), e)) {
            Ok(got) => got,
            // Not now, not this way, or given up by the kernel: none of it says anything about the disk.
            Err((Some(Errno::AGAIN | Errno::INTR | Errno::INVAL | Errno::OPNOTSUPP | Errno::CANCELED), _)) => 0,
            Err((_, e)) => return Err(e),
        };
        match buffer.bytes().get_mut(got..) {
            Some(rest) if !rest.is_empty() => {
                self.within(|node| node.read(rest, to.offset + got as u64, Wait::Allowed))
            }
            _ => Ok(()),
        }
    }

    /// Keeps a buffer for reads to come.
    pub fn keep(&mut self, buffer: Buffer) {
        let kept: usize = self.spare.iter().map(Buffer::len).sum();
        if kept + buffer.len() <= MOST_SPARE {
            self.spare.push(buffer);
        }
    }

    /// Gives the ring back to whoever needs it, if nothing is under way.
    pub fn rest(&mut self) {
        if self.in_ring() == 0 {
            self.ring = None;
        }
    }

    /// What is readable while one may have ended; `None` while none is under way.
    pub fn event(&self) -> Option<BorrowedFd<'_>> {
        self.ring.as_ref().filter(|ring| ring.in_flight() > 0).map(|ring| ring.as_fd())
    }
}
