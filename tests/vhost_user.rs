// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A vhost-user-blk export, driven by a foreign front end without a guest.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

mod front_end;
mod harness;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};

use front_end::{Ask, Done, FrontEnd, Memory, Options, SLOT, kind};
use harness::{Scratch, TestDaemon, judges, noise, run};
use serde_json::json;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

const DISK: u64 = 8 << 20;

struct Bench {
    daemon: TestDaemon,
    scratch: Scratch,
}

impl Bench {
    /// A daemon that exports a raw disk of noise as `disk`, with `queues` queues.
    fn new(queues: u16, writable: bool) -> Bench {
        let mut bench = Bench { daemon: TestDaemon::start(), scratch: Scratch::new() };
        std::fs::write(bench.scratch.path("disk"), noise(DISK as usize, 3)).unwrap();
        bench.add_node("disk", writable);
        bench.export("disk", json!({ "num-queues": queues, "writable": writable }));
        bench
    }

    fn add_node(&mut self, name: &str, writable: bool) {
        let file = File::options().read(true).write(writable).open(self.scratch.path(name)).unwrap();
        self.daemon.add_node(name, "raw", &file, !writable);
    }

    fn export(&mut self, id: &str, options: serde_json::Value) {
        let listener = UnixListener::bind(self.scratch.path(&format!("{id}.sock"))).unwrap();
        self.daemon.ok_with("getfd", json!({ "fdname": id }), &listener);
        let mut export =
            json!({ "type": "vhost-user-blk", "id": id, "node-name": id, "addr": { "type": "fd", "str": id } });
        export.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        self.daemon.ok("block-export-add", export);
    }

    fn start<'m>(&self, memory: &'m Memory, options: Options) -> FrontEnd<'m> {
        FrontEnd::start(&self.scratch.path("disk.sock"), memory, options)
    }

    fn on_disk(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        File::open(self.scratch.path("disk")).unwrap().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }
}

/// Ranges to discard or to make zeroes, as they stand in a request.
fn ranges(ranges: &[(u64, u32, u32)]) -> Vec<u8> {
    let bytes = ranges.iter().map(|&(sector, sectors, flags)| {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    });
    bytes.collect::<Vec<_>>().concat()
}

#[test]
fn every_request_does_what_it_says_however_it_lies_in_memory() {
    let bench = Bench::new(1, true);
    for (indirect, event_idx) in [(true, true), (false, true), (true, false), (false, false)] {
        let memory = Memory::new(1);
        let options = Options { indirect, event_idx, ..Options::default() };
        let mut guest = bench.start(&memory, options);
        let before = bench.on_disk(0, SLOT as usize);
        assert!(guest.read(0, SLOT) == before);
        let data = noise(24 << 10, u64::from(indirect) * 2 + u64::from(event_idx) + 11);
        assert_eq!(guest.write(16, &data), 0);
        assert!(bench.on_disk(8192, data.len()) == data, "a write is in the file");
        let in_two = Ask { pieces: 2, ..Ask::new(kind::READ, 16, data.len() as u64) };
        assert!(guest.one(in_two, &[]) == (0, data.clone()));
        let in_two = Ask { pieces: 2, ..Ask::new(kind::WRITE, 100, data.len() as u64) };
        assert_eq!(guest.one(in_two, &data).0, 0);
        assert!(bench.on_disk(51200, data.len()) == data);
        assert_eq!(guest.one(Ask::new(kind::FLUSH, 0, 0), &[]).0, 0);

        let zeroes = ranges(&[(16, 8, 0), (32, 8, 1)]);
        assert_eq!(guest.one(Ask::new(kind::ZEROES, 0, 32), &zeroes).0, 0);
        assert!(guest.read(16, 4096) == [0; 4096] && guest.read(32, 4096) == [0; 4096]);
        assert!(guest.read(24, 4096) == data[4096..8192]);
        assert_eq!(guest.one(Ask::new(kind::DISCARD, 0, 16), &ranges(&[(24, 8, 0)])).0, 0);

        let (status, id) = guest.one(Ask::new(kind::ID, 0, 20), &[]);
        assert_eq!((status, &id[..5]), (0, &b"disk\0"[..]));
    }
}

