// SPDX-License-Identifier: Apache-2.0 OR MIT
//! qcow2 images that break the rules, opened for writing: refused, or marked and left alone as soon as it shows.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use block::{Alarm, BlockNode, Children, Corruption, NodeAccess, OpenRequest, OptionValue, ZeroFlags, driver_named};
use support::read;
use support::recording::{Journal, recorded};

const CLUSTER: u64 = 65536;
const COPIED: u64 = 1 << 63;

/// Header, refcount table, refcount block, L1, L2, one data cluster of 0x5a; 1 MiB for the guest, counts as they should be.
fn good(version: u32) -> Vec<u8> {
    let mut image = vec![0; 6 * 65536];
    put(&mut image, 0, b"QFI\xfb");
    for (at, value) in [(4, version), (20, 16), (36, 1), (56, 1), (96, 4), (100, 104)] {
        put(&mut image, at, &value.to_be_bytes());
    }
    for (at, value) in [(24, 1 << 20), (40, 3 * CLUSTER), (48, CLUSTER)] {
        put64(&mut image, at, value);
    }
    put64(&mut image, CLUSTER, 2 * CLUSTER);
    put64(&mut image, 3 * CLUSTER, (4 * CLUSTER) | COPIED);
    put64(&mut image, 4 * CLUSTER, (5 * CLUSTER) | COPIED);
    (0..6).for_each(|cluster| count(&mut image, cluster, 1));
    image[5 * 65536..].fill(0x5a);
    image
}

/// The same with a snapshot: its table, its L1 table, its L2 table, one data cluster of 0xa5.
fn with_snapshot() -> Vec<u8> {
    let mut image = good(3);
    image.resize(10 * 65536, 0);
    put(&mut image, 60, &1u32.to_be_bytes());
    put64(&mut image, 64, 6 * CLUSTER);
    put64(&mut image, 6 * CLUSTER, 7 * CLUSTER);
    for (at, value) in [(8, 1), (12, 0x0001_0001), (36, 24)] {
        put(&mut image, 6 * CLUSTER + at, &u32::to_be_bytes(value));
    }
    put64(&mut image, 6 * CLUSTER + 48, 1 << 20);
    put(&mut image, 6 * CLUSTER + 64, b"1s");
    put64(&mut image, 7 * CLUSTER, 8 * CLUSTER);
    put64(&mut image, 8 * CLUSTER, 9 * CLUSTER);
    (6..10).for_each(|cluster| count(&mut image, cluster, 1));
    image[9 * 65536..].fill(0xa5);
    image
}

