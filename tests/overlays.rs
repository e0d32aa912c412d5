// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `blockdev-snapshot`: overlays that take the place of nodes under load, for every kind of export.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

mod disorder;
mod front_end;
mod harness;
#[path = "harness/mounted.rs"]
mod mounted;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use disorder::client::{Client, Dice, Style};
use disorder::{Model, SECTOR};
use front_end::{FrontEnd, Memory, Options};
use harness::{Scratch, TestDaemon, judges, program, run};
use manager::fuse::{AllowOther, Mount};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const SECTORS: usize = 2048;
const SIZE: u64 = (SECTORS * SECTOR) as u64;

struct Bench {
    daemon: TestDaemon,
    scratch: Scratch,
}

impl Bench {
    fn new() -> Bench {
        Bench { daemon: TestDaemon::start(), scratch: Scratch::new() }
    }

    /// Makes an image over `below`, if there is one.
    fn image(&self, name: &str, size: u64, below: Option<&str>) {
        let (path, size) = (self.scratch.name(name), size.to_string());
        // Without reading it: it may be in use by the daemon.
        let backing = below.map_or(vec![], |below| vec!["-u", "-F", "qcow2", "-b", below]);
        run("qemu-img", &[&["create", "-q", "-f", "qcow2"], &backing[..], &[&path, &size]].concat());
    }

    /// A node over that image, whose set has a descriptor for reading, too.
    fn add(&mut self, name: &str, read_only: bool) {
        let set = self.daemon.add_fd(File::open(self.scratch.path(name)).unwrap());
        let writable = File::options().read(true).write(true).open(self.scratch.path(name)).unwrap();
        self.daemon.ok_with("add-fd", json!({ "fdset-id": set }), writable);
        let file = json!({ "driver": "file", "filename": format!("/dev/fdset/{set}") });
        let node = json!({
            "driver": "qcow2", "node-name": name, "file": file, "backing": null, "read-only": read_only, "discard": "unmap",
        });
        self.daemon.ok("blockdev-add", node);
    }

    fn overlay(&mut self, name: &str, below: &str) {
        self.image(name, SIZE, Some(below));
        self.add(name, false);
    }

    fn snapshot(&mut self, node: &str, overlay: &str) {
        self.daemon.ok("blockdev-snapshot", json!({ "node": node, "overlay": overlay }));
    }

    fn export(&mut self, node: &str, writable: bool) {
        let export = json!({ "type": "nbd", "id": "e", "node-name": node, "name": "disk", "writable": writable });
        self.daemon.ok("block-export-add", export);
    }

    /// The daemon's end: everything is in the images.
    fn end(&mut self) {
        std::mem::replace(&mut self.daemon, TestDaemon::start()).daemon.stop().unwrap();
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.scratch.path(name)).unwrap()
    }

    /// Bytes of the chain, as QEMU reads it.
    fn as_qemu_reads(&self, name: &str) -> Vec<u8> {
        let raw = self.scratch.name("raw");
        run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &self.scratch.name(name), &raw]);
        fs::read(raw).unwrap()
    }

    fn nodes(&mut self) -> Vec<(String, bool, Value)> {
        let nodes = self.daemon.ok("query-named-block-nodes", json!({}));
        let show = |node: &Value| {
            (
                node["node-name"].as_str().unwrap().to_owned(),
                node["ro"].as_bool().unwrap(),
                node["backing_file_depth"].clone(),
            )
        };
        nodes.as_array().unwrap().iter().map(show).filter(|(name, ..)| !name.starts_with('#')).collect()
    }
}

