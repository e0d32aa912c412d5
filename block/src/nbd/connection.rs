// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A negotiated connection: requests from any thread, and one thread that hands out the replies.
//!
//! The server is foreign: a reply must be to a request that is under way and fit into it, or the connection ends.

use std::collections::HashMap;
use std::io;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};

use super::handshake::{Facts, Style};
use super::wire::{self, broken, chunk, command, field, flag};
use crate::host::Descriptor;

/// Longest chunk that is neither data nor block status, bytes.
const MAX_SMALL: u64 = 8 << 10;
/// Longest block status chunk, bytes.
const MAX_STATUS: u64 = 16 << 20;
/// Stack of the thread that receives.
const STACK: usize = 128 << 10;

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    pub command: u16,
    pub flags: u16,
    pub offset: u64,
    pub len: u64,
    pub payload: &'a [u8],
}

/// What came back.
#[derive(Debug, Default)]
pub struct Answer {
    /// All bytes of a read.
    pub data: Vec<u8>,
    /// Length and flags of the first extent of a block status.
    pub extent: Option<(u64, u64)>,
}

/// Why there is no answer.
#[derive(Debug)]
pub enum NoAnswer {
    /// The server says so.
    Error(io::Error),
    /// The connection has ended before it came.
    Lost,
}

pub struct Connection {
    socket: Descriptor,
    facts: Facts,
    sending: Mutex<()>,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    ended: bool,
    next: u64,
    requests: HashMap<u64, Pending>,
}

/// A request whose reply has not come, or not all of it.
struct Pending {
    command: u16,
    offset: u64,
    answer: Answer,
    /// Bytes of a read that have come.
    filled: u64,
    error: Option<u32>,
    done: SyncSender<Result<Answer, io::Error>>,
}

