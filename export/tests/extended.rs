// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Extended headers and metadata contexts: 64-bit requests, and what a client can learn besides bytes.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

mod client;

use std::io::{self, Write};
use std::sync::Arc;

use block::{Ask, BlockNode, Driver, Mapping, NodeAccess, Prepared, Target, ZeroFlags};
use client::{
    Client, Fixture, READ, STATUS, TRIM, WRITE, ZEROES, context_query, extended_request, greet, is_closed, option,
    pattern, string,
};
use export::nbd::proto::{EINVAL, ENOSPC, cmd_flag, field, opt, rep};
use export::nbd::{Bitmap, DirtyRuns, Settings};

const MIB: u64 = 1 << 20;

/// A disk of 2^40 bytes that is nothing but zeroes.
struct Void;

impl Driver for Void {
    fn len(&self) -> u64 {
        1 << 40
    }

    fn map(&self, _: u64, len: u64, _: Ask) -> io::Result<Mapping<'_>> {
        Ok(Mapping::fixed(Target::Zero, len))
    }

    fn prepare_write(&self, _: u64, _: u64) -> io::Result<Prepared<'_>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Every other MiB is dirty, the first one is.
struct Stripes;

impl DirtyRuns for Stripes {
    fn run(&self, offset: u64, len: u64) -> io::Result<(u64, bool)> {
        Ok((len.min(MIB - offset % MIB), (offset / MIB).is_multiple_of(2)))
    }
}

/// One request of 64 bits and its reply's error and payload.
fn call(client: &mut Client, flags: u16, command: u16, offset: u64, len: u64, payload: &[u8]) -> (u32, Vec<u8>) {
    let header = extended_request(flags, command, 9, offset, len);
    client.socket.write_all(&[&header[..], payload].concat()).unwrap();
    let reply = client.reply(0);
    assert_eq!(reply.cookie, 9);
    (reply.error, reply.data)
}

/// Context id and extents of a block status payload with 64-bit numbers.
fn extents(payload: &[u8]) -> (u32, Vec<(u64, u64)>) {
    let count = u32::from_be_bytes(field(payload, 4)) as usize;
    assert_eq!(payload.len(), 8 + 16 * count);
    let number = |at| u64::from_be_bytes(field(payload, at));
    let extents = (0..count).map(|index| (number(8 + 16 * index), number(16 + 16 * index))).collect();
    (u32::from_be_bytes(field(payload, 0)), extents)
}

#[test]
fn requests_of_64_bits_reach_where_32_bits_do_not() {
    let fixture = Fixture::driver(Box::new(Void));
    let mut client = fixture.extended_client();
    for command in [TRIM, ZEROES] {
        assert_eq!(call(&mut client, 0, command, 0, 1 << 40, &[]), (0, vec![]));
    }
    let (error, payload) = call(&mut client, 0, STATUS, 512, (1 << 40) - 512, &[]);
    assert_eq!((error, extents(&payload)), (0, (1, vec![((1 << 40) - 512, 3)])));
    for (command, wanted) in [(ZEROES, ENOSPC), (TRIM, EINVAL), (STATUS, EINVAL)] {
        assert_eq!(call(&mut client, 0, command, 1, 1 << 40, &[]).0, wanted);
        assert_eq!(call(&mut client, 0, command, 1, u64::MAX, &[]).0, wanted);
    }
    assert_eq!(call(&mut client, 0, READ, 0, 1 << 33, &[]).0, EINVAL);
    assert_eq!(call(&mut client, 0, READ, 4096, 512, &[]).1[8..], [0; 512]);
}

