// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Monitor clients that send nonsense, too much, or the wrong thing at the wrong time: answered, and the daemon serves on.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};

use harness::{DOORLESS, Scratch, TestDaemon, open_fds};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

/// A daemon whose monitor is a passed listening socket, and a raw client of it.
struct Wire {
    child: Child,
    scratch: Scratch,
    socket: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Wire {
    fn start() -> Wire {
        let scratch = Scratch::new();
        let listener = UnixListener::bind(scratch.path("qmp")).unwrap();
        let child = Command::new(DOORLESS)
            .args(["daemon", "--chardev", "socket,id=m,fd=0,server=on,wait=off", "--monitor", "chardev=m"])
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)))
            .spawn()
            .unwrap();
        let (socket, lines) = Wire::connect(&scratch);
        Wire { child, scratch, socket, lines }
    }

    fn connect(scratch: &Scratch) -> (UnixStream, BufReader<UnixStream>) {
        let socket = UnixStream::connect(scratch.path("qmp")).unwrap();
        let mut lines = BufReader::new(socket.try_clone().unwrap());
        let mut greeting = String::new();
        lines.read_line(&mut greeting).unwrap();
        assert!(greeting.starts_with("{\"QMP\": "), "{greeting}");
        (socket, lines)
    }

    fn reconnect(&mut self) {
        self.socket.shutdown(std::net::Shutdown::Both).unwrap();
        (self.socket, self.lines) = Wire::connect(&self.scratch);
    }

    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.socket.write_all(bytes.as_ref()).unwrap();
    }

    /// One `sendmsg`: bytes and descriptors.
    fn send_fds(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        let sent = sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
        assert_eq!(sent, bytes.len());
    }

    /// The next answer; events are passed over.
    fn answer(&mut self) -> Value {
        loop {
            let mut line = String::new();
            assert!(self.lines.read_line(&mut line).unwrap() > 0, "the daemon hung up");
            let value: Value = serde_json::from_str(&line).unwrap();
            if value.get("event").is_none() {
                return value;
            }
        }
    }

    fn call(&mut self, bytes: impl AsRef<[u8]>) -> Value {
        self.send(bytes);
        self.answer()
    }

    fn error(&mut self, bytes: impl AsRef<[u8]>) -> String {
        let answer = self.call(bytes);
        answer["error"]["desc"].as_str().unwrap_or_else(|| panic!("no error: {answer}")).to_owned()
    }

    fn negotiate(&mut self) {
        assert_eq!(self.call(r#"{"execute":"qmp_capabilities"}"#), json!({ "return": {} }));
    }

    fn serves_on(&mut self) {
        assert_eq!(
            self.call(r#"{"execute":"query-block-exports","id":"alive"}"#),
            json!({ "return": [], "id": "alive" })
        );
    }

    fn fds(&self) -> Vec<String> {
        open_fds(self.child.id())
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Files whose sizes tell them apart.
fn disks(count: usize) -> Vec<File> {
    (0..count)
        .map(|index| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(512 * (index as u64 + 1)).unwrap();
            file
        })
        .collect()
}

const ADD: &[u8] = br#"{"execute":"add-fd"}"#;

#[test]
fn case_27_and_28_more_descriptors_than_a_process_may_hold_are_an_error_and_nothing_leaks() {
    let mut wire = Wire::start();
    wire.negotiate();
    let before = wire.fds().len();
    let disks = disks(1);
    let many: Vec<BorrowedFd<'_>> = vec![disks[0].as_fd(); 253];
    wire.send_fds(ADD, &many);
    assert_eq!(wire.answer()["return"]["fdset-id"], 0, "the first of many is taken, as in QEMU");
    assert_eq!(wire.fds().len(), before + 1, "the others are closed");
    wire.serves_on();
}

#[test]
fn case_29_a_descriptor_with_an_unrelated_command_waits_for_a_claim() {
    let mut wire = Wire::start();
    wire.negotiate();
    wire.send_fds(br#"{"execute":"query-version"}"#, &[disks(1)[0].as_fd()]);
    assert!(wire.answer()["return"].is_object());
    assert!(wire.call(ADD)["return"].is_object());
    assert_eq!(wire.error(ADD), "No file descriptor supplied via SCM_RIGHTS");
    wire.serves_on();
}

#[test]
fn case_30_add_fd_without_a_descriptor_is_an_error() {
    let mut wire = Wire::start();
    wire.negotiate();
    assert_eq!(wire.error(ADD), "No file descriptor supplied via SCM_RIGHTS");
    assert_eq!(
        wire.error(r#"{"execute":"getfd","arguments":{"fdname":"x"}}"#),
        "No file descriptor supplied via SCM_RIGHTS"
    );
    wire.serves_on();
}

#[test]
fn case_31_a_descriptor_on_the_second_half_of_a_command_belongs_to_it() {
    let mut wire = Wire::start();
    wire.negotiate();
    let (first, second) = ADD.split_at(7);
    wire.send(first);
    wire.send_fds(second, &[disks(1)[0].as_fd()]);
    assert_eq!(wire.answer()["return"]["fdset-id"], 0);
    wire.serves_on();
}

#[test]
fn case_32_pipelined_add_fd_keep_their_own_descriptors_with_and_without_oob() {
    for negotiation in
        [r#"{"execute":"qmp_capabilities"}"#, r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#]
    {
        let mut wire = Wire::start();
        assert!(wire.call(negotiation)["return"].is_object());
        let disks = disks(40);
        for disk in &disks {
            wire.send_fds(ADD, &[disk.as_fd()]);
        }
        for set in 0..40 {
            assert_eq!(wire.answer()["return"]["fdset-id"], set);
        }
        for (set, disk) in disks.iter().enumerate() {
            let node = json!({ "execute": "blockdev-add", "arguments": {
                "driver": "file", "node-name": format!("n{set}"), "filename": format!("/dev/fdset/{set}") } });
            assert_eq!(wire.call(node.to_string()), json!({ "return": {} }));
            let nodes = wire.call(r#"{"execute":"query-named-block-nodes"}"#);
            assert_eq!(nodes["return"][0]["image"]["virtual-size"], disk.metadata().unwrap().len(), "set {set}");
        }
    }
}

#[test]
fn case_33_at_the_limit_of_descriptors_a_loss_is_told_and_control_goes_on() {
    let mut wire = Wire::start();
    wire.negotiate();
    let pid = rustix::process::Pid::from_raw(wire.child.id().cast_signed()).unwrap();
    let limit = wire.fds().len() as u64 + 3;
    let rlimit = rustix::process::Rlimit { current: Some(limit), maximum: Some(limit) };
    if rustix::process::prlimit(Some(pid), rustix::process::Resource::Nofile, rlimit).is_err() {
        eprintln!("skipped: case_33_at_the_limit_of_descriptors: may not set another process's limits");
        return;
    }
    let disks = disks(1);
    let before = wire.fds().len();
    wire.send_fds(ADD, &vec![disks[0].as_fd(); 100]);
    let answer = wire.answer();
    assert!(answer["error"]["desc"].as_str().unwrap().contains("lost"), "{answer}");
    assert_eq!(wire.fds().len(), before, "nothing leaked");
    wire.send_fds(ADD, &[disks[0].as_fd()]);
    assert!(wire.answer()["return"].is_object(), "one still fits");
    wire.serves_on();
}

#[test]
fn case_34_ids_that_are_no_ids_are_refused() {
    let mut wire = Wire::start();
    wire.negotiate();
    let add = |id: &str| format!(r#"{{"execute":"add-fd","arguments":{{"fdset-id":{id}}}}}"#);
    for id in ["1.0", "true", "null", "\"1\"", "9223372036854775808", "[]"] {
        let wanted = "Invalid parameter type for 'fdset-id', expected: integer";
        assert_eq!(wire.error(add(id)), wanted, "{id}");
    }
    wire.send_fds(add("-1").as_bytes(), &[disks(1)[0].as_fd()]);
    assert_eq!(wire.answer()["error"]["desc"], "Parameter 'fdset-id' expects a non-negative value");
    wire.send_fds(add("9223372036854775807").as_bytes(), &[disks(1)[0].as_fd()]);
    assert_eq!(wire.answer()["return"]["fdset-id"], i64::MAX);
    wire.serves_on();
}

#[test]
fn case_35_a_duplicate_key_is_a_parse_error() {
    let mut wire = Wire::start();
    wire.negotiate();
    assert_eq!(wire.error(r#"{"execute":"quit","execute":"query-version"}"#), "JSON parse error, duplicate key");
    // What is left of the broken object is noise to the parser; 0x01 brings it back to a known state.
    wire.send([1]);
    while !wire.answer()["error"]["desc"].as_str().unwrap().contains("stray") {}
    wire.serves_on();
}

#[test]
fn case_36_nesting_beyond_the_limit_is_an_error_and_no_newline_is_needed() {
    let mut wire = Wire::start();
    wire.negotiate();
    wire.send(vec![b'['; 100_000]);
    assert_eq!(wire.answer()["error"]["desc"], "JSON nesting depth limit exceeded");
    wire.send([1]);
    while !wire.answer()["error"]["desc"].as_str().unwrap().contains("stray") {}
    wire.serves_on();
}

#[test]
fn case_36_a_line_of_65_mib_is_refused_within_bounds() {
    let mut wire = Wire::start();
    wire.negotiate();
    let mut socket = wire.socket.try_clone().unwrap();
    let flood = std::thread::spawn(move || {
        socket.write_all(b"\"").unwrap();
        for _ in 0..65 {
            socket.write_all(&vec![b'a'; 1 << 20]).unwrap();
        }
        socket.write_all(b"\"\x01").unwrap();
    });
    assert_eq!(wire.answer()["error"]["desc"], "JSON token size limit exceeded");
    while !wire.answer()["error"]["desc"].as_str().unwrap().contains("stray") {}
    flood.join().unwrap();
    wire.serves_on();
}

#[test]
fn case_36_a_message_of_more_than_2_mi_tokens_is_refused() {
    let mut wire = Wire::start();
    wire.negotiate();
    // The bracket, and 2^20 numbers with a comma each.
    wire.send(format!("[{}", "1,".repeat(1 << 20)));
    assert_eq!(wire.answer()["error"]["desc"], "JSON token count limit exceeded");
    wire.send([1]);
    while !wire.answer()["error"]["desc"].as_str().unwrap().contains("stray") {}
    wire.serves_on();
}

#[test]
fn case_37_invalid_text_is_a_parse_error() {
    let mut wire = Wire::start();
    wire.negotiate();
    for bytes in [&b"\"\xff\xff\""[..], b"\"\xc1\xbf\"", b"\"\\ud800\"", b"\"\\q\""] {
        wire.send(bytes);
        let error = wire.answer()["error"]["desc"].as_str().unwrap().to_owned();
        assert!(error.starts_with("JSON parse error"), "{error}");
        // What is left of the broken string is noise; 0x01 ends it, and the next command is answered by its id.
        wire.send(b"\x01{\"execute\":\"query-block-exports\",\"id\":\"after\"}");
        while wire.answer()["id"] != "after" {}
    }
    wire.serves_on();
}

#[test]
fn case_38_nothing_works_before_negotiation() {
    let mut wire = Wire::start();
    let wanted =
        json!({ "class": "CommandNotFound", "desc": "Expecting capabilities negotiation with 'qmp_capabilities'" });
    let answer = wire.call(r#"{"execute":"query-version","id":7}"#);
    assert_eq!((&answer["error"], &answer["id"]), (&wanted, &json!(7)));
    wire.negotiate();
    wire.serves_on();
}

#[test]
fn case_39_exec_oob_without_the_capability_is_unexpected() {
    let mut wire = Wire::start();
    wire.negotiate();
    assert_eq!(wire.error(r#"{"exec-oob":"query-version"}"#), "QMP input member 'exec-oob' is unexpected");
    wire.serves_on();
}

#[test]
fn case_40_an_opaque_of_a_mebibyte_with_control_characters_comes_back_as_it_was() {
    let mut wire = Wire::start();
    wire.negotiate();
    let opaque = "a\n\u{1}\u{1b}[31m\u{7f}é\u{10348}".repeat(1 << 16);
    let add = json!({ "execute": "add-fd", "arguments": { "opaque": opaque } }).to_string();
    let (head, tail) = add.as_bytes().split_at(100);
    wire.send_fds(head, &[disks(1)[0].as_fd()]);
    wire.send(tail);
    assert!(wire.answer()["return"].is_object());
    let sets = wire.call(r#"{"execute":"query-fdsets"}"#);
    assert!(sets["return"][0]["fds"][0]["opaque"] == json!(opaque));
    wire.serves_on();
}

#[test]
fn case_41_an_id_of_any_shape_and_size_comes_back_as_it_was() {
    let mut wire = Wire::start();
    wire.negotiate();
    let deep = (0..100).fold(json!(null), |inner, _| json!([inner]));
    for id in [json!("x".repeat(1 << 20)), json!({ "a": [1, { "b": null }] }), deep, json!(u64::MAX), json!(i64::MIN)] {
        wire.send(json!({ "execute": "query-version", "id": id }).to_string());
        assert!(wire.answer()["id"] == id);
    }
    wire.serves_on();
}

#[test]
fn a_client_that_leaves_takes_its_pending_descriptors_along_and_the_next_one_starts_afresh() {
    let mut wire = Wire::start();
    wire.negotiate();
    let before = wire.fds().len();
    wire.send_fds(br#"{"execute":"query-version"}"#, &[disks(1)[0].as_fd()]);
    wire.answer();
    wire.send(r#"{"execute": "#);
    wire.reconnect();
    wire.negotiate();
    assert_eq!(wire.error(ADD), "No file descriptor supplied via SCM_RIGHTS");
    assert_eq!(wire.fds().len(), before);
    wire.serves_on();
}

#[test]
fn a_second_client_of_one_socket_is_greeted_when_the_first_has_left() {
    let mut wire = Wire::start();
    wire.negotiate();
    let second = UnixStream::connect(wire.scratch.path("qmp")).unwrap();
    wire.serves_on();
    second.set_nonblocking(true).unwrap();
    let mut lines = BufReader::new(second.try_clone().unwrap());
    let mut greeting = String::new();
    assert_eq!(lines.read_line(&mut greeting).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    second.set_nonblocking(false).unwrap();
    wire.socket.shutdown(std::net::Shutdown::Both).unwrap();
    lines.read_line(&mut greeting).unwrap();
    assert!(greeting.starts_with("{\"QMP\": "), "{greeting}");
    // Negotiation starts afresh.
    (wire.socket, wire.lines) = (second, lines);
    assert!(wire.error(r#"{"execute":"query-version"}"#).contains("Expecting capabilities negotiation"));
    wire.negotiate();
    wire.serves_on();
}

#[test]
fn case_45_only_qemus_spellings_of_a_set_are_understood() {
    let mut daemon = TestDaemon::start();
    let disk = disks(1);
    let set = daemon.ok_with("add-fd", json!({ "fdset-id": 1 }), &disk[0])["fdset-id"].clone();
    assert_eq!(set, 1);
    let node = |path: &str| json!({ "driver": "file", "node-name": "n", "filename": path });
    for good in ["/dev/fdset/1", "/dev/fdset/01", "/dev/fdset/+1", "/dev/fdset/ 1"] {
        daemon.ok("blockdev-add", node(good));
        daemon.ok("blockdev-del", json!({ "node-name": "n" }));
    }
    for bad in [
        "/dev/fdset/",
        "/dev/fdset/1/../2",
        "/dev/fdset/-1",
        "/dev/fdset/0x1",
        "/dev/fdset/1x",
        "/dev/fdset/2147483648",
    ] {
        let error = daemon.error("blockdev-add", node(bad));
        assert!(error.starts_with(&format!("Could not parse fdset {bad}")), "{error}");
    }
    assert_eq!(daemon.error("blockdev-add", node("/dev/fdset/2")), "Failed to find fdset /dev/fdset/2");
}

#[test]
fn case_46_and_47_paths_and_pseudo_protocols_are_refused_with_what_to_do_instead() {
    let mut daemon = TestDaemon::start();
    for path in ["/etc/passwd", "//dev/fdset/1", "/dev/fdset", "file:/dev/fdset/1", "json:{}", "nbd:x", "fd:3", ""] {
        let error = daemon.error("blockdev-add", json!({ "driver": "file", "node-name": "n", "filename": path }));
        assert!(error.contains("opens no files") && error.contains("add-fd"), "{error}");
    }
    let unix = json!({ "addr": { "type": "unix", "data": { "path": "/tmp/s" } } });
    assert!(daemon.error("nbd-server-start", unix).contains("binds nothing"));
    assert_eq!(daemon.ok("query-named-block-nodes", json!({})), json!([]));
}

#[test]
fn case_49_more_rights_than_the_set_holds_cannot_be_had() {
    let mut daemon = TestDaemon::start();
    let scratch = Scratch::new();
    std::fs::write(scratch.path("image"), [0; 4096]).unwrap();
    let set = daemon.add_fd(File::open(scratch.path("image")).unwrap());
    let node = json!({ "driver": "file", "node-name": "n", "filename": format!("/dev/fdset/{set}") });
    assert_eq!(daemon.error("blockdev-add", node), "Failed to find file descriptor with matching flags=0x2");
    daemon.ok(
        "blockdev-add",
        json!({ "driver": "file", "node-name": "n", "read-only": true, "filename": format!("/dev/fdset/{set}") }),
    );
    daemon.start_nbd();
    let export = json!({ "type": "nbd", "id": "e", "node-name": "n", "writable": true });
    assert_eq!(daemon.error("block-export-add", export), "Cannot export read-only node as writable");
}

#[test]
fn case_50_an_overlay_over_an_emptied_set_or_in_too_small_a_file_is_refused() {
    let mut daemon = TestDaemon::start();
    daemon.add_node("base", "raw", &disks(1)[0], false);
    let overlay = |set: i64| {
        let file = json!({ "driver": "file", "filename": format!("/dev/fdset/{set}") });
        json!({ "driver": "qcow2", "node-name": "top", "file": file, "backing": "base" })
    };
    // Emptied while a node uses it: the set is still there, and holds nothing.
    let set = daemon.add_fd(&disks(1)[0]);
    let user = json!({ "driver": "file", "node-name": "user", "filename": format!("/dev/fdset/{set}") });
    daemon.ok("blockdev-add", user);
    daemon.ok("remove-fd", json!({ "fdset-id": set }));
    let error = daemon.error("blockdev-add", overlay(set));
    assert_eq!(error, "Failed to find file descriptor with matching flags=0x2");
    // No image was made in it, or half of one.
    let image = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/demo.qcow2")).unwrap();
    for (len, wanted) in [(0, "not in qcow2 format"), (100, "header")] {
        let mut small = tempfile::tempfile().unwrap();
        small.write_all(&image[..len]).unwrap();
        let set = daemon.add_fd(&small);
        let error = daemon.error("blockdev-add", overlay(set));
        assert!(error.contains(wanted), "{len} bytes: {error}");
    }
    let nodes = daemon.ok("query-named-block-nodes", json!({}));
    assert!(!nodes.to_string().contains("\"top\""), "{nodes}");
}

#[test]
fn nobody_writes_below_an_image_that_keeps_metadata_there() {
    let mut daemon = TestDaemon::start();
    let image = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/demo.qcow2");
    let mut copy = tempfile::tempfile().unwrap();
    copy.write_all(&std::fs::read(image).unwrap()).unwrap();
    let set = daemon.add_fd(&copy);
    daemon
        .ok("blockdev-add", json!({ "driver": "file", "node-name": "base", "filename": format!("/dev/fdset/{set}") }));
    daemon.ok("blockdev-add", json!({ "driver": "qcow2", "node-name": "image", "file": "base", "read-only": true }));
    daemon.ok("blockdev-add", json!({ "driver": "raw", "node-name": "bytes", "file": "base" }));
    daemon.start_nbd();
    daemon.export("image", false);
    let export = json!({ "type": "nbd", "id": "e", "node-name": "bytes", "writable": true });
    assert_eq!(
        daemon.error("block-export-add", export),
        "Permission conflict on node 'base': permissions 'write' are both required by node 'bytes' (uses node 'base' as \
         'file' child) and unshared by node 'image' (uses node 'base' as 'file' child)."
    );
    daemon.export("bytes", false);
    assert_eq!(daemon.error("blockdev-del", json!({ "node-name": "base" })), "Block device base is in use");
    assert_eq!(daemon.error("blockdev-del", json!({ "node-name": "bytes" })), "Node bytes is in use");
}

#[test]
fn two_nodes_do_not_write_through_one_open_file() {
    let mut daemon = TestDaemon::start();
    let set = daemon.add_fd(&disks(1)[0]);
    let node = |name: &str| json!({ "driver": "file", "node-name": name, "filename": format!("/dev/fdset/{set}") });
    daemon.ok("blockdev-add", node("one"));
    assert!(daemon.error("blockdev-add", node("two")).contains("open for writing by another node already"));
    daemon.ok("blockdev-del", json!({ "node-name": "one" }));
    daemon.ok("blockdev-add", node("two"));
}
