// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Transmission: bytes, order, errors, and clients that do not play along.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

mod client;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex};

use block::{Ask, Detail, Driver, Mapping, Prepared, Target, Wait, ZeroFlags};
use client::{CACHE, DISCONNECT, FLUSH, Fixture, READ, STATUS, TRIM, WRITE, ZEROES, is_closed, pattern, request};
use export::nbd::proto::{EINVAL, ENOSPC, EPERM, cmd_flag};

const MIB: u64 = 1 << 20;

#[test]
fn reads_of_every_size_return_the_bytes() {
    let fixture = Fixture::raw(34 * MIB, false);
    for mut client in [fixture.client(), fixture.structured_client(), fixture.extended_client()] {
        for (offset, len) in [(0, 1), (511, 2), (4096, 4096), (5, 256 << 10), (MIB, 2 << 20), (MIB, 32 << 20)] {
            let reply = client.call(0, READ, offset, len, &[]);
            assert_eq!(reply.error, 0);
            let data = if client.flags & 0x80 == 0 { &reply.data[..] } else { &reply.data[8..] };
            assert!(data == pattern(offset, len as usize), "{len} bytes at {offset}");
        }
    }
}

#[test]
fn writes_of_every_size_arrive() {
    let fixture = Fixture::raw(34 * MIB, true);
    let mut client = fixture.client();
    for (offset, len) in [(0, 1), (511, 2), (4096, 4096), (5, 256 << 10), (MIB, 3 << 20), (MIB + 7, 32 << 20)] {
        let bytes: Vec<u8> = pattern(offset, len as usize).iter().map(|b| !b).collect();
        for flags in [0, cmd_flag::FUA] {
            assert_eq!(client.call(flags, WRITE, offset, len, &bytes).error, 0);
        }
        let mut there = vec![0; len as usize];
        fixture.file.read_exact_at(&mut there, offset).unwrap();
        assert!(there == bytes, "{len} bytes at {offset}");
    }
}

#[test]
fn a_batch_of_requests_in_one_write_is_answered_whole() {
    let fixture = Fixture::raw(MIB, true);
    let mut client = fixture.client();
    let mut batch = Vec::new();
    for cookie in 0..256 {
        batch.extend(request(0, if cookie % 3 == 0 { FLUSH } else { READ }, cookie, cookie * 4096, 4096));
    }
    let mut socket = client.socket.try_clone().unwrap();
    let sender = std::thread::spawn(move || socket.write_all(&batch).unwrap());
    let mut answered = BTreeMap::new();
    for _ in 0..256 {
        // The reply's kind decides how much follows, and only the cookie tells the kind.
        let mut head = [0; 16];
        io::Read::read_exact(&mut client.socket, &mut head).unwrap();
        let cookie = u64::from_be_bytes(head[8..].try_into().unwrap());
        let mut data = vec![0; if cookie % 3 == 0 { 0 } else { 4096 }];
        io::Read::read_exact(&mut client.socket, &mut data).unwrap();
        if cookie % 3 != 0 {
            assert!(data == pattern(cookie * 4096, 4096));
        }
        assert!(answered.insert(cookie, ()).is_none());
    }
    sender.join().unwrap();
}

#[test]
fn case_67_out_of_range_and_forbidden_requests_get_exact_errors_and_the_session_goes_on() {
    let fixture = Fixture::raw(MIB, true);
    let read_only = Fixture::raw(MIB, false);
    let (mut client, mut reader) = (fixture.structured_client(), read_only.client());
    let end = MIB - 512;
    for (flags, command, offset, len, wanted) in [
        (0, READ, end, 513, EINVAL),
        (0, READ, u64::MAX, 1, EINVAL),
        (0, READ, 0, u32::MAX, EINVAL),
        (0, ZEROES, end, 513, ENOSPC),
        (0, ZEROES, u64::MAX - 1, u32::MAX, ENOSPC),
        (0, TRIM, end, 513, EINVAL),
        (0, CACHE, end, 513, EINVAL),
        (0, STATUS, 0, 0, EINVAL),
        (0, STATUS, MIB, 1, EINVAL),
        (1 << 15, READ, 0, 512, EINVAL),
        (cmd_flag::NO_HOLE, TRIM, 0, 512, EINVAL),
        (0, 99, 0, 512, EINVAL),
    ] {
        assert_eq!(client.call(flags, command, offset, len, &[]).error, wanted, "command {command} at {offset}");
    }
    assert_eq!(client.call(0, WRITE, end, 1024, &[1; 1024]).error, ENOSPC);
    assert_eq!(client.call(0, WRITE, 0, (32 << 20) + 1, &vec![1; (32 << 20) + 1]).error, EINVAL);
    for command in [WRITE, ZEROES, TRIM] {
        let payload: &[u8] = if command == WRITE { &[9; 512] } else { &[] };
        assert_eq!(reader.call(0, command, 0, 512, payload).error, EPERM);
    }
    assert_eq!(reader.call(0, STATUS, 0, 512, &[]).error, EINVAL, "no context was negotiated");
    assert_eq!(reader.call(cmd_flag::DF, READ, 0, 512, &[]).error, EINVAL, "no structured replies were negotiated");
    assert_eq!(client.call(0, READ, 0, 512, &[]).data[8..], pattern(0, 512));
    assert_eq!(reader.call(0, READ, 0, 512, &[]).data, pattern(0, 512));
}

