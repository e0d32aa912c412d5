// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What mtools and a guest write to a directory that they have as a FAT disk, and what of it the host has at the end.
#![allow(missing_docs, clippy::unwrap_used)]

mod guest;
mod harness;
#[path = "harness/mounted.rs"]
mod mounted;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use guest::Kernel;
use harness::{DOORLESS, Scratch, TestDaemon, judges, noise, run};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

/// Where the partition of a hard disk begins.
const PARTITION: u64 = 1 << 20;

/// A directory served for writing, and what is said at the end.
struct Written {
    child: Child,
    uri: String,
    daemon: i32,
}

impl Written {
    fn start(scratch: &Scratch, arguments: &[&str]) -> Written {
        let socket = scratch.name("s");
        let mut child = Command::new(DOORLESS)
            .args(["serve", "--socket", &socket])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
        while !said.contains("ready: ") {
            assert!(std::io::BufRead::read_line(&mut out, &mut said).unwrap() > 0, "{said}");
        }
        // Nobody reads what else it says; the pipe has room for it.
        std::mem::forget(out);
        let daemon = said.split("daemon: process ").nth(1).unwrap().split(',').next().unwrap().parse().unwrap();
        Written { child, uri: manager::serve::uri(Path::new(&socket), ""), daemon }
    }

    /// Ctrl-C: the exit status, and what is on standard error.
    fn end(mut self) -> (ExitStatus, String) {
        kill_process(Pid::from_child(&self.child), Signal::INT).unwrap();
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap(), said)
    }
}

fn make_tree(root: &Path) {
    fs::create_dir_all(root.join("docs/old")).unwrap();
    fs::create_dir(root.join("empty")).unwrap();
    for (name, len) in
        [("same", 50_000), ("changed", 20_000), ("removed.txt", 100), ("docs/old/one", 9_000), ("docs/Two", 8192)]
    {
        fs::write(root.join(name), noise(len, len as u64)).unwrap();
    }
    fs::set_permissions(root.join("changed"), fs::Permissions::from_mode(0o751)).unwrap();
}

/// All files by path, directories as those that end in `/`.
fn content(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut rest = vec![(root.to_owned(), String::new())];
    while let Some((directory, prefix)) = rest.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            let path = format!("{prefix}{}", entry.file_name().to_str().unwrap());
            if entry.file_type().unwrap().is_dir() {
                all.insert(path.clone() + "/", Vec::new());
                rest.push((entry.path(), path + "/"));
            } else if entry.file_type().unwrap().is_file() {
                all.insert(path, fs::read(entry.path()).unwrap());
            }
        }
    }
    all
}

