// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Persistent dirty bitmaps of qcow2: made by qemu-img and by us, tracked here, read by qemu-nbd.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use block::bitmap::Bitmap;
use block::{BlockNode, Preallocation, ZeroFlags};
use support::{Nodes, Random, in_memory, judge, name_in, run, to_disk};

const SIZE: u64 = 8 << 20;

fn open(image: &File, writable: bool) -> (Nodes, Arc<BlockNode>) {
    let mut nodes = Nodes::new();
    let file = nodes.file(image, writable);
    let node = nodes.format("qcow2", &[("file", &file)], writable, &[]).unwrap();
    (nodes, node)
}

fn runs(bitmap: &Bitmap) -> Vec<(u64, u64)> {
    let (mut runs, mut at) = (Vec::new(), 0);
    while let Some(run) = bitmap.next_dirty(at) {
        at = run.end;
        runs.push((run.start, run.end));
    }
    runs
}

/// The dirty runs that QEMU exports of a bitmap.
fn as_qemu_reads(dir: &Path, image: &str, bitmap: &str) -> Vec<(u64, u64)> {
    let socket = dir.join("nbd.sock");
    let _ = std::fs::remove_file(&socket);
    let mut server = Command::new("qemu-nbd")
        .args(["-r", "-f", "qcow2", "-B", bitmap, "-k", socket.to_str().unwrap(), image])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    while !socket.exists() {
        assert!(server.try_wait().unwrap().is_none(), "qemu-nbd has ended");
        std::thread::yield_now();
    }
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let map = run("nbdinfo", &[&format!("--map=qemu:dirty-bitmap:{bitmap}"), &uri]);
    server.wait().unwrap();
    let mut found: Vec<(u64, u64)> = Vec::new();
    for line in map.lines() {
        let fields: Vec<u64> = line.split_whitespace().take(3).map(|field| field.parse().unwrap()).collect();
        match (fields[2], found.last_mut()) {
            (0, _) => {}
            (_, Some(last)) if last.1 == fields[0] => last.1 += fields[1],
            _ => found.push((fields[0], fields[0] + fields[1])),
        }
    }
    found
}

fn write_at_random(node: &BlockNode, random: &mut Random) {
    let offset = random.below(SIZE - 70_000);
    let len = 1 + random.below(70_000);
    match random.below(4) {
        0 => node.write_zeroes(offset, len, ZeroFlags { may_unmap: true, fast_only: false }, false).unwrap(),
        1 => node.discard(offset, len).unwrap(),
        _ => node.write(&vec![7; len as usize], offset, false).unwrap(),
    }
}

fn judges(test: &str) -> bool {
    ["qemu-img", "qemu-nbd", "nbdinfo"].iter().all(|program| judge(test, program))
}

#[test]
fn bitmaps_that_qemu_made_track_what_is_written_here_and_qemu_reads_them() {
    if !judges("bitmaps_that_qemu_made_track_what_is_written_here_and_qemu_reads_them") {
        return;
    }
    for (seed, options) in
        ["cluster_size=4096", "cluster_size=65536,refcount_bits=64", "extended_l2=on"].into_iter().enumerate()
    {
        let dir = tempfile::tempdir().unwrap();
        let (path, name) = name_in(dir.path(), "image.qcow2");
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, &name, &SIZE.to_string()]);
        run("qemu-img", &["bitmap", "--add", "-g", "512", &name, "fine"]);
        run("qemu-img", &["bitmap", "--add", &name, "coarse"]);
        run("qemu-img", &["bitmap", "--add", "--disable", &name, "off"]);
        let image = in_memory(&path);
        let mut random = Random(0xb17 + seed as u64);
        let mut expected = Vec::new();
        // The second time it goes on from what was stored.
        for _ in 0..2 {
            let (nodes, node) = open(&image, true);
            for _ in 0..20 {
                write_at_random(&node, &mut random);
            }
            expected = node.bitmaps().list().iter().map(|bitmap| (bitmap.name().to_owned(), runs(bitmap))).collect();
            drop((node, nodes));
            to_disk(&image, &path);
            run("qemu-img", &["check", "-q", &name]);
        }
        for (bitmap, runs) in expected {
            assert_eq!(as_qemu_reads(dir.path(), &name, &bitmap), runs, "{bitmap} of {options}");
            assert_eq!(runs.is_empty(), bitmap == "off");
        }
        let info = run("qemu-img", &["info", &name]);
        assert_eq!((info.matches("auto").count(), info.matches("in-use").count()), (2, 0), "{info}");
        // They are QEMU's again.
        run("qemu-img", &["bitmap", "--merge", "fine", &name, "off"]);
        run("qemu-img", &["bitmap", "--remove", &name, "fine"]);
        run("qemu-img", &["check", "-q", &name]);
    }
}

