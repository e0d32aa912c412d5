// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VDI, VHD and VMDK through the tool and the manager, beside qemu-img: images made here, converted to and from each other, put
//! together from files that they name.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::fs;
use std::path::Path;
use std::process::Command;

use harness::{Scratch, Serve, TestDaemon, doorless, judges, noise, run, run_in, text};
use serde_json::{Value, json};

const JUDGES: [&str; 2] = ["qemu-img", "qemu-io"];

/// Format, options, and whether it is one file that can be written anywhere.
const KINDS: &[(&str, &str, bool)] = &[
    ("vdi", "static=off", true),
    ("vdi", "static=on", true),
    ("vpc", "subformat=dynamic", true),
    ("vpc", "subformat=dynamic,force_size=on", true),
    ("vpc", "subformat=fixed", true),
    ("vpc", "subformat=fixed,force_size=on", true),
    ("vmdk", "subformat=monolithicSparse", true),
    ("vmdk", "subformat=monolithicSparse,zeroed_grain=on,adapter_type=lsilogic,compat6=on", true),
    ("vmdk", "subformat=monolithicSparse,hwversion=10,toolsversion=1", true),
    ("vmdk", "subformat=monolithicFlat,adapter_type=buslogic", false),
    ("vmdk", "subformat=twoGbMaxExtentSparse", false),
    ("vmdk", "subformat=twoGbMaxExtentFlat", false),
];

fn img(dir: &Path, arguments: &[&str]) -> String {
    run_in(dir, harness::DOORLESS, &[&["img"], arguments].concat())
}

