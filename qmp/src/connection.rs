// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The server's end of one client's socket: bytes and descriptors come in together and stay together.
//!
//! A descriptor rides on the first byte of the `sendmsg` that carried it. The kernel glues bytes sent before it to the
//! same `recvmsg`, so a plain block-wise read cannot tell which of several commands in the block it came with. So a block
//! is first *peeked* at. With no room for control data the kernel then says by `MSG_CTRUNC` that descriptors are ahead,
//! and installs none; it does not say at which byte. If there are none, the block is read at once. Else it is parsed
//! while it still lies in the socket, and each message's bytes are read when its end is known, with room for
//! descriptors: those that come belong to that message and to no other. A peek ends with the segment that carries
//! descriptors, so one block has one receipt at most.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, sockopt,
};

use crate::{Message, Parser, Receipt};

/// Bytes read at once.
const BLOCK: usize = 64 * 1024;
/// Most descriptors that one message can carry (`SCM_MAX_FD` of the kernel).
const MAX_FDS: usize = 253;
/// Most bytes of undelivered answers with which [`Connection::receive`] still reads.
const MAX_UNSENT: usize = 1024 * 1024;

/// What [`Connection::receive`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// Nothing new: the socket is empty, or what came before is not used up, or the client does not read its answers.
    Nothing,
    /// Bytes: ask [`Connection::next_message`].
    Some,
    /// The client has gone or has shut down its side. Messages that are complete can still be taken.
    End,
}

/// What kind of descriptor the connection is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    /// Descriptors can come.
    Unix,
    /// Another socket: bytes only.
    Socket,
    /// A pipe or terminal: bytes only, and no per-call way not to block.
    File,
}

/// A client's stream. Nothing here ever blocks; the status flags of the descriptor are not touched.
#[derive(Debug)]
pub struct Connection {
    fd: OwnedFd,
    transport: Transport,
    parser: Parser,
    block: Vec<u8>,
    /// Bytes of `block` the parser has seen.
    parsed: usize,
    /// Bytes of `block` that have left the socket; the others were only peeked at, and may carry descriptors.
    taken: usize,
    /// Came on the bytes of the message that is being assembled, or on blanks before it.
    carried: Option<Receipt>,
    /// Why no more can be read.
    broken: Option<Errno>,
    unsent: Vec<u8>,
    dropped_events: u64,
}

impl Connection {
    /// A connection over a connected stream: a unix socket for descriptors, or anything that can be read and written.
    ///
    /// # Errors
    /// The descriptor's kind cannot be told.
    pub fn new(fd: OwnedFd) -> io::Result<Connection> {
        let transport = match sockopt::socket_domain(&fd) {
            Ok(AddressFamily::UNIX) => Transport::Unix,
            Ok(_) => Transport::Socket,
            Err(Errno::NOTSOCK) => Transport::File,
            Err(e) => return Err(e.into()),
        };
        Ok(Connection {
            fd,
            transport,
            parser: Parser::new(),
            block: Vec::new(),
            parsed: 0,
            taken: 0,
            carried: None,
            broken: None,
            unsent: Vec::new(),
            dropped_events: 0,
        })
    }

    /// Reads one block if there is one and the last is used up. At most one receipt of descriptors is held beside it.
    ///
    /// # Errors
    /// The errno of the read; the connection is of no further use.
    pub fn receive(&mut self) -> io::Result<Received> {
        if let Some(e) = self.broken {
            return Err(e.into());
        }
        if self.parsed < self.block.len() || self.unsent.len() > MAX_UNSENT {
            return Ok(Received::Nothing);
        }
        self.block.resize(BLOCK, 0);
        self.parsed = 0;
        let fd = self.fd.as_fd();
        let read = match self.transport {
            Transport::Unix => peek(fd, &mut self.block),
            Transport::Socket => read_socket(fd, &mut self.block).map(|n| (n, false)),
            Transport::File => read_file(fd, &mut self.block).map(|n| (n, false)),
        };
        let (len, carries_fds) = *read.as_ref().unwrap_or(&(0, false));
        self.block.truncate(len);
        self.taken = if self.transport == Transport::Unix { 0 } else { len };
        if !carries_fds {
            self.take(len);
        }
        match read {
            Ok((0, _)) | Err(Errno::CONNRESET | Errno::PIPE) => Ok(Received::End),
            Ok(_) => Ok(Received::Some),
            Err(Errno::AGAIN) => Ok(Received::Nothing),
            Err(e) => Err(e.into()),
        }
    }

    /// The next complete message of what was received.
    pub fn next_message(&mut self) -> Option<Message> {
        let (used, content) = self.parser.feed(&self.block[self.parsed..]);
        self.parsed += used;
        self.take(self.parsed);
        if self.broken.is_some() {
            return None;
        }
        Some(Message { content: content?, receipt: self.carried.take() })
    }

