// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an image keeps besides its disk: snapshots and bitmaps, changed by `doorless img` as qemu-img changes them.
#![allow(missing_docs, clippy::unwrap_used)]

mod beside;
mod harness;

use std::path::Path;
use std::process::Command;

use beside::{Pair, done, err, json, ours, out};
use harness::{Scratch, judges, run_in};
use serde_json::{Value, json};

const JUDGES: [&str; 2] = ["qemu-img", "qemu-io"];

fn io(dir: &Path, image: &str, commands: &[&str]) {
    let mut arguments = vec!["-f", "qcow2"];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    let output = Command::new("qemu-io").args(&arguments).arg(image).current_dir(dir).output().unwrap();
    let said = out(&output) + &err(&output);
    assert!(output.status.success() && !said.contains("failed"), "{commands:?}: {said}");
}

/// Both make an image of their own with qemu-img, and change it with theirs.
fn both(scratch: &Scratch) -> (std::path::PathBuf, std::path::PathBuf) {
    let (ours, theirs) = (scratch.path("ours"), scratch.path("theirs"));
    for dir in [&ours, &theirs] {
        std::fs::create_dir(dir).unwrap();
        run_in(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "image.qcow2", "4M"]);
        run_in(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "small.qcow2", "1M"]);
        run_in(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "old.qcow2", "4M"]);
        run_in(dir, "qemu-img", &["create", "-q", "-f", "raw", "image.raw", "4M"]);
    }
    (ours, theirs)
}

/// Snapshots as both programs list them; dates are not the same.
fn listed(dir: &Path, image: &str) -> Vec<String> {
    let (ours, theirs) = (done(dir, &["snapshot", "-l", image]), run_in(dir, "qemu-img", &["snapshot", "-l", image]));
    assert_eq!(ours, theirs);
    let bare = |line: &str| line.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
    ours.lines().skip(2).map(bare).collect()
}

