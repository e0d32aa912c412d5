// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The negotiation from the client's side: the newest way of talking that the server has, and facts about the export.

use std::io;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::wire::{self, MAX_PAYLOAD, broken, field};
use crate::host::Descriptor;

const EXPORT_NAME: u32 = 1;
const GO: u32 = 7;
const STRUCTURED_REPLY: u32 = 8;
const SET_META_CONTEXT: u32 = 10;
const EXTENDED_HEADERS: u32 = 11;

const ACK: u32 = 1;
/// A reply with information about an export, or about a meta context.
pub const INFO: u32 = 3;
pub const META_CONTEXT: u32 = 4;
const ERROR_BIT: u32 = 1 << 31;

/// Longest option reply that is looked at, bytes.
const MAX_REPLY: u32 = 64 << 10;
/// Most replies to one option: a server may have many exports.
const MAX_REPLIES: usize = 1024;

/// What was agreed with a server, and what it says about the export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
    /// How replies come.
    pub style: Style,
    /// Id of `base:allocation`, if it can be asked for.
    pub allocation: Option<u32>,
    /// Smallest request in bytes, a power of two.
    pub min_block: u32,
    /// Most bytes of one read or write.
    pub max_payload: u64,
}

/// How requests and replies look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Simple replies.
    Simple,
    /// Structured replies.
    Structured,
    /// Both with 64-bit headers.
    Extended,
}

/// Negotiates the export called `name` on a fresh connection within `limit`.
///
/// # Errors
/// The server hangs up, breaks the protocol, is too slow (`TimedOut`), or has no such export; a sentence says which.
pub fn negotiate(socket: &Descriptor, name: &str, limit: Duration) -> io::Result<Facts> {
    Talk::within(socket, limit).negotiate(name)
}

/// Kinds and payloads of the replies to one option.
type Replies = Vec<(u32, Vec<u8>)>;

/// A negotiation under way.
pub struct Talk<'a> {
    socket: &'a Descriptor,
    end: Instant,
}

