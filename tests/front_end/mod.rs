// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A VMM and its guest's driver in one: the front end of rust-vmm's `vhost` speaks the protocol, the rings are filled here.
#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, unreachable_pub)]
#![allow(clippy::redundant_closure_for_method_calls, reason = "a method of a type with a life time is less general")]

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use sys::guest::{Mapping, Slice};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What the front end's addresses are above the guest's.
pub const USER: u64 = 0x7f00_0000_0000;
/// Guest memory of a queue: rings first, then headers, indirect tables, data.
pub const QUEUE: u64 = 16 << 20;
const AVAILABLE: u64 = 0x1_0000;
const USED: u64 = 0x1_8000;
const HEADERS: u64 = 0x4_0000;
const TABLES: u64 = 0x8_0000;
pub const DATA: u64 = 0x10_0000;
/// Bytes of a slot's data, and of its indirect table.
pub const SLOT: u64 = 64 << 10;
const TABLE: u64 = 1 << 10;
/// A back end that does not answer for so long hangs.
const HANG: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

pub const INDIRECT: u64 = 1 << 28;
pub const EVENT_IDX: u64 = 1 << 29;
pub const PROTOCOL: u64 = 1 << 30;
pub const VERSION_1: u64 = 1 << 32;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const TABLE_FLAG: u16 = 4;

/// Types of requests.
pub mod kind {
    pub const READ: u32 = 0;
    pub const WRITE: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const ZEROES: u32 = 13;
}

/// A guest's memory, which outlives every front end.
pub struct Memory {
    pub fd: OwnedFd,
    pub len: u64,
    mapping: Mapping,
}

impl Memory {
    pub fn new(queues: u64) -> Memory {
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        let len = queues * QUEUE;
        ftruncate(&fd, len).unwrap();
        let mapping = Mapping::new(&fd, 0, len).unwrap();
        Memory { fd, len, mapping }
    }

    pub fn at(&self, guest: u64, len: u64) -> Slice<'_> {
        self.mapping.slice(guest, len).unwrap()
    }

    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: self.len,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.fd.as_raw_fd(),
        }
    }
}

/// What a driver does.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub queues: u16,
    pub size: u16,
    pub indirect: bool,
    pub event_idx: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { queues: 1, size: 64, indirect: true, event_idx: true }
    }
}

/// A connected front end whose queues run.
pub struct FrontEnd<'m> {
    pub front: Frontend,
    pub memory: &'m Memory,
    pub options: Options,
    pub features: u64,
    pub queues: Vec<Queue<'m>>,
    pub inflight: Option<(VhostUserInflight, std::fs::File)>,
}

/// A driver's side of a virtqueue.
pub struct Queue<'m> {
    memory: &'m Memory,
    base: u64,
    options: Options,
    pub kick: EventFd,
    pub call: EventFd,
    call_fd: OwnedFd,
    pub available: u16,
    pub seen: u16,
    kicked: u16,
    descriptors: Slice<'m>,
    available_ring: Slice<'m>,
    used_ring: Slice<'m>,
}

/// A request that has come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    pub slot: u16,
    pub status: u8,
    pub written: u32,
}

/// A request to make.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    pub kind: u32,
    pub sector: u64,
    /// Bytes of data, in `pieces` buffers.
    pub len: u64,
    pub pieces: u64,
}

impl Ask {
    pub fn new(kind: u32, sector: u64, len: u64) -> Ask {
        Ask { kind, sector, len, pieces: 1 }
    }

    fn is_for_device(self) -> bool {
        matches!(self.kind, kind::WRITE | kind::DISCARD | kind::ZEROES)
    }
}

pub fn connect(socket: &Path) -> UnixStream {
    UnixStream::connect(socket).unwrap()
}

