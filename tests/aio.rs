// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads that must wait, through rings and through threads: the same bytes, and no way out of the sandbox.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use harness::{Scratch, Serve, TestDaemon, doorless, judges, noise, program, run, text};
use manager::daemon::{Daemon, Launch};
use serde_json::{Value, json};

const BLOCK: usize = 4096;
const SIZE: usize = 4 << 20;

/// Whether this machine gives rings; said aloud if not.
fn has_rings(test: &str) -> bool {
    match sys::ring::Ring::new(2) {
        Ok(_) => true,
        Err(e) => {
            eprintln!("skipped: {test}: no io_uring here: {e}");
            false
        }
    }
}

/// A disk that is served past the cache, so that every read waits; `None`, said aloud, where there is no `O_DIRECT`.
fn serve(test: &str, disk: &str, format: &str, aio: &str) -> Option<Serve> {
    let socket = format!("{disk}.{aio}");
    let arguments = ["serve", "--direct", "--read-only", "--format", format, "--aio", aio, "--socket", &socket, disk];
    let flags = rustix::fs::OFlags::DIRECT | rustix::fs::OFlags::RDONLY;
    if let Err(e) = rustix::fs::open(disk, flags, rustix::fs::Mode::empty()) {
        eprintln!("skipped: {test}: the temporary directory has no O_DIRECT: {e}");
        return None;
    }
    Some(Serve::start(&arguments[1..]))
}

/// A client that has chosen the default export, with simple replies.
fn client(disk: &str, aio: &str) -> UnixStream {
    let mut socket = UnixStream::connect(format!("{disk}.{aio}")).unwrap();
    negotiate(&mut socket, b"");
    socket
}

/// Chooses that export.
fn negotiate(socket: &mut UnixStream, export: &[u8]) {
    socket.read_exact(&mut [0; 18]).unwrap();
    let (option, len) = (1u32.to_be_bytes(), u32::try_from(export.len()).unwrap().to_be_bytes());
    socket.write_all(&[&3u32.to_be_bytes()[..], b"IHAVEOPT", &option, &len, export].concat()).unwrap();
    socket.read_exact(&mut [0; 10]).unwrap();
}

/// Asks for all `blocks` at once, and checks every answer, in whatever order they come.
fn read_at_once(socket: &mut UnixStream, blocks: &[u64], disk: &[u8]) {
    let requests: Vec<u8> = blocks
        .iter()
        .flat_map(|block| {
            let (cookie, offset) = (block.to_be_bytes(), (block * BLOCK as u64).to_be_bytes());
            [&0x2560_9513u32.to_be_bytes()[..], &[0; 4], &cookie, &offset, &4096u32.to_be_bytes()].concat()
        })
        .collect();
    socket.write_all(&requests).unwrap();
    let mut missing = blocks.to_vec();
    while !missing.is_empty() {
        let mut reply = [0; 16 + BLOCK];
        socket.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], "a reply without error");
        let block = u64::from_be_bytes(reply[8..16].try_into().unwrap());
        missing.remove(missing.iter().position(|&other| other == block).expect("a request under way"));
        let at = usize::try_from(block).unwrap() * BLOCK;
        assert!(reply[16..] == disk[at..at + BLOCK], "block {block}");
    }
}

/// Threads of that name.
fn threads(pid: u32, name: &str) -> usize {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.filter(|task| fs::read_to_string(task.as_ref().unwrap().path().join("comm")).unwrap().trim() == name).count()
}

#[test]
fn many_reads_that_wait_are_answered_by_a_ring_without_any_worker() {
    let name = "many_reads_that_wait_are_answered_by_a_ring_without_any_worker";
    if !judges(name, &["qemu-img"]) || !has_rings(name) {
        return;
    }
    let scratch = Scratch::new();
    let content = noise(SIZE, 11);
    fs::write(scratch.path("disk.raw"), &content).unwrap();
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &scratch.name("disk.raw"), &scratch.name("disk.qcow2")]);
    let blocks: Vec<u64> = (0..48).map(|index| index * 397 % (SIZE / BLOCK) as u64).collect();
    for format in ["raw", "qcow2"] {
        let disk = scratch.name(&format!("disk.{format}"));
        for (aio, with_workers) in [("io_uring", false), ("auto", false), ("threads", true)] {
            let Some(serve) = serve(name, &disk, format, aio) else { return };
            let mut socket = client(&disk, aio);
            if format == "qcow2" {
                // Its tables are read by whoever needs them first.
                read_at_once(&mut socket, &[5], &content);
            }
            for _ in 0..20 {
                read_at_once(&mut socket, &blocks, &content);
            }
            assert_eq!(threads(serve.daemon_pid(), "worker") > 0, with_workers, "{format}, {aio}");
        }
    }
}

