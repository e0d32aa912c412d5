// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A request of a block device (virtio 1.3, 5.2.6): its header, its data where it lies in the guest's memory, its status.

use std::io;

use block::stats::Kind;
use block::{Entered, Wait, ZeroFlags};
use rustix::io::Errno;
use sys::guest::Slice;
use sys::scatter;

use super::config::{MAX_RANGE_SECTORS, MAX_RANGES, SECTOR};
use super::memory::Memory;
use super::ring::{Buffer, Chain, Corrupt};

/// Bytes of a header: le32 type, le32 reserved, le64 sector.
const HEADER: usize = 16;
/// Bytes of a range to discard or to make zeroes: le64 sector, le32 sectors, le32 flags.
const RANGE: usize = 16;
/// Bytes of the answer to `GET_ID`.
pub const ID: usize = 20;
/// A transfer goes to the node in pieces of at most this many bytes.
const MOST: usize = 32 << 20;

/// Statuses.
pub mod status {
    /// Done.
    pub const OK: u8 = 0;
    /// Failed.
    pub const IOERR: u8 = 1;
    /// Unknown to the device.
    pub const UNSUPP: u8 = 2;
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fill the data from this byte.
    Read(u64),
    /// Store the data at this byte.
    Write(u64),
    /// Have everything on stable storage.
    Flush,
    /// Fill the data with the device's name.
    Identify,
    /// Forget ranges.
    Discard(Vec<Range>),
    /// Make ranges read as zeroes.
    Zeroes(Vec<Range>),
    /// Nothing that can be done: the status says why.
    Refused(u8),
}

/// A range of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    offset: u64,
    len: u64,
    may_unmap: bool,
}

/// A request.
#[derive(Clone, Debug)]
pub struct Request {
    /// What is asked.
    pub operation: Operation,
    /// Where its data is.
    pub data: Vec<Buffer>,
    /// Bytes of the data.
    pub len: u64,
    /// The guest's address of the status.
    status: u64,
}

/// What a request is done with.
#[derive(Debug)]
pub struct Means<'a> {
    /// The disk.
    pub node: Entered<'a>,
    /// Whether it may be changed.
    pub writable: bool,
    /// Whether a write must be on stable storage when it is answered.
    pub durable: bool,
    /// What [`Operation::Identify`] answers.
    pub id: &'a [u8; ID],
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Its status.
    pub status: u8,
    /// Bytes of its data that were written for the guest.
    pub written: u32,
}

