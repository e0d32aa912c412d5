// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The NBD server: a passed listening socket, the exports that its clients may choose, a thread for each client.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::net::SocketFlags;
use tracing::{debug, warn};

use super::buffers::Spares;
use super::channel::Channel;
use super::context::{Chosen, Context};
use super::export::{Export, Settings};
use super::handshake::{self, Agreed, Exports};
use super::moving::{Moved, Moving};
use super::reply::Style;
use super::stream::Stream;
use super::tls::Tls;
use super::transmission::{self, End};
use crate::workers::Workers;

/// Stack of a connection's thread in bytes: all large buffers are on the heap.
const STACK: usize = 256 << 10;

/// How long clients that negotiate hold up others that are to move.
const NEGOTIATION: Duration = Duration::from_millis(100);

/// Bounds on what clients can take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most clients at once, in negotiation or beyond; 0 is no limit. Further ones wait in the listener's queue.
    pub connections: usize,
    /// How long a client may take to choose an export; zero is no limit.
    pub handshake: Duration,
    /// When they are let in.
    pub admission: Admission,
}

/// When clients are let in; before that they wait in the listener's queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// From the start.
    AtOnce,
    /// Once there is an export to choose.
    FirstExport,
    /// At [`Server::admit`].
    WhenTold,
}

impl Default for Limits {
    /// QEMU's defaults: 100 clients, 10 seconds.
    fn default() -> Limits {
        Limits { connections: 100, handshake: Duration::from_secs(10), admission: Admission::AtOnce }
    }
}

/// A running server.
pub struct Server {
    shared: Arc<Shared>,
    listener: Option<JoinHandle<()>>,
}

struct Shared {
    limits: Limits,
    tls: Option<Tls>,
    workers: Workers,
    spares: Spares,
    /// Called when a client has left or the listener has ended.
    changed: Box<dyn Fn() + Send + Sync>,
    /// Readable when the listener's thread should look up from its sleep.
    wake: OwnedFd,
    /// The sign that clients are to move.
    moving: Moving,
    /// The number of the listening socket, which its thread owns.
    listener: RawFd,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    exports: BTreeMap<String, Arc<Export>>,
    clients: BTreeMap<u64, Arc<Stream>>,
    next_client: u64,
    /// Clients are let in.
    open: bool,
    /// A client has chosen an export.
    served: bool,
    stopping: bool,
    /// Clients that have stopped, to move.
    moved: Vec<Waiting>,
}

/// A client that has stopped: its stream, until nobody else holds it, and all else.
type Waiting = (Arc<Stream>, Arc<Export>, Style, Vec<(u32, String)>, Vec<u8>);

impl Server {
    /// Serves clients of `listener`, a listening stream socket; with `tls` only those that begin it. `changed` is called from any thread when a client has left.
    ///
    /// # Errors
    /// `EMFILE`, or no thread to be had.
    pub fn start(
        listener: OwnedFd,
        limits: Limits,
        tls: Option<Tls>,
        workers: Workers,
        changed: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<Server> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let state = Mutex::new(State { open: limits.admission == Admission::AtOnce, ..State::default() });
        let number = listener.as_raw_fd();
        let moving = Moving::new()?;
        let shared = Arc::new(Shared {
            limits,
            tls,
            workers,
            spares: Spares::default(),
            changed: Box::new(changed),
            wake,
            moving,
            listener: number,
            state,
        });
        let accepting = Arc::clone(&shared);
        let thread = thread::Builder::new().name("nbd-listen".into()).stack_size(STACK);
        let listener = thread.spawn(move || accepting.accept_all(&listener))?;
        Ok(Server { shared, listener: Some(listener) })
    }

    /// Offers an export. `None` if its name is taken.
    pub fn add(&self, settings: Settings) -> Option<Arc<Export>> {
        let mut state = self.shared.lock();
        if state.exports.contains_key(&settings.name) {
            return None;
        }
        let export = Arc::new(Export::new(settings, self.shared.limits.connections == 1));
        state.exports.insert(export.name().to_owned(), Arc::clone(&export));
        state.open |= self.shared.limits.admission == Admission::FirstExport;
        drop(state);
        self.shared.wake_listener();
        Some(export)
    }

    /// Lets clients in, whatever they wait for.
    pub fn admit(&self) {
        self.shared.lock().open = true;
        self.shared.wake_listener();
    }

