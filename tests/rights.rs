// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Rights that change while a node lives: blockdev-reopen, auto-read-only, and image locks that QEMU respects.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use harness::{Scratch, TestDaemon, judges, run};
use serde_json::{Value, json};

/// A disk of 1 MiB in a set that holds it read-only and read-write: its path, and the set's filename.
fn disk_in_both_ways(daemon: &mut TestDaemon, scratch: &Scratch) -> (String, String) {
    let path = scratch.name("disk.raw");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let set = daemon.add_fd(File::open(&path).unwrap());
    daemon.ok_with("add-fd", json!({ "fdset-id": set }), read_write(&path));
    (path, format!("/dev/fdset/{set}"))
}

fn read_write(path: &str) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn file(filename: &str, more: Value) -> Value {
    let mut node = json!({ "driver": "file", "node-name": "n", "filename": filename });
    node.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    node
}

/// Access modes of the daemon's descriptors for `path`, the sets' own included: 0 read-only, 2 read-write.
fn modes(daemon: &TestDaemon, path: &str) -> Vec<u32> {
    let mut modes: Vec<u32> = daemon
        .open_fds()
        .iter()
        .filter(|fd| fd.ends_with(path))
        .map(|fd| {
            let number = fd.split(' ').next().unwrap();
            let info = std::fs::read_to_string(format!("/proc/{}/fdinfo/{number}", daemon.pid())).unwrap();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim().to_owned();
            u32::from_str_radix(&flags, 8).unwrap() & 3
        })
        .collect();
    modes.sort_unstable();
    modes
}

#[test]
fn reopen_takes_the_descriptor_that_fits_and_fifty_times_leave_nothing_behind() {
    let mut daemon = TestDaemon::start();
    let scratch = Scratch::new();
    let (path, filename) = disk_in_both_ways(&mut daemon, &scratch);
    daemon.ok("blockdev-add", file(&filename, json!({ "read-only": true })));
    assert_eq!(modes(&daemon, &path), [0, 0, 2]);
    daemon.start_nbd();
    let reopen = |read_only: bool| json!({ "options": [file(&filename, json!({ "read-only": read_only }))] });
    daemon.ok("blockdev-reopen", reopen(false));
    assert_eq!(daemon.ok("query-named-block-nodes", json!({}))[0]["ro"], false);
    let before = daemon.open_fds().len();
    for _ in 0..50 {
        daemon.ok("blockdev-reopen", reopen(true));
        daemon.ok("blockdev-reopen", reopen(false));
    }
    assert_eq!(daemon.open_fds().len(), before);
    daemon.export("n", true);
    assert!(daemon.error("blockdev-reopen", reopen(true)).contains("there is a writer on it"));
}

#[test]
fn reopen_without_a_fitting_descriptor_changes_nothing() {
    let mut daemon = TestDaemon::start();
    let scratch = Scratch::new();
    let path = scratch.name("disk.raw");
    std::fs::write(&path, [0; 512]).unwrap();
    let set = daemon.add_fd(File::open(&path).unwrap());
    let filename = format!("/dev/fdset/{set}");
    daemon.ok("blockdev-add", file(&filename, json!({ "read-only": true })));
    let reopen = json!({ "options": [file(&filename, json!({}))] });
    assert_eq!(
        daemon.error("blockdev-reopen", reopen.clone()),
        "Failed to find file descriptor with matching flags=0x2"
    );
    daemon.ok("remove-fd", json!({ "fdset-id": set }));
    assert_eq!(daemon.error("blockdev-reopen", reopen), "Failed to find file descriptor with matching flags=0x2");
    assert_eq!(daemon.ok("query-named-block-nodes", json!({}))[0]["ro"], true);
    let moved = json!({ "options": [file("/dev/fdset/9", json!({ "read-only": true }))] });
    assert_eq!(daemon.error("blockdev-reopen", moved), "Cannot change the option 'filename'");
    let other = json!({ "options": [{ "driver": "raw", "node-name": "n", "file": "n" }] });
    assert_eq!(daemon.error("blockdev-reopen", other), "Cannot change the option 'driver'");
}

#[test]
fn a_nested_node_follows_its_parent() {
    let mut daemon = TestDaemon::start();
    let scratch = Scratch::new();
    let (_, filename) = disk_in_both_ways(&mut daemon, &scratch);
    let node = |read_only: bool| {
        json!({ "driver": "raw", "node-name": "n", "read-only": read_only,
                "file": { "driver": "file", "filename": filename } })
    };
    daemon.ok("blockdev-add", node(true));
    let read_only = |daemon: &mut TestDaemon| -> Vec<bool> {
        let nodes = daemon.ok("query-named-block-nodes", json!({}));
        nodes.as_array().unwrap().iter().map(|node| node["ro"] == true).collect()
    };
    assert_eq!(read_only(&mut daemon), [true, true]);
    daemon.ok("blockdev-reopen", json!({ "options": [node(false)] }));
    assert_eq!(read_only(&mut daemon), [false, false]);
    daemon.ok("blockdev-reopen", json!({ "options": [node(true)] }));
    assert_eq!(read_only(&mut daemon), [true, true]);
}

