// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hostile guests and front ends: each loses its own device, and the daemon serves everybody else as before.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

mod front_end;
mod harness;

use std::fs::File;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use front_end::{Ask, FrontEnd, INDIRECT, Memory, NEXT, Options, Queue, TABLE_FLAG, USER, WRITE, connect, kind};
use harness::{Scratch, TestDaemon, noise};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::json;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

/// A daemon with two exports of two disks: one for the hostile, one for the others.
struct Bench {
    daemon: TestDaemon,
    scratch: Scratch,
}

impl Bench {
    fn new() -> Bench {
        let mut bench = Bench { daemon: TestDaemon::start(), scratch: Scratch::new() };
        for id in ["hostile", "other"] {
            std::fs::write(bench.scratch.path(id), noise(1 << 20, 5)).unwrap();
            let file = File::options().read(true).write(true).open(bench.scratch.path(id)).unwrap();
            bench.daemon.add_node(id, "raw", &file, false);
            let listener = UnixListener::bind(bench.socket(id)).unwrap();
            bench.daemon.ok_with("getfd", json!({ "fdname": id }), &listener);
            let export = json!({ "type": "vhost-user-blk", "id": id, "node-name": id, "writable": true,
                "num-queues": 2, "addr": { "type": "fd", "str": id } });
            bench.daemon.ok("block-export-add", export);
        }
        bench
    }

    fn socket(&self, id: &str) -> PathBuf {
        self.scratch.path(&format!("{id}.sock"))
    }

    /// Runs `attack` beside a peaceful guest, who must notice nothing; afterwards the attacked disk serves the next guest.
    fn under(attack: impl FnOnce(&mut Bench, &Memory)) {
        let mut bench = Bench::new();
        let peaceful = Memory::new(1);
        let mut other = FrontEnd::start(&bench.socket("other"), &peaceful, Options::default());
        assert_eq!(other.write(8, &[3; 4096]), 0);
        attack(&mut bench, &Memory::new(2));
        assert!(other.read(8, 4096) == [3; 4096], "the other guest's disk is as it was");
        assert_eq!(other.write(16, &[4; 4096]), 0);
        let next = Memory::new(1);
        let mut guest = FrontEnd::start(&bench.socket("hostile"), &next, Options::default());
        assert!(guest.read(0, 4096) == noise(1 << 20, 5)[..4096], "the next guest is served");
        assert_eq!(bench.daemon.ok("query-block-exports", json!({})).as_array().unwrap().len(), 2);
    }

