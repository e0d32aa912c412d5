// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The one file: a node with an owner and permissions, and what can be done to it.

use std::error::Error as _;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use block::stats::{Kind, Stats};
use block::{BlockNode, ErrorKind, ExtentKind, Preallocation, Root, Wait, ZeroFlags};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::reply::{Reply, errno};
use super::request::{Attributes, MAX_WRITE, Operation, Request, SEEK_DATA, SEEK_HOLE, init_flag, set};
use crate::meter::Meter;

/// The protocol that is spoken: 7.28 is the first whose kernels take requests of [`MAX_WRITE`] bytes.
const MAJOR: u32 = 7;
const MINOR: u32 = 31;
const LEAST_MINOR: u32 = 28;
/// Asynchronous requests that the kernel may have under way, and from how many on it holds back.
const MOST_BACKGROUND: u16 = 64;
const CONGESTED: u16 = 48;
/// `FOPEN_DIRECT_IO` and `FOPEN_PARALLEL_DIRECT_WRITES`.
const OPEN_FLAGS: u32 = 1 << 0 | 1 << 6;
/// Largest size of a file: a whole number of sectors below 2^63.
const LARGEST: u64 = (1 << 63) - 512;
/// Steps over the node's extents that one lseek may take; then it answers what is true of any file: here may be data.
const MOST_STEPS: usize = 1 << 16;
/// `O_ACCMODE` (open(2)).
const ACCESS_MODE: u32 = 3;
/// The bits of a mode that chmod(2) may change here: reading and writing, for anybody.
const PERMISSIONS: u32 = 0o666;
const WRITE_PERMISSIONS: u32 = 0o222;
const REGULAR: u32 = 0o100_000;

/// What the file is made of, and how it looks.
#[derive(Debug)]
pub struct Settings {
    /// The node.
    pub node: Arc<BlockNode>,
    /// Whether it may be written; the node is then writable too.
    pub writable: bool,
    /// Whether its size may be changed.
    pub growable: bool,
    /// Whether owner and permissions may be changed: only of use where others than the owner can get at it.
    pub shared: bool,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// The file.
#[derive(Debug)]
pub struct File {
    root: Arc<Root>,
    writable: bool,
    growable: bool,
    shared: bool,
    look: Mutex<Look>,
    /// Nanoseconds since 1970.
    mtime: AtomicU64,
    opened: AtomicU64,
    /// Held while the size changes, and by whoever must know it.
    resizing: Mutex<()>,
    stats: Arc<Stats>,
    meter: Meter,
}

/// Owner and permissions.
#[derive(Debug)]
struct Look {
    mode: u32,
    uid: u32,
    gid: u32,
}

type Outcome = Result<(), Errno>;

impl File {
    /// A file that nobody has opened.
    pub fn new(settings: Settings) -> File {
        let Settings { node, writable, growable, shared, uid, gid } = settings;
        let stats: Arc<Stats> = Arc::default();
        let root = Root::new(node);
        File {
            writable,
            growable,
            shared,
            look: Mutex::new(Look { mode: if writable { 0o600 } else { 0o400 }, uid, gid }),
            mtime: AtomicU64::new(now()),
            opened: AtomicU64::new(0),
            resizing: Mutex::default(),
            meter: Meter::new(Arc::clone(&stats), Arc::clone(&root)),
            stats,
            root,
        }
    }

    /// Where it finds its node.
    pub fn root(&self) -> &Arc<Root> {
        &self.root
    }

    /// The node at this moment.
    pub fn node(&self) -> Arc<BlockNode> {
        self.root.node()
    }

    /// What was asked of it.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// How often it is open now.
    pub fn opened(&self) -> u64 {
        self.opened.load(Relaxed)
    }

    /// Does what `request` asks, and leaves the reply at the beginning of `room`, which has room for any reply: its length, or
    /// `None` if there is nothing to answer.
    pub fn answer(&self, request: &Request<'_>, room: &mut [u8]) -> Option<usize> {
        let mut reply = Reply::new(room);
        let outcome = match request.operation {
            Ok(Operation::Unanswered) => return None,
            Ok(operation) => self.perform(operation, &mut reply),
            Err(errno) => Err(errno),
        };
        Some(reply.finish(request.unique, outcome))
    }

