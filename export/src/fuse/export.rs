// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device `/dev/fuse`, and the threads that take the kernel's requests from it.
//!
//! Threads share one descriptor and wait on epoll instances of their own, of which the kernel wakes one for a request. The
//! last idle thread that gets a request starts another before it does it, up to [`MOST_THREADS`]: so a request that sleeps on
//! a disk holds up nothing until all of them sleep.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{io, thread};

use block::Root;
use block::stats::Stats;
use rustix::event::epoll;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{FileType, OFlags, major, minor};
use rustix::io::Errno;
use tracing::{debug, warn};

use super::file::{File, Settings};
use super::reply::{HEADER_LEN, REPLY_ROOM, Reply};
use super::request::{Operation, REQUEST_ROOM, Request};
use crate::running::{ClientShown, Running};

/// Most threads of one export.
const MOST_THREADS: usize = 16;
/// Stack of a thread in bytes: all large buffers are on the heap.
const STACK: usize = 256 << 10;
/// Numbers of the device `/dev/fuse` (`linux/miscdevice.h`, `FUSE_MINOR`).
const DEVICE: (u32, u32) = (10, 229);
/// How long a freshly mounted device may take to say its first word. It has said it when mount(2) returns.
const GREETING: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Why a descriptor cannot be served.
#[derive(Debug)]
pub enum StartError {
    /// It is not what it must be; a sentence without subject: "is not ...".
    Descriptor(&'static str),
    /// The host failed.
    Io(io::Error),
}

impl From<Errno> for StartError {
    fn from(errno: Errno) -> StartError {
        StartError::Io(errno.into())
    }
}

/// Whether a device begins to be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Session {
    /// The kernel's first word is still to come.
    New,
    /// A process of this version has served it, and died: what was agreed holds, and what it left unanswered is asked again.
    /// Whoever has the file open goes on, and is not among the [clients](Running::clients).
    Resumed,
}

/// A served file.
pub struct Export {
    shared: Arc<Shared>,
}

struct Shared {
    device: OwnedFd,
    /// Readable for ever once the threads should end.
    stop: OwnedFd,
    file: File,
    stopping: AtomicBool,
    /// The kernel has let go of the device.
    ended: AtomicBool,
    threads: AtomicUsize,
    idle: AtomicUsize,
    /// The numbers of the threads' epoll instances.
    waits: Mutex<BTreeSet<RawFd>>,
    /// Called when the last thread has ended.
    changed: Box<dyn Fn() + Send + Sync>,
}

impl Export {
    /// Serves `device`, an open `/dev/fuse` that is mounted, with a regular file as its root, and non-blocking. `changed` is
    /// called from any thread when the export is over.
    ///
    /// # Errors
    /// It is something else, or has been served before; `EMFILE`; no thread to be had.
    pub fn start(
        device: OwnedFd,
        settings: Settings,
        session: Session,
        changed: impl Fn() + Send + Sync + 'static,
    ) -> Result<Export, StartError> {
        check(&device)?;
        let file = File::new(settings);
        match session {
            Session::New => greet(&device, &file)?,
            Session::Resumed => resume(&device)?,
        }
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared {
            device,
            stop,
            file,
            stopping: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            threads: AtomicUsize::new(0),
            idle: AtomicUsize::new(0),
            waits: Mutex::default(),
            changed: Box::new(changed),
        });
        shared.start_thread().map_err(StartError::Io)?;
        Ok(Export { shared })
    }
}

/// Whether it is a `/dev/fuse` that can be waited for.
fn check(device: &OwnedFd) -> Result<(), StartError> {
    let stat = rustix::fs::fstat(device)?;
    let character = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
    if !character || (major(stat.st_rdev), minor(stat.st_rdev)) != DEVICE {
        return Err(StartError::Descriptor("is not an open /dev/fuse"));
    }
    if !rustix::fs::fcntl_getfl(device)?.contains(OFlags::NONBLOCK) {
        return Err(StartError::Descriptor(
            "waits in reads: set O_NONBLOCK on it (the flag is shared, so this process never sets it)",
        ));
    }
    Ok(())
}