    /// Moves the first `end` bytes of the block, already known, out of the socket, and what they carry into `carried`.
    fn take(&mut self, end: usize) {
        while self.taken < end && self.broken.is_none() {
            match receive_with_fds(self.fd.as_fd(), &mut self.block[self.taken..end]) {
                Ok((0, _)) => self.broken = Some(Errno::CONNRESET),
                Ok((n, receipt)) => {
                    self.taken += n;
                    if receipt.is_some() {
                        self.carried = receipt;
                    }
                }
                Err(e) => self.broken = Some(e),
            }
        }
    }

    /// Appends an answer to what [`flush`](Connection::flush) sends.
    pub fn send(&mut self, bytes: &[u8]) {
        self.unsent.extend_from_slice(bytes);
    }

    /// Appends an event, unless a megabyte of output is unread already: then it is counted and dropped.
    pub fn send_event(&mut self, line: &[u8]) {
        if self.unsent.len() + line.len() > MAX_UNSENT {
            self.dropped_events += 1;
        } else {
            self.send(line);
        }
    }

    /// Events that were dropped because the client does not read.
    pub fn dropped_events(&self) -> u64 {
        self.dropped_events
    }

    /// Writes what the client takes; `true` once everything is out. Otherwise try again when the descriptor is writable.
    ///
    /// # Errors
    /// The errno of the write; `BrokenPipe` if the client has gone.
    pub fn flush(&mut self) -> io::Result<bool> {
        let mut sent = 0;
        let result = loop {
            if sent == self.unsent.len() {
                break Ok(true);
            }
            let rest = &self.unsent[sent..];
            let wrote = match self.transport {
                Transport::Unix | Transport::Socket => {
                    rustix::net::send(&self.fd, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
                }
                Transport::File => write_file(self.fd.as_fd(), rest),
            };
            match wrote {
                Ok(n) => sent += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break Ok(false),
                Err(e) => break Err(e.into()),
            }
        };
        self.unsent.drain(..sent);
        result
    }

    /// Bytes that [`flush`](Connection::flush) has still to write.
    pub fn unsent(&self) -> usize {
        self.unsent.len()
    }

    /// Numbers of descriptors that came with a message not yet complete.
    pub fn carried(&self) -> Vec<i32> {
        self.carried.as_ref().map(Receipt::numbers).unwrap_or_default()
    }

    /// Whether the client has gone altogether: nothing that is sent will be read.
    pub fn is_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.fd, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }

    /// Whether received bytes wait to be parsed: [`next_message`](Connection::next_message) may answer without another
    /// [`receive`](Connection::receive), and polling for input would be in vain.
    pub fn has_unparsed(&self) -> bool {
        self.parsed < self.block.len()
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Copies what is ahead, up to the end of a segment with descriptors, and tells whether there may be any. Installs none.
fn peek(fd: BorrowedFd<'_>, buf: &mut [u8]) -> Result<(usize, bool), Errno> {
    loop {
        let mut control = RecvAncillaryBuffer::default();
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match recvmsg(fd, &mut [IoSliceMut::new(buf)], &mut control, flags) {
            Ok(message) => return Ok((message.bytes, message.flags.contains(ReturnFlags::CTRUNC))),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
}

fn receive_with_fds(fd: BorrowedFd<'_>, buf: &mut [u8]) -> Result<(usize, Option<Receipt>), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS), ScmCredentials(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        match recvmsg(fd, &mut [IoSliceMut::new(buf)], &mut control, RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT) {
            Ok(message) => break message,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    };
    let mut fds: Vec<OwnedFd> = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    let receipt = if message.flags.contains(ReturnFlags::CTRUNC) {
        let came = fds.len();
        Some(Receipt::Lost(format!(
            "File descriptors were lost on receipt: {came} arrived and were closed, \
             the others found no room (too many open files in this process)"
        )))
    } else if fds.is_empty() {
        None
    } else {
        Some(Receipt::Fds(fds))
    };
    Ok((message.bytes, receipt))
}

fn read_socket(fd: BorrowedFd<'_>, buf: &mut [u8]) -> Result<usize, Errno> {
    loop {
        match rustix::net::recv(fd, &mut *buf, RecvFlags::DONTWAIT) {
            Ok((n, _)) => return Ok(n),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
}

fn read_file(fd: BorrowedFd<'_>, buf: &mut [u8]) -> Result<usize, Errno> {
    ready(fd, PollFlags::IN)?;
    match rustix::io::read(fd, buf) {
        // A terminal that has hung up.
        Err(Errno::IO) => Ok(0),
        other => other,
    }
}

fn write_file(fd: BorrowedFd<'_>, bytes: &[u8]) -> Result<usize, Errno> {
    ready(fd, PollFlags::OUT)?;
    // pipe(7): a writable pipe takes PIPE_BUF bytes without sleeping.
    rustix::io::write(fd, &bytes[..bytes.len().min(4096)])
}

fn ready(fd: BorrowedFd<'_>, events: PollFlags) -> Result<(), Errno> {
    match poll(&mut [PollFd::from_borrowed_fd(fd, events)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))? {
        0 => Err(Errno::AGAIN),
        _ => Ok(()),
    }
}
