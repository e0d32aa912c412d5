// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Negotiation: what honest clients get, and what hostile ones do not.
#![allow(missing_docs, clippy::unwrap_used)]

mod client;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use client::{Client, Fixture, READ, greet, is_closed, option, option_header, option_replies, pattern, string};
use export::Workers;
use export::nbd::proto::{self, flag, opt, rep};
use export::nbd::{Admission, Limits, Server, Settings};

/// The server goes on for others.
fn still_serves(fixture: &Fixture) {
    assert_eq!(fixture.client().call(0, READ, 512, 512, &[]).data, pattern(512, 512));
}

#[test]
fn go_tells_size_flags_and_block_sizes() {
    let fixture = Fixture::raw(1 << 20, true);
    let client = fixture.client();
    assert_eq!(client.size, 1 << 20);
    let writable = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::SEND_TRIM | flag::SEND_WRITE_ZEROES;
    assert_eq!(client.flags, writable | flag::CAN_MULTI_CONN | flag::SEND_CACHE | flag::SEND_FAST_ZERO);
    let read_only = Fixture::raw(1 << 20, false).client().flags;
    assert_eq!(read_only & (flag::READ_ONLY | flag::SEND_TRIM | flag::SEND_WRITE_ZEROES), flag::READ_ONLY);
}

#[test]
fn export_name_is_answered_with_and_without_padding() {
    let fixture = Fixture::raw(1 << 20, false);
    for (client_flags, answer_len) in [(3u32, 10), (1, 134)] {
        let mut socket = fixture.connect();
        let mut greeting = [0; 18];
        socket.read_exact(&mut greeting).unwrap();
        socket.write_all(&client_flags.to_be_bytes()).unwrap();
        socket.write_all(&[&option_header(opt::EXPORT_NAME, 4)[..], b"disk"].concat()).unwrap();
        let mut answer = vec![0; answer_len];
        socket.read_exact(&mut answer).unwrap();
        assert_eq!(u64::from_be_bytes(proto::field(&answer, 0)), 1 << 20);
        let mut client = Client { socket, size: 0, flags: 0, extended: false };
        assert_eq!(client.call(0, READ, 0, 512, &[]).data, pattern(0, 512));
    }
}

#[test]
fn list_names_every_export_with_its_description() {
    let fixture = Fixture::raw(512, false);
    let mut socket = fixture.connect();
    greet(&mut socket);
    let listed = [string("disk"), b"a disk".to_vec()].concat();
    assert_eq!(option(&mut socket, opt::LIST, &[]), [(rep::SERVER, listed), (rep::ACK, vec![])]);
}

#[test]
fn case_65_unknown_exports_long_names_and_malformed_data_are_refused_and_negotiation_goes_on() {
    let fixture = Fixture::raw(1 << 20, false);
    let mut socket = fixture.connect();
    greet(&mut socket);
    let go = |name: &str| [string(name), vec![0, 0]].concat();
    let cases: [(u32, Vec<u8>, u32); 9] = [
        (opt::GO, go("other"), rep::ERR_UNKNOWN),
        (opt::GO, go("../disk"), rep::ERR_UNKNOWN),
        (opt::GO, go(&"n".repeat(4097)), rep::ERR_INVALID),
        (opt::GO, vec![0xff; 6], rep::ERR_INVALID),
        (opt::INFO, vec![], rep::ERR_INVALID),
        (opt::LIST, vec![1], rep::ERR_INVALID),
        (opt::STARTTLS, vec![], rep::ERR_POLICY),
        (opt::SET_META_CONTEXT, [string("disk"), vec![0; 4]].concat(), rep::ERR_INVALID),
        (4_000_000_000, vec![1, 2, 3], rep::ERR_UNSUP),
    ];
    for (number, payload, wanted) in cases {
        let replies = option(&mut socket, number, &payload);
        assert_eq!(replies.last().unwrap().0, wanted, "option {number}");
    }
    assert_eq!(option(&mut socket, opt::GO, &go("disk")).last().unwrap().0, rep::ACK);
}

#[test]
fn case_65_an_option_over_the_limit_is_skipped_and_an_absurd_one_hung_up_on() {
    let fixture = Fixture::raw(1 << 20, false);
    let mut socket = fixture.connect();
    greet(&mut socket);
    socket.write_all(&option_header(opt::GO, 1 << 20)).unwrap();
    socket.write_all(&vec![7; 1 << 20]).unwrap();
    assert_eq!(option_replies(&mut socket)[0].0, rep::ERR_TOO_BIG);
    socket.write_all(&option_header(opt::GO, u32::MAX)).unwrap();
    assert!(is_closed(&mut socket));
    still_serves(&fixture);
}

