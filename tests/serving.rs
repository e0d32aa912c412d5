// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `doorless serve` as its user meets it: what it refuses, in which words, and that it leaves nothing behind.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::fs;
use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

use harness::{DOORLESS, Scratch, Serve, TestDaemon, doorless, judges, noise, run, run_in, text};
use serde_json::json;

/// The one line that a wrong use gets.
fn refusal(arguments: &[&str]) -> String {
    let (status, out, err) = doorless(&[&["serve"], arguments].concat());
    assert!(!status.success(), "{arguments:?}: {out}");
    assert_eq!(out, "", "{arguments:?}");
    assert_eq!(err.lines().count(), 1, "{arguments:?}: {err}");
    err.trim_end().to_owned()
}

/// A qcow2 image whose header names `backing`, which need not exist.
fn overlay(scratch: &Scratch, name: &str, backing: &str, format: &str) -> String {
    let path = scratch.name(name);
    run("qemu-img", &["create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", format, &path, "1M"]);
    path
}

#[test]
fn what_is_no_disk_is_refused_with_its_name_and_what_it_is() {
    let scratch = Scratch::new();
    let missing = scratch.name("missing.raw");
    assert_eq!(
        refusal(&[&missing]),
        format!("doorless: could not open '{missing}': No such file or directory (os error 2)")
    );
    assert!(refusal(&["/"]).contains("'/' is a directory; a disk is a regular file or a block device"));
    assert!(refusal(&["/dev/null"]).contains("is a character device"));
    let fifo = scratch.path("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
    assert!(refusal(&[text(&fifo)]).contains("is a FIFO"));
    fs::write(scratch.path("disk"), [0; 512]).unwrap();
    let unknown = refusal(&["--format", "zip", &scratch.name("disk")]);
    assert!(unknown.contains("unknown format 'zip'; there are ") && unknown.contains("qcow2, "), "{unknown}");
}

#[test]
fn a_broken_image_is_refused_by_the_confined_inspector() {
    let scratch = Scratch::new();
    fs::write(scratch.path("broken"), [b"QFI\xfb\0\0\0\x09".as_slice(), &[0; 504]].concat()).unwrap();
    let broken = refusal(&[&scratch.name("broken")]);
    assert!(broken.contains("broken': ") && broken.contains("Unsupported qcow2 version 9"), "{broken}");
}

#[test]
fn a_backing_file_outside_is_opened_only_if_allowed() {
    if !judges("a_backing_file_outside_is_opened_only_if_allowed", &["qemu-img"]) {
        return;
    }
    let (scratch, outside) = (Scratch::new(), Scratch::new());
    let base = outside.name("base.raw");
    fs::write(&base, noise(1 << 20, 5)).unwrap();
    let top = overlay(&scratch, "top.qcow2", &base, "raw");
    let refused = refusal(&[&top]);
    assert!(refused.contains(&base) && refused.contains("--allow"), "{refused}");
    let directory = Path::new(&base).parent().unwrap();
    let serve = Serve::start(&["--allow", text(directory), &top]);
    assert!(
        serve.said.iter().any(|line| line.contains("base.raw (raw, 1048576 bytes, read-only)")),
        "{:?}",
        serve.said
    );
    assert!(serve.interrupt().success());
    let secret = overlay(&scratch, "secret.qcow2", "/etc/shadow", "raw");
    assert!(refusal(&[&secret]).contains("--allow"));
}

#[test]
fn case_48_a_chain_that_bites_its_tail_or_never_ends_is_refused() {
    if !judges("case_48_a_chain_that_bites_its_tail_or_never_ends_is_refused", &["qemu-img"]) {
        return;
    }
    let scratch = Scratch::new();
    let itself = overlay(&scratch, "itself.qcow2", "itself.qcow2", "qcow2");
    assert!(refusal(&[&itself]).contains("is part of its own backing chain"));
    overlay(&scratch, "a.qcow2", "b.qcow2", "qcow2");
    let pair = overlay(&scratch, "b.qcow2", "a.qcow2", "qcow2");
    assert!(refusal(&[&pair]).contains("is part of its own backing chain"));
    let first = overlay(&scratch, "0.qcow2", "1.qcow2", "qcow2");
    for layer in 1..=64 {
        let header = fs::read(&first).unwrap();
        // Each names the next: the name lies behind the header, its length in it.
        let name = format!("{}.qcow2", layer + 1);
        let at = usize::try_from(u64::from_be_bytes(header[8..16].try_into().unwrap())).unwrap();
        let mut image = header;
        image[at..at + 16].fill(0);
        image[at..at + name.len()].copy_from_slice(name.as_bytes());
        image[16..20].copy_from_slice(&u32::try_from(name.len()).unwrap().to_be_bytes());
        fs::write(scratch.path(&format!("{layer}.qcow2")), image).unwrap();
    }
    let endless = refusal(&[&first]);
    assert!(endless.contains("the chain has more than 64 layers"), "{endless}");
}

#[test]
fn a_backing_file_of_unsaid_format_is_not_guessed() {
    if !judges("a_backing_file_of_unsaid_format_is_not_guessed", &["qemu-img"]) {
        return;
    }
    let scratch = Scratch::new();
    fs::write(scratch.path("base.raw"), noise(1 << 20, 6)).unwrap();
    let top = overlay(&scratch, "top.qcow2", "base.raw", "raw");
    run_in(Path::new(text(&scratch.path("."))), "qemu-img", &["rebase", "-u", "-b", "base.raw", "-F", "raw", &top]);
    // qemu-img no longer writes images without the extension: blank its number out.
    let mut image = fs::read(&top).unwrap();
    let extension = image.windows(4).position(|word| word == 0xE279_2ACA_u32.to_be_bytes()).unwrap();
    image[extension..extension + 4].copy_from_slice(&0x1234_5678_u32.to_be_bytes());
    fs::write(&top, image).unwrap();
    let refused = refusal(&[&top]);
    assert!(refused.contains("--backing-format"), "{refused}");
    let serve = Serve::start(&["--backing-format", "raw", &top]);
    assert!(serve.interrupt().success());
}

#[test]
fn a_socket_in_use_and_a_file_in_its_place_are_left_alone_and_a_dead_socket_is_replaced() {
    let scratch = Scratch::new();
    let disk = scratch.name("disk.raw");
    fs::write(&disk, [0; 512]).unwrap();
    let socket = scratch.name("nbd.sock");

    fs::write(&socket, "precious").unwrap();
    let refused = refusal(&["--socket", &socket, &disk]);
    assert!(refused.contains("to listen there: Address already in use"), "{refused}");
    assert_eq!(fs::read_to_string(&socket).unwrap(), "precious");
    fs::remove_file(&socket).unwrap();

    let listener = UnixListener::bind(&socket).unwrap();
    assert!(refusal(&["--socket", &socket, &disk]).contains("Address already in use"));
    drop(listener);

    let serve = Serve::start(&["--socket", &socket, &disk]);
    UnixStream::connect(&socket).unwrap();
    assert!(serve.interrupt().success());
    assert!(!Path::new(&socket).exists(), "the socket goes with the server");
}

#[test]
fn a_name_is_the_exports_and_read_only_is_kept() {
    if !judges("a_name_is_the_exports_and_read_only_is_kept", &["nbdinfo", "qemu-io"]) {
        return;
    }
    let scratch = Scratch::new();
    let disk = scratch.name("disk.raw");
    fs::write(&disk, noise(1 << 20, 7)).unwrap();
    let serve = Serve::start(&["--format", "raw", "--read-only", "--name", "a disk", &disk]);
    assert!(serve.uri.contains("/a%20disk?"), "{}", serve.uri);
    let info = run("nbdinfo", &["--json", &serve.uri]);
    assert!(info.contains("\"export-name\": \"a disk\"") && info.contains("\"is_read_only\": true"), "{info}");
    let write = Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 512", &serve.uri]).output().unwrap();
    assert!(!write.status.success());
    assert_eq!(fs::read(&disk).unwrap(), noise(1 << 20, 7));
}

#[test]
fn an_ordinary_user_runs_the_demo_and_serves() {
    let name = "an_ordinary_user_runs_the_demo_and_serves";
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: {name}: needs root, to become somebody else");
        return;
    }
    if !judges(name, &["setpriv"]) {
        return;
    }
    // A copy where everybody may run it: the build directory may be private.
    let scratch = Scratch::new();
    let program = scratch.name("doorless");
    fs::copy(DOORLESS, &program).unwrap();
    fs::set_permissions(scratch.path("."), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", &program, "demo"])
        .env("TMPDIR", scratch.path("."))
        .env_remove("XDG_RUNTIME_DIR")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("Every attempt was denied"), "{said}{output:?}");
}