    fn perform(&self, operation: Operation<'_>, reply: &mut Reply<'_>) -> Outcome {
        match operation {
            Operation::Init { major, minor, max_readahead, flags } => init(reply, major, minor, max_readahead, flags),
            Operation::GetAttributes => self.attributes(reply),
            Operation::SetAttributes(attributes) => self.set_attributes(&attributes, reply),
            Operation::Open { flags } => self.open(flags, reply),
            Operation::Release => {
                // The kernel closes what it opened; the counter stays sound even if it did not.
                let _ = self.opened.fetch_update(Relaxed, Relaxed, |opened| opened.checked_sub(1));
                Ok(())
            }
            Operation::Read { offset, len } => {
                self.counted(Kind::Read, len.into(), || self.read(offset, len as usize, reply))
            }
            Operation::Write { offset, data } => {
                self.counted(Kind::Write, data.len() as u64, || self.write(offset, data, reply))
            }
            Operation::Flush => self.counted(Kind::Flush, 0, || self.root.enter().flush().map_err(|e| errno(&e))),
            Operation::Allocate { offset, len, mode } => {
                self.counted(Kind::Zeroes, len, || self.allocate(offset, len, mode))
            }
            Operation::Seek { offset, whence } => self.counted(Kind::Status, 0, || {
                reply.u64(self.seek(offset, whence)?);
                Ok(())
            }),
            Operation::FileSystem => {
                self.file_system(reply);
                Ok(())
            }
            Operation::Destroy | Operation::Unanswered => Ok(()),
        }
    }

    fn counted(&self, kind: Kind, bytes: u64, work: impl FnOnce() -> Outcome) -> Outcome {
        let started = Instant::now();
        let outcome = work();
        self.meter.record(kind, bytes, outcome.is_err(), started);
        outcome
    }

    /// `struct fuse_attr_out`: never valid for longer than now, because others may change the size.
    fn attributes(&self, reply: &mut Reply<'_>) -> Outcome {
        let len = self.root.enter().len();
        let blocks = self.root.enter().info().allocated_size.unwrap_or(len) / 512;
        let mtime = self.mtime.load(Relaxed);
        let seconds = mtime / 1_000_000_000;
        // Below 10^9.
        let nanoseconds = u32::try_from(mtime % 1_000_000_000).unwrap_or(0);
        let look = self.look();
        reply.padding(16);
        for value in [1, len, blocks, seconds, seconds, seconds] {
            reply.u64(value);
        }
        for value in [nanoseconds, nanoseconds, nanoseconds, REGULAR | look.mode, 1, look.uid, look.gid, 0, 4096, 0] {
            reply.u32(value);
        }
        Ok(())
    }

    fn set_attributes(&self, wanted: &Attributes, reply: &mut Reply<'_>) -> Outcome {
        let Attributes { valid, size, mtime, mode, uid, gid } = *wanted;
        let look = valid & (set::MODE | set::UID | set::GID) != 0;
        if look && !self.shared {
            return Err(Errno::OPNOTSUPP);
        }
        if valid & set::MODE != 0
            && (mode & 0o7777 & !PERMISSIONS != 0 || (!self.writable && mode & WRITE_PERMISSIONS != 0))
        {
            // Nobody can execute a disk, or write to one that is read-only.
            return Err(Errno::ROFS);
        }
        if valid & set::SIZE != 0 {
            self.truncate(size)?;
        }
        if look {
            let mut look = self.look();
            look.mode = if valid & set::MODE != 0 { mode & PERMISSIONS } else { look.mode };
            look.uid = if valid & set::UID != 0 { uid } else { look.uid };
            look.gid = if valid & set::GID != 0 { gid } else { look.gid };
        }
        if valid & set::MTIME_NOW != 0 {
            self.mtime.store(now(), Relaxed);
        } else if valid & set::MTIME != 0 {
            self.mtime.store(mtime, Relaxed);
        }
        self.attributes(reply)
    }

