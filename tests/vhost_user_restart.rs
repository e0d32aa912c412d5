// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A daemon that is killed while a guest works: its successor does what was under way, loses nothing and repeats nothing that
//! the guest has seen.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

mod front_end;
mod harness;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use front_end::{Ask, FrontEnd, Memory, Options, kind};
use harness::{Scratch, TestDaemon};
use rustix::event::Timespec;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 1024;
const QUEUES: u16 = 2;

fn start(scratch: &Scratch, socket: &Path) -> TestDaemon {
    let mut daemon = TestDaemon::start();
    let file = File::options().read(true).write(true).open(scratch.path("disk")).unwrap();
    daemon.add_node("disk", "raw", &file, false);
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).unwrap();
    daemon.ok_with("getfd", json!({ "fdname": "vhost" }), &listener);
    let addr = json!({ "type": "fd", "str": "vhost" });
    let export = json!({ "type": "vhost-user-blk", "id": "disk", "node-name": "disk", "writable": true,
        "num-queues": QUEUES, "addr": addr });
    daemon.ok("block-export-add", export);
    daemon
}

struct Random(u64);

impl Random {
    fn below(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % most
    }
}

/// What a queue's guest has asked and knows.
#[derive(Default)]
struct Guest {
    under_way: BTreeMap<u16, (u64, u8)>,
    written: BTreeMap<u64, u8>,
    ended: u64,
}

impl Guest {
    /// Writes blocks that nobody is writing just now, each of one value.
    fn submit(&mut self, queue: &mut front_end::Queue<'_>, part: u64, random: &mut Random) {
        for slot in 0..queue.slots() {
            let block = part * BLOCKS / u64::from(QUEUES) + random.below(BLOCKS / u64::from(QUEUES));
            let taken = self.under_way.values().any(|&(other, _)| other == block);
            if taken || self.under_way.contains_key(&slot) {
                continue;
            }
            let value = random.below(255) as u8 + 1;
            queue.data(slot, BLOCK).copy_from(&[value; BLOCK as usize]);
            queue.submit(slot, Ask::new(kind::WRITE, block * BLOCK / 512, BLOCK));
            self.under_way.insert(slot, (block, value));
        }
        queue.kick();
    }

    fn note(&mut self, done: Vec<front_end::Done>) {
        for done in done {
            let (block, value) =
                self.under_way.remove(&done.slot).expect("a request ends once, and only if it was made");
            assert_eq!(done.status, 0);
            self.written.insert(block, value);
            self.ended += 1;
        }
    }
}

#[test]
fn no_request_is_lost_or_seen_twice_over_a_killed_daemon() {
    let rounds = std::env::var("DOORLESS_RESTARTS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(12);
    let scratch = Scratch::new();
    std::fs::write(scratch.path("disk"), vec![0; (BLOCKS * BLOCK) as usize]).unwrap();
    let socket = scratch.path("sock");
    let memory = Memory::new(QUEUES.into());
    let mut daemon = start(&scratch, &socket);
    let options = Options { queues: QUEUES, ..Options::default() };
    let mut front = FrontEnd::start(&socket, &memory, options);
    let mut guests: Vec<Guest> = (0..QUEUES).map(|_| Guest::default()).collect();
    let mut random = Random(rounds);
    let mut cut_short = 0;
    for _ in 0..rounds {
        let pid = Pid::from_raw(daemon.pid() as i32).unwrap();
        let delay = Duration::from_micros(random.below(3000));
        let killer = std::thread::spawn(move || {
            std::thread::sleep(delay);
            kill_process(pid, Signal::KILL).unwrap();
        });
        let moment = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        while !killer.is_finished() {
            for (index, (guest, queue)) in guests.iter_mut().zip(&mut front.queues).enumerate() {
                guest.submit(queue, index as u64, &mut random);
                guest.note(queue.wait_for(&moment).unwrap_or_default());
            }
        }
        killer.join().unwrap();
        assert!(front.was_hung_up_on());
        // What ended before the end is seen first; the rest is the successor's.
        for (guest, queue) in guests.iter_mut().zip(&mut front.queues) {
            guest.note(queue.done());
            cut_short += guest.under_way.len();
        }
        drop(daemon);
        daemon = start(&scratch, &socket);
        front = front.resume(&socket);
        for (guest, queue) in guests.iter_mut().zip(&mut front.queues) {
            while !guest.under_way.is_empty() {
                guest.note(queue.wait());
            }
        }
        let disk = std::fs::read(scratch.path("disk")).unwrap();
        for (&block, &value) in guests.iter().flat_map(|guest| &guest.written) {
            let at = (block * BLOCK) as usize;
            assert!(disk[at..at + BLOCK as usize].iter().all(|&byte| byte == value), "block {block}");
        }
    }
    eprintln!(
        "{cut_short} of {} requests were under way when a daemon was killed",
        guests.iter().map(|g| g.ended).sum::<u64>()
    );
    assert!(cut_short > 0, "no daemon was killed with a request under way");
}
