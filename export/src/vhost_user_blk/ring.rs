// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A split virtqueue, seen from the device (virtio 1.3, 2.7).
//!
//! Everything in it is the guest's and may change between two looks, so every number is read once, checked, and only then
//! used. What cannot be is [`Corrupt`], and the device ends; there is no guess at what a guest may have meant.
//!
//! ```text
//! descriptors  16 bytes each: le64 address, le32 length, le16 flags, le16 next
//! available    le16 flags, le16 idx, le16 heads[size], le16 used_event
//! used         le16 flags, le16 idx, { le32 head, le32 length }[size], le16 avail_event
//! ```

use std::sync::atomic::{Ordering, fence};

use sys::guest::Slice;

use super::memory::Memory;
use super::proto::Addresses;

/// Most entries of a queue (2.7).
pub const MAX_SIZE: u32 = 32768;
/// Most buffers of a chain, and entries of an indirect table: the most that a system call takes, a header and a status.
const MOST_BUFFERS: usize = 1026;

/// Bits of a descriptor's flags (2.7.5).
mod flag {
    pub const NEXT: u16 = 1;
    pub const WRITE: u16 = 2;
    pub const INDIRECT: u16 = 4;
}
/// The driver wants no interrupts (2.7.6); the device wants no notifications (2.7.8).
const QUIET: u16 = 1;

/// What a guest has put into a ring that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Corrupt {
    /// More chains are available than the queue has entries.
    Jump(u16),
    /// The head or the next of a chain lies beyond its table.
    Index(u16),
    /// A chain with more buffers than its table has entries.
    Loop,
    /// A buffer or an indirect table that is not all in the guest's memory.
    Address(u64, u32),
    /// An indirect table of a wrong length, in an indirect table, or with a successor.
    Indirect(u32),
    /// A buffer without bytes.
    Empty,
    /// A buffer to read behind one to write.
    Order,
    /// A chain that has no room for the request's header or its status.
    Short,
    /// Memory was gone when it was touched.
    Gone,
    /// The ring does not fit where it is said to be.
    Layout(&'static str),
    /// Memory that says what is under way says something impossible.
    Inflight(&'static str),
}

impl std::fmt::Display for Corrupt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Corrupt::Jump(ahead) => write!(f, "{ahead} chains are available at once, more than the queue has entries"),
            Corrupt::Index(index) => write!(f, "descriptor {index} is beyond its table"),
            Corrupt::Loop => f.write_str("a chain of descriptors has no end"),
            Corrupt::Address(at, len) => write!(f, "{len} bytes at {at:#x} are not in the guest's memory"),
            Corrupt::Indirect(len) => write!(f, "an indirect table of {len} bytes cannot be, or not there"),
            Corrupt::Empty => f.write_str("a buffer has no bytes"),
            Corrupt::Order => f.write_str("a buffer to read stands behind one to write"),
            Corrupt::Short => f.write_str("a chain has no room for a header and a status"),
            Corrupt::Gone => f.write_str("memory that was passed has been taken away"),
            Corrupt::Layout(what) | Corrupt::Inflight(what) => f.write_str(what),
        }
    }
}

/// Some of a guest's bytes, all in its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// The guest's address.
    pub guest: u64,
    /// Bytes, at least 1.
    pub len: u32,
}

/// The buffers of a chain, in order. Kept and filled again for every chain.
#[derive(Debug, Default)]
pub struct Chain {
    /// Those that the device reads.
    pub readable: Vec<Buffer>,
    /// Those that it writes.
    pub writable: Vec<Buffer>,
}

/// A queue.
pub struct Ring<'m> {
    memory: &'m Memory,
    size: u16,
    event_idx: bool,
    descriptors: Slice<'m>,
    available: Slice<'m>,
    used: Slice<'m>,
    next_available: u16,
    next_used: u16,
    /// What `used.idx` was when the driver was last told, or not told for a reason.
    told: u16,
}