impl<'a> Talk<'a> {
    /// One on a fresh connection, which must be over within `limit`.
    pub fn within(socket: &'a Descriptor, limit: Duration) -> Talk<'a> {
        Talk { socket, end: Instant::now() + limit }
    }

    /// Begins: the newest style that the server has, and whether it leaves out the zeroes at the end of an old answer.
    ///
    /// # Errors
    /// The server speaks something else.
    pub fn greet(&mut self) -> io::Result<(Style, bool)> {
        let mut greeting = [0; 18];
        self.read(&mut greeting)?;
        if u64::from_be_bytes(field(&greeting, 0)) != wire::INIT_MAGIC {
            return Err(broken("the server does not speak NBD"));
        }
        if u64::from_be_bytes(field(&greeting, 8)) != wire::OPTION_MAGIC {
            return Err(broken("the server speaks the old style of NBD, which is not supported"));
        }
        let flags = u16::from_be_bytes(field(&greeting, 16));
        if flags & 1 == 0 {
            return Err(broken("the server does not speak NBD's fixed newstyle"));
        }
        let no_zeroes = flags & 2 != 0;
        self.write(&u32::from(flags & 3).to_be_bytes())?;
        let style = if self.option(EXTENDED_HEADERS, &[])?.is_some() {
            Style::Extended
        } else if self.option(STRUCTURED_REPLY, &[])?.is_some() {
            Style::Structured
        } else {
            Style::Simple
        };
        Ok((style, no_zeroes))
    }

    fn negotiate(&mut self, name: &str) -> io::Result<Facts> {
        let (style, no_zeroes) = self.greet()?;
        let allocation = if style == Style::Simple { None } else { self.allocation_context(name)? };
        let mut facts = Facts { size: 0, flags: 0, style, allocation, min_block: 1, max_payload: MAX_PAYLOAD };
        // The name, and one information request: block sizes.
        let go = [&string(name.as_bytes())[..], &[0, 1, 0, 3]].concat();
        match self.option(GO, &go)? {
            Some(replies) => facts.learn(&replies)?,
            None if style == Style::Extended => return Err(broken("the server has no NBD_OPT_GO")),
            None => self.export_name(name, no_zeroes, &mut facts)?,
        }
        if i64::try_from(facts.size).is_err() {
            return Err(broken("the export is larger than 2^63-1 bytes"));
        }
        Ok(facts)
    }

    fn allocation_context(&mut self, name: &str) -> io::Result<Option<u32>> {
        let query = [&string(name.as_bytes())[..], &1u32.to_be_bytes(), &string(b"base:allocation")].concat();
        let replies = self.option(SET_META_CONTEXT, &query)?.unwrap_or_default();
        let context = replies.iter().find(|(kind, payload)| *kind == META_CONTEXT && payload.len() >= 4);
        Ok(context.map(|(_, payload)| u32::from_be_bytes(field(payload, 0))))
    }

    /// The way in of servers without `NBD_OPT_GO`.
    fn export_name(&mut self, name: &str, no_zeroes: bool, facts: &mut Facts) -> io::Result<()> {
        self.write(&option(EXPORT_NAME, name.as_bytes()))?;
        let mut answer = [0; 10];
        self.read(&mut answer)?;
        facts.size = u64::from_be_bytes(field(&answer, 0));
        facts.flags = u16::from_be_bytes(field(&answer, 8));
        if no_zeroes { Ok(()) } else { self.read(&mut [0; 124]) }
    }

    /// An option and its replies up to the acknowledgement; `None` if the server does not know it.
    pub fn option(&mut self, number: u32, payload: &[u8]) -> io::Result<Option<Replies>> {
        const UNSUPPORTED: u32 = ERROR_BIT | 1;
        self.write(&option(number, payload))?;
        let mut replies = Vec::new();
        for _ in 0..MAX_REPLIES {
            let mut header = [0; 20];
            self.read(&mut header)?;
            let (magic, of) = (u64::from_be_bytes(field(&header, 0)), u32::from_be_bytes(field(&header, 8)));
            let (kind, len) = (u32::from_be_bytes(field(&header, 12)), u32::from_be_bytes(field(&header, 16)));
            if magic != wire::OPTION_REPLY_MAGIC || of != number || len > MAX_REPLY {
                return Err(broken("the server's answer to an option is malformed"));
            }
            let mut payload = vec![0; len as usize];
            self.read(&mut payload)?;
            match kind {
                ACK => return Ok(Some(replies)),
                UNSUPPORTED => return Ok(None),
                // A server may have reasons of its own against what only makes things faster.
                error if error & ERROR_BIT != 0 && number != GO => return Ok(None),
                error if error & ERROR_BIT != 0 => {
                    let said: String =
                        String::from_utf8_lossy(&payload).chars().take(200).flat_map(char::escape_debug).collect();
                    let why = format!("the server refuses the export (error {}): {said}", error & !ERROR_BIT);
                    return Err(io::Error::new(io::ErrorKind::NotFound, why));
                }
                _ => replies.push((kind, payload)),
            }
        }
        Err(broken("the server's answers to an option do not end"))
    }

    fn read(&mut self, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            self.wait_for(PollFlags::IN)?;
            match rustix::net::recv(self.socket, &mut *buf, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server hung up")),
                Ok((count, _)) => buf = &mut buf[count..],
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.wait_for(PollFlags::OUT)?;
            match rustix::net::send(self.socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => bytes = &bytes[count..],
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Returns when the socket is ready for `what`.
    fn wait_for(&self, what: PollFlags) -> io::Result<()> {
        let left = self.end.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(self.socket, what)], Some(&timeout)) {
            Ok(0) => Err(io::Error::new(io::ErrorKind::TimedOut, "the server takes too long to negotiate")),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

impl Facts {
    /// Takes over what `NBD_OPT_GO` brought.
    fn learn(&mut self, replies: &[(u32, Vec<u8>)]) -> io::Result<()> {
        let info = |wanted: u16| {
            let mut all = replies.iter().filter(|(kind, payload)| *kind == INFO && payload.len() >= 2);
            all.find(|(_, payload)| u16::from_be_bytes(field(payload, 0)) == wanted).map(|(_, payload)| &payload[2..])
        };
        let Some(export) = info(0).filter(|export| export.len() == 10) else {
            return Err(broken("the server says nothing about the export"));
        };
        self.size = u64::from_be_bytes(field(export, 0));
        self.flags = u16::from_be_bytes(field(export, 8));
        if let Some(sizes) = info(3).filter(|sizes| sizes.len() == 12) {
            let (min, max) = (u32::from_be_bytes(field(sizes, 0)), u32::from_be_bytes(field(sizes, 8)));
            if !min.is_power_of_two() || min > 64 << 10 || max < min {
                return Err(broken("the server's block sizes make no sense"));
            }
            self.min_block = min;
            self.max_payload = u64::from(max).min(MAX_PAYLOAD) / u64::from(min) * u64::from(min);
        }
        Ok(())
    }
}

fn option(number: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    [&wire::OPTION_MAGIC.to_be_bytes()[..], &number.to_be_bytes(), &len.to_be_bytes(), payload].concat()
}

/// A text with its length in front.
pub fn string(text: &[u8]) -> Vec<u8> {
    [&u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes()[..], text].concat()
}