    /// Withdraws an export and hangs up on its clients; it is in use until [`Export::clients`] is 0.
    pub fn remove(&self, name: &str) {
        let removed = self.shared.lock().exports.remove(name);
        if let Some(export) = removed {
            export.close();
        }
    }

    /// Whether a client has been served and none is connected any more.
    pub fn is_served_out(&self) -> bool {
        let state = self.shared.lock();
        state.served && state.clients.is_empty()
    }

    /// Number of every descriptor that the server holds, and what it is.
    pub fn descriptors(&self) -> Vec<(i32, String)> {
        let own = [
            (self.shared.listener, "the NBD server's listener".to_owned()),
            (self.shared.wake.as_raw_fd(), "the NBD server's wake-ups".to_owned()),
            (self.shared.moving.as_fd().as_raw_fd(), "the NBD server's sign to move".to_owned()),
        ];
        let state = self.shared.lock();
        let clients = state.clients.iter().map(|(client, stream)| (stream.number(), format!("NBD client {client}")));
        own.into_iter().chain(clients).collect()
    }

    /// Lets nobody in any more, has every client stop at the boundary of a request with nothing under way, and gives them away.
    /// Those who negotiate have 100 ms to come that far. Those who have not stopped in time or use TLS are hung up on. Then the server [stops](Server::stop).
    pub fn move_clients(mut self, patience: Duration) -> Vec<Moved> {
        self.shared.moving.begin();
        self.shared.wake_listener();
        // What is encrypted does not move, so there is nothing to wait for.
        let deadline = Instant::now() + if self.shared.tls.is_some() { Duration::ZERO } else { patience };
        let serving = || {
            let exports: Vec<_> = self.shared.lock().exports.values().cloned().collect();
            exports.iter().map(|export| export.clients()).sum::<usize>()
        };
        let negotiated = Instant::now() + NEGOTIATION;
        while (serving() > 0 && Instant::now() < deadline) || (self.clients() > 0 && Instant::now() < negotiated) {
            thread::sleep(Duration::from_micros(100));
        }
        let moved = std::mem::take(&mut self.shared.lock().moved);
        self.shut_down();
        let own = |(mut stream, export, style, contexts, received): Waiting| {
            // Its thread is about to end, and lets go of it.
            let stream = loop {
                match Arc::try_unwrap(stream) {
                    Ok(stream) => break stream,
                    Err(shared) => stream = shared,
                }
                thread::yield_now();
            };
            Moved { socket: stream.into_socket(), export: export.name().to_owned(), style, contexts, received }
        };
        moved.into_iter().map(own).collect()
    }

    /// Goes on with a client that another process has served.
    ///
    /// # Errors
    /// There is no such export or context, or no thread to be had; the client is then hung up on.
    pub fn take_client(&self, client: Moved) -> Result<(), String> {
        let Moved { socket, export, style, contexts, received } = client;
        let Some(export) = self.shared.named(&export) else { return Err(format!("export '{export}' not present")) };
        if received.len() >= style.request_len() {
            return Err("more than the beginning of a request has come".into());
        }
        let known = Context::of(&export);
        let chosen = contexts.into_iter().map(|(id, name)| {
            let context = known.iter().find(|context| context.name() == name);
            let context = context.ok_or_else(|| format!("export '{}' has no context '{name}'", export.name()))?;
            Ok::<_, String>(Chosen { id, context: context.clone() })
        });
        let contexts = chosen.collect::<Result<Vec<Chosen>, String>>()?.into();
        self.shared.welcome(socket, Some((Agreed { export, style, contexts }, received)));
        Ok(())
    }

    /// Number of clients, those in negotiation included.
    pub fn clients(&self) -> usize {
        self.shared.lock().clients.len()
    }

    /// Closes the listener, withdraws every export and hangs up on every client. Returns when the listener is closed.
    pub fn stop(mut self) {
        self.shut_down();
    }

    fn shut_down(&mut self) {
        let exports = {
            let mut state = self.shared.lock();
            state.stopping = true;
            for stream in state.clients.values() {
                stream.hang_up();
            }
            std::mem::take(&mut state.exports)
        };
        for export in exports.into_values() {
            export.close();
        }
        self.shared.wake_listener();
        if let Some(listener) = self.listener.take() {
            let _ = listener.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shut_down();
    }
}

impl Exports for Shared {
    fn named(&self, name: &str) -> Option<Arc<Export>> {
        self.lock().exports.get(name).cloned()
    }