#[test]
fn bitmaps_made_here_are_kept_and_removed_and_the_image_stays_clean() {
    if !judges("bitmaps_made_here_are_kept_and_removed_and_the_image_stays_clean") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, name) = name_in(dir.path(), "image.qcow2");
    let (_, below) = name_in(dir.path(), "a backing file with a name of some length, which must move");
    run("qemu-img", &["create", "-q", "-f", "raw", &below, "4M"]);
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            &below,
            "-F",
            "raw",
            "-o",
            "cluster_size=4096",
            &name,
            &SIZE.to_string(),
        ],
    );
    let image = in_memory(&path);
    let open = || {
        let mut nodes = Nodes::new();
        let file = nodes.file(&image, true);
        let below = nodes.file(&in_memory(Path::new(&below)), false);
        let node = nodes.format("qcow2", &[("file", &file), ("backing", &below)], true, &[]).unwrap();
        (nodes, node)
    };
    let (nodes, node) = open();
    for (index, bits) in [9, 16, 20].into_iter().enumerate() {
        let bitmap = Arc::new(Bitmap::new(format!("b{index}"), bits, node.len()).unwrap());
        node.check_new_bitmap(bitmap.name(), bits).unwrap();
        bitmap.set_persistent(index < 2);
        node.bitmaps().add(Arc::clone(&bitmap));
        node.bitmaps().set_enabled(&bitmap, true);
        node.write(&[1; 100], 1 << 20, false).unwrap();
    }
    let expected = runs(&node.bitmaps().get("b0").unwrap());
    drop((node, nodes));
    to_disk(&image, &path);
    run("qemu-img", &["check", "-q", &name]);
    let info = run("qemu-img", &["info", &name]);
    assert!(info.contains(&format!("backing file: {below}")), "{info}");
    assert_eq!(as_qemu_reads(dir.path(), &name, "b0"), expected);
    let (nodes, node) = open();
    let names: Vec<_> = node.bitmaps().list().iter().map(|bitmap| bitmap.name().to_owned()).collect();
    assert_eq!(names, ["b0", "b1"]);
    node.resize(2 * SIZE, Preallocation::Off).unwrap();
    for bitmap in names {
        node.remove_stored_bitmap(&bitmap).unwrap();
        node.bitmaps().remove(&bitmap).unwrap();
        to_disk(&image, &path);
    }
    drop((node, nodes));
    to_disk(&image, &path);
    run("qemu-img", &["check", "-q", &name]);
    assert!(!run("qemu-img", &["info", &name]).contains("bitmaps"));
}

#[test]
fn a_bitmap_is_lost_with_the_process_that_tracked_it_and_can_be_removed() {
    if !judges("a_bitmap_is_lost_with_the_process_that_tracked_it_and_can_be_removed") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, name) = name_in(dir.path(), "image.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &name, &SIZE.to_string()]);
    run("qemu-img", &["bitmap", "--add", &name, "b"]);
    let image = in_memory(&path);
    let (nodes, node) = open(&image, true);
    node.write(&[1; 100], 0, false).unwrap();
    node.flush().unwrap();
    // What a process leaves that is killed now.
    to_disk(&image, &path);
    drop((node, nodes));
    assert!(run("qemu-img", &["info", &name]).contains("in-use"));
    run("qemu-img", &["check", "-q", &name]);
    let left = in_memory(&path);
    let (nodes, node) = open(&left, true);
    assert!(node.bitmaps().get("b").unwrap().is_inconsistent());
    node.write(&[2; 100], 70_000, false).unwrap();
    drop((node, nodes));
    to_disk(&left, &path);
    assert!(run("qemu-img", &["info", &name]).contains("in-use"));
    let (nodes, node) = open(&left, true);
    node.remove_stored_bitmap("b").unwrap();
    node.bitmaps().remove("b").unwrap();
    drop((node, nodes));
    to_disk(&left, &path);
    run("qemu-img", &["check", "-q", &name]);
    assert!(!run("qemu-img", &["info", &name]).contains("in-use"));
}

#[test]
fn a_directory_that_breaks_the_rules_is_refused_field_by_field() {
    if !judges("a_directory_that_breaks_the_rules_is_refused_field_by_field") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, name) = name_in(dir.path(), "image.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &name, &SIZE.to_string()]);
    run("qemu-img", &["bitmap", "--add", &name, "b"]);
    let bytes = std::fs::read(&path).unwrap();
    let extension = 8 + bytes.windows(8).position(|head| head == [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24]).unwrap();
    let directory = u64::from_be_bytes(*bytes[extension + 16..].first_chunk().unwrap()) as usize;
    for (at, field, word) in [
        (extension - 4, &[0, 0, 0, 23][..], "extension length"),
        (extension, &[0, 0, 0, 0], "zero bitmaps"),
        (extension, &[0, 1, 0, 0], "exceeding"),
        (extension, &[0, 0, 0, 2], "Broken bitmap directory"),
        (extension + 4, &[0, 0, 0, 1], "Reserved"),
        (extension + 8, &[0, 0, 0, 0, 4, 0, 0, 8], "exceeds"),
        (extension + 8, &[0, 0, 0, 0, 3, 0, 0, 0], "passes the end"),
        (extension + 16, &[0x7f, 0, 0, 0, 0, 0, 0, 0], "passes the end"),
        (extension + 23, &[1], "offset"),
        (directory + 7, &[1], "constraints"),
        (directory, &[0, 0, 0, 0, 0, 0, 0, 0], "constraints"),
        (directory + 8, &[0xff; 4], "constraints"),
        (directory + 8, &[0, 0, 0, 2], "constraints"),
        (directory + 12, &[0x80, 0, 0, 2], "constraints"),
        (directory + 16, &[2], "constraints"),
        (directory + 17, &[8], "constraints"),
        (directory + 17, &[32], "constraints"),
        (directory + 18, &[0, 0], "constraints"),
        (directory + 18, &[0xff, 0xff], "Broken bitmap directory"),
        (directory + 20, &[0, 0, 0, 8], "extra data"),
    ] {
        let mut bad = bytes.clone();
        bad[at..at + field.len()].copy_from_slice(field);
        std::fs::write(&path, &bad).unwrap();
        let image = in_memory(&path);
        let mut nodes = Nodes::new();
        let file = nodes.file(&image, false);
        let error = nodes.format("qcow2", &[("file", &file)], false, &[]).err().map(|e| e.to_string());
        assert!(error.as_ref().is_some_and(|error| error.contains(word)), "{at}: {word}: {error:?}");
        let mut now = vec![0; bad.len()];
        image.read_exact_at(&mut now, 0).unwrap();
        assert!(now == bad);
    }
}
