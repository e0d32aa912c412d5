// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images over the monitor: sizes, snapshots, damage. qemu-img judges what is on disk.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::fs::File;
use std::os::unix::fs::FileExt;

use harness::{Scratch, TestDaemon, judges, run};
use serde_json::{Value, json};

fn image(scratch: &Scratch, size: &str) -> File {
    run("qemu-img", &["create", "-q", "-f", "qcow2", &scratch.name("disk.qcow2"), size]);
    File::options().read(true).write(true).open(scratch.path("disk.qcow2")).unwrap()
}

#[test]
fn a_resized_image_is_seen_by_the_next_client_and_by_qemu() {
    if !judges("a_resized_image_is_seen_by_the_next_client_and_by_qemu", &["qemu-img", "nbdinfo"]) {
        return;
    }
    let scratch = Scratch::new();
    let mut daemon = TestDaemon::start();
    daemon.add_node("disk", "qcow2", image(&scratch, "1M"), false);
    daemon.start_nbd();
    daemon.export("disk", true);
    assert_eq!(run("nbdinfo", &["--size", &daemon.uri("disk")]).trim(), "1048576");
    daemon.ok("block_resize", json!({ "node-name": "disk", "size": 3 << 20 }));
    assert_eq!(run("nbdinfo", &["--size", &daemon.uri("disk")]).trim(), "3145728");
    daemon.ok("block_resize", json!({ "node-name": "disk", "size": 2 << 20 }));
    let error = |daemon: &mut TestDaemon, arguments: Value| daemon.error("block_resize", arguments);
    assert_eq!(error(&mut daemon, json!({ "node-name": "disk", "size": -1 })), "Parameter 'size' expects a >0 size");
    assert!(error(&mut daemon, json!({ "node-name": "disk", "size": 1000 })).contains("multiple of 512"));
    assert_eq!(
        error(&mut daemon, json!({ "node-name": "none", "size": 512 })),
        "Cannot find device='' nor node-name='none'"
    );
    // The file below belongs to the image on it.
    let nodes = daemon.ok("query-named-block-nodes", json!({}));
    let file = nodes.as_array().unwrap().iter().find(|node| node["drv"] == "file").unwrap()["node-name"].clone();
    assert!(error(&mut daemon, json!({ "node-name": file, "size": 512 })).contains("Permission conflict"));
    // Its image locks are gone when the node is.
    daemon.ok("block-export-del", json!({ "id": "disk", "mode": "hard" }));
    daemon.ok("blockdev-del", json!({ "node-name": "disk" }));
    let info: Value =
        serde_json::from_str(&run("qemu-img", &["info", "--output=json", &scratch.name("disk.qcow2")])).unwrap();
    assert_eq!(info["virtual-size"], 2 << 20);
    run("qemu-img", &["check", "-q", &scratch.name("disk.qcow2")]);
}

