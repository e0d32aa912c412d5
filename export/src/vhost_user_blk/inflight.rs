// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory that outlives this process and knows which requests it had taken (vhost-user.rst, "Inflight I/O tracking").
//!
//! The front end keeps it and gives it to the next back end. For each queue:
//!
//! ```text
//! le64 features, le16 version, le16 descriptors, le16 last_batch_head, le16 used_idx,
//! { u8 inflight, 5 bytes, le16 next, le64 counter }[descriptors]
//! ```
//!
//! A process can end between any two of these stores, and each order is chosen for that: a request is marked before it is
//! done, a batch is linked before the used ring shows it and unmarked after. [`Tracker::recover`] finds the batch that was
//! shown but not yet unmarked; what is still marked then is done again, in the order in which it was taken.
//!
//! The memory is the front end's to write, too: what stands in it is checked like everything else that comes from there.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use sys::guest::{Mapping, Slice};

use super::proto::InflightAt;
use super::ring::Corrupt;

/// Bytes before the descriptors' states, and of each of them.
const HEAD: usize = 16;
const STATE: usize = 16;
/// What a queue's part is a multiple of.
const ALIGNMENT: u64 = 64;
/// The version of this layout.
const VERSION: u16 = 1;

/// Offsets in a queue's part.
mod at {
    pub const VERSION: usize = 8;
    pub const DESCRIPTORS: usize = 10;
    pub const LAST_BATCH_HEAD: usize = 12;
    pub const USED_IDX: usize = 14;
    /// And in a descriptor's state.
    pub const NEXT: usize = 6;
    pub const COUNTER: usize = 8;
}

/// The memory of all queues.
#[derive(Debug)]
pub struct Area {
    mapping: Mapping,
    at: InflightAt,
}

/// Bytes of the memory for so many queues of so many descriptors.
pub fn area_len(queues: u16, queue_size: u16) -> u64 {
    part_len(queue_size) * u64::from(queues)
}

fn part_len(queue_size: u16) -> u64 {
    (HEAD as u64 + STATE as u64 * u64::from(queue_size)).next_multiple_of(ALIGNMENT)
}

impl Area {
    /// The memory in `fd` as the front end describes it; `None` if it does not fit its description or cannot be mapped.
    pub fn new(fd: impl AsFd, at: InflightAt) -> Option<Area> {
        let fits = at.queues > 0 && at.queue_size.is_power_of_two() && at.len >= area_len(at.queues, at.queue_size);
        let mapping = if fits { Mapping::new(fd, at.offset, at.len).ok() } else { None };
        mapping.map(|mapping| Area { mapping, at })
    }

    /// What it is for.
    pub fn description(&self) -> InflightAt {
        self.at
    }

    /// The part of a queue of `size` entries.
    ///
    /// # Errors
    /// There is none for that queue, or it is for another size.
    pub fn tracker(&self, queue: u16, size: u16) -> Result<Tracker<'_>, Corrupt> {
        if queue >= self.at.queues || size > self.at.queue_size {
            return Err(Corrupt::Inflight("the in-flight memory is for other queues"));
        }
        let len = part_len(self.at.queue_size);
        let part = self.mapping.slice(len * u64::from(queue), len).ok_or(BEYOND)?;
        Ok(Tracker { part, descriptors: self.at.queue_size, size, counter: 0, last_batch_head: 0, batch: Vec::new() })
    }

    /// Whether it turned out to be gone.
    pub fn is_broken(&self) -> bool {
        self.mapping.is_broken()
    }
}

/// What one queue has under way.
pub struct Tracker<'m> {
    part: Slice<'m>,
    descriptors: u16,
    size: u16,
    /// Of the next request.
    counter: u64,
    last_batch_head: u16,
    /// Heads that are pushed and not yet shown.
    batch: Vec<u16>,
}