#[test]
fn more_clients_than_rings_and_clients_that_leave_in_the_middle_get_their_bytes() {
    let name = "more_clients_than_rings_and_clients_that_leave_in_the_middle_get_their_bytes";
    let scratch = Scratch::new();
    let content = noise(SIZE, 12);
    let disk = scratch.name("disk.raw");
    fs::write(&disk, &content).unwrap();
    let Some(_serve) = serve(name, &disk, "raw", "auto") else { return };
    let blocks: Vec<u64> = (0..32).map(|index| index * 31).collect();
    for _ in 0..3 {
        let mut clients: Vec<UnixStream> = (0..40).map(|_| client(&disk, "auto")).collect();
        for socket in &mut clients {
            read_at_once(socket, &blocks, &content);
        }
        for mut socket in clients {
            // Asked for, and not waited for.
            let request = [&0x2560_9513u32.to_be_bytes()[..], &[0; 20], &(1u32 << 20).to_be_bytes()].concat();
            socket.write_all(&request.repeat(8)).unwrap();
        }
    }
    read_at_once(&mut client(&disk, "auto"), &blocks, &content);
}

/// A daemon that serves an `O_DIRECT` descriptor of a raw disk; `None`, said aloud, where there is none.
fn direct_daemon(test: &str, scratch: &Scratch, content: &[u8]) -> Option<TestDaemon> {
    fs::write(scratch.path("disk.raw"), content).unwrap();
    let open = |access| {
        let flags = rustix::fs::OFlags::DIRECT | rustix::fs::OFlags::CLOEXEC | access;
        rustix::fs::open(scratch.path("disk.raw"), flags, rustix::fs::Mode::empty())
    };
    let disk = match open(rustix::fs::OFlags::RDWR) {
        Ok(disk) => disk,
        Err(e) => {
            eprintln!("skipped: {test}: the temporary directory has no O_DIRECT: {e}");
            return None;
        }
    };
    let mut daemon = TestDaemon::start();
    let set = daemon.add_fd(disk);
    // For the time when it is below an overlay.
    daemon.ok_with("add-fd", json!({ "fdset-id": set }), open(rustix::fs::OFlags::RDONLY).unwrap());
    let file = json!({ "driver": "file", "filename": format!("/dev/fdset/{set}"), "cache": { "direct": true } });
    let node = json!({ "driver": "raw", "node-name": "disk", "file": file, "cache": { "direct": true } });
    daemon.ok("blockdev-add", node);
    daemon.start_nbd();
    daemon.export("disk", true);
    Some(daemon)
}

/// Asks for `count` reads of `len` bytes and takes no answer.
fn ask(socket: &mut UnixStream, count: usize, len: u32) {
    let request = [&0x2560_9513u32.to_be_bytes()[..], &[0; 20], &len.to_be_bytes()].concat();
    socket.write_all(&request.repeat(count)).unwrap();
}

fn connect(daemon: &TestDaemon) -> UnixStream {
    let mut socket = UnixStream::connect(daemon.socket()).unwrap();
    negotiate(&mut socket, b"disk");
    socket
}

/// Resident memory, KiB.
fn resident(pid: u32) -> u64 {
    memory(pid, "VmRSS:")
}