/// Runs a tool of mtools on the file system at `PARTITION` of an image.
fn mtools(scratch: &Scratch, tool: &str, arguments: &[&str]) {
    let image = format!("{}@@{PARTITION}", scratch.name("copy.raw"));
    let output = Command::new(tool)
        .envs([("LC_ALL", "C.UTF-8"), ("MTOOLS_SKIP_CHECK", "1")])
        .args(["-i", &image])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "{tool} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A directory that is served to be written to, and its disk copied to `copy.raw`.
fn copied_out() -> (Scratch, PathBuf, Written) {
    let scratch = Scratch::new();
    let tree = scratch.path("tree");
    make_tree(&tree);
    let served = Written::start(&scratch, &[&format!("fat:rw:{}", tree.to_str().unwrap())]);
    run("nbdcopy", &[&served.uri, &scratch.name("copy.raw")]);
    (scratch, tree, served)
}

/// The tools that copy a disk out, change it and copy it back.
fn tools(test: &str) -> bool {
    judges(test, &["mcopy", "mdel", "mmd", "mrd", "mmove", "nbdcopy"])
}

#[test]
fn what_mtools_writes_is_in_the_directory_at_the_end() {
    if !tools("what_mtools_writes_is_in_the_directory_at_the_end") {
        return;
    }
    for bits in ["12", "16", "32"] {
        let scratch = Scratch::new();
        let tree = scratch.path("tree");
        make_tree(&tree);
        let untouched = fs::metadata(tree.join("same")).unwrap().modified().unwrap();
        let served =
            Written::start(&scratch, &["--fat-type", bits, "--rw", "--format", "vvfat", tree.to_str().unwrap()]);
        run("nbdcopy", &[&served.uri, &scratch.name("copy.raw")]);
        let (new, other) = (scratch.name("new"), scratch.name("other"));
        fs::write(&new, noise(300_000, 77)).unwrap();
        fs::write(&other, noise(20_000, 78)).unwrap();
        mtools(&scratch, "mmd", &["::/made", "::/made/by the guest"]);
        mtools(&scratch, "mcopy", &[&new, "::/made/by the guest/Größe ohne Namen.bin"]);
        mtools(&scratch, "mcopy", &["-o", &other, "::/changed"]);
        mtools(&scratch, "mdel", &["::/removed.txt"]);
        mtools(&scratch, "mmove", &["::/docs/old/one", "::/made/moved here"]);
        mtools(&scratch, "mrd", &["::/docs/old"]);
        mtools(&scratch, "mrd", &["::/empty"]);
        run("nbdcopy", &[&scratch.name("copy.raw"), &served.uri]);
        let before = content(&tree);
        let (status, said) = served.end();
        assert!(status.success() && said.contains("3 files written, 4 files and directories removed"), "{said}");
        let mut expected = before;
        let one = expected.remove("docs/old/one").unwrap();
        for gone in ["removed.txt", "docs/old/", "empty/"] {
            expected.remove(gone).unwrap();
        }
        expected.insert("changed".into(), noise(20_000, 78));
        expected.insert("made/moved here".into(), one);
        expected.insert("made/by the guest/Größe ohne Namen.bin".into(), noise(300_000, 77));
        expected.extend(["made/", "made/by the guest/"].map(|path| (path.to_owned(), Vec::new())));
        let found = content(&tree);
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "FAT{bits}");
        assert!(found == expected, "FAT{bits}");
        assert_eq!(fs::metadata(tree.join("same")).unwrap().modified().unwrap(), untouched, "not even touched");
        assert_eq!(fs::metadata(tree.join("changed")).unwrap().permissions().mode() & 0o777, 0o751);
    }
}