#[test]
fn empty_requests_succeed_and_touch_nothing() {
    let fixture = Fixture::raw(MIB, true);
    for mut client in [fixture.client(), fixture.structured_client(), fixture.extended_client()] {
        for command in [READ, WRITE, TRIM, ZEROES, CACHE, FLUSH] {
            let reply = client.call(0, command, 0, 0, &[]);
            assert_eq!((reply.error, reply.data), (0, vec![]), "command {command}");
        }
    }
}

#[test]
fn zeroes_and_trim_change_the_file_and_block_status_tells() {
    let fixture = Fixture::raw(MIB, true);
    let mut client = fixture.structured_client();
    assert_eq!(client.call(0, ZEROES, 64 << 10, 64 << 10, &[]).error, 0);
    assert_eq!(client.call(cmd_flag::NO_HOLE, ZEROES, 256 << 10, 100, &[]).error, 0);
    assert_eq!(client.call(cmd_flag::FUA, TRIM, 512 << 10, 64 << 10, &[]).error, 0);
    let zeroes = client.call(0, READ, 64 << 10, 64 << 10, &[]);
    assert!(zeroes.data[8..].iter().all(|&b| b == 0));
    assert_eq!(client.call(0, READ, 256 << 10, 100, &[]).data[8..], [0; 100]);
    assert_eq!(client.call(0, READ, (256 << 10) + 100, 10, &[]).data[8..], pattern((256 << 10) + 100, 10));
    let status = client.call(0, STATUS, 0, 128 << 10, &[]);
    let words: Vec<u32> = status.data.chunks(4).map(|w| u32::from_be_bytes(w.try_into().unwrap())).collect();
    assert_eq!(words, [1, 64 << 10, 0, 64 << 10, 3]);
    let first = client.call(cmd_flag::REQ_ONE, STATUS, 0, 128 << 10, &[]);
    assert_eq!(first.data.len(), 12);
}

#[test]
fn a_wrong_magic_ends_the_session_and_only_that_one() {
    let fixture = Fixture::raw(MIB, false);
    let (mut bad, mut good) = (fixture.client(), fixture.client());
    bad.socket.write_all(&[0xff; 28]).unwrap();
    assert!(is_closed(&mut bad.socket));
    assert_eq!(good.call(0, READ, 0, 512, &[]).data, pattern(0, 512));
}

#[test]
fn case_69_a_client_that_vanishes_in_the_middle_of_a_write_leaves_nothing_behind() {
    let fixture = Fixture::raw(MIB, true);
    let mut client = fixture.client();
    client.send(0, WRITE, 1, 0, 1 << 20, &[0xab; 1000]);
    drop(client);
    fixture.changed.recv().unwrap();
    assert_eq!(fixture.export.clients(), 0);
    let mut start = vec![0; 4096];
    fixture.file.read_exact_at(&mut start, 0).unwrap();
    assert_eq!(start, pattern(0, 4096), "an unfinished write of one inbox is not begun");
}

#[test]
fn case_69_replies_to_a_vanished_client_are_nobodys_and_absurd_status_ranges_are_bounded() {
    let fixture = Fixture::raw(MIB, false);
    for _ in 0..20 {
        let mut client = fixture.client();
        for cookie in 0..64 {
            client.send(0, READ, cookie, 0, 1 << 16, &[]);
        }
        // Gone with four mebibytes on their way to it.
        drop(client);
    }
    while fixture.export.clients() > 0 {
        fixture.changed.recv().unwrap();
    }
    let mut client = fixture.structured_client();
    for (offset, len) in [(0, u32::MAX), (u64::MAX, 1), (u64::MAX - 4096, u32::MAX), (MIB - 1, 2)] {
        assert_eq!(client.call(0, STATUS, offset, len, &[]).error, EINVAL, "{len} bytes at {offset}");
    }
    assert_eq!(client.call(0, READ, 0, 512, &[]).data[8..], pattern(0, 512));
}

#[test]
fn disconnect_ends_the_session_after_what_was_asked_before() {
    let fixture = Fixture::raw(MIB, true);
    let mut client = fixture.client();
    client.send(0, READ, 5, 0, 512, &[]);
    client.send(0, FLUSH, 6, 0, 0, &[]);
    client.send(0, DISCONNECT, 0, 0, 0, &[]);
    assert_eq!(client.reply(512).data, pattern(0, 512));
    assert_eq!(client.reply(0).cookie, 6, "answered by a worker");
    assert!(is_closed(&mut client.socket));
}