#[test]
fn what_cannot_be_done_fails_alone() {
    let bench = Bench::new(1, true);
    let memory = Memory::new(1);
    let mut guest = bench.start(&memory, Options::default());
    let mut status = |kind, sector, data: &[u8], len| guest.one(Ask::new(kind, sector, len), data).0;
    assert_eq!(status(77, 0, &[], 0), 2, "an unknown request");
    assert_eq!(status(kind::READ, DISK / 512, &[], 512), 1, "a read past the end");
    assert_eq!(status(kind::WRITE, DISK / 512 - 1, &[], 1024), 1, "a write over the end");
    assert_eq!(status(kind::READ, u64::MAX, &[], 512), 1, "a sector that no disk has");
    assert_eq!(status(kind::READ, u64::MAX / 512, &[], 512), 1);
    assert_eq!(status(kind::READ, 0, &[], 511), 1, "half a sector");
    assert_eq!(status(kind::DISCARD, 0, &ranges(&[(0, 8, 1)]), 16), 2, "a flag that discards do not have");
    assert_eq!(status(kind::ZEROES, 0, &ranges(&[(0, 8, 2)]), 16), 2, "an unknown flag");
    assert_eq!(status(kind::ZEROES, 0, &ranges(&[(DISK / 512, 8, 0)]), 16), 1);
    assert_eq!(status(kind::ZEROES, 0, &ranges(&[(0, 1 << 22, 0)]), 16), 1, "more than configuration space allows");
    assert_eq!(status(kind::ZEROES, 0, &ranges(&[(0, 8, 0); 17]), 17 * 16), 1);
    assert_eq!(status(kind::ZEROES, 0, &[0; 15], 15), 1, "half a range");
    assert!(guest.read(0, 512) == bench.on_disk(0, 512), "the device goes on");
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let bench = Bench::new(1, false);
    let before = bench.on_disk(0, DISK as usize);
    let memory = Memory::new(1);
    let mut guest = bench.start(&memory, Options::default());
    assert_ne!(guest.features & (1 << 5), 0, "VIRTIO_BLK_F_RO");
    assert_eq!(guest.write(0, &[1; 512]), 1);
    assert_eq!(guest.one(Ask::new(kind::ZEROES, 0, 16), &ranges(&[(0, 8, 0)])).0, 1);
    assert_eq!(guest.one(Ask::new(kind::DISCARD, 0, 16), &ranges(&[(0, 8, 0)])).0, 1);
    assert!(bench.on_disk(0, DISK as usize) == before);
}

#[test]
fn several_queues_serve_at_once_and_lose_no_request() {
    let bench = Bench::new(4, true);
    let memory = Memory::new(4);
    let options = Options { queues: 4, ..Options::default() };
    let mut guest = bench.start(&memory, options);
    assert_eq!(guest.front.get_queue_num().unwrap(), 4);
    // Each queue has a part of the disk, and knows what must be in it.
    std::thread::scope(|scope| {
        for (index, queue) in (0u64..).zip(&mut guest.queues) {
            scope.spawn(move || {
                let part = DISK / 512 / 4;
                let mut model = BTreeMap::new();
                let mut state = index + 1;
                let mut random = |below: u64| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (state >> 33) % below
                };
                for round in 0..300u64 {
                    // A batch of requests to different blocks, in flight together.
                    let count = 1 + random(u64::from(queue.slots()) - 1) as u16;
                    let first = random(part / 8 - 64) * 8;
                    let mut asked = Vec::new();
                    for slot in 0..count {
                        let sector = index * part + first + u64::from(slot) * 8;
                        let write = random(2) == 0;
                        let ask = Ask::new(if write { kind::WRITE } else { kind::READ }, sector, 4096);
                        if write {
                            let value = (round + u64::from(slot)) as u8;
                            queue.data(slot, 4096).copy_from(&[value; 4096]);
                            model.insert(sector, value);
                        }
                        asked.push((write, sector));
                        queue.submit(slot, ask);
                    }
                    queue.kick();
                    let mut left: Vec<u16> = (0..count).collect();
                    while !left.is_empty() {
                        for Done { slot, status, written } in queue.wait() {
                            let place = left.iter().position(|&other| other == slot).expect("a request ends once");
                            left.swap_remove(place);
                            let (write, sector) = asked[usize::from(slot)];
                            assert_eq!((status, written), (0, if write { 1 } else { 4097 }));
                            if let (false, Some(&value)) = (write, model.get(&sector)) {
                                let mut bytes = [0; 4096];
                                queue.data(slot, 4096).copy_to(&mut bytes);
                                assert!(bytes == [value; 4096], "sector {sector}");
                            }
                        }
                    }
                }
            });
        }
    });
}

