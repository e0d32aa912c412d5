// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A monitor: a socket on which one client at a time is served, the next one waiting in the listener's queue.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Instant, SystemTime};

use fdset::{Keeper, Peer};
use qmp::{Connection, Message, Received, Session, Table};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::SocketFlags;
use serde_json::Value;

use crate::control::MonitorSetup;
use crate::ledger::{Held, Owner};
use crate::state::{Daemon, MonitorId, Speaker};

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
    peer: Option<Peer>,
    /// The client has shut down its side: what came before is still answered.
    ended: bool,
    parked: Option<Parked>,
}

/// A command that failed for want of a descriptor, and is tried again when one is passed.
struct Parked {
    message: Value,
    /// What it is answered if none comes.
    answer: Vec<u8>,
    until: Instant,
    /// [`Daemon::additions`] when it was tried last.
    seen: u64,
}

/// A monitor and its present client.
pub struct Monitor {
    id: MonitorId,
    listener: Option<OwnedFd>,
    client: Option<Client>,
    pretty: bool,
    /// By which what its clients pass lives.
    keeper: Keeper,
    /// Whose processes alone are served.
    peer_uid: Option<u32>,
}

impl Monitor {
    /// A monitor as `setup` wants it; a connected client is greeted.
    ///
    /// # Errors
    /// The socket cannot be used.
    pub fn new(id: MonitorId, setup: MonitorSetup, table: &Table<Daemon>, daemon: &mut Daemon) -> io::Result<Monitor> {
        let MonitorSetup { source, pretty, lifetime, peer_uid } = setup;
        let keeper = lifetime.map_or_else(Keeper::default, |lifetime| daemon.fdsets.keeper(lifetime));
        let mut monitor = Monitor { id, listener: None, client: None, pretty, keeper, peer_uid };
        match source {
            Source::Listener(listener) => monitor.listener = Some(listener),
            Source::Connected(socket) => monitor.welcome(socket, table, daemon)?,
        }
        monitor.enter_books(daemon);
        Ok(monitor)
    }

    /// Whether nobody is there and nobody will come.
    pub fn is_over(&self) -> bool {
        self.listener.is_none() && self.client.is_none()
    }

    /// Whether client after client may come.
    pub fn listens(&self) -> bool {
        self.listener.is_some()
    }

