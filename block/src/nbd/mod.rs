// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver `nbd`: a disk on an NBD server, over a connected socket that was passed.
//!
//! [`handshake`] negotiates, a [`connection`] carries requests, [`wire`] has the numbers. When the connection ends, whoever
//! gave the socket is asked for another one ([`Host::socket`](crate::Host::socket)); until it comes, or until `reconnect-delay`
//! is over, requests wait, and then they fail with `ENOTCONN`. A request that was under way is sent again: all of them can be.

mod connection;
mod handshake;
pub mod list;
mod wire;

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use sys::file::Wait;

use crate::alarm::Alarm;
use crate::driver::{Ask, Detail, Driver, Info, InfoValue, Mapping, Prepared, Target, ZeroFlags};
use crate::drivers::{DriverEntry, OpenRequest, OptionKind, OptionSpec, OptionValue};
use crate::host::Descriptor;
use crate::{Error, Result};
use connection::{Answer, Connection, NoAnswer, Request};
use handshake::{Facts, Style};
use wire::{can, command, flag};

pub(crate) const ENTRY: DriverEntry = DriverEntry {
    name: "nbd",
    summary: "a disk on an NBD server, over a passed socket",
    children: &[],
    options: &[
        OptionSpec {
            name: "server",
            kind: OptionKind::Socket,
            summary: "the socket, connected to the server: `type` must be `fd`, and `str` the name that `getfd` gave it",
        },
        OptionSpec { name: "export", kind: OptionKind::Str, summary: "name of the export, default the empty one" },
        OptionSpec {
            name: "reconnect-delay",
            kind: OptionKind::Seconds,
            summary: "how long requests wait for another socket after the connection is lost, seconds; default 0",
        },
        OptionSpec {
            name: "open-timeout",
            kind: OptionKind::Seconds,
            summary: "how long the server may take to negotiate, seconds; the monitor waits for it; default 10",
        },
    ],
    takes_descriptor: false,
    writes: true,
    probe: |_| false,
    open,
};

/// How long a server may take to negotiate, unless the options say.
const OPEN_TIMEOUT: u64 = 10;
/// Longest range of a request whose length has 32 bits, bytes: a multiple of every block size.
const LONGEST: u64 = 1 << 31;

/// What the socket leads to, as long as it is there.
struct Remote {
    name: String,
    export: String,
    facts: Facts,
    delay: Duration,
    open_timeout: Duration,
    link: Mutex<Link>,
    changed: Condvar,
    alarm: Alarm,
}

enum Link {
    Up(Arc<Connection>),
    /// Since when.
    Down(Instant),
}

/// The driver; the thread of its connection knows the [`Remote`] only as long as this lives.
struct Nbd(Arc<Remote>);

fn open(request: OpenRequest) -> Result<Box<dyn Driver>> {
    let text = |name: &str| match request.options.get(name) {
        Some(OptionValue::Str(text)) => text.clone(),
        _ => String::new(),
    };
    let seconds = |name: &str| match request.options.get(name) {
        Some(OptionValue::Size(seconds)) => Some(*seconds),
        _ => None,
    };
    let export = text("export");
    if export.len() > 4096 {
        return Err(Error::invalid("export name too long to send to server"));
    }
    let open_timeout = Duration::from_secs(seconds("open-timeout").filter(|&secs| secs > 0).unwrap_or(OPEN_TIMEOUT));
    let socket = request.descriptor.ok_or_else(|| Error::invalid("Parameter 'server' is missing"))?;
    let facts = negotiate(&socket, &export, open_timeout)?;
    if request.writable && facts.flags & can::READ_ONLY != 0 {
        return Err(Error::invalid("request for write access denied: the server exports it read-only"));
    }
    let remote = Arc::new(Remote {
        name: request.node_name,
        export,
        facts,
        delay: Duration::from_secs(seconds("reconnect-delay").unwrap_or(0)),
        open_timeout,
        link: Mutex::new(Link::Down(Instant::now())),
        changed: Condvar::new(),
        alarm: request.alarm,
    });
    remote.connect(socket, facts)?;
    Ok(Box::new(Nbd(remote)))
}