impl<'m> Ring<'m> {
    /// A ring of `size` entries, a power of two up to [`MAX_SIZE`], that goes on at `next_available`; where the used ring goes
    /// on stands in it.
    ///
    /// # Errors
    /// It is not aligned, or not all in one region.
    pub fn new(
        memory: &'m Memory,
        size: u16,
        at: Addresses,
        event_idx: bool,
        next_available: u16,
    ) -> Result<Ring<'m>, Corrupt> {
        let aligned = at.descriptors.is_multiple_of(16) && at.available.is_multiple_of(2) && at.used.is_multiple_of(4);
        if !aligned {
            return Err(Corrupt::Layout("the ring is not aligned"));
        }
        let entries = u64::from(size);
        let event = if event_idx { 2 } else { 0 };
        let find = |at, len| memory.at_user(at, len).ok_or(Corrupt::Layout("the ring is not in the guest's memory"));
        let descriptors = find(at.descriptors, 16 * entries)?;
        let available = find(at.available, 4 + 2 * entries + event)?;
        let used = find(at.used, 4 + 8 * entries + event)?;
        let next_used = load(&used, 2, Ordering::Acquire)?;
        let told = next_used;
        Ok(Ring { memory, size, event_idx, descriptors, available, used, next_available, next_used, told })
    }

    /// Where the driver's next chain will stand.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// Goes on elsewhere in the available ring.
    pub fn set_next_available(&mut self, next: u16) {
        self.next_available = next;
    }

    /// `used.idx` once everything is [published](Ring::publish).
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// How many chains are available.
    ///
    /// # Errors
    /// More than there are entries.
    #[inline]
    pub fn available(&self) -> Result<u16, Corrupt> {
        let ahead = load(&self.available, 2, Ordering::Acquire)?.wrapping_sub(self.next_available);
        if ahead > self.size { Err(Corrupt::Jump(ahead)) } else { Ok(ahead) }
    }

    /// Takes the head of the next chain, of which there must be one.
    ///
    /// # Errors
    /// It lies beyond the table.
    #[inline]
    pub fn pop(&mut self) -> Result<u16, Corrupt> {
        let at = 4 + 2 * usize::from(self.next_available & (self.size - 1));
        let head = load(&self.available, at, Ordering::Relaxed)?;
        if head >= self.size {
            return Err(Corrupt::Index(head));
        }
        self.next_available = self.next_available.wrapping_add(1);
        Ok(head)
    }

    /// Fills `chain` with the buffers of the chain that begins at `head`.
    ///
    /// # Errors
    /// It breaks a rule of [`Corrupt`].
    pub fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), Corrupt> {
        chain.readable.clear();
        chain.writable.clear();
        let (mut table, mut entries, mut index) = (self.descriptors, usize::from(self.size), head);
        let (mut indirect, mut left) = (false, entries.min(MOST_BUFFERS));
        loop {
            let at = usize::from(index);
            let slot = if at < entries { table.part(at * 16, 16) } else { None };
            let mut bytes = [0; 16];
            slot.ok_or(Corrupt::Index(index))?.copy_to(&mut bytes);
            let [b0, b1, b2, b3, b4, b5, b6, b7, l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
            let guest = u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7]);
            let len = u32::from_le_bytes([l0, l1, l2, l3]);
            let (flags, next) = (u16::from_le_bytes([f0, f1]), u16::from_le_bytes([n0, n1]));
            if flags & flag::INDIRECT != 0 {
                let count = len as usize / 16;
                let fits = len % 16 == 0 && 0 < count && count <= MOST_BUFFERS;
                if indirect || flags & flag::NEXT != 0 || !fits {
                    return Err(Corrupt::Indirect(len));
                }
                table = self.memory.at_guest(guest, len.into()).ok_or(Corrupt::Address(guest, len))?;
                (entries, index, indirect, left) = (count, 0, true, count);
                continue;
            }
            if len == 0 {
                return Err(Corrupt::Empty);
            }
            left = left.checked_sub(1).ok_or(Corrupt::Loop)?;
            if flags & flag::WRITE != 0 {
                chain.writable.push(Buffer { guest, len });
            } else if chain.writable.is_empty() {
                chain.readable.push(Buffer { guest, len });
            } else {
                return Err(Corrupt::Order);
            }
            if flags & flag::NEXT == 0 {
                return Ok(());
            }
            if left == 0 {
                return Err(Corrupt::Loop);
            }
            index = next;
        }
    }

    /// Puts a chain into the used ring, with the bytes that were written to it. The driver sees it after [`Ring::publish`].
    ///
    /// # Errors
    /// None in a ring that was made.
    #[inline]
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), Corrupt> {
        let at = 4 + 8 * usize::from(self.next_used & (self.size - 1));
        let mut element = [0; 8];
        element[..2].copy_from_slice(&head.to_le_bytes());
        element[4..].copy_from_slice(&written.to_le_bytes());
        self.used.part(at, 8).ok_or(BEYOND)?.copy_from(&element);
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Lets the driver see what was pushed; whether it wants to be told.
    ///
    /// # Errors
    /// None in a ring that was made.
    pub fn publish(&mut self) -> Result<bool, Corrupt> {
        store(&self.used, 2, self.next_used, Ordering::Release)?;
        // The driver writes what it wants, then looks at the index; here it is the other way round (2.7.10.1).
        fence(Ordering::SeqCst);
        let before = std::mem::replace(&mut self.told, self.next_used);
        if !self.event_idx {
            return Ok(load(&self.available, 0, Ordering::Relaxed)? & QUIET == 0);
        }
        let wanted = load(&self.available, 4 + 2 * usize::from(self.size), Ordering::Relaxed)?;
        let since = self.next_used.wrapping_sub(before);
        Ok(self.next_used.wrapping_sub(wanted).wrapping_sub(1) < since)
    }

    /// Asks to be notified of the next chain; whether one came before that could be seen.
    ///
    /// # Errors
    /// As [`Ring::available`].
    pub fn listen(&mut self) -> Result<bool, Corrupt> {
        if self.event_idx {
            store(&self.used, 4 + 8 * usize::from(self.size), self.next_available, Ordering::Relaxed)?;
        } else {
            store(&self.used, 0, 0, Ordering::Relaxed)?;
        }
        fence(Ordering::SeqCst);
        Ok(self.available()? > 0)
    }

    /// Asks not to be notified for now. With positions, a driver does that by itself after one notification.
    ///
    /// # Errors
    /// None in a ring that was made.
    pub fn ignore(&mut self) -> Result<(), Corrupt> {
        if self.event_idx { Ok(()) } else { store(&self.used, 0, QUIET, Ordering::Relaxed) }
    }
}

/// Cannot be in a ring whose parts have the lengths that [`Ring::new`] asked for.
const BEYOND: Corrupt = Corrupt::Layout("the ring ends too early");

fn load(slice: &Slice<'_>, at: usize, order: Ordering) -> Result<u16, Corrupt> {
    slice.load_u16(at, order).ok_or(BEYOND)
}

fn store(slice: &Slice<'_>, at: usize, number: u16, order: Ordering) -> Result<(), Corrupt> {
    slice.store_u16(at, number, order).ok_or(BEYOND)
}