#[test]
fn the_driver_is_told_once_for_a_batch() {
    let bench = Bench::new(1, true);
    let memory = Memory::new(1);
    let mut guest = bench.start(&memory, Options::default());
    let queue = &mut guest.queues[0];
    for slot in 0..16 {
        queue.submit(slot, Ask::new(kind::WRITE, u64::from(slot) * 8, 4096));
    }
    assert!(queue.kick(), "a sleeping device wants to be notified");
    assert_eq!(queue.wait().len(), 16, "all at once");
    assert!(queue.call.read().is_err(), "and told once");
}

#[test]
fn configuration_space_and_the_cache_mode_are_as_negotiated() {
    let mut bench = Bench::new(3, true);
    let memory = Memory::new(3);
    let mut guest = bench.start(&memory, Options { queues: 3, ..Options::default() });
    let config = guest.config(60);
    assert_eq!(config[..8], (DISK / 512).to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!((config[32], config[34]), (1, 3));
    guest.front.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    assert_eq!(guest.config(60)[32], 0);
    assert_eq!(guest.write(0, &[9; 512]), 0);
    drop(guest);
    // The next front end begins afresh.
    let mut guest = bench.start(&memory, Options { queues: 3, ..Options::default() });
    assert_eq!(guest.config(60)[32], 1);
    drop(guest);
    std::fs::write(bench.scratch.path("large"), vec![0; 1 << 20]).unwrap();
    bench.add_node("large", true);
    bench.export("large", json!({ "logical-block-size": 4096, "writable": true, "writethrough": true }));
    let memory = Memory::new(1);
    let mut guest = FrontEnd::start(&bench.scratch.path("large.sock"), &memory, Options::default());
    let config = guest.config(60);
    assert_eq!((config[20..24].to_vec(), config[32]), (4096u32.to_le_bytes().to_vec(), 0));
    assert_eq!(guest.features & (1 << 11), 0, "the guest cannot switch a cache on");
    assert_eq!(guest.write(8, &[7; 4096]), 0);
    assert_eq!(guest.write(1, &[7; 4096]), 1, "not at a logical block");
    assert_eq!(guest.write(8, &[7; 512]), 1);
}

#[test]
fn a_front_end_that_comes_back_finds_its_disk() {
    let mut bench = Bench::new(1, true);
    for round in 1..20u8 {
        let memory = Memory::new(1);
        let mut guest = bench.start(&memory, Options::default());
        assert_eq!(guest.write(u64::from(round) * 8, &[round; 4096]), 0);
        let base = guest.front.get_vring_base(0).unwrap();
        assert_eq!(base, 1);
        // A queue that was stopped goes on where it stopped.
        guest.go(0..1, |queue| queue.available);
        assert!(guest.read(u64::from(round) * 8, 4096) == [round; 4096]);
    }
    let shown = bench.daemon.ok("query-block-exports", json!({}));
    assert_eq!(shown[0]["type"], "vhost-user-blk");
    let memory = Memory::new(1);
    let guest = bench.start(&memory, Options::default());
    let text = bench.daemon.error("block-export-del", json!({ "id": "disk" }));
    assert!(text.contains("still in use"), "{text}");
    bench.daemon.ok("block-export-del", json!({ "id": "disk", "mode": "hard" }));
    assert!(guest.was_hung_up_on());
}

#[test]
fn memory_may_come_and_go_region_by_region() {
    let bench = Bench::new(1, true);
    let memory = Memory::new(2);
    let mut guest = FrontEnd::greet(&bench.scratch.path("disk.sock"), &memory, Options::default());
    assert_eq!(guest.front.get_max_mem_slots().unwrap(), 32);
    guest.go(0..1, |_| 0);
    guest.read(0, 512);
    // A region beside the first: the guest's memory goes on in it without a gap.
    let other = Memory::new(1);
    let region = vhost::VhostUserMemoryRegionInfo {
        guest_phys_addr: memory.len,
        userspace_addr: 0x1234_0000_0000,
        ..other.region()
    };
    guest.front.add_mem_region(&region).unwrap();
    let queue = &mut guest.queues[0];
    queue.put_header(0, kind::READ, 0);
    queue.descriptor(0, queue.header_at(0), 16, front_end::NEXT, 1);
    queue.descriptor(1, memory.len - 1024, 2048, front_end::NEXT | front_end::WRITE, 2);
    queue.descriptor(2, queue.status_at(0), 1, front_end::WRITE, 0);
    queue.offer(0);
    queue.kick();
    assert_eq!(queue.wait(), [Done { slot: 0, status: 0, written: 2049 }]);
    let mut bytes = [0; 2048];
    memory.at(memory.len - 1024, 1024).copy_to(&mut bytes);
    other.at(0, 1024).copy_to(&mut bytes[1024..]);
    assert!(bytes[..] == bench.on_disk(0, 2048)[..], "a buffer that lies in both");
    guest.front.remove_mem_region(&region).unwrap();
    assert!(guest.read(0, 512) == bench.on_disk(0, 512));
    let queue = &mut guest.queues[0];
    queue.put_header(0, kind::READ, 0);
    queue.offer(0);
    queue.descriptor(0, queue.header_at(0), 16, front_end::NEXT, 1);
    queue.kick();
    assert!(guest.was_hung_up_on(), "the region has gone");
}

#[test]
fn compressed_clusters_reach_the_guest_over_a_buffer() {
    if !judges("compressed_clusters_reach_the_guest_over_a_buffer", &["qemu-img"]) {
        return;
    }
    let mut bench = Bench::new(1, false);
    let image = bench.scratch.name("packed");
    run("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", &bench.scratch.name("disk"), &image]);
    let file = File::open(&image).unwrap();
    bench.daemon.add_node("packed", "qcow2", &file, true);
    bench.export("packed", json!({}));
    let memory = Memory::new(1);
    let mut guest = FrontEnd::start(&bench.scratch.path("packed.sock"), &memory, Options::default());
    for at in (0..DISK).step_by(1 << 20) {
        let ask = Ask { pieces: 5, ..Ask::new(kind::READ, at / 512, SLOT) };
        assert!(guest.one(ask, &[]) == (0, bench.on_disk(at, SLOT as usize)));
    }
}

