// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Formats that are only read: each says where runs of bytes are stored, and [`ReadOnly`] is the driver around it.
//!
//! None keeps its tables in memory: an image says how large they are, and the page cache has what is asked often.

mod bochs;
mod cloop;
mod dmg;
mod parallels;
mod qcow;
mod qed;
mod vhdx;

use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use crate::claims::Writes;
use crate::driver::{Ask, Driver, Info, Mapping, Prepared, Target, ZeroFlags};
use crate::drivers::{ChildSpec, DriverEntry, OpenRequest};
use crate::inflated::Inflated;
use crate::{BlockNode, Error, Result, Wait};

pub(crate) use bochs::ENTRY as BOCHS;
pub(crate) use cloop::ENTRY as CLOOP;
pub(crate) use dmg::ENTRY as DMG;
pub(crate) use parallels::ENTRY as PARALLELS;
pub(crate) use qcow::ENTRY as QCOW;
pub(crate) use qed::ENTRY as QED;
pub(crate) use vhdx::ENTRY as VHDX;

/// What such a format is built from.
const FILE: ChildSpec = ChildSpec { name: "file", required: true, writes: Writes::Never };
const BACKING: ChildSpec = ChildSpec { name: "backing", required: false, writes: Writes::Never };

/// All that these entries have in common.
const fn entry(
    name: &'static str,
    summary: &'static str,
    children: &'static [ChildSpec],
    probe: fn(&[u8; 512]) -> bool,
    open: fn(OpenRequest) -> Result<Box<dyn Driver>>,
) -> DriverEntry {
    DriverEntry { name, summary, children, options: &[], takes_descriptor: false, writes: false, probe, open }
}

/// Bytes of the guest's view that are stored in one way.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// Its first byte, as a guest sees it.
    start: u64,
    /// At least 1.
    len: u64,
    stored: Stored,
}

#[derive(Clone, Copy, Debug)]
enum Stored {
    /// From this byte of the file on; past its end they are zeroes.
    At(u64),
    /// They are zeroes.
    Zero,
    /// As the backing file has them.
    Absent,
    /// Packed, at a place that is no other run's.
    Packed(u64),
}

/// Where a format has its bytes.
trait Lookup: Send + Sync {
    /// The run that holds the byte at `offset`, which is within the image.
    ///
    /// # Errors
    /// `WouldBlock` as `wait` says, `EIO` for tables that break the rules.
    fn find(&self, offset: u64, wait: Wait) -> io::Result<Run>;

    /// The bytes of a packed run, as many as its `len`.
    ///
    /// # Errors
    /// `EIO` if they cannot be unpacked.
    fn unpack(&self, _run: &Run) -> io::Result<Vec<u8>> {
        Err(Errno::IO.into())
    }
}

/// An open image.
struct ReadOnly<L> {
    lookup: L,
    file: Arc<BlockNode>,
    backing: Option<Arc<BlockNode>>,
    size: u64,
    /// Runs that were unpacked a moment ago.
    unpacked: Inflated,
    info: Info,
}

impl<L: Lookup + 'static> ReadOnly<L> {
    /// An image of `size` bytes whose packed runs have at most `largest`.
    fn open(request: &OpenRequest, lookup: L, size: u64, largest: u64, info: Info) -> Result<Box<dyn Driver>> {
        if request.writable {
            return Err(Error::unsupported("images of this format can only be read: open it with read-only=on"));
        }
        if size > i64::MAX as u64 {
            return Err(Error::corrupt(format!("the image says that it has {size} bytes")));
        }
        let backing = request.children.get("backing").cloned();
        if let (Some(name), None, false) = (&info.backing_name, &backing, request.detached.contains("backing")) {
            return Err(Error::invalid(format!(
                "the image names '{}' as its backing file, and names in images are never followed: give 'backing' a node, or \
                 null to read what only the backing file holds as zeroes",
                name.escape_debug()
            )));
        }
        let unpacked = Inflated::new(usize::try_from(largest.max(1)).unwrap_or(usize::MAX));
        Ok(Box::new(ReadOnly { lookup, file: request.child("file")?, backing, size, unpacked, info }))
    }
}