#[test]
fn what_was_changed_on_the_host_meanwhile_stays_and_the_guests_is_beside_it() {
    if !tools("what_was_changed_on_the_host_meanwhile_stays_and_the_guests_is_beside_it") {
        return;
    }
    let (scratch, tree, served) = copied_out();
    let new = scratch.name("new");
    fs::write(&new, "the guest's").unwrap();
    mtools(&scratch, "mcopy", &["-o", &new, "::/changed"]);
    mtools(&scratch, "mcopy", &[&new, "::/fresh"]);
    mtools(&scratch, "mdel", &["::/removed.txt"]);
    run("nbdcopy", &[&scratch.name("copy.raw"), &served.uri]);
    fs::write(tree.join("changed"), "the host's").unwrap();
    fs::write(tree.join("fresh"), "the host's too").unwrap();
    fs::write(tree.join("removed.txt"), "no, it stays").unwrap();
    let (status, said) = served.end();
    assert!(!status.success());
    for why in [
        "'changed' was not written back: it was changed on the host meanwhile; the guest's is 'changed.from-guest' now",
        "'fresh' was not written back: another is there; the guest's is 'fresh.from-guest' now",
        "'removed.txt' was not written back: it was changed on the host meanwhile",
        "3 changes of the guest were not made",
    ] {
        assert!(said.contains(why), "{why}\n{said}");
    }
    for (path, text) in [
        ("changed", "the host's"),
        ("changed.from-guest", "the guest's"),
        ("fresh", "the host's too"),
        ("fresh.from-guest", "the guest's"),
        ("removed.txt", "no, it stays"),
    ] {
        assert_eq!(fs::read_to_string(tree.join(path)).unwrap(), text, "{path}");
    }
    let left: Vec<String> = content(&tree).into_keys().filter(|name| name.contains(".doorless-")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn what_cannot_be_put_where_the_guest_has_moved_it_stays_where_it_was() {
    if !tools("what_cannot_be_put_where_the_guest_has_moved_it_stays_where_it_was") {
        return;
    }
    let scratch = Scratch::new();
    let tree = scratch.path("tree");
    make_tree(&tree);
    std::os::unix::fs::symlink("/etc", tree.join("elsewhere")).unwrap();
    let served = Written::start(&scratch, &[&format!("fat:rw:{}", tree.to_str().unwrap())]);
    run("nbdcopy", &[&served.uri, &scratch.name("copy.raw")]);
    // The guest knows nothing of the link, and must not get through it.
    mtools(&scratch, "mmd", &["::/elsewhere"]);
    mtools(&scratch, "mmove", &["::/removed.txt", "::/elsewhere/doorless-was-here"]);
    mtools(&scratch, "mrd", &["::/empty"]);
    run("nbdcopy", &[&scratch.name("copy.raw"), &served.uri]);
    let before = content(&tree);
    let (status, said) = served.end();
    assert!(!status.success());
    for why in [
        "'elsewhere' was not written back: another is there, which is no directory",
        "'elsewhere/doorless-was-here' was not written back: its directory cannot be opened",
        "'removed.txt' was not written back: it stays, because something else could not be written",
        "'empty' was not written back: it stays",
    ] {
        assert!(said.contains(why), "{why}\n{said}");
    }
    assert!(content(&tree) == before);
    assert!(!Path::new("/etc/doorless-was-here").exists());
}

#[test]
fn qemu_nbds_way_writes_back_when_the_last_client_has_left() {
    if !tools("qemu_nbds_way_writes_back_when_the_last_client_has_left") {
        return;
    }
    let scratch = Scratch::new();
    let tree = scratch.path("tree");
    make_tree(&tree);
    let (spelled, socket) = (format!("fat:rw:{}", tree.to_str().unwrap()), scratch.name("nbd"));
    let nbd = |arguments: &[&str]| {
        let arguments = [&["nbd", "-k", &socket], arguments, &[&spelled]].concat();
        let child = Command::new(DOORLESS).args(arguments).stderr(Stdio::piped()).spawn().unwrap();
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            std::thread::yield_now();
        }
        child
    };
    let uri = manager::serve::uri(Path::new(&socket), "");
    let reading = nbd(&["-t"]);
    run("nbdcopy", &["--connections=1", &uri, &scratch.name("copy.raw")]);
    kill_process(Pid::from_child(&reading), Signal::TERM).unwrap();
    let output = reading.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    fs::write(scratch.path("new"), "new").unwrap();
    mtools(&scratch, "mcopy", &[&scratch.name("new"), "::/new"]);
    // As a guest leaves it that has it in use.
    let copy = File::options().read(true).write(true).open(scratch.path("copy.raw")).unwrap();
    copy.write_all_at(&[1], PARTITION + 37).unwrap();
    let writing = nbd(&["-t"]);
    run("nbdcopy", &["--connections=1", &scratch.name("copy.raw"), &uri]);
    kill_process(Pid::from_child(&writing), Signal::TERM).unwrap();
    let output = writing.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.contains("had not unmounted the disk"), "{said}");
    assert_eq!(fs::read_to_string(tree.join("new")).unwrap(), "new");
    fs::remove_file(tree.join("new")).unwrap();
    // The client that looks whether it is there would be the last one, so the socket is waited for otherwise.
    let writing = Command::new(DOORLESS).args(["nbd", "-k", &socket, &spelled]).stderr(Stdio::piped()).spawn().unwrap();
    while !Path::new(&socket).exists() {
        std::thread::yield_now();
    }
    run("nbdcopy", &["--connections=1", &scratch.name("copy.raw"), &uri]);
    let output = writing.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.contains("1 files written"), "{said}");
    assert_eq!(fs::read_to_string(tree.join("new")).unwrap(), "new");
}