#[test]
fn a_front_end_hears_of_a_new_size_on_its_own_channel() {
    use std::io::Read;
    let scratch = Scratch::new();
    let disk = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&disk, 1 << 20).unwrap();
    let node = block::Graph::new().add(block::NodeSpec {
        name: Some("disk".into()),
        driver: "file",
        access: block::NodeAccess { writable: true, unmap: true },
        host: Some(block::Host::fixed(disk)),
        filename: "/dev/fdset/0".into(),
        children: [].into(),
        detached: [].into(),
        options: [].into(),
    });
    let node = node.unwrap();
    let settings = export::vhost_user_blk::Settings {
        id: "disk".into(),
        node: std::sync::Arc::clone(&node),
        writable: true,
        writethrough: false,
        block_size: 512,
        queues: 1,
        inflight: None,
        moved: None,
    };
    let listener = UnixListener::bind(scratch.path("sock")).unwrap();
    let workers = export::Workers::new();
    let export = export::vhost_user_blk::Export::start(listener.into(), settings, workers, || ()).unwrap();
    let memory = Memory::new(1);
    let mut guest = FrontEnd::start(&scratch.path("sock"), &memory, Options::default());
    assert!(guest.inflight.is_none(), "no memory to offer");
    assert_eq!(guest.config(8), 2048u64.to_le_bytes());
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    guest.front.set_backend_request_fd(&theirs).unwrap();
    node.resize(3 << 20, block::Preallocation::Off).unwrap();
    export::Running::size_changed(&export);
    let mut message = [0; 12];
    ours.read_exact(&mut message).unwrap();
    assert_eq!(message[..4], 2u32.to_ne_bytes(), "VHOST_USER_BACKEND_CONFIG_CHANGE_MSG");
    assert_eq!(message[8..], [0; 4]);
    assert_eq!(guest.config(8), 6144u64.to_le_bytes());
    assert_eq!(guest.write(6143, &[5; 512]), 0, "what is new can be used");
}