/// The first request, and its answer.
fn greet(device: &OwnedFd, file: &File) -> Result<(), StartError> {
    let mut request = vec![0; REQUEST_ROOM];
    let mut room = vec![0; REPLY_ROOM];
    let len = match rustix::io::read(device, &mut *request) {
        Err(Errno::AGAIN) => {
            poll(&mut [PollFd::new(device, PollFlags::IN)], Some(&GREETING))?;
            rustix::io::read(device, &mut *request)
        }
        other => other,
    };
    let len = match len {
        Ok(len) => len,
        Err(Errno::PERM) => return Err(StartError::Descriptor("is not mounted")),
        Err(Errno::NODEV) => return Err(StartError::Descriptor("is not mounted any more")),
        Err(Errno::AGAIN) => {
            return Err(StartError::Descriptor("has been served before: mount a new one"));
        }
        Err(e) => return Err(e.into()),
    };
    let Some(parsed) = Request::parse(&request[..len]) else {
        return Err(StartError::Descriptor("speaks another protocol"));
    };
    if !matches!(parsed.operation, Ok(Operation::Init { .. })) {
        return Err(StartError::Descriptor("has been served before: mount a new one"));
    }
    let Some(len) = file.answer(&parsed, &mut room) else {
        return Err(StartError::Descriptor("speaks another protocol"));
    };
    let refused = room[4..8] != [0; 4];
    rustix::io::write(device, &room[..len])?;
    if refused { Err(StartError::Descriptor("is of a kernel before Linux 4.20, which is too old")) } else { Ok(()) }
}

/// Has the kernel repeat what it has no answer to (`FUSE_NOTIFY_RESEND`, Linux 6.9): doing it twice changes nothing, because
/// every request says where.
fn resume(device: &OwnedFd) -> Result<(), StartError> {
    const RESEND: i32 = 7;
    let mut notice = [0; HEADER_LEN];
    notice[0..4].copy_from_slice(&u32::try_from(HEADER_LEN).unwrap_or(0).to_ne_bytes());
    notice[4..8].copy_from_slice(&RESEND.to_ne_bytes());
    match rustix::io::write(device, &notice) {
        Ok(_) => Ok(()),
        Err(Errno::PERM) => Err(StartError::Descriptor("is not mounted")),
        Err(Errno::NODEV) => Err(StartError::Descriptor("is not mounted any more")),
        Err(Errno::INVAL) => Err(StartError::Descriptor("is of a kernel before Linux 6.9, which repeats nothing")),
        Err(e) => Err(e.into()),
    }
}

impl Running for Export {
    fn root(&self) -> &Arc<Root> {
        self.shared.file.root()
    }

    fn stats(&self) -> &Arc<Stats> {
        self.shared.file.stats()
    }

    fn clients(&self) -> Vec<ClientShown> {
        let stats = Arc::clone(self.stats());
        vec![ClientShown { id: 0, peer: format!("kernel, open {} times", self.shared.file.opened()), stats }]
    }

    fn is_in_use(&self) -> bool {
        self.shared.file.opened() > 0 && !self.has_ended_itself()
    }

    fn close(&self) {
        self.shared.stop();
    }

    fn is_over(&self) -> bool {
        self.shared.threads.load(Ordering::Acquire) == 0
    }

    fn has_ended_itself(&self) -> bool {
        self.shared.ended.load(Ordering::Acquire)
    }

    fn descriptors(&self) -> Vec<(i32, String)> {
        let node = self.shared.file.node();
        let node = node.name();
        let own = [
            (self.shared.device.as_raw_fd(), format!("the FUSE device of node '{node}'")),
            (self.shared.stop.as_raw_fd(), format!("wake-ups of the FUSE export of node '{node}'")),
        ];
        let waits = self.shared.waits();
        let waits = waits.iter().map(|&fd| (fd, format!("a thread of the FUSE export of node '{node}'")));
        own.into_iter().chain(waits).collect()
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.shared.stop();
    }
}