#[test]
fn a_payload_that_no_request_brings_is_skipped_and_refused() {
    let fixture = Fixture::raw(MIB, true);
    let mut client = fixture.extended_client();
    for command in [READ, TRIM, ZEROES, 99] {
        let (error, _) = call(&mut client, cmd_flag::PAYLOAD_LEN, command, 0, 5, b"12345");
        assert_eq!(error, EINVAL, "command {command}");
    }
    let long = vec![1; (32 << 20) + 1];
    assert_eq!(call(&mut client, cmd_flag::PAYLOAD_LEN, WRITE, 0, long.len() as u64, &long).0, EINVAL);
    // A client that forgets the flag meant it, and the bytes follow all the same.
    assert_eq!(call(&mut client, 0, WRITE, 512, 4, b"abcd").0, 0);
    assert_eq!(call(&mut client, 0, READ, 512, 4, &[]).1[8..], *b"abcd");
    let endless = extended_request(cmd_flag::PAYLOAD_LEN, WRITE, 1, 0, 1 << 62);
    client.socket.write_all(&endless).unwrap();
    assert!(is_closed(&mut client.socket), "a payload of 2^62 bytes is no request");
}

#[test]
fn a_compact_request_after_extended_headers_ends_the_session() {
    let fixture = Fixture::raw(MIB, true);
    let mut client = fixture.extended_client();
    client.socket.write_all(&[client::request(0, READ, 1, 0, 512), vec![0; 4]].concat()).unwrap();
    assert!(is_closed(&mut client.socket));
}

#[test]
fn options_are_negotiated_in_the_order_that_the_specification_allows() {
    let fixture = Fixture::raw(MIB, false);
    let mut socket = fixture.connect();
    greet(&mut socket);
    let query = context_query("disk", &["base:allocation"]);
    assert_eq!(option(&mut socket, opt::SET_META_CONTEXT, &query)[0].0, rep::ERR_INVALID);
    assert_eq!(option(&mut socket, opt::EXTENDED_HEADERS, &[0])[0].0, rep::ERR_INVALID);
    assert_eq!(option(&mut socket, opt::STRUCTURED_REPLY, &[])[0].0, rep::ACK);
    assert_eq!(option(&mut socket, opt::EXTENDED_HEADERS, &[])[0].0, rep::ACK);
    assert_eq!(option(&mut socket, opt::STRUCTURED_REPLY, &[])[0].0, rep::ERR_EXT_HEADER_REQD);
    socket.write_all(&[client::option_header(opt::EXPORT_NAME, 4), b"disk".to_vec()].concat()).unwrap();
    assert!(is_closed(&mut socket), "the old way in has no extended headers");
}

/// A client of an export with every kind of context, which has chosen those of `queries`.
fn with_contexts(fixture: &Fixture, queries: &[&str], style: u32) -> (Client, Vec<String>) {
    let mut socket = fixture.connect();
    greet(&mut socket);
    assert_eq!(option(&mut socket, style, &[])[0].0, rep::ACK);
    let names = |replies: Vec<(u32, Vec<u8>)>| -> Vec<String> {
        replies[..replies.len() - 1].iter().map(|(_, data)| String::from_utf8(data[4..].to_vec()).unwrap()).collect()
    };
    let listed = names(option(&mut socket, opt::LIST_META_CONTEXT, &context_query("disk", &["qemu:"])));
    let chosen = names(option(&mut socket, opt::SET_META_CONTEXT, &context_query("disk", queries)));
    assert_eq!(chosen.len(), queries.len());
    (Client::go(socket, style == opt::EXTENDED_HEADERS), listed)
}

fn rich_fixture() -> Fixture {
    let fixture = Fixture::raw(4 * MIB, true);
    let node = fixture.node();
    fixture.server.remove("disk");
    let bitmaps = vec![Bitmap { name: "b0".into(), runs: Arc::new(Stripes) }];
    fixture.server.add(Settings { allocation_depth: true, bitmaps, ..Settings::new("disk", node) }).unwrap();
    fixture
}

#[test]
fn bitmaps_and_depths_are_told_to_those_who_ask() {
    let fixture = rich_fixture();
    let (mut client, listed) =
        with_contexts(&fixture, &["qemu:dirty-bitmap:b0", "qemu:allocation-depth"], opt::EXTENDED_HEADERS);
    assert_eq!(listed, ["qemu:allocation-depth", "qemu:dirty-bitmap:b0"]);
    client.socket.write_all(&extended_request(0, STATUS, 9, MIB / 2, 2 * MIB)).unwrap();
    let (depth, dirty) = (client.reply(0), client.reply(0));
    assert_eq!(extents(&depth.data), (2, vec![(2 * MIB, 1)]));
    assert_eq!(extents(&dirty.data), (3, vec![(MIB / 2, 1), (MIB, 0), (MIB / 2, 1)]));
}

