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

/// Runs of cluster numbers: the end and the kind by the start.
#[derive(Debug, Default)]
pub struct Places(BTreeMap<u64, (u64, Structure)>);

impl Places {
    /// All of `runs`.
    ///
    /// # Errors
    /// The first cluster where two stand that must not, and the kind of the second.
    pub fn new(mut runs: Vec<(Range<u64>, Structure)>) -> Result<Places, (u64, Structure)> {
        runs.retain(|(clusters, _)| !clusters.is_empty());
        runs.sort_unstable_by_key(|(clusters, kind)| (clusters.start, *kind, clusters.end));
        let mut merged: Vec<(u64, (u64, Structure))> = Vec::new();
        for (clusters, kind) in runs {
            let Range { mut start, end } = clusters;
            if let Some((_, (last, before))) = merged.last_mut() {
                if start < *last {
                    if !kind.shares_with(*before) {
                        return Err((start, kind));
                    }
                    start = *last;
                }
                if start == *last && (kind == *before) {
                    *last = end.max(*last);
                    continue;
                }
            }
            if start < end {
                merged.push((start, (end, kind)));
            }
        }
        Ok(Places(merged.into_iter().collect()))
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
        let covering = self.0.range(..=clusters.start).next_back().filter(|(_, (end, _))| *end > clusters.start);
        match covering {
            Some((_, (_, kind))) => Some((clusters.start, *kind)),
            None => self.0.range(clusters).next().map(|(&start, &(_, kind))| (start, kind)),
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
        if let Some((&next, &(next_end, next_kind))) = self.0.range(end..).next()
            && next == end
            && next_kind == kind
        {
            self.0.remove(&next);
            end = next_end;
        }
        match self.0.range_mut(..start).next_back() {
            Some((_, (last, before))) if *last == start && *before == kind => *last = end,
            _ => {
                self.0.insert(start, (end, kind));
            }
        }
    }

    /// Nothing stands in `cluster` any more.
    pub fn remove(&mut self, cluster: u64) {
        let Some((&start, &(end, kind))) = self.0.range(..=cluster).next_back() else { return };
        if end <= cluster {
            return;
        }
        self.0.remove(&start);
        if start < cluster {
            self.0.insert(start, (cluster, kind));
        }
        if cluster + 1 < end {
            self.0.insert(cluster + 1, (end, kind));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn runs_grow_together_and_come_apart() {
        let mut places = Places::new(vec![(4..6, Structure::L2Table), (0..1, Structure::Header)]).unwrap();
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
        let both = |one, other| Places::new(vec![(3..5, one), (4..6, other)]);
        assert!(both(Structure::L2Table, Structure::L2Table).is_err());
        assert_eq!(both(Structure::L1Table, Structure::SnapshotL1Table).unwrap_err(), (4, Structure::SnapshotL1Table));
        let places = both(Structure::SnapshotL1Table, Structure::SnapshotL1Table).unwrap();
        assert!(places.at(3) == places.at(5) && places.at(5).is_some() && !places.lets_go(5, None));
        let places = Places::new(vec![(3..4, Structure::SnapshotL2Table), (3..4, Structure::L2Table)]).unwrap();
        assert_eq!(places.at(3), Some(Structure::L2Table));
        assert!(places.lets_go(3, Some(Structure::SnapshotL2Table)) && !places.lets_go(3, Some(Structure::L1Table)));
    }
}
