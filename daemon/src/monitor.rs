// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A monitor: a socket on which one client at a time is served, the next one waiting in the listener's queue.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::SystemTime;

use qmp::{Connection, Received, Session, Table};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::SocketFlags;
use serde_json::Value;

use crate::state::{Daemon, MonitorId};

/// Where a monitor's clients come from.
#[derive(Debug)]
pub enum Source {
    /// A listening stream socket: client after client.
    Listener(OwnedFd),
    /// One connected client, and no way back in.
    Connected(OwnedFd),
}

struct Client {
    connection: Connection,
    session: Session,
    /// The client has shut down its side: what came before is still answered.
    ended: bool,
}

/// A monitor and its present client.
pub struct Monitor {
    id: MonitorId,
    listener: Option<OwnedFd>,
    client: Option<Client>,
    pretty: bool,
}

impl Monitor {
    /// A monitor over `source`; a connected client is greeted.
    ///
    /// # Errors
    /// The socket cannot be used.
    pub fn new(id: MonitorId, source: Source, pretty: bool, table: &Table<Daemon>) -> io::Result<Monitor> {
        let mut monitor = Monitor { id, listener: None, client: None, pretty };
        match source {
            Source::Listener(listener) => monitor.listener = Some(listener),
            Source::Connected(socket) => monitor.welcome(socket, table)?,
        }
        Ok(monitor)
    }

    /// Whether nobody is there and nobody will come.
    pub fn is_over(&self) -> bool {
        self.listener.is_none() && self.client.is_none()
    }

    /// What to poll, and for what; nothing for a monitor that is over.
    pub fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        match (&self.client, &self.listener) {
            (Some(client), _) => {
                let mut flags = PollFlags::empty();
                if client.session.wants_input() && !client.ended {
                    flags |= PollFlags::IN;
                }
                if client.connection.unsent() > 0 {
                    flags |= PollFlags::OUT;
                }
                Some((client.connection.as_fd(), flags))
            }
            (None, Some(listener)) => Some((listener.as_fd(), PollFlags::IN)),
            (None, None) => None,
        }
    }

    /// Whether received commands wait: polling must not sleep.
    pub fn is_busy(&self) -> bool {
        self.client.as_ref().is_some_and(|client| client.connection.has_unparsed() && client.session.wants_input())
    }

    /// Takes a waiting client in, or reads from the present one and runs its next command. The answer is not sent yet: the
    /// events of a command go out before it, as in QEMU.
    pub fn advance(&mut self, table: &Table<Daemon>, daemon: &mut Daemon) -> Vec<u8> {
        if self.client.is_none() {
            self.accept(table);
            return Vec::new();
        }
        self.serve(table, daemon).unwrap_or_else(|e| {
            tracing::debug!(monitor = self.id, "client: {e}");
            self.client = None;
            Vec::new()
        })
    }

    /// Queues an answer to the present client.
    pub fn answer(&mut self, bytes: &[u8]) {
        if let Some(client) = &mut self.client {
            client.connection.send(bytes);
        }
    }

    /// Tells a negotiated client about an event.
    pub fn notify(&mut self, name: &str, data: &Value, when: SystemTime) {
        if let Some(client) = &mut self.client
            && let Some(line) = client.session.event(name, Some(data), when)
        {
            client.connection.send_event(&line);
        }
    }

    /// Sends what is ready; a client that has ended and was answered is let go.
    pub fn flush(&mut self) {
        let Some(client) = &mut self.client else { return };
        match client.connection.flush() {
            Ok(all) => {
                if all && client.ended && !client.connection.has_unparsed() {
                    self.client = None;
                }
            }
            Err(_) => self.client = None,
        }
    }

    fn accept(&mut self, table: &Table<Daemon>) {
        let Some(listener) = &self.listener else { return };
        match rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(socket) => {
                if let Err(e) = self.welcome(socket, table) {
                    tracing::warn!(monitor = self.id, "a client could not be served: {e}");
                }
            }
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            Err(e) => tracing::warn!(monitor = self.id, "no client could be accepted: {e}"),
        }
    }

    fn welcome(&mut self, socket: OwnedFd, table: &Table<Daemon>) -> io::Result<()> {
        let mut connection = Connection::new(socket)?;
        let session = Session::new(self.pretty);
        connection.send(&session.greeting(table));
        self.client = Some(Client { connection, session, ended: false });
        self.flush();
        Ok(())
    }

    fn serve(&mut self, table: &Table<Daemon>, daemon: &mut Daemon) -> io::Result<Vec<u8>> {
        let Some(client) = &mut self.client else { return Ok(Vec::new()) };
        if !client.connection.has_unparsed() && client.connection.receive()? == Received::End {
            client.ended = true;
        }
        if !client.session.wants_input() {
            return Ok(Vec::new());
        }
        daemon.enter(self.id);
        let message = client.connection.next_message();
        Ok(message.map(|message| client.session.dispatch(table, daemon, message)).unwrap_or_default())
    }
}
