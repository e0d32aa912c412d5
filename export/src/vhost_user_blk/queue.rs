// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A queue that runs: one thread that takes requests in batches, does them, and tells the driver once for a batch.
//!
//! What can be done without sleeping is done here, straight between host file and guest memory; what would sleep goes to the
//! workers and comes back through [`Completions`]. A single request with nothing behind it is done here even if it sleeps: to
//! hand it over would cost more than it could win. Queues share nothing but the node, so a guest's processors do not meet.
//!
//! The thread sleeps in epoll when there is nothing to do. Before that it looks out a moment for a driver that asks one thing at a
//! time, quickly, as long as that pays ([`Attention`]): then nobody is woken, and the driver need not notify. Its notifications are
//! watched by edge, so none of them has to be read away.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use block::stats::Tally;
use block::{Root, Wait};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use sys::guest::Slice;

use super::completions::{Completions, Done};
use super::inflight::{Area, Tracker};
use super::memory::Memory;
use super::proto::Addresses;
use super::request::{ID, Means, Outcome, Request, put_status};
use super::ring::{Chain, Corrupt, Ring};
use crate::attention::Attention;
use crate::meter::Meter;
use crate::workers::{Job, Workers};

/// Most requests that are done before the driver is told of them. With a processor of its own it goes through these while the next
/// are being done, and has asked for more before there is nothing left to do.
const BATCH: u16 = 16;
/// How long to look out for the next request: a driver that takes longer is woken up itself in between, and to wait for it costs more
/// than to be woken.
const PATIENCE: Duration = Duration::from_micros(50);
/// Most requests of one queue at the workers.
const MOST_IN_FLIGHT: usize = 64;
/// Stack of a queue's thread in bytes.
const STACK: usize = 256 << 10;

/// What every queue of a device works on.
#[derive(Debug)]
pub struct Disk {
    /// The node.
    pub root: Arc<Root>,
    /// Whether guests may write.
    pub writable: bool,
    /// Whether no write may rest in a cache, whatever the guest says.
    pub writethrough: bool,
    /// Bytes of a logical block.
    pub block_size: u32,
    /// What `GET_ID` answers.
    pub id: [u8; ID],
    /// Whether writes may rest in the host's cache until a flush.
    pub write_back: AtomicBool,
}

/// What a queue is started with.
pub struct Setup {
    /// Its number.
    pub index: u16,
    /// Its entries.
    pub size: u16,
    /// Where it is, in the front end's address space.
    pub at: Addresses,
    /// Whether notifications go by position.
    pub event_idx: bool,
    /// Where it goes on.
    pub next_available: u16,
    /// The guest's memory.
    pub memory: Arc<Memory>,
    /// Where what is under way is noted.
    pub area: Option<Arc<Area>>,
    /// How the driver notifies.
    pub kick: Arc<OwnedFd>,
    /// How it is told.
    pub call: Arc<Call>,
    /// What is served.
    pub disk: Arc<Disk>,
    /// Where it is counted.
    pub meter: Meter,
    /// Who sleeps in its stead.
    pub workers: Workers,
    /// Readable once the queue has ended.
    pub ended: Arc<OwnedFd>,
}

/// How a driver is told of used requests. It changes while the queue runs, when a guest masks interrupts.
///
/// A write to an event that the front end has filled waits, so no lock is held meanwhile, and [`Call::make_room`] ends it.
#[derive(Debug, Default)]
pub struct Call(Mutex<Events>);

#[derive(Debug, Default)]
struct Events {
    current: Option<Arc<OwnedFd>>,
    /// What is being written to.
    busy: Option<Arc<OwnedFd>>,
}

impl Call {
    /// Takes another descriptor, or none, in use.
    pub fn set(&self, fd: Option<OwnedFd>) {
        self.lock().current = fd.map(Arc::new);
    }

    /// The descriptor.
    pub fn current(&self) -> Option<Arc<OwnedFd>> {
        self.lock().current.clone()
    }

    /// The descriptor's number.
    pub fn number(&self) -> Option<RawFd> {
        self.lock().current.as_ref().map(AsRawFd::as_raw_fd)
    }

