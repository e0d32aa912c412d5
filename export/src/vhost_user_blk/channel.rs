// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The socket of a front end: whole messages with their descriptors.
//!
//! A front end that sends half a message, or reads no reply, holds up nobody: every wait ends when the export wants to end,
//! and a reply that finds no room ends the connection.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::proto::{self, Fault, HEADER_LEN, Header, MAX_REGIONS, Payload, Request};

/// A front end's socket.
#[derive(Debug)]
pub struct Channel(OwnedFd);

/// A message.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// Its payload, as long as the header says.
    pub bytes: Vec<u8>,
    /// What came with it; what nobody takes is closed with it.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The payload.
    pub fn payload(&self) -> Payload<'_> {
        Payload::new(self.header.request, &self.bytes)
    }

    /// The one descriptor of a message that must have one.
    ///
    /// # Errors
    /// It has another number of them.
    pub fn fd(&mut self) -> Result<OwnedFd, Fault> {
        match (self.fds.pop(), self.fds.is_empty()) {
            (Some(fd), true) => Ok(fd),
            _ => Err(Fault::Descriptors(self.header.request)),
        }
    }
}

/// Why no message came.
#[derive(Debug)]
pub enum Ended {
    /// The front end has hung up, or the socket failed.
    Gone(io::Error),
    /// The front end breaks the protocol.
    Broken(Fault),
    /// The export wants to end.
    Stopped,
}

impl From<Errno> for Ended {
    fn from(errno: Errno) -> Ended {
        Ended::Gone(errno.into())
    }
}

impl Channel {
    /// A channel over a connected stream socket.
    pub fn new(socket: OwnedFd) -> Channel {
        Channel(socket)
    }

    /// The socket's number.
    pub fn number(&self) -> i32 {
        self.0.as_raw_fd()
    }

    /// The next message, whole. To be called when the socket is readable; `stop` becoming readable ends the waiting for the
    /// rest of it.
    ///
    /// # Errors
    /// There is none: see [`Ended`].
    pub fn receive(&self, stop: BorrowedFd<'_>) -> Result<Message, Ended> {
        let mut fds = Vec::new();
        let mut header = [0; HEADER_LEN];
        self.fill(&mut header, &mut fds, stop)?;
        let header = Header::parse(&header).map_err(Ended::Broken)?;
        let mut bytes = vec![0; header.len];
        self.fill(&mut bytes, &mut fds, stop)?;
        if fds.len() > header.request.most_fds() {
            return Err(Ended::Broken(Fault::Descriptors(header.request)));
        }
        Ok(Message { header, bytes, fds })
    }

    fn fill(&self, mut into: &mut [u8], fds: &mut Vec<OwnedFd>, stop: BorrowedFd<'_>) -> Result<(), Ended> {
        while !into.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_REGIONS + 1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let got = match recvmsg(&self.0, &mut [IoSliceMut::new(into)], &mut control, flags) {
                Err(Errno::AGAIN) => {
                    self.wait(stop)?;
                    continue;
                }
                Err(Errno::INTR) => continue,
                other => other?,
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            if got.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_REGIONS {
                return Err(Ended::Broken(Fault::Descriptors(Request::SetMemTable)));
            }
            if got.bytes == 0 {
                return Err(Ended::Gone(io::ErrorKind::UnexpectedEof.into()));
            }
            into = &mut into[got.bytes..];
        }
        Ok(())
    }

    fn wait(&self, stop: BorrowedFd<'_>) -> Result<(), Ended> {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN), PollFd::from_borrowed_fd(stop, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        if fds[1].revents().is_empty() { Ok(()) } else { Err(Ended::Stopped) }
    }

    /// Sends a reply, with a descriptor if there is one.
    ///
    /// # Errors
    /// The socket has no room, or failed.
    pub fn reply(&self, request: Request, payload: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<(), Ended> {
        let mut message = proto::reply_header(request, payload.len()).to_vec();
        message.extend(payload);
        send(self.0.as_fd(), &message, fd).map_err(Ended::Gone)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Sends a whole message or fails at once: a reader that leaves the buffer full does not read.
///
/// # Errors
/// `WouldBlock` without room, else those of sendmsg(2).
pub fn send(socket: BorrowedFd<'_>, message: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match sendmsg(socket, &[IoSlice::new(message)], &mut control, flags)? {
        sent if sent == message.len() => Ok(()),
        _ => Err(io::ErrorKind::WouldBlock.into()),
    }
}
