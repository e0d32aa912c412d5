// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The transmission phase: one thread, one loop, batches.
//!
//! Every request in the receive buffer is parsed; what can be answered without sleeping is answered into the send buffer at
//! once, the rest goes to the workers and comes back through [`Completions`] in any order; then one write answers the batch.
//! A hit in the page cache thus meets no other thread and no lock. Writes are done in place too: they may sleep in the
//! kernel, but only this client waits.
//!
//! Memory is bounded by the two buffers and [`MOST_CHARGED`] bytes of replies in flight.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use block::stats::{Kind, Tally};
use block::{BlockNode, Wait, ZeroFlags};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::buffers::{INBOX, Inbox, Outbox};
use super::completions::{Completions, Slot};
use super::handshake::Agreed;
use super::proto::{self, Command, MAX_PAYLOAD, REQUEST_LEN, Request, cmd_flag};
use super::reply::{self, Style};
use super::stream::Stream;
use crate::meter::Meter;
use crate::workers::Workers;

/// Most requests at the workers at once, for one connection.
const MOST_IN_FLIGHT: usize = 16;
/// Most bytes of replies that workers may be making for one connection; a single larger read passes alone.
const MOST_CHARGED: usize = 64 << 20;
/// What every request at the workers counts at least, bytes.
const LEAST_CHARGE: usize = 256;

/// Serves requests until the client disconnects; then waits for what is in flight.
///
/// # Errors
/// A client that breaks the protocol or vanishes.
pub fn serve(stream: &Stream, agreed: &Agreed, meter: Meter, workers: &Workers) -> io::Result<()> {
    let mut session = Session {
        stream,
        node: agreed.export.node(),
        writable: agreed.export.writable(),
        block_size: u64::from(agreed.export.block_size()),
        style: if agreed.structured { Style::Structured } else { Style::Simple },
        base_allocation: agreed.base_allocation,
        workers,
        inbox: Inbox::new(),
        outbox: Outbox::new(),
        state: State::Header,
        completions: Completions::new()?,
        in_flight: 0,
        charged: 0,
        meter,
        tally: Tally::default(),
    };
    let served = session.run();
    // The export is in use until its last request has ended, whoever is there to hear of it.
    while session.in_flight > 0 {
        session.wait_for_completions()?;
        session.collect();
    }
    served
}

/// What the next bytes in the inbox are.
#[derive(Clone, Copy, Debug)]
enum State {
    /// A request header.
    Header,
    /// `left` bytes of a write's payload, to be written at `offset`.
    Payload { request: Request, offset: u64, left: usize },
    /// `left` bytes of a write that was refused, or failed on the way, with `error`.
    Skip { cookie: u64, left: usize, error: u32 },
    /// Nothing more: the client has said goodbye.
    Goodbye,
}

struct Session<'a> {
    stream: &'a Stream,
    node: &'a Arc<BlockNode>,
    writable: bool,
    block_size: u64,
    style: Style,
    base_allocation: Option<u32>,
    workers: &'a Workers,
    inbox: Inbox,
    outbox: Outbox,
    state: State,
    completions: Arc<Completions>,
    in_flight: usize,
    charged: usize,
    meter: Meter,
    /// What the batch that is being answered consists of.
    tally: Tally,
}

