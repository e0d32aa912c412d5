// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The server's end of one client's socket: bytes and descriptors come in together and stay together.
//!
//! A descriptor rides on the first byte of the `sendmsg` that carried it. The kernel glues bytes sent before it to the
//! same `recvmsg`, so a plain block-wise read cannot tell which of several commands in the block it came with. What the
//! kernel does tell is whether descriptors lie in a *peeked* range: with `MSG_PEEK` and no room for control data it sets
//! `MSG_CTRUNC` and installs nothing. So the connection peeks first, finds the carrying byte by bisection in the rare
//! case that it is not the next one, reads up to before it, and only then reads on with room for descriptors: the
//! kernel ends that read with the segment, and so a block has descriptors on its first byte or none.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
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
    /// Came on the bytes of the message that is being assembled, or on blanks before it.
    carried: Option<Receipt>,
    unsent: Vec<u8>,
    dropped_events: u64,
}

impl Connection {
    /// A connection over a connected stream: a unix socket for descriptors, or anything that can be read and written.
    ///
    /// # Errors
    /// The socket refuses to be configured.
    pub fn new(fd: OwnedFd) -> io::Result<Connection> {
        let transport = match sockopt::socket_domain(&fd) {
            Ok(AddressFamily::UNIX) => Transport::Unix,
            Ok(_) => Transport::Socket,
            Err(Errno::NOTSOCK) => Transport::File,
            Err(e) => return Err(e.into()),
        };
        if transport == Transport::Unix {
            // Credentials would set MSG_CTRUNC on every peek.
            sockopt::set_socket_passcred(&fd, false)?;
        }
        Ok(Connection {
            fd,
            transport,
            parser: Parser::new(),
            block: Vec::new(),
            parsed: 0,
            carried: None,
            unsent: Vec::new(),
            dropped_events: 0,
        })
    }

    /// Reads one block if there is one and the last is used up. At most one receipt of descriptors is held beside it.
    ///
    /// # Errors
    /// The errno of the read; the connection is of no further use.
    pub fn receive(&mut self) -> io::Result<Received> {
        if self.parsed < self.block.len() || self.unsent.len() > MAX_UNSENT {
            return Ok(Received::Nothing);
        }
        self.block.clear();
        self.parsed = 0;
        self.block.resize(BLOCK, 0);
        let read = match self.transport {
            Transport::Unix => self.read_unix(),
            Transport::Socket => read_socket(self.fd.as_fd(), &mut self.block, RecvFlags::empty()),
            Transport::File => read_file(self.fd.as_fd(), &mut self.block),
        };
        self.block.truncate(*read.as_ref().unwrap_or(&0));
        match read {
            Ok(0) => Ok(Received::End),
            Ok(_) => Ok(Received::Some),
            Err(Errno::AGAIN) => Ok(Received::Nothing),
            Err(Errno::CONNRESET | Errno::PIPE) => Ok(Received::End),
            Err(e) => Err(e.into()),
        }
    }

    /// The next complete message of what was received.
    pub fn next_message(&mut self) -> Option<Message> {
        let (used, content) = self.parser.feed(&self.block[self.parsed..]);
        self.parsed += used;
        Some(Message { content: content?, receipt: self.carried.take() })
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

    /// Whether received bytes wait to be parsed: [`next_message`](Connection::next_message) may answer without another
    /// [`receive`](Connection::receive), and polling for input would be in vain.
    pub fn has_unparsed(&self) -> bool {
        self.parsed < self.block.len()
    }

    fn read_unix(&mut self) -> Result<usize, Errno> {
        let fd = self.fd.as_fd();
        let (first, on_first) = peek(fd, &mut self.block[..1])?;
        if first == 0 {
            return Ok(0);
        }
        if on_first {
            let (n, receipt) = receive_with_fds(fd, &mut self.block)?;
            if receipt.is_some() {
                self.carried = receipt;
            }
            return Ok(n);
        }
        let (mut clean, carried) = peek(fd, &mut self.block)?;
        if carried {
            // `clean` bytes carry none, `dirty` bytes do.
            let mut dirty = clean;
            clean = 1;
            while dirty - clean > 1 {
                let middle = clean + (dirty - clean) / 2;
                if peek(fd, &mut self.block[..middle])?.1 { dirty = middle } else { clean = middle }
            }
        }
        read_socket(fd, &mut self.block[..clean], RecvFlags::empty())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// How many bytes a read would give, and whether descriptors are among them. Installs none.
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
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
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

fn read_socket(fd: BorrowedFd<'_>, buf: &mut [u8], flags: RecvFlags) -> Result<usize, Errno> {
    loop {
        match rustix::net::recv(fd, &mut *buf, flags | RecvFlags::DONTWAIT) {
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
    match rustix::event::poll(&mut [PollFd::from_borrowed_fd(fd, events)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))? {
        0 => Err(Errno::AGAIN),
        _ => Ok(()),
    }
}
