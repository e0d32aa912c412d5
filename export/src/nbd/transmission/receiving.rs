// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a connection waits: for requests, for what is under way, and for the sign that clients are to move.

use std::io;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::{INBOX, Session, State};

impl Session<'_> {
    /// Gets more bytes, or replies from the workers, or both. False at the end of the stream.
    pub(super) fn receive(&mut self) -> io::Result<bool> {
        let wanted = match self.state {
            State::Payload { left, .. } => left.min(INBOX),
            State::Query { left, .. } => left,
            _ => self.style.request_len(),
        };
        if self.leaves() {
            return Ok(false);
        }
        if !self.is_busy() {
            return self.receive_alone(wanted);
        }
        loop {
            if self.way.reads.has_finished() {
                self.send_completions()?;
            }
            if self.way.channel.is_encrypted() {
                // What is decrypted already is nothing that the socket could be polled for.
                if let Some(came) = self.receive_now(wanted)? {
                    return Ok(came);
                }
            }
            let socket = self.way.channel.stream();
            let completed = PollFd::new(&*self.completions, PollFlags::IN);
            let read = self.way.reads.event().map(|event| PollFd::from_borrowed_fd(event, PollFlags::IN));
            let mut fds = [
                PollFd::new(&**socket, PollFlags::IN),
                completed.clone(),
                read.unwrap_or(completed),
                PollFd::new(self.moving, PollFlags::IN),
            ];
            // In the middle of a payload there is no moving, and nothing to be woken for.
            let watched = if self.at_boundary() { 4 } else { 3 };
            match poll(&mut fds[..watched], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
            let [socket, finished, read, _] = fds.map(|fd| !fd.revents().is_empty());
            if finished || read {
                self.send_completions()?;
            }
            if self.leaves() {
                return Ok(false);
            }
            if socket && let Some(came) = self.receive_now(wanted)? {
                return Ok(came);
            }
            if !self.is_busy() {
                return self.receive_alone(wanted);
            }
        }
    }

    /// Gets more bytes while nothing is at the workers. False at the end of the stream, or when the client is to move.
    fn receive_alone(&mut self, wanted: usize) -> io::Result<bool> {
        self.way.reads.rest();
        // Part of a request may be decrypted already: nothing that the socket could be polled for, and nothing that moves.
        if self.at_boundary() && !self.way.channel.is_encrypted() {
            if let Some(came) = self.look_out(wanted)? {
                return Ok(came);
            }
            self.inbox.rest();
            let socket = self.way.channel.stream();
            let mut fds = [PollFd::new(&**socket, PollFlags::IN), PollFd::new(self.moving, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
            if self.leaves() {
                return Ok(false);
            }
        }
        Ok(self.inbox.receive(self.way.channel, wanted, true)? > 0)
    }

    /// Looks out for the next request instead of sleeping, if that is worth it: false at the end of the stream, or when the client
    /// is to move. `None` if nothing came.
    fn look_out(&mut self, wanted: usize) -> io::Result<Option<bool>> {
        let mut attention = std::mem::take(&mut self.attention);
        let came = attention.look_out(|| if self.leaves() { Ok(Some(false)) } else { self.receive_now(wanted) });
        self.attention = attention;
        came
    }

    /// Receives what is there: false at the end of the stream, `None` if nothing is.
    fn receive_now(&mut self, wanted: usize) -> io::Result<Option<bool>> {
        match self.inbox.receive(self.way.channel, wanted, false) {
            Ok(came) => Ok(Some(came > 0)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Whether what comes next is a request.
    fn at_boundary(&self) -> bool {
        matches!(self.state, State::Header)
    }

    /// Whether clients are to move, and this one can.
    fn leaves(&mut self) -> bool {
        self.moved |= self.at_boundary() && self.moving.has_begun();
        self.moved
    }
}