#[test]
fn snapshots_are_made_applied_and_let_go_as_by_qemu_img() {
    if !judges("snapshots_are_made_applied_and_let_go_as_by_qemu_img", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let (ours, theirs) = both(&scratch);
    let pair = Pair { ours: &ours, theirs: &theirs };
    let content = |pattern: u8| {
        for dir in [&ours, &theirs] {
            io(dir, "image.qcow2", &[&format!("read -P {pattern} 1M 64k")]);
            assert!(run_in(dir, "qemu-img", &["check", "image.qcow2"]).contains("No errors"));
        }
    };
    let write = |pattern: u8| {
        [&ours, &theirs].iter().for_each(|dir| io(dir, "image.qcow2", &[&format!("write -P {pattern} 1M 64k")]));
    };
    write(1);
    pair.same(&["snapshot", "-c", "one", "image.qcow2"]);
    write(2);
    pair.same(&["snapshot", "-c", "two", "-f", "qcow2", "image.qcow2"]);
    pair.same(&["snapshot", "-q", "-c", "one", "image.qcow2"]);
    write(3);
    pair.same(&["snapshot", "-a", "one", "image.qcow2"]);
    content(1);
    pair.same(&["snapshot", "-a", "2", "image.qcow2"]);
    content(2);
    for refused in [
        &["snapshot", "-d", "three", "image.qcow2"][..],
        // A name is wanted here.
        &["snapshot", "-d", "2", "image.qcow2"],
        &["snapshot", "-c", "a", "-d", "b", "image.qcow2"],
        &["snapshot", "-l", "-d", "b", "image.qcow2"],
        &["snapshot", "-U", "-c", "x", "image.qcow2"],
        &["snapshot", "-d", "x", "image.raw"],
        &["snapshot", "-l", "image.raw"],
    ] {
        pair.same(refused);
    }
    for (action, image, why) in [
        ("-a", "image.qcow2", "Could not apply snapshot 'x'"),
        ("-c", "image.raw", "Could not create snapshot 'x'"),
        ("-l", "missing", "missing"),
    ] {
        let name: &[&str] = if action == "-l" { &[] } else { &["x"] };
        let output = beside::ours(&ours, &[&["snapshot", action], name, &[image]].concat());
        assert!(output.status.code() == Some(1) && err(&output).contains(why), "{}", err(&output));
    }
    pair.same(&["snapshot", "-d", "one", "image.qcow2"]);
    assert_eq!(listed(&ours, "image.qcow2"), ["2 two", "3 one"]);
    assert_eq!(listed(&theirs, "image.qcow2"), ["2 two", "3 one"]);
    content(2);
    let info = |kind: &str| {
        let arguments = ["info", kind, "image.qcow2"];
        (done(&ours, &arguments), run_in(&ours, "qemu-img", &arguments))
    };
    let (our, their) = info("--output=human");
    assert_eq!(our, their);
    let (our, their) = info("--output=json");
    assert_eq!(json(&our), json(&their));
}

/// What an image says of its bitmaps, and the marks of those that can be looked at: through an export of QEMU's.
fn bitmaps(dir: &Path, image: &str) -> Value {
    let info = |text: String| json(&text)["format-specific"]["data"]["bitmaps"].take();
    let theirs = info(run_in(dir, "qemu-img", &["info", "--output=json", image]));
    assert_eq!(info(done(dir, &["info", "--output=json", image])), theirs);
    assert_eq!(done(dir, &["info", image]), run_in(dir, "qemu-img", &["info", image]));
    let mut all = theirs.as_array().cloned().unwrap_or_default();
    all.sort_by_key(|bitmap| bitmap["name"].to_string());
    all.into()
}

#[test]
fn bitmaps_are_changed_in_the_order_of_the_command_line() {
    if !judges("bitmaps_are_changed_in_the_order_of_the_command_line", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let (ours, theirs) = both(&scratch);
    let pair = Pair { ours: &ours, theirs: &theirs };
    let long = "n".repeat(1024);
    for arguments in [
        &["--add", "image.qcow2", "b0"][..],
        &["--add", "image.qcow2", "b0"],
        &["--add", "--disable", "-g", "4k", "image.qcow2", "b1"],
        &["--add", "-g", "4k", "--enable", "--disable", "--enable", "--clear", "image.qcow2", "b2"],
        &["--disable", "--enable", "image.qcow2", "b1"],
        &["--enable", "--disable", "-f", "qcow2", "image.qcow2", "b1"],
        &["--add", "-g", "100", "image.qcow2", "b3"],
        &["--add", "-g", "256", "image.qcow2", "b3"],
        &["--add", "-g", "4G", "image.qcow2", "b3"],
        &["-g", "4k", "--clear", "image.qcow2", "b1"],
        &["--remove", "image.qcow2", "zz"],
        &["--clear", "image.qcow2", "zz"],
        &["--merge", "zz", "image.qcow2", "b0"],
        &["--merge", "b1", "image.qcow2", "zz"],
        &["--merge", "b1", "image.qcow2", "b0"],
        &["--merge", "b1", "-b", "small.qcow2", "image.qcow2", "b0"],
        &["--add", "--merge", "b1", "-b", "image.qcow2", "-F", "qcow2", "small.qcow2", "m"],
        &["-b", "image.qcow2", "--add", "small.qcow2", "m2"],
        &["-F", "qcow2", "--add", "small.qcow2", "m2"],
        &["small.qcow2", "m2"],
        &["--add", "image.qcow2", ""],
        &["--remove", "--add", "image.qcow2", "b0"],
        &["--add", "--remove", "--remove", "image.qcow2", "b9"],
    ] {
        pair.same(&[&["bitmap"], arguments].concat());
    }
    for image in ["image.qcow2", "small.qcow2"] {
        assert_eq!(bitmaps(&ours, image), bitmaps(&theirs, image));
    }
    // Messages of theirs name a node.
    for refused in [["old.qcow2", "m"], ["image.raw", "m"], ["image.qcow2", &long]] {
        let output = beside::ours(&ours, &[&["bitmap", "--add"], &refused[..]].concat());
        assert!(
            output.status.code() == Some(1) && err(&output).contains("Operation add on bitmap"),
            "{}",
            err(&output)
        );
    }
    // Left behind by a program that crashed.
    let crash = ["-f", "qcow2", "-c", "write 1M 64k", "-c", "flush", "-c", "abort", "image.qcow2"];
    for dir in [&ours, &theirs] {
        Command::new("qemu-io").args(crash).current_dir(dir).output().unwrap();
    }
    for arguments in [
        &["--clear", "image.qcow2", "b2"][..],
        &["--disable", "image.qcow2", "b2"],
        &["--merge", "b2", "image.qcow2", "b1"],
        &["--merge", "b1", "image.qcow2", "b2"],
    ] {
        let output = beside::ours(&ours, &[&["bitmap"], arguments].concat());
        assert!(err(&output).contains("is inconsistent and cannot be used"), "{}", err(&output));
    }
    assert_eq!(bitmaps(&ours, "image.qcow2")[0]["flags"], json!(["in-use", "auto"]));
    pair.same(&["bitmap", "--remove", "image.qcow2", "b2"]);
    assert_eq!(bitmaps(&ours, "image.qcow2"), bitmaps(&theirs, "image.qcow2"));
}

#[test]
fn marks_of_qemu_are_merged_into_bitmaps_of_other_images() {
    if !judges("marks_of_qemu_are_merged_into_bitmaps_of_other_images", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.path("");
    for image in ["a.qcow2", "b.qcow2"] {
        run_in(&dir, "qemu-img", &["create", "-q", "-f", "qcow2", image, "4M"]);
    }
    run_in(&dir, "qemu-img", &["bitmap", "--add", "-g", "4k", "a.qcow2", "fine"]);
    io(&dir, "a.qcow2", &["write 1M 4k", "write 3M 64k"]);
    done(&dir, &["bitmap", "--add", "--merge", "fine", "-b", "a.qcow2", "b.qcow2", "coarse"]);
    done(&dir, &["bitmap", "--add", "-g", "512", "--merge", "coarse", "--disable", "b.qcow2", "copy"]);
    // QEMU tells the marks to a client of an export.
    let marks = |name: &str| {
        let map = format!("x-dirty-bitmap=qemu:dirty-bitmap:{name}");
        let socket = dir.join("nbd.sock");
        let mut server = Command::new("qemu-nbd")
            .args(["-r", "-f", "qcow2", "-B", name, "-k", socket.to_str().unwrap(), "b.qcow2"])
            .current_dir(&dir)
            .spawn()
            .unwrap();
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            assert!(server.try_wait().unwrap().is_none(), "qemu-nbd has ended");
            std::thread::yield_now();
        }
        let options = format!("driver=nbd,server.type=unix,server.path={},{map}", socket.display());
        let runs = run_in(&dir, "qemu-img", &["map", "--output=json", "--image-opts", &options]);
        server.wait().unwrap();
        let runs = json(&runs);
        let runs = runs.as_array().unwrap().iter().filter(|run| run["data"] == false);
        runs.map(|run| (run["start"].as_u64().unwrap(), run["length"].as_u64().unwrap())).collect::<Vec<_>>()
    };
    for name in ["coarse", "copy"] {
        assert_eq!(marks(name), [(1 << 20, 65536), (3 << 20, 65536)], "{name}");
    }
    assert!(ours(&dir, &["check", "b.qcow2"]).status.success());
}