#[test]
fn a_status_request_can_name_the_contexts_that_it_wants() {
    let fixture = rich_fixture();
    let (mut client, _) = with_contexts(&fixture, &["base:allocation", "qemu:dirty-bitmap:b0"], opt::EXTENDED_HEADERS);
    let payload = |len: u64, ids: &[u32]| {
        let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_be_bytes()).collect();
        [&len.to_be_bytes()[..], &ids].concat()
    };
    let ask = |client: &mut Client, payload: &[u8]| {
        call(client, cmd_flag::PAYLOAD_LEN, STATUS, 0, payload.len() as u64, payload)
    };
    let (error, told) = ask(&mut client, &payload(MIB, &[3]));
    assert_eq!((error, extents(&told)), (0, (3, vec![(MIB, 1)])));
    for wrong in
        [payload(MIB, &[]), payload(MIB, &[2]), payload(0, &[3]), payload(5 * MIB, &[3]), vec![0; 7], vec![0; 13]]
    {
        assert_eq!(ask(&mut client, &wrong).0, EINVAL, "{wrong:?}");
    }
    assert_eq!(ask(&mut client, &vec![0; 8 + 4 * 1025]).0, EINVAL);
    assert_eq!(call(&mut client, 0, READ, 0, 512, &[]).1[8..], pattern(0, 512));
}

#[test]
fn contexts_hold_for_the_export_that_they_were_set_for_alone() {
    let fixture = rich_fixture();
    let node = Arc::new(BlockNode::new("void", "test", "", NodeAccess::default(), Box::new(Void)));
    fixture.server.add(Settings::new("void", node)).unwrap();
    let mut socket = fixture.connect();
    greet(&mut socket);
    option(&mut socket, opt::STRUCTURED_REPLY, &[]);
    assert_eq!(option(&mut socket, opt::SET_META_CONTEXT, &context_query("disk", &["base:allocation"])).len(), 2);
    assert_eq!(option(&mut socket, opt::GO, &[string("void"), vec![0, 0]].concat()).last().unwrap().0, rep::ACK);
    let mut client = Client { socket, size: 1 << 40, flags: 0, extended: false };
    assert_eq!(client.call(0, STATUS, 0, 512, &[]).error, EINVAL);
}

#[test]
fn a_writethrough_export_flushes_every_change_before_the_answer() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    struct Counting(Arc<AtomicUsize>);
    impl Driver for Counting {
        fn len(&self) -> u64 {
            MIB
        }
        fn map(&self, _: u64, len: u64, _: Ask) -> io::Result<Mapping<'_>> {
            Ok(Mapping::fixed(Target::Zero, len))
        }
        fn prepare_write(&self, _: u64, len: u64) -> io::Result<Prepared<'_>> {
            Ok(Prepared::in_place(Target::Computed, len))
        }
        fn write_computed(&self, _: &[u8], _: u64) -> io::Result<()> {
            Ok(())
        }
        fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> io::Result<()> {
            Ok(())
        }
        fn discard(&self, _: u64, _: u64) -> io::Result<()> {
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }
    let flushes = Arc::new(AtomicUsize::new(0));
    let fixture = Fixture::driver(Box::new(Counting(Arc::clone(&flushes))));
    let node = fixture.node();
    fixture.server.remove("disk");
    fixture.server.add(Settings { writable: true, writethrough: true, ..Settings::new("disk", node) }).unwrap();
    let mut client = fixture.client();
    for (index, (command, payload)) in [(WRITE, &[1; 512][..]), (ZEROES, &[]), (TRIM, &[])].into_iter().enumerate() {
        assert_eq!(client.call(0, command, 0, 512, payload).error, 0);
        assert_eq!(flushes.load(Ordering::SeqCst), index + 1);
    }
}
