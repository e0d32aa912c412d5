// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Dirty bitmaps: which parts of a node were written since some moment.
//!
//! A node marks what it writes in every bitmap that is enabled, once the bytes are written. Without a bitmap that costs one
//! relaxed load. A mark that is there already costs no write to shared memory.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

/// Words in a chunk: 4 KiB.
const CHUNK: usize = 512;
/// Bits in a chunk.
const CHUNK_BITS: u64 = CHUNK as u64 * 64;

/// Most bits of one bitmap: what a qcow2 image may hold of one, 512 MiB.
pub(crate) const MOST_BITS: u64 = 1 << 32;

/// A bitmap. Each bit stands for a run of [`Bitmap::granularity`] bytes.
pub struct Bitmap {
    name: String,
    granularity_bits: u32,
    enabled: AtomicBool,
    persistent: AtomicBool,
    inconsistent: bool,
    /// Who reads it and must find it as it was: exports.
    users: Arc<()>,
    content: RwLock<Content>,
}

/// Keeps a bitmap from being changed by commands while somebody reads it.
#[derive(Clone, Debug)]
pub struct BitmapUse(#[allow(dead_code, reason = "its count is looked at")] Arc<()>);

/// Bits that were never set have no memory.
#[derive(Default)]
struct Content {
    /// Bytes of the disk.
    len: u64,
    chunks: Vec<Chunk>,
}

type Chunk = OnceLock<Box<[AtomicU64]>>;

impl std::fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bitmap").field("name", &self.name).field("enabled", &self.is_enabled()).finish_non_exhaustive()
    }
}

impl Bitmap {
    /// A clean bitmap for a disk of `len` bytes, `1 << granularity_bits` (9 to 31) to a bit. `None` if that would be more than
    /// 2^32 bits.
    pub fn new(name: impl Into<String>, granularity_bits: u32, len: u64) -> Option<Bitmap> {
        let bitmap = Bitmap {
            name: name.into(),
            granularity_bits,
            enabled: AtomicBool::new(true),
            persistent: AtomicBool::new(false),
            inconsistent: false,
            users: Arc::default(),
            content: RwLock::default(),
        };
        bitmap.resize(len).then_some(bitmap)
    }

    /// One whose content is lost: a program that kept it ended before it could store it. It can be removed, and nothing else.
    pub fn lost(name: impl Into<String>, granularity_bits: u32) -> Bitmap {
        Bitmap {
            name: name.into(),
            granularity_bits,
            enabled: AtomicBool::new(false),
            persistent: AtomicBool::new(true),
            inconsistent: true,
            users: Arc::default(),
            content: RwLock::default(),
        }
    }

    /// Another with the same marks, that tracks nothing and belongs to no node.
    pub fn copy(&self) -> Bitmap {
        let copy = Bitmap {
            name: self.name.clone(),
            granularity_bits: self.granularity_bits,
            enabled: AtomicBool::new(false),
            persistent: AtomicBool::new(false),
            inconsistent: self.inconsistent,
            users: Arc::default(),
            content: RwLock::default(),
        };
        copy.resize(self.len());
        copy.merge(self);
        copy
    }

