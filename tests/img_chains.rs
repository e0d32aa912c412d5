// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images that are copied, brought down into others and put over others by `doorless img`, beside qemu-img.
#![allow(missing_docs, clippy::unwrap_used)]

mod beside;
mod harness;

use std::path::{Path, PathBuf};
use std::process::Command;

use beside::{Pair, done, err, json, ours, out};
use harness::{Scratch, judges, run_in};

const JUDGES: [&str; 2] = ["qemu-img", "qemu-io"];

fn qemu(dir: &Path, arguments: &[&str]) -> String {
    run_in(dir, "qemu-img", arguments)
}

fn io(dir: &Path, format: &str, image: &str, commands: &[&str]) {
    let mut arguments = vec!["-f", format];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    let output = Command::new("qemu-io").args(&arguments).arg(image).current_dir(dir).output().unwrap();
    let said = out(&output) + &err(&output);
    assert!(output.status.success() && !said.contains("failed"), "{commands:?}: {said}");
}

/// A chain of three with data, zeroes and holes in each; the top is longer than the others.
fn chain(dir: &Path, options: &str) {
    std::fs::create_dir(dir).unwrap();
    qemu(dir, &["create", "-q", "-f", "raw", "base.raw", "3M"]);
    io(dir, "raw", "base.raw", &["write -P 1 0 1M", "write -P 2 2M 100k"]);
    qemu(dir, &["create", "-q", "-f", "qcow2", "-o", options, "-b", "base.raw", "-F", "raw", "middle.qcow2"]);
    io(dir, "qcow2", "middle.qcow2", &["write -P 3 512k 256k", "write -z 2M 64k", "write -P 4 2500k 3k"]);
    qemu(dir, &["create", "-q", "-f", "qcow2", "-o", options, "-b", "middle.qcow2", "-F", "qcow2", "top.qcow2", "4M"]);
    io(dir, "qcow2", "top.qcow2", &["write -P 5 600k 10k", "write -z 0 128k", "write -P 6 3500k 100k"]);
    qemu(dir, &["create", "-q", "-f", "raw", "other.raw", "4M"]);
    io(dir, "raw", "other.raw", &["write -P 1 0 512k", "write -P 9 3M 1M"]);
}

/// The same chain twice, and what a guest sees of its top.
fn chains(scratch: &Scratch, options: &str) -> (PathBuf, PathBuf) {
    let (ours, theirs) = (scratch.path("ours"), scratch.path("theirs"));
    for dir in [&ours, &theirs] {
        chain(dir, options);
        qemu(dir, &["convert", "-O", "raw", "top.qcow2", "seen.raw"]);
    }
    (ours, theirs)
}

fn is_as_it_was(dir: &Path, image: &str) {
    assert_eq!(qemu(dir, &["compare", image, "seen.raw"]), "Images are identical.\n", "{image}");
    if image.ends_with("qcow2") {
        assert!(qemu(dir, &["check", image]).contains("No errors"), "{image}");
    }
}

/// What each image of both directories shows is the same.
fn are_alike(ours: &Path, theirs: &Path, images: &[&str]) {
    for image in images {
        let (our, their) = (ours.join(image), theirs.join(image));
        let arguments = ["compare", our.to_str().unwrap(), their.to_str().unwrap()];
        assert_eq!(qemu(ours, &arguments), "Images are identical.\n", "{image}");
    }
}

/// Whether an image has nothing of its own.
fn is_empty(dir: &Path, image: &str) -> bool {
    let map = json(&qemu(dir, &["map", "--output=json", image]));
    map.as_array().unwrap().iter().all(|run| run["depth"] != 0)
}

#[test]
fn a_commit_brings_down_what_the_image_has() {
    if !judges("a_commit_brings_down_what_the_image_has", &JUDGES) {
        return;
    }
    for (options, arguments) in [
        ("compat=1.1", &["commit", "top.qcow2"][..]),
        ("compat=0.10", &["commit", "-q", "-f", "qcow2", "top.qcow2"]),
        ("extended_l2=on", &["commit", "-d", "top.qcow2"]),
        ("cluster_size=4k", &["commit", "-r", "100M", "-b", "base.raw", "top.qcow2"]),
    ] {
        let scratch = Scratch::new();
        let (ours, theirs) = chains(&scratch, options);
        let pair = Pair { ours: &ours, theirs: &theirs };
        pair.same(arguments);
        is_as_it_was(&ours, "top.qcow2");
        is_as_it_was(&ours, if arguments.contains(&"base.raw") { "base.raw" } else { "middle.qcow2" });
        are_alike(&ours, &theirs, &["top.qcow2", "middle.qcow2", "base.raw"]);
        assert_eq!(is_empty(&ours, "top.qcow2"), is_empty(&theirs, "top.qcow2"), "{arguments:?}");
        for refused in [
            &["commit", "-b", "none", "top.qcow2"][..],
            &["commit", "-f", "raw", "base.raw"],
            &["commit", "-U", "top.qcow2"],
        ] {
            if refused[1] != "-U" {
                pair.same(refused);
            }
        }
    }
}