impl Request {
    /// Reads the request in `chain`, whose buffers are taken apart, into this one.
    ///
    /// # Errors
    /// It has no room for a header or a status, or a part of it is not in the guest's memory.
    pub fn parse(&mut self, chain: &mut Chain, memory: &Memory, block_size: u32) -> Result<(), Corrupt> {
        let mut header = [0; HEADER];
        take_front(&mut chain.readable, memory, &mut header)?;
        let last = chain.writable.last_mut().ok_or(Corrupt::Short)?;
        last.len -= 1;
        self.status = last.guest.checked_add(last.len.into()).ok_or(Corrupt::Address(last.guest, last.len))?;
        if last.len == 0 {
            chain.writable.pop();
        }
        let [t0, t1, t2, t3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let kind = u32::from_le_bytes([t0, t1, t2, t3]);
        let from_guest = matches!(kind, 1 | 11 | 13);
        std::mem::swap(&mut self.data, if from_guest { &mut chain.readable } else { &mut chain.writable });
        self.len = self.data.iter().map(|buffer| u64::from(buffer.len)).sum();
        let block = u64::from(block_size);
        let at = sector.checked_mul(SECTOR).filter(|at| at.is_multiple_of(block) && self.len.is_multiple_of(block));
        // The driver hears of the bytes written as a 32-bit number that has room for the status too.
        let at = at.filter(|_| self.len < u64::from(u32::MAX));
        self.operation = match (kind, at) {
            (0, Some(at)) => Operation::Read(at),
            (1, Some(at)) => Operation::Write(at),
            (0 | 1, None) => Operation::Refused(status::IOERR),
            (4, _) => Operation::Flush,
            (8, _) => Operation::Identify,
            (11, _) => self.ranges(memory, block)?.map_or_else(Operation::Refused, Operation::Discard),
            (13, _) => self.ranges(memory, block)?.map_or_else(Operation::Refused, Operation::Zeroes),
            _ => Operation::Refused(status::UNSUPP),
        };
        if let Operation::Discard(ranges) = &self.operation
            && ranges.iter().any(|range| range.may_unmap)
        {
            self.operation = Operation::Refused(status::UNSUPP);
        }
        Ok(())
    }

    /// The ranges in the data, or the status of a request that has wrong ones.
    fn ranges(&mut self, memory: &Memory, block: u64) -> Result<Result<Vec<Range>, u8>, Corrupt> {
        let count = usize::try_from(self.len).unwrap_or(usize::MAX) / RANGE;
        if !self.len.is_multiple_of(RANGE as u64) || count == 0 || count > MAX_RANGES as usize {
            return Ok(Err(status::IOERR));
        }
        let mut ranges = Vec::with_capacity(count);
        for _ in 0..count {
            let mut bytes = [0; RANGE];
            take_front(&mut self.data, memory, &mut bytes)?;
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = bytes;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            if flags & !1 != 0 {
                return Ok(Err(status::UNSUPP));
            }
            let (offset, len) = (sector.checked_mul(SECTOR), u64::from(sectors) * SECTOR);
            match offset {
                Some(offset) if sectors <= MAX_RANGE_SECTORS && offset % block == 0 && len % block == 0 => {
                    ranges.push(Range { offset, len, may_unmap: flags & 1 != 0 });
                }
                _ => return Ok(Err(status::IOERR)),
            }
        }
        self.len = ranges.iter().map(|range| range.len).sum();
        Ok(Ok(ranges))
    }

    /// What it counts as; `None` for what is no use of the disk.
    pub fn kind(&self) -> Option<Kind> {
        match self.operation {
            Operation::Read(_) => Some(Kind::Read),
            Operation::Write(_) => Some(Kind::Write),
            Operation::Flush => Some(Kind::Flush),
            Operation::Discard(_) => Some(Kind::Discard),
            Operation::Zeroes(_) => Some(Kind::Zeroes),
            Operation::Identify | Operation::Refused(_) => None,
        }
    }

    /// Whether it is best done by a thread that may sleep, whatever is in memory.
    pub fn is_slow(&self) -> bool {
        matches!(self.operation, Operation::Flush | Operation::Discard(_) | Operation::Zeroes(_))
    }

    /// Whether it is a write of data.
    pub fn is_write(&self) -> bool {
        matches!(self.operation, Operation::Write(_))
    }

    /// Does it. `slices` is room to lay the data out in. `None` only with [`Wait::Never`]: it would have to wait, and nothing
    /// has been done that cannot be done again.
    ///
    /// # Errors
    /// The data is not all in the guest's memory.
    pub fn perform<'m>(
        &self,
        memory: &'m Memory,
        means: Means<'_>,
        wait: Wait,
        slices: &mut Vec<Slice<'m>>,
    ) -> Result<Option<Outcome>, Corrupt> {
        slices.clear();
        for &Buffer { guest, len } in &self.data {
            if !memory.pieces(guest, len.into(), slices) {
                return Err(Corrupt::Address(guest, len));
            }
        }
        let Means { node, writable, durable, id } = means;
        let changes = matches!(self.operation, Operation::Write(_) | Operation::Discard(_) | Operation::Zeroes(_));
        let mut written = 0;
        let result = match &self.operation {
            _ if changes && !writable => Err(Errno::PERM.into()),
            &Operation::Read(offset) => {
                let read = in_pieces(slices, offset, |slices, at| node.read_scattered(slices, at, wait));
                written = if read.is_ok() { u32::try_from(self.len).unwrap_or(0) } else { 0 };
                read
            }
            &Operation::Write(offset) => {
                in_pieces(slices, offset, |slices, at| node.write_scattered(slices, at, durable))
            }
            Operation::Flush => node.flush(),
            Operation::Identify => {
                written = u32::try_from(scatter::copy_from(slices, id)).unwrap_or(0);
                Ok(())
            }
            Operation::Discard(ranges) => ranges.iter().try_for_each(|range| node.discard(range.offset, range.len)),
            Operation::Zeroes(ranges) => ranges.iter().try_for_each(|&Range { offset, len, may_unmap }| {
                node.write_zeroes(offset, len, ZeroFlags { may_unmap, fast_only: false }, durable)
            }),
            &Operation::Refused(status) => return Ok(Some(Outcome { status, written: 0 })),
        };
        match result {
            Ok(()) => Ok(Some(Outcome { status: status::OK, written })),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && wait == Wait::Never => Ok(None),
            Err(_) => Ok(Some(Outcome { status: status::IOERR, written: 0 })),
        }
    }

    /// Where the status goes.
    pub fn status_at(&self) -> u64 {
        self.status
    }
}

impl Default for Request {
    fn default() -> Request {
        Request { operation: Operation::Refused(status::UNSUPP), data: Vec::new(), len: 0, status: 0 }
    }
}

/// Writes a status.
///
/// # Errors
/// It is not in the guest's memory.
pub fn put_status(memory: &Memory, guest: u64, status: u8) -> Result<(), Corrupt> {
    memory.at_guest(guest, 1).ok_or(Corrupt::Address(guest, 1))?.copy_from(&[status]);
    Ok(())
}

fn in_pieces(
    slices: &[Slice<'_>],
    offset: u64,
    mut transfer: impl FnMut(&[Slice<'_>], u64) -> io::Result<()>,
) -> io::Result<()> {
    let len = scatter::len(slices);
    if len <= MOST {
        return transfer(slices, offset);
    }
    let mut done = 0;
    while done < len {
        let piece = (len - done).min(MOST);
        let at = offset.checked_add(done as u64).ok_or(Errno::INVAL)?;
        transfer(&scatter::part(slices, done, piece), at)?;
        done += piece;
    }
    Ok(())
}

/// Fills `into` from the front of the buffers, which lose those bytes.
fn take_front(buffers: &mut Vec<Buffer>, memory: &Memory, into: &mut [u8]) -> Result<(), Corrupt> {
    let (mut done, mut used_up) = (0, 0);
    while done < into.len() {
        let buffer = buffers.get_mut(used_up).ok_or(Corrupt::Short)?;
        let mut pieces = Vec::new();
        let wanted = u32::try_from(into.len() - done).unwrap_or(u32::MAX).min(buffer.len);
        let outside = Corrupt::Address(buffer.guest, buffer.len);
        match memory.at_guest(buffer.guest, wanted.into()) {
            Some(piece) => done += piece.copy_to(&mut into[done..]),
            None if memory.pieces(buffer.guest, wanted.into(), &mut pieces) => {
                done += scatter::copy_to(&pieces, &mut into[done..]);
            }
            None => return Err(outside),
        }
        buffer.guest = buffer.guest.checked_add(wanted.into()).ok_or(outside)?;
        buffer.len -= wanted;
        used_up += usize::from(buffer.len == 0);
    }
    buffers.drain(..used_up);
    Ok(())
}