/// What the server at the other end agrees to.
fn negotiate(socket: &Descriptor, export: &str, limit: Duration) -> Result<Facts> {
    // Only TCP knows it; requests leave whole.
    let _ = rustix::net::sockopt::set_tcp_nodelay(socket, true);
    let _ = rustix::net::sockopt::set_socket_keepalive(socket, true);
    handshake::negotiate(socket, export, limit)
        .map_err(|e| Error::invalid(format!("Failed to negotiate NBD on the passed socket: {e}")))
}

impl Remote {
    fn link(&self) -> MutexGuard<'_, Link> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connect(self: &Arc<Remote>, socket: Descriptor, facts: Facts) -> Result<()> {
        let remote: Weak<Remote> = Arc::downgrade(self);
        let ended = move |connection: &Connection| {
            if let Some(remote) = remote.upgrade() {
                remote.lose(connection);
            }
        };
        let connection = Connection::start(socket, facts, ended)
            .map_err(|e| Error::io("start the thread of an NBD connection", e))?;
        let before = std::mem::replace(&mut *self.link(), Link::Up(connection));
        self.changed.notify_all();
        if let Link::Up(before) = before {
            before.say_goodbye();
        }
        Ok(())
    }

    /// A connection has ended; the first to say so asks for another.
    fn lose(&self, connection: &Connection) {
        let mut link = self.link();
        if matches!(&*link, Link::Up(now) if std::ptr::eq(Arc::as_ptr(now), connection)) {
            *link = Link::Down(Instant::now());
            drop(link);
            self.alarm.connection_lost(&self.name);
        }
    }

    /// The connection, if need be after waiting for another socket.
    fn connection(&self) -> io::Result<Arc<Connection>> {
        let mut link = self.link();
        loop {
            match &*link {
                Link::Up(connection) => return Ok(Arc::clone(connection)),
                Link::Down(since) => {
                    let left = self.delay.saturating_sub(since.elapsed());
                    if left.is_zero() {
                        return Err(Errno::NOTCONN.into());
                    }
                    link = self.changed.wait_timeout(link, left).unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }

    fn call(&self, request: &Request<'_>) -> io::Result<Answer> {
        loop {
            let connection = self.connection()?;
            match connection.call(request) {
                Ok(answer) => return Ok(answer),
                Err(NoAnswer::Error(e)) => return Err(e),
                Err(NoAnswer::Lost) => self.lose(&connection),
            }
        }
    }

    /// A request over a range, in pieces as long as a header can say.
    fn ranged(&self, command: u16, flags: u16, offset: u64, len: u64) -> io::Result<()> {
        let most = if self.facts.style == Style::Extended { u64::MAX } else { LONGEST };
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(most);
            self.call(&Request { command, flags, offset: offset + done, len: piece, payload: &[] })?;
            done += piece;
        }
        Ok(())
    }

    fn read(&self, offset: u64, len: u64) -> io::Result<Vec<u8>> {
        Ok(self.call(&Request { command: command::READ, flags: 0, offset, len, payload: &[] })?.data)
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        // The thread that receives ends by itself; it must not ask for another socket.
        if let Link::Up(connection) = std::mem::replace(&mut *self.0.link(), Link::Down(Instant::now())) {
            connection.say_goodbye();
        }
    }
}

impl Driver for Nbd {
    fn len(&self) -> u64 {
        self.0.facts.size
    }

    fn map(&self, offset: u64, len: u64, ask: Ask) -> io::Result<Mapping<'_>> {
        const ZERO: u64 = 1 << 1;
        let Facts { allocation, style, min_block, .. } = self.0.facts;
        if ask.detail == Detail::Place || ask.wait == Wait::Never || allocation.is_none() {
            return Ok(Mapping::fixed(Target::Computed, len));
        }
        let block = u64::from(min_block);
        let (start, end) = (offset / block * block, (offset + len).next_multiple_of(block).min(self.len()));
        let most = if style == Style::Extended { u64::MAX } else { LONGEST };
        let asked = (end - start).min(most);
        let request =
            Request { command: command::BLOCK_STATUS, flags: flag::REQ_ONE, offset: start, len: asked, payload: &[] };
        let (run, flags) = self.0.call(&request)?.extent.ok_or(Errno::IO)?;
        // A server may say more than it was asked, but not nothing.
        let run = run.checked_sub(offset - start).filter(|&run| run > 0).ok_or(Errno::IO)?;
        let target = if flags & ZERO != 0 { Target::Zero } else { Target::Computed };
        Ok(Mapping::fixed(target, run.min(len)))
    }

    fn read_computed(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        let block = u64::from(self.0.facts.min_block);
        while !buf.is_empty() {
            let start = offset / block * block;
            let inside = offset - start;
            let wanted = (buf.len() as u64).min(self.0.facts.max_payload - inside);
            let len = (inside + wanted).next_multiple_of(block).min(self.len() - start);
            let data = self.0.read(start, len)?;
            let skip = usize::try_from(inside).unwrap_or(usize::MAX);
            let there = data.get(skip..).unwrap_or_default();
            let piece = there.len().min(buf.len());
            if piece == 0 {
                return Err(Errno::IO.into());
            }
            let (now, later) = buf.split_at_mut(piece);
            now.copy_from_slice(&there[..piece]);
            offset += piece as u64;
            buf = later;
        }
        Ok(())
    }

    fn prepare_write(&self, _: u64, len: u64) -> io::Result<Prepared<'_>> {
        Ok(Prepared::in_place(Target::Computed, len.min(self.0.facts.max_payload)))
    }

    fn write_computed(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let request = Request { command: command::WRITE, flags: 0, offset, len: buf.len() as u64, payload: buf };
        self.0.call(&request).map(drop)
    }

    fn zero_unit(&self) -> u64 {
        self.0.facts.min_block.into()
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        let can = self.0.facts.flags;
        if can & can::WRITE_ZEROES == 0 || flags.fast_only && can & can::FAST_ZERO == 0 {
            return Err(Errno::OPNOTSUPP.into());
        }
        let fast = if flags.fast_only { flag::FAST_ZERO } else { 0 };
        let hole = if flags.may_unmap { 0 } else { flag::NO_HOLE };
        self.0.ranged(command::WRITE_ZEROES, fast | hole, offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.0.facts.flags & can::TRIM == 0 { Ok(()) } else { self.0.ranged(command::TRIM, 0, offset, len) }
    }

    fn flush(&self) -> io::Result<()> {
        if self.0.facts.flags & can::FLUSH == 0 {
            return Ok(());
        }
        self.0.call(&Request { command: command::FLUSH, flags: 0, offset: 0, len: 0, payload: &[] }).map(drop)
    }

    fn reopen(&self, writable: bool) -> Result<()> {
        if writable && self.0.facts.flags & can::READ_ONLY != 0 {
            return Err(Error::invalid("request for write access denied: the server exports it read-only"));
        }
        Ok(())
    }

    fn reconnect(&self, socket: Descriptor) -> Result<()> {
        let facts = negotiate(&socket, &self.0.export, self.0.open_timeout)?;
        let before = self.0.facts;
        // Requests are made by what was agreed at first, so it must be agreed again.
        if facts != before {
            return Err(Error::invalid(format!(
                "the server behind the new socket is not as the first one was: {} bytes and {facts:?}, not {} bytes and \
                 {before:?}",
                facts.size, before.size
            )));
        }
        self.0.connect(socket, facts)
    }

    fn block_size(&self) -> u32 {
        self.0.facts.min_block
    }

    fn info(&self) -> Info {
        let style = match self.0.facts.style {
            Style::Simple => "simple",
            Style::Structured => "structured",
            Style::Extended => "extended",
        };
        let connected = matches!(&*self.0.link(), Link::Up(_));
        let specifics = vec![("replies", InfoValue::Str(style.into())), ("connected", InfoValue::Bool(connected))];
        Info { specifics, ..Info::default() }
    }
}