    /// `struct fuse_open_out`.
    fn open(&self, flags: u32, reply: &mut Reply<'_>) -> Outcome {
        if flags & ACCESS_MODE != 0 && !self.writable {
            return Err(Errno::ROFS);
        }
        self.opened.fetch_add(1, Relaxed);
        reply.u64(0);
        reply.u32(OPEN_FLAGS);
        reply.u32(0);
        Ok(())
    }

    fn read(&self, offset: u64, len: usize, reply: &mut Reply<'_>) -> Outcome {
        if len > MAX_WRITE {
            return Err(Errno::INVAL);
        }
        // Up to the end: the rest is missing from the reply.
        let there = usize::try_from(self.root.enter().len().saturating_sub(offset)).unwrap_or(usize::MAX).min(len);
        if there == 0 {
            return Ok(());
        }
        self.root.enter().read(reply.data(there), offset, Wait::Allowed).map_err(|e| errno(&e))
    }

    /// What passes the end makes the file longer if it can be longer; else what fits is written, and `ENOSPC` if that is nothing.
    fn write(&self, offset: u64, data: &[u8], reply: &mut Reply<'_>) -> Outcome {
        if !self.writable {
            return Err(Errno::BADF);
        }
        let end = offset.checked_add(data.len() as u64).filter(|&end| end <= LARGEST).ok_or(Errno::FBIG)?;
        if self.growable && end > self.root.enter().len() {
            let _alone = self.alone();
            if end > self.root.enter().len() {
                self.resize(end, Preallocation::Off)?;
            }
        }
        let there =
            usize::try_from(self.root.enter().len().saturating_sub(offset)).unwrap_or(usize::MAX).min(data.len());
        if there == 0 && !data.is_empty() {
            return Err(Errno::NOSPC);
        }
        self.root.enter().write(&data[..there], offset, false).map_err(|e| errno(&e))?;
        self.mtime.store(now(), Relaxed);
        // `struct fuse_write_out`; at most MAX_WRITE.
        reply.u32(u32::try_from(there).unwrap_or(0));
        reply.u32(0);
        Ok(())
    }

    fn truncate(&self, size: u64) -> Outcome {
        let _alone = self.alone();
        if size == self.root.enter().len() {
            return Ok(());
        }
        if !self.growable {
            // truncate(2): "the underlying file system does not support ...".
            return Err(Errno::PERM);
        }
        self.resize(size, Preallocation::Off)
    }

    /// Call it alone.
    fn resize(&self, size: u64, preallocation: Preallocation) -> Outcome {
        if size > LARGEST {
            return Err(Errno::FBIG);
        }
        self.root.enter().resize(size, preallocation).map_err(|e| {
            let host = e.source().and_then(|source| source.downcast_ref::<io::Error>());
            match (host, e.kind) {
                (Some(host), _) => errno(host),
                (None, ErrorKind::Unsupported) => Errno::OPNOTSUPP,
                (None, ErrorKind::Invalid) => Errno::INVAL,
                (None, _) => Errno::IO,
            }
        })?;
        self.mtime.store(now(), Relaxed);
        Ok(())
    }

