// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where the image's own structures stand, so that nothing else is put there and no structure is written over another.
//!
//! Runs of clusters in order, each of one kind. Two kinds in one place mean that the image is damaged; only the tables of
//! snapshots may be named more than once.

use std::collections::BTreeMap;
use std::ops::Range;

/// A kind of structure (qcow2.txt, "Host cluster management").
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Structure {
    Header,
    RefcountTable,
    RefcountBlock,
    L1Table,
    /// Of the active image, or shared with it.
    L2Table,
    SnapshotTable,
    SnapshotL1Table,
    /// Of snapshots alone.
    SnapshotL2Table,
    /// Directory, tables and content.
    Bitmap,
    LuksHeader,
}

impl Structure {
    /// As people call it.
    pub fn name(self) -> &'static str {
        match self {
            Structure::Header => "header",
            Structure::RefcountTable => "refcount table",
            Structure::RefcountBlock => "refcount block",
            Structure::L1Table => "L1 table",
            Structure::L2Table => "L2 table",
            Structure::SnapshotTable => "snapshot table",
            Structure::SnapshotL1Table => "L1 table of a snapshot",
            Structure::SnapshotL2Table => "L2 table of a snapshot",
            Structure::Bitmap => "bitmap",
            Structure::LuksHeader => "LUKS header",
        }
    }

    /// Whether both may stand in one place.
    fn shares_with(self, other: Structure) -> bool {
        match self {
            Structure::SnapshotL1Table => other == Structure::SnapshotL1Table,
            Structure::SnapshotL2Table => other.is_l2(),
            Structure::L2Table => other == Structure::SnapshotL2Table,
            _ => false,
        }
    }

    fn is_l2(self) -> bool {
        matches!(self, Structure::L2Table | Structure::SnapshotL2Table)
    }
}

/// In the order of their numbers.
const ALL: [Structure; 10] = [
    Structure::Header,
    Structure::RefcountTable,
    Structure::RefcountBlock,
    Structure::L1Table,
    Structure::L2Table,
    Structure::SnapshotTable,
    Structure::SnapshotL1Table,
    Structure::SnapshotL2Table,
    Structure::Bitmap,
    Structure::LuksHeader,
];

/// One past the last cluster of a run, and its kind, in one word: an image may have millions of runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Run(u64);

impl Run {
    /// `end` is below 2^56: it numbers clusters.
    fn new(end: u64, kind: Structure) -> Run {
        Run(end << 8 | ALL.iter().position(|&other| other == kind).unwrap_or(0) as u64)
    }

    fn end(self) -> u64 {
        self.0 >> 8
    }

    fn kind(self) -> Structure {
        ALL.get(usize::from(self.0.to_le_bytes()[0])).copied().unwrap_or(Structure::Header)
    }
}

/// Runs of clusters that are yet to be put in order.
#[derive(Debug, Default)]
pub struct Found(Vec<(u64, Run)>);

impl Found {
    /// Room for `runs` of them.
    pub fn with_room_for(runs: usize) -> Found {
        Found(Vec::with_capacity(runs))
    }

    /// A structure of `kind` stands in `clusters`, with numbers below 2^56.
    pub fn add(&mut self, clusters: Range<u64>, kind: Structure) {
        if !clusters.is_empty() {
            self.0.push((clusters.start, Run::new(clusters.end, kind)));
        }
    }
}

/// Runs of cluster numbers by their start.
#[derive(Debug, Default)]
pub struct Places(BTreeMap<u64, Run>);

impl Places {
    /// All that was found.
    ///
    /// # Errors
    /// The first cluster where two stand that must not, and the kind of the second.
    pub fn new(found: Found) -> Result<Places, (u64, Structure)> {
        let mut runs = found.0;
        runs.sort_unstable_by_key(|&(start, run)| (start, run.kind(), run.end()));
        // In place: nothing is as large as this list.
        let mut kept: usize = 0;
        for index in 0..runs.len() {
            let (mut start, run) = runs[index];
            if let Some((_, last)) = kept.checked_sub(1).and_then(|last| runs.get_mut(last)) {
                if start < last.end() {
                    if !run.kind().shares_with(last.kind()) {
                        return Err((start, run.kind()));
                    }
                    start = last.end();
                }
                if start == last.end() && run.kind() == last.kind() {
                    *last = Run::new(run.end().max(start), run.kind());
                    continue;
                }
            }
            if start < run.end() {
                runs[kept] = (start, run);
                kept += 1;
            }
        }
        runs.truncate(kept);
        Ok(Places(runs.into_iter().collect()))
    }

