// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Nodes with the driver `nbd`: a daemon as the client of servers that are not ours, and of itself.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::thread::JoinHandle;

use harness::{Running, Scratch, TestDaemon, judges, noise, run};
use rustix::process::Signal;
use serde_json::{Value, json};

const SIZE: usize = 8 << 20;

fn qemu_nbd(socket: &str, image: &str) -> Running {
    let _ = std::fs::remove_file(socket);
    Running::start(
        "qemu-nbd",
        &["-t", "-e", "8", "-f", "raw", "--discard=unmap", "-k", socket, image],
        socket,
        Signal::KILL,
    )
}

/// Passes a connection to `socket` under the name `s`.
fn pass(daemon: &mut TestDaemon, socket: &str) -> Value {
    let connection = UnixStream::connect(socket).unwrap();
    daemon.ok_with("getfd", json!({ "fdname": "s" }), &connection);
    json!({ "type": "fd", "str": "s" })
}

fn add(daemon: &mut TestDaemon, socket: &str, more: &Value) {
    let server = pass(daemon, socket);
    let mut node = json!({ "driver": "nbd", "node-name": "disk", "server": server, "discard": "unmap" });
    more.as_object().unwrap().iter().for_each(|(key, value)| node[key] = value.clone());
    daemon.ok("blockdev-add", node);
}

#[test]
fn a_disk_of_each_server_is_read_written_and_mapped_through_us() {
    let name = "a_disk_of_each_server_is_read_written_and_mapped_through_us";
    if !judges(name, &["qemu-nbd", "nbdkit", "nbdcopy", "nbdinfo", "qemu-io"]) {
        return;
    }
    let scratch = Scratch::new();
    let (image, socket, copy) = (scratch.name("image"), scratch.name("socket"), scratch.name("copy"));
    let nbdkit = ["-f", "-U", &socket, "file", &image];
    // QEMU's has extended headers, nbdkit's structured replies, and nbdkit's without them simple ones.
    let plain = ["-f", "--no-sr", "-U", &socket, "file", &image];
    for (server, style) in [(None, "extended"), (Some(&nbdkit[..]), "structured"), (Some(&plain), "simple")] {
        let mut bytes = noise(SIZE, 5);
        bytes[1 << 20..2 << 20].fill(0);
        std::fs::write(&image, &bytes).unwrap();
        let punched = ["--punch-hole", "--offset", "1MiB", "--length", "1MiB", &image];
        run("fallocate", &punched);
        let _ = std::fs::remove_file(&socket);
        let server = match server {
            None => qemu_nbd(&socket, &image),
            Some(arguments) => Running::start("nbdkit", arguments, &socket, Signal::KILL),
        };
        let mut daemon = TestDaemon::start();
        add(&mut daemon, &socket, &json!({}));
        let specific = daemon.ok("query-named-block-nodes", json!({})).to_string();
        assert!(specific.contains("disk"), "{specific}");
        daemon.start_nbd();
        daemon.export("disk", true);
        let uri = daemon.uri("disk");
        run("nbdcopy", &[&uri, &copy]);
        assert!(std::fs::read(&copy).unwrap() == bytes, "{style}");
        let map = run("nbdinfo", &["--map", &uri]);
        assert_eq!(map.contains("hole,zero"), style != "simple", "{style}: {map}");
        let io = ["-c", "write -P 0x33 12345 300000", "-c", "write -zu 4M 1M", "-c", "discard 6M 64k", "-c", "flush"];
        run("qemu-io", &[&["-f", "raw"], &io[..], &["-c", "read -P 0x33 12345 300000", &uri]].concat());
        daemon.ok("block-export-del", json!({ "id": "disk", "mode": "hard" }));
        while daemon.daemon.execute("blockdev-del", json!({ "node-name": "disk" }), &[]).is_err() {
            std::thread::yield_now();
        }
        drop(server);
        let now = std::fs::read(&image).unwrap();
        bytes[12345..312_345].fill(0x33);
        bytes[4 << 20..5 << 20].fill(0);
        assert!(now[..6 << 20] == bytes[..6 << 20], "{style}");
        let held = daemon.ok("query-descriptors", json!({})).to_string();
        assert!(!held.contains("the server of node"), "{held}");
    }
}

#[test]
fn a_lost_connection_is_made_good_by_another_socket_and_no_request_fails() {
    let name = "a_lost_connection_is_made_good_by_another_socket_and_no_request_fails";
    if !judges(name, &["qemu-nbd", "qemu-io"]) {
        return;
    }
    let scratch = Scratch::new();
    let (image, socket) = (scratch.name("image"), scratch.name("socket"));
    std::fs::write(&image, noise(SIZE, 6)).unwrap();
    let server = qemu_nbd(&socket, &image);
    let mut daemon = TestDaemon::start();
    add(&mut daemon, &socket, &json!({ "reconnect-delay": 600 }));
    daemon.start_nbd();
    daemon.export("disk", true);
    let uri = daemon.uri("disk");
    run("qemu-io", &["-f", "raw", "-c", "write -P 1 0 64k", &uri]);
    drop(server);
    // Waits for what comes next.
    let waiting: JoinHandle<String> = {
        let uri = uri.clone();
        std::thread::spawn(move || {
            run("qemu-io", &["-f", "raw", "-c", "write -P 2 0 64k", "-c", "read -P 2 0 64k", &uri])
        })
    };
    // A server with another disk is not taken.
    let other = scratch.name("other");
    std::fs::write(&other, noise(SIZE / 2, 6)).unwrap();
    let wrong = qemu_nbd(&socket, &other);
    let address = pass(&mut daemon, &socket);
    let said = daemon.error("blockdev-nbd-reconnect", json!({ "node-name": "disk", "server": address }));
    assert!(said.contains("is not as the first one was"), "{said}");
    drop(wrong);
    let _server = qemu_nbd(&socket, &image);
    let address = pass(&mut daemon, &socket);
    daemon.ok("blockdev-nbd-reconnect", json!({ "node-name": "disk", "server": address }));
    waiting.join().unwrap();
    assert_eq!(std::fs::read(&image).unwrap()[..64 << 10], [2; 64 << 10]);
}

