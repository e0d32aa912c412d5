// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Clusters that had to be inflated: a few stay in memory, and of more it is remembered that they are sound.
//!
//! A read needs a part of a cluster, and to inflate the rest takes most of its time. But whether a cluster is broken shows
//! only when all of it is inflated, and a broken one must be an error wherever it is read. So a cluster is inflated whole
//! until it was found sound once, and from then on as far as a read needs it; who reads on behind that gets all of it.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of inflated clusters that are kept; one cluster at least.
const KEPT: usize = 16 << 20;
/// Most clusters that are kept.
const MOST: usize = 1024;
/// Bytes of room that is kept for the next cluster; that of one cluster at least.
const SPARE: usize = 1 << 20;
/// Clusters that may be remembered as sound, a power of two: 8 bytes each.
const SOUND: usize = 1 << 16;

/// The start of a cluster's content: as much as a read needed, or all.
pub type Content = Arc<Vec<u8>>;

/// Inflated clusters by where their data stands.
pub struct Inflated {
    cluster_size: usize,
    in_parts: bool,
    kept: Mutex<Kept>,
}

/// Who is kept is decided by a clock: a hand goes round and takes the first that nobody used since it came by.
#[derive(Default)]
struct Kept {
    slots: Vec<Slot>,
    /// Offsets to indices of slots.
    found: HashMap<u64, usize>,
    hand: usize,
    spare: Vec<Vec<u8>>,
    sound: Sound,
}

struct Slot {
    offset: u64,
    used: bool,
    content: Content,
}

/// Offsets of clusters that were inflated whole: each has one place, where the next one that belongs there replaces it.
#[derive(Default)]
struct Sound(Vec<u64>);

impl Inflated {
    /// Clusters of `cluster_size` bytes at most, which are always inflated whole.
    pub fn new(cluster_size: usize) -> Inflated {
        Inflated { cluster_size, in_parts: false, kept: Mutex::default() }
    }

    /// Clusters of exactly `cluster_size` bytes, whose start can be inflated without the rest.
    pub fn in_parts(cluster_size: usize) -> Inflated {
        Inflated { in_parts: true, ..Inflated::new(cluster_size) }
    }

    /// Forgets everything about the cluster whose data stands at `offset`.
    pub fn forget(&self, offset: u64) {
        self.lock().forget(offset);
    }

    /// The content of the cluster whose data stands at `offset`, up to byte `end` at least. If it is not kept, `load` puts its
    /// first bytes into a buffer, as many as it is told; or all of them, whatever it is told.
    ///
    /// # Errors
    /// Those of `load`.
    pub fn cluster(
        &self,
        offset: u64,
        end: usize,
        load: impl FnOnce(&mut Vec<u8>, usize) -> io::Result<()>,
    ) -> io::Result<Content> {
        let (len, mut content) = {
            let mut kept = self.lock();
            let len = match kept.find(offset) {
                Some(content) if content.len() >= end => return Ok(content),
                None if kept.sound.has(offset) => end.min(self.cluster_size),
                // Never found sound; or more is read than before, and soon more yet.
                _ => self.cluster_size,
            };
            (len, kept.spare.pop().unwrap_or_default())
        };
        let loaded = load(&mut content, len);
        let mut kept = self.lock();
        if let Err(e) = loaded {
            // It was sound once, perhaps.
            kept.forget(offset);
            self.spare(&mut kept, content);
            return Err(e);
        }
        if self.in_parts && len == self.cluster_size {
            kept.sound.add(offset);
        }
        let content = Arc::new(content);
        let old = kept.keep(offset, Arc::clone(&content), (KEPT / self.cluster_size).clamp(1, MOST));
        if let Some(old) = old.and_then(Arc::into_inner) {
            self.spare(&mut kept, old);
        }
        Ok(content)
    }

    /// The whole content of the cluster whose data stands at `offset`, made by `load` if it is not kept.
    ///
    /// # Errors
    /// Those of `load`.
    pub fn whole(&self, offset: u64, load: impl FnOnce() -> io::Result<Vec<u8>>) -> io::Result<Content> {
        self.cluster(offset, 0, |content, _| {
            *content = load()?;
            Ok(())
        })
    }