impl<'m> FrontEnd<'m> {
    /// Negotiates and starts every queue.
    pub fn start(socket: &Path, memory: &'m Memory, options: Options) -> FrontEnd<'m> {
        let mut front = FrontEnd::greet(socket, memory, options);
        let wanted = VhostUserInflight { num_queues: options.queues, queue_size: options.size, ..Default::default() };
        let offered = front.front.get_protocol_features().unwrap();
        if offered.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            let (inflight, file) = front.front.get_inflight_fd(&wanted).unwrap();
            front.inflight = Some((inflight, file));
        }
        front.go(0..options.queues, |_| 0);
        front
    }

    /// The same guest with another back end, as QEMU does it: queues go on where the used ring stands, and the in-flight memory
    /// tells the rest.
    pub fn resume(self, socket: &Path) -> FrontEnd<'m> {
        let FrontEnd { memory, options, queues, inflight, .. } = self;
        let mut front = FrontEnd { queues, inflight, ..FrontEnd::greet(socket, memory, options) };
        front.go(0..options.queues, |queue| queue.used_index());
        front
    }

    /// Negotiates features alone.
    pub fn greet(socket: &Path, memory: &'m Memory, options: Options) -> FrontEnd<'m> {
        let mut front = Frontend::from_stream(connect(socket), options.queues.into());
        front.set_owner().unwrap();
        let offered = front.get_features().unwrap();
        let mut features = offered & !(INDIRECT | EVENT_IDX);
        features |= if options.indirect { INDIRECT } else { 0 } | if options.event_idx { EVENT_IDX } else { 0 };
        let protocol = front.get_protocol_features().unwrap();
        front.set_protocol_features(protocol).unwrap();
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        front.set_features(features).unwrap();
        let queues = (0..options.queues).map(|index| Queue::new(memory, index, options)).collect();
        FrontEnd { front, memory, options, features, queues, inflight: None }
    }

    /// Passes memory, and starts queues that go on at `base`.
    pub fn go(&mut self, queues: std::ops::Range<u16>, base: impl Fn(&Queue<'_>) -> u16) {
        if let Some((inflight, file)) = &self.inflight {
            self.front.set_inflight_fd(inflight, file.as_raw_fd()).unwrap();
        }
        self.front.set_mem_table(&[self.memory.region()]).unwrap();
        for index in queues.map(usize::from) {
            let queue = &self.queues[index];
            self.front.set_vring_num(index, self.options.size).unwrap();
            self.front.set_vring_base(index, base(queue)).unwrap();
            self.front.set_vring_addr(index, &queue.addresses()).unwrap();
            self.front.set_vring_call(index, &queue.call).unwrap();
            self.front.set_vring_kick(index, &queue.kick).unwrap();
            self.front.set_vring_enable(index, true).unwrap();
        }
    }

    pub fn config(&mut self, len: u32) -> Vec<u8> {
        let flags = VhostUserConfigFlags::WRITABLE;
        self.front.get_config(0, len, flags, &vec![0; len as usize]).unwrap().1
    }

    /// Makes one request on the first queue and waits for it: its status, and its data.
    pub fn one(&mut self, ask: Ask, data: &[u8]) -> (u8, Vec<u8>) {
        self.one_on(0, ask, data)
    }

    pub fn one_on(&mut self, queue: usize, ask: Ask, data: &[u8]) -> (u8, Vec<u8>) {
        let queue = &mut self.queues[queue];
        queue.data(0, data.len() as u64).copy_from(data);
        queue.submit(0, ask);
        queue.kick();
        let done = queue.wait();
        assert_eq!((done.len(), done[0].slot), (1, 0));
        let mut bytes = vec![0; ask.len as usize];
        queue.data(0, ask.len).copy_to(&mut bytes);
        (done[0].status, bytes)
    }

    pub fn read(&mut self, sector: u64, len: u64) -> Vec<u8> {
        let (status, bytes) = self.one(Ask::new(kind::READ, sector, len), &[]);
        assert_eq!(status, 0);
        bytes
    }

    pub fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.one(Ask::new(kind::WRITE, sector, data.len() as u64), data).0
    }

    /// Whether the back end has hung up; waits for it.
    pub fn was_hung_up_on(&self) -> bool {
        let socket = duplicate(self.front.as_raw_fd());
        poll(&mut [PollFd::new(&socket, PollFlags::RDHUP)], Some(&HANG)).unwrap() == 1
    }
}

