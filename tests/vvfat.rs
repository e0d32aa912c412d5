// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A directory as a FAT disk, as fsck.fat, mtools, sfdisk and a guest see it.
#![allow(missing_docs, clippy::unwrap_used)]

mod guest;
mod harness;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use guest::Kernel;
use harness::{DOORLESS, Running, Scratch, Serve, TestDaemon, judges, noise, run};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Where the partition of a hard disk begins.
const PARTITION: usize = 1 << 20;

/// Files with every kind of name and size, and directories.
fn make_tree(root: &Path) {
    let files: [(&str, usize); 17] = [
        ("readme.txt", 20),
        ("UPPER.TXT", 512),
        ("A long name with blanks.text", 8192),
        ("A long name with dots.in.it.text", 8191),
        ("A long name, again.text", 8193),
        ("exactly thirty-nine characters long.txt", 4096),
        (".hidden", 1),
        ("...more dots", 2),
        ("Grüße an Łódź.txt", 700),
        ("こんにちは", 32_768),
        ("empty", 0),
        ("plus+comma,equals=[1];.x", 3),
        ("sub/one", 100_000),
        ("sub/deep/er/and deeper/last", 5),
        ("sub/deep/README.TXT", 6),
        ("longna~1.tex", 7),
        ("Sub With Blanks/many.holes", 1 << 20),
    ];
    for (seed, (name, len)) in files.into_iter().enumerate() {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, noise(len, seed as u64)).unwrap();
    }
    fs::write(root.join("x".repeat(251) + ".txt"), "the longest name").unwrap();
    fs::create_dir_all(root.join("nothing/in/here")).unwrap();
}

/// All files by path, directories as those that end in `/`.
fn content(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut rest = vec![(root.to_owned(), String::new())];
    while let Some((directory, prefix)) = rest.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            let path = format!("{prefix}{}", entry.file_name().to_str().unwrap());
            match entry.file_type().unwrap() {
                kind if kind.is_dir() => {
                    all.insert(path.clone() + "/", Vec::new());
                    rest.push((entry.path(), path + "/"));
                }
                kind if kind.is_file() => drop(all.insert(path, fs::read(entry.path()).unwrap())),
                _ => {}
            }
        }
    }
    all
}

/// What is served with these arguments, as a file.
fn served(scratch: &Scratch, arguments: &[&str]) -> Vec<u8> {
    let (socket, image) = (scratch.name("s"), scratch.name("disk.raw"));
    let serve = Serve::start(&[&["--socket", &socket], arguments].concat());
    let _ = fs::remove_file(&image);
    run("nbdcopy", &[&serve.uri, &image]);
    assert!(serve.interrupt().success());
    fs::read(image).unwrap()
}

/// The file system of a disk is clean, and what is in it, as mtools has it. `at` is where it begins.
fn judged(scratch: &Scratch, disk: &[u8], at: usize) -> BTreeMap<String, Vec<u8>> {
    let part = scratch.name("part.raw");
    fs::write(&part, &disk[at..]).unwrap();
    let path = std::env::var("PATH").unwrap_or_default() + ":/sbin:/usr/sbin";
    let checked = Command::new("fsck.fat").env("PATH", path).args(["-n", &part]).output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
    let back = scratch.path("back");
    let _ = fs::remove_dir_all(&back);
    fs::create_dir(&back).unwrap();
    let copied = Command::new("mcopy")
        .envs([("LC_ALL", "C.UTF-8"), ("MTOOLS_SKIP_CHECK", "0")])
        .args(["-s", "-Q", "-i", &part, "::/", back.to_str().unwrap()])
        .output()
        .unwrap();
    assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
    content(&back)
}

fn tools(test: &str) -> bool {
    judges(test, &["fsck.fat", "mcopy", "mdir", "nbdcopy", "sfdisk"])
}

