// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest at work on an image, and what it may find later.
#![allow(dead_code, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "each test takes what it needs")]

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use block::{Preallocation, ZeroFlags};

use super::Random;
use super::guest::{ATOM, Guest, bytes_of};
use super::image::{Made, Open};
use super::recording::Journal;

/// A request; places and lengths are in atoms.
#[derive(Clone, Debug)]
pub enum Request {
    Write {
        first: usize,
        tags: Vec<u64>,
        durable: bool,
    },
    Zeroes {
        first: usize,
        count: usize,
        may_unmap: bool,
        durable: bool,
    },
    Discard {
        first: usize,
        count: usize,
    },
    /// A whole cluster.
    Compressed {
        first: usize,
        tags: Vec<u64>,
    },
    Resize {
        bytes: u64,
    },
    Flush,
}

/// An image in use.
pub struct Session {
    pub made: Arc<Made>,
    pub journal: Arc<Journal>,
    pub open: Open,
    pub guest: Mutex<Guest>,
    /// Atoms of a cluster.
    pub cluster: usize,
}

impl Session {
    pub fn start(made: &Arc<Made>) -> Session {
        let journal = Journal::new();
        let open = made.open(&journal, &made.files).unwrap();
        let guest = Guest::new(&made.tags, 2 * made.kind.size);
        let cluster = open.node.info().cluster_size.unwrap() as usize / ATOM;
        Session { made: Arc::clone(made), journal, open, guest: Mutex::new(guest), cluster }
    }

    pub fn guest(&self) -> MutexGuard<'_, Guest> {
        self.guest.lock().unwrap()
    }

    /// A request of any kind on some atoms of the disk.
    pub fn choose(&self, random: &mut Random, among: Range<usize>) -> Request {
        let cluster = self.cluster;
        let most = [2, 8, cluster, 5 * cluster][random.below(4) as usize];
        let first = among.start + random.below(among.len() as u64) as usize;
        // Half of them fit clusters.
        let (first, count) = if random.below(2) == 0 {
            let first = first / cluster * cluster;
            (first, (1 + random.below(most as u64) as usize).next_multiple_of(cluster))
        } else {
            (first, 1 + random.below(most as u64) as usize)
        };
        let first = first.max(among.start);
        let count = count.min(among.end - first);
        let durable = random.below(10) == 0;
        match random.below(100) {
            0..52 => Request::Write { first, tags: self.guest().new_tags(first, count), durable },
            52..66 => Request::Zeroes { first, count, may_unmap: random.below(2) == 0, durable },
            66..80 => Request::Discard { first, count },
            80..86 => {
                let first = first / cluster * cluster;
                if first < among.start || first + cluster > among.end {
                    return Request::Flush;
                }
                Request::Compressed { first, tags: self.guest().new_tags(first, cluster) }
            }
            _ => Request::Flush,
        }
    }

    /// Another size, up to twice the first.
    pub fn choose_size(&self, random: &mut Random) -> Request {
        let most = 2 * self.made.kind.size / 512;
        Request::Resize { bytes: (1 + random.below(most)) * 512 }
    }

    /// Does what is asked, and notes what may be found from then on.
    pub fn perform(&self, request: &Request) -> io::Result<()> {
        let node = &self.open.node;
        let at = |first: usize| (first * ATOM) as u64;
        let before = self.journal.now();
        match request {
            Request::Write { first, tags, durable } => {
                self.guest().begin(*first, tags.iter().map(|&tag| vec![tag]).collect(), before);
                node.write(&bytes_of(tags.iter().copied()), at(*first), *durable)?;
                self.ended(*first, tags.len(), *durable);
            }
            Request::Zeroes { first, count, may_unmap, durable } => {
                self.guest().begin(*first, vec![vec![0]; *count], before);
                let flags = ZeroFlags { may_unmap: *may_unmap, fast_only: false };
                node.write_zeroes(at(*first), at(*count), flags, *durable)?;
                self.ended(*first, *count, *durable);
            }
            Request::Discard { first, count } => {
                let mut guest = self.guest();
                let values = (*first..first + count).map(|at| [guest.values(at), vec![0]].concat()).collect();
                guest.begin(*first, values, before);
                drop(guest);
                node.discard(at(*first), at(*count))?;
                self.ended(*first, *count, false);
            }
            Request::Compressed { first, tags } => {
                self.guest().begin(*first, tags.iter().map(|&tag| vec![tag]).collect(), before);
                match node.write_compressed(&bytes_of(tags.iter().copied()), at(*first)) {
                    Err(e) if e.raw_os_error() == Some(95) => {
                        // Not with an external data file: a plain write.
                        node.write(&bytes_of(tags.iter().copied()), at(*first), false)?;
                    }
                    other => other?,
                }
                self.ended(*first, tags.len(), false);
            }
            Request::Resize { bytes } => {
                let from = node.len();
                // Version 2 cannot hide what is below.
                let is_old = self.made.kind.options.contains("compat=0.10");
                let below = if is_old { &self.made.below[..] } else { &[] };
                self.guest().begin_resize(from, *bytes, below, before);
                node.resize(*bytes, Preallocation::Off).map_err(block::Error::into_io)?;
                self.guest().end_resize(from, *bytes, self.journal.now());
            }
            Request::Flush => {
                let since = self.guest().tick();
                node.flush()?;
                self.guest().flushed(since, self.journal.now());
            }
        }
        Ok(())
    }

    fn ended(&self, first: usize, count: usize, durable: bool) {
        let now = self.journal.now();
        let mut guest = self.guest();
        guest.end(first, count);
        if durable {
            let since = guest.tick();
            guest.flushed_within(first..first + count, since, now);
        }
    }

    /// Some requests on all of the disk, one after the other, with other sizes in between if `resizes`.
    pub fn work(&self, random: &mut Random, requests: usize, resizes: bool) {
        for _ in 0..requests {
            let request = if resizes && random.below(25) == 0 {
                self.choose_size(random)
            } else {
                self.choose(random, 0..self.open.node.len() as usize / ATOM)
            };
            self.perform(&request).unwrap_or_else(|e| panic!("{}: {request:?}: {e}", self.made.kind.name));
        }
    }
}
