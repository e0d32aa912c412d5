// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Descriptors that are not what they should be: refused with the reason, and the daemon serves on.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;

use harness::{Scratch, TestDaemon};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use serde_json::json;

/// Passes `fd` with add-fd; the error must contain `why`, and an honest descriptor must still be welcome.
fn refused(fd: impl AsFd, why: &str) {
    let mut daemon = TestDaemon::start();
    let before = daemon.open_fds();
    let error = daemon.error_with("add-fd", json!({}), &[fd.as_fd()]);
    assert!(error.contains(why), "{error}");
    assert_eq!(daemon.open_fds(), before, "a refused descriptor is closed");
    serves_on(&mut daemon);
}

/// An honest disk is added, opened, and read through QMP's eyes.
fn serves_on(daemon: &mut TestDaemon) {
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(4096).unwrap();
    daemon.add_node("honest", "raw", &disk, false);
    let nodes = daemon.ok("query-named-block-nodes", json!({}));
    assert!(nodes.as_array().unwrap().iter().any(|node| node["node-name"] == "honest"), "{nodes}");
}

fn open(path: &str, flags: OFlags) -> OwnedFd {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

fn image(scratch: &Scratch) -> String {
    let path = scratch.name("image.raw");
    fs::write(&path, [7; 4096]).unwrap();
    path
}

fn memfd(seals: SealFlags) -> OwnedFd {
    let fd = rustix::fs::memfd_create("disk", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, 4096).unwrap();
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    fd
}

/// The same memfd through a second, read-only description.
fn read_only(fd: &OwnedFd) -> File {
    use std::os::fd::AsRawFd;
    File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap()
}

#[test]
fn case_1_a_directory_is_refused() {
    refused(open("/", OFlags::RDONLY | OFlags::DIRECTORY), "is a directory");
}

#[test]
fn case_2_a_fifo_is_refused() {
    let (reader, _writer) = rustix::pipe::pipe().unwrap();
    refused(reader, "is a pipe");
}

#[test]
fn case_3_a_listener_is_refused_in_a_set_and_taken_by_getfd() {
    let scratch = Scratch::new();
    let listener = UnixListener::bind(scratch.path("s")).unwrap();
    refused(&listener, "is a socket");
    let mut daemon = TestDaemon::start();
    daemon.ok_with("getfd", json!({ "fdname": "listener" }), &listener);
    daemon.ok("nbd-server-start", json!({ "addr": { "type": "fd", "data": { "str": "listener" } } }));
}

#[test]
fn case_3_a_disk_is_no_listener() {
    let mut daemon = TestDaemon::start();
    daemon.ok_with("getfd", json!({ "fdname": "disk" }), tempfile::tempfile().unwrap());
    let start = json!({ "addr": { "type": "fd", "data": { "str": "disk" } } });
    assert!(daemon.error("nbd-server-start", start.clone()).contains("not a listening socket"));
    assert_eq!(daemon.error("nbd-server-start", start), "File descriptor named 'disk' has not been found");
    serves_on(&mut daemon);
}

#[test]
fn case_4_a_terminal_is_refused() {
    let terminal = rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY).unwrap();
    rustix::pty::unlockpt(&terminal).unwrap();
    let name = rustix::pty::ptsname(&terminal, Vec::new()).unwrap();
    refused(open(name.to_str().unwrap(), OFlags::RDWR | OFlags::NOCTTY), "is a terminal");
}

#[test]
fn case_5_a_character_device_is_refused() {
    refused(open("/dev/zero", OFlags::RDWR), "is a character device");
}

#[test]
fn case_6_the_kernels_memory_and_log_are_refused() {
    if let Ok(kmsg) = rustix::fs::open("/dev/kmsg", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
        refused(kmsg, "kernel's memory, ports or log");
    } else {
        eprintln!("skipped: case_6_the_kernels_memory_and_log_are_refused: cannot open /dev/kmsg here");
    }
}

#[test]
fn case_7_devices_with_a_role_are_no_disks() {
    match rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        Ok(fuse) => refused(fuse, "is a character device"),
        Err(_) => eprintln!("skipped: case_7_devices_with_a_role_are_no_disks: cannot open /dev/fuse here"),
    }
}

#[test]
fn case_8_a_descriptor_opened_with_o_path_is_refused() {
    let scratch = Scratch::new();
    refused(open(&image(&scratch), OFlags::PATH), "O_PATH");
}

#[test]
fn case_9_a_writer_with_o_append_is_refused() {
    let scratch = Scratch::new();
    refused(open(&image(&scratch), OFlags::RDWR | OFlags::APPEND), "O_APPEND");
}

#[test]
fn case_10_a_write_only_descriptor_is_taken_and_never_picked() {
    let scratch = Scratch::new();
    let mut daemon = TestDaemon::start();
    let set = daemon.add_fd(open(&image(&scratch), OFlags::WRONLY));
    for (read_only, flags) in [(true, "0x0"), (false, "0x2")] {
        let node = json!({ "driver": "file", "node-name": "n", "filename": format!("/dev/fdset/{set}"), "read-only": read_only });
        let error = daemon.error("blockdev-add", node);
        assert_eq!(error, format!("Failed to find file descriptor with matching flags={flags}"));
    }
    serves_on(&mut daemon);
}

#[test]
fn case_11_an_unsealed_memfd_given_read_only_is_refused() {
    refused(read_only(&memfd(SealFlags::empty())), "without F_SEAL_WRITE");
}

#[test]
fn case_12_a_memfd_sealed_against_writing_is_refused_for_writing() {
    refused(memfd(SealFlags::WRITE | SealFlags::SHRINK), "sealed against writing");
}

#[test]
fn case_13_a_sealed_memfd_is_served_read_only() {
    let memfd = memfd(SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW);
    let mut daemon = TestDaemon::start();
    daemon.add_node("memory", "raw", read_only(&memfd), true);
    serves_on(&mut daemon);
}

#[test]
fn case_14_an_unlinked_file_is_served() {
    let scratch = Scratch::new();
    let path = image(&scratch);
    let file = File::open(&path).unwrap();
    fs::remove_file(path).unwrap();
    let mut daemon = TestDaemon::start();
    daemon.add_node("unlinked", "raw", file, true);
    serves_on(&mut daemon);
}

#[test]
fn case_15_o_nonblock_changes_nothing() {
    let scratch = Scratch::new();
    let mut daemon = TestDaemon::start();
    let file = OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(image(&scratch));
    daemon.add_node("nonblock", "raw", file.unwrap(), true);
    daemon.start_nbd();
    daemon.export("nonblock", false);
    serves_on(&mut daemon);
}

#[test]
fn case_16_o_direct_must_match_both_ways() {
    let scratch = Scratch::new();
    let path = image(&scratch);
    let Ok(direct) = rustix::fs::open(&path, OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty()) else {
        eprintln!("skipped: case_16_o_direct_must_match_both_ways: the file system has no O_DIRECT");
        return;
    };
    let mut daemon = TestDaemon::start();
    let set = daemon.add_fd(direct);
    let node =
        json!({ "driver": "file", "node-name": "n", "filename": format!("/dev/fdset/{set}"), "read-only": true });
    assert_eq!(daemon.error("blockdev-add", node), "Failed to find file descriptor with matching flags=0x0");
    serves_on(&mut daemon);
}

#[test]
fn case_17_o_sync_is_refused() {
    let scratch = Scratch::new();
    refused(open(&image(&scratch), OFlags::RDWR | OFlags::SYNC), "O_SYNC");
    refused(open(&image(&scratch), OFlags::RDWR | OFlags::DSYNC), "O_SYNC");
}
