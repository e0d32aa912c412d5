// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The transmission phase: one thread, one loop, batches.
//!
//! Every request in the receive buffer is parsed; what can be answered without sleeping is answered into the send buffer at
//! once, the rest goes to the workers and comes back through [`Completions`] in any order; one write answers the batch, or
//! each 64 KiB of work in it. A hit in the page cache thus meets no other thread and no lock. Writes to the page cache are done
//! in place too: they may sleep in the kernel, but only this client waits. Those past it (`O_DIRECT`) always sleep, and go to the
//! workers.
//!
//! Memory is bounded by two buffers and [`MOST_CHARGED`] bytes of replies in flight.
//!
//! Fair to others: a connection has a thread of its own, so the kernel shares out the processor, and at most [`MOST_IN_FLIGHT`]
//! requests at the workers, who take what comes first. When the client is gone, what has not begun is left out.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use block::stats::{Kind, Tally};
use block::{BlockNode, Root, Wait, ZeroFlags};
use rustix::io::Errno;

use super::buffers::{INBOX, Inbox, Outbox, Spares};
use super::channel::Channel;
use super::completions::Completions;
use super::context::Chosen;
use super::handshake::Agreed;
use super::moving::Moving;
use super::proto::{self, Command, MAX_PAYLOAD, Request, cmd_flag};
use super::reads::Reads;
use super::reply::{self, Style, To};
use super::status;
use super::way::Way;
use crate::attention::Attention;
use crate::meter::Meter;
use crate::running::Running as _;
use crate::workers::Workers;

mod receiving;
mod under_way;

/// A request that is worth looking out for the next one after it, bytes at most.
const SMALL: u64 = 32 << 10;
/// Most requests at the workers at once, for one connection.
const MOST_IN_FLIGHT: usize = 16;
/// Most bytes of replies that workers may be making for one connection; a single larger read passes alone.
const MOST_CHARGED: usize = 64 << 20;
/// Longest payload of a block status request, bytes.
const MOST_QUERY: u64 = 8 + 4 * 1024;
/// What every request at the workers counts at least, bytes.
const LEAST_CHARGE: usize = 256;

/// How a connection's transmission ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// The client has left.
    Over,
    /// It is to be served by another process: nothing is under way, and these bytes of the next request have come.
    Moved(Vec<u8>),
}

/// Serves requests, of which `received` has come already, until the client disconnects or is to move; then waits for what is in
/// flight. Buffers come from `spares`, and go back.
///
/// # Errors
/// A client that breaks the protocol or vanishes.
pub fn serve(
    channel: &mut Channel,
    agreed: &Agreed,
    meter: Meter,
    workers: &Workers,
    moving: &Moving,
    spares: &Spares,
    received: &[u8],
) -> io::Result<End> {
    let mut session = Session {
        way: Way {
            channel,
            reads: Reads::new(agreed.export.root(), workers.rings().clone(), agreed.style.read_header_len()),
        },
        root: agreed.export.root(),
        writable: agreed.export.writable(),
        writethrough: agreed.export.writethrough(),
        block_size: u64::from(agreed.export.block_size()),
        style: agreed.style,
        contexts: &agreed.contexts,
        workers,
        moving,
        moved: false,
        inbox: Inbox::with(received, spares),
        outbox: Outbox::new(spares),
        state: State::Header,
        completions: Completions::new()?,
        in_flight: 0,
        charged: 0,
        meter,
        tally: Tally::default(),
        asked: 0,
        attention: Attention::default(),
    };
    let served = session.run();
    // The export is in use until its last request has ended, whoever is there to hear of it.
    session.abandon()?;
    served?;
    // What is encrypted cannot be read by another process: the client has to come again.
    let moved = session.moved && !session.way.channel.is_encrypted();
    Ok(if moved { End::Moved(session.inbox.bytes().to_vec()) } else { End::Over })
}

/// What the next bytes in the inbox are.
#[derive(Clone, Copy, Debug)]
enum State {
    /// A request header.
    Header,
    /// `left` bytes of a write's payload, to be written at `offset`.
    Payload { request: Request, offset: u64, left: usize },
    /// The `left` bytes of a block status request that names the contexts it wants.
    Query { request: Request, left: usize },
    /// `left` bytes of a payload that was refused, or failed on the way, with `error`.
    Skip { to: To, left: usize, error: u32 },
    /// Nothing more: the client has said goodbye.
    Goodbye,
}