#[test]
fn snapshots_are_made_and_deleted_as_by_qemu() {
    if !judges("snapshots_are_made_and_deleted_as_by_qemu", &["qemu-img", "qemu-io"]) {
        return;
    }
    let scratch = Scratch::new();
    let mut daemon = TestDaemon::start();
    daemon.add_node("disk", "qcow2", image(&scratch, "4M"), false);
    daemon.add_node("plain", "raw", tempfile::tempfile().unwrap(), false);
    daemon.start_nbd();
    daemon.export("disk", true);
    let write = |daemon: &TestDaemon, byte: &str| {
        run("qemu-io", &["-f", "raw", "-c", &format!("write -P {byte} 1M 1M"), "-c", "flush", &daemon.uri("disk")])
    };
    write(&daemon, "1");
    daemon.ok("blockdev-snapshot-internal-sync", json!({ "device": "disk", "name": "one" }));
    write(&daemon, "2");
    daemon.ok("blockdev-snapshot-internal-sync", json!({ "device": "disk", "name": "two" }));
    write(&daemon, "3");
    let name = scratch.name("disk.qcow2");
    let gone = daemon.ok("blockdev-snapshot-delete-internal-sync", json!({ "device": "disk", "name": "two" }));
    assert_eq!((&gone["id"], &gone["name"], &gone["vm-state-size"]), (&json!("2"), &json!("two"), &json!(0)));
    for (command, arguments, error) in [
        ("blockdev-snapshot-internal-sync", json!({ "device": "disk", "name": "" }), "Name is empty"),
        (
            "blockdev-snapshot-internal-sync",
            json!({ "device": "disk", "name": "one" }),
            "Snapshot with name 'one' already exists on device 'disk'",
        ),
        (
            "blockdev-snapshot-internal-sync",
            json!({ "device": "plain", "name": "x" }),
            "Block format 'raw' used by device 'plain' does not support internal snapshots",
        ),
        (
            "blockdev-snapshot-internal-sync",
            json!({ "device": "none", "name": "x" }),
            "Cannot find device='none' nor node-name='none'",
        ),
        ("blockdev-snapshot-delete-internal-sync", json!({ "device": "disk" }), "Name or id must be provided"),
        (
            "blockdev-snapshot-delete-internal-sync",
            json!({ "device": "disk", "id": "1", "name": "two" }),
            "Snapshot with id '1' and name 'two' does not exist on device 'disk'",
        ),
    ] {
        assert_eq!(daemon.error(command, arguments), error);
    }
    // Its image locks are gone when the node is.
    daemon.ok("block-export-del", json!({ "id": "disk", "mode": "hard" }));
    daemon.ok("blockdev-del", json!({ "node-name": "disk" }));
    run("qemu-img", &["check", "-q", &name]);
    let listed = run("qemu-img", &["snapshot", "-l", &name]);
    assert!(listed.contains("one") && !listed.contains("two"), "{listed}");
    for (state, byte) in [("", "3"), ("one", "1")] {
        if !state.is_empty() {
            run("qemu-img", &["snapshot", "-a", state, &name]);
        }
        let read = run("qemu-io", &["-r", "-f", "qcow2", "-c", &format!("read -P {byte} 1M 1M"), &name]);
        assert!(!read.contains("Pattern verification failed"), "{state}: {read}");
    }
}

#[test]
fn damage_is_told_once_the_image_is_marked_and_everything_else_goes_on() {
    let test = "damage_is_told_once_the_image_is_marked_and_everything_else_goes_on";
    if !judges(test, &["qemu-img", "qemu-io"]) {
        return;
    }
    let scratch = Scratch::new();
    let file = image(&scratch, "4M");
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 128k", &scratch.name("disk.qcow2")]);
    // The entry of the second guest cluster names the cluster of the L1 table.
    let mut field = [0; 8];
    file.read_exact_at(&mut field, 40).unwrap();
    let l1 = u64::from_be_bytes(field);
    file.read_exact_at(&mut field, l1).unwrap();
    let l2 = u64::from_be_bytes(field) & 0x00ff_ffff_ffff_fe00;
    file.write_all_at(&(l1 | 1 << 63).to_be_bytes(), l2 + 8).unwrap();
    let mut daemon = TestDaemon::start();
    daemon.add_node("disk", "qcow2", &file, false);
    daemon.start_nbd();
    daemon.export("disk", true);
    let status = std::process::Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write -P 2 64k 4k", &daemon.uri("disk")])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&status.stdout).into_owned() + &String::from_utf8_lossy(&status.stderr);
    assert!(said.contains("Input/output error"), "{said}");
    let event = loop {
        match daemon.daemon.next_event().unwrap() {
            (name, data) if name == "BLOCK_IMAGE_CORRUPTED" => break data,
            _ => {}
        }
    };
    assert_eq!((&event["node-name"], &event["fatal"], &event["offset"]), (&json!("disk"), &json!(true), &json!(l1)));
    // The mark stands in the header, and the daemon goes on.
    file.read_exact_at(&mut field, 72).unwrap();
    assert_eq!(u64::from_be_bytes(field) & 2, 2);
    assert_eq!(daemon.ok("query-block-exports", json!({}))[0]["id"], "disk");
}