    fn signal(&self) {
        let current = {
            let mut events = self.lock();
            let current = events.current.clone();
            events.busy.clone_from(&current);
            current
        };
        if let Some(fd) = current {
            let _ = rustix::io::write(&fd, &1u64.to_ne_bytes());
            self.lock().busy = None;
        }
    }

    /// Empties the event that is being written to, if it is full.
    fn make_room(&self) {
        let busy = self.lock().busy.clone();
        if let Some(fd) = busy
            && poll(&mut [PollFd::new(&fd, PollFlags::OUT)], Some(&Timespec::default())) == Ok(0)
        {
            let mut count = [MaybeUninit::uninit(); 8];
            let _ = rustix::io::read(&fd, &mut count);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Events> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A queue's thread.
#[derive(Debug)]
pub struct Running {
    thread: JoinHandle<Ended>,
    stop: Arc<Stop>,
    call: Arc<Call>,
    /// Numbers of what the thread waits on.
    waits: [RawFd; 2],
}

/// How a queue has ended.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// Where it would go on.
    pub next_available: u16,
    /// Why, if it was not told to.
    pub corrupt: Option<Corrupt>,
}

#[derive(Debug)]
struct Stop {
    flag: AtomicBool,
    event: OwnedFd,
    /// The queue has ended: its thread may take a moment longer.
    ended: AtomicBool,
}

impl Running {
    /// Starts a queue.
    ///
    /// # Errors
    /// `EMFILE`; no thread to be had; a notification that cannot be waited for.
    pub fn start(setup: Setup) -> io::Result<Running> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let stop = Arc::new(Stop { flag: AtomicBool::new(false), event, ended: AtomicBool::new(false) });
        let completions = Completions::new()?;
        let wait = epoll::create(CreateFlags::CLOEXEC)?;
        let edge = EventFlags::IN | EventFlags::ET;
        epoll::add(&wait, &*setup.kick, EventData::new_u64(0), edge)?;
        epoll::add(&wait, &*completions, EventData::new_u64(0), edge)?;
        epoll::add(&wait, &stop.event, EventData::new_u64(0), edge)?;
        let call = Arc::clone(&setup.call);
        let waits = [wait.as_raw_fd(), completions.number()];
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new().name("vhost-queue".into()).stack_size(STACK);
        let thread = thread.spawn(move || run(&setup, &stopped, &completions, &wait))?;
        Ok(Running { thread, stop, call, waits })
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&self) -> bool {
        self.stop.ended.load(Ordering::Acquire)
    }

    /// Numbers of the descriptors that it holds for itself.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        [self.stop.event.as_raw_fd()].into_iter().chain(self.waits)
    }

    /// Ends it, once nothing of it is under way.
    pub fn stop(self) -> Ended {
        self.stop.flag.store(true, Ordering::Release);
        let _ = rustix::io::write(&self.stop.event, &1u64.to_ne_bytes());
        let mut pause = Duration::from_micros(20);
        while !self.thread.is_finished() {
            self.call.make_room();
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        }
        let bug = Ended { next_available: 0, corrupt: Some(Corrupt::Layout("the queue's thread ended by a bug")) };
        self.thread.join().unwrap_or(bug)
    }
}

/// A queue's thread, from start to end.
fn run(setup: &Setup, stop: &Stop, completions: &Arc<Completions>, wait: &OwnedFd) -> Ended {
    let mut next_available = setup.next_available;
    let served = catch_unwind(AssertUnwindSafe(|| {
        let mut queue = Queue::new(setup, stop, completions, wait)?;
        let served = queue.serve();
        // Whatever the guest has done: the node and the memory are in use until the last request has ended.
        while queue.in_flight > 0 {
            queue.sleep();
            queue.in_flight -= completions.take().len();
        }
        next_available = queue.ring.next_available();
        served
    }));
    let corrupt = match served {
        Ok(served) => served.err(),
        Err(_) => Some(Corrupt::Layout("the queue's thread ended by a bug")),
    };
    stop.ended.store(true, Ordering::Release);
    let _ = rustix::io::write(&setup.ended, &1u64.to_ne_bytes());
    Ended { next_available, corrupt }
}

