// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A front end, from its first message to its last: what it asks, and the queues that run because of it.
//!
//! A queue runs while everything for it is there: memory, size, addresses, a kick, and permission ([`Session::refresh`]).
//! What changes under a running queue first stops it. Anything that the protocol does not allow ends the session: a front end
//! that cannot speak is not guessed at.

pub mod moving;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::channel::{Channel, Ended, Message, send};
use super::config::{self, feature};
use super::inflight::{Area, area_len};
use super::memory::Memory;
use super::proto::{self, Addresses, Fault, InflightAt, MAX_REGIONS, Request};
use super::queue::{Call, Disk, Running, Setup};
use super::ring::{Corrupt, MAX_SIZE, Ring};
use crate::meter::Meter;
use crate::workers::Workers;

/// What a session is held with.
pub struct Host<'a> {
    /// What is served.
    pub disk: &'a Arc<Disk>,
    /// Queues.
    pub queues: u16,
    /// Who sleeps.
    pub workers: &'a Workers,
    /// Memory for what is under way.
    pub inflight: Option<&'a OwnedFd>,
    /// Readable when there is something to look at: a queue has ended, the size has changed, the export wants to end.
    pub wake: &'a Arc<OwnedFd>,
    /// Readable for ever once the export wants to end.
    pub stop: &'a OwnedFd,
    /// Where the session writes down what descriptors it holds.
    pub books: &'a Mutex<Vec<(RawFd, String)>>,
    /// Where the session is sent when the export ends, if it is to go on elsewhere.
    pub moving: &'a Mutex<Option<OwnedFd>>,
}

/// Why a session ended.
#[derive(Debug)]
pub enum Cause {
    /// The channel.
    Channel(Ended),
    /// The guest broke a queue.
    Corrupt(u16, Corrupt),
    /// The host has no thread or descriptor for a queue.
    Host(io::Error),
}

impl From<Ended> for Cause {
    fn from(ended: Ended) -> Cause {
        Cause::Channel(ended)
    }
}

impl From<Fault> for Cause {
    fn from(fault: Fault) -> Cause {
        Cause::Channel(Ended::Broken(fault))
    }
}

/// What a message is answered with.
enum Answer {
    /// Nothing, or an acknowledgement if it is wanted.
    Done,
    /// This.
    Reply(Vec<u8>),
    /// This, with a descriptor.
    With(Vec<u8>, OwnedFd),
}

fn number(number: u64) -> Result<Answer, Cause> {
    Ok(Answer::Reply(number.to_ne_bytes().to_vec()))
}

/// What is known of a queue.
#[derive(Default)]
struct Known {
    size: u16,
    at: Option<Addresses>,
    next_available: u16,
    kick: Option<Arc<OwnedFd>>,
    call: Arc<Call>,
    err: Option<OwnedFd>,
    enabled: Option<bool>,
    running: Option<Running>,
}

/// A front end.
pub struct Session<'a> {
    host: Host<'a>,
    channel: &'a Channel,
    meter: Meter,
    features: u64,
    protocol: u64,
    memory: Arc<Memory>,
    area: Option<Arc<Area>>,
    /// The area's memory, if the front end brought it.
    area_file: Option<OwnedFd>,
    queues: Vec<Known>,
    /// Whether a message has been received in part.
    torn: bool,
    /// The back end's channel.
    back: Option<OwnedFd>,
    /// The size that the front end knows.
    told: u64,
}

