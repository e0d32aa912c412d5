// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What every format that is written must do, whatever it is: one suite for all of them.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use block::{BlockNode, CreateRequest, ExtentKind, OptionValue, ZeroFlags};
use rustix::io::Errno;
use support::requests::{random_requests, with_a_full_disk};
use support::{Nodes, memory, read};

/// Format, options, bytes of the disk.
type Kind = (&'static str, &'static [(&'static str, &'static str)], u64);

const KINDS: &[Kind] = &[
    ("qcow2", &[], (6 << 20) + 512),
    ("qcow2", &[("compat", "v2")], 6 << 20),
    ("raw", &[], (6 << 20) + 512),
    ("vdi", &[], (6 << 20) + 512),
    ("vdi", &[("static", "on")], 6 << 20),
    ("vmdk", &[], (6 << 20) + 512),
    ("vmdk", &[("zeroed_grain", "on")], 6 << 20),
    ("vpc", &[], 9 << 20),
    ("vpc", &[("force_size", "on")], (9 << 20) + 512),
    ("vpc", &[("subformat", "fixed"), ("force_size", "on")], (6 << 20) + 512),
];

fn make(&(format, options, size): &Kind) -> File {
    let image = memory();
    let mut nodes = Nodes::new();
    let name = nodes.file(&image, true);
    let value = |text: &str| if text == "on" { OptionValue::Bool(true) } else { OptionValue::Str(text.into()) };
    let request = CreateRequest {
        file: nodes.graph.get(&name).unwrap().clone(),
        data_file: None,
        extents: Vec::new(),
        parent_cid: None,
        size,
        options: options.iter().map(|(name, text)| (*name, value(text))).collect(),
    };
    block::create(format, &request).unwrap();
    image
}

fn open(kind: &Kind, image: &File, writable: bool) -> (Nodes, Arc<BlockNode>) {
    let mut nodes = Nodes::new();
    let file = nodes.file(image, writable);
    let node = nodes.format(kind.0, &[("file", &file)], writable, &[]).unwrap();
    (nodes, node)
}

#[test]
fn an_empty_image_reads_as_zeroes_and_takes_no_room() {
    for kind in KINDS {
        let image = make(kind);
        let (_nodes, node) = open(kind, &image, false);
        assert!(node.len() >= kind.2 && node.len() < kind.2 + (1 << 20), "{kind:?}");
        assert!(read(&node, 0, node.len() as usize).unwrap().iter().all(|&byte| byte == 0), "{kind:?}");
        let mut at = 0;
        while at < node.len() {
            let extent = node.status(at, node.len() - at).unwrap();
            // In a static VDI all blocks are there; a fixed VHD's last sectors share a block of the host with its footer.
            let may_be_data =
                kind.1 == [("static", "on")] || kind.1.contains(&("subformat", "fixed")) && at + 4096 > node.len();
            assert!(extent.kind == ExtentKind::Zero || may_be_data, "{kind:?} at {at}");
            at += extent.len;
        }
    }
}

#[test]
fn unaligned_ends_and_whole_clusters_are_there_after_a_reopen() {
    for kind in KINDS {
        let image = make(kind);
        let (nodes, node) = open(kind, &image, true);
        let len = node.len();
        let cluster = node.info().cluster_size.unwrap_or(65536);
        let mut expected = vec![0; len as usize];
        for (index, (offset, count)) in [
            (0, 1),
            (511, 2),
            (cluster - 3, 7),
            (cluster, cluster),
            (len - 1, 1),
            (len - 700, 600),
            (len / 2 / cluster * cluster + 1, cluster),
        ]
        .into_iter()
        .enumerate()
        {
            let range = offset as usize..(offset + count).min(len) as usize;
            node.write(&vec![index as u8 + 1; range.len()], offset, false).unwrap();
            expected[range].fill(index as u8 + 1);
        }
        assert!(read(&node, 0, len as usize).unwrap() == expected, "{kind:?}");
        drop((node, nodes));
        let (_nodes, node) = open(kind, &image, false);
        assert!(read(&node, 0, len as usize).unwrap() == expected, "{kind:?}");
        assert_eq!(
            node.write(&[1], 0, false).unwrap_err().raw_os_error(),
            Some(Errno::PERM.raw_os_error()),
            "{kind:?}"
        );
    }
}