#[test]
fn auto_read_only_is_read_only_until_somebody_writes() {
    if !judges("auto_read_only_is_read_only_until_somebody_writes", &["qemu-io"]) {
        return;
    }
    let mut daemon = TestDaemon::start();
    let scratch = Scratch::new();
    let (path, filename) = disk_in_both_ways(&mut daemon, &scratch);
    daemon.ok("blockdev-add", file(&filename, json!({ "auto-read-only": true })));
    assert_eq!(daemon.ok("query-named-block-nodes", json!({}))[0]["ro"], false);
    assert_eq!(modes(&daemon, &path), [0, 0, 2]);
    daemon.start_nbd();
    daemon.export("n", true);
    run("qemu-io", &["-f", "raw", "-c", "write -P 3 0 4k", "-c", "flush", &daemon.uri("n")]);
    assert_eq!(std::fs::read(&path).unwrap()[..4096], [3; 4096]);
    daemon.ok("block-export-del", json!({ "id": "n", "mode": "hard" }));
    while daemon.ok("query-block-exports", json!({})) != json!([]) {}
    daemon.ok("remove-fd", json!({ "fdset-id": filename.rsplit('/').next().unwrap().parse::<i64>().unwrap() }));
    assert!(!modes(&daemon, &path).contains(&2), "the last writer has left, and with it the right to write");
}

#[test]
fn auto_read_only_needs_a_read_only_descriptor() {
    let mut daemon = TestDaemon::start();
    let scratch = Scratch::new();
    std::fs::write(scratch.path("d"), [0; 512]).unwrap();
    let set = daemon.add_fd(read_write(&scratch.name("d")));
    let node = file(&format!("/dev/fdset/{set}"), json!({ "auto-read-only": true }));
    assert_eq!(daemon.error("blockdev-add", node), "Failed to find file descriptor with matching flags=0x0");
}

/// A node over the qcow2 image at `path`, as its user's own.
fn qcow2(daemon: &mut TestDaemon, path: &str) -> Value {
    let set = daemon.add_fd(File::open(path).unwrap());
    let file = json!({ "driver": "file", "filename": format!("/dev/fdset/{set}") });
    json!({ "driver": "qcow2", "node-name": "image", "read-only": true, "file": file })
}

#[test]
fn qemu_does_not_write_to_an_image_that_doorless_reads() {
    if !judges("qemu_does_not_write_to_an_image_that_doorless_reads", &["qemu-img", "qemu-io"]) {
        return;
    }
    let mut daemon = TestDaemon::start();
    let scratch = Scratch::new();
    let path = scratch.name("image.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &path, "1M"]);
    let node = qcow2(&mut daemon, &path);
    daemon.ok("blockdev-add", node);
    let qemu_writes = || {
        let output = Command::new("qemu-io").args(["-f", "qcow2", "-c", "write 0 512", &path]).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (written, text) = qemu_writes();
    assert!(!written && text.contains("Failed to get") && text.contains("lock"), "{text}");
    daemon.ok("blockdev-del", json!({ "node-name": "image" }));
    assert!(qemu_writes().0, "the locks went with the node");
}

#[test]
fn doorless_does_not_read_an_image_that_qemu_writes() {
    if !judges("doorless_does_not_read_an_image_that_qemu_writes", &["qemu-img", "qemu-io"]) {
        return;
    }
    let mut daemon = TestDaemon::start();
    let scratch = Scratch::new();
    let path = scratch.name("image.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &path, "1M"]);
    let mut qemu = Command::new("qemu-io")
        .args(["-f", "qcow2", &path])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut qemu_in = qemu.stdin.take().unwrap();
    qemu_in.write_all(b"write 0 512\n").unwrap();
    let mut line = String::new();
    let mut qemu_out = BufReader::new(qemu.stdout.take().unwrap());
    while !line.contains("wrote") {
        assert!(qemu_out.read_line(&mut line).unwrap() > 0, "{line}");
    }
    let node = qcow2(&mut daemon, &path);
    assert_eq!(daemon.error("blockdev-add", node.clone()), "Failed to get shared \"write\" lock");
    drop(qemu_in);
    assert!(qemu.wait().unwrap().success());
    daemon.ok("blockdev-add", node);
}
