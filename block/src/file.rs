// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The drivers `file` and `host_device`: a regular file or memfd, or a block device, behind a passed descriptor.
//!
//! The descriptor shares its offset and status flags with whoever passed it, so all I/O is positioned and no flag is ever
//! set. The size is taken at open; whoever keeps an image in the file may make it longer.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{FallocateFlags, FileType, SeekFrom};
use rustix::io::Errno;
use sys::file;

use crate::claims::Demand;
use crate::direct::Direct;
use crate::driver::{Ask, Detail, Driver, Info, Mapping, Prepared, Target, ZeroFlags};
use crate::drivers::{DriverEntry, OpenRequest, OptionKind, OptionSpec, OptionValue};
use crate::host::Descriptor;
use crate::image_locks::ImageLocks;
use crate::located::HostFile;
use crate::{Error, Result};

pub(crate) const ENTRY: DriverEntry = DriverEntry {
    name: "file",
    summary: "a regular file, passed as a descriptor",
    children: &[],
    options: &[OptionSpec {
        name: "aio",
        kind: OptionKind::Aio,
        summary: "Who waits for reads that must wait: `threads`, or `io_uring`, which is the default where the daemon has \
                  rings (`--aio`). `native` is not supported.",
    }],
    takes_descriptor: true,
    writes: true,
    probe: |_| false,
    open: |request| open(request, FileType::RegularFile),
};

pub(crate) const DEVICE_ENTRY: DriverEntry = DriverEntry {
    name: "host_device",
    summary: "a block device, passed as a descriptor",
    open: |request| open(request, FileType::BlockDevice),
    ..ENTRY
};

/// QEMU's sector: lengths are rounded up to it, and what lies past the end of the file reads as zeroes.
const SECTOR: u64 = 512;

struct File {
    /// Owns the number under which all I/O is done; [`Driver::replace`] puts another open file behind it.
    fd: Descriptor,
    /// The descriptor whose open file is behind the number now, if it is not the first.
    latest: Mutex<Option<Descriptor>>,
    locks: ImageLocks,
    len: AtomicU64,
    regular: bool,
    /// How it is reached past the page cache, if it was opened so.
    direct: Option<Direct>,
    /// Whether others than threads may wait for its reads.
    aio: bool,
}

/// The name of the driver for what `fd` is: `host_device` for a block device, else `file`.
///
/// # Errors
/// `fstat` fails, or it is a null device: SELinux puts one in the place of what a new program may not use.
pub fn host_driver(fd: impl AsFd) -> io::Result<&'static str> {
    let stat = rustix::fs::fstat(fd)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::BlockDevice => Ok(DEVICE_ENTRY.name),
        FileType::CharacterDevice if stat.st_rdev == rustix::fs::makedev(1, 3) => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "it did not arrive, a null device did: SELinux passes one in place of a file that this process may not use \
             (look at the file's type and categories)",
        )),
        _ => Ok(ENTRY.name),
    }
}

