// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a client's thread talks through: the socket as it is, or TLS over it.
//!
//! The thread owns the channel; others hold the [`Stream`] below it to hang up, and need nothing else.

use std::io::{self, IoSlice, Read, Write};
use std::sync::Arc;
use std::time::Instant;

use rustix::event::PollFlags;
use rustls::{ServerConfig, ServerConnection};

use super::stream::Stream;

/// Plaintext that may wait inside TLS for the socket, bytes.
const TLS_BUFFER: usize = 256 << 10;

/// A connection, in clear or not.
pub struct Channel {
    stream: Arc<Stream>,
    tls: Option<Box<ServerConnection>>,
}

impl Channel {
    /// In clear.
    pub fn new(stream: Arc<Stream>) -> Channel {
        Channel { stream, tls: None }
    }

    /// The socket below.
    pub fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// Whether it is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// Lets the peer begin TLS, until `deadline`; everything after this call is encrypted. What the peer said in clear
    /// after it asked for TLS is taken for its hello, and fails. Returns the peer's certificate (DER) if it showed one.
    ///
    /// # Errors
    /// The peer breaks the protocol, has no certificate that is accepted, or is too slow.
    pub fn start_tls(&mut self, config: Arc<ServerConfig>, deadline: Option<Instant>) -> io::Result<Option<Vec<u8>>> {
        let mut tls = ServerConnection::new(config).map_err(io::Error::other)?;
        tls.set_buffer_limit(Some(TLS_BUFFER));
        let tls = self.tls.insert(Box::new(tls));
        while tls.is_handshaking() {
            if tls.wants_write() {
                flush(tls, &self.stream, deadline)?;
            } else {
                self.stream.wait_for(PollFlags::IN, deadline)?;
                if !pull(tls, &self.stream, true, deadline)? {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
        }
        flush(tls, &self.stream, deadline)?;
        let chain = tls.peer_certificates().unwrap_or_default();
        Ok(chain.first().map(|certificate| certificate.to_vec()))
    }

    /// Receives what is there, at least one byte; 0 is the end.
    ///
    /// # Errors
    /// The errno of the receive; `WouldBlock` only with `wait` false; `InvalidData` for broken TLS.
    pub fn receive(&mut self, buf: &mut [u8], wait: bool) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else { return self.stream.receive(buf, wait) };
        loop {
            if let Some(count) = take(tls, buf)? {
                return Ok(count);
            }
            if !pull(tls, &self.stream, wait, None)? {
                // The socket's end without TLS's own goodbye: NBD has a goodbye of its own, so nothing is lost.
                return Ok(0);
            }
        }
    }

    /// Fills `buf`, until `deadline` if there is one.
    ///
    /// # Errors
    /// `UnexpectedEof` if the peer ends first, `TimedOut` at the deadline.
    pub fn read_exact(&mut self, mut buf: &mut [u8], deadline: Option<Instant>) -> io::Result<()> {
        while !buf.is_empty() {
            let buffered = match &mut self.tls {
                Some(tls) => take(tls, buf)?,
                None => None,
            };
            let count = match buffered {
                Some(count) => count,
                None => {
                    self.stream.wait_for(PollFlags::IN, deadline)?;
                    match self.receive(buf, deadline.is_none()) {
                        // Part of a TLS record, or nothing after all.
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
                        other => other?,
                    }
                }
            };
            match count {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => buf = &mut buf[n..],
            }
        }
        Ok(())
    }

    /// Sends all of `bytes`, until `deadline` if there is one. A peer that does not read holds up its own thread only.
    ///
    /// # Errors
    /// `BrokenPipe` and friends if the peer has gone, `TimedOut` at the deadline.
    pub fn write_all(&mut self, mut bytes: &[u8], deadline: Option<Instant>) -> io::Result<()> {
        let Some(tls) = &mut self.tls else { return self.stream.write_all(bytes, deadline) };
        while !bytes.is_empty() {
            let taken = tls.writer().write(bytes)?;
            bytes = &bytes[taken..];
            flush(tls, &self.stream, deadline)?;
        }
        Ok(())
    }

    /// Sends what can be sent without sleeping, and returns how much that was: nothing of what is to be encrypted.
    ///
    /// # Errors
    /// `BrokenPipe` and friends if the peer has gone.
    pub fn write_now(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.is_encrypted() { Ok(0) } else { self.stream.write_now(bytes) }
    }

    /// Says goodbye as TLS wants it, as far as that can be done at once.
    pub fn end(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
            let _ = flush(tls, &self.stream, Some(Instant::now()));
        }
    }
}

/// Decrypted bytes that are there; `None` if more must come first.
fn take(tls: &mut ServerConnection, buf: &mut [u8]) -> io::Result<Option<usize>> {
    match tls.reader().read(buf) {
        Ok(count) => Ok(Some(count)),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
        // The socket has ended without TLS's goodbye.
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(Some(0)),
        Err(e) => Err(e),
    }
}

/// Receives and decrypts what is there. False at the socket's end.
fn pull(tls: &mut ServerConnection, stream: &Stream, wait: bool, deadline: Option<Instant>) -> io::Result<bool> {
    let came = tls.read_tls(&mut Source { stream, wait })?;
    let processed = tls.process_new_packets();
    // Answers, an alert about what is wrong among them.
    let flushed = flush(tls, stream, deadline);
    processed.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    flushed.map(|()| came > 0)
}

fn flush(tls: &mut ServerConnection, stream: &Stream, deadline: Option<Instant>) -> io::Result<()> {
    while tls.wants_write() {
        tls.write_tls(&mut Sink { stream, deadline })?;
    }
    Ok(())
}

struct Source<'a> {
    stream: &'a Stream,
    wait: bool,
}

impl Read for Source<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.receive(buf, self.wait)
    }
}

struct Sink<'a> {
    stream: &'a Stream,
    deadline: Option<Instant>,
}

impl Write for Sink<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream.send(&[IoSlice::new(buf)], self.deadline)
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.stream.send(bufs, self.deadline)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
