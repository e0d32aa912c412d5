// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What changes when an image is written, behind one lock that is never held over the I/O of data.
//!
//! An L2 slice that has changed stands here until it is on disk; lookups find it in the [slices](super::slices) as ever, or here if
//! its slot was taken. Guest clusters whose room is being filled are [flights](Meta::flights): who wants to change one waits. Host
//! clusters that lost their place in the mapping are not free at once, but once no crash can bring the old mapping back and
//! no request that saw it is under way: see [`super::flush`].

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use super::bitmaps::Stored;
use super::entry::L1Entry;
use super::places::Structure;
use super::refcounts::{Refcounts, Refused};

/// Slices with changes before they are written without being asked: 8 MiB.
pub const MOST_DIRTY: usize = 2048;

/// The changing part of an image.
#[derive(Default)]
pub struct Meta {
    /// The counts, while the image may be written.
    pub refcounts: Option<Refcounts>,
    /// The image was found damaged while it was written: no more writing.
    pub corrupt: bool,
    /// Slices that have changed since they were last written.
    pub dirty: HashMap<u64, Box<[u64]>>,
    /// Slices that are being written at the moment.
    pub writing: HashMap<u64, Arc<[u64]>>,
    /// How many times `writing` was emptied: what was read from disk before may be out of date.
    pub written: u64,
    /// A round is under way: what it writes may not be on disk yet.
    pub round: bool,
    /// L1 entries that have changed since they were last written.
    pub dirty_l1: BTreeMap<usize, L1Entry>,
    /// Entries that the L1 table on disk has room for.
    pub l1_room: u64,
    /// Internal snapshots, and where their table stands.
    pub snapshots: u32,
    pub snapshots_offset: u64,
    /// The autoclear features that the header has now.
    pub autoclear: u64,
    /// What of the bitmaps stands on disk.
    pub bitmaps: Stored,
    /// Guest clusters whose room is being filled.
    pub flights: Vec<Range<u64>>,
    /// Host bytes that the mapping in memory does not name any more, while the one on disk still does.
    pub unnamed: Vec<Unnamed>,
    /// Host bytes that no mapping names any more, by the turn of the gate when that became so.
    pub limbo: Vec<(usize, Vec<Unnamed>)>,
    /// Where the next compressed cluster goes: a place in a half-full host cluster.
    pub compressed_end: Option<u64>,
}

/// Host bytes that lost their place in the mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unnamed {
    /// First byte.
    pub offset: u64,
    /// Bytes: a cluster, or the stored form of a compressed one.
    pub len: u64,
    /// The guest cluster whose place it stays, if it does: then only the content is of no use, as long as nobody writes there.
    pub stays_of: Option<u64>,
    /// The kind of structure that stands there; `None` for a guest's data.
    pub of: Option<Structure>,
}

impl Unnamed {
    /// Host bytes of a guest's data.
    pub fn data(offset: u64, len: u64) -> Unnamed {
        Unnamed { offset, len, stays_of: None, of: None }
    }

    /// Host bytes of a structure of the image.
    pub fn structure(offset: u64, len: u64, of: Structure) -> Unnamed {
        Unnamed { offset, len, stays_of: None, of: Some(of) }
    }
}

impl Meta {
    /// The flight that `clusters` (of the guest) meet first.
    pub fn flight_in(&self, clusters: &Range<u64>) -> Option<&Range<u64>> {
        let meets = |flight: &&Range<u64>| flight.start < clusters.end && clusters.start < flight.end;
        self.flights.iter().filter(meets).min_by_key(|flight| flight.start)
    }

    /// Whether guest cluster `cluster` may be changed now.
    ///
    /// # Errors
    /// [`Refused::Busy`]
    pub fn check_flights(&self, cluster: u64) -> Result<(), Refused> {
        if self.flight_in(&(cluster..cluster + 1)).is_some() { Err(Refused::Busy) } else { Ok(()) }
    }

    /// Takes a flight off the list.
    pub fn land(&mut self, flight: &Range<u64>) {
        if let Some(at) = self.flights.iter().position(|other| other == flight) {
            self.flights.swap_remove(at);
        }
    }

    /// Whether nothing stands in memory that is not on disk.
    pub fn is_clean(&self) -> bool {
        let counts = self.refcounts.as_ref();
        self.dirty.is_empty()
            && self.dirty_l1.is_empty()
            && self.unnamed.is_empty()
            && counts.is_none_or(|counts| counts.dirty_pages.is_empty() && counts.dirty_table.is_empty())
    }
}