    /// What stands in a cluster.
    pub fn at(&self, cluster: u64) -> Option<Structure> {
        self.first_in(cluster..cluster + 1).map(|(_, kind)| kind)
    }

    /// The first cluster of some where something stands, and what.
    pub fn first_in(&self, clusters: Range<u64>) -> Option<(u64, Structure)> {
        if clusters.is_empty() {
            return None;
        }
        let covering = self.0.range(..=clusters.start).next_back().filter(|(_, run)| run.end() > clusters.start);
        match covering {
            Some((_, run)) => Some((clusters.start, run.kind())),
            None => self.0.range(clusters).next().map(|(&start, run)| (start, run.kind())),
        }
    }

    /// Whether a structure of `kind` may be taken out of `cluster`, or a guest's data if `None`.
    pub fn lets_go(&self, cluster: u64, kind: Option<Structure>) -> bool {
        match (self.at(cluster), kind) {
            (None, _) => true,
            (Some(found), Some(kind)) => found == kind || found.shares_with(kind),
            (Some(_), None) => false,
        }
    }

    /// From now on `kind` stands in `clusters`, where nothing stood.
    pub fn add(&mut self, clusters: Range<u64>, kind: Structure) {
        if clusters.is_empty() {
            return;
        }
        let Range { start, mut end } = clusters;
        if let Some((&next, &run)) = self.0.range(end..).next()
            && next == end
            && run.kind() == kind
        {
            self.0.remove(&next);
            end = run.end();
        }
        match self.0.range_mut(..start).next_back() {
            Some((_, last)) if last.end() == start && last.kind() == kind => *last = Run::new(end, kind),
            _ => {
                self.0.insert(start, Run::new(end, kind));
            }
        }
    }

    /// Nothing stands in `cluster` any more.
    pub fn remove(&mut self, cluster: u64) {
        let Some((&start, &run)) = self.0.range(..=cluster).next_back() else { return };
        if run.end() <= cluster {
            return;
        }
        self.0.remove(&start);
        if start < cluster {
            self.0.insert(start, Run::new(cluster, run.kind()));
        }
        if cluster + 1 < run.end() {
            self.0.insert(cluster + 1, run);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn found(runs: &[(Range<u64>, Structure)]) -> Result<Places, (u64, Structure)> {
        let mut found = Found::default();
        runs.iter().for_each(|(clusters, kind)| found.add(clusters.clone(), *kind));
        Places::new(found)
    }

    #[test]
    fn every_kind_comes_out_of_a_run_as_it_went_in() {
        for kind in ALL {
            let run = Run::new((1 << 55) + 3, kind);
            assert_eq!((run.end(), run.kind()), ((1 << 55) + 3, kind));
        }
    }

    #[test]
    fn runs_grow_together_and_come_apart() {
        let mut places = found(&[(4..6, Structure::L2Table), (0..1, Structure::Header)]).unwrap();
        places.add(7..8, Structure::L2Table);
        places.add(6..7, Structure::L2Table);
        assert_eq!(places.0.len(), 2);
        places.remove(5);
        places.remove(9);
        assert_eq!(
            (places.at(4), places.at(5), places.at(7)),
            (Some(Structure::L2Table), None, Some(Structure::L2Table))
        );
        assert_eq!(places.first_in(1..100), Some((4, Structure::L2Table)));
        assert_eq!((places.first_in(5..6), places.first_in(4..4)), (None, None));
    }

    #[test]
    fn only_tables_of_snapshots_may_stand_where_others_of_their_kind_do() {
        let both = |one, other| found(&[(3..5, one), (4..6, other)]);
        assert!(both(Structure::L2Table, Structure::L2Table).is_err());
        assert_eq!(both(Structure::L1Table, Structure::SnapshotL1Table).unwrap_err(), (4, Structure::SnapshotL1Table));
        let shared = both(Structure::SnapshotL1Table, Structure::SnapshotL1Table).unwrap();
        assert!(shared.at(3) == shared.at(5) && shared.at(5).is_some() && !shared.lets_go(5, None));
        let places = found(&[(3..4, Structure::SnapshotL2Table), (3..4, Structure::L2Table)]).unwrap();
        assert_eq!(places.at(3), Some(Structure::L2Table));
        assert!(places.lets_go(3, Some(Structure::SnapshotL2Table)) && !places.lets_go(3, Some(Structure::L1Table)));
    }
}