fn refusal(dir: &Path, arguments: &[&str]) -> String {
    let output = Command::new(harness::DOORLESS).arg("img").args(arguments).current_dir(dir).output().unwrap();
    assert!(!output.status.success(), "{arguments:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn info(dir: &Path, format: &str, image: &str) -> Value {
    serde_json::from_str(&run_in(dir, "qemu-img", &["info", "--output=json", "-f", format, image])).unwrap()
}

#[test]
fn images_made_here_are_written_by_qemu_and_read_by_both() {
    if !judges("images_made_here_are_written_by_qemu_and_read_by_both", &JUDGES) {
        return;
    }
    for (format, options, _) in KINDS {
        for size in ["1", "9437696", "2200M"] {
            let scratch = Scratch::new();
            let dir = scratch.path(".");
            img(&dir, &["create", "-q", "-f", format, "-o", options, "image", size]);
            let made = info(&dir, format, "image")["virtual-size"].as_u64().unwrap();
            let wanted: u64 =
                size.trim_end_matches('M').parse::<u64>().unwrap() << if size.ends_with('M') { 20 } else { 0 };
            let rounded = if *format == "vpc" && !options.contains("force_size") { 1 << 20 } else { 512 };
            assert!(made >= wanted && made < wanted + rounded, "{format} {options} {size}: {made}");
            // Both ends, and a place over two blocks.
            let end = made - 512;
            let writes = [(0, 1), (end / 2 / 65536 * 65536, 2), (end, 3)];
            let mut commands = Vec::new();
            for (at, pattern) in writes {
                commands.extend(["-c".to_owned(), format!("write -P {pattern} {at} 512")]);
            }
            let mut arguments = vec!["-f", *format];
            arguments.extend(commands.iter().map(String::as_str));
            run_in(&dir, "qemu-io", &[arguments.as_slice(), &["image"]].concat());
            img(&dir, &["convert", "-q", "-f", format, "-O", "qcow2", "image", "ours.qcow2"]);
            run_in(&dir, "qemu-img", &["compare", "-q", "-f", format, "-F", "qcow2", "image", "ours.qcow2"]);
            if *format != "vpc" {
                run_in(&dir, "qemu-img", &["check", "-q", "-f", format, "image"]);
            }
        }
    }
}

#[test]
fn what_is_converted_between_formats_is_what_was_there() {
    if !judges("what_is_converted_between_formats_is_what_was_there", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.path(".");
    let mut bytes = noise(7 << 20, 3);
    bytes[1 << 20..3 << 20].fill(0);
    bytes[6_000_000..6_200_000].fill(0);
    fs::write(dir.join("raw"), &bytes).unwrap();
    let mut kinds: Vec<(&str, &str)> = KINDS.iter().filter(|kind| kind.2).map(|kind| (kind.0, kind.1)).collect();
    kinds.extend([("vmdk", "subformat=streamOptimized"), ("qcow2", "cluster_size=64k"), ("raw", "")]);
    for (index, (format, options)) in kinds.iter().enumerate() {
        let arguments = ["convert", "-q", "-f", "raw", "-O", format, "-o", options, "raw", "image"];
        img(&dir, &arguments);
        run_in(&dir, "qemu-img", &["compare", "-q", "-f", format, "-F", "raw", "image", "raw"]);
        // And from each to the next kind.
        let (other, options) = kinds[(index + 5) % kinds.len()];
        img(&dir, &["convert", "-q", "-f", format, "-O", other, "-o", options, "image", "second"]);
        run_in(&dir, "qemu-img", &["compare", "-q", "-f", other, "-F", "raw", "second", "raw"]);
        img(&dir, &["compare", "-q", "-f", other, "-F", "raw", "second", "raw"]);
    }
}

#[test]
fn a_stream_has_what_was_there_in_the_order_of_the_disk() {
    if !judges("a_stream_has_what_was_there_in_the_order_of_the_disk", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.path(".");
    // Over several grain tables, most of which name nothing; an end within a grain.
    fs::File::create(dir.join("raw")).unwrap().set_len((200 << 20) + 1536).unwrap();
    for (at, pattern) in [(0, 1), (65 << 20, 2), (70 << 20, 3), (200 << 20, 4)] {
        run_in(&dir, "qemu-io", &["-f", "raw", "-c", &format!("write -P {pattern} {at} 1536"), "raw"]);
    }
    for threads in ["1", "2", "7"] {
        let arguments = [
            "convert",
            "-q",
            "-m",
            threads,
            "-f",
            "raw",
            "-O",
            "vmdk",
            "-o",
            "subformat=streamOptimized",
            "raw",
            "image",
        ];
        img(&dir, &arguments);
        run_in(&dir, "qemu-img", &["compare", "-q", "-f", "vmdk", "-F", "raw", "image", "raw"]);
        run_in(&dir, "qemu-img", &["check", "-q", "-f", "vmdk", "image"]);
        img(&dir, &["compare", "-q", "-f", "vmdk", "-F", "raw", "image", "raw"]);
        // Every grain stands behind the one before: whoever reads the stream once from front to end can restore the disk.
        let bytes = fs::read(dir.join("image")).unwrap();
        let (mut at, mut last, mut grains) = (128 * 512, None, 0);
        while at < bytes.len() {
            let number = u64::from_le_bytes(*bytes[at..].first_chunk().unwrap());
            let size = u32::from_le_bytes(*bytes[at + 8..].first_chunk().unwrap()) as usize;
            if size == 0 {
                at += 512 + usize::try_from(number).unwrap() * 512;
                continue;
            }
            assert!(last < Some(number), "{threads} threads: {number} after {last:?}");
            (last, grains) = (Some(number), grains + 1);
            at += (12 + size).next_multiple_of(512);
        }
        assert_eq!(grains, 4);
    }
}

#[test]
fn a_disk_of_two_extents_is_served_by_its_descriptor_alone() {
    if !judges("a_disk_of_two_extents_is_served_by_its_descriptor_alone", &JUDGES) {
        return;
    }
    for subformat in ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let scratch = Scratch::new();
        let dir = scratch.path(".");
        img(&dir, &["create", "-q", "-f", "vmdk", "-o", &format!("subformat={subformat}"), "disk.vmdk", "3G"]);
        let serve = Serve::start(&[&scratch.name("disk.vmdk")]);
        assert_eq!(serve.said.iter().filter(|line| line.contains("extent: ")).count(), 2, "{:?}", serve.said);
        run("qemu-io", &["-f", "raw", "-c", "write -P 7 2147418112 131072", "-c", "flush", &serve.uri]);
        assert!(serve.interrupt().success());
        run_in(&dir, "qemu-io", &["-f", "vmdk", "-r", "-c", "read -P 7 2147418112 131072", "disk.vmdk"]);
        run_in(&dir, "qemu-img", &["check", "-q", "-f", "vmdk", "disk.vmdk"]);
    }
}

#[test]
fn an_extent_outside_the_image_s_directory_is_opened_only_if_allowed() {
    if !judges("an_extent_outside_the_image_s_directory_is_opened_only_if_allowed", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("inside")).unwrap();
    fs::create_dir(scratch.path("outside")).unwrap();
    let inside = scratch.path("inside");
    img(&inside, &["create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", "disk.vmdk", "1M"]);
    fs::rename(inside.join("disk-flat.vmdk"), scratch.path("outside/disk-flat.vmdk")).unwrap();
    let image = inside.join("disk.vmdk");
    for name in ["../outside/disk-flat.vmdk", &scratch.name("outside/disk-flat.vmdk")] {
        let before = fs::read_to_string(&image).unwrap();
        let line = before.lines().find(|line| line.starts_with("RW ")).unwrap();
        let (start, _) = line.split_once('"').unwrap();
        fs::write(&image, before.replace(line, &format!("{start}\"{name}\" 0"))).unwrap();
        let (status, _, err) = doorless(&["serve", text(&image)]);
        assert!(!status.success() && err.contains("--allow") && err.contains("outside/disk-flat.vmdk"), "{err}");
        let error = refusal(&inside, &["compare", "disk.vmdk", "disk.vmdk"]);
        assert!(error.contains("--allow"), "{error}");
        drop(Serve::start(&["--allow", &scratch.name("outside"), text(&image)]));
    }
}

#[test]
fn a_missing_extent_is_named_by_its_key_and_by_what_the_image_calls_it() {
    if !judges("a_missing_extent_is_named_by_its_key_and_by_what_the_image_calls_it", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.path(".");
    img(&dir, &["create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", "disk.vmdk", "3G"]);
    let mut daemon = TestDaemon::start();
    let mut open = |name: &str| {
        let file = fs::File::options().read(true).write(true).open(scratch.path(name)).unwrap();
        let set = daemon.add_fd(&file);
        json!({ "driver": "file", "filename": format!("/dev/fdset/{set}") })
    };
    let [file, first, second] = [open("disk.vmdk"), open("disk-s001.vmdk"), open("disk-s002.vmdk")];
    let node = |extents: Value| json!({ "driver": "vmdk", "node-name": "disk", "file": file, "extents": extents });
    let error = daemon.error("blockdev-add", node(json!([first])));
    assert!(error.contains("'extents.1' is missing") && error.contains("'disk-s002.vmdk'"), "{error}");
    daemon.ok("blockdev-add", node(json!([first, second])));
    // With the descriptor as a key alone it is as if nothing was there.
    daemon.ok("blockdev-del", json!({ "node-name": "disk" }));
    let error = daemon.error("blockdev-add", json!({ "driver": "vmdk", "node-name": "disk", "file": file }));
    assert!(error.contains("'extents.0' is missing") && error.contains("'disk-s001.vmdk'"), "{error}");
}

#[test]
fn an_overlay_notes_the_content_of_its_parent_and_refuses_another() {
    if !judges("an_overlay_notes_the_content_of_its_parent_and_refuses_another", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.path(".");
    img(&dir, &["create", "-q", "-f", "vmdk", "base.vmdk", "4M"]);
    run_in(&dir, "qemu-io", &["-f", "vmdk", "-c", "write -P 1 0 1M", "base.vmdk"]);
    img(&dir, &["create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "overlay.vmdk"]);
    run_in(&dir, "qemu-io", &["-f", "vmdk", "-c", "read -P 1 0 1M", "-c", "write -P 2 4k 4k", "overlay.vmdk"]);
    let serve = Serve::start(&[&scratch.name("overlay.vmdk")]);
    let reads = ["-f", "raw", "-c", "read -P 1 0 4k", "-c", "read -P 2 4k 4k", "-c", "read -P 0 1M 1M"];
    run("qemu-io", &[reads.as_slice(), &[serve.uri.as_str()]].concat());
    drop(serve);
    run_in(&dir, "qemu-io", &["-f", "vmdk", "-c", "write -P 3 3M 64k", "base.vmdk"]);
    let (status, _, err) = doorless(&["serve", &scratch.name("overlay.vmdk")]);
    assert!(!status.success() && err.contains("the parent was changed"), "{err}");
    let cids: Vec<&str> = err.split(|c: char| !c.is_ascii_hexdigit()).filter(|word| word.len() == 8).collect();
    assert_eq!(cids.len(), 2, "{err}");
}

#[test]
fn options_that_cannot_be_are_refused_in_qemu_s_words() {
    let scratch = Scratch::new();
    let dir = scratch.path(".");
    for (format, options, size, reason) in [
        ("vdi", "preallocation=full", "1M", "Preallocation mode 'full' is not supported"),
        ("vdi", "static=off", "513T", "Unsupported VDI image size"),
        ("vpc", "subformat=differencing", "1M", "Invalid subformat 'differencing'"),
        ("vpc", "subformat=dynamic", "2041G", "max size is 2040 GiB"),
        ("vmdk", "subformat=vmfs", "1M", "Invalid subformat 'vmfs'"),
        ("vmdk", "adapter_type=scsi", "1M", "Unknown adapter type: scsi"),
        ("vmdk", "compat6=on,hwversion=7", "1M", "compat6 cannot be enabled with hwversion set"),
        ("vmdk", "subformat=monolithicFlat,zeroed_grain=on", "1M", "Flat image can't enable zeroed grain"),
        ("vmdk", "hwversion=\"\nRW 1 FLAT \"x\"", "1M", "cannot stand in a VMDK descriptor"),
        ("vmdk", "adapter_type=ide", "0", "a VMDK of 0 bytes cannot be made"),
    ] {
        let error = refusal(&dir, &["create", "-q", "-f", format, "-o", options, "image", size]);
        assert!(error.contains(reason), "{format} {options}: {error}");
        assert!(!dir.join("image").exists() && !dir.join("image-flat").exists(), "{format} {options}");
    }
}
