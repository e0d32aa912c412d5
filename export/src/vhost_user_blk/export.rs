// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device on a listening socket: one front end after the other.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{io, thread};

use block::stats::Stats;
use block::{BlockNode, Root};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::SocketFlags;
use tracing::{debug, info, warn};

use super::channel::{Channel, Ended};
use super::queue::Disk;
use super::request::ID;
use super::session::{Cause, Host, Session, moving};
use crate::meter::Meter;
use crate::running::{ClientShown, Running};
use crate::workers::Workers;

/// Most queues of a device: each has a thread.
pub const MOST_QUEUES: u16 = 128;
/// Sizes of logical blocks, bytes.
pub const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=2 << 20;
/// Stack of the device's thread in bytes.
const STACK: usize = 256 << 10;

/// What a device is made of.
#[derive(Debug)]
pub struct Settings {
    /// The export's id: in the log, and cut to 20 bytes what the guest reads as the disk's name.
    pub id: String,
    /// The node.
    pub node: Arc<BlockNode>,
    /// Whether guests may write; the node is then writable too.
    pub writable: bool,
    /// Whether each write is on stable storage when it is answered, whatever the guest says.
    pub writethrough: bool,
    /// Bytes of a logical block: a power of two in [`BLOCK_SIZES`].
    pub block_size: u32,
    /// Queues, 1 to [`MOST_QUEUES`].
    pub queues: u16,
    /// A memfd, of which nobody else has a descriptor, for what is under way. Without it a restart cannot go on where this
    /// process stopped.
    pub inflight: Option<OwnedFd>,
    /// Where another process sends a front end that it had, with which this one goes on ([`Running::move_client`]).
    pub moved: Option<OwnedFd>,
}

/// A served device.
pub struct Export {
    shared: Arc<Shared>,
}

struct Shared {
    id: String,
    disk: Arc<Disk>,
    queues: u16,
    inflight: Option<OwnedFd>,
    workers: Workers,
    stats: Arc<Stats>,
    /// Readable when the session should look around.
    wake: Arc<OwnedFd>,
    /// Readable for ever once the device should end.
    stop: OwnedFd,
    over: AtomicBool,
    client: Mutex<Option<ClientShown>>,
    /// What the session holds.
    books: Mutex<Vec<(RawFd, String)>>,
    /// Where the session goes when the device ends.
    moving: Mutex<Option<OwnedFd>>,
    listener: RawFd,
    /// Called when a front end has left and when the device has ended.
    changed: Box<dyn Fn() + Send + Sync>,
}

impl Export {
    /// Serves front ends of `listener`, a listening unix stream socket. `changed` is called from any thread when one has left
    /// and when the export is over.
    ///
    /// # Errors
    /// `EMFILE`, or no thread to be had.
    pub fn start(
        listener: OwnedFd,
        settings: Settings,
        workers: Workers,
        changed: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<Export> {
        let Settings { id, node, writable, writethrough, block_size, queues, inflight, moved } = settings;
        let mut name = [0; ID];
        let len = id.len().min(ID);
        name[..len].copy_from_slice(&id.as_bytes()[..len]);
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let shared = Arc::new(Shared {
            id,
            disk: Arc::new(Disk {
                root: Root::new(node),
                writable,
                writethrough,
                block_size,
                id: name,
                write_back: AtomicBool::new(!writethrough),
            }),
            queues,
            inflight,
            workers,
            stats: Arc::default(),
            wake: Arc::new(event()?),
            stop: event()?,
            over: AtomicBool::new(false),
            client: Mutex::default(),
            books: Mutex::default(),
            moving: Mutex::default(),
            listener: listener.as_raw_fd(),
            changed: Box::new(changed),
        });
        let serving = Arc::clone(&shared);
        let thread = thread::Builder::new().name("vhost-user".into()).stack_size(STACK);
        thread.spawn(move || {
            let _ = catch_unwind(AssertUnwindSafe(|| serving.serve(&listener, moved)));
            drop(listener);
            serving.over.store(true, Ordering::Release);
            (serving.changed)();
        })?;
        Ok(Export { shared })
    }
}

impl Running for Export {
    fn root(&self) -> &Arc<Root> {
        &self.shared.disk.root
    }

    fn stats(&self) -> &Arc<Stats> {
        &self.shared.stats
    }

    fn clients(&self) -> Vec<ClientShown> {
        lock(&self.shared.client).iter().cloned().collect()
    }

    fn is_in_use(&self) -> bool {
        lock(&self.shared.client).is_some()
    }

    fn close(&self) {
        let _ = rustix::io::write(&self.shared.stop, &1u64.to_ne_bytes());
    }

    fn move_client(&self, to: OwnedFd) -> bool {
        *lock(&self.shared.moving) = Some(to);
        self.close();
        true
    }