impl Session<'_> {
    fn run(&mut self) -> io::Result<()> {
        loop {
            if !self.receive()? {
                return Ok(());
            }
            let received = Instant::now();
            while self.step()? {}
            let sent = self.outbox.send(self.stream);
            self.meter.settle(&mut self.tally, received);
            sent?;
            if matches!(self.state, State::Goodbye) {
                return Ok(());
            }
        }
    }

    /// Handles the next thing in the inbox. False if more bytes are needed, or none will come.
    fn step(&mut self) -> io::Result<bool> {
        let there = self.inbox.bytes().len();
        match self.state {
            State::Goodbye => Ok(false),
            State::Header => {
                let Some(header) = self.inbox.bytes().first_chunk::<REQUEST_LEN>() else { return Ok(false) };
                let Some(request) = Request::parse(header) else {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "bad request magic"));
                };
                self.inbox.consume(REQUEST_LEN);
                self.request(request)?;
                Ok(true)
            }
            // A payload is written in one piece if the inbox can hold it, else in pieces as large as it holds.
            State::Payload { left, .. } if there < left.min(INBOX) => Ok(false),
            State::Payload { request, offset, left } => {
                self.payload(request, offset, left.min(there), left).map(|()| true)
            }
            State::Skip { left: 0, cookie, error } => {
                self.state = State::Header;
                self.push(&self.style.error(cookie, error))?;
                Ok(true)
            }
            State::Skip { .. } if there == 0 => Ok(false),
            State::Skip { cookie, left, error } => {
                let piece = left.min(there);
                self.inbox.consume(piece);
                self.state = State::Skip { cookie, left: left - piece, error };
                Ok(true)
            }
        }
    }

    /// Gets more bytes, or replies from the workers, or both. False at the end of the stream.
    fn receive(&mut self) -> io::Result<bool> {
        let wanted = match self.state {
            State::Payload { left, .. } => left.min(INBOX),
            _ => REQUEST_LEN,
        };
        if self.in_flight == 0 {
            return Ok(self.inbox.receive(self.stream, wanted, true)? > 0);
        }
        loop {
            let mut fds = [PollFd::new(self.stream, PollFlags::IN), PollFd::new(&*self.completions, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
            let [socket, finished] = fds.map(|fd| !fd.revents().is_empty());
            if finished {
                self.send_completions()?;
            }
            if socket {
                match self.inbox.receive(self.stream, wanted, false) {
                    Ok(came) => return Ok(came > 0),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    Err(e) => return Err(e),
                }
            }
            if self.in_flight == 0 {
                return Ok(self.inbox.receive(self.stream, wanted, true)? > 0);
            }
        }
    }

    /// Checks a request (proto.md, "Request types"; errors as QEMU gives them) and starts it.
    fn request(&mut self, request: Request) -> io::Result<()> {
        let Request { command, cookie, offset, len, .. } = request;
        if command == Command::Disconnect {
            self.state = State::Goodbye;
            return Ok(());
        }
        let refused = self.check(&request).err();
        if refused.is_some() {
            self.tally.note(kind(command), len.into(), true);
        }
        if command == Command::Write {
            self.state = match refused {
                Some(error) => State::Skip { cookie, left: len as usize, error },
                None => State::Payload { request, offset, left: len as usize },
            };
            return Ok(());
        }
        if let Some(error) = refused {
            return self.push(&self.style.error(cookie, error));
        }
        if len == 0 && command != Command::Flush {
            self.tally.note(kind(command), 0, false);
            return self.push(&self.style.done(cookie, command == Command::Read));
        }
        match command {
            Command::Read => self.read(cookie, offset, len),
            _ => self.submit(request, kind(command)),
        }
    }

    /// Whether the request may be tried at all; the error number if not.
    fn check(&self, request: &Request) -> Result<(), u32> {
        let Request { flags, command, offset, len, .. } = *request;
        let (allowed_flags, changes) = match command {
            Command::Read => (cmd_flag::DF, false),
            Command::Write | Command::Trim => (cmd_flag::FUA, true),
            Command::Flush | Command::Cache | Command::Disconnect => (0, false),
            Command::WriteZeroes => (cmd_flag::FUA | cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO, true),
            Command::BlockStatus => (cmd_flag::REQ_ONE, false),
            Command::Unknown(_) => return Err(proto::EINVAL),
        };
        // FUA means something only where it is listed, but a client may set it on anything (proto.md, "Command flags").
        let allowed_flags = allowed_flags | cmd_flag::FUA;
        if flags & !allowed_flags != 0 || (flags & cmd_flag::DF != 0 && self.style == Style::Simple) {
            return Err(proto::EINVAL);
        }
        if changes && !self.writable {
            return Err(proto::EPERM);
        }
        if command == Command::Flush {
            return Ok(());
        }
        if matches!(command, Command::Read | Command::Write | Command::Cache) && len > MAX_PAYLOAD {
            return Err(proto::EINVAL);
        }
        if command == Command::BlockStatus && (self.base_allocation.is_none() || len == 0) {
            return Err(proto::EINVAL);
        }
        if offset.checked_add(u64::from(len)).is_none_or(|end| end > self.node.len()) {
            return Err(if matches!(command, Command::Write | Command::WriteZeroes) {
                proto::ENOSPC
            } else {
                proto::EINVAL
            });
        }
        if offset % self.block_size != 0 || u64::from(len) % self.block_size != 0 {
            return Err(proto::EINVAL);
        }
        Ok(())
    }

    /// A read: into the send buffer if the data is there, by a worker if it is not.
    fn read(&mut self, cookie: u64, offset: u64, len: u32) -> io::Result<()> {
        let size = len as usize;
        if size <= Outbox::MOST - self.style.read_header_len() {
            match self.read_in_place(cookie, offset, len, Wait::Never) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
            if self.in_flight == 0 && self.inbox.bytes().is_empty() {
                // The only request there is: a hand-over would cost more than it could win.
                self.outbox.send(self.stream)?;
                return self.read_in_place(cookie, offset, len, Wait::Allowed);
            }
        }
        let (node, style) = (Arc::clone(self.node), self.style);
        let (meter, started) = (self.meter.clone(), Instant::now());
        self.hand_over(cookie, size, move |slot| {
            let (bytes, failed) = reply::read(style, &node, cookie, offset, len);
            meter.record(Kind::Read, len.into(), failed, started);
            slot.fill(bytes);
        })
    }

    /// `WouldBlock` only with [`Wait::Never`]; other errors of the node are answered.
    fn read_in_place(&mut self, cookie: u64, offset: u64, len: u32, wait: Wait) -> io::Result<()> {
        let header = self.style.read_header_len();
        let room = self.outbox.reserve(header + len as usize, self.stream)?;
        match self.node.read(&mut room[header..], offset, wait) {
            Ok(()) => {
                self.style.put_read_header(&mut room[..header], cookie, offset, len);
                self.tally.note(Kind::Read, len.into(), false);
                self.outbox.commit(header + len as usize, self.stream)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && wait == Wait::Never => Err(e),
            Err(e) => {
                self.tally.note(Kind::Read, len.into(), true);
                self.push(&self.style.error(cookie, proto::errno(&e)))
            }
        }
    }

    /// Writes `piece` bytes of a payload of which `left` bytes are missing.
    fn payload(&mut self, request: Request, offset: u64, piece: usize, left: usize) -> io::Result<()> {
        let written = self.node.write(&self.inbox.bytes()[..piece], offset, false);
        self.inbox.consume(piece);
        let (cookie, left) = (request.cookie, left - piece);
        if let Err(e) = written {
            self.tally.note(Kind::Write, request.len.into(), true);
            self.state = State::Skip { cookie, left, error: proto::errno(&e) };
            return Ok(());
        }
        if left > 0 {
            self.state = State::Payload { request, offset: offset + piece as u64, left };
            return Ok(());
        }
        self.state = State::Header;
        if request.flags & cmd_flag::FUA != 0 {
            // The same promise as a write with RWF_DSYNC, without keeping this thread.
            return self.submit(Request { command: Command::Flush, ..request }, Kind::Write);
        }
        self.tally.note(Kind::Write, request.len.into(), false);
        self.push(&self.style.done(cookie, false))
    }

    /// Gives a request that may take its time to the workers; it counts as one of `kind`.
    fn submit(&mut self, request: Request, kind: Kind) -> io::Result<()> {
        let Request { flags, command, cookie, offset, len } = request;
        let (node, style, context) = (Arc::clone(self.node), self.style, self.base_allocation);
        let durable = flags & cmd_flag::FUA != 0;
        let (meter, started) = (self.meter.clone(), Instant::now());
        self.hand_over(cookie, LEAST_CHARGE, move |slot| {
            let count = |failed| meter.record(kind, len.into(), failed, started);
            let result = match command {
                Command::BlockStatus => {
                    let one = flags & cmd_flag::REQ_ONE != 0;
                    // Without a context the request was refused.
                    let context = context.unwrap_or_default();
                    let (bytes, failed) = reply::block_status(&node, context, cookie, offset, len, one);
                    count(failed);
                    return slot.fill(bytes);
                }
                Command::Flush => node.flush(),
                Command::Trim => {
                    node.discard(offset, len.into()).and_then(|()| if durable { node.flush() } else { Ok(()) })
                }
                Command::WriteZeroes => {
                    let may_unmap = flags & cmd_flag::NO_HOLE == 0;
                    let fast_only = flags & cmd_flag::FAST_ZERO != 0;
                    node.write_zeroes(offset, len.into(), ZeroFlags { may_unmap, fast_only }, durable)
                }
                Command::Cache => cache(&node, offset, len),
                Command::Read | Command::Write | Command::Disconnect | Command::Unknown(_) => Err(Errno::INVAL.into()),
            };
            count(result.is_err());
            slot.fill(style.outcome(cookie, result));
        })
    }

    /// Runs `work` on a worker, within this connection's limits.
    fn hand_over(&mut self, cookie: u64, size: usize, work: impl FnOnce(Slot) + Send + 'static) -> io::Result<()> {
        let charge = size.max(LEAST_CHARGE);
        while self.in_flight >= MOST_IN_FLIGHT || (self.in_flight > 0 && self.charged + charge > MOST_CHARGED) {
            self.outbox.send(self.stream)?;
            self.wait_for_completions()?;
            self.send_completions()?;
        }
        self.in_flight += 1;
        self.charged += charge;
        let slot = self.completions.slot(charge, self.style.error(cookie, proto::errno(&Errno::IO.into())));
        self.workers.submit(Box::new(move || work(slot)));
        Ok(())
    }

    fn wait_for_completions(&self) -> io::Result<()> {
        match poll(&mut [PollFd::new(&*self.completions, PollFlags::IN)], None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn send_completions(&mut self) -> io::Result<()> {
        for bytes in self.collect() {
            self.push(&bytes)?;
        }
        self.outbox.send(self.stream)
    }

    /// Takes finished replies off the books.
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

    fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.outbox.push(bytes, self.stream)
    }
}

/// What a command counts as.
fn kind(command: Command) -> Kind {
    match command {
        Command::Read | Command::Cache | Command::Disconnect | Command::Unknown(_) => Kind::Read,
        Command::Write => Kind::Write,
        Command::WriteZeroes => Kind::Zeroes,
        Command::Trim => Kind::Discard,
        Command::Flush => Kind::Flush,
        Command::BlockStatus => Kind::Status,
    }
}

/// `NBD_CMD_CACHE`: reading is what brings a range into the host's cache, whatever the format.
fn cache(node: &BlockNode, offset: u64, len: u32) -> io::Result<()> {
    let mut sink = vec![0; (len as usize).min(256 << 10)];
    let end = offset + u64::from(len);
    let mut at = offset;
    while at < end {
        let piece = usize::try_from(end - at).unwrap_or(sink.len()).min(sink.len());
        node.read(&mut sink[..piece], at, Wait::Allowed)?;
        at += piece as u64;
    }
    Ok(())
}