#[test]
fn nothing_lies_behind_the_end() {
    for kind in KINDS {
        let image = make(kind);
        let (_nodes, node) = open(kind, &image, true);
        let len = node.len();
        for offset in [len, len - 1, u64::MAX - 1, u64::MAX] {
            let errno = |e: std::io::Error| e.raw_os_error().unwrap();
            assert_eq!(errno(read(&node, offset, 2).unwrap_err()), 22, "{kind:?} at {offset}");
            assert_eq!(errno(node.write(&[1; 2], offset, false).unwrap_err()), 28, "{kind:?} at {offset}");
            assert_eq!(errno(node.write_zeroes(offset, 2, ZeroFlags::default(), false).unwrap_err()), 28, "{kind:?}");
            assert!(node.discard(offset, 2).is_err() && node.status(offset, 2).is_err(), "{kind:?} at {offset}");
        }
        assert_eq!(read(&node, len - 1, 1).unwrap(), [0], "{kind:?}");
        assert_eq!(node.len(), len, "{kind:?}");
    }
}

#[test]
fn two_writers_of_one_cluster_lose_nothing_of_each_other() {
    for kind in KINDS {
        let image = make(kind);
        let (nodes, node) = open(kind, &image, true);
        let len = node.len() as usize;
        // Every second sector is one writer's; both begin in each cluster at the same time.
        std::thread::scope(|scope| {
            for writer in 0..2u8 {
                let node = &node;
                scope.spawn(move || {
                    for sector in (usize::from(writer)..len / 512).step_by(34) {
                        node.write(&[writer + 1; 512], sector as u64 * 512, false).unwrap();
                        if sector % 1024 < 34 {
                            node.flush().unwrap();
                        }
                    }
                });
            }
        });
        let mut expected = vec![0; len];
        for writer in 0..2 {
            for sector in (writer..len / 512).step_by(34) {
                expected[sector * 512..][..512].fill(writer as u8 + 1);
            }
        }
        drop((node, nodes));
        let (_nodes, node) = open(kind, &image, false);
        assert!(read(&node, 0, len).unwrap() == expected, "{kind:?}");
        if block::format_named(kind.0).unwrap().check.is_some() {
            let mut nodes = Nodes::new();
            let file = nodes.file(&image, false);
            let file = nodes.graph.get(&file).unwrap();
            let report = block::check(file, kind.0, block::Repair::Nothing, &mut |_| ()).unwrap();
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{kind:?}");
        }
    }
}

#[test]
fn a_flush_cuts_off_nothing_of_a_block_that_begins_meanwhile() {
    for kind in KINDS {
        let image = make(kind);
        let (nodes, node) = open(kind, &image, true);
        let places: Vec<u64> = (0..node.len() / 65536).map(|cluster| cluster * 65536).collect();
        let written = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // The last sector of what a cluster may be: nothing else of it makes the file longer.
                places.iter().for_each(|at| node.write(&[7; 512], at + (127 * 512), false).unwrap());
                written.store(true, std::sync::atomic::Ordering::Release);
            });
            while !written.load(std::sync::atomic::Ordering::Acquire) {
                node.flush().unwrap();
            }
        });
        drop((node, nodes));
        let (_nodes, node) = open(kind, &image, false);
        for at in places {
            assert_eq!(read(&node, at + (127 * 512), 512).unwrap(), [7; 512], "{kind:?} at {at}");
        }
    }
}

#[test]
fn random_requests_leave_what_a_vector_of_bytes_has_in_every_format() {
    for kind in KINDS {
        let image = make(kind);
        let bytes = random_requests(&format!("{kind:?}"), 0xabcd ^ kind.2, || open(kind, &image, true));
        let (_nodes, node) = open(kind, &image, false);
        assert!(read(&node, 0, bytes.len()).unwrap() == bytes, "{kind:?}");
    }
}

#[test]
fn an_operation_of_the_host_that_fails_costs_nothing_that_is_flushed_later() {
    for kind in KINDS.iter().filter(|kind| ["vdi", "vmdk", "vpc"].contains(&kind.0)) {
        let image = make(kind);
        // As many as the requests of the suite take; the last ones are those of the last flush.
        for refused in 0..[6, 3][usize::from(kind.1.first() == Some(&("subformat", "fixed")))] {
            let (bytes, left) = with_a_full_disk(kind.0, &format!("{kind:?}"), &image, refused);
            let mut image = vec![0; left.metadata().unwrap().len() as usize];
            left.read_exact_at(&mut image, 0).unwrap();
            let (_nodes, node) = open(kind, &left, false);
            assert!(read(&node, 0, bytes.len()).unwrap() == bytes, "{kind:?}, operation {refused}");
        }
    }
}
