// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How often each host cluster is named, counted anew: sparse in memory, whatever the image claims.

use std::collections::HashMap;

use crate::{Error, Result};

/// Clusters in a chunk, which comes into being with the first count in it.
pub const CHUNK: u64 = 1 << 14;
/// Most chunks: 1 GiB of memory, for 64 TiB in use in clusters of 64 KiB.
const MOST_CHUNKS: usize = (1 << 30) / (2 << 14);
/// Most clusters of a file: 1 PiB in clusters of 64 KiB.
const MOST_CLUSTERS: u64 = 1 << 34;
/// The count is in [`Counts::large`].
pub const LARGE: u16 = u16::MAX;

/// Counts by cluster number.
pub struct Counts {
    chunks: Vec<Option<Box<[u16]>>>,
    /// Counts of `LARGE` and more.
    large: HashMap<u64, u64>,
    made: usize,
    /// The largest count that the image can store.
    most: u64,
}

impl Counts {
    /// Nothing counted yet in a file of `clusters` clusters.
    ///
    /// # Errors
    /// `Unsupported` for a file too long to be checked.
    pub fn new(clusters: u64, most: u64) -> Result<Counts> {
        if clusters > MOST_CLUSTERS {
            return Err(Error::unsupported(format!(
                "the file has {clusters} clusters; at most {MOST_CLUSTERS} can be checked"
            )));
        }
        // One more, for a structure that begins in the last cluster without being aligned.
        let chunks = clusters / CHUNK + 1;
        let chunks = (0..chunks).map(|_| None).collect();
        Ok(Counts { chunks, large: HashMap::new(), made: 0, most })
    }

    /// How often `cluster` was counted, as far as the image can store that.
    pub fn get(&self, cluster: u64) -> u64 {
        self.all(cluster).min(self.most)
    }

    /// How often `cluster` was counted.
    pub fn all(&self, cluster: u64) -> u64 {
        let Some(Some(chunk)) = self.chunks.get(index(cluster / CHUNK)) else { return 0 };
        match chunk[index(cluster % CHUNK)] {
            LARGE => self.large.get(&cluster).copied().unwrap_or(0),
            count => count.into(),
        }
    }

    /// The counts from that of `cluster` to the end of its chunk, [`LARGE`] where there is a larger one; `None` if nothing was
    /// counted in it.
    pub fn small(&self, cluster: u64) -> Option<&[u16]> {
        let chunk = self.chunks.get(index(cluster / CHUNK))?.as_ref()?;
        Some(&chunk[index(cluster % CHUNK)..])
    }

    /// Whether nothing was counted in the chunk of `cluster`.
    pub fn is_blank(&self, cluster: u64) -> bool {
        self.chunks.get(index(cluster / CHUNK)).is_none_or(Option::is_none)
    }

    /// Counts `cluster` `times` more often. How many of these were too many to be stored.
    ///
    /// # Errors
    /// `Unsupported` if counting takes too much memory.
    pub fn add(&mut self, cluster: u64, times: u64) -> Result<u64> {
        let at = index(cluster / CHUNK);
        if at >= self.chunks.len() {
            self.chunks.resize_with(at + 1, || None);
        }
        let chunk = match &mut self.chunks[at] {
            Some(chunk) => chunk,
            none => {
                if self.made == MOST_CHUNKS {
                    return Err(Error::unsupported("the image is too large, or too damaged, to be checked in 1 GiB"));
                }
                self.made += 1;
                none.insert(vec![0; index(CHUNK)].into())
            }
        };
        let count = &mut chunk[index(cluster % CHUNK)];
        if times == 1 && u64::from(*count) < self.most.min(u64::from(LARGE) - 1) {
            *count += 1;
            return Ok(0);
        }
        let before = if *count == LARGE { self.large.get(&cluster).copied().unwrap_or(0) } else { (*count).into() };
        let after = before.saturating_add(times);
        self.put(cluster, after);
        Ok(times - (after.min(self.most) - before.min(self.most)))
    }