#[test]
fn a_rebase_changes_nothing_that_the_guest_sees() {
    if !judges("a_rebase_changes_nothing_that_the_guest_sees", &JUDGES) {
        return;
    }
    for (options, steps) in [
        ("compat=1.1", &[&["-b", "base.raw", "-F", "raw"][..], &["-b", "other.raw", "-F", "raw"], &["-b", ""]][..]),
        ("compat=0.10", &[&["-b", "other.raw", "-F", "raw"]]),
        ("extended_l2=on", &[&["-b", "other.raw", "-F", "raw"]]),
        ("cluster_size=4k", &[&["-c", "-b", ""]]),
    ] {
        let scratch = Scratch::new();
        let (ours, theirs) = chains(&scratch, options);
        let pair = Pair { ours: &ours, theirs: &theirs };
        for step in steps {
            pair.same(&[&["rebase"], *step, &["top.qcow2"]].concat());
            is_as_it_was(&ours, "top.qcow2");
            let info = json(&qemu(&ours, &["info", "--output=json", "top.qcow2"]));
            assert_eq!(
                info["backing-filename"].as_str().unwrap_or_default(),
                if step.contains(&"") { "" } else { step[1] }
            );
        }
    }
}

#[test]
fn a_rebase_is_refused_as_by_qemu_img_and_done_unsafely_on_request() {
    if !judges("a_rebase_is_refused_as_by_qemu_img_and_done_unsafely_on_request", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let (ours, theirs) = chains(&scratch, "compat=1.1");
    let pair = Pair { ours: &ours, theirs: &theirs };
    for arguments in [
        &["top.qcow2"][..],
        &["-b", "base.raw", "top.qcow2"],
        &["-u", "-b", "x", "top.qcow2"],
        &["-u", "-b", "nowhere", "-F", "qcow2", "middle.qcow2"],
        &["-u", "-b", "", "middle.qcow2"],
    ] {
        let arguments = [&["rebase"], arguments].concat();
        let (our, their) = (beside::ours(&ours, &arguments), beside::theirs(&theirs, &arguments));
        assert_eq!(our.status.code(), their.status.code(), "{arguments:?} {}{}", err(&our), err(&their));
        let backing =
            |dir: &Path| json(&qemu(dir, &["info", "--output=json", "middle.qcow2"]))["backing-filename"].clone();
        assert_eq!(backing(&ours), backing(&theirs), "{arguments:?}");
    }
    pair.same(&["rebase", "-u", "top.qcow2"]);
    let itself = beside::ours(&ours, &["rebase", "-b", "top.qcow2", "-F", "qcow2", "top.qcow2"]);
    assert!(err(&itself).contains("its own backing file"), "{}", err(&itself));
}

#[test]
fn dd_copies_the_blocks_that_qemu_img_copies() {
    if !judges("dd_copies_the_blocks_that_qemu_img_copies", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let (ours, theirs) = chains(&scratch, "compat=1.1");
    let pair = Pair { ours: &ours, theirs: &theirs };
    for arguments in [
        &["dd", "if=seen.raw", "of=copy"][..],
        &["dd", "bs=1M", "count=3", "skip=1", "if=seen.raw", "of=copy"],
        &["dd", "-f", "qcow2", "-O", "raw", "bs=100k", "skip=7", "if=top.qcow2", "of=copy"],
        &["dd", "-U", "-O", "qcow2", "bs=64k", "count=40", "if=top.qcow2", "of=copy"],
        &["dd", "if=seen.raw", "of=copy", "count=0"],
    ] {
        pair.same(arguments);
        let (our, their) = (ours.join("copy"), theirs.join("copy"));
        let compared = ["compare", our.to_str().unwrap(), their.to_str().unwrap()];
        assert_eq!(qemu(&ours, &compared), "Images are identical.\n", "{arguments:?}");
    }
    for refused in [
        &["dd", "if=seen.raw"][..],
        &["dd", "of=copy"],
        &["dd"],
        &["dd", "if=seen.raw", "of=copy", "bs=0"],
        &["dd", "if=seen.raw", "of=copy", "bs=3G"],
        &["dd", "if=seen.raw", "of=copy", "what=1"],
        &["dd", "if=seen.raw", "of=copy", "what"],
    ] {
        pair.same(refused);
    }
}

#[test]
fn a_conversion_leaves_to_a_backing_file_what_only_that_has() {
    if !judges("a_conversion_leaves_to_a_backing_file_what_only_that_has", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let (ours, theirs) = chains(&scratch, "compat=1.1");
    let pair = Pair { ours: &ours, theirs: &theirs };
    for options in [&[][..], &["-c"], &["-o", "cluster_size=4k"], &["-o", "extended_l2=on", "-S", "0"]] {
        let arguments = ["convert", "-O", "qcow2", "-B", "middle.qcow2", "-F", "qcow2"];
        pair.same(&[&arguments[..], options, &["top.qcow2", "copy.qcow2"]].concat());
        is_as_it_was(&ours, "copy.qcow2");
        let size =
            |dir: &Path| json(&qemu(dir, &["check", "--output=json", "copy.qcow2"]))["allocated-clusters"].as_u64();
        assert!(size(&ours) <= size(&theirs), "{options:?}: {:?} {:?}", size(&ours), size(&theirs));
    }
    done(
        &ours,
        &["convert", "-O", "qcow2", "-o", "backing_file=middle.qcow2,backing_fmt=qcow2", "top.qcow2", "copy.qcow2"],
    );
    is_as_it_was(&ours, "copy.qcow2");
    done(&ours, &["convert", "-O", "qcow2", "-o", "data_file=data.raw", "top.qcow2", "external.qcow2"]);
    is_as_it_was(&ours, "external.qcow2");
}

#[test]
fn several_sources_stand_one_behind_the_other() {
    if !judges("several_sources_stand_one_behind_the_other", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let (ours, theirs) = chains(&scratch, "compat=1.1");
    for dir in [&ours, &theirs] {
        std::fs::write(dir.join("odd.raw"), [7; 1000]).unwrap();
    }
    let pair = Pair { ours: &ours, theirs: &theirs };
    for options in [&["-O", "raw"][..], &["-O", "qcow2"], &["-O", "qcow2", "-c"]] {
        pair.same(&[&["convert"], options, &["top.qcow2", "odd.raw", "middle.qcow2", "copy"]].concat());
        let (our, their) = (ours.join("copy"), theirs.join("copy"));
        let compared = ["compare", our.to_str().unwrap(), their.to_str().unwrap()];
        assert_eq!(qemu(&ours, &compared), "Images are identical.\n", "{options:?}");
    }
    pair.same(&["convert", "-O", "qcow2", "-B", "base.raw", "-F", "raw", "top.qcow2", "middle.qcow2", "copy"]);
}

#[test]
fn a_snapshot_and_bitmaps_are_copied_on_request() {
    if !judges("a_snapshot_and_bitmaps_are_copied_on_request", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let (ours, theirs) = chains(&scratch, "compat=1.1");
    let pair = Pair { ours: &ours, theirs: &theirs };
    for dir in [&ours, &theirs] {
        qemu(dir, &["snapshot", "-c", "kept", "top.qcow2"]);
        io(dir, "qcow2", "top.qcow2", &["write -P 8 0 4M"]);
        qemu(dir, &["resize", "-q", "top.qcow2", "6M"]);
        qemu(dir, &["bitmap", "--add", "top.qcow2", "marks"]);
        qemu(dir, &["bitmap", "--add", "--disable", "-g", "4k", "top.qcow2", "fine"]);
        io(dir, "qcow2", "top.qcow2", &["write -P 8 5M 1k"]);
    }
    for which in ["kept", "1", "snapshot.name=kept", "snapshot.id=1,snapshot.name=kept"] {
        pair.same(&["convert", "-O", "raw", "-l", which, "top.qcow2", "copy.raw"]);
        is_as_it_was(&ours, "copy.raw");
    }
    let none = beside::ours(&ours, &["convert", "-l", "none", "top.qcow2", "none.raw"]);
    assert!(none.status.code() == Some(1) && !ours.join("none.raw").exists(), "{}", err(&none));
    pair.same(&["convert", "--bitmaps", "-O", "qcow2", "top.qcow2", "copy.qcow2"]);
    let bitmaps = |dir: &Path| {
        let mut info = json(&qemu(dir, &["info", "--output=json", "copy.qcow2"]));
        let mut bitmaps = info["format-specific"]["data"]["bitmaps"].take().as_array().unwrap().clone();
        bitmaps.sort_by_key(|bitmap| bitmap["name"].to_string());
        bitmaps
    };
    assert_eq!(bitmaps(&ours), bitmaps(&theirs));
    let crash = ["-f", "qcow2", "-c", "write 1M 64k", "-c", "flush", "-c", "abort", "top.qcow2"];
    for dir in [&ours, &theirs] {
        Command::new("qemu-io").args(crash).current_dir(dir).output().unwrap();
    }
    let refused = beside::ours(&ours, &["convert", "--bitmaps", "-O", "qcow2", "top.qcow2", "copy.qcow2"]);
    assert!(err(&refused).contains("Cannot copy inconsistent bitmap"), "{}", err(&refused));
    done(&ours, &["convert", "--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", "top.qcow2", "copy.qcow2"]);
}

#[test]
fn what_cannot_be_read_is_salvaged_as_zeroes() {
    if !judges("what_cannot_be_read_is_salvaged_as_zeroes", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.path("");
    qemu(&dir, &["create", "-q", "-f", "qcow2", "broken.qcow2", "1M"]);
    io(&dir, "qcow2", "broken.qcow2", &["write -P 1 0 1M"]);
    let mut bytes = std::fs::read(dir.join("broken.qcow2")).unwrap();
    let word = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let l1 = usize::try_from(word(&bytes, 40)).unwrap();
    let l2 = usize::try_from(word(&bytes, l1) & 0x00ff_ffff_ffff_fe00).unwrap();
    // The sixth cluster lies nowhere: its offset is not aligned.
    bytes[l2 + 5 * 8 + 6] |= 2;
    std::fs::write(dir.join("broken.qcow2"), bytes).unwrap();
    let refused = ours(&dir, &["convert", "-O", "raw", "broken.qcow2", "copy.raw"]);
    assert!(refused.status.code() == Some(1) && !dir.join("copy.raw").exists(), "{}", err(&refused));
    let salvaged = ours(&dir, &["convert", "--salvage", "-O", "raw", "broken.qcow2", "copy.raw"]);
    assert!(salvaged.status.success() && err(&salvaged).contains("warning"), "{}", err(&salvaged));
    let copy = std::fs::read(dir.join("copy.raw")).unwrap();
    let expected = |at: usize| if (5 << 16..6 << 16).contains(&at) { 0 } else { 1 };
    assert!(copy.len() == 1 << 20 && copy.iter().enumerate().all(|(at, &byte)| byte == expected(at)));
}

#[test]
fn options_of_conversions_that_do_not_go_together_are_refused() {
    let scratch = Scratch::new();
    let dir = scratch.path("");
    std::fs::write(dir.join("a.raw"), [1; 4096]).unwrap();
    for (arguments, why) in [
        (&["-C"][..], "-C"),
        (&["--target-is-zero"], "requires use of -n"),
        (&["--target-image-opts"], "requires use of -n"),
        (&["--skip-broken-bitmaps"], "requires --bitmaps"),
    ] {
        let output = ours(&dir, &[&["convert"], arguments, &["a.raw", "b.raw"]].concat());
        assert!(output.status.code() == Some(1) && err(&output).contains(why), "{arguments:?}: {}", err(&output));
        assert!(!dir.join("b.raw").exists());
    }
}

#[test]
fn bench_does_what_it_says() {
    if !judges("bench_does_what_it_says", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let (ours, theirs) = chains(&scratch, "compat=1.1");
    let pair = Pair { ours: &ours, theirs: &theirs };
    let told = |arguments: &[&str]| {
        let without_time =
            |text: String| text.lines().filter(|line| !line.starts_with("Run")).collect::<Vec<_>>().join("\n");
        assert_eq!(
            without_time(done(&ours, arguments)),
            without_time(out(&beside::theirs(&theirs, arguments))),
            "{arguments:?}"
        );
    };
    told(&["bench", "-f", "raw", "-c", "10", "seen.raw"]);
    told(&["bench", "-c", "40", "-d", "4", "-s", "8k", "-S", "16k", "-o", "4k", "-f", "qcow2", "top.qcow2"]);
    told(&[
        "bench",
        "-w",
        "--pattern",
        "7",
        "-c",
        "64",
        "-s",
        "64k",
        "--flush-interval",
        "64",
        "-f",
        "qcow2",
        "top.qcow2",
    ]);
    io(&ours, "qcow2", "top.qcow2", &["read -P 7 0 4M"]);
    for refused in [
        &["bench", "-f", "raw", "--flush-interval", "10", "seen.raw"][..],
        &["bench", "-f", "raw", "-w", "--flush-interval", "2", "-d", "4", "seen.raw"],
        &["bench", "-f", "raw", "-c", "x", "seen.raw"],
        &["bench", "-f", "raw", "-w", "--pattern", "300", "seen.raw"],
        &["bench", "-f", "raw", "-i", "what", "seen.raw"],
    ] {
        pair.same(refused);
    }
}