fn open(request: OpenRequest, wanted: FileType) -> Result<Box<dyn Driver>> {
    let OpenRequest { descriptor, filename, options, .. } = request;
    let fd = descriptor.ok_or_else(|| Error::invalid("Parameter 'filename' is missing"))?;
    let stat = rustix::fs::fstat(fd.as_fd()).map_err(|e| Error::io("look at the descriptor", e.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != wanted {
        return Err(Error::invalid(if wanted == FileType::RegularFile {
            format!("'file' driver requires '{filename}' to be a regular file")
        } else {
            format!("'host_device' driver requires '{filename}' to be a block device")
        }));
    }
    let size = match wanted {
        FileType::BlockDevice => {
            sys::disk::size(fd.as_fd()).map_err(|e| Error::io("ask the device for its size", e))?
        }
        _ => u64::try_from(stat.st_size).unwrap_or(u64::MAX),
    };
    let len = size
        .checked_next_multiple_of(SECTOR)
        .filter(|&bytes| i64::try_from(bytes).is_ok())
        .ok_or_else(|| Error::unsupported(format!("'{filename}' is larger than 2^63-512 bytes")))?;
    let regular = wanted == FileType::RegularFile;
    let direct =
        Direct::of(fd.as_fd(), regular).map_err(|e| Error::io("find out how a file without cache is read", e))?;
    Ok(Box::new(File {
        fd,
        latest: Mutex::default(),
        locks: ImageLocks::default(),
        len: AtomicU64::new(len),
        regular,
        direct,
        aio: options.get("aio") != Some(&OptionValue::Str("threads".into())),
    }))
}

impl Driver for File {
    fn len(&self) -> u64 {
        self.len.load(Ordering::Relaxed)
    }

    fn map(&self, offset: u64, len: u64, ask: Ask) -> io::Result<Mapping<'_>> {
        let fd = self.fd.as_fd();
        let data = |len| Mapping::fixed(Target::Fd { fd, offset }, len);
        let zero = |len| Mapping::fixed(Target::Zero, len);
        if ask.detail == Detail::Place {
            let target = if self.direct.is_some() { Target::Computed } else { Target::Fd { fd, offset } };
            return Ok(Mapping::fixed(target, len));
        }
        // A file system that cannot tell holes answers EINVAL or EOPNOTSUPP: then all of it is data.
        match rustix::fs::seek(fd, SeekFrom::Data(offset)) {
            Ok(start) if start > offset => Ok(zero(len.min(start - offset))),
            Ok(_) => match rustix::fs::seek(fd, SeekFrom::Hole(offset)) {
                Ok(end) if end > offset => {
                    // The implicit hole at the end of the file: the sector that it cuts is data to its last byte.
                    let end = end.next_multiple_of(SECTOR);
                    Ok(data(len.min(end - offset)))
                }
                _ => Ok(data(len)),
            },
            Err(Errno::NXIO) => Ok(zero(len)),
            Err(_) => Ok(data(len)),
        }
    }

    fn prepare_write(&self, offset: u64, len: u64) -> io::Result<Prepared<'_>> {
        // A write that then fails has promised too much: what is not there reads as zeroes all the same.
        self.len.fetch_max((offset + len).next_multiple_of(SECTOR), Ordering::Relaxed);
        let target = if self.direct.is_some() { Target::Computed } else { Target::Fd { fd: self.fd.as_fd(), offset } };
        Ok(Prepared::in_place(target, len))
    }

    fn read_computed(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let direct = self.direct.as_ref().ok_or(Errno::IO)?;
        let got = direct.read(self.fd.as_fd(), buf, offset)?;
        buf[got..].fill(0);
        Ok(())
    }

    fn write_computed(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.direct.as_ref().ok_or(Errno::IO)?.write(self.fd.as_fd(), buf, offset)
    }

    fn host_file(&self) -> Option<HostFile<'_>> {
        let block = self.direct.as_ref().map_or(1, Direct::block);
        self.aio.then(|| HostFile { fd: self.fd.as_fd(), block })
    }

    fn bypasses_cache(&self) -> bool {
        self.direct.is_some()
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        let fd = self.fd.as_fd();
        let _others = self.direct.as_ref().map(Direct::share);
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if flags.may_unmap && rustix::fs::fallocate(fd, punch, offset, len).is_ok() {
            return Ok(());
        }
        // A hole between the end of the file and the node's rounded end needs no zeroes: it reads as zeroes already.
        match rustix::fs::fallocate(fd, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, offset, len) {
            // A device zeroes whole blocks only; the rest is written.
            Err(Errno::INVAL) => Err(Errno::OPNOTSUPP.into()),
            other => Ok(other?),
        }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let _others = self.direct.as_ref().map(Direct::share);
        match rustix::fs::fallocate(
            self.fd.as_fd(),
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            len,
        ) {
            Err(Errno::OPNOTSUPP | Errno::INVAL) => Ok(()),
            other => Ok(other?),
        }
    }

    fn flush(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(self.fd.as_fd())?)
    }

    fn hand_over(&self) -> io::Result<()> {
        Ok(())
    }

    fn grows(&self) -> bool {
        self.regular
    }

    fn resize(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        let now = self.len();
        if preallocation == Preallocation::Metadata {
            return Err(Error::unsupported("Unsupported preallocation mode: metadata"));
        }
        if !self.regular {
            return if len <= now {
                Ok(())
            } else {
                Err(Error::invalid(format!("Cannot grow device files: it has {now} bytes, {len} were asked for")))
            };
        }
        let fd = self.fd.as_fd();
        let alone = self.direct.as_ref().map(Direct::alone);
        let failed = |e: Errno| Error::io("set the size of the file", e.into());
        let stat = rustix::fs::fstat(fd).map_err(failed)?;
        // ext4 takes an empty file that is made empty for one that is replaced, and writes all of it out when it is closed.
        if u64::try_from(stat.st_size) != Ok(len) {
            rustix::fs::ftruncate(fd, len).map_err(failed)?;
        }
        drop(alone);
        match &self.direct {
            _ if len <= now => {}
            Some(direct) if preallocation == Preallocation::Full => {
                let zeroes = fill(now..len, |zeroes, offset| direct.write(fd, zeroes, offset));
                zeroes.and_then(|()| self.flush()).map_err(|e| Error::io("write zeroes", e))?;
            }
            _ => set_aside(fd, now..len, preallocation)?,
        }
        self.len.store(len.next_multiple_of(SECTOR), Ordering::Relaxed);
        Ok(())
    }

    fn replace(&self, descriptor: Descriptor) -> Result<Descriptor> {
        let failed = |e| Error::io("put another descriptor in use", e);
        let before = rustix::io::fcntl_dupfd_cloexec(self.fd.as_fd(), 0).map_err(|e| failed(e.into()))?;
        sys::fd::replace(self.fd.as_fd(), descriptor.as_fd()).map_err(failed)?;
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Box::new(Previous { fd: before, _tracked: latest.replace(descriptor) }))
    }

    fn lock(&self, demand: Demand) -> Result<()> {
        self.locks.change(self.fd.as_fd(), demand)
    }

    fn info(&self) -> Info {
        // st_blocks counts units of 512 bytes whatever the file system's block is (stat(2)).
        let blocks = rustix::fs::fstat(self.fd.as_fd()).ok().and_then(|stat| u64::try_from(stat.st_blocks).ok());
        Info { allocated_size: blocks.and_then(|blocks| blocks.checked_mul(512)), ..Info::default() }
    }
}