    /// Counts `cluster` once less.
    pub fn take(&mut self, cluster: u64) {
        let count = self.all(cluster);
        if count > 0 {
            self.put(cluster, count - 1);
        }
    }

    /// Puts a count in its place; its chunk exists.
    fn put(&mut self, cluster: u64, count: u64) {
        let Some(Some(chunk)) = self.chunks.get_mut(index(cluster / CHUNK)) else { return };
        chunk[index(cluster % CHUNK)] = match u16::try_from(count) {
            Ok(small) if small != LARGE => {
                self.large.remove(&cluster);
                small
            }
            _ => {
                self.large.insert(cluster, count);
                LARGE
            }
        };
    }

    /// The first cluster from `from` on that begins `clusters` uncounted ones in a row; perhaps past the end of the file.
    pub fn free_row(&self, from: u64, clusters: u64) -> u64 {
        let mut first = from;
        let mut at = from;
        while at < first + clusters {
            if self.get(at) != 0 {
                first = at + 1;
            } else if at / CHUNK >= self.chunks.len() as u64 {
                break;
            }
            at += 1;
        }
        first
    }

    /// One past the last cluster that may have a count.
    pub fn end(&self) -> u64 {
        self.chunks.len() as u64 * CHUNK
    }
}

/// Clusters that are counted exactly once, one bit each.
#[derive(Default)]
pub struct Ones(Vec<Option<Box<[u64]>>>);

impl Ones {
    pub fn set(&mut self, cluster: u64) {
        self.words(cluster)[index(cluster % CHUNK / 64)] |= 1 << (cluster % 64);
    }

    /// Sets those of `counts`, which begin at `cluster` and end in its chunk, that are one.
    pub fn set_where_one(&mut self, cluster: u64, counts: &[u16]) {
        let words = self.words(cluster);
        for (at, count) in (cluster % CHUNK..).zip(counts) {
            words[index(at / 64)] |= u64::from(*count == 1) << (at % 64);
        }
    }

    /// The words of the chunk of `cluster`.
    fn words(&mut self, cluster: u64) -> &mut [u64] {
        let at = index(cluster / CHUNK);
        if at >= self.0.len() {
            self.0.resize_with(at + 1, || None);
        }
        self.0[at].get_or_insert_with(|| vec![0; index(CHUNK / 64)].into())
    }

    pub fn contains(&self, cluster: u64) -> bool {
        let Some(Some(words)) = self.0.get(index(cluster / CHUNK)) else { return false };
        words[index(cluster % CHUNK / 64)] >> (cluster % 64) & 1 == 1
    }
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_the_image_cannot_store_is_told_and_remembered() {
        let mut counts = Counts::new(10, 3).unwrap();
        assert_eq!(counts.add(4, 2).unwrap(), 0);
        assert_eq!(counts.add(4, 2).unwrap(), 1);
        assert_eq!(counts.add(4, 1).unwrap(), 1);
        counts.take(4);
        assert_eq!((counts.get(4), counts.all(4), counts.get(5)), (3, 4, 0));
    }

    #[test]
    fn counts_beyond_16_bits_are_kept() {
        let mut counts = Counts::new(10, u64::MAX).unwrap();
        for times in [65_534, 1, 1, 1 << 40] {
            assert_eq!(counts.add(9, times).unwrap(), 0);
        }
        assert_eq!(counts.get(9), (1 << 40) + 65_536);
    }

    #[test]
    fn a_free_row_may_lie_past_the_end() {
        let mut counts = Counts::new(10, 1).unwrap();
        for cluster in [0, 1, 4] {
            counts.add(cluster, 1).unwrap();
        }
        assert_eq!((counts.free_row(0, 2), counts.free_row(0, 3), counts.free_row(0, 1 << 20)), (2, 5, 5));
    }

    #[test]
    fn a_file_of_too_many_clusters_is_not_counted() {
        assert!(Counts::new(1 << 40, 1).is_err());
    }
}