struct Session<'a> {
    way: Way<'a>,
    root: &'a Arc<Root>,
    writable: bool,
    writethrough: bool,
    block_size: u64,
    style: Style,
    contexts: &'a Arc<[Chosen]>,
    workers: &'a Workers,
    moving: &'a Moving,
    /// Stopped at a request's boundary because clients are to move.
    moved: bool,
    inbox: Inbox,
    outbox: Outbox,
    state: State,
    completions: Arc<Completions>,
    /// Requests at the workers.
    in_flight: usize,
    charged: usize,
    meter: Meter,
    /// What the batch that is being answered consists of.
    tally: Tally,
    /// Requests of the batch that is being answered; a large one counts as more than one.
    asked: usize,
    /// How quickly this client asks again.
    attention: Attention,
}

impl Session<'_> {
    fn run(&mut self) -> io::Result<()> {
        while !matches!(self.state, State::Goodbye) && self.receive()? {
            let received = Instant::now();
            self.attention.asked(received);
            // Reads under way since the last batch may be waited for.
            self.way.reads.give_way()?;
            while self.step()? {}
            self.way.reads.submit()?;
            let sent = self.outbox.send(&mut self.way);
            self.meter.settle(&mut self.tally, received);
            sent?;
            // A client that waits for each answer asks at once again; one that does not leaves more time between its batches than
            // it takes to wake up.
            if std::mem::take(&mut self.asked) == 1 {
                self.attention.answered(Instant::now());
            }
        }
        let left = matches!(self.state, State::Goodbye) || self.moved;
        if !left && self.way.channel.stream().is_deserted() {
            return Ok(());
        }
        // What was asked before the goodbye is answered (proto.md, "`NBD_CMD_DISC`"), if there is still somebody to hear it.
        while self.is_busy() {
            self.wait_for_completions()?;
            self.send_completions()?;
        }
        Ok(())
    }

    /// Handles the next thing in the inbox. False if more bytes are needed, or none will come.
    fn step(&mut self) -> io::Result<bool> {
        let there = self.inbox.bytes().len();
        match self.state {
            State::Goodbye => Ok(false),
            State::Header => {
                let (parsed, len) = match self.style {
                    Style::Simple | Style::Structured => {
                        let Some(header) = self.inbox.bytes().first_chunk() else { return Ok(false) };
                        (Request::parse(header), header.len())
                    }
                    Style::Extended => {
                        let Some(header) = self.inbox.bytes().first_chunk() else { return Ok(false) };
                        (Request::parse_extended(header), header.len())
                    }
                };
                let request = parsed.ok_or_else(|| broken("bad request magic"))?;
                self.inbox.consume(len);
                self.request(request)?;
                Ok(true)
            }
            State::Query { left, .. } if there < left => Ok(false),
            State::Query { request, left } => {
                let (chosen, len) = self.query(left);
                self.inbox.consume(left);
                self.state = State::Header;
                self.block_status(request, chosen, len).map(|()| true)
            }
            // A payload is written in one piece if the inbox can hold it, else in pieces as large as it holds.
            State::Payload { left, .. } if there < left.min(INBOX) => Ok(false),
            State::Payload { request, offset, left } => {
                self.payload(request, offset, left.min(there), left).map(|()| true)
            }
            State::Skip { left: 0, to, error } => {
                self.state = State::Header;
                self.push(&self.style.error(to, error))?;
                Ok(true)
            }
            State::Skip { .. } if there == 0 => Ok(false),
            State::Skip { to, left, error } => {
                let piece = left.min(there);
                self.inbox.consume(piece);
                self.state = State::Skip { to, left: left - piece, error };
                Ok(true)
            }
        }
    }

    /// Checks a request (proto.md, "Request types"; errors as QEMU gives them) and starts it.
    fn request(&mut self, mut request: Request) -> io::Result<()> {
        let Request { flags, command, len, .. } = request;
        // A large one takes longer than to wake up.
        self.asked += if len <= SMALL { 1 } else { 2 };
        if command == Command::Disconnect {
            self.state = State::Goodbye;
            return Ok(());
        }
        if self.writethrough && matches!(command, Command::Write | Command::Trim | Command::WriteZeroes) {
            request.flags |= cmd_flag::FUA;
        }
        let (to, refused) = (to(&request), self.check(&request).err());
        if refused.is_some() {
            self.tally.note(kind(command), len, true);
        }
        let brings_payload = self.style == Style::Extended && flags & cmd_flag::PAYLOAD_LEN != 0;
        if command == Command::Write || brings_payload {
            // Longer than any request of 32 bits: not worth waiting for the end of it.
            let left = u32::try_from(len).map_err(|_| broken("payload too long"))? as usize;
            self.state = match (refused, command) {
                (Some(error), _) => State::Skip { to, left, error },
                (None, Command::Write) => State::Payload { request, offset: request.offset, left },
                (None, _) => State::Query { request, left },
            };
            return Ok(());
        }
        if let Some(error) = refused {
            return self.push(&self.style.error(to, error));
        }
        if len == 0 && command != Command::Flush {
            self.tally.note(kind(command), 0, false);
            return self.push(&self.style.done(to, command == Command::Read));
        }
        match command {
            Command::Read => self.read(to, u32::try_from(len).unwrap_or(MAX_PAYLOAD)),
            Command::BlockStatus => self.block_status(request, Some(Arc::clone(self.contexts)), len),
            _ => self.submit(request, kind(command)),
        }
    }

    /// Whether the request may be tried at all; the error number if not.
    fn check(&self, request: &Request) -> Result<(), u32> {
        let Request { flags, command, len, .. } = *request;
        let extended = self.style == Style::Extended;
        let payload = if extended { cmd_flag::PAYLOAD_LEN } else { 0 };
        let (allowed_flags, changes) = match command {
            Command::Read => (cmd_flag::DF, false),
            Command::Write => (payload, true),
            Command::Trim => (0, true),
            Command::Flush | Command::Cache | Command::Disconnect => (0, false),
            Command::WriteZeroes => (cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO, true),
            Command::BlockStatus => (cmd_flag::REQ_ONE | payload, false),
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
        if matches!(command, Command::Read | Command::Write | Command::Cache) && len > u64::from(MAX_PAYLOAD) {
            return Err(proto::EINVAL);
        }
        if command == Command::BlockStatus {
            if self.contexts.is_empty() || len == 0 {
                return Err(proto::EINVAL);
            }
            if flags & cmd_flag::PAYLOAD_LEN != 0 {
                // The range is known when the payload has come.
                return if len <= MOST_QUERY { Ok(()) } else { Err(proto::EINVAL) };
            }
        }
        self.check_range(command, request.offset, len)
    }

    fn check_range(&self, command: Command, offset: u64, len: u64) -> Result<(), u32> {
        if offset.checked_add(len).is_none_or(|end| end > self.root.look().len()) {
            return Err(if matches!(command, Command::Write | Command::WriteZeroes) {
                proto::ENOSPC
            } else {
                proto::EINVAL
            });
        }
        if !offset.is_multiple_of(self.block_size) || !len.is_multiple_of(self.block_size) {
            return Err(proto::EINVAL);
        }
        Ok(())
    }

    /// The contexts and the length that a payload of `left` bytes asks for (proto.md, "`NBD_CMD_BLOCK_STATUS`" with extended
    /// headers); no contexts if it is malformed, or asks for what was not negotiated.
    fn query(&self, left: usize) -> (Option<Arc<[Chosen]>>, u64) {
        let Some((len, ids)) = self.inbox.bytes()[..left].split_first_chunk::<8>() else { return (None, 0) };
        let (ids, odd) = ids.as_chunks::<4>();
        let known = |id: u32| self.contexts.iter().any(|chosen| chosen.id == id);
        let ids: BTreeSet<u32> = ids.iter().map(|id| u32::from_be_bytes(*id)).collect();
        if ids.is_empty() || !odd.is_empty() || !ids.iter().all(|&id| known(id)) {
            return (None, 0);
        }
        let wanted = self.contexts.iter().filter(|chosen| ids.contains(&chosen.id)).cloned().collect();
        (Some(wanted), u64::from_be_bytes(*len))
    }

    /// Tells about `len` bytes. Without contexts the request was malformed.
    fn block_status(&mut self, request: Request, contexts: Option<Arc<[Chosen]>>, len: u64) -> io::Result<()> {
        let (style, to) = (self.style, to(&request));
        let checked = match contexts {
            Some(contexts) if len > 0 => self.check_range(Command::BlockStatus, to.offset, len).map(|()| contexts),
            _ => Err(proto::EINVAL),
        };
        let contexts = match checked {
            Ok(contexts) => contexts,
            Err(error) => {
                self.tally.note(Kind::Status, len, true);
                return self.push(&style.error(to, error));
            }
        };
        let one = request.flags & cmd_flag::REQ_ONE != 0;
        let (root, meter, started) = (Arc::clone(self.root), self.meter.clone(), Instant::now());
        self.hand_over_look(to, LEAST_CHARGE, move || {
            let (bytes, failed) = status::reply(style, &root.enter(), &contexts, to, len, one);
            meter.record(Kind::Status, len, failed, started);
            bytes
        })
    }

    /// A read: into the send buffer if the data is there, by a worker if it is not.
    fn read(&mut self, to: To, len: u32) -> io::Result<()> {
        let size = len as usize;
        if size <= Outbox::MOST - self.style.read_header_len() {
            match self.read_in_place(to, len, Wait::Never) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
            if !self.is_busy() && self.inbox.bytes().is_empty() {
                // The only request there is: a hand-over would cost more than it could win.
                self.outbox.send(&mut self.way)?;
                return self.read_in_place(to, len, Wait::Allowed);
            }
        }
        if self.has_room_for(size) && self.way.reads.start(to, len) {
            self.charged += size;
            return Ok(());
        }
        let (root, style) = (Arc::clone(self.root), self.style);
        let (meter, started) = (self.meter.clone(), Instant::now());
        self.hand_over_look(to, size, move || {
            let (bytes, failed) = reply::read(style, &root.enter(), to, len);
            meter.record(Kind::Read, len.into(), failed, started);
            bytes
        })
    }

    /// `WouldBlock` only with [`Wait::Never`]; other errors of the node are answered.
    fn read_in_place(&mut self, to: To, len: u32, wait: Wait) -> io::Result<()> {
        let header = self.style.read_header_len();
        let room = self.outbox.reserve(header + len as usize, &mut self.way)?;
        // Whoever drains the root must not wait for this client to take its answers.
        let read = self.way.reads.within(|node| node.read(&mut room[header..], to.offset, wait));
        match read {
            Ok(()) => {
                self.style.put_read_header(&mut room[..header], to, len);
                self.tally.note(Kind::Read, len.into(), false);
                self.outbox.commit(header + len as usize, &mut self.way)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && wait == Wait::Never => Err(e),
            Err(e) => {
                self.tally.note(Kind::Read, len.into(), true);
                self.push(&self.style.error(to, proto::errno(&e)))
            }
        }
    }

    /// Writes `piece` bytes of a payload of which `left` bytes are missing.
    fn payload(&mut self, request: Request, offset: u64, piece: usize, left: usize) -> io::Result<()> {
        let only_one = !self.is_busy() && self.inbox.bytes().len() == piece;
        if piece == left && offset == request.offset && !only_one && self.root.look().bypasses_cache() {
            // Each waits for the device: they should do so together.
            return self.hand_over_write(request, piece);
        }
        let written = self.way.reads.within(|node| node.write(&self.inbox.bytes()[..piece], offset, false));
        self.inbox.consume(piece);
        self.outbox.note_written(piece);
        let left = left - piece;
        if let Err(e) = written {
            self.tally.note(Kind::Write, request.len, true);
            self.state = State::Skip { to: to(&request), left, error: proto::errno(&e) };
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
        self.tally.note(Kind::Write, request.len, false);
        self.push(&self.style.done(to(&request), false))
    }

    /// Gives a write whose payload is all there to the workers.
    fn hand_over_write(&mut self, request: Request, size: usize) -> io::Result<()> {
        let payload = self.inbox.bytes()[..size].to_vec();
        self.inbox.consume(size);
        self.state = State::Header;
        let (root, style, to) = (Arc::clone(self.root), self.style, to(&request));
        let (meter, started) = (self.meter.clone(), Instant::now());
        self.hand_over(to, size, move || {
            let result = root.enter().write(&payload, request.offset, request.flags & cmd_flag::FUA != 0);
            meter.record(Kind::Write, request.len, result.is_err(), started);
            style.outcome(to, result)
        })
    }

    /// Gives a request that may take its time to the workers; it counts as one of `kind`.
    fn submit(&mut self, request: Request, kind: Kind) -> io::Result<()> {
        let Request { flags, command, offset, len, .. } = request;
        let (root, style, to) = (Arc::clone(self.root), self.style, to(&request));
        let durable = flags & cmd_flag::FUA != 0;
        let (meter, started) = (self.meter.clone(), Instant::now());
        self.hand_over(to, LEAST_CHARGE, move || {
            let node = root.enter();
            let result = match command {
                Command::Flush => node.flush(),
                Command::Trim => node.discard(offset, len).and_then(|()| if durable { node.flush() } else { Ok(()) }),
                Command::WriteZeroes => {
                    let may_unmap = flags & cmd_flag::NO_HOLE == 0;
                    let fast_only = flags & cmd_flag::FAST_ZERO != 0;
                    node.write_zeroes(offset, len, ZeroFlags { may_unmap, fast_only }, durable)
                }
                Command::Cache => cache(&node, offset, len),
                _ => Err(Errno::INVAL.into()),
            };
            drop(node);
            meter.record(kind, len, result.is_err(), started);
            style.outcome(to, result)
        })
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

fn to(request: &Request) -> To {
    To { cookie: request.cookie, offset: request.offset }
}

fn broken(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// `NBD_CMD_CACHE`: reading is what brings a range into the host's cache, whatever the format.
fn cache(node: &BlockNode, offset: u64, len: u64) -> io::Result<()> {
    let mut sink = vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(256 << 10)];
    let end = offset + len;
    let mut at = offset;
    while at < end {
        let piece = usize::try_from(end - at).unwrap_or(sink.len()).min(sink.len());
        node.read(&mut sink[..piece], at, Wait::Allowed)?;
        at += piece as u64;
    }
    Ok(())
}
