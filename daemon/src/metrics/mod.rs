// SPDX-License-Identifier: Apache-2.0 OR MIT
//! OpenMetrics for scrapers: [`text`] is what they read, [`http`] as much of HTTP as they need.
//!
//! A thread talks to them, one after the other and each for a few seconds at most; the text is made by the control thread,
//! which alone may look at everything. So a scraper that is slow holds up other scrapers, and nothing else.

mod http;
mod text;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::net::SocketFlags;
use tracing::warn;

pub use text::render;

use crate::wake::Wake;

/// The server, if there is one.
#[derive(Default)]
pub struct Metrics(Option<Server>);

impl Metrics {
    /// Whether there is one.
    pub fn is_running(&self) -> bool {
        self.0.is_some()
    }

    /// Takes one.
    pub fn put(&mut self, server: Server) {
        self.0 = Some(server);
    }

    /// Ends it; false if there was none.
    pub fn stop(&mut self) -> bool {
        self.0.take().is_some()
    }

    /// Those who wait for a text.
    pub fn waiting(&self) -> Vec<Sender<String>> {
        let server = self.0.as_ref();
        server.and_then(|server| server.0.waiting().as_mut().map(std::mem::take)).unwrap_or_default()
    }

    /// Number of every descriptor of the server and what it is. A scraper's connection is not among them: it is gone within
    /// seconds.
    pub fn descriptors(&self) -> Vec<(RawFd, String)> {
        let Some(Server(shared, ..)) = &self.0 else { return Vec::new() };
        let mut held = vec![
            (shared.listener, "the metrics server's listener".to_owned()),
            (shared.stop.as_raw_fd(), "the metrics server's wake-ups".to_owned()),
        ];
        let scraper = *shared.scraper.lock().unwrap_or_else(PoisonError::into_inner);
        held.extend(scraper.map(|fd| (fd, "a scraper".to_owned())));
        held
    }
}

/// A running server. Dropping it closes its socket.
pub struct Server(Arc<Shared>, Option<JoinHandle<()>>);

struct Shared {
    /// Told that somebody waits.
    wake: Arc<Wake>,
    /// Those who wait for a text; `None` once nobody will make one any more.
    waiting: Mutex<Option<Vec<Sender<String>>>>,
    /// Readable for ever once the thread should end.
    stop: OwnedFd,
    listener: RawFd,
    /// The number of the connection that is being answered.
    scraper: Mutex<Option<RawFd>>,
}

impl Server {
    /// Serves scrapers of `listener`, a listening stream socket.
    ///
    /// # Errors
    /// `EMFILE`, or no thread to be had.
    pub fn start(listener: OwnedFd, wake: Arc<Wake>) -> io::Result<Server> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let number = listener.as_raw_fd();
        let waiting = Mutex::new(Some(Vec::new()));
        let shared = Arc::new(Shared { wake, waiting, stop, listener: number, scraper: Mutex::default() });
        let serving = Arc::clone(&shared);
        let thread = thread::Builder::new().name("metrics".into()).stack_size(256 << 10);
        let thread = thread.spawn(move || serving.serve(&listener))?;
        Ok(Server(shared, Some(thread)))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.0.stop, &1u64.to_ne_bytes());
        // Whoever waits for a text gets none: this is the thread that would make it.
        *self.0.waiting() = None;
        if let Some(thread) = self.1.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Option<Vec<Sender<String>>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, listener: &OwnedFd) {
        loop {
            let mut fds = [PollFd::new(&self.stop, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
            if poll(&mut fds, None).is_err() {
                continue;
            }
            let [stop, client] = fds.map(|fd| !fd.revents().is_empty());
            if stop {
                return;
            }
            if !client {
                continue;
            }
            match rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
                Ok(socket) => {
                    let present = Present::new(&self.scraper, socket.as_raw_fd());
                    http::answer(&socket, &self.stop, || self.text());
                    // First the number goes, then what it stands for.
                    drop(present);
                }
                Err(Errno::INVAL | Errno::BADF | Errno::NOTSOCK) => {
                    return warn!("the listener for metrics does not listen any more");
                }
                Err(_) => thread::sleep(std::time::Duration::from_millis(100)),
            }
        }
    }

    /// Asks the control thread. `None` if it has other plans.
    fn text(&self) -> Option<String> {
        let (sender, receiver): (_, Receiver<String>) = channel();
        self.waiting().as_mut()?.push(sender);
        self.wake.up();
        receiver.recv_timeout(http::PATIENCE).ok()
    }
}

struct Present<'a>(&'a Mutex<Option<RawFd>>);

impl Present<'_> {
    fn new(place: &Mutex<Option<RawFd>>, fd: RawFd) -> Present<'_> {
        *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(fd);
        Present(place)
    }
}

impl Drop for Present<'_> {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
