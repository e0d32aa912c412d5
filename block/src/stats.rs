// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What was asked, how much of it, and how long it took: plain atomics that any thread adds to and anybody reads.
//!
//! Who serves requests by the batch collects a batch in a [`Tally`], which is no atomic at all, and adds it to as many
//! [`Stats`] as it concerns (the client's, the export's, the node's) when the batch has been answered. That costs two looks
//! at the clock and a handful of additions for a batch, and nothing else for a request.
//!
//! Latencies go to a histogram of [`BUCKETS`] ranges, two for each power of two from 1 µs to 12 s.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes.
    Read,
    /// To store bytes.
    Write,
    /// To make a range read as zeroes.
    Zeroes,
    /// To forget a range.
    Discard,
    /// To have everything on stable storage.
    Flush,
    /// Where data is.
    Status,
}

impl Kind {
    /// Every kind, in order.
    pub const ALL: [Kind; 6] = [Kind::Read, Kind::Write, Kind::Zeroes, Kind::Discard, Kind::Flush, Kind::Status];

    /// Its word.
    pub fn word(self) -> &'static str {
        ["read", "write", "zeroes", "discard", "flush", "status"][self as usize]
    }
}

const KINDS: usize = Kind::ALL.len();
/// Number of ranges of latencies.
pub const BUCKETS: usize = 48;

/// The range that a latency falls into: 0 is below 1.5 µs, the last has no upper bound.
fn bucket(ns: u64) -> usize {
    let us = (ns / 500).max(2);
    // Two ranges for a power of two: the exponent, and the bit below the leading one.
    let exponent = 63 - us.leading_zeros();
    let half = (us >> (exponent - 1)) & 1;
    (exponent as usize * 2 + half as usize - 2).min(BUCKETS - 1)
}

/// The upper bound of a range in nanoseconds; `None` for the last.
pub fn bucket_end(index: usize) -> Option<u64> {
    let power = 1000u64 << (index / 2).min(40);
    (index < BUCKETS - 1).then_some(if index.is_multiple_of(2) { power / 2 * 3 } else { power * 2 })
}

/// Counters that only grow.
#[derive(Debug, Default)]
pub struct Stats([Counters; KINDS]);

#[derive(Debug)]
struct Counters {
    operations: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
    time_ns: AtomicU64,
    latencies: [AtomicU64; BUCKETS],
}

impl Default for Counters {
    fn default() -> Counters {
        let zero = || AtomicU64::new(0);
        Counters {
            operations: zero(),
            bytes: zero(),
            failed: zero(),
            time_ns: zero(),
            latencies: std::array::from_fn(|_| zero()),
        }
    }
}

/// What [`Stats`] held at some moment, kind by kind. A request that ended just then may be half in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// Requests that succeeded.
    pub operations: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Requests that failed or were refused.
    pub failed: u64,
    /// Nanoseconds that those which succeeded took together, from their arrival to their answer.
    pub time_ns: u64,
    /// How many of those took how long, by range.
    pub latencies: [u64; BUCKETS],
}

impl Stats {
    /// Adds one request of `bytes` that took `latency`.
    pub fn record(&self, kind: Kind, bytes: u64, failed: bool, latency: Duration) {
        let mut tally = Tally::default();
        tally.note(kind, bytes, failed);
        tally.settle(latency, [self]);
    }

    /// What stands there now.
    pub fn count(&self, kind: Kind) -> Count {
        let Counters { operations, bytes, failed, time_ns, latencies } = &self.0[kind as usize];
        Count {
            operations: operations.load(Relaxed),
            bytes: bytes.load(Relaxed),
            failed: failed.load(Relaxed),
            time_ns: time_ns.load(Relaxed),
            latencies: std::array::from_fn(|index| latencies[index].load(Relaxed)),
        }
    }
}

/// Requests of one batch, not yet in any [`Stats`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    some: bool,
    kinds: [Noted; KINDS],
}

#[derive(Clone, Copy, Debug, Default)]
struct Noted {
    operations: u64,
    bytes: u64,
    failed: u64,
}

impl Tally {
    /// Notes a request.
    #[inline]
    pub fn note(&mut self, kind: Kind, bytes: u64, failed: bool) {
        let noted = &mut self.kinds[kind as usize];
        self.some = true;
        if failed {
            noted.failed += 1;
        } else {
            noted.operations += 1;
            noted.bytes += bytes;
        }
    }

    /// Whether nothing is noted.
    pub fn is_empty(&self) -> bool {
        !self.some
    }

    /// Adds everything to `stats`, as having taken `latency` each, and is empty again.
    pub fn settle<'a>(&mut self, latency: Duration, stats: impl IntoIterator<Item = &'a Stats>) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        let bucket = bucket(ns);
        for stats in stats {
            for (noted, counters) in self.kinds.iter().zip(&stats.0) {
                let Noted { operations, bytes, failed } = *noted;
                if operations > 0 {
                    counters.operations.fetch_add(operations, Relaxed);
                    counters.bytes.fetch_add(bytes, Relaxed);
                    counters.time_ns.fetch_add(ns.saturating_mul(operations), Relaxed);
                    counters.latencies[bucket].fetch_add(operations, Relaxed);
                }
                if failed > 0 {
                    counters.failed.fetch_add(failed, Relaxed);
                }
            }
        }
        *self = Tally::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_latencies_have_no_gap_and_no_overlap() {
        assert_eq!(bucket(0), 0);
        for index in 0..BUCKETS - 1 {
            let end = bucket_end(index).expect("not the last");
            assert_eq!((bucket(end - 1), bucket(end)), (index, index + 1), "{end}");
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
        assert_eq!(bucket_end(BUCKETS - 1), None);
        assert!(bucket_end(BUCKETS - 2).is_some_and(|end| end > 8_000_000_000), "beyond any honest disk");
    }

    #[test]
    fn a_batch_is_added_to_everything_that_it_concerns_and_once() {
        let (client, node) = (Stats::default(), Stats::default());
        let mut tally = Tally::default();
        tally.note(Kind::Read, 4096, false);
        tally.note(Kind::Read, 512, false);
        tally.note(Kind::Read, 1, true);
        tally.note(Kind::Flush, 0, false);
        tally.settle(Duration::from_micros(10), [&client, &node]);
        assert!(tally.is_empty());
        tally.settle(Duration::from_micros(10), [&client]);
        let read = client.count(Kind::Read);
        assert_eq!((read.operations, read.bytes, read.failed, read.time_ns), (2, 4608, 1, 20_000));
        assert_eq!(read, node.count(Kind::Read));
        assert_eq!(read.latencies.iter().sum::<u64>(), 2);
        assert_eq!(client.count(Kind::Flush).operations, 1);
    }
}