#[test]
fn without_a_delay_a_lost_connection_fails_requests_at_once_and_an_event_asks_for_another() {
    let name = "without_a_delay_a_lost_connection_fails_requests_at_once_and_an_event_asks_for_another";
    if !judges(name, &["qemu-nbd", "qemu-io"]) {
        return;
    }
    let scratch = Scratch::new();
    let (image, socket) = (scratch.name("image"), scratch.name("socket"));
    std::fs::write(&image, noise(SIZE, 7)).unwrap();
    let server = qemu_nbd(&socket, &image);
    let listener = UnixListener::bind(scratch.path("qmp")).unwrap();
    let child = Command::new(harness::DOORLESS)
        .args(["daemon", "--chardev", "socket,id=m,fd=0,server=on,wait=off", "--monitor", "m"])
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)))
        .spawn()
        .unwrap();
    let _daemon = Running(child, Signal::KILL);
    let mut client = qmp::Client::new(UnixStream::connect(scratch.path("qmp")).unwrap()).unwrap();
    let connection = UnixStream::connect(&socket).unwrap();
    let arguments = |value: Value| value.as_object().unwrap().clone();
    let fds = [std::os::fd::AsFd::as_fd(&connection)];
    client.execute("getfd", arguments(json!({ "fdname": "s" })), &fds).unwrap();
    let node =
        json!({ "driver": "nbd", "node-name": "disk", "server": { "type": "fd", "str": "s" }, "read-only": true });
    client.execute("blockdev-add", arguments(node), &[]).unwrap();
    let exports = UnixListener::bind(scratch.path("nbd")).unwrap();
    client.execute("getfd", arguments(json!({ "fdname": "l" })), &[std::os::fd::AsFd::as_fd(&exports)]).unwrap();
    let start = json!({ "addr": { "type": "fd", "data": { "str": "l" } } });
    client.execute("nbd-server-start", arguments(start), &[]).unwrap();
    let export = json!({ "type": "nbd", "id": "disk", "node-name": "disk" });
    client.execute("block-export-add", arguments(export), &[]).unwrap();
    drop(server);
    let event = loop {
        let event = client.wait_event().unwrap();
        if event.name == "BLOCK_NBD_DISCONNECTED" {
            break event;
        }
    };
    assert_eq!(event.data["node-name"], "disk");
    let uri = manager::serve::uri(&scratch.path("nbd"), "disk");
    let read = Command::new("qemu-io").args(["-r", "-f", "raw", "-c", "read 0 4k", &uri]).output().unwrap();
    let said = String::from_utf8_lossy(&read.stdout).into_owned() + &String::from_utf8_lossy(&read.stderr);
    assert!(said.contains("Input/output error"), "{said}");
}

#[test]
fn sockets_that_lead_to_no_disk_are_refused_with_the_cause() {
    let mut daemon = TestDaemon::start();
    let mut refused = |server: Value| {
        daemon.error("blockdev-add", json!({ "driver": "nbd", "node-name": "n", "server": server, "open-timeout": 1 }))
    };
    let unix = refused(json!({ "type": "unix", "path": "/run/nbd" }));
    assert!(unix.contains("this daemon connects nowhere"), "{unix}");
    assert!(refused(json!({ "type": "fd", "str": "none" })).contains("'none'"));
    let mut against = |say: &'static [u8]| {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        daemon.ok_with("getfd", json!({ "fdname": "s" }), &ours);
        drop(ours);
        let speaker = std::thread::spawn(move || {
            let _ = theirs.write_all(say);
            let _ = theirs.shutdown(std::net::Shutdown::Write);
            let _ = theirs.read_to_end(&mut Vec::new());
        });
        let node = json!({ "driver": "nbd", "node-name": "n", "server": { "type": "fd", "str": "s" } });
        let said = daemon.error("blockdev-add", node);
        speaker.join().unwrap();
        said
    };
    assert!(against(b"").contains("hung up"));
    assert!(against(b"SSH-2.0-OpenSSH_9.2 Debian").contains("does not speak NBD"));
    assert!(against(b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0").contains("old style"));
    assert!(against(b"NBDMAGICIHAVEOPT\0\x03XXXXXXXXXXXXXXXXXXXXXXXXX").contains("malformed"));
    let image = tempfile::NamedTempFile::new().unwrap();
    daemon.add_node("file", "raw", File::open(image.path()).unwrap(), true);
    let reconnect = json!({ "node-name": "file", "server": { "type": "fd", "str": "t" } });
    let (ours, _theirs) = UnixStream::pair().unwrap();
    daemon.ok_with("getfd", json!({ "fdname": "t" }), &ours);
    assert_eq!(daemon.error("blockdev-nbd-reconnect", reconnect), "this driver takes no socket");
}

#[test]
fn a_server_that_says_nothing_costs_the_monitor_its_time_limit_and_no_more() {
    let mut daemon = TestDaemon::start();
    let (ours, theirs) = UnixStream::pair().unwrap();
    daemon.ok_with("getfd", json!({ "fdname": "s" }), &ours);
    let node = json!({ "driver": "nbd", "node-name": "n", "server": { "type": "fd", "str": "s" }, "open-timeout": 1 });
    assert!(daemon.error("blockdev-add", node).contains("takes too long"));
    drop((ours, theirs));
    assert_eq!(daemon.ok("query-block-exports", json!({})), json!([]));
}