/// A descriptor of our own for what a crate shows by its number alone.
fn duplicate(number: i32) -> OwnedFd {
    let own = pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).unwrap();
    pidfd_getfd(&own, number, PidfdGetfdFlags::empty()).unwrap()
}

impl<'m> Queue<'m> {
    pub fn new(memory: &'m Memory, index: u16, options: Options) -> Queue<'m> {
        let base = u64::from(index) * QUEUE;
        let size = u64::from(options.size);
        let call = EventFd::new(EFD_NONBLOCK).unwrap();
        Queue {
            memory,
            base,
            options,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call_fd: duplicate(call.as_raw_fd()),
            call,
            available: 0,
            seen: 0,
            kicked: 0,
            descriptors: memory.at(base, 16 * size),
            available_ring: memory.at(base + AVAILABLE, 6 + 2 * size),
            used_ring: memory.at(base + USED, 6 + 8 * size),
        }
    }

    pub fn addresses(&self) -> VringConfigData {
        VringConfigData {
            queue_max_size: self.options.size,
            queue_size: self.options.size,
            flags: 0,
            desc_table_addr: USER + self.base,
            used_ring_addr: USER + self.base + USED,
            avail_ring_addr: USER + self.base + AVAILABLE,
            log_addr: None,
        }
    }

    /// The guest's address of a slot's data.
    pub fn data_at(&self, slot: u16) -> u64 {
        self.base + DATA + u64::from(slot) * SLOT
    }

    pub fn data(&self, slot: u16, len: u64) -> Slice<'m> {
        self.memory.at(self.data_at(slot), len)
    }

    pub fn header_at(&self, slot: u16) -> u64 {
        self.base + HEADERS + u64::from(slot) * 64
    }

    /// Where the status of a slot goes: behind its header.
    pub fn status_at(&self, slot: u16) -> u64 {
        self.header_at(slot) + 32
    }

    pub fn table_at(&self, slot: u16) -> u64 {
        self.base + TABLES + u64::from(slot) * TABLE
    }

