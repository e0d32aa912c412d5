// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The client's end: negotiates, sends commands with descriptors, keeps the events that come in between.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Map, Value};

use crate::{Parser, output};

/// Bytes read at once.
const BLOCK: usize = 16 * 1024;
/// Descriptors in one message (`SCM_MAX_FD` of the kernel).
const MAX_FDS: usize = 253;
/// Events that are kept until someone asks; beyond that the oldest go.
const MAX_EVENTS: usize = 4096;

/// Why a command has no result.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server answered with an error.
    #[error("{desc}")]
    Qmp {
        /// The class, as on the wire.
        class: String,
        /// The sentence.
        desc: String,
    },
    /// The server has closed the connection.
    #[error("the server has closed the connection")]
    Closed,
    /// The socket failed; `TimedOut` after [`Client::set_timeout`].
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The server says what QMP does not allow here.
    #[error("the server broke the protocol: {0}")]
    Protocol(String),
}

/// An event as it came.
#[derive(Clone, Debug, PartialEq)]
pub struct ReceivedEvent {
    /// Its name.
    pub name: String,
    /// What it tells; `Null` for nothing.
    pub data: Value,
    /// When the server sent it, since 1970.
    pub timestamp: Duration,
}

/// A negotiated connection to a QMP server. Calls block.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    parser: Parser,
    received: Vec<u8>,
    used: usize,
    greeting: Value,
    events: VecDeque<ReceivedEvent>,
    next_id: u64,
}

impl Client {
    /// Takes a connected stream socket, reads the greeting and negotiates.
    ///
    /// # Errors
    /// The server closes the connection, greets with something else or refuses.
    pub fn new(socket: impl Into<OwnedFd>) -> Result<Client, ClientError> {
        Client::with_timeout(socket, None)
    }

    /// As [`new`](Client::new), with a [timeout](Client::set_timeout) that holds for the greeting already.
    ///
    /// # Errors
    /// As [`new`](Client::new).
    pub fn with_timeout(socket: impl Into<OwnedFd>, timeout: Option<Duration>) -> Result<Client, ClientError> {
        let mut client = Client {
            socket: socket.into(),
            parser: Parser::new(),
            received: Vec::new(),
            used: 0,
            greeting: Value::Null,
            events: VecDeque::new(),
            next_id: 0,
        };
        client.set_timeout(timeout)?;
        match client.next_message()? {
            Value::Object(mut hello) if hello.contains_key("QMP") => {
                client.greeting = hello.remove("QMP").unwrap_or_default();
            }
            other => return Err(ClientError::Protocol(format!("expected a greeting, got {}", output::text(&other)))),
        }
        client.execute("qmp_capabilities", Map::new(), &[])?;
        Ok(client)
    }

    /// Lets reads and writes wait no longer than `timeout` each; `None` for ever. After a timeout the connection is of no
    /// further use, as an answer may be half read.
    ///
    /// # Errors
    /// The errno of setsockopt.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        set_socket_timeout(&self.socket, Timeout::Recv, timeout)?;
        set_socket_timeout(&self.socket, Timeout::Send, timeout)?;
        Ok(())
    }

    /// What the server said of itself: `version` and `capabilities`.
    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// Runs a command. `fds` ride on its first byte.
    ///
    /// # Errors
    /// The server's error, or the connection's.
    pub fn execute(
        &mut self,
        name: &str,
        arguments: Map<String, Value>,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Value, ClientError> {
        let id = Value::from(self.next_id);
        self.next_id += 1;
        let mut command = Map::new();
        command.insert("execute".to_owned(), Value::from(name));
        if !arguments.is_empty() {
            command.insert("arguments".to_owned(), Value::Object(arguments));
        }
        command.insert("id".to_owned(), id.clone());
        self.send(&output::line(&Value::Object(command), false), fds)?;
        loop {
            let Value::Object(mut answer) = self.next_message()? else {
                return Err(ClientError::Protocol("an answer is no object".to_owned()));
            };
            if answer.contains_key("event") {
                self.keep_event(answer)?;
                continue;
            }
            if let Some(error) = answer.remove("error") {
                // A parse error has no id; it can only be about what was just sent.
                let text = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
                return Err(ClientError::Qmp { class: text("class"), desc: text("desc") });
            }
            if answer.get("id") != Some(&id) {
                return Err(ClientError::Protocol(format!("an answer to {name} without its id")));
            }
            return answer.remove("return").ok_or_else(|| ClientError::Protocol("an answer without return".to_owned()));
        }
    }

    /// The events that came while commands were waited for, oldest first; none is told twice.
    pub fn take_events(&mut self) -> Vec<ReceivedEvent> {
        self.events.drain(..).collect()
    }

    /// Waits for the next event.
    ///
    /// # Errors
    /// The connection's.
    pub fn wait_event(&mut self) -> Result<ReceivedEvent, ClientError> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            match self.next_message()? {
                Value::Object(message) if message.contains_key("event") => self.keep_event(message)?,
                _ => return Err(ClientError::Protocol("an answer that nothing asked for".to_owned())),
            }
        }
    }

    fn keep_event(&mut self, mut message: Map<String, Value>) -> Result<(), ClientError> {
        let Some(Value::String(name)) = message.remove("event") else {
            return Err(ClientError::Protocol("an event without a name".to_owned()));
        };
        let data = message.remove("data").unwrap_or_default();
        let stamp =
            |unit: &str| message.get("timestamp").and_then(|t| t.get(unit)).and_then(Value::as_u64).unwrap_or(0);
        let timestamp =
            Duration::from_secs(stamp("seconds")).saturating_add(Duration::from_micros(stamp("microseconds")));
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(ReceivedEvent { name, data, timestamp });
        Ok(())
    }

    fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut sent = 0;
        while sent < bytes.len() {
            let mut control = SendAncillaryBuffer::new(&mut space);
            // The descriptors leave with the first bytes; what did not fit follows without them.
            if sent == 0 && !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "more than 253 descriptors").into());
            }
            let rest = [IoSlice::new(&bytes[sent..])];
            match rustix::net::sendmsg(&self.socket, &rest, &mut control, SendFlags::NOSIGNAL) {
                Ok(n) => sent += n,
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(ClientError::Closed),
                Err(e) => return Err(timed(e).into()),
            }
        }
        Ok(())
    }

    fn next_message(&mut self) -> Result<Value, ClientError> {
        loop {
            let (used, message) = self.parser.feed(&self.received[self.used..]);
            self.used += used;
            if let Some(message) = message {
                return message.map_err(ClientError::Protocol);
            }
            self.received.resize(BLOCK, 0);
            self.used = 0;
            let read = rustix::net::recv(&self.socket, &mut self.received[..], RecvFlags::empty());
            self.received.truncate(read.as_ref().map_or(0, |&(_, n)| n));
            match read {
                Ok((_, 0)) | Err(Errno::CONNRESET) => return Err(ClientError::Closed),
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(timed(e).into()),
            }
        }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A socket's timeout shows as `EAGAIN`.
fn timed(e: Errno) -> io::Error {
    if e == Errno::AGAIN { io::ErrorKind::TimedOut.into() } else { e.into() }
}