    fn spare(&self, kept: &mut Kept, room: Vec<u8>) {
        if kept.spare.len() < (SPARE / self.cluster_size).max(1) {
            kept.spare.push(room);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn find(&mut self, offset: u64) -> Option<Content> {
        let slot = self.slots.get_mut(*self.found.get(&offset)?)?;
        slot.used = true;
        Some(Arc::clone(&slot.content))
    }

    /// Keeps one more among at most `most`; what had to go for it.
    fn keep(&mut self, offset: u64, content: Content, most: usize) -> Option<Content> {
        if let Some(slot) = self.found.get(&offset).and_then(|&at| self.slots.get_mut(at)) {
            // Two came for the same cluster, and one may have got more of it.
            let is_longer = content.len() > slot.content.len();
            return is_longer.then(|| std::mem::replace(&mut slot.content, content));
        }
        let slot = Slot { offset, used: false, content };
        if self.slots.len() < most {
            self.found.insert(offset, self.slots.len());
            self.slots.push(slot);
            return None;
        }
        while std::mem::take(&mut self.slots[self.hand].used) {
            self.hand = (self.hand + 1) % most;
        }
        let old = std::mem::replace(&mut self.slots[self.hand], slot);
        // One that was forgotten may be kept again, elsewhere.
        if self.found.get(&old.offset) == Some(&self.hand) {
            self.found.remove(&old.offset);
        }
        self.found.insert(offset, self.hand);
        self.hand = (self.hand + 1) % most;
        Some(old.content)
    }

    fn forget(&mut self, offset: u64) {
        self.sound.remove(offset);
        if let Some(slot) = self.found.remove(&offset).and_then(|at| self.slots.get_mut(at)) {
            slot.used = false;
            slot.content = Content::default();
        }
    }
}

impl Sound {
    /// Fibonacci hashing: images lay their clusters out in steps.
    fn place(offset: u64) -> usize {
        usize::try_from(offset.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (u64::BITS - SOUND.ilog2())).unwrap_or(0)
    }

    fn has(&self, offset: u64) -> bool {
        offset != 0 && self.0.get(Sound::place(offset)) == Some(&offset)
    }

    fn add(&mut self, offset: u64) {
        if self.0.is_empty() {
            self.0 = vec![0; SOUND];
        }
        self.0[Sound::place(offset)] = offset;
    }

    fn remove(&mut self, offset: u64) {
        if self.has(offset) {
            self.0[Sound::place(offset)] = 0;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rustix::io::Errno;

    const CLUSTER: usize = 64 << 10;

    /// Reads up to `end`; how much was inflated for that.
    fn read(inflated: &Inflated, offset: u64, end: usize) -> usize {
        let mut made = 0;
        let content = inflated.cluster(offset, end, |content, len| {
            made = len;
            content.resize(len, 0);
            content.fill(offset.to_le_bytes()[0]);
            Ok(())
        });
        let content = content.unwrap();
        assert!(content.len() >= end && content.iter().all(|&byte| byte == offset.to_le_bytes()[0]));
        made
    }

    fn broken(inflated: &Inflated, offset: u64, end: usize) -> usize {
        let mut asked = 0;
        let read = inflated.cluster(offset, end, |_, len| {
            asked = len;
            Err(Errno::IO.into())
        });
        assert_eq!(read.unwrap_err().raw_os_error(), Some(5));
        asked
    }

    /// Reads so many others that none of before is kept.
    fn turn_over(inflated: &Inflated) {
        for offset in 1..=2 * (KEPT / CLUSTER) as u64 {
            read(inflated, offset << 32 | 1, 1);
        }
    }

    /// With cluster `offset` known to be sound, and nothing of it kept.
    fn with_sound(offset: u64) -> Inflated {
        let inflated = Inflated::in_parts(CLUSTER);
        read(&inflated, offset, 1);
        turn_over(&inflated);
        inflated
    }

    #[test]
    fn a_cluster_is_inflated_once_while_it_is_kept() {
        let inflated = Inflated::in_parts(CLUSTER);
        assert_eq!(read(&inflated, 7, 4096), CLUSTER, "whether it is sound shows at its end");
        assert_eq!(read(&inflated, 7, CLUSTER), 0);
        inflated.forget(7);
        assert_eq!(read(&inflated, 7, 4096), CLUSTER, "something else stands there now");
    }

    #[test]
    fn of_a_cluster_that_is_known_to_be_sound_a_part_is_inflated_and_then_all_of_it() {
        let inflated = with_sound(7);
        assert_eq!(read(&inflated, 7, 4096), 4096);
        assert_eq!(read(&inflated, 7, 4096), 0);
        assert_eq!(read(&inflated, 7, 4097), CLUSTER);
        assert_eq!(read(&inflated, 7, CLUSTER), 0);
        let whole = Inflated::new(CLUSTER);
        read(&whole, 7, 1);
        turn_over(&whole);
        assert_eq!(read(&whole, 7, 4096), CLUSTER, "where a part cannot be had, nobody asks for it");
    }

    #[test]
    fn a_broken_cluster_is_never_sound_nor_is_one_that_breaks_later() {
        let inflated = Inflated::in_parts(CLUSTER);
        for _ in 0..3 {
            assert_eq!(broken(&inflated, 7, 4096), CLUSTER);
        }
        read(&inflated, 7, 1);
        turn_over(&inflated);
        assert_eq!(broken(&inflated, 7, 4096), 4096);
        assert_eq!(broken(&inflated, 7, 512), CLUSTER, "now all of it is looked at again");
        read(&inflated, 8, 1);
        turn_over(&inflated);
        read(&inflated, 8, 512);
        assert_eq!(broken(&inflated, 8, 4096), CLUSTER);
        assert_eq!(broken(&inflated, 8, 512), CLUSTER, "nor is the part of it that was kept");
    }

    #[test]
    fn what_is_forgotten_is_inflated_whole_although_it_was_sound() {
        let inflated = with_sound(7);
        inflated.forget(7);
        assert_eq!(read(&inflated, 7, 4096), CLUSTER);
    }

    #[test]
    fn what_is_kept_is_bounded_whatever_is_read() {
        for size in [512, CLUSTER, 2 << 20, 64 << 20] {
            let inflated = Inflated::in_parts(size);
            for offset in 1..3000 {
                if size <= CLUSTER || offset < 40 {
                    inflated
                        .cluster(offset * 77, 1, |content, len| {
                            content.resize(len, 0);
                            Ok(())
                        })
                        .unwrap();
                }
                if offset % 5 == 0 {
                    inflated.forget(offset * 77 - 77);
                }
            }
            let kept = inflated.lock();
            let bytes: usize = kept.slots.iter().map(|slot| slot.content.capacity()).sum();
            assert!(bytes <= KEPT.max(size) && kept.slots.len() <= MOST && kept.found.len() <= kept.slots.len());
            assert!(kept.spare.iter().map(Vec::capacity).sum::<usize>() <= SPARE.max(size));
            assert!(kept.sound.0.len() <= SOUND);
        }
    }

    #[test]
    fn what_is_used_stays_when_others_come_and_go() {
        let inflated = Inflated::new(CLUSTER);
        read(&inflated, 7, 1);
        for offset in 1..=4 * (KEPT / CLUSTER) as u64 {
            read(&inflated, offset << 32 | 1, 1);
            assert_eq!(read(&inflated, 7, CLUSTER), 0);
        }
    }

    #[test]
    fn two_that_come_for_one_cluster_leave_the_longer_part_of_it() {
        let inflated = with_sound(7);
        let short = inflated.cluster(7, 512, |content, len| {
            // Meanwhile another reader needs more.
            assert_eq!(read(&inflated, 7, 4096), 4096);
            content.resize(len, 0);
            content.fill(7);
            Ok(())
        });
        assert_eq!(short.unwrap().len(), 512);
        assert_eq!(read(&inflated, 7, 4096), 0);
    }
}