fn put(image: &mut [u8], at: u64, bytes: &[u8]) {
    image[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
}

fn put64(image: &mut [u8], at: u64, value: u64) {
    put(image, at, &value.to_be_bytes());
}

fn count(image: &mut [u8], cluster: u64, count: u16) {
    put(image, 2 * CLUSTER + cluster * 2, &count.to_be_bytes());
}

struct Opened {
    node: BlockNode,
    file: Arc<Mutex<Vec<u8>>>,
    heard: Arc<Mutex<Vec<Corruption>>>,
}

fn open(image: Vec<u8>) -> block::Result<Opened> {
    open_with(image, block::Options::new())
}

fn open_with(image: Vec<u8>, options: block::Options) -> block::Result<Opened> {
    let (node, file) = recorded(&Journal::silent(), 0, image);
    let heard = Arc::new(Mutex::new(Vec::new()));
    let hears = Arc::clone(&heard);
    let mut children = Children::new();
    children.insert("file", node);
    let driver = (driver_named("qcow2").unwrap().open)(OpenRequest {
        descriptor: None,
        files: Vec::new(),
        filename: String::new(),
        children,
        detached: BTreeSet::new(),
        options,
        writable: true,
        facts_only: false,
        node_name: "image".into(),
        alarm: Alarm::new(move |corruption| hears.lock().unwrap().push(corruption)),
    })?;
    let access = NodeAccess { writable: true, unmap: true };
    Ok(Opened { node: BlockNode::new("image", "qcow2", "image", access, driver), file, heard })
}

impl Opened {
    /// The bit "corrupt" on disk.
    fn is_marked(&self) -> bool {
        self.file.lock().unwrap()[79] & 2 != 0
    }
}

#[test]
fn the_image_made_by_hand_is_written_and_nobody_is_alarmed() {
    let opened = open(good(3)).unwrap();
    opened.node.write(&[1; 512], 0, true).unwrap();
    opened.node.write(&[2; 512], 7 * CLUSTER, true).unwrap();
    assert!(opened.heard.lock().unwrap().is_empty() && !opened.is_marked());
    support::walk::walk(&opened.file.lock().unwrap()).unwrap();
}

/// What shows at the open already: nothing is written to such an image.
#[test]
fn case_55_and_57_tables_that_stand_in_each_other_are_refused_for_writing() {
    type Change = fn(&mut Vec<u8>);
    let cases: &[(&str, Change)] = &[
        ("the L2 table in the refcount table", |i| put64(i, 3 * CLUSTER, CLUSTER | COPIED)),
        ("the L2 table in the refcount block", |i| put64(i, 3 * CLUSTER, (2 * CLUSTER) | COPIED)),
        ("the L2 table in the L1 table", |i| put64(i, 3 * CLUSTER, (3 * CLUSTER) | COPIED)),
        ("a refcount block in the L1 table", |i| put64(i, CLUSTER, 3 * CLUSTER)),
        ("case 57: a refcount block in the refcount table", |i| put64(i, CLUSTER, CLUSTER)),
        ("a refcount block twice", |i| put64(i, CLUSTER + 8, 2 * CLUSTER)),
        ("the L1 table in the header", |i| put64(i, 40, 0)),
        ("the refcount table in the header", |i| put64(i, 48, 0)),
        ("the refcount table in the L1 table", |i| put64(i, 48, 3 * CLUSTER)),
    ];
    for (case, change) in cases {
        let mut image = good(3);
        change(&mut image);
        let error = open(image).err().unwrap_or_else(|| panic!("{case}")).to_string();
        assert!(error.contains("overlaps other metadata"), "{case}: {error}");
    }
}

#[test]
fn case_55_a_guest_cluster_in_metadata_marks_the_image_and_ends_its_writing_alone() {
    let places = [("header", 0x200), ("refcount table", CLUSTER), ("refcount block", 2 * CLUSTER)];
    for (what, place) in places.into_iter().chain([("L1 table", 3 * CLUSTER), ("L2 table", 4 * CLUSTER)]) {
        for version in [2, 3] {
            let mut image = good(version);
            put64(&mut image, 4 * CLUSTER + 8, place | COPIED);
            let opened = open(image).unwrap();
            let write = opened.node.write(&[0xbb; 512], CLUSTER, false);
            assert_eq!(write.unwrap_err().raw_os_error(), Some(5), "{what}: the write");
            for offset in [0, CLUSTER, 8 * CLUSTER] {
                let again = opened.node.write(&[0xbb; 512], offset, false).unwrap_err();
                assert_eq!(again.raw_os_error(), Some(5), "{what}: a write at {offset:#x} later");
            }
            let zeroes = opened.node.write_zeroes(0, CLUSTER, ZeroFlags::default(), false).unwrap_err();
            assert_eq!(zeroes.raw_os_error(), Some(5), "{what}: zeroes later");
            assert_eq!(opened.heard.lock().unwrap().len(), 1, "{what}: the alarm, once");
            assert_eq!(opened.is_marked(), version == 3, "{what}: the mark, which version 2 has no room for");
            let _ = read(&opened.node, CLUSTER, 512);
            let bytes = opened.file.lock().unwrap().clone();
            drop(opened);
            let unmarked = [&bytes[..79], &[0], &bytes[80..]].concat();
            let mut before = good(version);
            put64(&mut before, 4 * CLUSTER + 8, place | COPIED);
            assert!(unmarked == before, "{what}: nothing else was written");
        }
    }
}

#[test]
fn case_55_metadata_that_is_counted_as_free_is_never_given_out() {
    for cluster in 0..5 {
        let mut image = good(3);
        count(&mut image, cluster, 0);
        let opened = open(image).unwrap();
        let error = opened.node.write(&[1; 512], 9 * CLUSTER, false).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(5), "cluster {cluster}");
        assert!(opened.is_marked() && opened.heard.lock().unwrap().len() == 1, "cluster {cluster}");
        assert_eq!(read(&opened.node, 0, 512).unwrap(), [0x5a; 512], "reads go on");
    }
}

#[test]
fn case_56_a_refcount_block_at_an_impossible_place_marks_the_image() {
    for block in [2 * CLUSTER + 512, u64::MAX - 511, 0u64.wrapping_sub(CLUSTER), 1 << 56] {
        let mut image = good(3);
        put64(&mut image, CLUSTER, block);
        let opened = open(image).unwrap();
        let error = opened.node.write(&[1; 512], 9 * CLUSTER, false).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(5));
        assert!(opened.is_marked(), "{block:#x}");
        assert_eq!(read(&opened.node, 0, 512).unwrap(), [0x5a; 512], "reads go on");
    }
}