#[test]
fn what_is_written_to_the_disk_as_a_file_is_in_the_directory_at_the_end() {
    let test = "what_is_written_to_the_disk_as_a_file_is_in_the_directory_at_the_end";
    if !tools(test) || !mounted::can_mount(test) {
        return;
    }
    let scratch = Scratch::new();
    let tree = scratch.path("tree");
    make_tree(&tree);
    fs::write(scratch.path("copy.raw"), "").unwrap();
    let (file, dir) = (scratch.name("copy.raw"), tree.to_str().unwrap());
    let served = Written::start(&scratch, &["--fuse", &file, "--rw", "--format", "vvfat", dir]);
    fs::write(scratch.path("new"), noise(70_000, 5)).unwrap();
    mtools(&scratch, "mcopy", &[&scratch.name("new"), "::/docs/a new one"]);
    mtools(&scratch, "mdel", &["::/removed.txt"]);
    let (status, said) = served.end();
    assert!(status.success() && said.contains("1 files written, 1 files and directories removed"), "{said}");
    assert_eq!(fs::read(tree.join("docs/a new one")).unwrap(), noise(70_000, 5));
    assert!(!tree.join("removed.txt").exists());
}

#[test]
fn what_guests_wrote_outlives_the_daemon() {
    if !tools("what_guests_wrote_outlives_the_daemon") {
        return;
    }
    let (scratch, tree, served) = copied_out();
    fs::write(scratch.path("new"), noise(70_000, 6)).unwrap();
    mtools(&scratch, "mcopy", &[&scratch.name("new"), "::/new"]);
    run("nbdcopy", &["--flush", &scratch.name("copy.raw"), &served.uri]);
    kill_process(Pid::from_raw(served.daemon).unwrap(), Signal::KILL).unwrap();
    // Served by the next one, so it is there.
    run("nbdcopy", &[&served.uri, &scratch.name("again.raw")]);
    let (status, said) = served.end();
    assert!(status.success() && said.contains("killed by signal 9") && said.contains("1 files written"), "{said}");
    assert_eq!(fs::read(tree.join("new")).unwrap(), noise(70_000, 6));
}

#[test]
fn what_guests_wrote_outlives_even_a_daemon_that_has_no_successor() {
    if !tools("what_guests_wrote_outlives_even_a_daemon_that_has_no_successor") {
        return;
    }
    let scratch = Scratch::new();
    let tree = scratch.path("tree");
    make_tree(&tree);
    let mut served = Written::start(&scratch, &["--restarts", "0", &format!("fat:rw:{}", tree.to_str().unwrap())]);
    run("nbdcopy", &[&served.uri, &scratch.name("copy.raw")]);
    fs::write(scratch.path("new"), "new").unwrap();
    mtools(&scratch, "mcopy", &[&scratch.name("new"), "::/new"]);
    run("nbdcopy", &["--flush", &scratch.name("copy.raw"), &served.uri]);
    kill_process(Pid::from_raw(served.daemon).unwrap(), Signal::KILL).unwrap();
    let mut said = String::new();
    served.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(!served.child.wait().unwrap().success());
    assert!(said.contains("has died too often") && said.contains("1 files written"), "{said}");
    assert_eq!(fs::read_to_string(tree.join("new")).unwrap(), "new");
}