fn memory(pid: u32, what: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(what)).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn a_client_that_never_reads_costs_no_more_memory_than_is_documented() {
    let name = "a_client_that_never_reads_costs_no_more_memory_than_is_documented";
    let documented = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/performance.md")).unwrap();
    let (before, _) = documented.split_once(" MiB of memory per NBD client").unwrap();
    let most: u64 = before.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap();
    let scratch = Scratch::new();
    let content = noise(SIZE, 15);
    let Some(daemon) = direct_daemon(name, &scratch, &content) else { return };
    read_at_once(&mut connect(&daemon), &[1, 2, 3], &content);
    let at_first = memory(daemon.pid(), "VmHWM:");
    let mut silent: Vec<UnixStream> = (0..3).map(|_| connect(&daemon)).collect();
    // More than 1 GiB of answers for each.
    silent.iter_mut().for_each(|socket| ask(socket, 1100, 1 << 20));
    let mut calm = connect(&daemon);
    let (mut last, mut unchanged) = (0, 0);
    // Until no more is being done for them.
    while unchanged < 50 {
        read_at_once(&mut calm, &[4, 5, 6, 7], &content);
        let now = resident(daemon.pid());
        unchanged = if now == last { unchanged + 1 } else { 0 };
        last = now;
    }
    let grown = (memory(daemon.pid(), "VmHWM:") - at_first) >> 10;
    assert!(grown <= 3 * most, "{grown} MiB for 3 clients, documented are {most} MiB each");
    daemon.daemon.stop().unwrap();
}

#[test]
fn clients_share_the_buffers_that_they_do_not_need_at_once() {
    let scratch = Scratch::new();
    let content = noise(SIZE, 16);
    fs::write(scratch.path("disk.raw"), &content).unwrap();
    let disk = File::options().read(true).write(true).open(scratch.path("disk.raw")).unwrap();
    let mut daemon = TestDaemon::start();
    daemon.add_node("disk", "raw", disk, false);
    daemon.start_nbd();
    daemon.export("disk", true);
    let blocks: Vec<u64> = (0..32).map(|index| index * 7).collect();
    read_at_once(&mut connect(&daemon), &blocks, &content);
    let at_first = resident(daemon.pid());
    let mut clients: Vec<UnixStream> = (0..80).map(|_| connect(&daemon)).collect();
    clients.iter_mut().for_each(|socket| read_at_once(socket, &blocks, &content));
    let each = (resident(daemon.pid()) - at_first) / 80;
    assert!(each < 64, "{each} KiB for each client, who asked for 128 KiB at once and has them");
    daemon.daemon.stop().unwrap();
}

#[test]
fn clients_that_die_with_reads_under_way_leave_nothing_behind() {
    let name = "clients_that_die_with_reads_under_way_leave_nothing_behind";
    let scratch = Scratch::new();
    let content = noise(SIZE, 13);
    let Some(mut daemon) = direct_daemon(name, &scratch, &content) else { return };
    let mut after_some = 0;
    for round in 0..30 {
        let mut clients: Vec<UnixStream> = (0..4).map(|_| connect(&daemon)).collect();
        for (index, socket) in clients.iter_mut().enumerate() {
            // Small ones, and such as are longer than a socket takes; some of each after the first answer.
            ask(socket, 60, if index % 2 == 0 { 4096 } else { 1 << 20 });
            if round % 2 == 0 {
                socket.read_exact(&mut [0; 16]).unwrap();
            }
        }
        drop(clients);
        if round == 10 {
            read_at_once(&mut connect(&daemon), &[1, 2, 3], &content);
            after_some = resident(daemon.pid());
        }
    }
    read_at_once(&mut connect(&daemon), &[1, 2, 3], &content);
    // It is gone as soon as nobody uses it, and cannot be removed otherwise.
    daemon.ok("block-export-del", json!({ "id": "disk", "mode": "hard" }));
    while daemon.daemon.next_event().unwrap().0 != "BLOCK_EXPORT_DELETED" {}
    daemon.ok("blockdev-del", json!({ "node-name": "disk" }));
    let at_last = resident(daemon.pid());
    assert!(at_last < after_some + (16 << 10), "{after_some} KiB, then {at_last} KiB");
    daemon.daemon.stop().unwrap();
}