    /// Bytes of the disk that it stands for.
    #[allow(clippy::len_without_is_empty, reason = "an empty disk is not a special case")]
    pub fn len(&self) -> u64 {
        self.content().len
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes to a bit.
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// [`Bitmap::granularity`] as a power of two.
    pub fn granularity_bits(&self) -> u32 {
        self.granularity_bits
    }

    /// Whether writes are marked.
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Relaxed)
    }

    /// Whether it is stored in the image when that is closed.
    pub fn is_persistent(&self) -> bool {
        self.persistent.load(Ordering::Relaxed)
    }

    /// Lets it be stored in the image, or not.
    pub fn set_persistent(&self, persistent: bool) {
        self.persistent.store(persistent, Ordering::Relaxed);
    }

    /// Whether its content is lost.
    pub fn is_inconsistent(&self) -> bool {
        self.inconsistent
    }

    /// Whether somebody reads it.
    pub fn is_busy(&self) -> bool {
        Arc::strong_count(&self.users) > 1
    }

    /// Reads it from now on, until that is dropped.
    pub fn reader(&self) -> BitmapUse {
        BitmapUse(Arc::clone(&self.users))
    }

    /// Bytes that are marked, in whole runs.
    pub fn count(&self) -> u64 {
        let content = self.content();
        let words = content.chunks.iter().filter_map(OnceLock::get).flat_map(|words| words.iter());
        let bits: u64 = words.map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum();
        bits << self.granularity_bits
    }

    /// Bytes of memory that it takes.
    pub fn memory(&self) -> u64 {
        let content = self.content();
        let chunks = content.chunks.iter().filter(|chunk| chunk.get().is_some()).count();
        (chunks * CHUNK * 8 + content.chunks.len() * size_of::<Chunk>()) as u64
    }

    /// Marks a range of the disk; what passes the end is ignored.
    pub fn mark(&self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let content = self.content();
        let end = offset.saturating_add(len).min(content.len);
        if offset < end {
            content.set(offset >> self.granularity_bits..((end - 1) >> self.granularity_bits) + 1);
        }
    }

    /// Takes every mark away.
    pub fn clear(&self) {
        let mut content = self.content.write().unwrap_or_else(PoisonError::into_inner);
        content.chunks.iter_mut().for_each(|chunk| drop(chunk.take()));
    }

    /// Marks everything that is marked in `other`, whatever its granularity.
    pub fn merge(&self, other: &Bitmap) {
        let mut at = 0;
        // The lock of one at a time: two that are merged into each other cannot wait for each other.
        while let Some(run) = other.next_dirty(at) {
            self.mark(run.start, run.end - run.start);
            at = run.end;
        }
    }

    /// The first run of one kind from `offset` on, for at most `len` bytes: its length and whether it is marked. Past the end
    /// nothing is.
    pub fn run(&self, offset: u64, len: u64) -> (u64, bool) {
        let content = self.content();
        let bit = offset >> self.granularity_bits;
        let dirty = content.get(bit);
        let end = content.next(bit, !dirty).unwrap_or(u64::MAX >> self.granularity_bits) << self.granularity_bits;
        (end.saturating_sub(offset).min(len), dirty)
    }

    /// The first marked run from `offset` on, in bytes, cut at the end of the disk.
    pub fn next_dirty(&self, offset: u64) -> Option<Range<u64>> {
        let content = self.content();
        let first = content.next(offset >> self.granularity_bits, true)?;
        let start = (first << self.granularity_bits).max(offset);
        let end = content.next(first, false).unwrap_or(content.bits(self.granularity_bits)) << self.granularity_bits;
        let end = end.min(content.len);
        (start < end).then_some(start..end)
    }

    /// Fits it to a disk of `len` bytes: what is cut off is forgotten, what is new is clean. False, and nothing has changed, for
    /// one that would need too many bits.
    pub fn resize(&self, len: u64) -> bool {
        if self.inconsistent {
            return true;
        }
        let bits = len.div_ceil(self.granularity());
        if bits > MOST_BITS {
            return false;
        }
        let mut content = self.content.write().unwrap_or_else(PoisonError::into_inner);
        content.len = len;
        content.chunks.resize_with(usize::try_from(bits.div_ceil(CHUNK_BITS)).unwrap_or(0), OnceLock::new);
        // What lies beyond the end in the last chunk.
        if let Some(words) = content.chunks.last().and_then(OnceLock::get) {
            let inside = bits - (bits - 1) / CHUNK_BITS * CHUNK_BITS;
            for (at, word) in words.iter().enumerate() {
                word.fetch_and(low_bits(inside.saturating_sub(at as u64 * 64)), Ordering::Relaxed);
            }
        }
        true
    }

    /// Bytes of the bitmap as qcow2 stores it: bit 0 of byte 0 is the first.
    pub fn stored_len(&self) -> u64 {
        self.content().bits(self.granularity_bits).div_ceil(8)
    }

    /// Bytes `range` of the stored form, at most to its end; `None` if they are all zero. The start is a multiple of 8.
    pub fn stored(&self, range: Range<u64>) -> Option<Vec<u8>> {
        let content = self.content();
        let words = range.start / 8..range.end.div_ceil(8);
        let mut any = false;
        let mut bytes: Vec<u8> = Vec::new();
        for index in words {
            let word = content.word(index);
            any |= word != 0;
            bytes.extend(word.to_le_bytes());
        }
        bytes.truncate(usize::try_from(range.end - range.start).unwrap_or(usize::MAX));
        any.then_some(bytes)
    }

    /// Marks what is marked in bytes of the stored form from byte `at`, a multiple of 8, on.
    pub fn load(&self, at: u64, bytes: &[u8]) {
        let content = self.content();
        let bits = content.bits(self.granularity_bits);
        for (index, piece) in bytes.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..piece.len()].copy_from_slice(piece);
            let index = at / 8 + index as u64;
            content.or(index, u64::from_le_bytes(word) & low_bits(bits.saturating_sub(index * 64)));
        }
    }

    /// Of one that belongs to no node yet.
    pub(crate) fn set_enabled(&self, enabled: bool) {
        self.enabled.store(enabled, Ordering::Relaxed);
    }

    fn content(&self) -> std::sync::RwLockReadGuard<'_, Content> {
        self.content.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Content {
    fn bits(&self, granularity_bits: u32) -> u64 {
        self.len.div_ceil(1 << granularity_bits)
    }

    fn chunk(&self, index: u64) -> Option<&Chunk> {
        self.chunks.get(usize::try_from(index / CHUNK as u64).unwrap_or(usize::MAX))
    }

    fn word(&self, index: u64) -> u64 {
        let words = self.chunk(index).and_then(OnceLock::get);
        words.map_or(0, |words| words[within(index)].load(Ordering::Relaxed))
    }

    fn or(&self, index: u64, mask: u64) {
        let Some(chunk) = self.chunk(index).filter(|_| mask != 0) else { return };
        let words = chunk.get_or_init(|| (0..CHUNK).map(|_| AtomicU64::new(0)).collect());
        let word = &words[within(index)];
        if word.load(Ordering::Relaxed) & mask != mask {
            word.fetch_or(mask, Ordering::Relaxed);
        }
    }

    fn get(&self, bit: u64) -> bool {
        self.word(bit / 64) >> (bit % 64) & 1 == 1
    }

    fn set(&self, bits: Range<u64>) {
        for index in bits.start / 64..bits.end.div_ceil(64) {
            let from = bits.start.saturating_sub(index * 64);
            self.or(index, low_bits(bits.end - index * 64) & !low_bits(from));
        }
    }

    /// The first bit from `from` on that is `wanted`. Bits past the end are not there.
    fn next(&self, from: u64, wanted: bool) -> Option<u64> {
        let words = self.chunks.len() as u64 * CHUNK as u64;
        let mut index = from / 64;
        let mut hidden = low_bits(from % 64);
        while index < words {
            if wanted && self.chunk(index).is_some_and(|chunk| chunk.get().is_none()) {
                index = (index / CHUNK as u64 + 1) * CHUNK as u64;
                hidden = 0;
                continue;
            }
            let word = if wanted { self.word(index) } else { !self.word(index) } & !hidden;
            if word != 0 {
                return Some(index * 64 + u64::from(word.trailing_zeros()));
            }
            hidden = 0;
            index += 1;
        }
        None
    }
}