impl Connection {
    /// Starts receiving. `ended` is called once, from the thread that receives, when the connection has ended.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(
        socket: Descriptor,
        facts: Facts,
        ended: impl FnOnce(&Connection) + Send + 'static,
    ) -> io::Result<Arc<Connection>> {
        let connection = Arc::new(Connection { socket, facts, sending: Mutex::default(), waiting: Mutex::default() });
        let receiving = Arc::clone(&connection);
        thread::Builder::new().name("nbd-client".into()).stack_size(STACK).spawn(move || {
            if let Err(e) = receiving.receive() {
                tracing::info!("NBD connection: {e}");
            }
            receiving.close();
            ended(&receiving);
        })?;
        Ok(connection)
    }

    /// One request and its answer.
    pub fn call(&self, request: &Request<'_>) -> Result<Answer, NoAnswer> {
        let (done, answer) = sync_channel(1);
        let len = if request.command == command::READ { request.len } else { 0 };
        // At most the largest payload.
        let data = vec![0; usize::try_from(len).unwrap_or(0)];
        let answer_so_far = Answer { data, extent: None };
        let Request { command, offset, .. } = *request;
        let pending = Pending { command, offset, answer: answer_so_far, filled: 0, error: None, done };
        let cookie = {
            let mut waiting = self.waiting();
            if waiting.ended {
                return Err(NoAnswer::Lost);
            }
            let cookie = waiting.next;
            waiting.next += 1;
            waiting.requests.insert(cookie, pending);
            cookie
        };
        if self.send(request, cookie).is_err() {
            self.close();
        }
        match answer.recv() {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(e)) => Err(NoAnswer::Error(e)),
            Err(_) => Err(NoAnswer::Lost),
        }
    }

    /// Ends the connection: everybody who waits learns that it is lost.
    pub fn close(&self) {
        {
            let mut waiting = self.waiting();
            waiting.ended = true;
            waiting.requests.clear();
        }
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }

    /// Ends it with NBD's goodbye, if that can be said at once.
    pub fn say_goodbye(&self) {
        if let Ok(_sending) = self.sending.try_lock() {
            let goodbye = Request { command: command::DISCONNECT, flags: 0, offset: 0, len: 0, payload: &[] };
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            let _ = rustix::net::send(&self.socket, &self.header(&goodbye, 0), flags);
        }
        self.close();
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn header(&self, request: &Request<'_>, cookie: u64) -> Vec<u8> {
        let Request { command, mut flags, offset, len, .. } = *request;
        let extended = self.facts.style == Style::Extended;
        if extended && command == command::WRITE {
            flags |= flag::PAYLOAD_LEN;
        }
        let magic = if extended { wire::EXTENDED_REQUEST_MAGIC } else { wire::REQUEST_MAGIC };
        let mut header = Vec::with_capacity(32);
        header.extend(magic.to_be_bytes());
        header.extend(flags.to_be_bytes());
        header.extend(command.to_be_bytes());
        header.extend(cookie.to_be_bytes());
        header.extend(offset.to_be_bytes());
        if extended {
            header.extend(len.to_be_bytes());
        } else {
            // The driver cuts requests to what 32 bits can say.
            header.extend(u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
        }
        header
    }

    fn send(&self, request: &Request<'_>, cookie: u64) -> io::Result<()> {
        let _sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        for mut bytes in [&self.header(request, cookie)[..], request.payload] {
            while !bytes.is_empty() {
                match rustix::net::send(&self.socket, bytes, SendFlags::NOSIGNAL) {
                    Ok(count) => bytes = &bytes[count..],
                    Err(Errno::INTR) => {}
                    Err(e) => return Err(e.into()),
                }
            }
        }
        Ok(())
    }

    /// Takes replies until the connection ends.
    fn receive(&self) -> io::Result<()> {
        loop {
            let mut head = [0; 32];
            if !self.read_or_end(&mut head[..16])? {
                return Ok(());
            }
            let cookie = u64::from_be_bytes(field(&head, 8));
            match u32::from_be_bytes(field(&head, 0)) {
                wire::SIMPLE_REPLY_MAGIC if self.facts.style != Style::Extended => {
                    self.simple(cookie, u32::from_be_bytes(field(&head, 4)))?;
                }
                wire::STRUCTURED_REPLY_MAGIC if self.facts.style == Style::Structured => {
                    self.read(&mut head[16..20])?;
                    self.chunk(&head, cookie, u32::from_be_bytes(field(&head, 16)).into())?;
                }
                wire::EXTENDED_REPLY_MAGIC if self.facts.style == Style::Extended => {
                    self.read(&mut head[16..32])?;
                    self.chunk(&head, cookie, u64::from_be_bytes(field(&head, 24)))?;
                }
                _ => return Err(broken("the server's reply has a wrong magic")),
            }
        }
    }

    /// The request that is answered; only this thread takes requests out while the connection lives.
    fn take(&self, cookie: u64) -> io::Result<Pending> {
        self.waiting().requests.remove(&cookie).ok_or_else(|| broken("the server answers what was not asked"))
    }

    fn simple(&self, cookie: u64, error: u32) -> io::Result<()> {
        let mut pending = self.take(cookie)?;
        if pending.command == command::READ && error == 0 {
            if self.facts.style != Style::Simple {
                return Err(broken("the server answers a read with a simple reply"));
            }
            self.read(&mut pending.answer.data)?;
            pending.filled = pending.answer.data.len() as u64;
        }
        pending.error = (error != 0).then_some(error);
        pending.finish();
        Ok(())
    }

    /// A chunk with a payload of `len` bytes, which has not been received.
    fn chunk(&self, head: &[u8; 32], cookie: u64, len: u64) -> io::Result<()> {
        let (flags, kind) = (u16::from_be_bytes(field(head, 4)), u16::from_be_bytes(field(head, 6)));
        let mut pending = self.take(cookie)?;
        match kind {
            chunk::NONE if len == 0 => {}
            chunk::OFFSET_DATA if len > 8 => {
                let mut offset = [0; 8];
                self.read(&mut offset)?;
                let piece = pending.piece(u64::from_be_bytes(offset), len - 8)?;
                self.read(piece)?;
                pending.filled += len - 8;
            }
            chunk::OFFSET_HOLE if len == 12 => {
                let mut hole = [0; 12];
                self.read(&mut hole)?;
                let len = u32::from_be_bytes(field(&hole, 8)).into();
                pending.piece(u64::from_be_bytes(field(&hole, 0)), len)?.fill(0);
                pending.filled += len;
            }
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT if (12..=MAX_STATUS).contains(&len) => {
                self.status(&mut pending, kind == chunk::BLOCK_STATUS_EXT, len)?;
            }
            error if error & chunk::ERROR_BIT != 0 && (6..=MAX_SMALL).contains(&len) => {
                let mut payload = vec![0; usize::try_from(len).unwrap_or(0)];
                self.read(&mut payload)?;
                // An error that is none is one all the same.
                pending.error.get_or_insert(u32::from_be_bytes(field(&payload, 0)).max(1));
            }
            _ => return Err(broken("the server's reply chunk is malformed")),
        }
        if flags & chunk::DONE != 0 {
            pending.finish();
        } else {
            let mut waiting = self.waiting();
            if !waiting.ended {
                waiting.requests.insert(cookie, pending);
            }
        }
        Ok(())
    }

    fn status(&self, pending: &mut Pending, wide: bool, len: u64) -> io::Result<()> {
        let mut payload = [0; 24];
        // The context's id, the number of extents if they are wide, and the first extent.
        let first = if wide { 24 } else { 12 };
        if len < first as u64 || pending.command != command::BLOCK_STATUS {
            return Err(broken("the server's block status is malformed"));
        }
        self.read(&mut payload[..first])?;
        self.skip(len - first as u64)?;
        if Some(u32::from_be_bytes(field(&payload, 0))) == self.facts.allocation {
            pending.answer.extent = Some(if wide {
                (u64::from_be_bytes(field(&payload, 8)), u64::from_be_bytes(field(&payload, 16)))
            } else {
                (u32::from_be_bytes(field(&payload, 4)).into(), u32::from_be_bytes(field(&payload, 8)).into())
            });
        }
        Ok(())
    }

    fn skip(&self, mut len: u64) -> io::Result<()> {
        let mut sink = [0; 4096];
        while len > 0 {
            let piece = usize::try_from(len).unwrap_or(sink.len()).min(sink.len());
            self.read(&mut sink[..piece])?;
            len -= piece as u64;
        }
        Ok(())
    }

    fn read(&self, buf: &mut [u8]) -> io::Result<()> {
        if self.read_or_end(buf)? { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// Fills `buf`; false if the stream ended before its first byte.
    fn read_or_end(&self, buf: &mut [u8]) -> io::Result<bool> {
        let mut done = 0;
        while done < buf.len() {
            match rustix::net::recv(&self.socket, &mut buf[done..], RecvFlags::empty()) {
                Ok((0, _)) if done == 0 => return Ok(false),
                Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((count, _)) => done += count,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(true)
    }
}

impl Pending {
    /// Where `len` bytes from `offset` of the disk belong in the read that was asked.
    fn piece(&mut self, offset: u64, len: u64) -> io::Result<&mut [u8]> {
        let outside = || broken("the server's data lies outside of what was asked");
        let start = offset.checked_sub(self.offset).ok_or_else(outside)?;
        let range = usize::try_from(start).ok().zip(usize::try_from(len).ok());
        let (start, len) = range.ok_or_else(outside)?;
        let end = start.checked_add(len).ok_or_else(outside)?;
        self.answer.data.get_mut(start..end).ok_or_else(outside)
    }

    /// Hands the answer to whoever waits.
    fn finish(self) {
        let Pending { answer, filled, error, done, .. } = self;
        let whole = filled >= answer.data.len() as u64;
        let _ = done.send(match error {
            Some(number) => Err(wire::error(number)),
            // Success without all of the data is none.
            None if !whole => Err(Errno::IO.into()),
            None => Ok(answer),
        });
    }
}
