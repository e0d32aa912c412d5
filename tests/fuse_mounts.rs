// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The mounts of disks as files: who makes them, what the daemon must be passed, and that none stays.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;
#[path = "harness/mounted.rs"]
mod mounted;

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::Command;

use harness::{DOORLESS, Scratch, Serve, TestDaemon, doorless, judges, noise, program, run, text};
use manager::fuse::{AllowOther, Mount};
use mounted::{Served, can_mount, mounts, until_unmounted};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

#[test]
fn no_mount_outlives_its_last_daemon_or_the_manager_however_they_die() {
    if !can_mount("no_mount_outlives_its_last_daemon_or_the_manager_however_they_die") {
        return;
    }
    let served = Served::start(&[0; 4096], &["--restarts", "0"]);
    let busy = served.disk();
    let path = served.scratch.path("disk");
    assert_eq!(mounts(&path), 1);
    kill_process(Pid::from_raw(served.serve.daemon_pid().cast_signed()).unwrap(), Signal::KILL).unwrap();
    until_unmounted(&path);
    assert_eq!(Errno::from_io_error(&busy.metadata().unwrap_err()), Some(Errno::NOTCONN));

    let mut served = Served::start(&[0; 4096], &[]);
    let busy = served.disk();
    let path = served.scratch.path("disk");
    served.serve.kill();
    until_unmounted(&path);
    drop(busy);
}

#[test]
fn a_dead_mount_of_an_earlier_run_is_cleared_away() {
    if !can_mount("a_dead_mount_of_an_earlier_run_is_cleared_away") {
        return;
    }
    let scratch = Scratch::new();
    let path = scratch.path("disk");
    fs::write(&path, "").unwrap();
    // Mounted and served by nobody, with nobody to unmount it: as if everything had been killed at once.
    let orphan = scratch.path("orphan");
    let tool = format!(
        "exec 3<>/dev/fuse; mount -i -t fuse.doorless -o fd=3,rootmode=100000,user_id=0,group_id=0 doorless {}",
        text(&path)
    );
    let made = Command::new("bash").args(["-c", &tool]).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    assert_eq!(mounts(&path), 1);
    assert_eq!(Errno::from_io_error(&fs::metadata(&path).unwrap_err()), Some(Errno::NOTCONN));
    fs::write(scratch.path("image"), noise(4096, 2)).unwrap();
    let serve = Serve::start(&["--format", "raw", &scratch.name("image"), "--fuse", text(&path)]);
    assert_eq!(mounts(&path), 1);
    assert_eq!(fs::read(&path).unwrap(), noise(4096, 2));
    assert!(serve.interrupt().success());
    assert_eq!((mounts(&path), mounts(&orphan)), (0, 0));
}

#[test]
fn a_mount_point_that_is_swapped_meanwhile_takes_nothing_else_with_it() {
    if !can_mount("a_mount_point_that_is_swapped_meanwhile_takes_nothing_else_with_it") {
        return;
    }
    // Between the look and the mount: it goes over the file that was looked at, wherever that is now.
    let scratch = Scratch::new();
    let (path, aside) = (scratch.path("disk"), scratch.path("aside"));
    fs::write(&path, "looked at").unwrap();
    let mut daemon = TestDaemon::start();
    let image = memory(&[7; 4096]);
    daemon.add_node("n", "raw", &image, false);
    let mount = Mount::make(&program(), &path, true, AllowOther::Off).unwrap();
    fs::rename(&path, &aside).unwrap();
    fs::write(&path, "swapped").unwrap();
    daemon.ok_with("getfd", json!({ "fdname": "f" }), mount.device());
    daemon.ok("block-export-add", json!({ "type": "fuse", "id": "e", "node-name": "n", "fd": "f", "mountpoint": "x" }));
    let attached = mount.attach().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"swapped");
    assert_eq!(fs::read(&aside).unwrap(), [7; 4096]);
    // After it: another mount over the same place is not the one that goes.
    run("mount", &["--bind", text(&path), text(&aside)]);
    drop(attached);
    assert_eq!((mounts(&aside), fs::read(&aside).unwrap()), (2, b"swapped".to_vec()));
    // Lazily: a program that is started meanwhile may have a file of it open until its `exec`.
    run("umount", &["-l", text(&aside)]);
    run("umount", &["-l", text(&aside)]);
    assert_eq!((mounts(&path), fs::read(&aside).unwrap()), (0, b"looked at".to_vec()));
    assert!(refusal(&[&scratch.name(".")]).contains("is not a regular file"));
    assert!(refusal(&[&scratch.name("missing")]).contains("No such file or directory"));
}