impl Tracker<'_> {
    /// Takes up what a process before this one left: the heads that it had taken and not given back, in order. `used` is where
    /// the used ring stands.
    ///
    /// # Errors
    /// The memory says something that cannot be.
    pub fn recover(&mut self, used: u16) -> Result<Vec<u16>, Corrupt> {
        if self.get(at::VERSION)? == 0 {
            self.put(at::DESCRIPTORS, self.descriptors)?;
            self.put(at::USED_IDX, used)?;
            self.put(at::VERSION, VERSION)?;
            return Ok(Vec::new());
        }
        if self.get(at::VERSION)? != VERSION || self.get(at::DESCRIPTORS)? != self.descriptors {
            return Err(Corrupt::Inflight("the in-flight memory is of another version or size"));
        }
        let shown = used.wrapping_sub(self.get(at::USED_IDX)?);
        if shown > self.size {
            return Err(Corrupt::Inflight("the in-flight memory tells of a larger batch than the queue can hold"));
        }
        let mut head = self.get(at::LAST_BATCH_HEAD)?;
        for _ in 0..shown {
            let state = self.state(head)?;
            state.copy_from(&[0]);
            head = state.load_u16(at::NEXT, Ordering::Relaxed).ok_or(BEYOND)?;
        }
        self.last_batch_head = self.get(at::LAST_BATCH_HEAD)?;
        self.put(at::USED_IDX, used)?;
        let mut left = Vec::new();
        for head in 0..self.size {
            let mut bytes = [0; STATE];
            self.state(head)?.copy_to(&mut bytes);
            if bytes[0] != 0 {
                let counter = bytes[at::COUNTER..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
                left.push((counter, head));
            }
        }
        left.sort_unstable();
        self.counter = left.last().map_or(0, |last| last.0.wrapping_add(1));
        Ok(left.into_iter().map(|(_, head)| head).collect())
    }

    /// A request has been taken.
    ///
    /// # Errors
    /// As everywhere here, none for a head that the ring gave.
    #[inline]
    pub fn taken(&mut self, head: u16) -> Result<(), Corrupt> {
        let state = self.state(head)?;
        state.part(at::COUNTER, 8).ok_or(BEYOND)?.copy_from(&self.counter.to_le_bytes());
        state.copy_from(&[1]);
        self.counter = self.counter.wrapping_add(1);
        Ok(())
    }

    /// It has been pushed to the used ring, where the driver does not see it yet.
    ///
    /// # Errors
    /// As [`Tracker::taken`].
    #[inline]
    pub fn pushed(&mut self, head: u16) -> Result<(), Corrupt> {
        self.state(head)?.store_u16(at::NEXT, self.last_batch_head, Ordering::Release).ok_or(BEYOND)?;
        self.put(at::LAST_BATCH_HEAD, head)?;
        self.last_batch_head = head;
        self.batch.push(head);
        Ok(())
    }

    /// The used ring shows everything that was pushed, up to `used`.
    ///
    /// # Errors
    /// As [`Tracker::taken`].
    pub fn shown(&mut self, used: u16) -> Result<(), Corrupt> {
        let mut batch = std::mem::take(&mut self.batch);
        for head in batch.drain(..) {
            self.state(head)?.copy_from(&[0]);
        }
        self.batch = batch;
        self.put(at::USED_IDX, used)
    }

    fn state(&self, head: u16) -> Result<Slice<'_>, Corrupt> {
        if head >= self.descriptors {
            return Err(Corrupt::Inflight("the in-flight memory names a descriptor that there is not"));
        }
        let at = HEAD + STATE * usize::from(head);
        self.part.part(at, STATE).ok_or(BEYOND)
    }

    fn get(&self, at: usize) -> Result<u16, Corrupt> {
        self.part.load_u16(at, Ordering::Acquire).ok_or(BEYOND)
    }

    fn put(&self, at: usize, number: u16) -> Result<(), Corrupt> {
        self.part.store_u16(at, number, Ordering::Release).ok_or(BEYOND)
    }
}

/// Cannot be in memory of the length that [`Area::new`] asked for.
const BEYOND: Corrupt = Corrupt::Inflight("the in-flight memory ends too early");

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn area() -> Area {
        let at = InflightAt { len: area_len(2, 8), offset: 0, queues: 2, queue_size: 8 };
        let fd = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, at.len).unwrap();
        Area::new(fd, at).unwrap()
    }

    /// A queue that gave back 3, of which the driver has seen nothing when the process ended after `step` steps.
    fn end_after(step: usize) -> Vec<u16> {
        let area = area();
        let mut tracker = area.tracker(1, 8).unwrap();
        assert_eq!(tracker.recover(40).unwrap(), [0u16; 0]);
        for head in [5, 3, 7] {
            tracker.taken(head).unwrap();
        }
        let mut used = 40;
        if step > 0 {
            tracker.pushed(3).unwrap();
        }
        if step > 1 {
            used += 1;
        }
        if step > 2 {
            tracker.shown(used).unwrap();
        }
        area.tracker(1, 8).unwrap().recover(used).unwrap()
    }

    #[test]
    fn a_request_is_done_again_exactly_if_the_driver_has_not_seen_its_end() {
        assert_eq!(end_after(0), [5, 3, 7]);
        assert_eq!(end_after(1), [5, 3, 7]);
        assert_eq!(end_after(2), [5, 7]);
        assert_eq!(end_after(3), [5, 7]);
    }

    #[test]
    fn a_forged_memory_is_refused_whatever_it_says() {
        let forged = |forge: &dyn Fn(&Slice<'_>)| {
            let area = area();
            area.tracker(0, 8).unwrap().recover(0).unwrap();
            forge(&area.mapping.slice(0, part_len(8)).unwrap());
            area.tracker(0, 8).unwrap().recover(1)
        };
        let put = |at, number| {
            move |part: &Slice<'_>| part.store_u16(at, number, Ordering::Relaxed).expect("a number of the head")
        };
        assert!(forged(&put(at::LAST_BATCH_HEAD, 8)).is_err());
        assert!(forged(&put(at::USED_IDX, 100)).is_err());
        assert!(forged(&put(at::DESCRIPTORS, 9)).is_err());
        assert!(forged(&put(at::VERSION, 2)).is_err());
        assert_eq!(forged(&put(at::USED_IDX, 0)), Ok(Vec::new()));
    }

    #[test]
    fn a_short_memory_or_one_for_other_queues_is_refused() {
        let fd = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        let at = |len, queues, queue_size| InflightAt { len, offset: 0, queues, queue_size };
        assert!(Area::new(&fd, at(area_len(2, 8) - 1, 2, 8)).is_none());
        assert!(Area::new(&fd, at(u64::MAX, 2, 8)).is_none());
        assert!(Area::new(&fd, at(4096, 0, 8)).is_none());
        assert!(Area::new(&fd, at(4096, 1, 0)).is_none());
        assert!(area().tracker(2, 8).is_err());
        assert!(area().tracker(0, 16).is_err());
    }
}
