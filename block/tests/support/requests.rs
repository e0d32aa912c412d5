// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What every format that can be written must bear: random requests, and a host that refuses one operation.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use block::{Alarm, BlockNode, NodeAccess, OpenRequest, ZeroFlags, driver_named};
use rustix::io::Errno;

use super::recording::{Fault, Journal, recorded};
use super::{Nodes, Random, memory, read};

/// Writes, zeroes, discards, flushes and reopens an image 1,500 times, and holds every read against a vector of bytes: what a
/// guest must see at the end. `kind` is for messages.
pub fn random_requests(kind: &str, seed: u64, open: impl Fn() -> (Nodes, Arc<BlockNode>)) -> Vec<u8> {
    let (mut nodes, mut node) = open();
    let mut bytes = vec![0; node.len() as usize];
    let mut random = Random(seed);
    for _ in 0..1500 {
        let offset = random.below(bytes.len() as u64);
        let len = (1 + random.below(300_000)).min(bytes.len() as u64 - offset);
        let range = offset as usize..(offset + len) as usize;
        match random.below(10) {
            0..4 => {
                let fill = (random.next() >> 40) as u8;
                node.write(&vec![fill; range.len()], offset, false).unwrap();
                bytes[range].fill(fill);
            }
            4 => {
                let flags = ZeroFlags { may_unmap: random.below(2) == 0, fast_only: false };
                node.write_zeroes(offset, len, flags, false).unwrap();
                bytes[range].fill(0);
            }
            5 => {
                node.discard(offset, len).unwrap();
                let after = read(&node, offset, range.len()).unwrap();
                assert!(after.iter().zip(&bytes[range.clone()]).all(|(now, before)| now == before || *now == 0));
                bytes[range].copy_from_slice(&after);
            }
            6 if random.below(8) == 0 => {
                drop((node, nodes));
                (nodes, node) = open();
            }
            7 => node.flush().unwrap(),
            _ => assert!(read(&node, offset, range.len()).unwrap() == bytes[range], "{kind} at {offset}"),
        }
    }
    drop((node, nodes));
    bytes
}

/// Writes to an empty image whose host has no room at operation `refused`, and tries again. What the guest wrote and flushed, and
/// the image as a crash leaves it then.
pub fn with_a_full_disk(format: &str, kind: &str, image: &File, refused: u64) -> (Vec<u8>, File) {
    let mut content = vec![0; image.metadata().unwrap().len() as usize];
    image.read_exact_at(&mut content, 0).unwrap();
    let journal = Journal::silent();
    let (file, content) = recorded(&journal, 0, content);
    let entry = driver_named(format).unwrap();
    let driver = (entry.open)(OpenRequest {
        descriptor: None,
        files: Vec::new(),
        filename: String::new(),
        children: [("file", file)].into(),
        detached: [].into(),
        options: [].into(),
        writable: true,
        facts_only: false,
        node_name: "image".into(),
        alarm: Alarm::default(),
    });
    let access = NodeAccess { writable: true, unmap: true };
    let node = BlockNode::new("image", entry.name, "", access, driver.unwrap());
    journal.set_fault(Some(Fault { first: refused, count: 1, errno: Errno::NOSPC, reads: false }));
    let mut bytes = vec![0; node.len() as usize];
    let mut failures = 0;
    for (index, offset) in [3 << 20, 100, (2 << 20) - 2048, 4 << 20].into_iter().enumerate() {
        let data = vec![index as u8 + 1; 4096];
        while let Err(e) = node.write(&data, offset as u64, false).and_then(|()| node.flush()) {
            assert_eq!(e.raw_os_error(), Some(28), "{kind}, host operation {refused}: {e}");
            failures += 1;
            assert!(
                failures < 2,
                "{kind}, operation {refused}: one of the host's fails, and one of the guest's with it"
            );
        }
        bytes[offset..offset + 4096].copy_from_slice(&data);
    }
    assert_eq!(failures, 1, "{kind}, host operation {refused}");
    // As after a crash: nothing but what was flushed is on disk.
    std::mem::forget(node);
    let left = memory();
    left.write_all_at(&content.lock().unwrap(), 0).unwrap();
    (bytes, left)
}