/// Clients in disorder meanwhile; what `work` gives.
fn under_load<T>(socket: &std::path::Path, model: &Mutex<Model>, work: impl FnOnce(&AtomicU64) -> T) -> T {
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..6)
            .map(|number| {
                let (stop, done) = (&stop, &done);
                scope.spawn(move || {
                    let style = [Style::Simple, Style::Structured, Style::Extended][number as usize % 3];
                    let mut client = Client::negotiate(UnixStream::connect(socket).unwrap(), style).unwrap();
                    let mut dice = Dice(0x0e7a + number);
                    while !stop.load(Ordering::Relaxed) {
                        let count = 1 + dice.roll(12) as usize;
                        client.batch(model, &mut dice, count).unwrap().unwrap();
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let outcome = work(&done);
        stop.store(true, Ordering::Relaxed);
        clients.into_iter().for_each(|client| client.join().unwrap());
        outcome
    })
}

fn wait_for(done: &AtomicU64, more: u64) {
    let goal = done.load(Ordering::Relaxed) + more;
    while done.load(Ordering::Relaxed) < goal {
        std::thread::yield_now();
    }
}

#[test]
fn clients_in_disorder_see_one_disk_while_overlays_come() {
    if !judges("clients_in_disorder_see_one_disk_while_overlays_come", &["qemu-img"]) {
        return;
    }
    for through_raw in [false, true] {
        let mut bench = Bench::new();
        bench.image("base", SIZE, None);
        bench.add("base", false);
        let mut root = "base";
        if through_raw {
            bench.daemon.ok("blockdev-add", json!({ "driver": "raw", "node-name": "window", "file": "base" }));
            root = "window";
        }
        bench.daemon.start_nbd();
        bench.export(root, true);
        let model = Mutex::new(Model::zeroes(SECTORS));
        let socket = bench.daemon.socket();
        let frozen = under_load(&socket, &model, |done| {
            let mut frozen = Vec::new();
            for (below, overlay) in [("base", "one"), ("one", "two"), ("two", "three")] {
                wait_for(done, 60);
                bench.overlay(overlay, below);
                bench.snapshot(below, overlay);
                frozen.push((below, bench.bytes(below)));
            }
            wait_for(done, 60);
            frozen
        });
        let export = bench.daemon.ok("query-block-exports", json!({}));
        assert_eq!(export[0]["node-name"], if through_raw { "window" } else { "three" });
        let three = ("three".to_owned(), false, json!(3));
        assert!(bench.nodes().contains(&three), "{:?}", bench.nodes());
        for (name, depth) in [("base", 0), ("one", 1), ("two", 2)] {
            assert!(bench.nodes().contains(&(name.to_owned(), true, json!(depth))), "{:?}", bench.nodes());
        }
        bench.daemon.ok("block-export-del", json!({ "id": "e", "mode": "hard" }));
        bench.end();
        for (name, before) in frozen {
            assert!(bench.bytes(name) == before, "{name} was written after its snapshot");
        }
        let mut model = model.into_inner().unwrap();
        model.settle();
        let read = model.begin(0, SECTORS, None);
        model.end_read(read, &bench.as_qemu_reads("three")).unwrap();
        for name in ["base", "one", "two", "three"] {
            run("qemu-img", &["check", "-q", &bench.scratch.name(name)]);
        }
        let chain = run("qemu-img", &["info", "--backing-chain", "--output=json", &bench.scratch.name("three")]);
        let chain: Value = serde_json::from_str(&chain).unwrap();
        let names: Vec<&str> =
            chain.as_array().unwrap().iter().filter_map(|image| image["backing-filename"].as_str()).collect();
        assert_eq!(names, ["two", "one", "base"]);
    }
}

/// Each connection writes one number after the other, each into the slot that follows.
#[test]
fn a_snapshot_is_one_moment_of_each_connection() {
    const CONNECTIONS: u64 = 4;
    const SLOTS: u64 = 24;
    const SLOT: u64 = 8192;
    if !judges("a_snapshot_is_one_moment_of_each_connection", &["qemu-img"]) {
        return;
    }
    let mut bench = Bench::new();
    bench.image("base", SIZE, None);
    bench.add("base", false);
    bench.overlay("above", "base");
    bench.daemon.start_nbd();
    bench.export("base", true);
    let socket = bench.daemon.socket();
    let (stop, counts) = (AtomicBool::new(false), [const { AtomicU64::new(0) }; CONNECTIONS as usize]);
    let answered = || counts.each_ref().map(|count| count.load(Ordering::SeqCst));
    let (before, after) = std::thread::scope(|scope| {
        for (stripe, count) in (0..).zip(&counts) {
            let (socket, stop) = (&socket, &stop);
            scope.spawn(move || {
                let mut client = Client::negotiate(UnixStream::connect(socket).unwrap(), Style::Simple).unwrap();
                for number in 1u64.. {
                    let slot = stripe * SLOTS + number % SLOTS;
                    client.write(slot * SLOT, &number.to_be_bytes().repeat(SLOT as usize / 8)).unwrap();
                    count.store(number, Ordering::SeqCst);
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
        }
        while answered().iter().any(|&count| count < 100) {
            std::thread::yield_now();
        }
        let before = answered();
        bench.snapshot("base", "above");
        let after = answered();
        while answered().iter().zip(after).any(|(&now, then)| now < then + 50) {
            std::thread::yield_now();
        }
        stop.store(true, Ordering::Relaxed);
        (before, after)
    });
    let last = answered();
    bench.end();
    let read = |name: &str| {
        let raw = bench.scratch.name("raw");
        run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &bench.scratch.name(name), &raw]);
        fs::read(raw).unwrap()
    };
    let words = |bytes: &[u8], stripe: u64, slot: u64| -> Vec<u64> {
        let at = ((stripe * SLOTS + slot) * SLOT) as usize;
        let slot = &bytes[at..at + SLOT as usize];
        slot.chunks(8).map(|word| u64::from_be_bytes(word.try_into().unwrap())).collect()
    };
    let (base, above) = (read("base"), read("above"));
    for stripe in 0..CONNECTIONS {
        let of = |counts: &[u64; CONNECTIONS as usize]| counts[stripe as usize];
        // The last number that is there as a whole; the one after it may be there in part, because nobody was told of it.
        let whole =
            |slot| Some(words(&base, stripe, slot)).filter(|words| words.windows(2).all(|pair| pair[0] == pair[1]));
        let newest = (0..SLOTS).filter_map(|slot| whole(slot).map(|words| words[0])).max().unwrap();
        assert!(newest >= of(&before) && newest <= of(&after) + 1, "{newest}: {before:?} {after:?}");
        for number in newest + 2 - SLOTS..=newest {
            assert_eq!(words(&base, stripe, number % SLOTS), vec![number; SLOT as usize / 8]);
        }
        for number in of(&last) + 1 - SLOTS..=of(&last) {
            assert_eq!(words(&above, stripe, number % SLOTS), vec![number; SLOT as usize / 8]);
        }
    }
}

#[test]
fn files_and_virtio_disks_follow_to_the_overlay_too() {
    let test = "files_and_virtio_disks_follow_to_the_overlay_too";
    if !judges(test, &["qemu-img"]) || !mounted::can_mount(test) {
        return;
    }
    let mut bench = Bench::new();
    bench.image("base", SIZE, None);
    bench.add("base", false);
    bench.overlay("above", "base");
    let listener = UnixListener::bind(bench.scratch.path("disk.sock")).unwrap();
    bench.daemon.ok_with("getfd", json!({ "fdname": "v" }), &listener);
    let vhost = json!({
        "type": "vhost-user-blk", "id": "v", "node-name": "base", "writable": true, "addr": { "type": "fd", "str": "v" },
    });
    bench.daemon.ok("block-export-add", vhost);
    let path = bench.scratch.path("file");
    fs::write(&path, "").unwrap();
    let mount = Mount::make(&program(), &path, false, AllowOther::Off).unwrap();
    bench.daemon.ok_with("getfd", json!({ "fdname": "f" }), mount.device().as_fd());
    let fuse =
        json!({ "type": "fuse", "id": "f", "node-name": "base", "fd": "f", "mountpoint": "x", "writable": true });
    bench.daemon.ok("block-export-add", fuse);
    let attached = mount.attach().unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let memory = Memory::new(1);
    let mut guest = FrontEnd::start(&bench.scratch.path("disk.sock"), &memory, Options::default());
    assert_eq!(guest.write(0, &[1; 4096]), 0);
    file.write_all_at(&[2; 4096], 65_536).unwrap();

    bench.snapshot("base", "above");

    let before = bench.bytes("base");
    let exports = bench.daemon.ok("query-block-exports", json!({}));
    assert!(exports.as_array().unwrap().iter().all(|export| export["node-name"] == "above"), "{exports}");
    assert_eq!(guest.write(8, &[3; 4096]), 0);
    file.write_all_at(&[4; 512], 65_536 + 512).unwrap();
    file.sync_all().unwrap();
    assert_eq!(guest.read(0, 8192), [[1; 4096], [3; 4096]].concat());
    assert_eq!(guest.read(128, 2048), [[2; 512], [4; 512], [2; 512], [2; 512]].concat());
    let stats = bench.daemon.ok("query-blockstats", json!({ "query-nodes": true }));
    let written = |name: &str| {
        let nodes = stats.as_array().unwrap();
        nodes.iter().find(|node| node["node-name"] == name).unwrap()["stats"]["wr_operations"].as_u64().unwrap()
    };
    assert_eq!((written("base"), written("above")), (2, 2));
    drop((file, attached, guest));
    assert!(bench.bytes("base") == before);
}

#[test]
fn all_overlays_of_a_transaction_come_or_none() {
    if !judges("all_overlays_of_a_transaction_come_or_none", &["qemu-img", "qemu-io"]) {
        return;
    }
    let mut bench = Bench::new();
    bench.image("base", SIZE, None);
    bench.add("base", false);
    for (name, below) in [("one", "base"), ("two", "one")] {
        bench.overlay(name, below);
    }
    bench.daemon.start_nbd();
    bench.export("base", true);
    let uri = manager::serve::uri(&bench.daemon.socket(), "disk");
    let io = |commands: &[&str]| {
        let commands: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
        run("qemu-io", &[&["-f", "raw"], &commands[..], &[&uri]].concat());
    };
    io(&["write -P 1 0 64k"]);
    let action = |kind: &str, data: Value| json!({ "type": kind, "data": data });
    let mut actions = vec![
        action("blockdev-snapshot", json!({ "node": "base", "overlay": "one" })),
        action("block-dirty-bitmap-add", json!({ "node": "two", "name": "b" })),
        action("blockdev-snapshot", json!({ "node": "one", "overlay": "two" })),
    ];
    let before = bench.nodes();
    actions.push(action("abort", json!({})));
    let aborted = bench.daemon.error("transaction", json!({ "actions": actions }));
    assert_eq!(aborted, "Transaction aborted using Abort action");
    assert_eq!(bench.nodes(), before);
    // The last one fails: the overlay is there already.
    *actions.last_mut().unwrap() = action("blockdev-snapshot", json!({ "node": "base", "overlay": "two" }));
    let refused = bench.daemon.error("transaction", json!({ "actions": actions }));
    assert_eq!(refused, "Node 'base' is busy: node is used as backing hd of 'one'");
    assert_eq!(bench.nodes(), before);
    // Everything can still be written and removed as before.
    io(&["write -P 2 64k 64k", "read -P 1 0 64k"]);
    actions.pop();
    bench.daemon.ok("transaction", json!({ "actions": actions }));
    let exports = bench.daemon.ok("query-block-exports", json!({}));
    assert_eq!(exports[0]["node-name"], "two");
    io(&["write -P 3 128k 64k", "read -P 1 0 64k", "read -P 2 64k 64k", "flush"]);
    assert_eq!(
        bench.daemon.error("blockdev-del", json!({ "node-name": "one" })),
        "Node 'one' is busy: node is used as backing hd of 'two'"
    );
    bench.daemon.ok("block-export-del", json!({ "id": "e", "mode": "hard" }));
    for name in ["two", "one", "base"] {
        while bench.daemon.daemon.execute("blockdev-del", json!({ "node-name": name }), &[]).is_err() {
            std::thread::yield_now();
        }
    }
    let expected = [[1; 65536], [2; 65536], [3; 65536]].concat();
    assert!(bench.as_qemu_reads("two")[..expected.len()] == expected);
    assert!(bench.as_qemu_reads("one")[..expected.len()] == [[1; 65536], [2; 65536], [0; 65536]].concat());
}

#[test]
fn what_was_answered_before_a_snapshot_survives_the_daemons_death_after_it() {
    let test = "what_was_answered_before_a_snapshot_survives_the_daemons_death_after_it";
    if !judges(test, &["qemu-img", "qemu-io"]) {
        return;
    }
    let mut bench = Bench::new();
    bench.image("base", SIZE, None);
    bench.add("base", false);
    bench.overlay("above", "base");
    bench.daemon.start_nbd();
    bench.export("base", true);
    let socket = UnixStream::connect(bench.daemon.socket()).unwrap();
    let mut client = Client::negotiate(socket, Style::Simple).unwrap();
    // Never flushed by the client: the snapshot sees to it, because a flush of the overlay does not reach the base.
    client.write(65_536, &[1; 65_536]).unwrap();
    bench.snapshot("base", "above");
    client.write(262_144, &[2; 4096]).unwrap();
    let uri = manager::serve::uri(&bench.daemon.socket(), "disk");
    run("qemu-io", &["-f", "raw", "-c", "flush", &uri]);
    kill_process(Pid::from_raw(bench.daemon.pid().cast_signed()).unwrap(), Signal::KILL).unwrap();
    std::mem::replace(&mut bench.daemon, TestDaemon::start()).daemon.wait().unwrap();
    for name in ["base", "above"] {
        run("qemu-img", &["check", "-q", &bench.scratch.name(name)]);
    }
    let mut expected = vec![0; SIZE as usize];
    expected[65_536..131_072].fill(1);
    assert!(bench.as_qemu_reads("base") == expected);
    expected[262_144..262_144 + 4096].fill(2);
    assert!(bench.as_qemu_reads("above") == expected);
}
