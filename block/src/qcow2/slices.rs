// SPDX-License-Identifier: Apache-2.0 OR MIT
//! L2 tables in memory, slice by slice, read without a lock.
//!
//! A slice is a run of an L2 table's words. Every slice of the disk has one slot that it may stand in; where the cache covers
//! the disk, no two share one. A slot is a sequence lock: its number is odd while it is being filled, and a reader that saw the
//! same even number before and after has read one slice whole. Words are atomics, so a torn read is discarded, never undefined.

use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Mutex, OnceLock, PoisonError};

pub struct Slices {
    slots: Box<[Slot]>,
    /// Words in a slice.
    words: usize,
}

#[derive(Default)]
struct Slot {
    /// Even: quiet. Grows by 2 with every filling.
    sequence: AtomicU64,
    /// The slice's number plus 1; 0 is none.
    tag: AtomicU64,
    words: OnceLock<Box<[AtomicU64]>>,
    filling: Mutex<()>,
}

impl Slices {
    /// Room for `count` slices of `words` words, made as it is needed; at most `bytes` bytes, at least one slice.
    pub fn new(count: u64, words: usize, bytes: u64) -> Slices {
        let affordable = (bytes / (words as u64 * 8)).max(1);
        let slots = usize::try_from(count.clamp(1, affordable)).unwrap_or(1);
        Slices { slots: (0..slots).map(|_| Slot::default()).collect(), words }
    }

    /// Lets `look` read slice `number`, from the word at its argument on. `None` if the slice is not there, or went while it
    /// was looked at; then what `look` returned counts for nothing.
    pub fn with<T>(&self, number: u64, look: impl FnOnce(&dyn Fn(usize) -> u64) -> T) -> Option<T> {
        let slot = self.slot(number);
        let words = slot.words.get()?;
        // Ordered against the counting of requests: see `Gate`.
        let before = slot.sequence.load(Ordering::SeqCst);
        if before % 2 == 1 || slot.tag.load(Ordering::Relaxed) != number + 1 {
            return None;
        }
        let seen = look(&|index| words.get(index).map_or(0, |word| word.load(Ordering::Relaxed)));
        fence(Ordering::Acquire);
        (slot.sequence.load(Ordering::Relaxed) == before).then_some(seen)
    }

    /// Puts slice `number` in its slot, in place of whatever stood there.
    pub fn fill(&self, number: u64, content: &[u64]) {
        let slot = self.slot(number);
        let _filling = slot.filling.lock().unwrap_or_else(PoisonError::into_inner);
        let words = slot.words.get_or_init(|| (0..self.words).map(|_| AtomicU64::new(0)).collect());
        let sequence = slot.sequence.load(Ordering::Relaxed);
        slot.sequence.store(sequence + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        slot.tag.store(number + 1, Ordering::Relaxed);
        for (word, &value) in words.iter().zip(content) {
            word.store(value, Ordering::Relaxed);
        }
        slot.sequence.store(sequence + 2, Ordering::SeqCst);
    }

    /// Changes words of slice `number` from word `at` on, if it is there.
    pub fn update(&self, number: u64, at: usize, changed: &[u64]) {
        let slot = self.slot(number);
        let _filling = slot.filling.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(words) = slot.words.get() else { return };
        if slot.tag.load(Ordering::Relaxed) != number + 1 {
            return;
        }
        let sequence = slot.sequence.load(Ordering::Relaxed);
        slot.sequence.store(sequence + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        for (word, &value) in words.iter().skip(at).zip(changed) {
            word.store(value, Ordering::Relaxed);
        }
        slot.sequence.store(sequence + 2, Ordering::SeqCst);
    }

    /// Forgets every slice.
    pub fn clear(&self) {
        for slot in &self.slots {
            let _filling = slot.filling.lock().unwrap_or_else(PoisonError::into_inner);
            let sequence = slot.sequence.load(Ordering::Relaxed);
            slot.sequence.store(sequence + 1, Ordering::Relaxed);
            fence(Ordering::Release);
            slot.tag.store(0, Ordering::Relaxed);
            slot.sequence.store(sequence + 2, Ordering::SeqCst);
        }
    }

    fn slot(&self, number: u64) -> &Slot {
        // The remainder is below the number of slots, which is a usize.
        &self.slots[usize::try_from(number % self.slots.len() as u64).unwrap_or(0)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_is_there_until_another_takes_its_slot() {
        let slices = Slices::new(100, 4, 2 * 4 * 8);
        let first_words = |number| slices.with(number, |word| (word(0), word(3)));
        assert_eq!(first_words(0), None);
        slices.fill(0, &[1, 2, 3, 4]);
        slices.fill(1, &[5, 6, 7, 8]);
        assert_eq!((first_words(0), first_words(1)), (Some((1, 4)), Some((5, 8))));
        slices.fill(2, &[9, 10, 11, 12]);
        assert_eq!((first_words(0), first_words(2)), (None, Some((9, 12))));
    }

    #[test]
    fn readers_never_see_half_of_one_slice_and_half_of_another() {
        let slices = Slices::new(8, 64, 64 * 8);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..20_000u64 {
                    slices.fill(round % 8, &[round % 8; 64]);
                }
            });
            for _ in 0..2 {
                scope.spawn(|| {
                    for round in 0..200_000u64 {
                        let number = round % 8;
                        let seen = slices.with(number, |word| (0..64).all(|at| word(at) == number));
                        assert_ne!(seen, Some(false));
                    }
                });
            }
        });
    }
}