impl<'a> Session<'a> {
    /// A front end that has said nothing yet.
    pub fn new(host: Host<'a>, channel: &'a Channel, meter: Meter) -> Session<'a> {
        let queues = (0..host.queues).map(|_| Known::default()).collect();
        let told = host.disk.root.node().len();
        Session {
            host,
            channel,
            meter,
            features: 0,
            protocol: 0,
            memory: Arc::default(),
            area: None,
            area_file: None,
            queues,
            torn: false,
            back: None,
            told,
        }
    }

    /// Serves until it ends; then no queue runs any more. `passed` has the messages of a session that has begun elsewhere.
    pub fn run(mut self, passed: Option<&Channel>) -> Cause {
        let begun = passed.map_or(Ok(()), |passed| self.resume(passed));
        let cause = begun.err().unwrap_or_else(|| {
            loop {
                if let Err(cause) = self.step() {
                    break cause;
                }
            }
        });
        if let Cause::Corrupt(index, _) = &cause
            && let Some(err) = self.queues.get(usize::from(*index)).and_then(|queue| queue.err.as_ref())
            && poll(&mut [PollFd::new(err, PollFlags::OUT)], Some(&rustix::event::Timespec::default())) == Ok(1)
        {
            let _ = rustix::io::write(err, &1u64.to_ne_bytes());
        }
        let whole = self.queues.iter_mut().fold(!self.torn, |whole, queue| queue.stop().is_none() && whole);
        let to = self.host.moving.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let (Cause::Channel(Ended::Stopped), true, Some(to)) = (&cause, whole, to) {
            return moving::send(&self, to.as_fd()).err().map_or(cause, Cause::Host);
        }
        cause
    }

    /// Does what a session that has begun elsewhere was told.
    fn resume(&mut self, passed: &Channel) -> Result<(), Cause> {
        loop {
            let mut message = passed.receive(self.host.stop.as_fd())?;
            if message.header.request == moving::END {
                self.keep_books();
                return Ok(());
            }
            self.handle(&mut message)?;
        }
    }

    fn step(&mut self) -> Result<(), Cause> {
        let mut fds = [
            PollFd::new(self.host.stop, PollFlags::IN),
            PollFd::from_borrowed_fd(self.host.wake.as_fd(), PollFlags::IN),
            PollFd::new(self.channel, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(Cause::Host(e.into())),
        }
        let [stop, wake, message] = fds.map(|fd| !fd.revents().is_empty());
        if stop {
            return Err(Ended::Stopped.into());
        }
        if wake {
            let _ = rustix::io::read(&**self.host.wake, &mut [0; 8]);
            self.look_after_queues()?;
            self.tell_size();
        }
        if message {
            self.torn = true;
            let message = self.channel.receive(self.host.stop.as_fd())?;
            self.torn = false;
            let answered = self.answer(message);
            self.keep_books();
            answered?;
        }
        Ok(())
    }

    /// Writes down what the session holds.
    fn keep_books(&self) {
        let mut held = vec![(self.channel.number(), "vhost-user front end".to_owned())];
        held.extend(self.back.iter().map(|fd| (fd.as_raw_fd(), "vhost-user front end, requests to it".to_owned())));
        let memory = self.memory.regions().map(|(_, file)| (file.as_raw_fd(), "memory of a guest".to_owned()));
        held.extend(memory);
        held.extend(self.area_file.iter().map(|fd| (fd.as_raw_fd(), "a guest's in-flight memory".to_owned())));
        for (index, queue) in self.queues.iter().enumerate() {
            held.extend(queue.descriptors().into_iter().map(|fd| (fd, format!("vhost-user queue {index}"))));
        }
        *self.host.books.lock().unwrap_or_else(PoisonError::into_inner) = held;
    }

    /// Ends the session if a queue has ended by itself.
    fn look_after_queues(&mut self) -> Result<(), Cause> {
        for (index, queue) in (0..).zip(&mut self.queues) {
            if queue.running.as_ref().is_some_and(Running::has_ended)
                && let Some(corrupt) = queue.stop()
            {
                return Err(Cause::Corrupt(index, corrupt));
            }
        }
        Ok(())
    }

    /// Tells the front end that the device's size is another one.
    fn tell_size(&mut self) {
        let len = self.host.disk.root.node().len();
        if std::mem::replace(&mut self.told, len) != len
            && self.protocol & proto::feature::CONFIG != 0
            && let Some(back) = &self.back
            && send(back.as_fd(), &proto::backend_header(proto::CONFIG_CHANGE), None).is_err()
        {
            self.back = None;
        }
    }

    fn answer(&mut self, mut message: Message) -> Result<(), Cause> {
        let header = message.header;
        let acknowledge = header.need_reply && self.protocol & proto::feature::REPLY_ACK != 0;
        let request = header.request;
        match self.handle(&mut message) {
            Ok(Answer::Done) if acknowledge => Ok(self.channel.reply(request, &0u64.to_ne_bytes(), None)?),
            Ok(Answer::Done) => Ok(()),
            Ok(Answer::Reply(bytes)) => Ok(self.channel.reply(request, &bytes, None)?),
            Ok(Answer::With(bytes, fd)) => Ok(self.channel.reply(request, &bytes, Some(fd.as_fd()))?),
            Err(cause) => {
                if acknowledge {
                    self.channel.reply(request, &1u64.to_ne_bytes(), None)?;
                }
                Err(cause)
            }
        }
    }

    fn handle(&mut self, message: &mut Message) -> Result<Answer, Cause> {
        let request = message.header.request;
        match request {
            Request::GetFeatures => {
                message.payload().empty()?;
                return number(self.offer().features());
            }
            Request::SetFeatures => {
                let wanted = message.payload().number()?;
                within(request, wanted, self.offer().features())?;
                self.features = wanted;
            }
            Request::GetProtocolFeatures => {
                message.payload().empty()?;
                return number(self.protocol_features());
            }
            Request::SetProtocolFeatures => {
                let wanted = message.payload().number()?;
                within(request, wanted, self.protocol_features())?;
                self.protocol = wanted;
            }
            Request::SetOwner => message.payload().empty()?,
            Request::ResetOwner | Request::ResetDevice => {
                message.payload().empty()?;
                self.reset()?;
            }
            Request::GetQueueNum => {
                message.payload().empty()?;
                return number(self.host.queues.into());
            }
            Request::GetMaxMemSlots => {
                message.payload().empty()?;
                return number(MAX_REGIONS as u64);
            }
            Request::SetMemTable => {
                let regions = message.payload().regions()?;
                if regions.len() != message.fds.len() {
                    return Err(Fault::Descriptors(request).into());
                }
                let regions = regions.into_iter().zip(std::mem::take(&mut message.fds));
                let memory =
                    regions.into_iter().try_fold(Memory::default(), |memory, (at, fd)| memory.with(request, at, fd))?;
                self.replace_memory(request, memory)?;
            }
            Request::AddMemReg => {
                let at = message.payload().region()?;
                let memory = self.memory.with(request, at, message.fd()?)?;
                self.replace_memory(request, memory)?;
            }
            Request::RemMemReg => {
                let memory = self.memory.without(request, message.payload().region()?)?;
                self.replace_memory(request, memory)?;
            }
            Request::GetConfig => {
                let payload = message.payload();
                let (offset, len, _) = payload.config()?;
                let mut reply = payload.bytes()[..12].to_vec();
                reply.extend(&self.offer().config()[offset..offset + len]);
                self.told = self.host.disk.root.node().len();
                return Ok(Answer::Reply(reply));
            }
            Request::SetConfig => {
                let (offset, _, bytes) = message.payload().config()?;
                let mode = config::written_cache_mode(offset, bytes).ok_or(Fault::Size(request))?;
                let mode = mode && !self.host.disk.writethrough;
                self.host.disk.write_back.store(mode, Ordering::Relaxed);
            }
            Request::SetBackendReqFd => self.back = Some(message.fd()?),
            Request::GetInflightFd => return self.new_area(message),
            Request::SetInflightFd => {
                let at = message.payload().inflight()?;
                let file = message.fd()?;
                let area = Area::new(&file, at);
                let area = area.ok_or(Fault::Memory(request, "in-flight memory that does not fit its description"))?;
                self.stop_all()?;
                self.area = Some(Arc::new(area));
                self.area_file = Some(file);
                self.refresh_all(request)?;
            }
            Request::SetVringNum
            | Request::SetVringAddr
            | Request::SetVringBase
            | Request::GetVringBase
            | Request::SetVringKick
            | Request::SetVringCall
            | Request::SetVringErr
            | Request::SetVringEnable => return self.handle_vring(message),
        }
        Ok(Answer::Done)
    }

    /// Messages about one queue.
    fn handle_vring(&mut self, message: &mut Message) -> Result<Answer, Cause> {
        let request = message.header.request;
        match request {
            Request::SetVringNum => {
                let (index, size) = message.payload().queue_state()?;
                if !size.is_power_of_two() || size > MAX_SIZE {
                    return Err(Fault::Ring(request, "a size that is no power of two from 1 to 32768").into());
                }
                self.resting(request, index)?.size = u16::try_from(size).unwrap_or(0);
            }
            Request::SetVringBase => {
                let (index, base) = message.payload().queue_state()?;
                let base = u16::try_from(base).map_err(|_| Fault::Ring(request, "a position over 65535"))?;
                self.resting(request, index)?.next_available = base;
            }
            Request::SetVringAddr => {
                let (index, at) = message.payload().addresses()?;
                let queue = self.queue(request, index)?;
                queue.halt(index)?;
                queue.at = Some(at);
                self.refresh(request, index)?;
            }
            Request::GetVringBase => {
                let (index, _) = message.payload().queue_state()?;
                let queue = self.queue(request, index)?;
                queue.halt(index)?;
                queue.kick = None;
                let state = [index, u32::from(queue.next_available)].map(u32::to_ne_bytes);
                return Ok(Answer::Reply(state.as_flattened().to_vec()));
            }
            Request::SetVringKick => {
                let (index, has_fd) = message.payload().queue_fd()?;
                if !has_fd {
                    return Err(Fault::Ring(request, "a queue without notifications is not served").into());
                }
                let kick = event(request, message.fd()?)?;
                let queue = self.queue(request, index)?;
                queue.halt(index)?;
                queue.kick = Some(Arc::new(kick));
                self.refresh(request, index)?;
            }
            Request::SetVringCall | Request::SetVringErr => {
                let (index, has_fd) = message.payload().queue_fd()?;
                let fd = if has_fd { Some(event(request, message.fd()?)?) } else { None };
                let queue = self.queue(request, index)?;
                if request == Request::SetVringCall {
                    queue.call.set(fd);
                } else {
                    queue.err = fd;
                }
            }
            _ => {
                let (index, enabled) = message.payload().queue_state()?;
                let queue = self.queue(request, index)?;
                queue.enabled = Some(enabled != 0);
                if enabled == 0 {
                    queue.halt(index)?;
                }
                self.refresh(request, index)?;
            }
        }
        Ok(Answer::Done)
    }

    fn offer(&self) -> config::Disk {
        let Disk { root, writable, writethrough, block_size, write_back, .. } = &**self.host.disk;
        config::Disk {
            len: root.node().len(),
            block_size: *block_size,
            queues: self.host.queues,
            writable: *writable,
            writethrough: *writethrough,
            write_back: write_back.load(Ordering::Relaxed),
        }
    }

    fn protocol_features(&self) -> u64 {
        use proto::feature::{BACKEND_REQ, CONFIG, CONFIGURE_MEM_SLOTS, INFLIGHT_SHMFD, MQ, REPLY_ACK, RESET_DEVICE};
        let inflight = if self.host.inflight.is_some() { INFLIGHT_SHMFD } else { 0 };
        MQ | REPLY_ACK | BACKEND_REQ | CONFIG | RESET_DEVICE | CONFIGURE_MEM_SLOTS | inflight
    }

    /// Makes memory for what is under way. It is new memory each time: the front end keeps what it wants to keep.
    fn new_area(&mut self, message: &Message) -> Result<Answer, Cause> {
        let request = message.header.request;
        let wanted = message.payload().inflight()?;
        let refused = |what| Fault::Memory(request, what);
        let Some(fd) = self.host.inflight else { return Err(refused("there is no in-flight memory").into()) };
        let fits = 0 < wanted.queues
            && wanted.queues <= self.host.queues
            && wanted.queue_size.is_power_of_two()
            && u32::from(wanted.queue_size) <= MAX_SIZE;
        if !fits {
            return Err(refused("in-flight memory for queues that there are not").into());
        }
        let at = InflightAt { len: area_len(wanted.queues, wanted.queue_size), offset: 0, ..wanted };
        self.stop_all()?;
        (self.area, self.area_file) = (None, None);
        let made = rustix::fs::ftruncate(fd, 0)
            .and_then(|()| rustix::fs::ftruncate(fd, at.len))
            .and_then(|()| rustix::io::fcntl_dupfd_cloexec(fd, 0));
        let passed = made.map_err(|e| Cause::Host(e.into()))?;
        self.area = Area::new(fd, at).map(Arc::new);
        self.refresh_all(request)?;
        Ok(Answer::With(at.to_bytes(message.payload().bytes().len()), passed))
    }

    fn replace_memory(&mut self, request: Request, memory: Memory) -> Result<(), Cause> {
        self.stop_all()?;
        self.memory = Arc::new(memory);
        self.refresh_all(request)
    }

    fn reset(&mut self) -> Result<(), Cause> {
        self.stop_all()?;
        for queue in &mut self.queues {
            *queue = Known { call: Arc::clone(&queue.call), err: queue.err.take(), ..Known::default() };
        }
        Ok(())
    }

    fn queue(&mut self, request: Request, index: u32) -> Result<&mut Known, Fault> {
        let place = usize::try_from(index).ok().and_then(|index| self.queues.get_mut(index));
        place.ok_or(Fault::Queue(request, index))
    }

    /// A queue that does not run.
    fn resting(&mut self, request: Request, index: u32) -> Result<&mut Known, Fault> {
        let queue = self.queue(request, index)?;
        if queue.running.is_some() { Err(Fault::Ring(request, "the queue runs")) } else { Ok(queue) }
    }

    fn stop_all(&mut self) -> Result<(), Cause> {
        (0..).zip(&mut self.queues).try_for_each(|(index, queue)| queue.halt(index))
    }

    fn refresh_all(&mut self, request: Request) -> Result<(), Cause> {
        (0..u32::from(self.host.queues)).try_for_each(|index| self.refresh(request, index))
    }

    /// Starts a queue if everything for it is there and it does not run.
    fn refresh(&mut self, request: Request, index: u32) -> Result<(), Cause> {
        // Rings are enabled from the start unless protocol features were negotiated ("Ring states").
        let by_default = self.features & feature::PROTOCOL == 0;
        let event_idx = self.features & feature::EVENT_IDX != 0;
        let memory = Arc::clone(&self.memory);
        let area = self.area.clone();
        let (disk, workers) = (Arc::clone(self.host.disk), self.host.workers.clone());
        let (meter, ended) = (self.meter.clone(), Arc::clone(self.host.wake));
        let queue = self.queue(request, index)?;
        let (Some(at), Some(kick), true) = (queue.at, &queue.kick, queue.enabled.unwrap_or(by_default)) else {
            return Ok(());
        };
        if queue.running.is_some() || queue.size == 0 || memory.is_empty() {
            return Ok(());
        }
        let Ok(number) = u16::try_from(index) else { return Ok(()) };
        let broken = |corrupt| Cause::Corrupt(number, corrupt);
        Ring::new(&memory, queue.size, at, event_idx, queue.next_available).map_err(broken)?;
        let setup = Setup {
            index: number,
            size: queue.size,
            at,
            event_idx,
            next_available: queue.next_available,
            memory,
            area,
            kick: Arc::clone(kick),
            call: Arc::clone(&queue.call),
            disk,
            meter,
            workers,
            ended,
        };
        queue.running = Some(Running::start(setup).map_err(Cause::Host)?);
        Ok(())
    }
}