#[test]
fn every_kind_of_disk_holds_every_file_of_the_directory() {
    if !tools("every_kind_of_disk_holds_every_file_of_the_directory") {
        return;
    }
    let scratch = Scratch::new();
    let tree = scratch.path("tree");
    make_tree(&tree);
    let expected = content(&tree);
    let dir = tree.to_str().unwrap();
    let rows: [(&[&str], usize, &str); 4] = [
        (&["--fat-type", "12"], PARTITION, "FAT12   "),
        (&["--fat-type", "16"], PARTITION, "FAT16   "),
        (&["--fat-type", "32"], PARTITION, "FAT32   "),
        (&["--floppy"], 0, "FAT12   "),
    ];
    for (options, at, kind) in rows {
        let disk = served(&scratch, &[&["--format", "vvfat", "--label", "my files", dir], options].concat());
        let name = if kind == "FAT32   " { 82 } else { 54 };
        assert_eq!(disk[at + name..][..8], *kind.as_bytes(), "{options:?}");
        assert_eq!(disk[at + name - 11..][..11], *b"MY FILES   ", "{options:?}");
        let found = judged(&scratch, &disk, at);
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{options:?}");
        assert!(found == expected, "{options:?}");
        if at > 0 {
            let path = std::env::var("PATH").unwrap_or_default() + ":/sbin:/usr/sbin";
            let listed =
                Command::new("sfdisk").env("PATH", path).args(["-l", &scratch.name("disk.raw")]).output().unwrap();
            let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
            assert!(listed.contains(kind.trim_end()) && listed.contains(" 2048 "), "{listed}");
        }
        let again = served(&scratch, &[&["--format", "vvfat", "--label", "MY FILES", dir], options].concat());
        assert!(disk == again, "the same files are the same disk: {options:?}");
    }
}

#[test]
fn floppy_disks_are_of_their_kind_and_as_large_as_they_must_be() {
    if !tools("floppy_disks_are_of_their_kind_and_as_large_as_they_must_be") {
        return;
    }
    let scratch = Scratch::new();
    let tree = scratch.path("tree");
    fs::create_dir(&tree).unwrap();
    let (dir, link) = (tree.to_str().unwrap(), scratch.name("tree/link"));
    let empty = served(&scratch, &[&format!("fat:floppy:{dir}")]);
    assert_eq!((empty.len(), judged(&scratch, &empty, 0).len()), (2880 * 512, 0));
    fs::write(tree.join("a"), noise(1_400_000, 1)).unwrap();
    std::os::unix::fs::symlink("a", link).unwrap();
    let small = served(&scratch, &[&format!("fat:floppy:12:{dir}")]);
    assert_eq!((small.len(), judged(&scratch, &small, 0).len()), (2880 * 512, 1));
    fs::write(tree.join("b"), noise(1_400_000, 2)).unwrap();
    let large = served(&scratch, &[&format!("fat:floppy:{dir}")]);
    assert_eq!((large.len(), judged(&scratch, &large, 0).len()), (5760 * 512, 2));
    // 512-byte clusters: enough of them to be FAT16 to whoever counts.
    let sixteen = served(&scratch, &[&format!("fat:16:floppy:{dir}")]);
    assert_eq!((sixteen.len(), sixteen[13], judged(&scratch, &sixteen, 0).len()), (5760 * 512, 1, 2));
    fs::write(tree.join("c"), noise(1_400_000, 3)).unwrap();
    for (spelled, why) in [
        (format!("fat:floppy:{dir}"), "FAT12 on a floppy disk has room for"),
        (format!("fat:floppy:32:{dir}"), "'fat-type' 32 is for hard disks"),
        (format!("fat:{}", scratch.name("missing")), "No such file"),
        (format!("fat:{}", scratch.name("tree/a")), "as a directory"),
    ] {
        let (status, _, errors) = harness::doorless(&["serve", &spelled]);
        assert!(!status.success() && errors.contains(why), "{spelled}: {errors}");
    }
}

#[test]
fn a_directory_of_3500_files_is_served_whole() {
    if !tools("a_directory_of_3500_files_is_served_whole") {
        return;
    }
    let scratch = Scratch::new();
    let tree = scratch.path("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    for number in 0..3500_u32 {
        let directory = if number % 7 == 0 { "sub/" } else { "" };
        let bytes = number.to_le_bytes().repeat(number as usize % 700);
        fs::write(tree.join(format!("{directory}file number {number}.data")), bytes).unwrap();
    }
    let expected = content(&tree);
    for options in [&[][..], &["--fat-type", "32"]] {
        let arguments = [&["--format", "vvfat", tree.to_str().unwrap()], options].concat();
        let disk = served(&scratch, &arguments);
        assert!(judged(&scratch, &disk, PARTITION) == expected, "{options:?}");
    }
}