    fn all(&self) -> Vec<Arc<Export>> {
        self.lock().exports.values().cloned().collect()
    }

    fn tls(&self) -> Option<&Tls> {
        self.tls.as_ref()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_listener(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// The listener's thread.
    fn accept_all(self: &Arc<Shared>, listener: &OwnedFd) {
        let mut resting = false;
        loop {
            let closed = {
                let state = self.lock();
                if state.stopping {
                    return;
                }
                let full = self.limits.connections != 0 && state.clients.len() >= self.limits.connections;
                full || !state.open || self.moving.has_begun()
            };
            let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
            if !closed && !resting {
                fds.push(PollFd::new(listener, PollFlags::IN));
            }
            // Out of descriptors the listener stays readable: rest until a client leaves, or a moment.
            let rest = rustix::event::Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
            if poll(&mut fds, resting.then_some(&rest)).is_err() {
                continue;
            }
            resting = false;
            let mut count = [0; 8];
            let _ = rustix::io::read(&self.wake, &mut count);
            if fds.get(1).is_none_or(|fd| fd.revents().is_empty()) {
                continue;
            }
            match rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
                Ok(socket) => self.welcome(socket, None),
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    warn!("no descriptor left for a new NBD client");
                    resting = true;
                }
                Err(Errno::INVAL | Errno::BADF | Errno::NOTSOCK) => {
                    warn!("the NBD listener does not listen any more");
                    return;
                }
                Err(_) => {}
            }
        }
    }

    /// Starts a client's thread, which negotiates unless that was done elsewhere.
    fn welcome(self: &Arc<Shared>, socket: OwnedFd, agreed: Option<(Agreed, Vec<u8>)>) {
        let stream = Arc::new(Stream::new(socket));
        let client = {
            let mut state = self.lock();
            let client = state.next_client;
            state.next_client += 1;
            state.clients.insert(client, Arc::clone(&stream));
            client
        };
        let shared = Arc::clone(self);
        let thread = thread::Builder::new().name(format!("nbd-{client}")).stack_size(STACK);
        if let Err(e) = thread.spawn(move || shared.serve(client, stream, agreed)) {
            warn!(client, "no thread for a new NBD client: {e}");
            self.lock().clients.remove(&client);
        }
    }

    /// A client's thread, from greeting, or where another process has left off, to end.
    fn serve(&self, client: u64, stream: Arc<Stream>, agreed: Option<(Agreed, Vec<u8>)>) {
        // Leaves the books on every way out, a panic included.
        let _present = Present { shared: self, client };
        let deadline = (!self.limits.handshake.is_zero()).then(|| Instant::now() + self.limits.handshake);
        let mut channel = Channel::new(Arc::clone(&stream));
        let (agreed, received) = match agreed {
            Some(agreed) => agreed,
            None => match handshake::negotiate(&mut channel, self, deadline) {
                Ok(Some(agreed)) => (agreed, Vec::new()),
                Ok(None) => return channel.end(),
                Err(e) => return debug!(client, "NBD negotiation: {e}"),
            },
        };
        let Some(meter) = agreed.export.enter(client, &stream) else { return };
        self.lock().served = true;
        let _inside = Inside { export: &agreed.export, client };
        match transmission::serve(&mut channel, &agreed, meter, &self.workers, &self.moving, &self.spares, &received) {
            Ok(End::Moved(received)) => {
                let contexts = agreed.contexts.iter().map(|chosen| (chosen.id, chosen.context.name())).collect();
                let export = Arc::clone(&agreed.export);
                let mut state = self.lock();
                // Out of the books before anybody could be hung up on by them.
                state.clients.remove(&client);
                agreed.export.leave(client);
                state.moved.push((stream, export, agreed.style, contexts, received));
                return;
            }
            Ok(End::Over) => {}
            Err(e) => debug!(client, export = agreed.export.name(), "NBD client: {e}"),
        }
        channel.end();
        // The peer learns at once; the descriptor goes with the last of its holders.
        stream.hang_up();
    }
}

struct Inside<'a> {
    export: &'a Export,
    client: u64,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.export.leave(self.client);
    }
}

struct Present<'a> {
    shared: &'a Shared,
    client: u64,
}

impl Drop for Present<'_> {
    fn drop(&mut self) {
        self.shared.lock().clients.remove(&self.client);
        self.shared.wake_listener();
        (self.shared.changed)();
    }
}