/// How room for a file is set aside when it is made (QAPI's `PreallocMode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preallocation {
    /// Not at all: it is a hole.
    Off,
    /// The format says where everything will be, in holes of the file. A file without a format has no such thing.
    Metadata,
    /// The file system promises it.
    Allocate,
    /// Zeroes are written.
    Full,
}

/// Makes a raw image of `size` bytes of a regular file that can be written; what it held is gone.
///
/// # Errors
/// It is no regular file or is in use by another program (image locks), `size` is out of range, or the file system says no.
pub fn create(fd: impl AsFd, size: u64, preallocation: Preallocation) -> Result<()> {
    let fd = fd.as_fd();
    let failed = |doing| move |e: Errno| Error::io(doing, e.into());
    if i64::try_from(size).is_err() {
        return Err(Error::invalid(format!("The size must be less than 2^63 bytes, not {size}")));
    }
    let stat = rustix::fs::fstat(fd).map_err(failed("look at the descriptor"))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Error::invalid("An image can be made of a regular file only"));
    }
    let locks = ImageLocks::default();
    locks.change(fd, Demand { writes: true, resizes: true, ..Demand::default() })?;
    let made = rustix::fs::ftruncate(fd, 0)
        .and_then(|()| rustix::fs::ftruncate(fd, size))
        .map_err(failed("set the size of the file"))
        .and_then(|()| set_aside(fd, 0..size, preallocation));
    locks.change(fd, Demand::default())?;
    made
}

/// Sets room aside for a range at the end of a file, which is a hole.
fn set_aside(fd: BorrowedFd<'_>, range: Range<u64>, preallocation: Preallocation) -> Result<()> {
    match preallocation {
        Preallocation::Allocate if !range.is_empty() => {
            rustix::fs::fallocate(fd, FallocateFlags::empty(), range.start, range.end - range.start)
                .map_err(|e| Error::io("set room for the file aside", e.into()))
        }
        Preallocation::Full => fill(range, |zeroes, offset| file::write_at(fd, zeroes, offset, false))
            .and_then(|()| Ok(rustix::fs::fdatasync(fd)?))
            .map_err(|e| Error::io("write zeroes", e)),
        Preallocation::Metadata => Err(Error::unsupported("Unsupported preallocation mode: metadata")),
        Preallocation::Off | Preallocation::Allocate => Ok(()),
    }
}

fn fill(range: Range<u64>, write: impl Fn(&[u8], u64) -> io::Result<()>) -> io::Result<()> {
    let zeroes = vec![0; 1 << 20];
    let mut offset = range.start;
    while offset < range.end {
        let len = usize::try_from(range.end - offset).map_or(zeroes.len(), |left| left.min(zeroes.len()));
        write(&zeroes[..len], offset)?;
        offset += len as u64;
    }
    Ok(())
}

/// What was in use before, to go back to.
struct Previous {
    fd: OwnedFd,
    /// Keeps the fd set aware of it.
    _tracked: Option<Descriptor>,
}

impl AsFd for Previous {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // The open file is shared with the fd set and with whoever passed it: closing a duplicate gives no lock back.
        let _ = self.locks.change(self.fd.as_fd(), Demand::default());
    }
}
