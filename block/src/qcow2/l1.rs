// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The active L1 table in memory: read without a lock, grown while it is read.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::entry::L1Entry;

/// Entries in a chunk.
const CHUNK: usize = 4096;
/// Chunks of the largest table, 32 MiB.
const CHUNKS: usize = (32 << 20) / 8 / CHUNK;

/// L1 entries by index. A chunk that was never written to holds no table.
pub struct L1(Box<[OnceLock<Box<[AtomicU64]>>]>);

impl L1 {
    /// The table with these entries, at most 4 Mi.
    pub fn new(entries: impl IntoIterator<Item = L1Entry>) -> L1 {
        let l1 = L1((0..CHUNKS).map(|_| OnceLock::new()).collect());
        for (index, entry) in entries.into_iter().enumerate() {
            if entry.0 != 0 {
                l1.set(index, entry);
            }
        }
        l1
    }

    /// The entry at `index`; one that is not there names no table.
    pub fn get(&self, index: usize) -> L1Entry {
        let chunk = self.0.get(index / CHUNK).and_then(OnceLock::get);
        L1Entry(chunk.map_or(0, |chunk| chunk[index % CHUNK].load(Ordering::SeqCst)))
    }

    /// Puts an entry in its place; beyond the largest table nothing is kept.
    pub fn set(&self, index: usize, entry: L1Entry) {
        let Some(chunk) = self.0.get(index / CHUNK) else { return };
        let chunk = chunk.get_or_init(|| (0..CHUNK).map(|_| AtomicU64::new(0)).collect());
        chunk[index % CHUNK].store(entry.0, Ordering::SeqCst);
    }

    /// Every entry that names a table, below index `count`.
    pub fn tables(&self, count: usize) -> impl Iterator<Item = (usize, L1Entry)> {
        let all = self.0.iter().enumerate().filter_map(|(chunk, words)| Some((chunk, words.get()?)));
        let all = all.flat_map(|(chunk, words)| {
            words.iter().enumerate().map(move |(at, word)| (chunk * CHUNK + at, L1Entry(word.load(Ordering::SeqCst))))
        });
        all.filter(move |(index, entry)| *index < count && entry.offset() != 0)
    }
}