#[test]
fn a_file_has_the_length_and_the_time_that_it_had_when_the_disk_was_made() {
    if !tools("a_file_has_the_length_and_the_time_that_it_had_when_the_disk_was_made") {
        return;
    }
    let scratch = Scratch::new();
    let tree = scratch.path("tree");
    fs::create_dir(&tree).unwrap();
    for name in ["grows", "shrinks"] {
        fs::write(tree.join(name), [7; 20_000]).unwrap();
    }
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_234_567_890);
    File::options().write(true).open(tree.join("grows")).unwrap().set_modified(time).unwrap();
    let serve = Serve::start(&["--socket", &scratch.name("s"), "--format", "vvfat", tree.to_str().unwrap()]);
    File::options().write(true).open(tree.join("grows")).unwrap().write_all_at(&[8; 20_000], 20_000).unwrap();
    File::options().write(true).open(tree.join("shrinks")).unwrap().set_len(5_000).unwrap();
    let map = run("nbdinfo", &["--map", "--json", &serve.uri]);
    run("nbdcopy", &[&serve.uri, &scratch.name("disk.raw")]);
    assert!(serve.interrupt().success());
    let disk = fs::read(scratch.path("disk.raw")).unwrap();
    let found = judged(&scratch, &disk, PARTITION);
    assert!(found["grows"] == [7; 20_000]);
    assert!(found["shrinks"] == [vec![7; 5_000], vec![0; 15_000]].concat());
    let listed = Command::new("mdir")
        .env("LC_ALL", "C.UTF-8")
        .args(["-i", &scratch.name("part.raw"), "::/grows"])
        .output()
        .unwrap();
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(listed.contains("2009-02-13  23:31"), "{listed}");
    // What no file takes is a hole for whoever copies.
    let map: Value = serde_json::from_str(&map).unwrap();
    let holes = map.as_array().unwrap().iter().filter(|extent| extent["type"] == 3);
    let holes: u64 = holes.map(|extent| extent["length"].as_u64().unwrap()).sum();
    assert!(holes > 500 << 20, "{holes} bytes of holes");
}

#[test]
fn what_is_too_large_for_fat16_is_a_fat32_disk_and_holes_stay_holes() {
    if !tools("what_is_too_large_for_fat16_is_a_fat32_disk_and_holes_stay_holes") {
        return;
    }
    let scratch = Scratch::new();
    let tree = scratch.path("tree");
    fs::create_dir(&tree).unwrap();
    let sparse = File::create(tree.join("sparse")).unwrap();
    // A cluster and two bytes less than 4 GiB: fsck.fat counts a chain's bytes in 32 bits.
    sparse.set_len((1 << 32) - 4098).unwrap();
    sparse.write_all_at(&noise(100_000, 1), 3 << 30).unwrap();
    fs::write(tree.join("t"), noise(5000, 2)).unwrap();
    // From the partition on.
    let (socket, spelled) = (scratch.name("s"), format!("fat:{}", tree.to_str().unwrap()));
    let arguments = ["nbd", "-t", "-r", "-o", "1M", "-k", &socket, &spelled];
    let served = Running::start(DOORLESS, &arguments, &socket, Signal::TERM);
    let uri = manager::serve::uri(Path::new(&socket), "");
    let map: Value = serde_json::from_str(&run("nbdinfo", &["--map", "--json", &uri])).unwrap();
    let part = scratch.name("part.raw");
    run("nbdcopy", &[&uri, &part]);
    drop(served);
    let data = map.as_array().unwrap().iter().filter(|extent| extent["type"] == 0);
    let data: u64 = data.map(|extent| extent["length"].as_u64().unwrap()).sum();
    assert!((105_000..16 << 20).contains(&data), "{data} bytes of data");
    // What mtools finds behind four gigabytes is where it should be.
    let shown = Command::new("mtype").env("MTOOLS_SKIP_CHECK", "1").args(["-i", &part, "::/t"]).output().unwrap();
    assert!(shown.stdout == noise(5000, 2), "{}", String::from_utf8_lossy(&shown.stderr));
    let path = std::env::var("PATH").unwrap_or_default() + ":/sbin:/usr/sbin";
    let checked = Command::new("fsck.fat").env("PATH", path).args(["-n", &part]).output().unwrap();
    let said = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(checked.status.success() && said.contains("3 files"), "{said}");
    for options in [["--fat-type", "16"], ["--fat-type", "12"]] {
        let (status, _, errors) =
            harness::doorless(&[&["serve", "--format", "vvfat"], &options[..], &[tree.to_str().unwrap()]].concat());
        assert!(!status.success() && errors.contains("on a hard disk has room for"), "{errors}");
    }
}