#[test]
fn a_client_that_never_reads_holds_up_no_overlay() {
    let name = "a_client_that_never_reads_holds_up_no_overlay";
    if !judges(name, &["qemu-img"]) {
        return;
    }
    let scratch = Scratch::new();
    let content = noise(SIZE, 14);
    let Some(mut daemon) = direct_daemon(name, &scratch, &content) else { return };
    // As many as a ring has room for, and more bytes than the sockets take.
    let mut silent: Vec<UnixStream> = (0..3).map(|_| connect(&daemon)).collect();
    silent.iter_mut().for_each(|socket| ask(socket, 200, 1 << 20));
    read_at_once(&mut connect(&daemon), &[4], &content);
    let size = SIZE.to_string();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &scratch.name("over.qcow2"), &size]);
    let over = File::options().read(true).write(true).open(scratch.path("over.qcow2")).unwrap();
    let set = daemon.add_fd(over);
    let file = json!({ "driver": "file", "filename": format!("/dev/fdset/{set}") });
    daemon.ok("blockdev-add", json!({ "driver": "qcow2", "node-name": "over", "file": file, "backing": null }));
    // Its patience with requests under way has an end.
    daemon.ok("blockdev-snapshot", json!({ "node": "disk", "overlay": "over" }));
    read_at_once(&mut connect(&daemon), &[0, 7, 1000], &content);
    // Who reads at last gets it all.
    let mut first = silent.remove(0);
    for _ in 0..200 {
        let mut reply = vec![0; 16 + (1 << 20)];
        first.read_exact(&mut reply).unwrap();
        assert!(reply[..8] == [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0] && reply[16..] == content[..1 << 20]);
    }
    daemon.daemon.stop().unwrap();
}

#[test]
fn its_own_rings_are_no_way_out() {
    if !has_rings("its_own_rings_are_no_way_out") {
        return;
    }
    let scratch = Scratch::new();
    fs::write(scratch.path("disk.raw"), noise(BLOCK, 1)).unwrap();
    let mut daemon = TestDaemon::start();
    daemon.add_fd(File::open(scratch.path("disk.raw")).unwrap());
    let tried = daemon.ok("query-confinement", json!({ "try": true }));
    let through: Vec<&Value> = tried["attempts"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|attempt| attempt["name"].as_str().unwrap().starts_with("ring-"))
        .collect();
    let expected = ["openat", "openat2", "socket", "connect", "write", "unlinkat", "link", "register"];
    assert_eq!(through.len(), expected.len(), "{through:?}");
    for (attempt, name) in through.into_iter().zip(expected) {
        // The ring refuses for itself; what is not asked through it, the filter.
        let errno = if name == "register" { "EPERM" } else { "EACCES" };
        assert_eq!(attempt["name"], format!("ring-{name}"));
        assert_eq!((&attempt["denied"], &attempt["errno"]), (&json!(true), &json!(errno)), "{attempt}");
    }
    assert!(tried["rings"].as_str().unwrap().contains("nothing but read"), "{}", tried["rings"]);
}

#[test]
fn a_daemon_without_rings_says_why() {
    let launch = Launch { aio: Some("threads".into()), ..Launch::default() };
    let mut daemon = Daemon::start_with(&program(), &launch).unwrap();
    let answer = daemon.execute("query-confinement", json!({}), &[]).unwrap();
    assert!(answer["rings"].as_str().unwrap().contains("--aio=threads"), "{}", answer["rings"]);
}

#[test]
fn a_choice_that_cannot_be_had_is_refused() {
    let scratch = Scratch::new();
    fs::write(scratch.path("disk.raw"), noise(BLOCK, 1)).unwrap();
    let (status, _, said) = doorless(&["daemon", "--aio", "fast"]);
    assert!(!status.success() && said.contains("--aio takes 'auto', 'io_uring' or 'threads', not 'fast'"), "{said}");
    let node = |aio: &str| format!("driver=file,node-name=f,filename={},aio={aio}", text(&scratch.path("disk.raw")));
    for (aio, why) in [("io_uring", "needs rings"), ("native", "(Linux AIO) is not supported")] {
        let (status, _, said) = doorless(&["daemon", "--aio=threads", "--blockdev", &node(aio)]);
        assert!(!status.success() && said.contains(why), "{aio}: {said}");
    }
    assert!(Path::new(&scratch.name("disk.raw")).exists());
}