    fn is_over(&self) -> bool {
        self.shared.over.load(Ordering::Acquire)
    }

    fn has_ended_itself(&self) -> bool {
        self.is_over()
    }

    fn size_changed(&self) {
        let _ = rustix::io::write(&*self.shared.wake, &1u64.to_ne_bytes());
    }

    fn descriptors(&self) -> Vec<(i32, String)> {
        let Shared { id, inflight, wake, stop, listener, over, .. } = &*self.shared;
        let mut held = vec![
            (wake.as_raw_fd(), format!("wake-ups of vhost-user export '{id}'")),
            (stop.as_raw_fd(), format!("end of vhost-user export '{id}'")),
        ];
        held.extend(
            inflight.iter().map(|fd| (fd.as_raw_fd(), format!("in-flight memory of vhost-user export '{id}'"))),
        );
        if !over.load(Ordering::Acquire) {
            held.push((*listener, format!("listener of vhost-user export '{id}'")));
        }
        held.extend(
            lock(&self.shared.moving).iter().map(|fd| (fd.as_raw_fd(), format!("way out of vhost-user export '{id}'"))),
        );
        held.extend(lock(&self.shared.books).iter().cloned());
        held
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.close();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// The device's thread.
    fn serve(&self, listener: &OwnedFd, moved: Option<OwnedFd>) {
        let mut client = 0;
        if let Some(moved) = moved {
            match moving::receive_socket(moved.as_fd()) {
                Ok(socket) => {
                    self.welcome(client, socket, Some(&Channel::new(moved)));
                    client += 1;
                }
                Err(e) => debug!(export = self.id, "no front end to go on with: {e}"),
            }
        }
        let mut resting = false;
        loop {
            let mut fds = vec![PollFd::new(&self.stop, PollFlags::IN)];
            if !resting {
                fds.push(PollFd::new(listener, PollFlags::IN));
            }
            // Out of descriptors the listener stays readable: rest a moment.
            let rest = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
            let polled = poll(&mut fds, resting.then_some(&rest));
            resting = false;
            if polled.is_ok() && !fds[0].revents().is_empty() {
                return;
            }
            if polled.is_err() || fds.get(1).is_none_or(|fd| fd.revents().is_empty()) {
                continue;
            }
            match rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
                Ok(socket) => {
                    self.welcome(client, socket, None);
                    client += 1;
                }
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    warn!(export = self.id, "no descriptor left for a vhost-user front end");
                    resting = true;
                }
                Err(Errno::INVAL | Errno::BADF | Errno::NOTSOCK) => {
                    warn!(export = self.id, "the vhost-user listener does not listen any more");
                    return;
                }
                Err(_) => {}
            }
        }
    }

    /// Serves a front end to its end; `passed` has what it said to another process.
    fn welcome(&self, id: u64, socket: OwnedFd, passed: Option<&Channel>) {
        let peer = sys::process::peer(&socket).map_or_else(|_| "unknown".to_owned(), |peer| peer.to_string());
        let meter = Meter::new(Arc::clone(&self.stats), Arc::clone(&self.disk.root));
        *lock(&self.client) = Some(ClientShown { id, peer, stats: Arc::clone(meter.client()) });
        info!(export = self.id, client = id, "vhost-user front end connected");
        let channel = Channel::new(socket);
        // Each front end begins with the cache mode that configuration space shows first.
        self.disk.write_back.store(!self.disk.writethrough, Ordering::Relaxed);
        let host = Host {
            disk: &self.disk,
            queues: self.queues,
            workers: &self.workers,
            inflight: self.inflight.as_ref(),
            wake: &self.wake,
            stop: &self.stop,
            books: &self.books,
            moving: &self.moving,
        };
        let cause = catch_unwind(AssertUnwindSafe(|| Session::new(host, &channel, meter).run(passed)));
        match cause {
            Ok(Cause::Channel(Ended::Broken(fault))) => {
                warn!(export = self.id, client = id, "the vhost-user front end was hung up on: {fault}");
            }
            Ok(Cause::Corrupt(queue, corrupt)) => {
                warn!(
                    export = self.id,
                    client = id,
                    queue,
                    "the guest's virtqueue is corrupt, its device has ended: {corrupt}"
                );
            }
            Ok(Cause::Host(e)) => {
                warn!(export = self.id, client = id, "the vhost-user front end cannot be served: {e}");
            }
            Ok(Cause::Channel(Ended::Gone(e))) => debug!(export = self.id, client = id, "vhost-user front end: {e}"),
            Ok(Cause::Channel(Ended::Stopped)) => debug!(export = self.id, client = id, "the vhost-user export ends"),
            Err(_) => warn!(export = self.id, client = id, "a bug ended the vhost-user front end's session"),
        }
        lock(&self.books).clear();
        *lock(&self.client) = None;
        drop(channel);
        (self.changed)();
    }
}
