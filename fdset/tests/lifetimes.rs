// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What becomes of the sets when clients leave. No test waits: time is a number here.
#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use fdset::{Access, FdSets, InUse, Keeper, Lifetime, Provenance, Settings};
use support::{Image, listing, numbers};

const GRACE: Duration = Duration::from_secs(10);

fn sets(lifetime: Lifetime, in_use: InUse) -> FdSets {
    FdSets::with(Settings { lifetime, in_use, ..Settings::default() })
}

/// One client came, passed two descriptors into set 0 and one into set 1, opened set 0, and left at the given time.
fn client_left(sets: &FdSets, image: &Image, at: Instant) -> (fdset::Dup, Vec<i64>) {
    sets.monitor_connected(Keeper::default());
    sets.add(image.read_only(), Some(0), None).unwrap();
    sets.add(image.read_write(), Some(0), None).unwrap();
    sets.add(image.read_only(), Some(1), None).unwrap();
    let dup = sets.open(0, Access::READ_ONLY).unwrap();
    let changed = sets.monitor_disconnected(Keeper::default(), at);
    (dup, changed)
}

#[test]
fn explicit_keeps_everything_when_the_last_client_leaves() {
    let (image, sets, now) = (Image::new(), sets(Lifetime::Explicit, InUse::Close), Instant::now());
    let (_dup, changed) = client_left(&sets, &image, now);
    assert_eq!((changed, sets.len(), sets.next_deadline()), (vec![], 3, None));
}

#[test]
fn monitor_closes_everything_and_lists_sets_in_use_until_their_dups_go() {
    let (image, sets, now) = (Image::new(), sets(Lifetime::Monitor, InUse::Close), Instant::now());
    let (dup, changed) = client_left(&sets, &image, now);
    assert_eq!(changed, [0, 1]);
    assert_eq!(listing(&sets), [(0, vec![])]);
    drop(dup);
    assert_eq!(listing(&sets), []);
}

#[test]
fn monitor_leaves_a_set_in_use_whole_until_its_last_dup_goes_if_asked() {
    let (image, sets, now) = (Image::new(), sets(Lifetime::Monitor, InUse::Keep), Instant::now());
    let (dup, changed) = client_left(&sets, &image, now);
    assert_eq!(changed, [1]);
    assert_eq!(sets.len(), 2);
    let reopened = sets.open(0, Access::READ_WRITE).unwrap();
    drop(dup);
    assert_eq!(sets.len(), 2, "a change of access mode keeps it in use");
    drop(reopened);
    assert_eq!((sets.len(), sets.list().len()), (0, 0));
}

#[test]
fn client_that_comes_back_owns_the_sets_in_use_again() {
    let (image, sets, now) = (Image::new(), sets(Lifetime::Monitor, InUse::Keep), Instant::now());
    let (dup, _) = client_left(&sets, &image, now);
    sets.monitor_connected(Keeper::default());
    drop(dup);
    assert_eq!(sets.len(), 2);
}

#[test]
fn monitor_waits_for_the_last_of_several_clients() {
    let (image, sets, now) = (Image::new(), sets(Lifetime::Monitor, InUse::Close), Instant::now());
    sets.monitor_connected(Keeper::default());
    let (_dup, changed) = client_left(&sets, &image, now);
    assert_eq!((changed, sets.len()), (vec![], 3));
    assert_eq!(sets.monitor_disconnected(Keeper::default(), now), [0, 1]);
}

#[test]
fn lease_closes_when_the_grace_time_is_over_and_not_before() {
    let (image, sets, now) = (Image::new(), sets(Lifetime::Lease(GRACE), InUse::Close), Instant::now());
    let (_dup, changed) = client_left(&sets, &image, now);
    assert_eq!((changed, sets.next_deadline()), (vec![], Some(now + GRACE)));
    assert_eq!(sets.expire(now + GRACE / 2), []);
    assert_eq!(sets.len(), 3);
    assert_eq!(sets.expire(now + GRACE), [0, 1]);
    assert_eq!((sets.len(), sets.next_deadline()), (0, None));
}

#[test]
fn lease_is_renewed_by_a_client_that_comes_back() {
    let (image, sets, now) = (Image::new(), sets(Lifetime::Lease(GRACE), InUse::Close), Instant::now());
    let (_dup, _) = client_left(&sets, &image, now);
    sets.monitor_connected(Keeper::default());
    assert_eq!(sets.expire(now + 100 * GRACE), []);
    assert_eq!(sets.len(), 3);
}

#[test]
fn keepers_end_their_own_descriptors_only() {
    let (image, sets, now) = (Image::new(), sets(Lifetime::Explicit, InUse::Close), Instant::now());
    let brief = sets.keeper(Lifetime::Monitor);
    let stays = sets.add(image.read_only(), Some(0), None).unwrap().fd;
    let provenance = Provenance { keeper: brief, ..Provenance::default() };
    sets.add_from(image.read_only(), Some(0), None, provenance).unwrap();
    for keeper in [Keeper::default(), brief] {
        sets.monitor_connected(keeper);
    }
    assert_eq!(sets.monitor_disconnected(Keeper::default(), now), []);
    assert_eq!(sets.monitor_disconnected(brief, now), [0]);
    assert_eq!(numbers(&sets.set(0).unwrap()), [stays]);
}

#[test]
fn descriptors_of_the_command_line_wait_for_the_first_client() {
    let (image, sets, now) = (Image::new(), sets(Lifetime::Monitor, InUse::Close), Instant::now());
    sets.add(image.read_only(), None, None).unwrap();
    assert_eq!(sets.expire(now + GRACE), []);
    assert_eq!(sets.len(), 1);
    sets.monitor_connected(Keeper::default());
    assert_eq!(sets.monitor_disconnected(Keeper::default(), now), [0]);
}
