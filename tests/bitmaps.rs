// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Dirty bitmaps over the monitor: what clients write is marked, NBD tells it, and QEMU finds it in the image afterwards.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::fs::File;
use std::process::{Command, Stdio};

use harness::{Scratch, TestDaemon, judges, run};
use serde_json::{Value, json};

fn image(scratch: &Scratch) -> File {
    run("qemu-img", &["create", "-q", "-f", "qcow2", &scratch.name("disk.qcow2"), "8M"]);
    File::options().read(true).write(true).open(scratch.path("disk.qcow2")).unwrap()
}

/// Dirty runs that a server tells of a bitmap: start and length.
fn dirty(uri: &str, bitmap: &str) -> Vec<(u64, u64)> {
    let map = run("nbdinfo", &[&format!("--map=qemu:dirty-bitmap:{bitmap}"), uri]);
    let fields = |line: &str| line.split_whitespace().take(3).map(|field| field.parse().unwrap()).collect::<Vec<u64>>();
    map.lines().map(fields).filter(|fields| fields[2] == 1).map(|fields| (fields[0], fields[1])).collect()
}

fn write(daemon: &TestDaemon, offset: &str, len: &str) {
    run("qemu-io", &["-f", "raw", "-c", &format!("write -P 7 {offset} {len}"), &daemon.uri("disk")]);
}

/// Bitmaps and snapshots that are left.
fn left(daemon: &mut TestDaemon) -> Vec<Value> {
    let nodes = daemon.ok("query-named-block-nodes", json!({}));
    let disk = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "disk").unwrap();
    disk["dirty-bitmaps"].as_array().cloned().unwrap_or_default()
}

#[test]
fn what_clients_write_is_told_over_nbd_and_found_by_qemu_in_the_image() {
    let test = "what_clients_write_is_told_over_nbd_and_found_by_qemu_in_the_image";
    if !judges(test, &["qemu-img", "qemu-io", "qemu-nbd", "nbdinfo"]) {
        return;
    }
    let scratch = Scratch::new();
    let mut daemon = TestDaemon::start();
    daemon.add_node("disk", "qcow2", image(&scratch), false);
    for (name, granularity) in [("fine", 4096), ("coarse", 1 << 20)] {
        let arguments = json!({ "node": "disk", "name": name, "granularity": granularity, "persistent": true });
        daemon.ok("block-dirty-bitmap-add", arguments);
    }
    daemon.start_nbd();
    let export =
        json!({ "type": "nbd", "id": "disk", "node-name": "disk", "writable": true, "bitmaps": ["fine", "coarse"] });
    daemon.ok("block-export-add", export);
    write(&daemon, "5000", "100");
    write(&daemon, "3M", "64k");
    run("qemu-io", &["-f", "raw", "-c", "write -z 6M 4k", "-c", "discard 7M 64k", &daemon.uri("disk")]);
    let fine = [(4096, 4096), (3 << 20, 65536), (6 << 20, 4096), (7 << 20, 65536)];
    assert_eq!(dirty(&daemon.uri("disk"), "fine"), fine);
    assert_eq!(dirty(&daemon.uri("disk"), "coarse"), [(0, 1 << 20), (3 << 20, 1 << 20), (6 << 20, 2 << 20)]);
    let counts: Vec<Value> = left(&mut daemon).iter().map(|bitmap| bitmap["count"].clone()).collect();
    assert_eq!(counts, [json!(4 << 20), json!(4096 * 2 + 65536 * 2)]);
    // The client has gone, but its connection may not know that yet.
    daemon.ok("block-export-del", json!({ "id": "disk", "mode": "hard" }));
    daemon.ok("blockdev-del", json!({ "node-name": "disk" }));
    drop(daemon);
    let name = scratch.name("disk.qcow2");
    run("qemu-img", &["check", "-q", &name]);
    let socket = scratch.name("nbd.sock");
    let arguments = ["-r", "-f", "qcow2", "-B", "fine", "-k", &socket, &name];
    let mut server = Command::new("qemu-nbd").args(arguments).stdin(Stdio::null()).spawn().unwrap();
    while !scratch.path("nbd.sock").exists() {
        assert!(server.try_wait().unwrap().is_none(), "qemu-nbd has ended");
        std::thread::yield_now();
    }
    assert_eq!(dirty(&format!("nbd+unix:///?socket={socket}"), "fine"), fine);
    server.wait().unwrap();
}

#[test]
fn a_transaction_that_fails_leaves_everything_as_it_was() {
    if !judges("a_transaction_that_fails_leaves_everything_as_it_was", &["qemu-img", "qemu-io"]) {
        return;
    }
    let scratch = Scratch::new();
    let mut daemon = TestDaemon::start();
    daemon.add_node("disk", "qcow2", image(&scratch), false);
    daemon.start_nbd();
    daemon.export("disk", true);
    daemon.ok("block-dirty-bitmap-add", json!({ "node": "disk", "name": "old" }));
    daemon.ok(
        "block-dirty-bitmap-add",
        json!({ "node": "disk", "name": "stored", "persistent": true, "disabled": true }),
    );
    write(&daemon, "0", "64k");
    let before = left(&mut daemon);
    let action = |kind: &str, data: Value| json!({ "type": kind, "data": data });
    let old = json!({ "node": "disk", "name": "old" });
    let mut actions = vec![
        action("blockdev-snapshot-internal-sync", json!({ "device": "disk", "name": "s" })),
        action("block-dirty-bitmap-add", json!({ "node": "disk", "name": "new" })),
        action("block-dirty-bitmap-merge", json!({ "node": "disk", "target": "stored", "bitmaps": ["old"] })),
        action("block-dirty-bitmap-enable", json!({ "node": "disk", "name": "stored" })),
        action("block-dirty-bitmap-clear", old.clone()),
        action("block-dirty-bitmap-remove", old.clone()),
    ];
    let snapshots = || run("qemu-img", &["snapshot", "-U", "-l", &scratch.name("disk.qcow2")]);
    let mut failing = actions.clone();
    failing.push(action("block-dirty-bitmap-remove", json!({ "node": "disk", "name": "none" })));
    let error = daemon.error("transaction", json!({ "actions": failing }));
    assert_eq!(error, "Dirty bitmap 'none' not found");
    assert_eq!(left(&mut daemon), before);
    assert!(!snapshots().contains("s "));
    // The snapshot comes last: here it is what fails, and everything else is taken back.
    failing = actions.clone();
    failing.push(action("blockdev-snapshot-internal-sync", json!({ "device": "disk", "name": "" })));
    assert_eq!(daemon.error("transaction", json!({ "actions": failing })), "Name is empty");
    assert_eq!(left(&mut daemon), before);
    assert!(!snapshots().contains("s "));
    actions.pop();
    daemon.ok("transaction", json!({ "actions": actions }));
    let after: Vec<_> =
        left(&mut daemon).iter().map(|b| (b["name"].clone(), b["count"].clone(), b["recording"].clone())).collect();
    let expected = [("new", 0, true), ("stored", 65536, true), ("old", 0, true)];
    assert_eq!(after, expected.map(|(name, count, on)| (json!(name), json!(count), json!(on))));
    assert!(snapshots().contains("s "));
    // The client has gone, but its connection may not know that yet.
    daemon.ok("block-export-del", json!({ "id": "disk", "mode": "hard" }));
    daemon.ok("blockdev-del", json!({ "node-name": "disk" }));
    run("qemu-img", &["check", "-q", &scratch.name("disk.qcow2")]);
}
