// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Clients as they are: the Python package `qemu.qmp`, and the habits of libvirt, Kata and xenopsd.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use harness::{DOORLESS, Scratch};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

/// A daemon, listening on `qmp` in its scratch directory, beside a disk of 1 MiB.
struct Started {
    child: Child,
    scratch: Scratch,
}

impl Started {
    fn new() -> Started {
        let scratch = Scratch::new();
        std::fs::write(scratch.path("disk.raw"), vec![7; 1 << 20]).unwrap();
        let listener = UnixListener::bind(scratch.path("qmp")).unwrap();
        let child = Command::new(DOORLESS)
            .args(["daemon", "--chardev", "socket,id=m,fd=0,server=on,wait=off", "--monitor", "m"])
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)))
            .spawn()
            .unwrap();
        Started { child, scratch }
    }

    fn client(&self) -> Wire {
        let socket = UnixStream::connect(self.scratch.path("qmp")).unwrap();
        let lines = BufReader::new(socket.try_clone().unwrap());
        Wire { socket, lines }
    }

    /// The disk, read-only and read-write.
    fn disk(&self) -> (File, File) {
        let path = self.scratch.path("disk.raw");
        (File::open(&path).unwrap(), File::options().read(true).write(true).open(&path).unwrap())
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Wire {
    socket: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Wire {
    fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent = sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
        assert_eq!(sent, bytes.len());
    }

    /// The next answer; events are passed over.
    fn answer(&mut self) -> Value {
        loop {
            let mut line = String::new();
            assert!(self.lines.read_line(&mut line).unwrap() > 0, "the daemon hung up");
            assert!(line.ends_with("\r\n"), "{line:?}");
            let value: Value = serde_json::from_str(&line).unwrap();
            if value.get("event").is_none() {
                return value;
            }
        }
    }
}

/// A command as libvirt writes it: ids of its own, CRLF at the end.
fn libvirt(number: u32, command: &str, arguments: &Value) -> String {
    format!("{}\r\n", json!({ "execute": command, "arguments": arguments, "id": format!("libvirt-{number}") }))
}

#[test]
fn libvirts_sequence_works_with_a_descriptor_sent_again_after_a_short_write() {
    let daemon = Started::new();
    let mut wire = daemon.client();
    assert!(wire.answer().get("QMP").is_some());
    let mut number = 0;
    let mut call = |wire: &mut Wire, command: &str, arguments: Value, fds: &[BorrowedFd<'_>]| -> Value {
        number += 1;
        wire.send(libvirt(number, command, &arguments).as_bytes(), fds);
        let answer = wire.answer();
        assert_eq!(answer["id"], format!("libvirt-{number}"));
        assert!(answer.get("error").is_none(), "{command}: {answer}");
        answer["return"].clone()
    };
    call(&mut wire, "qmp_capabilities", json!({}), &[]);
    call(&mut wire, "query-version", json!({}), &[]);
    let commands = call(&mut wire, "query-commands", json!({}), &[]);
    assert!(commands.as_array().unwrap().contains(&json!({ "name": "add-fd" })));
    call(&mut wire, "query-qmp-schema", json!({}), &[]);
    assert_eq!(call(&mut wire, "query-fdsets", json!({}), &[]), json!([]));

    let (read_only, read_write) = daemon.disk();
    let opaque = json!({ "fdset-id": 0, "opaque": "libvirt-1-storage0" });
    call(&mut wire, "add-fd", opaque.clone(), &[read_only.as_fd()]);
    // A short write: the descriptor left with the first bytes, and libvirt sends it with the rest once more.
    let text = libvirt(7, "add-fd", &json!({ "fdset-id": 0, "opaque": "libvirt-1-storage1" }));
    let (first, rest) = text.as_bytes().split_at(11);
    wire.send(first, &[read_write.as_fd()]);
    wire.send(rest, &[read_write.as_fd()]);
    assert!(wire.answer().get("error").is_none());

    let node = json!({
        "driver": "file", "filename": "/dev/fdset/0", "node-name": "libvirt-1-storage",
        "auto-read-only": true, "discard": "unmap",
    });
    call(&mut wire, "blockdev-add", node, &[]);
    let format =
        json!({ "node-name": "libvirt-1-format", "read-only": false, "driver": "raw", "file": "libvirt-1-storage" });
    call(&mut wire, "blockdev-add", format, &[]);
    let listener = UnixListener::bind(daemon.scratch.path("nbd")).unwrap();
    call(&mut wire, "getfd", json!({ "fdname": "nbd" }), &[listener.as_fd()]);
    call(&mut wire, "nbd-server-start", json!({ "addr": { "type": "fd", "data": { "str": "nbd" } } }), &[]);
    let export = json!({ "type": "nbd", "id": "libvirt-nbd-vda", "node-name": "libvirt-1-format", "writable": true, "name": "vda" });
    call(&mut wire, "block-export-add", export, &[]);
    call(&mut wire, "nbd-server-stop", json!({}), &[]);
    call(&mut wire, "blockdev-del", json!({ "node-name": "libvirt-1-format" }), &[]);
    call(&mut wire, "blockdev-del", json!({ "node-name": "libvirt-1-storage" }), &[]);
    let sets = call(&mut wire, "query-fdsets", json!({}), &[]);
    assert_eq!(sets[0]["fds"].as_array().unwrap().len(), 2);
    call(&mut wire, "remove-fd", json!({ "fdset-id": 0 }), &[]);
    assert_eq!(call(&mut wire, "query-fdsets", json!({}), &[]), json!([]));
}

#[test]
fn kata_finds_its_sets_by_their_labels_when_it_comes_back() {
    let daemon = Started::new();
    let (read_only, _) = daemon.disk();
    let mut wire = daemon.client();
    wire.answer();
    let labels = ["sandbox-1/rootfs", "sandbox-1/volume/\u{e9}\u{1F4BE}"];
    wire.socket.write_all(br#"{"execute":"qmp_capabilities"}"#).unwrap();
    wire.answer();
    for label in labels {
        let add = json!({ "execute": "add-fd", "arguments": { "opaque": label } });
        wire.send(add.to_string().as_bytes(), &[read_only.as_fd()]);
        assert!(wire.answer().get("return").is_some());
    }
    // Its shim dies without a word, in the middle of a command.
    wire.socket.write_all(br#"{"execute":"remove-f"#).unwrap();
    drop(wire);
    let mut wire = daemon.client();
    wire.answer();
    wire.socket.write_all(br#"{"execute":"qmp_capabilities"}{"execute":"query-fdsets"}"#).unwrap();
    wire.answer();
    let sets = wire.answer();
    let found: Vec<&str> =
        sets["return"].as_array().unwrap().iter().rev().map(|set| set["fds"][0]["opaque"].as_str().unwrap()).collect();
    assert_eq!(found, labels);
}

#[test]
fn xenopsd_sends_its_descriptor_on_a_blank_before_it_negotiates() {
    let daemon = Started::new();
    let (read_only, _) = daemon.disk();
    let mut wire = daemon.client();
    wire.send(b" ", &[read_only.as_fd()]);
    wire.answer();
    wire.socket.write_all(b"{\"execute\":\"qmp_capabilities\"}\n").unwrap();
    assert_eq!(wire.answer(), json!({ "return": {} }));
    wire.socket.write_all(b"{\"execute\":\"add-fd\",\"arguments\":{\"fdset-id\":20}}\n").unwrap();
    assert_eq!(wire.answer()["return"]["fdset-id"], 20);
}

#[test]
fn the_python_client_runs_every_command_receives_events_and_reconnects() {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/judges/python/bin/python3");
    let candidates = [own.to_str().unwrap(), "/usr/bin/python3", "python3"];
    let has = |python: &&&str| {
        Command::new(python).args(["-c", "import qemu.qmp"]).output().is_ok_and(|output| output.status.success())
    };
    let Some(python) = candidates.iter().find(has) else {
        assert!(std::env::var_os("CI").is_none(), "CI must have Python's qemu.qmp");
        eprintln!(
            "skipped: the_python_client_runs_every_command_receives_events_and_reconnects: needs qemu.qmp (make judges)"
        );
        return;
    };
    let daemon = Started::new();
    let name = |file: &str| daemon.scratch.name(file);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/qmp_client.py");
    let said = harness::run(python, &[script, &name("qmp"), &name("disk.raw"), &name("nbd")]);
    assert_eq!(said, "every command was run\n");
}