    /// A slot's indirect table.
    pub fn table(&self, slot: u16) -> Slice<'m> {
        self.memory.at(self.table_at(slot), TABLE)
    }

    /// Writes a descriptor into a table.
    pub fn describe(&self, table: Slice<'_>, index: u16, guest: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&guest.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        table.part(usize::from(index) * 16, 16).unwrap().copy_from(&bytes);
    }

    pub fn descriptor(&self, index: u16, guest: u64, len: u32, flags: u16, next: u16) {
        self.describe(self.descriptors, index, guest, len, flags, next);
    }

    pub fn put_header(&self, slot: u16, kind: u32, sector: u64) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.at(self.header_at(slot), 16).copy_from(&header);
        self.memory.at(self.status_at(slot), 1).copy_from(&[0xee]);
    }

    /// Most slots that can be under way.
    pub fn slots(&self) -> u16 {
        if self.options.indirect { self.options.size } else { self.options.size / 4 }
    }

    /// Makes a request of a free slot available; the back end is not told yet.
    pub fn submit(&mut self, slot: u16, ask: Ask) {
        self.put_header(slot, ask.kind, ask.sector);
        let (table, first) = if self.options.indirect {
            (self.table(slot), 0)
        } else {
            assert!(ask.pieces <= 2);
            (self.descriptors, slot * 4)
        };
        let mut at = first;
        self.describe(table, at, self.header_at(slot), 16, NEXT, at + 1);
        let writable = if ask.is_for_device() { 0 } else { WRITE };
        let mut done = 0;
        for piece in 1..=ask.pieces {
            let end = ask.len * piece / ask.pieces / 512 * 512;
            let end = if piece == ask.pieces { ask.len } else { end };
            if end > done {
                at += 1;
                self.describe(table, at, self.data_at(slot) + done, (end - done) as u32, NEXT | writable, at + 1);
            }
            done = end;
        }
        self.describe(table, at + 1, self.status_at(slot), 1, WRITE, 0);
        let head = if self.options.indirect {
            self.descriptor(slot, self.table_at(slot), u32::from(at + 2) * 16, TABLE_FLAG, 0);
            slot
        } else {
            first
        };
        self.offer(head);
    }

    /// Makes the chain at `head` available.
    pub fn offer(&mut self, head: u16) {
        let at = 4 + 2 * usize::from(self.available % self.options.size);
        self.available_ring.store_u16(at, head, Ordering::Relaxed).unwrap();
        self.available = self.available.wrapping_add(1);
        self.set_available(self.available);
    }

    pub fn set_available(&self, index: u16) {
        self.available_ring.store_u16(2, index, Ordering::Release).unwrap();
    }

    /// Notifies the back end, if it wants to be notified; whether it did.
    pub fn kick(&mut self) -> bool {
        std::sync::atomic::fence(Ordering::SeqCst);
        let before = std::mem::replace(&mut self.kicked, self.available);
        let wanted = if self.options.event_idx {
            let event = self.used_ring.load_u16(4 + 8 * usize::from(self.options.size), Ordering::Relaxed).unwrap();
            self.available.wrapping_sub(event).wrapping_sub(1) < self.available.wrapping_sub(before)
        } else {
            self.used_ring.load_u16(0, Ordering::Relaxed).unwrap() & 1 == 0
        };
        if wanted {
            self.kick.write(1).unwrap();
        }
        wanted
    }

    /// What stands in the used ring and has not been seen.
    pub fn done(&mut self) -> Vec<Done> {
        let mut all = Vec::new();
        while self.seen != self.used_ring.load_u16(2, Ordering::Acquire).unwrap() {
            let mut bytes = [0; 8];
            let at = 4 + 8 * usize::from(self.seen % self.options.size);
            self.used_ring.part(at, 8).unwrap().copy_to(&mut bytes);
            self.seen = self.seen.wrapping_add(1);
            let head = u16::from_le_bytes([bytes[0], bytes[1]]);
            let slot = if self.options.indirect { head } else { head / 4 };
            let mut status = [0];
            self.memory.at(self.status_at(slot), 1).copy_to(&mut status);
            let written = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
            all.push(Done { slot, status: status[0], written });
        }
        all
    }

    /// Asks to be told of the next one; whether there is one already.
    pub fn listen(&self) -> bool {
        let at = 4 + 2 * usize::from(self.options.size);
        self.available_ring.store_u16(at, self.seen, Ordering::Relaxed).unwrap();
        std::sync::atomic::fence(Ordering::SeqCst);
        self.used_ring.load_u16(2, Ordering::Acquire).unwrap() != self.seen
    }

    /// Waits for at least one.
    pub fn wait(&mut self) -> Vec<Done> {
        self.wait_for(&HANG).expect("the back end does not answer")
    }

    pub fn wait_for(&mut self, time: &Timespec) -> Option<Vec<Done>> {
        loop {
            let done = self.done();
            if !done.is_empty() {
                return Some(done);
            }
            if self.listen() {
                continue;
            }
            if poll(&mut [PollFd::new(&self.call_fd, PollFlags::IN)], Some(time)).unwrap() == 0 {
                return None;
            }
            let _ = self.call.read();
        }
    }

    pub fn used_index(&self) -> u16 {
        self.used_ring.load_u16(2, Ordering::Acquire).unwrap()
    }
}
