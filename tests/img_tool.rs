// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `doorless img` beside qemu-img: the same images, the same answers.
#![allow(missing_docs, clippy::unwrap_used)]

mod beside;
mod harness;

use std::path::Path;
use std::process::Command;

use beside::{done, err, json, ours, out, theirs};
use harness::{DOORLESS, Scratch, judges, noise, run, text};
use serde_json::Value;

const JUDGES: [&str; 2] = ["qemu-img", "qemu-io"];

/// Takes out what two images that say the same differ in: sizes of their files.
fn without_sizes(mut value: Value) -> Value {
    fn strip(value: &mut Value) {
        match value {
            Value::Object(members) => {
                members.remove("actual-size");
                if members.get("format") == Some(&"file".into()) {
                    members.remove("virtual-size");
                }
                members.values_mut().for_each(strip);
            }
            Value::Array(values) => values.iter_mut().for_each(strip),
            _ => {}
        }
    }
    strip(&mut value);
    value
}

/// An overlay with data, zeroes and holes over a raw file, and images with a snapshot and with compressed clusters.
fn images(dir: &Path) -> Vec<&'static str> {
    let qemu = |arguments: &[&str]| assert!(theirs(dir, arguments).status.success(), "{arguments:?}");
    let io = |commands: &[&str], format: &str, image: &str| {
        let mut arguments = vec!["-f", format];
        commands.iter().for_each(|command| arguments.extend(["-c", command]));
        let output = Command::new("qemu-io").args(&arguments).arg(image).current_dir(dir).output().unwrap();
        assert!(output.status.success(), "{}", err(&output));
    };
    qemu(&["create", "-q", "-f", "raw", "base.raw", "2M"]);
    io(&["write -P 1 0 128k"], "raw", "base.raw");
    qemu(&["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "overlay.qcow2", "4M"]);
    io(&["write -P 2 1M 200k", "write -z -u 2M 64k"], "qcow2", "overlay.qcow2");
    qemu(&["create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", "packed.qcow2", "8M"]);
    io(&["write -c -P 3 0 1M", "write -P 4 3M 64k"], "qcow2", "packed.qcow2");
    qemu(&["create", "-q", "-f", "qcow2", "-o", "compat=0.10,cluster_size=4k", "old.qcow2", "8M"]);
    io(&["write -P 5 1M 1M"], "qcow2", "old.qcow2");
    qemu(&["snapshot", "-c", "snapshot", "old.qcow2"]);
    io(&["write -P 6 1M 40k"], "qcow2", "old.qcow2");
    qemu(&["create", "-q", "-f", "qcow2", "-o", "data_file=data.raw,data_file_raw=on", "external.qcow2", "3M"]);
    io(&["write -P 7 64k 64k"], "qcow2", "external.qcow2");
    vec!["base.raw", "overlay.qcow2", "packed.qcow2", "old.qcow2", "external.qcow2"]
}

#[test]
fn answers_about_images_are_qemu_imgs() {
    if !judges("answers_about_images_are_qemu_imgs", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.path("");
    for image in images(&dir) {
        for verb in [
            &["info"][..],
            &["info", "-U"],
            &["info", "--backing-chain"],
            &["check"],
            &["map"],
            &["measure", "-O", "qcow2"],
            &["measure", "-O", "qcow2", "-o", "cluster_size=4k"],
            &["measure", "-O", "raw"],
            &["compare", "base.raw"],
            &["compare", "-s", "base.raw"],
        ] {
            for kind in ["human", "json"] {
                let output = format!("--output={kind}");
                let mut arguments = verb.to_vec();
                if verb[0] != "compare" {
                    arguments.push(&output);
                }
                arguments.push(image);
                let (ours, theirs) = (ours(&dir, &arguments), theirs(&dir, &arguments));
                assert_eq!(ours.status.code(), theirs.status.code(), "{arguments:?}: {}{}", err(&ours), err(&theirs));
                if kind == "json" && verb[0] != "compare" && theirs.status.success() {
                    let (mut ours, mut theirs) = (json(&out(&ours)), json(&out(&theirs)));
                    if verb[0] == "info" && image == "external.qcow2" || verb[0] == "measure" {
                        // QEMU 10.0 shows the data file's node, which is not shown here; it measures bitmaps, of which there are none.
                        for value in [&mut ours, &mut theirs] {
                            value
                                .as_object_mut()
                                .map(|members| (members.remove("children"), members.remove("bitmaps")));
                        }
                    }
                    assert_eq!(ours, theirs, "{arguments:?}");
                } else {
                    let theirs = out(&theirs).replace("bitmaps size: 0\n", "");
                    assert_eq!(out(&ours), theirs, "{arguments:?}");
                }
            }
        }
    }
}

#[test]
fn images_that_are_made_are_those_that_qemu_img_makes() {
    if !judges("images_that_are_made_are_those_that_qemu_img_makes", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.path("");
    run("qemu-img", &["create", "-q", "-f", "raw", text(&dir.join("base.raw")), "3M"]);
    let mut options: Vec<String> = [
        "",
        "compat=0.10",
        "compat=v2,cluster_size=1k",
        "compat=v3",
        "cluster_size=512",
        "cluster_size=2M",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k",
        "lazy_refcounts=on",
        "compression_type=zstd",
        "data_file=data.raw",
        "data_file=data.raw,data_file_raw=on",
        "backing_file=base.raw,backing_fmt=raw",
        "backing_file=base.raw,backing_fmt=raw,extended_l2=on,preallocation=metadata",
        "data_file=data.raw,preallocation=metadata",
        "data_file=data.raw,preallocation=full",
        // Refused.
        "cluster_size=100",
        "cluster_size=4M",
        "compat=0.10,extended_l2=on",
        "extended_l2=on,cluster_size=8k",
        "compat=0.10,lazy_refcounts=on",
        "refcount_bits=7",
        "refcount_bits=128",
        "compat=0.10,refcount_bits=8",
        "data_file_raw=on",
        "compat=0.10,compression_type=zstd",
        "compat=0.10,data_file=data.raw",
        "compression_type=foo",
        "compat=2.0",
        "preallocation=foo",
        "backing_fmt=raw",
        "backing_file=base.raw,backing_fmt=raw,preallocation=metadata",
        "backing_file=base.raw,backing_fmt=raw,data_file=data.raw,data_file_raw=on",
        "cluster_size=512,size=1T",
        "foo=1",
        "cluster_size=abc",
        "lazy_refcounts=maybe",
    ]
    .map(str::to_owned)
    .into();
    options.extend([1, 2, 4, 8, 16, 32, 64].map(|bits| format!("refcount_bits={bits},cluster_size=4k")));
    options.extend(["metadata", "falloc", "full"].map(|mode| format!("preallocation={mode}")));
    options.push("preallocation=metadata,cluster_size=512,refcount_bits=1".into());
    options.push("preallocation=falloc,cluster_size=512,refcount_bits=64".into());
    for options in options {
        let size: &[&str] = if options.contains("size=1T") { &[] } else { &["3M"] };
        let arguments = |image: &'static str| {
            let mut arguments = vec!["create", "-f", "qcow2"];
            if !options.is_empty() {
                arguments.extend(["-o", &options]);
            }
            [arguments, vec![image], size.to_vec()].concat()
        };
        let _ = std::fs::remove_file(dir.join("image.qcow2"));
        let their = theirs(&dir, &arguments("image.qcow2"));
        let described = |dir: &Path| without_sizes(json(&run_in(dir, &["info", "--output=json", "image.qcow2"])));
        let (expected, line) = (their.status.success().then(|| described(&dir)), out(&their));
        let their_text = err(&their);
        let their_len = std::fs::metadata(dir.join("image.qcow2")).map_or(0, |file| file.len());
        let _ = std::fs::remove_file(dir.join("image.qcow2"));
        let _ = std::fs::remove_file(dir.join("data.raw"));
        let our = ours(&dir, &arguments("image.qcow2"));
        assert_eq!(our.status.code(), their.status.code(), "{options}: {}{their_text}", err(&our));
        let Some(expected) = expected else {
            let reason = their_text.lines().next().unwrap_or_default().rsplit(": ").next().unwrap_or_default();
            assert!(err(&our).contains(reason), "{options}: {} instead of {reason}", err(&our));
            assert!(!dir.join("image.qcow2").exists(), "{options}: nothing is left behind");
            continue;
        };
        assert_eq!(out(&our), line, "{options}");
        assert_eq!(described(&dir), expected, "{options}");
        let checked = run_in(&dir, &["check", "image.qcow2"]);
        assert!(checked.contains("No errors were found"), "{options}: {checked}");
        if options.contains("preallocation=f") && !options.contains("data_file") {
            let len = std::fs::metadata(dir.join("image.qcow2")).unwrap().len();
            assert!(len <= their_len + (2 << 20) && len >= 3 << 20, "{options}: {len} bytes, QEMU's {their_len}");
        }
        let image = dir.join("image.qcow2");
        let path = text(&image);
        let io = Command::new("qemu-io")
            .args(["-f", "qcow2", "-c", "read -P 0 0 3M", "-c", "write -P 7 1M 300k", "-c", "read -P 7 1M 300k", path])
            .current_dir(&dir)
            .output()
            .unwrap();
        assert!(io.status.success() && !out(&io).contains("failed"), "{options}: {}{}", out(&io), err(&io));
        let checked = run_in(&dir, &["check", "image.qcow2"]);
        assert!(checked.contains("No errors were found"), "{options}, written: {checked}");
    }
}

/// qemu-img in a directory; it must succeed.
fn run_in(dir: &Path, arguments: &[&str]) -> String {
    harness::run_in(dir, "qemu-img", arguments)
}

#[test]
fn what_is_converted_is_what_was_there() {
    if !judges("what_is_converted_is_what_was_there", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.path("");
    let mut disk = noise(5 << 20, 7);
    disk[1 << 20..2 << 20].fill(0);
    disk.truncate((5 << 20) - 1536);
    std::fs::write(dir.join("noise.raw"), &disk).unwrap();
    for source in [images(&dir), vec!["noise.raw"]].concat() {
        for target in [
            &["-O", "raw"][..],
            &["-O", "qcow2"],
            &["-O", "qcow2", "-c"],
            &["-O", "qcow2", "-c", "-o", "compression_type=zstd"],
            &["-O", "qcow2", "-o", "cluster_size=4k,compat=0.10", "-c"],
            &["-O", "qcow2", "-o", "extended_l2=on", "-S", "0", "-m", "4", "-W"],
            &["-O", "qcow2", "-o", "preallocation=metadata"],
        ] {
            done(&dir, &[&["convert"], target, &[source, "copy"]].concat());
            let identical = run_in(&dir, &["compare", source, "copy"]);
            assert_eq!(identical, "Images are identical.\n", "{source} {target:?}");
            if target[1] == "qcow2" {
                assert!(run_in(&dir, &["check", "copy"]).contains("No errors"), "{source} {target:?}");
            }
        }
        // Over an image that is there, and holds something else.
        run_in(&dir, &["create", "-q", "-f", "qcow2", "there.qcow2", "8M"]);
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 9 0 8M", text(&dir.join("there.qcow2"))]);
        done(&dir, &["convert", "-n", "-O", "qcow2", source, "there.qcow2"]);
        assert_eq!(run_in(&dir, &["compare", source, "there.qcow2"]).lines().last(), Some("Images are identical."));
    }
    let names: Vec<String> =
        std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(!names.iter().any(|name| name.contains(".part")), "{names:?}");
}

#[test]
fn ctrl_c_leaves_no_half_image() {
    let scratch = Scratch::new();
    let dir = scratch.path("");
    std::fs::write(dir.join("noise.raw"), noise(64 << 20, 3)).unwrap();
    let parts = || {
        let names = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_str().unwrap().contains(".part")).count()
    };
    loop {
        std::fs::write(dir.join("copy.qcow2"), b"what was there").unwrap();
        // Who runs in the background of a shell has the signal ignored, and so would its children.
        let mut command = Command::new("env");
        command
            .args(["--default-signal=INT", DOORLESS, "img", "convert", "-c", "-O", "qcow2", "noise.raw", "copy.qcow2"])
            .current_dir(&dir);
        let mut child = command.spawn().unwrap();
        while parts() == 0 && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        // On a busy machine it may have been through before the signal: once more.
        if !child.wait().unwrap().success() {
            break;
        }
    }
    while parts() > 0 {
        std::thread::yield_now();
    }
    assert!(std::fs::read(dir.join("copy.qcow2")).unwrap() == b"what was there");
}

#[test]
fn images_are_resized_and_amended_as_qemu_img_does() {
    if !judges("images_are_resized_and_amended_as_qemu_img_does", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.path("");
    run_in(&dir, &["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "image.qcow2", "4M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 5 0 4M", text(&dir.join("image.qcow2"))]);
    let size = || json(&run_in(&dir, &["info", "--output=json", "image.qcow2"]))["virtual-size"].as_u64().unwrap();
    let clean = || assert!(run_in(&dir, &["check", "image.qcow2"]).contains("No errors"));
    assert_eq!(done(&dir, &["resize", "image.qcow2", "+1M"]), "Image resized.\n");
    assert_eq!(size(), 5 << 20);
    let refused = ours(&dir, &["resize", "image.qcow2", "1M"]);
    assert!(refused.status.code() == Some(1) && err(&refused).contains("--shrink"), "{}", err(&refused));
    done(&dir, &["resize", "--shrink", "image.qcow2", "1M"]);
    assert_eq!(size(), 1 << 20);
    for mode in ["metadata", "falloc", "full"] {
        done(&dir, &["resize", &format!("--preallocation={mode}"), "image.qcow2", "+1M"]);
        clean();
    }
    let map = json(&run_in(&dir, &["map", "--output=json", "image.qcow2"]));
    assert!(map.as_array().unwrap().iter().all(|run| run["present"] == true), "{map}");
    let image = dir.join("image.qcow2");
    run("qemu-io", &["-f", "qcow2", "-c", "read -P 5 0 1M", "-c", "read -P 0 1M 3M", text(&image)]);
    let lazy = ours(&dir, &["amend", "-o", "lazy_refcounts=on", "image.qcow2"]);
    assert!(err(&lazy).contains("Lazy refcounts only supported"), "{}", err(&lazy));
    run_in(&dir, &["create", "-q", "-f", "raw", "base.raw", "4M"]);
    done(&dir, &["amend", "-o", "compat=1.1,lazy_refcounts=on,backing_file=base.raw,backing_fmt=raw", "image.qcow2"]);
    let info = json(&run_in(&dir, &["info", "--output=json", "image.qcow2"]));
    let facts = &info["format-specific"]["data"];
    assert_eq!((facts["compat"].as_str(), facts["lazy-refcounts"].as_bool()), (Some("1.1"), Some(true)));
    assert_eq!(
        (info["backing-filename"].as_str(), info["backing-filename-format"].as_str()),
        (Some("base.raw"), Some("raw"))
    );
    clean();
    for (bits, works) in [(64, true), (1, true), (3, false), (16, true)] {
        let arguments = ["amend", "-o", &format!("refcount_bits={bits}"), "image.qcow2"];
        let amended = ours(&dir, &arguments);
        assert_eq!(amended.status.success(), works, "{bits}: {}", err(&amended));
        let info = json(&run_in(&dir, &["info", "--output=json", "image.qcow2"]));
        assert_eq!(info["format-specific"]["data"]["refcount-bits"] == bits, works);
        clean();
    }
}

#[test]
fn an_image_of_version_3_becomes_one_of_version_2_and_reads_the_same() {
    if !judges("an_image_of_version_3_becomes_one_of_version_2_and_reads_the_same", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.path("");
    run_in(&dir, &["create", "-q", "-f", "raw", "base.raw", "4M"]);
    run("qemu-io", &["-f", "raw", "-c", "write -P 1 0 4M", text(&dir.join("base.raw"))]);
    for backed in [false, true] {
        let mut create = vec!["create", "-q", "-f", "qcow2"];
        if backed {
            create.extend(["-b", "base.raw", "-F", "raw"]);
        }
        run_in(&dir, &[&create[..], &["image.qcow2", "4M"]].concat());
        let image = dir.join("image.qcow2");
        // Zeroes with a cluster of their own, with one that the snapshot shares, and with none; a table that is shared.
        let before = ["write -P 5 0 1M", "write -z 256k 256k", "write -z 2M 512k"];
        let after = ["write -z 0 128k", "write -P 6 1M 64k", "write -z 3M 128k"];
        for (commands, snapshot) in [(&before, Some("first")), (&after, None)] {
            for command in commands {
                run("qemu-io", &["-f", "qcow2", "-c", command, text(&image)]);
            }
            if let Some(name) = snapshot {
                run_in(&dir, &["snapshot", "-c", name, "image.qcow2"]);
            }
        }
        run_in(&dir, &["convert", "-O", "raw", "image.qcow2", "now.raw"]);
        run_in(&dir, &["convert", "-O", "raw", "-l", "first", "image.qcow2", "then.raw"]);
        done(&dir, &["amend", "-o", "compat=0.10", "image.qcow2"]);
        assert_eq!(std::fs::read(&image).unwrap()[..8], *b"QFI\xfb\0\0\0\x02");
        assert!(run_in(&dir, &["check", "image.qcow2"]).contains("No errors"));
        assert!(run_in(&dir, &["compare", "image.qcow2", "now.raw"]).contains("identical"));
        run_in(&dir, &["convert", "-O", "raw", "-l", "first", "image.qcow2", "later.raw"]);
        assert!(run_in(&dir, &["compare", "later.raw", "then.raw"]).contains("identical"));
    }
    for (options, why) in [
        ("data_file=data.raw", "data file"),
        ("refcount_bits=64", "refcount_bits=16"),
        ("extended_l2=on", "Extended L2"),
        ("compression_type=zstd", "incompatible features"),
    ] {
        run_in(&dir, &["create", "-q", "-f", "qcow2", "-o", options, "other.qcow2", "4M"]);
        let refused = ours(&dir, &["amend", "-o", "compat=0.10", "other.qcow2"]);
        assert!(refused.status.code() == Some(1) && err(&refused).contains(why), "{}", err(&refused));
    }
    run_in(&dir, &["create", "-q", "-f", "qcow2", "other.qcow2", "4M"]);
    run_in(&dir, &["bitmap", "--add", "other.qcow2", "bits"]);
    assert!(err(&ours(&dir, &["amend", "-o", "compat=0.10", "other.qcow2"])).contains("bitmap --remove"));
}

#[test]
fn an_image_s_data_file_gets_another_name() {
    if !judges("an_image_s_data_file_gets_another_name", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.path("");
    let (data, moved) = (scratch.name("data.raw"), scratch.name("moved.raw"));
    let options = format!("data_file={data},data_file_raw=on");
    run_in(&dir, &["create", "-q", "-f", "qcow2", "-o", &options, "image.qcow2", "4M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 5 0 1M", text(&dir.join("image.qcow2"))]);
    std::fs::rename(&data, &moved).unwrap();
    done(&dir, &["amend", "-o", &format!("data_file={moved},data_file_raw=off"), "image.qcow2"]);
    let facts = json(&run_in(&dir, &["info", "--output=json", "image.qcow2"]))["format-specific"]["data"].clone();
    assert_eq!((facts["data-file"].as_str(), facts["data-file-raw"].as_bool()), (Some(&*moved), Some(false)));
    run("qemu-io", &["-f", "qcow2", "-c", "read -P 5 0 1M", text(&dir.join("image.qcow2"))]);
    assert!(err(&ours(&dir, &["amend", "-o", "data_file_raw=on", "image.qcow2"])).contains("existing images"));
    run_in(&dir, &["create", "-q", "-f", "qcow2", "plain.qcow2", "4M"]);
    assert!(err(&ours(&dir, &["amend", "-o", "data_file=x", "plain.qcow2"])).contains("external data file"));
}

#[test]
fn a_check_repairs_and_says_so_in_its_exit_status() {
    if !judges("a_check_repairs_and_says_so_in_its_exit_status", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.path("");
    run_in(&dir, &["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "image.qcow2", "4M"]);
    let io = ["-f", "qcow2", "-c", "write 0 1M", "-c", "flush", "-c", "abort", "image.qcow2"];
    Command::new("qemu-io").args(io).current_dir(&dir).output().unwrap();
    let status = |arguments: &[&str]| ours(&dir, arguments).status.code();
    assert_eq!(status(&["check", "image.qcow2"]), Some(2));
    assert_eq!(status(&["check", "-r", "all", "image.qcow2"]), Some(0));
    assert_eq!(theirs(&dir, &["check", "image.qcow2"]).status.code(), Some(0));
    run_in(&dir, &["create", "-q", "-f", "raw", "image.raw", "4M"]);
    assert_eq!(status(&["check", "image.raw"]), Some(63));
    assert_eq!(status(&["check", "missing"]), Some(1));
}

#[test]
fn names_in_an_image_lead_nowhere_outside_its_directory() {
    if !judges("names_in_an_image_lead_nowhere", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let (dir, inside) = (scratch.path(""), scratch.path("inside"));
    std::fs::create_dir(&inside).unwrap();
    run_in(&dir, &["create", "-q", "-f", "raw", "outside.raw", "1M"]);
    run_in(&inside, &["create", "-q", "-f", "qcow2", "-b", "../outside.raw", "-F", "raw", "image.qcow2"]);
    for verb in ["map", "info --backing-chain", "convert"] {
        let mut arguments: Vec<&str> = verb.split(' ').collect();
        arguments.push("image.qcow2");
        if verb == "convert" {
            arguments.push("copy.raw");
        }
        let refused = ours(&inside, &arguments);
        assert!(!refused.status.success() && err(&refused).contains("--allow"), "{verb}: {}", err(&refused));
        arguments.extend(["--allow", ".."]);
        done(&inside, &arguments);
    }
}