#[test]
fn a_cluster_that_is_let_go_but_counted_as_free_marks_the_image() {
    let mut image = good(3);
    count(&mut image, 5, 0);
    let opened = open(image).unwrap();
    opened.node.discard(0, CLUSTER).unwrap();
    let flushes: Vec<_> = (0..3).map(|_| opened.node.flush().is_ok()).collect();
    assert!(flushes.contains(&false) && opened.is_marked());
}

#[test]
fn unaligned_tables_and_clusters_are_errors_of_the_write_and_mark_the_image() {
    type Change = fn(&mut Vec<u8>);
    let cases: &[(&str, Change)] = &[
        ("the L2 table", |i| put64(i, 3 * CLUSTER, (4 * CLUSTER + 512) | COPIED)),
        ("a cluster", |i| put64(i, 4 * CLUSTER, (5 * CLUSTER + 512) | COPIED)),
    ];
    for (case, change) in cases {
        let mut image = good(3);
        change(&mut image);
        let opened = open(image).unwrap();
        assert_eq!(opened.node.write(&[1; 512], 0, false).unwrap_err().raw_os_error(), Some(5), "{case}");
        assert!(opened.is_marked(), "{case}");
        assert_eq!(opened.heard.lock().unwrap().len(), 1, "{case}");
    }
}

#[test]
fn case_58_a_broken_compressed_cluster_is_an_error_of_its_write_and_the_rest_is_written() {
    let mut image = good(3);
    image.resize(7 * 65536, 0xff);
    count(&mut image, 6, 1);
    put64(&mut image, 4 * CLUSTER + 8, (1 << 62) | (1 << 54) | (6 * CLUSTER));
    let opened = open(image).unwrap();
    assert!(opened.node.write(&[1; 512], CLUSTER, false).is_err(), "what it leaves of the cluster cannot be had");
    opened.node.write(&[2; 512], 0, true).unwrap();
    opened.node.write(&[3; 65536], CLUSTER, true).unwrap();
    assert_eq!(read(&opened.node, CLUSTER, 65536).unwrap(), [3; 65536], "a whole cluster needs nothing of the old one");
}

#[test]
fn the_image_with_a_snapshot_made_by_hand_is_a_good_one() {
    let opened = open(with_snapshot()).unwrap();
    opened.node.snapshots().unwrap().apply("1").unwrap();
    assert_eq!(read(&opened.node, 0, 512).unwrap(), [0xa5; 512]);
    opened.node.write(&[1; 512], 0, true).unwrap();
    opened.node.snapshots().unwrap().delete(Some("1"), None).unwrap();
    opened.node.flush().unwrap();
    assert!(opened.heard.lock().unwrap().is_empty() && !opened.is_marked());
    support::walk::walk(&opened.file.lock().unwrap()).unwrap();
}

#[test]
fn case_55_tables_of_snapshots_that_stand_in_others_are_refused_for_writing() {
    type Change = fn(&mut Vec<u8>);
    let cases: &[(&str, Change)] = &[
        ("the snapshot table in the refcount table", |i| {
            i.copy_within(6 * 65536..6 * 65536 + 72, 65536 + 4096);
            put64(i, 64, CLUSTER);
        }),
        ("a snapshot's L1 table in the header", |i| put64(i, 6 * CLUSTER, 0)),
        ("a snapshot's L1 table in the refcount block", |i| put64(i, 6 * CLUSTER, 2 * CLUSTER)),
        ("a snapshot's L1 table in the active one", |i| put64(i, 6 * CLUSTER, 3 * CLUSTER)),
        ("a snapshot's L1 table in an L2 table", |i| put64(i, 6 * CLUSTER, 4 * CLUSTER)),
        ("a snapshot's L1 table in the snapshot table", |i| put64(i, 6 * CLUSTER, 6 * CLUSTER)),
        ("an L2 table in a snapshot's L1 table", |i| put64(i, 3 * CLUSTER, (7 * CLUSTER) | COPIED)),
    ];
    for (case, change) in cases {
        let mut image = with_snapshot();
        change(&mut image);
        let error = open(image).err().unwrap_or_else(|| panic!("{case}")).to_string();
        assert!(error.contains("overlaps other metadata"), "{case}: {error}");
    }
    for (at, value) in [(0, 7 * CLUSTER + 512), (0, u64::MAX - 511)] {
        let mut image = with_snapshot();
        put64(&mut image, 6 * CLUSTER + at, value);
        let error = open(image).err().unwrap().to_string();
        assert!(error.contains("Snapshot L1 table offset invalid"), "{error}");
    }
}

