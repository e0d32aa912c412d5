// SPDX-License-Identifier: Apache-2.0 OR MIT
//! NBD clients that go on in another daemon: with everything that they negotiated, in the middle of a request's header, and seeing
//! only what one server would have shown.
#![allow(missing_docs, clippy::unwrap_used)]

mod disorder;
mod harness;

use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use disorder::client::{Client, Dice, Style};
use disorder::{Model, SECTOR};
use harness::{Scratch, TestDaemon};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};

const SECTORS: usize = 512;

/// Serves `file` as the export `disk` on a fresh socket.
fn serve(daemon: &mut TestDaemon, file: &std::fs::File, scratch: &Scratch, round: usize) -> UnixListener {
    daemon.add_node("disk", "raw", file, false);
    let listener = UnixListener::bind(scratch.path(&format!("nbd{round}"))).unwrap();
    daemon.ok_with("getfd", json!({ "fdname": "nbd" }), &listener);
    daemon.ok("nbd-server-start", json!({ "addr": { "type": "fd", "data": { "str": "nbd" } }, "max-connections": 0 }));
    daemon.export("disk", true);
    listener
}

/// Takes the clients of a daemon, and its node.
fn take(daemon: &mut TestDaemon) -> (Vec<Value>, Vec<OwnedFd>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    daemon.ok_with("getfd", json!({ "fdname": "moving" }), &theirs);
    let states = daemon.ok("nbd-server-move", json!({ "fd": "moving" }));
    let states = states.as_array().unwrap().clone();
    let mut sockets = Vec::new();
    while sockets.len() < states.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        recvmsg(&ours, &mut [IoSliceMut::new(&mut [0])], &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                sockets.extend(fds);
            }
        }
    }
    daemon.ok("blockdev-del", json!({ "node-name": "disk" }));
    (states, sockets)
}

fn give(daemon: &mut TestDaemon, states: &[Value], sockets: &[OwnedFd]) {
    for (state, socket) in states.iter().zip(sockets) {
        daemon.ok_with("getfd", json!({ "fdname": "client" }), socket.as_fd());
        let mut client = state.clone();
        client["fd"] = json!("client");
        daemon.ok("nbd-client-add", client);
    }
}

fn disk() -> std::fs::File {
    let file = tempfile::tempfile().unwrap();
    file.set_len((SECTORS * SECTOR) as u64).unwrap();
    file
}