#[test]
fn changes_are_told_only_of_the_directorys_disk_and_when_nobody_writes() {
    let scratch = Scratch::new();
    fs::write(scratch.path("file"), "x").unwrap();
    let open = |name: &str, len: u64| {
        let file =
            File::options().read(true).write(true).create(true).truncate(false).open(scratch.path(name)).unwrap();
        if len > 0 {
            file.set_len(len).unwrap();
        }
        file
    };
    let mut daemon = TestDaemon::start();
    daemon.ok_with("add-fd", json!({ "fdset-id": 9, "opaque": "f" }), File::open(scratch.path("file")).unwrap());
    let node =
        json!({ "driver": "vvfat", "node-name": "fat", "read-only": true, "dir": "/dev/fdset/9", "floppy": true });
    daemon.ok("blockdev-add", node);
    daemon.add_node("short", "raw", open("short", 512), false);
    daemon.add_node("disk", "raw", open("disk", 2880 * 512), false);
    let changes = |node: &str, base: &str| json!({ "node": node, "base": base });
    assert!(daemon.error("vvfat-changes", changes("disk", "short")).contains("no node with the driver vvfat"));
    assert!(daemon.error("vvfat-changes", changes("none", "fat")).contains("Failed to find node"));
    assert!(daemon.error("vvfat-changes", changes("short", "fat")).contains("does not have the size"));
    assert!(daemon.error("vvfat-changes", changes("disk", "fat")).contains("the guest has formatted it"));
    // The disk itself is a disk without changes, and others may read it meanwhile.
    let none = daemon.ok("vvfat-changes", changes("fat", "fat"));
    assert_eq!(none, json!({ "changes": [], "unclean": false }));
    daemon.start_nbd();
    daemon.export("disk", true);
    let said = daemon.error("vvfat-changes", changes("disk", "fat"));
    assert!(said.contains("export 'disk'"), "{said}");
    // Copies go by path, and what is none is an error of the job.
    daemon.ok_with("add-fd", json!({ "fdset-id": 5, "opaque": "../f" }), open("copy", 0));
    daemon.ok("vvfat-copy", json!({ "job-id": "j", "node": "fat", "base": "fat", "dir": "/dev/fdset/5" }));
    while daemon.daemon.next_event().unwrap()
        != ("JOB_STATUS_CHANGE".into(), json!({ "id": "j", "status": "concluded" }))
    {}
    let jobs = daemon.ok("query-jobs", json!({}));
    assert_eq!(jobs[0]["error"], "'../f' is no file on the guest's disk");
}

#[test]
fn a_broken_file_system_changes_nothing() {
    if !judges("a_broken_file_system_changes_nothing", &["nbdcopy"]) {
        return;
    }
    /// How a disk is broken: its name, what is done to the bytes, what is said.
    type Row = (&'static str, fn(&mut [u8]), &'static str);
    fn fat(disk: &[u8]) -> usize {
        (1 << 20) + 512 * usize::from(disk[(1 << 20) + 14])
    }
    fn root(disk: &[u8]) -> usize {
        fat(disk) + 2 * 512 * usize::from(u16::from_le_bytes([disk[(1 << 20) + 22], disk[(1 << 20) + 23]]))
    }
    /// The entry of that short name in the root directory.
    fn entry(disk: &mut [u8], short: &[u8; 11]) -> usize {
        let root = root(disk);
        (root..).step_by(32).find(|&at| disk[at..at + 11] == *short).unwrap()
    }
    let rows: [Row; 9] = [
        (
            "loop",
            |disk| {
                let (at, fat) = (entry(disk, b"CHANGED    "), fat(disk));
                let first = usize::from(u16::from_le_bytes([disk[at + 26], disk[at + 27]]));
                let bytes: [u8; 2] = disk[at + 26..at + 28].try_into().unwrap();
                disk[fat + 2 * first + 2..][..2].copy_from_slice(&bytes);
            },
            "is in a chain already",
        ),
        (
            "cross link",
            |disk| {
                let (from, to) = (entry(disk, b"CHANGED    "), entry(disk, b"SAME       "));
                let cluster: [u8; 2] = disk[from + 26..from + 28].try_into().unwrap();
                disk[to + 26..to + 28].copy_from_slice(&cluster);
            },
            "is in a chain already",
        ),
        (
            "beyond the end",
            |disk| {
                let at = entry(disk, b"CHANGED    ");
                disk[at + 26..at + 28].copy_from_slice(&[0xf0, 0xff]);
            },
            "which is none of a file's",
        ),
        (
            "free",
            |disk| {
                let (at, fat) = (entry(disk, b"CHANGED    "), fat(disk));
                let first = usize::from(u16::from_le_bytes([disk[at + 26], disk[at + 27]]));
                disk[fat + 2 * first..][..2].copy_from_slice(&[0, 0]);
            },
            "has cluster 0 in its chain",
        ),
        (
            "size",
            |disk| {
                let at = entry(disk, b"CHANGED    ");
                disk[at + 28..at + 32].copy_from_slice(&[0xff; 4]);
            },
            "says that it has 4294967295 bytes",
        ),
        (
            "slash",
            |disk| {
                let at = entry(disk, b"CHANGED    ");
                disk[at - 32] = b'!';
                disk[at..at + 11].copy_from_slice(b"../ETC     ");
            },
            "a FAT name cannot",
        ),
        (
            "dots",
            |disk| {
                let at = entry(disk, b"CHANGED    ");
                disk[at..at + 11].copy_from_slice(b"..         ");
            },
            "a FAT name cannot be '.' or '..'",
        ),
        (
            "twice",
            |disk| {
                let (from, to) = (entry(disk, b"CHANGED    "), entry(disk, b"SAME       "));
                let name: [u8; 11] = disk[from..from + 11].try_into().unwrap();
                disk[to..to + 11].copy_from_slice(&name);
                disk[to - 21] = 0xff;
                disk[from - 21] = 0xff;
            },
            "is there twice",
        ),
        ("formatted", |disk| disk[(1 << 20) + 13] = 8, "the guest has formatted it"),
    ];
    for (name, damage, why) in rows {
        let scratch = Scratch::new();
        let tree = scratch.path("tree");
        make_tree(&tree);
        let before = content(&tree);
        let served = Written::start(&scratch, &[&format!("fat:rw:{}", tree.to_str().unwrap())]);
        let copy = scratch.name("copy.raw");
        run("nbdcopy", &[&served.uri, &copy]);
        let mut head = vec![0; 2 << 20];
        let file = File::options().read(true).write(true).open(&copy).unwrap();
        file.read_exact_at(&mut head, 0).unwrap();
        damage(&mut head);
        file.write_all_at(&head, 0).unwrap();
        run("nbdcopy", &[&copy, &served.uri]);
        let (status, said) = served.end();
        assert!(!status.success() && said.contains(why), "{name}: {said}");
        assert!(content(&tree) == before, "{name}");
    }
}

