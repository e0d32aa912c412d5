// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A connected socket: bytes as the kernel has them, with a deadline while the peer has proved nothing yet.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, sockopt};

/// A TCP connection that is silent for so long is probed.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
/// Time between probes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// Probes without an answer, after which the peer is gone.
const KEEPALIVE_PROBES: u32 = 4;
/// Milliseconds for which sent bytes may stay unacknowledged, or wait for a peer that reads nothing at all.
const UNACKNOWLEDGED: u32 = 300_000;

/// A connected stream socket, unix or TCP.
#[derive(Debug)]
pub struct Stream(OwnedFd);

impl Stream {
    /// Takes a connected, blocking socket.
    pub fn new(socket: OwnedFd) -> Stream {
        // Only TCP knows these options. Replies are gathered into one write already; and a peer whose machine is gone says
        // nothing at all: probes find out while it owes nothing, the time limit while it has not acknowledged what was sent.
        let _ = sockopt::set_tcp_nodelay(&socket, true);
        let _ = sockopt::set_socket_keepalive(&socket, true);
        let _ = sockopt::set_tcp_keepidle(&socket, KEEPALIVE_IDLE);
        let _ = sockopt::set_tcp_keepintvl(&socket, KEEPALIVE_INTERVAL);
        let _ = sockopt::set_tcp_keepcnt(&socket, KEEPALIVE_PROBES);
        let _ = sockopt::set_tcp_user_timeout(&socket, UNACKNOWLEDGED);
        Stream(socket)
    }

    /// The socket, for another process.
    pub fn into_socket(self) -> OwnedFd {
        self.0
    }

    /// The descriptor's number.
    pub fn number(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Who is at the other end, as far as the kernel tells: an address, or a process.
    pub fn peer(&self) -> String {
        match rustix::net::getpeername(&self.0).ok().flatten().map(SocketAddr::try_from) {
            Some(Ok(address)) => address.to_string(),
            _ => sys::process::peer(&self.0).map_or_else(|_| "unknown".to_owned(), |peer| peer.to_string()),
        }
    }

    /// Receives what is there, at least one byte; 0 is the end.
    ///
    /// # Errors
    /// The errno of the receive; `WouldBlock` only with `wait` false.
    pub fn receive(&self, buf: &mut [u8], wait: bool) -> io::Result<usize> {
        let flags = if wait { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        loop {
            match rustix::net::recv(&self.0, &mut *buf, flags) {
                Ok((n, _)) => return Ok(n),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Sends all of `bytes`, until `deadline` if there is one. A peer that does not read holds up its own thread only.
    ///
    /// # Errors
    /// `BrokenPipe` and friends if the peer has gone, `TimedOut` at the deadline.
    pub fn write_all(&self, mut bytes: &[u8], deadline: Option<Instant>) -> io::Result<()> {
        let flags = if deadline.is_some() { SendFlags::NOSIGNAL | SendFlags::DONTWAIT } else { SendFlags::NOSIGNAL };
        while !bytes.is_empty() {
            self.wait_for(PollFlags::OUT, deadline)?;
            match rustix::net::send(&self.0, bytes, flags) {
                Ok(n) => bytes = &bytes[n..],
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Sends what can be sent without sleeping, and returns how much that was.
    ///
    /// # Errors
    /// `BrokenPipe` and friends if the peer has gone.
    pub fn write_now(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match rustix::net::send(&self.0, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => return Ok(count),
                Err(Errno::AGAIN) => return Ok(0),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Whether there is nobody any more who could read what is sent, as far as the kernel knows.
    pub fn is_deserted(&self) -> bool {
        let mut socket = [PollFd::new(&self.0, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut socket, Some(&now)).is_ok() && socket[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }

    /// Sends some of `parts`, at least one byte.
    ///
    /// # Errors
    /// As [`Stream::write_all`].
    pub fn send(&self, parts: &[IoSlice<'_>], deadline: Option<Instant>) -> io::Result<usize> {
        let flags = if deadline.is_some() { SendFlags::NOSIGNAL | SendFlags::DONTWAIT } else { SendFlags::NOSIGNAL };
        loop {
            self.wait_for(PollFlags::OUT, deadline)?;
            match rustix::net::sendmsg(&self.0, parts, &mut SendAncillaryBuffer::default(), flags) {
                Ok(count) => return Ok(count),
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Ends both directions: whoever sleeps in a call on this socket wakes up.
    pub fn hang_up(&self) {
        let _ = rustix::net::shutdown(&self.0, Shutdown::Both);
    }

    /// Returns when the socket is ready for `what`, at once if there is no `deadline`.
    ///
    /// # Errors
    /// `TimedOut` at the deadline.
    pub fn wait_for(&self, what: PollFlags, deadline: Option<Instant>) -> io::Result<()> {
        let Some(deadline) = deadline else { return Ok(()) };
        let left = deadline.saturating_duration_since(Instant::now());
        if left == Duration::ZERO {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&self.0, what)], Some(&timeout)) {
            Ok(0) => Err(io::ErrorKind::TimedOut.into()),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