#[test]
fn every_descriptor_is_in_the_books_and_none_stays_when_a_front_end_has_gone() {
    let mut bench = Bench::new(2, true);
    let options = Options { queues: 2, ..Options::default() };
    let numbers = |bench: &mut Bench| {
        let books = bench.daemon.ok("query-descriptors", json!({}));
        let mut booked: Vec<i64> =
            books["descriptors"].as_array().unwrap().iter().map(|held| held["fd"].as_i64().unwrap()).collect();
        let mut open: Vec<i64> =
            bench.daemon.open_fds().iter().map(|fd| fd.split(' ').next().unwrap().parse().unwrap()).collect();
        booked.sort_unstable();
        open.sort_unstable();
        (booked, open)
    };
    let (_, before) = numbers(&mut bench);
    for _ in 0..3 {
        let memory = Memory::new(2);
        let mut guest = bench.start(&memory, options);
        let (_ours, theirs) = UnixStream::pair().unwrap();
        guest.front.set_backend_request_fd(&theirs).unwrap();
        guest.front.set_vring_err(0, &guest.queues[1].call).unwrap();
        guest.read(0, 4096);
        let (booked, open) = numbers(&mut bench);
        assert_eq!(booked, open);
        assert!(open.len() > before.len());
    }
    bench.daemon.ok("block-export-del", json!({ "id": "disk", "mode": "hard" }));
    // The export's own descriptors go, too, and the reserve has given its memory file away for good.
    loop {
        let (booked, open) = numbers(&mut bench);
        if bench.daemon.ok("query-block-exports", json!({})) == json!([]) && booked == open {
            assert!(open.len() < before.len());
            break;
        }
    }
}

#[test]
fn options_that_cannot_be_are_refused_with_a_sentence() {
    let mut bench = Bench::new(1, false);
    let mut refused = |options: serde_json::Value| {
        let mut export = json!({ "type": "vhost-user-blk", "id": "x", "node-name": "disk",
            "addr": { "type": "unix", "path": "/tmp/x.sock" } });
        export.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        bench.daemon.error("block-export-add", export)
    };
    let path = refused(json!({}));
    assert!(path.contains("binds nothing") && path.contains("getfd"), "{path}");
    assert!(refused(json!({ "num-queues": 0 })).contains("1 to 128"));
    assert!(refused(json!({ "num-queues": 129 })).contains("1 to 128"));
    assert!(refused(json!({ "logical-block-size": 1000 })).contains("power of two"));
    assert!(refused(json!({ "logical-block-size": 256 })).contains("power of two"));
    assert!(refused(json!({ "logical-block-size": 1 << 22 })).contains("power of two"));
    assert!(refused(json!({ "writable": true })).contains("read-only"));
    assert!(refused(json!({ "addr": { "type": "fd", "str": "nobody" } })).contains("nobody"));
    let (end, _other) = UnixStream::pair().unwrap();
    bench.daemon.ok_with("getfd", json!({ "fdname": "pair" }), end.as_fd());
    let text = bench.daemon.error(
        "block-export-add",
        json!({ "type": "vhost-user-blk", "id": "x", "node-name": "disk", "addr": { "type": "fd", "str": "pair" } }),
    );
    assert!(text.contains("not a listening socket"), "{text}");
}