#[test]
fn a_guest_writes_files_and_the_host_sees_them() {
    let test = "a_guest_writes_files_and_the_host_sees_them";
    if !judges(test, &["qemu-system-x86_64", "busybox", "cpio"]) {
        return;
    }
    let Some(kernel) = Kernel::judge(test) else { return };
    let scratch = Scratch::new();
    let tree = scratch.path("tree");
    make_tree(&tree);
    let mut expected = content(&tree);
    let served = Written::start(&scratch, &["--rw", "--format", "vvfat", tree.to_str().unwrap()]);
    let drive = format!("format=raw,file={}", served.uri);
    let script = "mount -t vfat -o utf8 /dev/vda1 /mnt; cd /mnt; echo 'written by the guest' > 'A new file.text'\n\
                  mkdir -p deep/er; cp same deep/er/copy; echo more >> docs/Two; rm -r removed.txt docs/old; mv changed 'moved by the guest'\n\
                  cd /; umount /mnt; sync";
    guest::run(&kernel, &scratch, &drive, script);
    let (status, said) = served.end();
    assert!(status.success() && !said.contains("unmounted"), "{said}");
    let same = expected["same"].clone();
    expected.insert("A new file.text".into(), b"written by the guest\n".to_vec());
    expected.insert("deep/er/copy".into(), same);
    expected.extend(["deep/", "deep/er/"].map(|path| (path.to_owned(), Vec::new())));
    expected.get_mut("docs/Two").unwrap().write_all(b"more\n").unwrap();
    for gone in ["removed.txt", "docs/old/", "docs/old/one"] {
        expected.remove(gone).unwrap();
    }
    let changed = expected.remove("changed").unwrap();
    expected.insert("moved by the guest".into(), changed);
    let found = content(&tree);
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    assert!(found == expected);
}