#[test]
fn bad_client_flags_and_bad_magic_are_hung_up_on() {
    let fixture = Fixture::raw(1 << 20, false);
    let mut socket = fixture.connect();
    socket.write_all(&u32::MAX.to_be_bytes()).unwrap();
    socket.read_exact(&mut [0; 18]).unwrap();
    assert!(is_closed(&mut socket));
    let mut socket = fixture.connect();
    greet(&mut socket);
    socket.write_all(&[0xee; 16]).unwrap();
    assert!(is_closed(&mut socket));
    still_serves(&fixture);
}

#[test]
fn abort_is_acknowledged_and_ends_the_connection() {
    let fixture = Fixture::raw(512, false);
    let mut socket = fixture.connect();
    greet(&mut socket);
    assert_eq!(option(&mut socket, opt::ABORT, &[]), [(rep::ACK, vec![])]);
    assert!(is_closed(&mut socket));
}

#[test]
fn case_66_a_client_that_never_negotiates_is_hung_up_on_at_the_time_limit() {
    let limits = Limits { handshake: Duration::from_millis(50), ..Limits::default() };
    let fixture = Fixture::with_limits(512, false, limits);
    let mut socket = fixture.connect();
    socket.read_exact(&mut [0; 18]).unwrap();
    // Ends when the server hangs up, whenever that is; without the limit it would never end.
    assert!(is_closed(&mut socket));
}

#[test]
fn case_66_clients_over_the_limit_wait_until_one_leaves() {
    let limits = Limits { connections: 2, ..Limits::default() };
    let fixture = Fixture::with_limits(1 << 20, false, limits);
    let (first, second) = (fixture.client(), fixture.client());
    let third = fixture.connect();
    third.set_nonblocking(true).unwrap();
    assert_eq!((&third).read(&mut [0; 1]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    drop(first);
    third.set_nonblocking(false).unwrap();
    assert_eq!(Client::negotiate(third, None).call(0, READ, 0, 512, &[]).error, 0);
    drop(second);
}

#[test]
fn clients_wait_for_the_first_export_where_that_is_asked() {
    let fixture = Fixture::raw(1 << 20, false);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nbd");
    let listener = UnixListener::bind(&path).unwrap();
    let limits = Limits { admission: Admission::FirstExport, ..Limits::default() };
    let server = Server::start(listener.into(), limits, None, Workers::new(), || ()).unwrap();
    let early = UnixStream::connect(&path).unwrap();
    early.set_nonblocking(true).unwrap();
    assert_eq!((&early).read(&mut [0; 1]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    early.set_nonblocking(false).unwrap();
    server.add(Settings::new("disk", fixture.node())).unwrap();
    assert_eq!(Client::negotiate(early, None).call(0, READ, 0, 512, &[]).error, 0);
}

#[test]
fn block_status_contexts_are_listed_and_set_for_one_export() {
    let fixture = Fixture::raw(512, false);
    let mut socket = fixture.connect();
    greet(&mut socket);
    option(&mut socket, opt::STRUCTURED_REPLY, &[]);
    let query = |queries: &[&str]| {
        let count = u32::try_from(queries.len()).unwrap().to_be_bytes().to_vec();
        [string("disk"), count, queries.iter().flat_map(|q| string(q)).collect()].concat()
    };
    let context = |id: u32| [&id.to_be_bytes()[..], b"base:allocation"].concat();
    let ack = (rep::ACK, vec![]);
    for queries in [&[][..], &["base:"], &["base:allocation", "x:y"]] {
        let replies = option(&mut socket, opt::LIST_META_CONTEXT, &query(queries));
        assert_eq!(replies, [(rep::META_CONTEXT, context(0)), ack.clone()]);
    }
    assert_eq!(option(&mut socket, opt::SET_META_CONTEXT, &query(&["x:y"])), std::slice::from_ref(&ack));
    let replies = option(&mut socket, opt::SET_META_CONTEXT, &query(&["base:allocation"]));
    assert_eq!(replies, [(rep::META_CONTEXT, context(1)), ack]);
    let lying = [string("disk"), u32::MAX.to_be_bytes().to_vec()].concat();
    assert_eq!(option(&mut socket, opt::SET_META_CONTEXT, &lying)[0].0, rep::ERR_INVALID);
}