#[test]
fn case_55_a_snapshot_that_names_metadata_marks_the_image_and_nothing_else_changes() {
    type Change = fn(&mut Vec<u8>);
    let cases: &[(&str, Change)] = &[
        ("its L2 table in the refcount table", |i| put64(i, 7 * CLUSTER, CLUSTER)),
        ("its L2 table in the refcount block", |i| put64(i, 7 * CLUSTER, 2 * CLUSTER)),
        ("its L2 table in the active L1 table", |i| put64(i, 7 * CLUSTER, 3 * CLUSTER)),
        ("its L2 table in its own L1 table", |i| put64(i, 7 * CLUSTER, 7 * CLUSTER)),
        ("its data in the refcount table", |i| put64(i, 8 * CLUSTER, CLUSTER)),
        ("its data in the active L1 table", |i| put64(i, 8 * CLUSTER, 3 * CLUSTER)),
        ("its data in an active L2 table", |i| put64(i, 8 * CLUSTER, 4 * CLUSTER)),
        ("its data in the snapshot table", |i| put64(i, 8 * CLUSTER, 6 * CLUSTER)),
        ("its data in its L1 table", |i| put64(i, 8 * CLUSTER, 7 * CLUSTER)),
        ("its compressed data in the header", |i| put64(i, 8 * CLUSTER, 1 << 62)),
    ];
    for (case, change) in cases {
        for applies in [true, false] {
            let mut before = with_snapshot();
            change(&mut before);
            let opened = open(before.clone()).unwrap();
            let snapshots = opened.node.snapshots().unwrap();
            let done = if applies { snapshots.apply("1") } else { snapshots.delete(Some("1"), None).map(drop) };
            assert!(done.is_err(), "{case}, {applies}");
            assert!(opened.is_marked(), "{case}, {applies}: the mark");
            assert_eq!(opened.heard.lock().unwrap().len(), 1, "{case}, {applies}: the alarm, once");
            assert!(opened.node.write(&[1; 512], 0, false).is_err(), "{case}, {applies}: a write later");
            let mut after = opened.file.lock().unwrap().clone();
            after[79] = 0;
            after.truncate(before.len());
            assert!(after == before, "{case}, {applies}: nothing else changes");
        }
    }
}

#[test]
fn case_55_a_guest_cluster_in_a_snapshots_l1_table_marks_the_image() {
    let mut image = with_snapshot();
    put64(&mut image, 4 * CLUSTER + 8, (7 * CLUSTER) | COPIED);
    let opened = open(image).unwrap();
    assert_eq!(opened.node.write(&[1; 512], CLUSTER, false).unwrap_err().raw_os_error(), Some(5));
    assert!(opened.is_marked());
}

#[test]
fn the_l2_tables_of_snapshots_are_guarded_where_all_of_it_is() {
    for all in [false, true] {
        let mut image = with_snapshot();
        put64(&mut image, 4 * CLUSTER + 8, (8 * CLUSTER) | COPIED);
        let options = [("overlap-check", OptionValue::Str(if all { "all" } else { "cached" }.into()))].into();
        let opened = open_with(image, options).unwrap();
        assert_eq!(opened.node.write(&[1; 512], CLUSTER, false).is_err(), all);
        assert_eq!(opened.is_marked(), all);
    }
}

/// A count of one says that each is the only owner. What a guest loses by that is its own: it stays in the image, and a check
/// finds it.
#[test]
fn two_guest_clusters_in_one_host_cluster_hurt_no_more_than_each_other() {
    let mut image = good(3);
    put64(&mut image, 4 * CLUSTER + 8, (5 * CLUSTER) | COPIED);
    let (file, _) = recorded(&Journal::silent(), 0, image.clone());
    let report = block::check(&file, "qcow2", block::Repair::Nothing, &mut |_| ()).unwrap();
    assert!(report.corruptions > 0, "{report:?}");
    let opened = open(image).unwrap();
    opened.node.write(&[1; 512], 0, true).unwrap();
    opened.node.write(&[3; 512], 4 * CLUSTER, true).unwrap();
    opened.node.discard(0, CLUSTER).unwrap();
    for round in 0..6u64 {
        let _ = opened.node.flush();
        let _ = opened.node.discard(CLUSTER, CLUSTER);
        let _ = opened.node.write(&[2; 512], (8 + round) * CLUSTER, true);
    }
    assert_eq!(read(&opened.node, 4 * CLUSTER, 512).unwrap(), [3; 512], "a cluster with one owner");
    let file = opened.file.lock().unwrap().clone();
    for (at, word) in [(0, 0x5146_49fb_0000_0003), (CLUSTER, 2 * CLUSTER), (3 * CLUSTER, (4 * CLUSTER) | COPIED)] {
        assert_eq!(file[at as usize..at as usize + 8], u64::to_be_bytes(word), "the tables are what they were");
    }
}