    /// What to poll, and for what; nothing for a monitor that is over.
    pub fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        match (&self.client, &self.listener) {
            (Some(client), _) => {
                let mut flags = PollFlags::empty();
                if client.wants_input() && !client.ended {
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
        self.client.as_ref().is_some_and(|client| client.connection.has_unparsed() && client.wants_input())
    }

    /// Takes a waiting client in, or reads from the present one and runs its next command. The answer is not sent yet: the
    /// events of a command go out before it, as in QEMU.
    pub fn advance(&mut self, table: &Table<Daemon>, daemon: &mut Daemon) -> Vec<u8> {
        let answer = match &self.client {
            None => {
                self.accept(table, daemon);
                Vec::new()
            }
            // Nothing is read while a command waits, so this can only be the end.
            Some(client) if client.parked.is_some() => {
                if client.connection.is_hung_up() {
                    self.part(daemon);
                }
                Vec::new()
            }
            Some(_) => self.serve(table, daemon).unwrap_or_else(|e| {
                tracing::debug!(monitor = self.id, "client: {e}");
                self.part(daemon);
                Vec::new()
            }),
        };
        self.enter_books(daemon);
        answer
    }

    /// When a waiting command is answered in any case.
    pub fn deadline(&self) -> Option<Instant> {
        self.client.as_ref()?.parked.as_ref().map(|parked| parked.until)
    }

    /// Tries a waiting command again if something was passed since, or answers it if its time is over.
    pub fn retry(&mut self, table: &Table<Daemon>, daemon: &mut Daemon) -> Vec<u8> {
        let speaker = self.speaker();
        let Some(client) = &mut self.client else { return Vec::new() };
        let Some(mut parked) = client.parked.take() else { return Vec::new() };
        if parked.seen != daemon.additions {
            parked.seen = daemon.additions;
            daemon.enter(speaker);
            parked.answer = client.session.dispatch(table, daemon, Message::from(parked.message.clone()));
            if daemon.wants.take().is_none() {
                return parked.answer;
            }
        }
        if parked.until <= Instant::now() {
            return parked.answer;
        }
        client.parked = Some(parked);
        Vec::new()
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
    pub fn flush(&mut self, daemon: &mut Daemon) {
        let Some(client) = &mut self.client else { return };
        match client.connection.flush() {
            Ok(all) => {
                if all && client.ended && client.parked.is_none() && !client.connection.has_unparsed() {
                    self.part(daemon);
                }
            }
            Err(_) => self.part(daemon),
        }
    }

    /// Lets the client go, with everything that lived for it.
    fn part(&mut self, daemon: &mut Daemon) {
        let Some(mut client) = self.client.take() else { return };
        let pending = client.session.pending();
        pending.clear();
        let strays = pending.take_strays() + client.connection.carried().len();
        let dropped = client.connection.dropped_events();
        if dropped > 0 {
            tracing::warn!(monitor = self.id, "a client that did not read was not told {dropped} events");
        }
        drop(client);
        daemon.strayed(self.id, strays);
        daemon.monitor_left(self.keeper);
        self.enter_books(daemon);
    }

    fn speaker(&self) -> Speaker {
        let peer = self.client.as_ref().and_then(|client| client.peer);
        Speaker { monitor: self.id, keeper: self.keeper, peer }
    }

    /// Tells the ledger what this monitor holds.
    fn enter_books(&self, daemon: &mut Daemon) {
        let mut held = Vec::new();
        let monitor = self.id;
        if let Some(listener) = &self.listener {
            held.push(Held::new(listener.as_raw_fd(), Owner::Monitor, format!("monitor {monitor}'s listener")));
        }
        if let Some(client) = &self.client {
            let socket = client.connection.as_fd().as_raw_fd();
            held.push(Held::new(socket, Owner::Monitor, format!("monitor {monitor}'s client")));
            let unclaimed = client.connection.carried().into_iter().chain(client.session.unclaimed());
            held.extend(unclaimed.map(|fd| Held::new(fd, Owner::Message, format!("of monitor {monitor}'s client"))));
        }
        daemon.ledger.set_monitor(monitor, held);
    }

    fn accept(&mut self, table: &Table<Daemon>, daemon: &mut Daemon) {
        let Some(listener) = &self.listener else { return };
        let mut accepted = rustix::net::accept_with(listener, SocketFlags::CLOEXEC);
        if matches!(accepted, Err(Errno::MFILE)) && daemon.reserve.give() {
            accepted = rustix::net::accept_with(listener, SocketFlags::CLOEXEC);
        }
        match accepted {
            Ok(socket) => {
                if let Err(e) = self.welcome(socket, table, daemon) {
                    tracing::warn!(monitor = self.id, "a client could not be served: {e}");
                }
            }
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            Err(e) => tracing::warn!(monitor = self.id, "no client could be accepted: {e}"),
        }
    }

    fn welcome(&mut self, socket: OwnedFd, table: &Table<Daemon>, daemon: &mut Daemon) -> io::Result<()> {
        let peer = sys::process::peer(&socket).ok().map(|sys::process::Peer { pid, uid }| Peer { pid, uid });
        // By the kernel's word, of the moment of connecting. Who cannot be told is not served either.
        if let Some(wanted) = self.peer_uid
            && peer.map(|peer| peer.uid) != Some(wanted)
        {
            let uid = peer.map(|peer| peer.uid);
            tracing::warn!(monitor = self.id, uid, "a client of another user than {wanted} was turned away");
            return Ok(());
        }
        let mut connection = Connection::new(socket)?;
        let session = Session::new(self.pretty);
        connection.send(&session.greeting(table));
        self.client = Some(Client { connection, session, peer, ended: false, parked: None });
        daemon.fdsets.monitor_connected(self.keeper);
        self.flush(daemon);
        Ok(())
    }

    fn serve(&mut self, table: &Table<Daemon>, daemon: &mut Daemon) -> io::Result<Vec<u8>> {
        let speaker = self.speaker();
        let Some(client) = &mut self.client else { return Ok(Vec::new()) };
        if !client.connection.has_unparsed() && client.connection.receive()? == Received::End {
            client.ended = true;
        }
        if !client.session.wants_input() {
            return Ok(Vec::new());
        }
        let Some(message) = client.connection.next_message() else { return Ok(Vec::new()) };
        daemon.enter(speaker);
        let patience = daemon.fdset_events.wanted;
        let again = patience.and_then(|_| message.content.clone().ok());
        let answer = client.session.dispatch(table, daemon, message);
        let strays = client.session.pending().take_strays();
        daemon.strayed(self.id, strays);
        let (Some(wanted), Some(patience), Some(message)) = (daemon.wants.take(), patience, again) else {
            return Ok(answer);
        };
        daemon.events.push(("FDSET_WANTED", wanted.event(patience.as_secs())));
        client.parked = Some(Parked { message, answer, until: Instant::now() + patience, seen: daemon.additions });
        Ok(Vec::new())
    }
}

impl Client {
    /// Whether the next command may be read: not while one waits for a descriptor.
    fn wants_input(&self) -> bool {
        self.parked.is_none() && self.session.wants_input()
    }
}