/// A daemon with `named` in set 1; the text of the error that a node over it meets.
fn refused(named: &[(&str, &Path)], options: Value) -> String {
    let mut daemon = TestDaemon::start();
    for (path, file) in named {
        daemon.ok_with("add-fd", json!({ "fdset-id": 1, "opaque": path }), File::open(file).unwrap());
    }
    let mut node = json!({ "driver": "vvfat", "node-name": "n", "read-only": true, "dir": "/dev/fdset/1" });
    node.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
    daemon.error("blockdev-add", node)
}

#[test]
fn what_cannot_be_a_fat_disk_is_refused_with_the_reason() {
    let scratch = Scratch::new();
    let (file, large) = (scratch.path("file"), scratch.path("large"));
    fs::write(&file, "x").unwrap();
    File::create(&large).unwrap().set_len(1 << 32).unwrap();
    let long = "n".repeat(256);
    let deep = "d/".repeat(70) + "f";
    let rows: [(&[&str], &str); 15] = [
        (&["a:b"], "cannot have ':' in it"),
        (&["a\\b"], "cannot have '\\\\' in it"),
        (&["a\u{1b}b"], "'a\\u{1b}b', and a FAT name cannot have"),
        (&["../../etc/passwd"], "cannot be '.' or '..'"),
        (&["/etc/passwd"], "cannot be empty"),
        (&["a//b"], "cannot be empty"),
        (&[""], "cannot be empty"),
        (&["blank "], "cannot end in a dot or a blank"),
        (&["dot./x"], "cannot end in a dot or a blank"),
        (&[&long], "have 256 characters"),
        (&[&deep], "more than 64 directories down"),
        (&["same", "same"], "was passed twice"),
        (&["Straße", "STRAßE"], "differs in case alone"),
        (&["a", "a/b"], "is a file and a directory"),
        (&["a/b", "a/b/"], "is a file and a directory"),
    ];
    for (names, why) in rows {
        let named: Vec<(&str, &Path)> = names.iter().map(|name| (*name, file.as_path())).collect();
        let said = refused(&named, json!({}));
        assert!(said.contains(why), "{names:?}: {said}");
    }
    let one = [("f", file.as_path())];
    for (options, why) in [
        (json!({ "fat-type": 15 }), "Valid FAT types are only 12, 16 and 32"),
        (json!({ "fat-type": -1 }), "out of range"),
        (json!({ "rw": true }), "is only read"),
        (json!({ "read-only": false }), "is only read"),
        (json!({ "label": "a label too long" }), "is no volume label"),
        (json!({ "label": "a/b" }), "is no volume label"),
        (json!({ "dir": "/etc" }), "this daemon opens no files"),
        (json!({ "dir": "/dev/fdset/7" }), "fdset"),
        (json!({ "floppy": true, "fat-type": 32 }), "is for hard disks"),
    ] {
        let said = refused(&one, options.clone());
        assert!(said.contains(why), "{options}: {said}");
    }
    assert!(
        refused(&[("large", &large)], json!({})).contains("has 4294967296 bytes; a file on FAT has at most 4294967295")
    );
    let mut daemon = TestDaemon::start();
    daemon.ok_with("add-fd", json!({ "fdset-id": 1 }), File::open(&file).unwrap());
    let node = json!({ "driver": "vvfat", "node-name": "n", "read-only": true, "dir": "/dev/fdset/1" });
    assert!(daemon.error("blockdev-add", node.clone()).contains("has no opaque text"));
    // A descriptor that could be written is not what is asked for.
    let writable = File::options().read(true).write(true).open(&file).unwrap();
    daemon.ok("remove-fd", json!({ "fdset-id": 1 }));
    daemon.ok_with("add-fd", json!({ "fdset-id": 1, "opaque": "f" }), writable);
    let said = daemon.error("blockdev-add", node.clone());
    assert!(said.contains("Failed to find file descriptor with matching flags"), "{said}");
    // And nothing of all that keeps a good one from being made.
    daemon.ok("remove-fd", json!({ "fdset-id": 1 }));
    daemon.ok_with("add-fd", json!({ "fdset-id": 1, "opaque": "f" }), File::open(&file).unwrap());
    daemon.ok("blockdev-add", node);
}

