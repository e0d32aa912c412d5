// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks past the host's cache (`O_DIRECT`): clients' bytes need no alignment, and nothing else changes.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use harness::{Scratch, Serve, TestDaemon, doorless, judges, noise, run};
use rustix::fs::OFlags;
use serde_json::json;

const SIZE: usize = 3 << 20;

/// Opens a file past the cache; `None`, said aloud, on a file system that has no such thing.
fn open_direct(test: &str, path: &Path) -> Option<File> {
    let flags = OFlags::DIRECT.bits().cast_signed();
    match OpenOptions::new().read(true).write(true).custom_flags(flags).open(path) {
        Ok(file) => Some(file),
        Err(e) => {
            eprintln!("skipped: {test}: the temporary directory has no O_DIRECT: {e}");
            None
        }
    }
}

/// Commands of qemu-io that write `ranges` at once, each with a byte of its own, and read back what the first wrote.
fn writes(ranges: &[(usize, usize)], first_byte: usize, model: &mut [u8]) -> Vec<String> {
    let mut commands = Vec::new();
    for (index, &(offset, len)) in ranges.iter().enumerate() {
        let byte = first_byte + index;
        commands.extend(["-c".to_owned(), format!("aio_write -P {byte} {offset} {len}")]);
        model[offset..offset + len].fill(u8::try_from(byte).unwrap());
    }
    commands.extend(["-c".to_owned(), "aio_flush".to_owned()]);
    for (index, &(offset, len)) in ranges.iter().enumerate() {
        commands.extend(["-c".to_owned(), format!("read -P {} {offset} {len}", first_byte + index)]);
    }
    commands
}

#[test]
fn unaligned_requests_of_many_at_once_change_their_own_bytes_alone() {
    let name = "unaligned_requests_of_many_at_once_change_their_own_bytes_alone";
    if !judges(name, &["qemu-io", "qemu-img"]) {
        return;
    }
    let scratch = Scratch::new();
    let raw = scratch.name("disk.raw");
    for format in ["raw", "qcow2"] {
        let mut model = noise(SIZE, 7);
        fs::write(&raw, &model).unwrap();
        if open_direct(name, Path::new(&raw)).is_none() {
            return;
        }
        let disk = scratch.name(&format!("disk.{format}"));
        if format != "raw" {
            run("qemu-img", &["convert", "-f", "raw", "-O", format, &raw, &disk]);
        }
        let serve = Serve::start(&["--direct", "--format", format, &disk]);
        // Neighbours within one sector and within one page, ranges over several, the end of the disk, and whole blocks.
        let neighbours: Vec<(usize, usize)> = (0..24).map(|part| (70_001 + part * 101, 101)).collect();
        let others = [
            (0, 1),
            (511, 2),
            (4095, 4098),
            (1 << 20, 4096),
            ((1 << 20) + 4096, 4096),
            (SIZE - 700, 700),
            (9001, 200_003),
        ];
        for (ranges, byte) in [(&neighbours[..], 1), (&others, 100)] {
            let commands = writes(ranges, byte, &mut model);
            let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
            let said = run("qemu-io", &[&["-f", "raw"], &commands[..], &[&serve.uri]].concat());
            assert!(!said.contains("Pattern verification failed") && !said.contains("failed:"), "{format}: {said}");
        }
        assert!(serve.interrupt().success());
        fs::write(&raw, &model).unwrap();
        let same = run("qemu-img", &["compare", "-f", "raw", "-F", format, &raw, &disk]);
        assert!(same.contains("identical"), "{format}: {same}");
        if format == "raw" {
            assert_eq!(fs::metadata(&disk).unwrap().len(), SIZE as u64);
        } else {
            run("qemu-img", &["check", "-f", format, &disk]);
        }
    }
}

#[test]
fn qemu_nbds_word_for_it_is_taken() {
    let name = "qemu_nbds_word_for_it_is_taken";
    if !judges(name, &["qemu-io"]) {
        return;
    }
    let scratch = Scratch::new();
    fs::write(scratch.path("disk.raw"), noise(1 << 20, 3)).unwrap();
    if open_direct(name, &scratch.path("disk.raw")).is_none() {
        return;
    }
    for option in ["--cache=none", "-n"] {
        let (socket, pid) = (scratch.name("socket"), scratch.name("pid"));
        let arguments =
            ["nbd", "--fork", option, "-f", "raw", "-k", &socket, "--pid-file", &pid, &scratch.name("disk.raw")];
        let (status, _, said) = doorless(&arguments);
        assert!(status.success(), "{option}: {said}");
        let uri = format!("nbd+unix:///?socket={socket}");
        let said = run("qemu-io", &["-f", "raw", "-c", "write -P 9 77 100", "-c", "read -P 9 77 100", &uri]);
        assert!(said.contains("100/100 bytes") && !said.contains("failed"), "{option}: {said}");
    }
}

#[test]
fn the_set_must_have_a_descriptor_of_that_kind() {
    let name = "the_set_must_have_a_descriptor_of_that_kind";
    let scratch = Scratch::new();
    let path = scratch.path("disk.raw");
    fs::write(&path, noise(1 << 20, 1)).unwrap();
    let Some(direct) = open_direct(name, &path) else { return };
    let mut daemon = TestDaemon::start();
    let plain = daemon.add_fd(File::options().read(true).write(true).open(&path).unwrap());
    let set = daemon.add_fd(direct);
    let node = |name: &str, set: i64, direct: bool| json!({ "driver": "file", "node-name": name, "filename": format!("/dev/fdset/{set}"), "cache": { "direct": direct } });
    let refused = daemon.error("blockdev-add", node("a", plain, true));
    assert!(refused.contains("Failed to find file descriptor with matching flags=0x4002"), "{refused}");
    daemon.ok("blockdev-add", node("direct", set, true));
    daemon.ok("blockdev-add", node("plain", plain, false));
    let nodes = daemon.ok("query-named-block-nodes", json!({}));
    for shown in nodes.as_array().unwrap() {
        assert_eq!(shown["cache"]["direct"], json!(shown["node-name"] == "direct"), "{shown}");
    }
    // The word of a node above means something only where the file below was opened so.
    let above = |file: &str| json!({ "driver": "raw", "node-name": "raw", "file": file, "cache": { "direct": true } });
    let refused = daemon.error("blockdev-add", above("plain"));
    assert!(refused.contains("'cache.direct' is a matter of the file node"), "{refused}");
    daemon.ok("blockdev-add", above("direct"));
    let refused = daemon.error("blockdev-reopen", json!({ "options": [node("direct", set, false)] }));
    assert!(refused.contains("Cannot change the option 'cache.direct'"), "{refused}");
}