struct Queue<'m> {
    setup: &'m Setup,
    stop: &'m Stop,
    completions: &'m Arc<Completions>,
    wait: &'m OwnedFd,
    ring: Ring<'m>,
    tracker: Option<Tracker<'m>>,
    in_flight: usize,
    /// Something was pushed that is not published.
    pushed: bool,
    tally: Tally,
    /// How quickly the driver asks again.
    attention: Attention,
    // Room that is used again and again.
    chain: Chain,
    request: Request,
    slices: Vec<Slice<'m>>,
}

impl<'m> Queue<'m> {
    fn new(
        setup: &'m Setup,
        stop: &'m Stop,
        completions: &'m Arc<Completions>,
        wait: &'m OwnedFd,
    ) -> Result<Queue<'m>, Corrupt> {
        let Setup { memory, size, at, event_idx, next_available, area, index, .. } = setup;
        Ok(Queue {
            setup,
            stop,
            completions,
            wait,
            ring: Ring::new(memory, *size, *at, *event_idx, *next_available)?,
            tracker: area.as_ref().map(|area| area.tracker(*index, *size)).transpose()?,
            in_flight: 0,
            pushed: false,
            tally: Tally::default(),
            attention: Attention::lasting(PATIENCE),
            chain: Chain::default(),
            request: Request::default(),
            slices: Vec::new(),
        })
    }

    /// Serves until it is told to stop.
    fn serve(&mut self) -> Result<(), Corrupt> {
        self.recover()?;
        self.ring.ignore()?;
        loop {
            self.collect()?;
            let started = Instant::now();
            let taken = self.batch()?;
            self.publish()?;
            self.setup.meter.settle(&mut self.tally, started);
            if self.stop.flag.load(Ordering::Acquire) {
                return self.finish();
            }
            if taken > 0 {
                self.attention.asked(started);
                if taken == 1 {
                    self.attention.answered(Instant::now());
                }
                continue;
            }
            if self.in_flight == 0 && self.look_out()? {
                continue;
            }
            let full = self.in_flight >= MOST_IN_FLIGHT;
            if !full && self.ring.listen()? {
                continue;
            }
            self.sleep();
            self.ring.ignore()?;
        }
    }

    /// Does again what a process before this one had taken. What stands in the available ring behind it was not taken yet.
    fn recover(&mut self) -> Result<(), Corrupt> {
        let Some(tracker) = &mut self.tracker else { return Ok(()) };
        let left = tracker.recover(self.ring.next_used())?;
        let count = u16::try_from(left.len()).unwrap_or(u16::MAX);
        self.ring.set_next_available(self.ring.next_used().wrapping_add(count));
        for head in left {
            self.one(head, true)?;
        }
        self.publish()
    }

    /// Nothing more is taken; what is under way ends.
    fn finish(&mut self) -> Result<(), Corrupt> {
        while self.in_flight > 0 {
            self.sleep();
            self.collect()?;
            self.publish()?;
        }
        Ok(())
    }

    /// Looks out for the next request, if that is worth it; whether there is one, or the queue is to stop.
    fn look_out(&mut self) -> Result<bool, Corrupt> {
        let (ring, stop) = (&self.ring, &self.stop.flag);
        let came = self.attention.look_out(|| {
            let something = ring.available()? > 0 || stop.load(Ordering::Acquire);
            Ok(something.then_some(()))
        })?;
        Ok(came.is_some())
    }

    /// Takes and does what is available, up to a batch; how many that were.
    fn batch(&mut self) -> Result<u16, Corrupt> {
        let available = self.ring.available()?;
        let alone = available == 1 && self.in_flight == 0;
        let mut taken = 0;
        for _ in 0..available.min(BATCH) {
            if self.in_flight >= MOST_IN_FLIGHT {
                break;
            }
            let head = self.ring.pop()?;
            if let Some(tracker) = &mut self.tracker {
                tracker.taken(head)?;
            }
            self.one(head, alone)?;
            taken += 1;
        }
        Ok(taken)
    }

    /// Does one request, or has it done.
    fn one(&mut self, head: u16, alone: bool) -> Result<(), Corrupt> {
        let Setup { memory, disk, .. } = self.setup;
        self.ring.walk(head, &mut self.chain)?;
        self.request.parse(&mut self.chain, memory, disk.block_size)?;
        if !alone && (self.request.is_slow() || (self.request.is_write() && disk.root.look().bypasses_cache())) {
            return self.hand_over(head);
        }
        let wait = if alone { Wait::Allowed } else { Wait::Never };
        match self.request.perform(memory, disk.means(), wait, &mut self.slices)? {
            None => self.hand_over(head),
            Some(outcome) => {
                if let Some(kind) = self.request.kind() {
                    self.tally.note(kind, self.request.len, outcome.status != 0);
                }
                self.push(head, self.request.status_at(), outcome)
            }
        }
    }

    fn hand_over(&mut self, head: u16) -> Result<(), Corrupt> {
        let request = self.request.clone();
        let slot = self.completions.slot(head, request.status_at());
        let (memory, disk) = (Arc::clone(&self.setup.memory), Arc::clone(&self.setup.disk));
        let (meter, started) = (self.setup.meter.clone(), Instant::now());
        self.in_flight += 1;
        let export = Arc::as_ptr(&self.setup.disk).addr();
        let work = move || {
            let performed = request.perform(&memory, disk.means(), Wait::Allowed, &mut Vec::new());
            let result = performed.map(|outcome| outcome.unwrap_or(Outcome { status: 1, written: 0 }));
            if let Some(kind) = request.kind() {
                let failed = result.is_err() || result.is_ok_and(|outcome| outcome.status != 0);
                meter.record(kind, request.len, failed, started);
            }
            result
        };
        // The work lets go of the node before the queue can end with it.
        let work = move || slot.fill(work());
        // A guest is never gone in the middle: what it has asked for is done.
        self.setup.workers.submit(Job { export, client: export, look: false, work: Box::new(work) });
        Ok(())
    }

    /// Takes back what the workers have done.
    fn collect(&mut self) -> Result<(), Corrupt> {
        if self.in_flight == 0 {
            return Ok(());
        }
        let done = self.completions.take();
        // Before the first that turns out to be corrupt: the others have ended, too.
        self.in_flight -= done.len();
        for Done { head, status_at, result } in done {
            self.push(head, status_at, result?)?;
        }
        Ok(())
    }

    fn push(&mut self, head: u16, status_at: u64, outcome: Outcome) -> Result<(), Corrupt> {
        put_status(&self.setup.memory, status_at, outcome.status)?;
        self.ring.push(head, outcome.written + 1)?;
        if let Some(tracker) = &mut self.tracker {
            tracker.pushed(head)?;
        }
        self.pushed = true;
        Ok(())
    }

    /// Shows the driver what is done, and tells it if it wants to be told.
    fn publish(&mut self) -> Result<(), Corrupt> {
        let Setup { memory, area, call, .. } = self.setup;
        if memory.is_broken() || area.as_ref().is_some_and(|area| area.is_broken()) {
            return Err(Corrupt::Gone);
        }
        if !std::mem::take(&mut self.pushed) {
            return Ok(());
        }
        let wants_to_know = self.ring.publish()?;
        if let Some(tracker) = &mut self.tracker {
            tracker.shown(self.ring.next_used())?;
        }
        if wants_to_know {
            call.signal();
        }
        Ok(())
    }

    fn sleep(&self) {
        let mut events = [MaybeUninit::uninit(); 3];
        // An interrupted wait is a short one.
        let _ = epoll::wait(self.wait.as_fd(), &mut events, None);
    }
}

impl Disk {
    fn means(&self) -> Means<'_> {
        Means {
            node: self.root.enter(),
            writable: self.writable,
            durable: !self.write_back.load(Ordering::Relaxed),
            id: &self.id,
        }
    }
}