/// Index of a word in its chunk.
fn within(index: u64) -> usize {
    usize::try_from(index % CHUNK as u64).unwrap_or(0)
}

/// A word whose lowest `count` bits are set, at most all 64.
fn low_bits(count: u64) -> u64 {
    if count >= 64 { u64::MAX } else { (1 << count) - 1 }
}

/// The bitmaps of a node.
#[derive(Debug, Default)]
pub struct Bitmaps {
    /// Whether any of them is enabled.
    tracking: AtomicBool,
    list: RwLock<Vec<Arc<Bitmap>>>,
}

impl Bitmaps {
    /// Marks a range in those that are enabled.
    #[inline]
    pub fn mark(&self, offset: u64, len: u64) {
        if self.tracking.load(Ordering::Relaxed) {
            self.mark_all(offset, len);
        }
    }

    #[cold]
    fn mark_all(&self, offset: u64, len: u64) {
        let list = self.list.read().unwrap_or_else(PoisonError::into_inner);
        for bitmap in list.iter().filter(|bitmap| bitmap.is_enabled()) {
            bitmap.mark(offset, len);
        }
    }

    /// Every bitmap, the oldest first.
    pub fn list(&self) -> Vec<Arc<Bitmap>> {
        self.list.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The bitmap called `name`.
    pub fn get(&self, name: &str) -> Option<Arc<Bitmap>> {
        self.list().into_iter().find(|bitmap| bitmap.name == name)
    }

    /// Adds a bitmap, whose name is new.
    pub fn add(&self, bitmap: Arc<Bitmap>) {
        self.change(|list| list.push(bitmap));
    }

    /// Adds bitmaps whose names are new.
    pub fn add_all(&self, bitmaps: Vec<Arc<Bitmap>>) {
        self.change(|list| list.extend(bitmaps));
    }

    /// Takes a bitmap out; it marks nothing from then on.
    pub fn remove(&self, name: &str) -> Option<Arc<Bitmap>> {
        let mut removed = None;
        self.change(|list| {
            let at = list.iter().position(|bitmap| bitmap.name == name);
            removed = at.map(|at| list.remove(at));
        });
        removed
    }

    /// Lets a bitmap of this node mark what is written, or not.
    pub fn set_enabled(&self, bitmap: &Bitmap, enabled: bool) {
        self.change(|_| bitmap.set_enabled(enabled));
    }

    /// Fits them to a disk of `len` bytes.
    pub fn resize(&self, len: u64) {
        for bitmap in self.list() {
            // Their number of bits was looked at before.
            bitmap.resize(len);
        }
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Arc<Bitmap>>)) {
        let mut list = self.list.write().unwrap_or_else(PoisonError::into_inner);
        change(&mut list);
        let any = list.iter().any(|bitmap| bitmap.is_enabled() && !bitmap.is_inconsistent());
        self.tracking.store(any, Ordering::SeqCst);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn runs(bitmap: &Bitmap) -> Vec<Range<u64>> {
        let mut runs = Vec::new();
        let mut at = 0;
        while let Some(run) = bitmap.next_dirty(at) {
            at = run.end;
            runs.push(run);
        }
        runs
    }

    #[test]
    fn a_mark_covers_every_run_that_it_touches_and_no_other() {
        let bitmap = Bitmap::new("b", 16, 100 << 20).unwrap();
        bitmap.mark(65535, 2);
        bitmap.mark((100 << 20) - 1, 1000);
        bitmap.mark(5 << 20, 0);
        assert_eq!(runs(&bitmap), [0..131_072, (100 << 20) - 65536..100 << 20]);
        assert_eq!(bitmap.count(), 3 * 65536);
        assert_eq!(bitmap.run(0, u64::MAX), (131_072, true));
        assert_eq!(bitmap.run(131_072, 1000), (1000, false));
        assert_eq!(bitmap.run(100, 50), (50, true));
    }

    #[test]
    fn random_marks_are_those_of_a_vector_of_bools() {
        let (bits, len) = (70_000usize, 70_000u64 * 512 - 100);
        let bitmap = Bitmap::new("b", 9, len).unwrap();
        let mut model = vec![false; bits];
        let mut random = 0x9e37_79b9u64;
        for _ in 0..300 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let (offset, run) = (random % len, 1 + (random >> 32) % 40_000);
            bitmap.mark(offset, run);
            let end = (offset + run).min(len);
            let at = |byte: u64| usize::try_from(byte / 512).unwrap();
            model[at(offset)..=at(end - 1)].fill(true);
        }
        let marked = |bit: usize| bitmap.run(bit as u64 * 512, 1).1;
        assert!((0..bits).all(|bit| marked(bit) == model[bit]));
        let same = Bitmap::new("c", 9, len).unwrap();
        let mut at = 0;
        while at < bitmap.stored_len() {
            let end = bitmap.stored_len().min(at + 4096);
            if let Some(bytes) = bitmap.stored(at..end) {
                same.load(at, &bytes);
            }
            at = end;
        }
        assert_eq!(runs(&same), runs(&bitmap));
        let coarse = Bitmap::new("d", 20, len).unwrap();
        coarse.merge(&bitmap);
        for (unit, bits) in model.chunks(2048).enumerate() {
            assert_eq!(coarse.run((unit as u64) << 20, 1).1, bits.iter().any(|bit| *bit));
        }
    }

    #[test]
    fn a_disk_that_shrinks_and_grows_is_clean_where_it_is_new() {
        let bitmap = Bitmap::new("b", 9, 64 << 10).unwrap();
        bitmap.mark(0, 64 << 10);
        assert!(bitmap.resize(1000) && bitmap.resize(32 << 20));
        assert_eq!(bitmap.next_dirty(0), Some(0..1024));
        assert_eq!(bitmap.next_dirty(1024), None);
        bitmap.clear();
        assert_eq!((bitmap.count(), runs(&bitmap)), (0, vec![]));
    }

    #[test]
    fn a_bitmap_of_too_many_bits_is_refused() {
        assert!(Bitmap::new("b", 9, 1 << 41).is_some());
        assert!(Bitmap::new("b", 9, (1 << 41) + 1).is_none());
    }
}