    /// Runs a guest that spoils its ring by `spoil`, and must lose its device by that.
    fn ring(spoil: impl FnOnce(&mut Queue<'_>)) {
        Bench::under(|bench, memory| {
            let mut guest = FrontEnd::start(&bench.socket("hostile"), memory, Options::default());
            guest.read(0, 512);
            spoil(&mut guest.queues[0]);
            guest.queues[0].kick.write(1).unwrap();
            assert!(guest.was_hung_up_on());
        });
    }
}

/// A read of 512 bytes as a direct chain 1, 2, 3.
fn sound_chain(queue: &mut Queue<'_>) {
    queue.put_header(0, kind::READ, 0);
    queue.descriptor(1, queue.header_at(0), 16, NEXT, 2);
    queue.descriptor(2, queue.data_at(0), 512, NEXT | WRITE, 3);
    queue.descriptor(3, queue.status_at(0), 1, WRITE, 0);
    queue.offer(1);
}

// Case 70: chains.

#[test]
fn a_chain_without_end_ends_the_device() {
    Bench::ring(|queue| {
        sound_chain(queue);
        queue.descriptor(3, queue.status_at(0), 1, WRITE | NEXT, 2);
    });
}

#[test]
fn an_indirect_table_of_4_gib_ends_the_device() {
    Bench::ring(|queue| {
        sound_chain(queue);
        queue.descriptor(1, queue.table_at(0), !15, TABLE_FLAG, 0);
    });
}

#[test]
fn an_indirect_table_of_half_a_descriptor_ends_the_device() {
    Bench::ring(|queue| {
        sound_chain(queue);
        queue.descriptor(1, queue.table_at(0), 24, TABLE_FLAG, 0);
    });
}

#[test]
fn an_indirect_table_in_an_indirect_table_ends_the_device() {
    Bench::ring(|queue| {
        sound_chain(queue);
        queue.descriptor(1, queue.table_at(0), 16, TABLE_FLAG, 0);
        let table = queue.table(0);
        queue.describe(table, 0, queue.table_at(0), 16, TABLE_FLAG, 0);
    });
}

#[test]
fn an_indirect_table_with_a_successor_ends_the_device() {
    Bench::ring(|queue| {
        sound_chain(queue);
        queue.descriptor(1, queue.table_at(0), 48, TABLE_FLAG | NEXT, 2);
    });
}

#[test]
fn a_buffer_over_the_end_of_memory_ends_the_device() {
    Bench::ring(|queue| {
        sound_chain(queue);
        queue.descriptor(2, 2 * front_end::QUEUE - 256, 512, NEXT | WRITE, 3);
    });
}

#[test]
fn a_buffer_at_the_end_of_all_addresses_ends_the_device() {
    Bench::ring(|queue| {
        sound_chain(queue);
        queue.descriptor(2, u64::MAX - 255, 512, NEXT | WRITE, 3);
    });
}

#[test]
fn a_buffer_to_read_behind_one_to_write_ends_the_device() {
    Bench::ring(|queue| {
        sound_chain(queue);
        queue.descriptor(1, queue.header_at(0), 16, NEXT | WRITE, 2);
        queue.descriptor(2, queue.data_at(0), 512, NEXT, 3);
    });
}

#[test]
fn a_chain_without_room_for_a_status_ends_the_device() {
    Bench::ring(|queue| {
        sound_chain(queue);
        queue.descriptor(2, queue.data_at(0), 512, 0, 0);
    });
}

#[test]
fn a_header_of_three_bytes_ends_the_device() {
    Bench::ring(|queue| {
        sound_chain(queue);
        queue.descriptor(1, queue.header_at(0), 3, NEXT, 2);
    });
}

#[test]
fn a_buffer_without_bytes_ends_the_device() {
    Bench::ring(|queue| {
        sound_chain(queue);
        queue.descriptor(2, queue.data_at(0), 0, NEXT | WRITE, 3);
    });
}

#[test]
fn a_successor_beyond_the_table_ends_the_device() {
    Bench::ring(|queue| {
        sound_chain(queue);
        queue.descriptor(1, queue.header_at(0), 16, NEXT, 64);
    });
}

#[test]
fn a_request_that_reads_into_the_ring_itself_harms_nobody_else() {
    Bench::under(|bench, memory| {
        let mut guest = FrontEnd::start(&bench.socket("hostile"), memory, Options::default());
        let queue = &mut guest.queues[0];
        sound_chain(queue);
        // The disk's noise over the descriptors and both rings, again and again.
        queue.descriptor(2, 0, 128 << 10, NEXT | WRITE, 3);
        for _ in 0..3 {
            queue.offer(1);
            queue.kick.write(1).unwrap();
        }
        assert!(guest.was_hung_up_on());
    });
}

// Case 71: indices and sizes.

#[test]
fn a_jump_of_the_available_index_ends_the_device() {
    Bench::ring(|queue| queue.set_available(queue.available.wrapping_add(65)));
}

#[test]
fn an_available_index_that_goes_back_ends_the_device() {
    Bench::ring(|queue| queue.set_available(queue.available.wrapping_sub(1)));
}

#[test]
fn a_head_beyond_the_table_ends_the_device() {
    Bench::ring(|queue| queue.offer(64));
}

#[test]
fn a_ring_of_a_size_that_cannot_be_is_refused() {
    for size in [0, 3, 100] {
        Bench::under(|bench, memory| {
            let guest = FrontEnd::greet(&bench.socket("hostile"), memory, Options::default());
            assert!(guest.front.set_vring_num(0, size).is_err());
            assert!(guest.was_hung_up_on());
        });
    }
}

#[test]
fn a_running_ring_keeps_its_size_and_position() {
    Bench::under(|bench, memory| {
        let guest = FrontEnd::start(&bench.socket("hostile"), memory, Options::default());
        assert!(guest.front.set_vring_num(0, 32).is_err());
        assert!(guest.was_hung_up_on());
    });
    Bench::under(|bench, memory| {
        let guest = FrontEnd::start(&bench.socket("hostile"), memory, Options::default());
        assert!(guest.front.set_vring_base(0, 7).is_err());
        assert!(guest.was_hung_up_on());
    });
}

#[test]
fn a_ring_may_move_only_to_where_it_fits() {
    let moved = |change: fn(&mut VringConfigData)| {
        Bench::under(|bench, memory| {
            let guest = FrontEnd::start(&bench.socket("hostile"), memory, Options::default());
            let mut at = guest.queues[0].addresses();
            guest.front.set_vring_addr(0, &at).unwrap();
            change(&mut at);
            assert!(guest.front.set_vring_addr(0, &at).is_err());
            assert!(guest.was_hung_up_on());
        });
    };
    moved(|at| at.desc_table_addr = USER + 2 * front_end::QUEUE - 512);
    moved(|at| at.used_ring_addr = 16);
    moved(|at| at.avail_ring_addr = u64::MAX - 1);
    moved(|at| at.avail_ring_addr += 1);
    moved(|at| at.desc_table_addr += 8);
}

#[test]
fn a_queue_that_there_is_not_is_refused() {
    Bench::under(|bench, _| {
        let memory = Memory::new(3);
        let guest = FrontEnd::greet(&bench.socket("hostile"), &memory, Options { queues: 3, ..Options::default() });
        assert!(guest.front.set_vring_num(2, 64).is_err());
        assert!(guest.was_hung_up_on());
    });
}

#[test]
fn a_notification_that_its_front_end_has_filled_holds_up_no_removal() {
    let mut bench = Bench::new();
    let memory = Memory::new(1);
    let mut guest = FrontEnd::start(&bench.socket("hostile"), &memory, Options::default());
    guest.read(0, 512);
    let full = EventFd::new(0).unwrap();
    full.write(u64::MAX - 1).unwrap();
    guest.front.set_vring_call(0, &full).unwrap();
    let queue = &mut guest.queues[0];
    queue.listen();
    queue.submit(0, Ask::new(kind::READ, 0, 512));
    queue.kick.write(1).unwrap();
    while queue.done().is_empty() {}
    guest.front.set_vring_call(0, &guest.queues[0].call).unwrap();
    bench.daemon.ok("block-export-del", json!({ "id": "hostile", "mode": "hard" }));
    assert!(guest.was_hung_up_on());
    while bench.daemon.ok("query-block-exports", json!({})).as_array().unwrap().len() > 1 {}
}

// Case 72: memory.

#[test]
fn memory_that_is_cut_off_ends_the_device_and_not_the_daemon() {
    Bench::under(|bench, _| {
        let memory = Memory::new(1);
        let guest = FrontEnd::start(&bench.socket("hostile"), &memory, Options::default());
        ftruncate(&memory.fd, 0).unwrap();
        guest.queues[0].kick.write(1).unwrap();
        assert!(guest.was_hung_up_on());
    });
}

#[test]
fn memory_that_is_cut_off_under_a_request_ends_the_device_at_most() {
    Bench::under(|bench, _| {
        let memory = Memory::new(1);
        let mut guest = FrontEnd::start(&bench.socket("hostile"), &memory, Options::default());
        let queue = &mut guest.queues[0];
        for slot in 0..64 {
            queue.submit(slot, Ask::new(kind::READ, 0, 64 << 10));
        }
        queue.kick.write(1).unwrap();
        // The rings stay, the data goes while it is being read into.
        ftruncate(&memory.fd, front_end::DATA).unwrap();
        queue.wait();
    });
}

#[test]
fn memory_shorter_than_it_is_said_to_be_ends_the_device() {
    Bench::under(|bench, memory| {
        let mut guest = FrontEnd::greet(&bench.socket("hostile"), memory, Options::default());
        let short = memfd_create("short", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&short, 4096).unwrap();
        let region =
            VhostUserMemoryRegionInfo { mmap_handle: std::os::fd::AsRawFd::as_raw_fd(&short), ..memory.region() };
        guest.front.set_mem_table(&[region]).unwrap();
        let queue = &guest.queues[0];
        guest.front.set_vring_num(0, 64).unwrap();
        guest.front.set_vring_base(0, 0).unwrap();
        guest.front.set_vring_addr(0, &queue.addresses()).unwrap();
        guest.front.set_vring_call(0, &queue.call).unwrap();
        // The ring begins in what is there and ends in what is not.
        let _ = guest.front.set_vring_kick(0, &queue.kick);
        let _ = guest.front.set_vring_enable(0, true);
        assert!(guest.was_hung_up_on());
    });
}

/// Sends a message as it is, with descriptors, and waits for the end.
fn raw(bench: &Bench, number: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut socket = connect(&bench.socket("hostile"));
    let header = [number, 1, payload.len() as u32].map(u32::to_ne_bytes);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    let bytes = [header.as_flattened(), payload].concat();
    sendmsg(&socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
    assert_eq!(socket.read(&mut [0; 64]).unwrap_or(0), 0, "request {number} is not answered");
}

fn table(regions: &[[u64; 4]]) -> Vec<u8> {
    let mut bytes = (regions.len() as u64).to_ne_bytes().to_vec();
    bytes.extend(regions.iter().flatten().flat_map(|number| number.to_ne_bytes()));
    bytes
}

#[test]
fn a_table_of_33_regions_is_refused() {
    Bench::under(|bench, memory| {
        let regions: Vec<[u64; 4]> =
            (0..33).map(|index| [index << 12, 4096, USER + (index << 12), index << 12]).collect();
        raw(bench, 5, &table(&regions), &[memory.fd.as_fd(); 33]);
        raw(bench, 5, &table(&[]), &[]);
    });
}

#[test]
fn regions_without_their_descriptors_are_refused() {
    Bench::under(|bench, memory| {
        let regions = [[0, 4096, USER, 0], [4096, 4096, USER + 4096, 4096]];
        raw(bench, 5, &table(&regions), &[memory.fd.as_fd()]);
        raw(bench, 5, &table(&regions), &[memory.fd.as_fd(); 3]);
        raw(bench, 5, &table(&regions), &[]);
    });
}

#[test]
fn descriptors_of_the_wrong_kind_are_refused() {
    Bench::under(|bench, memory| {
        let (socket, _other) = UnixStream::pair().unwrap();
        let (pipe, _end) = rustix::pipe::pipe().unwrap();
        raw(bench, 5, &table(&[[0, 4096, USER, 0]]), &[socket.as_fd()]);
        raw(bench, 5, &table(&[[0, 4096, USER, 0]]), &[pipe.as_fd()]);
        let read_only = File::open(bench.scratch.path("hostile")).unwrap();
        raw(bench, 5, &table(&[[0, 4096, USER, 0]]), &[read_only.as_fd()]);
        // Notifications must be events: a pipe could make the device wait.
        for number in [12, 13, 14] {
            raw(bench, number, &0u64.to_ne_bytes(), &[pipe.as_fd()]);
            raw(bench, number, &0u64.to_ne_bytes(), &[memory.fd.as_fd()]);
        }
    });
}

#[test]
fn regions_that_overlap_or_wrap_are_refused() {
    Bench::under(|bench, memory| {
        let two = [memory.fd.as_fd(); 2];
        raw(bench, 5, &table(&[[0, 8192, USER, 0], [4096, 8192, USER + (1 << 20), 0]]), &two);
        raw(bench, 5, &table(&[[u64::MAX - 4095, 8192, USER, 0]]), &two[..1]);
        raw(bench, 5, &table(&[[0, 8192, u64::MAX - 4095, 0]]), &two[..1]);
        raw(bench, 5, &table(&[[0, u64::MAX, 0, 0]]), &two[..1]);
        raw(bench, 5, &table(&[[0, 0, USER, 0]]), &two[..1]);
        raw(bench, 5, &table(&[[0, 4096, USER, u64::MAX]]), &two[..1]);
    });
}

#[test]
fn messages_that_no_front_end_sends_are_refused() {
    Bench::under(|bench, memory| {
        raw(bench, 99, &[], &[]);
        raw(bench, 0, &[], &[]);
        raw(bench, 2, &[0; 7], &[]);
        raw(bench, 2, &u64::MAX.to_ne_bytes(), &[]);
        raw(bench, 1, &[0; 8], &[]);
        raw(bench, 1, &[], &[memory.fd.as_fd()]);
        raw(bench, 12, &0x400u64.to_ne_bytes(), &[]);
        raw(bench, 25, &[[0u32, 1, 0].map(u32::to_ne_bytes).as_flattened(), &[1]].concat(), &[]);
        raw(bench, 25, &[1; 40], &[]);
    });
}

#[test]
fn half_a_message_holds_up_no_removal() {
    let mut bench = Bench::new();
    let mut socket = connect(&bench.socket("hostile"));
    let whole = [1u32, 1, 0].map(u32::to_ne_bytes);
    std::io::Write::write_all(&mut socket, &[whole.as_flattened(), &whole[0], &[1]].concat()).unwrap();
    socket.read_exact(&mut [0; 20]).unwrap();
    assert!(bench.daemon.error("block-export-del", json!({ "id": "hostile" })).contains("in use"));
    bench.daemon.ok("block-export-del", json!({ "id": "hostile", "mode": "hard" }));
    assert_eq!(socket.read(&mut [0; 8]).unwrap_or(0), 0);
}

// Case 73: in-flight memory.

#[test]
fn in_flight_memory_that_is_forged_ends_the_device() {
    let forged = |offset: u64, number: u16| {
        Bench::under(|bench, memory| {
            let mut guest = FrontEnd::start(&bench.socket("hostile"), memory, Options::default());
            guest.read(0, 512);
            let (_, file) = guest.inflight.as_ref().unwrap();
            file.write_all_at(&number.to_le_bytes(), offset).unwrap();
            // The last batch is one request longer than the memory says: its list is followed.
            guest.front.get_vring_base(0).unwrap();
            file.write_all_at(&0u16.to_le_bytes(), 14).unwrap();
            file.write_all_at(&number.to_le_bytes(), offset).unwrap();
            let queue = &guest.queues[0];
            let _ = guest.front.set_vring_kick(0, &queue.kick);
            assert!(guest.was_hung_up_on());
        });
    };
    forged(8, 2);
    forged(10, 63);
    forged(12, 64);
    forged(14, 5000);
}

#[test]
fn in_flight_memory_that_is_short_or_for_other_queues_is_refused() {
    Bench::under(|bench, memory| {
        for (len, queues, size) in [(63, 1, 64), (1039, 1, 64), (4096, 1, 0), (4096, 0, 64), (u64::MAX, 1, 64)] {
            let mut payload = [len, 0u64].map(u64::to_ne_bytes).as_flattened().to_vec();
            payload.extend([queues, size, 0u16, 0].map(u16::to_ne_bytes).as_flattened());
            raw(bench, 32, &payload, &[memory.fd.as_fd()]);
        }
        let mut guest = FrontEnd::greet(&bench.socket("hostile"), memory, Options::default());
        let wanted = VhostUserInflight { num_queues: 3, queue_size: 64, ..Default::default() };
        assert!(guest.front.get_inflight_fd(&wanted).is_err(), "there are two queues");
    });
}

#[test]
fn in_flight_memory_that_is_cut_off_ends_the_device() {
    Bench::under(|bench, memory| {
        let mut guest = FrontEnd::start(&bench.socket("hostile"), memory, Options::default());
        guest.read(0, 512);
        guest.inflight.as_ref().unwrap().1.set_len(0).unwrap();
        guest.queues[0].submit(0, Ask::new(kind::READ, 0, 512));
        guest.queues[0].kick.write(1).unwrap();
        assert!(guest.was_hung_up_on());
        assert_eq!(guest.features & INDIRECT, INDIRECT);
    });
}