impl<L: Lookup> Driver for ReadOnly<L> {
    fn len(&self) -> u64 {
        self.size
    }

    fn map(&self, offset: u64, len: u64, ask: Ask) -> io::Result<Mapping<'_>> {
        let run = self.lookup.find(offset, ask.wait)?;
        let skip = offset.checked_sub(run.start).filter(|skip| *skip < run.len).ok_or(Errno::IO)?;
        let target = match (run.stored, &self.backing) {
            (Stored::At(at), _) => Target::Data { node: &self.file, offset: at.checked_add(skip).ok_or(Errno::IO)? },
            (Stored::Zero, _) => Target::Zero,
            (Stored::Absent, Some(node)) => Target::Child { node, offset },
            (Stored::Absent, None) => Target::Absent,
            (Stored::Packed(_), _) => Target::Computed,
        };
        Ok(Mapping::fixed(target, len.min(run.len - skip)))
    }

    fn read_computed(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let run = self.lookup.find(offset, Wait::Allowed)?;
        let Stored::Packed(place) = run.stored else { return Err(Errno::IO.into()) };
        let content = self.unpacked.whole(place, || self.lookup.unpack(&run))?;
        let skip = offset.checked_sub(run.start).and_then(|skip| usize::try_from(skip).ok()).ok_or(Errno::IO)?;
        let content = content.get(skip..).and_then(|content| content.get(..buf.len())).ok_or(Errno::IO)?;
        buf.copy_from_slice(content);
        Ok(())
    }

    fn prepare_write(&self, _offset: u64, _len: u64) -> io::Result<Prepared<'_>> {
        Err(Errno::ROFS.into())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _flags: ZeroFlags) -> io::Result<()> {
        Err(Errno::ROFS.into())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(Errno::ROFS.into())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn reopen(&self, writable: bool) -> Result<()> {
        if writable { Err(Error::unsupported("images of this format can only be read")) } else { Ok(()) }
    }

    fn info(&self) -> Info {
        Info { allocated_size: self.file.info().allocated_size, ..self.info.clone() }
    }
}

/// A header of `N` bytes at the start of the file.
fn header<const N: usize>(file: &BlockNode, format: &str) -> Result<[u8; N]> {
    if file.len() < N as u64 {
        return Err(Error::corrupt(format!("a {format} image has a header of {N} bytes, the file has {}", file.len())));
    }
    let mut bytes = [0; N];
    file.read(&mut bytes, 0, Wait::Allowed).map_err(|e| Error::io("read the header of the image", e))?;
    Ok(bytes)
}

/// `N` bytes at `offset`, which must be within the file: tables do not go on behind its end.
fn field<const N: usize>(file: &BlockNode, offset: u64, wait: Wait) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    match offset.checked_add(N as u64) {
        Some(end) if end <= file.len() => file.read(&mut bytes, offset, wait).map(|()| bytes),
        _ => Err(Errno::IO.into()),
    }
}

/// The backing file's name: at most 1023 bytes at `offset`.
fn backing_name(file: &BlockNode, offset: u64, len: u32) -> Result<Option<String>> {
    if offset == 0 || len == 0 {
        return Ok(None);
    }
    if len > 1023 {
        return Err(Error::corrupt(format!("Backing file name too long: {len} bytes, at most 1023")));
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    match offset.checked_add(len.into()) {
        Some(end) if end <= file.len() => {}
        _ => return Err(Error::corrupt("the backing file's name lies behind the end of the file")),
    }
    file.read(&mut bytes, offset, Wait::Allowed).map_err(|e| Error::io("read the backing file's name", e))?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

fn u32_le(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |field| u32::from_le_bytes(*field))
}

fn u64_le(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |field| u64::from_le_bytes(*field))
}

fn u32_be(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |field| u32::from_be_bytes(*field))
}

fn u64_be(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |field| u64::from_be_bytes(*field))
}