#[test]
fn clients_of_every_style_see_one_server_over_many_moves() {
    let scratch = Scratch::new();
    let file = disk();
    let mut daemons = [TestDaemon::start(), TestDaemon::start()];
    let _first = serve(&mut daemons[0], &file, &scratch, 0);
    let model = Mutex::new(Model::zeroes(SECTORS));
    let (over, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let moved = std::thread::scope(|scope| {
        let styles =
            [Style::Simple, Style::Structured, Style::Extended, Style::Simple, Style::Structured, Style::Extended];
        let clients: Vec<_> = (1..)
            .zip(styles)
            .map(|(seed, style)| {
                let socket = UnixStream::connect(scratch.path("nbd0")).unwrap();
                let mut client = Client::negotiate(socket, style).unwrap();
                let (model, over, done) = (&model, &over, &done);
                scope.spawn(move || {
                    let mut dice = Dice(seed);
                    while !over.load(Ordering::Relaxed) {
                        let count = 1 + usize::try_from(dice.roll(12)).unwrap();
                        // No connection ends, and no read shows what must not be.
                        client.batch(model, &mut dice, count).unwrap().unwrap();
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let mut moved = 0;
        for round in 1..=30 {
            // Some work is done between two moves.
            let before = done.load(Ordering::Relaxed);
            while done.load(Ordering::Relaxed) < before + 6
                && !clients.iter().any(std::thread::ScopedJoinHandle::is_finished)
            {
                std::thread::yield_now();
            }
            let [one, two] = &mut daemons;
            let (from, to) = if round % 2 == 1 { (one, two) } else { (two, one) };
            let (states, sockets) = take(from);
            assert_eq!(states.len(), 6);
            let _listener = serve(to, &file, &scratch, round);
            give(to, &states, &sockets);
            moved += states.len();
        }
        over.store(true, Ordering::Relaxed);
        moved
    });
    eprintln!("{moved} moves of clients, {} batches", done.load(Ordering::Relaxed));
}

#[test]
fn a_client_moves_in_the_middle_of_a_header_with_its_contexts() {
    let scratch = Scratch::new();
    let file = disk();
    let (mut old, mut new) = (TestDaemon::start(), TestDaemon::start());
    let _old = serve(&mut old, &file, &scratch, 0);
    let mut socket = UnixStream::connect(scratch.path("nbd0")).unwrap();
    let option = |number: u32, payload: &[u8]| {
        let len = u32::try_from(payload.len()).unwrap();
        [&b"IHAVEOPT"[..], &number.to_be_bytes(), &len.to_be_bytes(), payload].concat()
    };
    let answers = |socket: &mut UnixStream| loop {
        let mut header = [0; 20];
        socket.read_exact(&mut header).unwrap();
        let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
        socket.read_exact(&mut vec![0; word(16) as usize]).unwrap();
        if word(12) == 1 {
            break;
        }
    };
    socket.read_exact(&mut [0; 18]).unwrap();
    socket.write_all(&[0, 0, 0, 3]).unwrap();
    let context =
        [&4u32.to_be_bytes()[..], b"disk", &1u32.to_be_bytes(), &15u32.to_be_bytes(), b"base:allocation"].concat();
    for (number, payload) in [(8, &[][..]), (10, &context), (7, b"\0\0\0\x04disk\0\0")] {
        socket.write_all(&option(number, payload)).unwrap();
        answers(&mut socket);
    }
    // A block status request, of which the second half comes after the move.
    let request =
        [&0x2560_9513_u32.to_be_bytes()[..], &[0, 0, 0, 7], &99u64.to_be_bytes(), &[0; 8], &4096u32.to_be_bytes()]
            .concat();
    socket.write_all(&request[..11]).unwrap();
    let (states, sockets) = take(&mut old);
    let contexts = json!([{ "id": 1, "name": "base:allocation" }]);
    assert_eq!((&states[0]["style"], &states[0]["contexts"]), (&json!("structured"), &contexts));
    let received = states[0]["received"].as_str().unwrap();
    assert!(["", "2560951300000007000000"].contains(&received), "nothing of it, or what was sent: {received}");
    let _new = serve(&mut new, &file, &scratch, 1);
    // What cannot be gone on with is refused, and the client hung up on.
    let add = |change: &dyn Fn(&mut Value)| {
        let mut client = states[0].clone();
        client["fd"] = json!("client");
        change(&mut client);
        client
    };
    let (spare, _other) = UnixStream::pair().unwrap();
    for (change, said) in [
        (
            &(|client: &mut Value| client["export"] = json!("other")) as &dyn Fn(&mut Value),
            "export 'other' not present",
        ),
        (&|client| client["style"] = json!("baroque"), "style"),
        (&|client| client["contexts"] = json!([{ "id": 1, "name": "qemu:x" }]), "has no context 'qemu:x'"),
        (&|client| client["received"] = json!("0"), "pairs of hexadecimal digits"),
        (&|client| client["received"] = json!("00".repeat(28)), "more than the beginning of a request"),
    ] {
        new.ok_with("getfd", json!({ "fdname": "client" }), &spare);
        let error = new.error("nbd-client-add", add(change));
        assert!(error.contains(said), "{error}");
    }
    give(&mut new, &states, &sockets);
    socket.write_all(&request[11..]).unwrap();
    let mut chunk = [0; 20];
    socket.read_exact(&mut chunk).unwrap();
    assert_eq!((&chunk[..4], &chunk[8..16]), (&0x668e_33ef_u32.to_be_bytes()[..], &99u64.to_be_bytes()[..]));
    assert_eq!(chunk[6..8], [0, 5], "a block status chunk");
    let mut status = vec![0; u32::from_be_bytes(chunk[16..].try_into().unwrap()) as usize];
    socket.read_exact(&mut status).unwrap();
    assert_eq!(status[..4], [0, 0, 0, 1], "of the context by its number");
}

#[test]
fn a_client_that_never_finishes_its_request_holds_up_nobody_for_long() {
    let scratch = Scratch::new();
    let file = disk();
    let mut daemon = TestDaemon::start();
    let _listener = serve(&mut daemon, &file, &scratch, 0);
    let mut socket = UnixStream::connect(scratch.path("nbd0")).unwrap();
    socket.read_exact(&mut [0; 18]).unwrap();
    socket.write_all(&[&[0, 0, 0, 3], &b"IHAVEOPT"[..], &[0, 0, 0, 1, 0, 0, 0, 4], b"disk"].concat()).unwrap();
    socket.read_exact(&mut [0; 10]).unwrap();
    // The header of a write whose payload never comes.
    let write =
        [&0x2560_9513_u32.to_be_bytes()[..], &[0, 0, 0, 1], &[0; 16], &4096u32.to_be_bytes(), &[7; 100]].concat();
    socket.write_all(&write).unwrap();
    // Another that says nothing at all.
    let _silent = UnixStream::connect(scratch.path("nbd0")).unwrap();
    daemon.ok("query-block-exports", json!({}));
    let (_ours, theirs) = UnixStream::pair().unwrap();
    daemon.ok_with("getfd", json!({ "fdname": "moving" }), &theirs);
    let states = daemon.ok("nbd-server-move", json!({ "fd": "moving", "milliseconds": 50 }));
    // Whether the payload's absence was noticed before the end of the header came: it moves, or is hung up on.
    let states = states.as_array().unwrap();
    assert!(states.len() <= 1);
    if states.is_empty() {
        assert_eq!(socket.read(&mut [0; 1]).unwrap_or(0), 0);
    }
}