impl Shared {
    fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }

    fn start_thread(self: &Arc<Shared>) -> io::Result<()> {
        let number = self.threads.fetch_add(1, Ordering::AcqRel);
        let shared = Arc::clone(self);
        let thread = thread::Builder::new().name(format!("fuse-{number}")).stack_size(STACK);
        match thread.spawn(move || shared.serve()) {
            Ok(_) => Ok(()),
            Err(e) => {
                self.threads.fetch_sub(1, Ordering::AcqRel);
                Err(e)
            }
        }
    }

    /// A thread, to its end.
    fn serve(self: Arc<Shared>) {
        let _present = Present(&self);
        let wait = match Wait::new(&self) {
            Ok(wait) => wait,
            Err(e) => return warn!(node = self.file.node().name(), "no thread more for the FUSE export: {e}"),
        };
        // Every page is touched before the kernel writes to it: a process that is killed while the kernel waits for a page costs
        // the request an error, and one that is killed at any other time only costs time.
        let mut request = vec![1; REQUEST_ROOM];
        let mut room = vec![0; REPLY_ROOM];
        loop {
            self.idle.fetch_add(1, Ordering::AcqRel);
            let received = self.receive(&wait, &mut request);
            let last_idle = self.idle.fetch_sub(1, Ordering::AcqRel) == 1;
            let len = match received {
                Ok(Some(len)) => len,
                Ok(None) => return,
                Err(Errno::NODEV) => {
                    debug!(node = self.file.node().name(), "unmounted");
                    self.ended.store(true, Ordering::Release);
                    return self.stop();
                }
                Err(e) => {
                    warn!(node = self.file.node().name(), "the FUSE device fails: {e}");
                    self.ended.store(true, Ordering::Release);
                    return self.stop();
                }
            };
            if last_idle && self.threads.load(Ordering::Acquire) < MOST_THREADS {
                // Without another thread the requests wait for this one: slower, and still right.
                let _ = self.start_thread();
            }
            self.handle(&request[..len], &mut room);
        }
    }

    fn handle(&self, bytes: &[u8], room: &mut [u8]) {
        let Some(request) = Request::parse(bytes) else {
            return warn!(node = self.file.node().name(), "the kernel asks nothing that can be read");
        };
        // A panic is a bug of ours; it must cost one request, not the file.
        let len = catch_unwind(AssertUnwindSafe(|| self.file.answer(&request, room)))
            .unwrap_or_else(|_| Some(Reply::new(room).finish(request.unique, Err(Errno::IO))));
        let Some(len) = len else { return };
        match rustix::io::write(&self.device, &room[..len]) {
            // Whoever asked was killed meanwhile, or the file was unmounted.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV) => {}
            Err(e) => warn!(node = self.file.node().name(), "the kernel takes no answer: {e}"),
        }
    }

    /// The next request; `None` if the threads should end.
    fn receive(&self, wait: &Wait<'_>, buffer: &mut [u8]) -> Result<Option<usize>, Errno> {
        loop {
            if self.stopping.load(Ordering::Acquire) {
                return Ok(None);
            }
            match rustix::io::read(&self.device, &mut *buffer) {
                Ok(len) => return Ok(Some(len)),
                Err(Errno::AGAIN) => wait.sleep()?,
                // A signal; or whoever asked was killed just then.
                Err(Errno::INTR | Errno::NOENT) => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn waits(&self) -> MutexGuard<'_, BTreeSet<RawFd>> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread's bed: of those that sleep, a request wakes one.
struct Wait<'a> {
    shared: &'a Shared,
    epoll: OwnedFd,
}

impl Wait<'_> {
    fn new(shared: &Shared) -> Result<Wait<'_>, Errno> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = epoll::EventData::new_u64(0);
        epoll::add(&epoll, &shared.device, data, epoll::EventFlags::IN | epoll::EventFlags::EXCLUSIVE)?;
        epoll::add(&epoll, &shared.stop, data, epoll::EventFlags::IN)?;
        shared.waits().insert(epoll.as_raw_fd());
        Ok(Wait { shared, epoll })
    }

    fn sleep(&self) -> Result<(), Errno> {
        let mut events = [std::mem::MaybeUninit::uninit(); 2];
        match epoll::wait(&self.epoll, &mut events, None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(e),
        }
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        // Before the number can mean something else.
        self.shared.waits().remove(&self.epoll.as_raw_fd());
    }
}

/// Enters a thread's end, on every way out.
struct Present<'a>(&'a Shared);

impl Drop for Present<'_> {
    fn drop(&mut self) {
        if self.0.threads.fetch_sub(1, Ordering::AcqRel) == 1 {
            if !self.0.stopping.load(Ordering::Acquire) {
                self.0.ended.store(true, Ordering::Release);
            }
            (self.0.changed)();
        }
    }
}