#[test]
fn a_guest_mounts_the_directory_and_reads_all_of_it() {
    let test = "a_guest_mounts_the_directory_and_reads_all_of_it";
    if !judges(test, &["qemu-system-x86_64", "busybox", "cpio", "md5sum"]) {
        return;
    }
    let Some(kernel) = Kernel::judge(test) else { return };
    let scratch = Scratch::new();
    let tree = scratch.path("tree");
    make_tree(&tree);
    // Two UTF-16 units, which mtools does not understand.
    fs::write(tree.join("a face 😀"), "smile").unwrap();
    let expected = content(&tree);
    let disks = ["16", "32"].map(|bits| {
        let arguments =
            ["--socket", &scratch.name(bits), "--format", "vvfat", "--fat-type", bits, tree.to_str().unwrap()];
        Serve::start(&arguments)
    });
    let drives: Vec<String> = disks.iter().map(|serve| format!("format=raw,read-only=on,file={}", serve.uri)).collect();
    let script = "for disk in vda vdb; do mount -t vfat -o ro,utf8 /dev/${disk}1 /mnt || mount -t vfat -o ro /dev/${disk}1 /mnt\n\
                  cd /mnt; find . -type f -exec md5sum {} +; cd /; umount /mnt; done";
    let said = guest::run_disks(&kernel, &scratch, &drives, script);
    for (path, _) in expected.iter().filter(|(path, _)| !path.ends_with('/')) {
        let sum = run("md5sum", &[tree.join(path).to_str().unwrap()]);
        let line = format!("{}  ./{path}", sum.trim_start_matches('\\').split_whitespace().next().unwrap());
        assert_eq!(said.matches(&line).count(), 2, "{line}\n{said}");
    }
    for serve in disks {
        assert!(serve.interrupt().success());
    }
}

#[test]
fn a_snapshot_of_a_directory_is_written_to_and_the_directory_stays() {
    if !judges("a_snapshot_of_a_directory_is_written_to_and_the_directory_stays", &["qemu-io"]) {
        return;
    }
    let scratch = Scratch::new();
    let tree = scratch.path("tree");
    make_tree(&tree);
    let before = content(&tree);
    let serve =
        Serve::start(&["--snapshot", "--socket", &scratch.name("s"), "--format", "vvfat", tree.to_str().unwrap()]);
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 0 2M", "-c", "read -P 7 0 2M", &serve.uri]);
    assert!(serve.interrupt().success());
    assert!(content(&tree) == before);
    let (status, _, errors) = harness::doorless(&["serve", "--direct", &format!("fat:{}", tree.to_str().unwrap())]);
    assert!(!status.success() && errors.contains("through the host's cache"), "{errors}");
    let (status, _, errors) = harness::doorless(&["serve", "--floppy", "--format", "raw", tree.to_str().unwrap()]);
    assert!(!status.success() && errors.contains("are for directories"), "{errors}");
    let (status, _, errors) = harness::doorless(&["img", "info", "-f", "vvfat", tree.to_str().unwrap()]);
    assert!(!status.success(), "{DOORLESS} img: {errors}");
}
