// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A kernel that may ask anything: what it is answered, and that the file stays sound.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::File as HostFile;
use std::sync::Arc;

use block::stats::Kind;
use block::{BlockNode, Graph, Host, NodeAccess, NodeSpec};
use export::fuse::{File, MAX_WRITE, REPLY_ROOM, Request, Settings};

const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const INIT: u32 = 26;
const LSEEK: u32 = 46;
const SIZE: u64 = 1 << 20;

fn node() -> Arc<BlockNode> {
    let memory = HostFile::from(rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    memory.set_len(SIZE).unwrap();
    let spec = NodeSpec {
        name: Some("n".into()),
        driver: "file",
        access: NodeAccess { writable: true, unmap: true },
        host: Some(Host::fixed(memory)),
        filename: "/dev/fdset/0".into(),
        children: [].into(),
        detached: [].into(),
        options: [].into(),
    };
    Graph::new().add(spec).unwrap()
}

struct Fixture {
    file: File,
    room: Vec<u8>,
}

impl Fixture {
    fn new(writable: bool) -> Fixture {
        let settings = Settings { node: node(), writable, growable: false, shared: false, uid: 0, gid: 0 };
        Fixture { file: File::new(settings), room: vec![0; REPLY_ROOM] }
    }

    /// The reply to a request: the error number, and what follows the header.
    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Option<(i32, Vec<u8>)> {
        let mut bytes = u32::try_from(40 + body.len()).unwrap().to_ne_bytes().to_vec();
        bytes.extend(opcode.to_ne_bytes());
        bytes.extend([5u64.to_ne_bytes(), node.to_ne_bytes()].concat());
        bytes.extend([0; 16]);
        bytes.extend(body);
        self.ask_raw(&bytes)
    }

    fn ask_raw(&mut self, bytes: &[u8]) -> Option<(i32, Vec<u8>)> {
        let request = Request::parse(bytes)?;
        let len = self.file.answer(&request, &mut self.room)?;
        let reply = &self.room[..len];
        assert_eq!(u32::from_ne_bytes(reply[0..4].try_into().unwrap()) as usize, len);
        assert_eq!(reply[8..16], 5u64.to_ne_bytes());
        Some((-i32::from_ne_bytes(reply[4..8].try_into().unwrap()), reply[16..].to_vec()))
    }
}

/// `fuse_read_in` or, before its data, `fuse_write_in`.
fn range(offset: u64, size: u32) -> Vec<u8> {
    let mut body = [0u64.to_ne_bytes(), offset.to_ne_bytes()].concat();
    body.extend(size.to_ne_bytes());
    body.extend([0; 20]);
    body
}

#[test]
fn a_flood_of_forgets_and_interrupts_is_not_answered_and_the_file_stays() {
    let mut fixture = Fixture::new(true);
    for round in 0..100_000u64 {
        // FORGET of more lookups than there can be; BATCH_FORGET of 2^32-1 files that are not there; INTERRUPT of anything.
        assert_eq!(fixture.ask(2, 1, &u64::MAX.to_ne_bytes()), None);
        assert_eq!(fixture.ask(42, 0, &u64::MAX.to_ne_bytes()), None);
        assert_eq!(fixture.ask(36, 0, &round.to_ne_bytes()), None);
    }
    let (error, attributes) = fixture.ask(GETATTR, 1, &[0; 16]).unwrap();
    assert_eq!((error, attributes.len()), (0, 104));
    assert_eq!(attributes[24..32], SIZE.to_ne_bytes());
}

#[test]
fn ranges_out_of_all_bounds_are_errors_or_short() {
    let mut fixture = Fixture::new(true);
    assert_eq!(fixture.ask(READ, 1, &range(0, u32::MAX)), Some((22, vec![])));
    assert_eq!(fixture.ask(READ, 1, &range(u64::MAX, 4096)), Some((0, vec![])), "past the end");
    assert_eq!(fixture.ask(READ, 1, &range(SIZE - 1, 4096)).unwrap().1.len(), 1);
    assert_eq!(fixture.ask(READ, 1, &range(0, u32::try_from(MAX_WRITE).unwrap())).unwrap().1.len(), MAX_WRITE);
    let write = |offset, data: &[u8]| [range(offset, u32::try_from(data.len()).unwrap()), data.to_vec()].concat();
    assert_eq!(fixture.ask(WRITE, 1, &write(u64::MAX, b"ab")), Some((27, vec![])));
    assert_eq!(fixture.ask(WRITE, 1, &write(SIZE, b"ab")), Some((28, vec![])));
    assert_eq!(fixture.ask(WRITE, 1, &write(SIZE - 1, b"ab")), Some((0, [1u32.to_ne_bytes(), [0; 4]].concat())));
    assert_eq!(fixture.ask(WRITE, 1, &range(0, 4096)), Some((5, vec![])), "no data");
    let seek = |offset: u64, whence: u32| {
        let mut body = [0u64.to_ne_bytes(), offset.to_ne_bytes()].concat();
        body.extend([whence.to_ne_bytes(), [0; 4]].concat());
        body
    };
    assert_eq!(fixture.ask(LSEEK, 1, &seek(u64::MAX, 3)), Some((6, vec![])));
    assert_eq!(fixture.ask(LSEEK, 1, &seek(0, 9)), Some((22, vec![])));
}

#[test]
fn what_is_no_request_or_not_for_the_one_file_is_refused() {
    let mut fixture = Fixture::new(false);
    assert_eq!(fixture.ask(GETATTR, 2, &[0; 16]), Some((116, vec![])), "another file");
    assert_eq!(fixture.ask(1, 1, b"name\0"), Some((38, vec![])), "a lookup in a file");
    assert_eq!(fixture.ask(999, 1, &[]), Some((38, vec![])));
    assert_eq!(fixture.ask(OPEN, 1, &[]), Some((5, vec![])), "cut short");
    assert_eq!(fixture.ask(OPEN, 1, &1u64.to_ne_bytes()), Some((30, vec![])), "for writing, read-only");
    assert_eq!(fixture.ask(WRITE, 1, &[range(0, 1), vec![1]].concat()), Some((9, vec![])));
    let old: Vec<u8> = [7u32, 12, 0, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
    assert_eq!(fixture.ask(INIT, 0, &old), Some((71, vec![])), "a kernel that is too old");
    assert_eq!(fixture.ask_raw(&[0; 39]), None);
}

#[test]
fn requests_are_counted_for_the_file_and_for_its_node() {
    let mut fixture = Fixture::new(true);
    fixture.ask(READ, 1, &range(0, 4096)).unwrap();
    fixture.ask(READ, 1, &range(4096, 4096)).unwrap();
    fixture.ask(WRITE, 1, &[range(SIZE, 1), vec![1]].concat()).unwrap();
    for stats in [fixture.file.stats(), fixture.file.node().stats()] {
        let (read, write) = (stats.count(Kind::Read), stats.count(Kind::Write));
        assert_eq!((read.operations, read.bytes, read.failed), (2, 8192, 0));
        assert_eq!((write.operations, write.bytes, write.failed), (0, 0, 1));
        assert_eq!(read.latencies.iter().sum::<u64>(), 2);
    }
}
