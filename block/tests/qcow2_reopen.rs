// SPDX-License-Identifier: Apache-2.0 OR MIT
//! qcow2 made read-only and writable again while it is in use.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use std::os::unix::fs::FileExt;

use block::Preallocation;
use support::image::{KINDS, make};
use support::walk::walk;
use support::{Nodes, judge, memory, read};

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