impl Known {
    fn descriptors(&self) -> Vec<RawFd> {
        let own = self.kick.iter().map(AsRawFd::as_raw_fd).chain(self.err.iter().map(AsRawFd::as_raw_fd));
        own.chain(self.call.number()).chain(self.running.iter().flat_map(Running::descriptors)).collect()
    }

    /// Stops the queue if it runs; what it died of, if it did.
    fn stop(&mut self) -> Option<Corrupt> {
        let ended = self.running.take()?.stop();
        self.next_available = ended.next_available;
        ended.corrupt
    }

    fn halt(&mut self, index: impl TryInto<u16>) -> Result<(), Cause> {
        match self.stop() {
            None => Ok(()),
            Some(corrupt) => Err(Cause::Corrupt(index.try_into().unwrap_or(u16::MAX), corrupt)),
        }
    }
}

fn within(request: Request, wanted: u64, offered: u64) -> Result<(), Fault> {
    match wanted & !offered {
        0 => Ok(()),
        extra => Err(Fault::Features(request, extra)),
    }
}

/// An eventfd: the kernel shows it as a file of no type. A pipe or socket in its place could make its writer wait.
fn event(request: Request, fd: OwnedFd) -> Result<OwnedFd, Fault> {
    let of_no_type = rustix::fs::fstat(&fd).is_ok_and(|stat| stat.st_mode & 0o170_000 == 0);
    if of_no_type { Ok(fd) } else { Err(Fault::Descriptors(request)) }
}