/// What `serve --fuse PLACE...` says when it will not.
fn refusal(place: &[&str]) -> String {
    let scratch = Scratch::new();
    fs::write(scratch.path("image"), [0; 512]).unwrap();
    let (status, _, err) = doorless(&[&["serve", "--format", "raw", &scratch.name("image"), "--fuse"], place].concat());
    assert!(!status.success());
    err
}

fn memory(content: &[u8]) -> File {
    let file = File::from(rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(content, 0).unwrap();
    file
}

#[test]
fn the_daemon_says_what_it_must_be_passed() {
    let mut daemon = TestDaemon::start();
    daemon.add_node("n", "raw", memory(&[0; 4096]), false);
    let mut refused = |fd: Option<File>, more: serde_json::Value| {
        let mut options = json!({ "type": "fuse", "id": "e", "node-name": "n", "mountpoint": "/mnt/disk" });
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        if let Some(fd) = fd {
            daemon.ok_with("getfd", json!({ "fdname": "f" }), fd);
            options["fd"] = json!("f");
        }
        daemon.error("block-export-add", options)
    };
    assert_eq!(
        refused(None, json!({})),
        "Could not mount '/mnt/disk': this daemon mounts nothing; mount a /dev/fuse that is open with O_NONBLOCK, pass it with \
         getfd and give its name as 'fd'"
    );
    assert_eq!(
        refused(Some(File::open("/dev/null").unwrap()), json!({})),
        "The descriptor 'f' is not an open /dev/fuse"
    );
    assert_eq!(refused(None, json!({ "fd": "g" })), "File descriptor named 'g' has not been found");
    assert_eq!(
        refused(None, json!({ "fd": "g", "allow-other": "maybe" })),
        "Parameter 'allow-other' does not accept value 'maybe'"
    );
    assert_eq!(refused(None, json!({ "fd": "g", "growable": true })), "'growable' needs 'writable'");
    let fuse = |flags: OFlags| {
        OpenOptions::new().read(true).write(true).custom_flags(flags.bits().cast_signed()).open("/dev/fuse").ok()
    };
    let (Some(blocking), Some(loose)) = (fuse(OFlags::empty()), fuse(OFlags::NONBLOCK)) else {
        return eprintln!("skipped: the_daemon_says_what_it_must_be_passed: no /dev/fuse");
    };
    assert!(refused(Some(blocking), json!({})).contains("set O_NONBLOCK on it"));
    assert_eq!(refused(Some(loose), json!({})), "The descriptor 'f' is not mounted");
    // The node is free, and the daemon as good as before.
    daemon.ok("blockdev-del", json!({ "node-name": "n" }));
}

#[test]
fn the_command_line_takes_an_inherited_device() {
    if !can_mount("the_command_line_takes_an_inherited_device") {
        return;
    }
    let scratch = Scratch::new();
    let path = scratch.path("disk");
    fs::write(&path, "").unwrap();
    fs::write(scratch.path("image"), noise(4096, 21)).unwrap();
    let mount = Mount::make(&program(), &path, true, AllowOther::Off).unwrap();
    let device = mount.device().try_clone_to_owned().unwrap();
    rustix::io::fcntl_setfd(&device, rustix::io::FdFlags::empty()).unwrap();
    let mut daemon = Command::new(DOORLESS)
        .args([
            "daemon",
            "--blockdev",
            &format!("driver=file,node-name=n,read-only=on,filename={}", scratch.name("image")),
        ])
        .args(["--export", &format!("type=fuse,id=e,node-name=n,mountpoint=disk,fd={}", device.as_raw_fd())])
        .spawn()
        .unwrap();
    drop(device);
    let attached = mount.attach().unwrap();
    assert!(fs::read(&path).unwrap() == noise(4096, 21));
    drop(attached);
    kill_process(Pid::from_child(&daemon), Signal::TERM).unwrap();
    assert!(daemon.wait().unwrap().success());
}

#[test]
fn an_export_in_use_goes_only_hard_and_unmounting_ends_it() {
    if !can_mount("an_export_in_use_goes_only_hard_and_unmounting_ends_it") {
        return;
    }
    let scratch = Scratch::new();
    let path = scratch.path("disk");
    fs::write(&path, "").unwrap();
    let mut daemon = TestDaemon::start();
    daemon.add_node("n", "raw", memory(&[7; 4096]), false);
    let add = |daemon: &mut TestDaemon| {
        let mount = Mount::make(&program(), &path, true, AllowOther::Off).unwrap();
        daemon.ok_with("getfd", json!({ "fdname": "f" }), mount.device());
        let export = json!({ "type": "fuse", "id": "e", "node-name": "n", "fd": "f", "mountpoint": "/mnt/disk" });
        daemon.ok("block-export-add", export);
        mount.attach().unwrap()
    };
    let attached = add(&mut daemon);
    let file = File::open(&path).unwrap();
    assert_eq!(daemon.error("block-export-del", json!({ "id": "e" })), "export 'e' still in use");
    assert_eq!(daemon.error("blockdev-del", json!({ "node-name": "n" })), "Node n is in use");
    daemon.ok("block-export-del", json!({ "id": "e", "mode": "hard" }));
    while !daemon.ok("query-block-exports", json!({})).as_array().unwrap().is_empty() {}
    assert_eq!(Errno::from_io_error(&file.metadata().unwrap_err()), Some(Errno::NOTCONN));
    drop(attached);
    let attached = add(&mut daemon);
    assert_eq!(fs::read(&path).unwrap(), [7; 4096]);
    drop(attached);
    while !daemon.ok("query-block-exports", json!({})).as_array().unwrap().is_empty() {}
    daemon.ok("blockdev-del", json!({ "node-name": "n" }));
    let open = daemon.open_fds();
    assert!(!open.iter().any(|fd| fd.contains("fuse")), "{open:?}");
}

#[test]
fn a_user_without_rights_mounts_through_fusermount() {
    let test = "a_user_without_rights_mounts_through_fusermount";
    if !can_mount(test) || !judges(test, &["fusermount3", "setpriv", "unshare", "mknod"]) {
        return;
    }
    use std::os::unix::fs::PermissionsExt;
    let scratch = Scratch::new();
    fs::set_permissions(scratch.path("."), fs::Permissions::from_mode(0o777)).unwrap();
    fs::copy(DOORLESS, scratch.path("doorless")).unwrap();
    // A device of their own, as udev would give it to everybody, in a namespace of their own.
    let user = "head -c 65536 /dev/urandom > image && touch disk
        ./doorless serve --format raw image --fuse disk > log 2>&1 & P=$!
        until grep -q ready: log; do kill -0 $P || { cat log; exit 3; }; done
        cmp image disk && grep -c \" $PWD/disk .* fuse.doorless \" /proc/self/mountinfo && kill -INT $P && wait $P || exit 4
        ! grep \" $PWD/disk \" /proc/self/mountinfo";
    let root = format!(
        "cd {} && mknod fuse c 10 229 && chmod 666 fuse && mount --bind fuse /dev/fuse &&
         exec setpriv --reuid=65534 --regid=65534 --clear-groups bash -c \"$USER_SCRIPT\"",
        text(&scratch.path("."))
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "bash", "-c", &root]).env("USER_SCRIPT", user);
    let output = command.output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&said));
}