#[test]
fn a_block_device_is_served_like_a_file() {
    let name = "a_block_device_is_served_like_a_file";
    if !judges(name, &["losetup", "qemu-img", "qemu-io"]) {
        return;
    }
    let scratch = Scratch::new();
    let backing = scratch.name("disk.raw");
    fs::write(&backing, noise(1 << 20, 8)).unwrap();
    let attached = Command::new("losetup").args(["--find", "--show", &backing]).output().unwrap();
    if !attached.status.success() {
        eprintln!("skipped: {name}: no loop device can be had");
        return;
    }
    let device = String::from_utf8(attached.stdout).unwrap().trim().to_owned();
    let _detach = Detach(&device);
    let serve = Serve::start(&["--format", "raw", &device]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &serve.uri, &backing]);
    for command in ["write -P 9 4096 8192", "write -z 65536 4096", "write -z 512 100", "discard 131072 65536"] {
        run("qemu-io", &["-f", "raw", "-c", command, "-c", "flush", &serve.uri]);
    }
    for command in ["read -P 9 4096 8192", "read -P 0 65536 4096", "read -P 0 512 100"] {
        let said = run("qemu-io", &["-r", "-f", "raw", "-c", command, &serve.uri]);
        assert!(!said.contains("verification failed"), "{command}: {said}");
    }
    assert!(serve.interrupt().success());
    assert_eq!(fs::read(&backing).unwrap()[4096..12288], [9; 8192]);
}

struct Detach<'a>(&'a str);

impl Drop for Detach<'_> {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", self.0]).status();
    }
}

#[test]
fn a_client_that_comes_before_the_export_waits_for_it_if_the_manager_wants_that() {
    let mut daemon = TestDaemon::start();
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    daemon.add_node("disk", "raw", &file, false);
    let listener = UnixListener::bind(daemon.socket()).unwrap();
    daemon.ok_with("getfd", json!({ "fdname": "nbd" }), &listener);
    let address = json!({ "type": "fd", "data": { "str": "nbd" } });
    daemon.ok("nbd-server-start", json!({ "addr": address, "await-export": true }));
    let mut early = UnixStream::connect(daemon.socket()).unwrap();
    // A command later the server would have greeted a client that it does not keep waiting.
    daemon.ok("query-block-exports", json!({}));
    early.set_nonblocking(true).unwrap();
    assert_eq!(early.read(&mut [0; 1]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    daemon.export("disk", false);
    early.set_nonblocking(false).unwrap();
    let mut greeting = [0; 8];
    early.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"NBDMAGIC");
}
