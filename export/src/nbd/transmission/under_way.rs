// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a connection has under way, at the workers and in a ring, within its limits; and how it comes back.

use std::io;
use std::sync::Arc;

use block::stats::Kind;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::{LEAST_CHARGE, MOST_CHARGED, MOST_IN_FLIGHT, Session};
use crate::nbd::proto;
use crate::nbd::reads::{Asked, Ended};
use crate::nbd::reply::To;
use crate::workers::Job;

impl Session<'_> {
    /// Whether anything is under way.
    pub(super) fn is_busy(&self) -> bool {
        self.in_flight > 0 || self.way.reads.in_flight() > 0
    }

    /// Whether so many more bytes of replies may be made; alone, any number.
    pub(super) fn has_room_for(&self, charge: usize) -> bool {
        !self.is_busy() || self.charged + charge <= MOST_CHARGED
    }

    /// Runs `work`, which changes nothing and gives the reply, on a worker, unless the client has gone before it begins.
    pub(super) fn hand_over_look(
        &mut self,
        to: To,
        size: usize,
        work: impl FnOnce() -> Vec<u8> + Send + 'static,
    ) -> io::Result<()> {
        self.give_to_workers(to, size, true, work)
    }

    /// Runs `work`, which gives the reply, on a worker, within this connection's limits.
    pub(super) fn hand_over(
        &mut self,
        to: To,
        size: usize,
        work: impl FnOnce() -> Vec<u8> + Send + 'static,
    ) -> io::Result<()> {
        self.give_to_workers(to, size, false, work)
    }

    fn give_to_workers(
        &mut self,
        to: To,
        size: usize,
        look: bool,
        work: impl FnOnce() -> Vec<u8> + Send + 'static,
    ) -> io::Result<()> {
        let charge = size.max(LEAST_CHARGE);
        while self.in_flight >= MOST_IN_FLIGHT || !self.has_room_for(charge) {
            self.outbox.send(&mut self.way)?;
            self.wait_for_room()?;
            self.send_completions()?;
        }
        self.in_flight += 1;
        self.charged += charge;
        let slot = self.completions.slot(charge, self.style.error(to, proto::errno(&Errno::IO.into())));
        let (export, client) = (Arc::as_ptr(self.root).addr(), self.completions.number());
        // The work lets go of the node before its reply is there: when the last client leaves with it, nobody else may keep the
        // node from being closed.
        self.workers.submit(Job { export, client, look, work: Box::new(move || slot.fill(work())) });
        Ok(())
    }

    /// The same for a client who must still be there: more is wanted of the workers on its behalf.
    ///
    /// # Errors
    /// It has gone.
    fn wait_for_room(&mut self) -> io::Result<()> {
        self.way.reads.submit()?;
        if self.way.reads.has_finished() {
            return Ok(());
        }
        let completed = PollFd::new(&*self.completions, PollFlags::IN);
        let read = self.way.reads.event().map(|event| PollFd::from_borrowed_fd(event, PollFlags::IN));
        // Asked for nothing, it tells of the end all the same.
        let socket = PollFd::new(&**self.way.channel.stream(), PollFlags::empty());
        let mut fds = [completed.clone(), read.unwrap_or(completed), socket];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let over = fds[2].revents().intersects(PollFlags::HUP | PollFlags::ERR);
        if over { Err(io::ErrorKind::ConnectionReset.into()) } else { Ok(()) }
    }

    /// Waits until something that is under way may have ended.
    pub(super) fn wait_for_completions(&mut self) -> io::Result<()> {
        self.way.reads.submit()?;
        if self.way.reads.has_finished() {
            return Ok(());
        }
        let completed = PollFd::new(&*self.completions, PollFlags::IN);
        let read = self.way.reads.event().map(|event| PollFd::from_borrowed_fd(event, PollFlags::IN));
        match poll(&mut [completed.clone(), read.unwrap_or(completed)], None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Answers what has ended.
    pub(super) fn send_completions(&mut self) -> io::Result<()> {
        for bytes in self.collect() {
            self.push(&bytes)?;
        }
        while let Some(Ended { asked, mut buffer, result }) = self.take_read() {
            let Asked { to, len, .. } = asked;
            match result {
                Ok(()) => {
                    self.style.put_read_header(buffer.lead(), to, len);
                    self.outbox.push(buffer.whole(), &mut self.way)?;
                }
                Err(e) => self.push(&self.style.error(to, proto::errno(&e)))?,
            }
            self.way.reads.keep(buffer);
        }
        self.outbox.send(&mut self.way)
    }

    /// Waits for what is under way, which nobody will hear of. Changes that were asked for are made; the rest is left out if
    /// it has not begun.
    pub(super) fn abandon(&mut self) -> io::Result<()> {
        self.workers.leave_out(self.completions.number());
        while self.is_busy() {
            self.wait_for_completions()?;
            self.collect();
            while self.take_read().is_some() {}
        }
        Ok(())
    }

    /// Takes a read that a ring has done off the books.
    fn take_read(&mut self) -> Option<Ended> {
        let ended = self.way.reads.ended()?;
        let Asked { len, started, .. } = ended.asked;
        self.charged -= len as usize;
        self.meter.record(Kind::Read, len.into(), ended.result.is_err(), started);
        Some(ended)
    }

    /// Takes workers' replies off the books.
    fn collect(&mut self) -> Vec<Vec<u8>> {
        let replies = self.completions.take();
        self.in_flight -= replies.len();
        replies
            .into_iter()
            .map(|reply| {
                self.charged -= reply.charge;
                reply.bytes
            })
            .collect()
    }

    /// Adds a reply to what will be sent.
    pub(super) fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.outbox.push(bytes, &mut self.way)
    }
}
