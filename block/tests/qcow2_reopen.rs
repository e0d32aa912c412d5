// SPDX-License-Identifier: Apache-2.0 OR MIT
//! qcow2 made read-only and writable again while it is in use.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use std::os::unix::fs::FileExt;

use block::Preallocation;
use support::image::{KINDS, make};
use support::walk::walk;
use support::{Nodes, in_memory, judge, memory, name_in, read, run, to_disk};

#[test]
fn tables_that_moved_are_found_when_the_image_is_written_again() {
    if !judge("tables_that_moved_are_found_when_the_image_is_written_again", "qemu-img") {
        return;
    }
    let made = make(KINDS.iter().find(|kind| kind.name == "refcount tables that grow").unwrap());
    let file = memory();
    file.write_all_at(&made.files[0], 0).unwrap();
    let mut nodes = Nodes::new();
    let below = nodes.file(&file, true);
    let node = nodes.format("qcow2", &[("file", &below)], true, &[]).unwrap();
    let size = 32 * made.kind.size;
    // Both the L1 table and the refcount table become too small.
    node.resize(size, Preallocation::Off).unwrap();
    let mut expected = vec![0; size as usize];
    for round in 1..=4u8 {
        for (at, cluster) in expected.chunks_mut(512).enumerate().filter(|(at, _)| at % 4 == usize::from(round) % 4) {
            cluster.fill(round);
            node.write(cluster, at as u64 * 512, false).unwrap();
        }
        nodes.graph.set_writable(node.name(), false).unwrap();
        assert!(read(&node, 0, expected.len()).unwrap() == expected, "read-only, round {round}");
        nodes.graph.set_writable(node.name(), true).unwrap();
    }
    assert!(read(&node, 0, expected.len()).unwrap() == expected);
    drop((node, nodes));
    let mut image = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut image, 0).unwrap();
    walk(&image).unwrap();
    assert_ne!(image[48..56], made.files[0][48..56], "the refcount table has moved");
}

/// Images as a crash leaves them are repaired when they become writable, as when they are opened for writing.
#[test]
fn an_image_that_was_not_closed_properly_can_become_writable() {
    let test = "an_image_that_was_not_closed_properly_can_become_writable";
    if !judge(test, "qemu-img") || !judge(test, "qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, name) = name_in(dir.path(), "image");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,compat=1.1", &name, "4M"]);
    // The abort leaves the dirty bit set and reference counts behind.
    let crash = ["-c", "write -P 9 64k 300k", "-c", "flush", "-c", "abort", &name];
    assert!(!std::process::Command::new("qemu-io").args(crash).output().unwrap().status.success());
    let file = in_memory(&path);
    let mut header = [0; 80];
    file.read_exact_at(&mut header, 0).unwrap();
    assert_eq!(header[79] & 1, 1, "dirty");
    let mut nodes = Nodes::new();
    let below = nodes.file(&file, true);
    let node = nodes.format("qcow2", &[("file", &below)], false, &[]).unwrap();
    assert!(node.info().dirty);
    assert_eq!(read(&node, 64 << 10, 300 << 10).unwrap(), vec![9; 300 << 10]);

    nodes.graph.set_writable(node.name(), true).unwrap();

    assert!(!node.info().dirty);
    assert_eq!(read(&node, 64 << 10, 300 << 10).unwrap(), vec![9; 300 << 10]);
    node.write(&[5; 200_000], 3 << 20, false).unwrap();
    node.write(&[6; 1000], 100_000, false).unwrap();
    assert_eq!(read(&node, 100_000, 1000).unwrap(), vec![6; 1000]);
    nodes.graph.set_writable(node.name(), false).unwrap();
    drop((node, nodes));
    to_disk(&file, &path);
    run("qemu-img", &["check", "-q", &name]);
    let check = ["-c", "read -P 9 64k 32k", "-c", "read -P 6 100000 1000", "-c", "read -P 5 3M 200000"];
    let said = run("qemu-io", &[&["-r"], &check[..], &[&name]].concat());
    assert!(!said.contains("failed"), "{said}");
}