#[test]
fn a_client_that_never_reads_holds_up_nobody() {
    let fixture = Fixture::raw(4 * MIB, false);
    let mut deaf = fixture.client();
    deaf.socket.set_nonblocking(true).unwrap();
    let greedy = request(0, READ, 0, 0, 4 << 20);
    // Ends when the server stops reading: its own thread waits for this client to read.
    while deaf.socket.write_all(&greedy).is_ok() {}
    let mut good = fixture.client();
    for _ in 0..100 {
        assert_eq!(good.call(0, READ, 4096, 4096, &[]).data, pattern(4096, 4096));
    }
}

#[test]
fn a_removed_export_hangs_up_on_its_clients_and_takes_no_new_ones() {
    let fixture = Fixture::raw(MIB, false);
    let mut client = fixture.client();
    fixture.server.remove("disk");
    assert!(is_closed(&mut client.socket));
    while fixture.export.clients() > 0 {
        fixture.changed.recv().unwrap();
    }
    let mut socket = fixture.connect();
    client::greet(&mut socket);
    let go = [client::string("disk"), vec![0, 0]].concat();
    assert_eq!(client::option(&mut socket, 7, &go)[0].0, 0x8000_0006);
}

#[test]
fn case_66_a_stopped_server_hangs_up_on_everyone_even_in_negotiation() {
    let fixture = Fixture::raw(MIB, false);
    let (mut client, mut half) = (fixture.client(), fixture.connect());
    client::greet(&mut half);
    let Fixture { server, .. } = fixture;
    server.stop();
    assert!(is_closed(&mut client.socket) && is_closed(&mut half));
}

/// A disk on which nothing is ready: reads of odd sectors wait until they are let go.
struct Slow(Arc<(Mutex<bool>, Condvar)>);

impl Driver for Slow {
    fn len(&self) -> u64 {
        MIB
    }

    fn map(&self, offset: u64, len: u64, ask: Ask) -> io::Result<Mapping<'_>> {
        if offset / 512 % 2 == 1 {
            if ask.wait == Wait::Never {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let (ready, wake) = &*self.0;
            drop(wake.wait_while(ready.lock().unwrap(), |ready| !*ready).unwrap());
        }
        // To block status it is data: zeroes have to be written.
        let target = if ask.detail == Detail::Allocation { Target::Computed } else { Target::Zero };
        Ok(Mapping::fixed(target, len))
    }

    fn prepare_write(&self, _: u64, _: u64) -> io::Result<Prepared<'_>> {
        Err(io::Error::from_raw_os_error(28))
    }

    fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(95))
    }

    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        panic!("a bug of ours")
    }

    fn flush(&self) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(5))
    }
}

#[test]
fn what_is_ready_overtakes_what_is_not() {
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let fixture = Fixture::driver(Box::new(Slow(Arc::clone(&gate))));
    let mut client = fixture.client();
    let both = [request(0, READ, 1, 512, 512), request(0, READ, 2, 0, 512)].concat();
    client.socket.write_all(&both).unwrap();
    assert_eq!(client.reply(512).cookie, 2);
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
    assert_eq!(client.reply(512).cookie, 1);
}

#[test]
fn a_hung_disk_holds_up_its_own_client_only() {
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let hung = Fixture::driver(Box::new(Slow(Arc::clone(&gate))));
    let mut waiting = hung.client();
    for cookie in 0..64 {
        waiting.send(0, READ, cookie, 512, 512, &[]);
    }
    let mut other = hung.client();
    assert_eq!(other.call(0, READ, 0, 512, &[]).error, 0);
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
    for _ in 0..64 {
        assert_eq!(waiting.reply(512).error, 0);
    }
}

#[test]
fn errors_of_the_disk_reach_the_client_with_their_number() {
    let fixture = Fixture::driver(Box::new(Slow(Arc::default())));
    let mut client = fixture.structured_client();
    assert_eq!(client.call(0, WRITE, 0, 512, &[0; 512]).error, ENOSPC);
    assert_eq!(client.call(0, FLUSH, 0, 0, &[]).error, 5);
    assert_eq!(client.call(cmd_flag::FAST_ZERO, ZEROES, 0, 512, &[]).error, 95);
    assert_eq!(client.call(0, ZEROES, 0, 512, &[]).error, ENOSPC, "zeroes fall back to a write");
    assert_eq!(client.call(0, TRIM, 0, 512, &[]).error, 5, "a panic costs the request, not the session");
    assert_eq!(client.call(0, READ, 0, 512, &[]).error, 0);
}

#[test]
fn a_thousand_clients_leave_no_descriptor_behind() {
    let fixture = Fixture::raw(MIB, false);
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    // Other tests of this process open and close at the same time: what counts is growth with the number of clients.
    let before = open();
    for _ in 0..1000 {
        assert_eq!(fixture.client().call(0, READ, 0, 512, &[]).error, 0);
        fixture.changed.recv().unwrap();
    }
    assert!(open() < before + 500, "{} descriptors before, {} after", before, open());
}