    /// fallocate(2): holes and zeroes anywhere, room at the end of a file that can grow. Room in the middle cannot be promised.
    fn allocate(&self, offset: u64, len: u64, mode: u32) -> Outcome {
        if !self.writable {
            return Err(Errno::BADF);
        }
        let end = offset.checked_add(len).filter(|&end| end <= LARGEST).ok_or(Errno::FBIG)?;
        if len == 0 {
            return Err(Errno::INVAL);
        }
        let keep_size = mode & FallocateFlags::KEEP_SIZE.bits() != 0;
        let kind = mode & !FallocateFlags::KEEP_SIZE.bits();
        let size = self.root.enter().len();
        if kind == 0 {
            return if !keep_size && offset >= size && self.growable {
                let _alone = self.alone();
                self.resize(offset, Preallocation::Off)?;
                self.resize(end, Preallocation::Allocate)
            } else {
                Err(Errno::OPNOTSUPP)
            };
        }
        let may_unmap = kind == FallocateFlags::PUNCH_HOLE.bits();
        if (!may_unmap && kind != FallocateFlags::ZERO_RANGE.bits()) || (may_unmap && !keep_size) {
            return Err(Errno::OPNOTSUPP);
        }
        if !keep_size && end > size {
            if !self.growable {
                return Err(Errno::NOSPC);
            }
            let _alone = self.alone();
            if end > self.root.enter().len() {
                self.resize(end, Preallocation::Off)?;
            }
        }
        let there = self.root.enter().len().min(end).saturating_sub(offset);
        if there == 0 {
            return Ok(());
        }
        let flags = ZeroFlags { may_unmap, fast_only: false };
        self.root.enter().write_zeroes(offset, there, flags, false).map_err(|e| errno(&e))?;
        self.mtime.store(now(), Relaxed);
        Ok(())
    }

    /// lseek(2) for data and holes; the end of the file is a hole.
    fn seek(&self, offset: u64, whence: u32) -> Result<u64, Errno> {
        let wanted = match whence {
            SEEK_DATA => ExtentKind::Data,
            SEEK_HOLE => ExtentKind::Zero,
            _ => return Err(Errno::INVAL),
        };
        let end = self.root.enter().len();
        if offset >= end {
            return Err(Errno::NXIO);
        }
        let mut at = offset;
        for _ in 0..MOST_STEPS {
            let extent = self.root.enter().status(at, end - at).map_err(|e| errno(&e))?;
            if extent.kind == wanted {
                return Ok(at);
            }
            at = at.saturating_add(extent.len);
            if at >= end {
                return if wanted == ExtentKind::Data { Err(Errno::NXIO) } else { Ok(end) };
            }
        }
        Ok(if wanted == ExtentKind::Data { at } else { end })
    }

    /// `struct fuse_kstatfs`: a file system that this file fills.
    fn file_system(&self, reply: &mut Reply<'_>) {
        reply.u64(self.root.enter().len() / 512);
        reply.padding(16);
        reply.u64(1);
        reply.u64(0);
        reply.u32(512);
        reply.u32(255);
        reply.u32(512);
        reply.padding(28);
    }

    fn look(&self) -> MutexGuard<'_, Look> {
        self.look.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> MutexGuard<'_, ()> {
        self.resizing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `struct fuse_init_out`.
fn init(reply: &mut Reply<'_>, major: u32, minor: u32, max_readahead: u32, offered: u64) -> Outcome {
    if major != MAJOR || minor < LEAST_MINOR {
        return Err(Errno::PROTO);
    }
    let wanted = init_flag::ASYNC_READ
        | init_flag::BIG_WRITES
        | init_flag::ASYNC_DIO
        | init_flag::MAX_PAGES
        | init_flag::INIT_EXT
        | init_flag::DIRECT_IO_ALLOW_MMAP;
    let flags = (wanted & offered).to_ne_bytes();
    let [low, high] = if cfg!(target_endian = "little") { [0, 4] } else { [4, 0] };
    let half = |at: usize| u32::from_ne_bytes([flags[at], flags[at + 1], flags[at + 2], flags[at + 3]]);
    reply.u32(MAJOR);
    reply.u32(MINOR);
    reply.u32(max_readahead);
    reply.u32(half(low));
    reply.u16(MOST_BACKGROUND);
    reply.u16(CONGESTED);
    // MAX_WRITE fits.
    reply.u32(u32::try_from(MAX_WRITE).unwrap_or(u32::MAX));
    reply.u32(1);
    // Of pages of 4 KiB; where they are larger, MAX_WRITE is what bounds. Nobody can be asked for their size from here.
    reply.u16(u16::try_from(MAX_WRITE / 4096).unwrap_or(u16::MAX));
    reply.u16(0);
    reply.u32(half(high));
    reply.padding(28);
    Ok(())
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
