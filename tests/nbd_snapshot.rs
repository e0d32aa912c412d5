// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `doorless nbd -s` and `doorless serve --snapshot`: clients write, and the image stays as it is. Judged by QEMU's and libnbd's
//! programs.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::path::Path;
use std::process::{Command, Stdio};

use harness::{DOORLESS, Running, Scratch, Serve, judges, noise, open_fds, run};
use rustix::process::Signal;

fn uri(socket: &str) -> String {
    manager::serve::uri(Path::new(socket), "")
}

/// An image of each kind that may lie below: its format and its name.
fn images(scratch: &Scratch) -> Vec<(&'static str, String)> {
    std::fs::write(scratch.path("disk.raw"), noise(3 << 20, 5)).unwrap();
    let raw = scratch.name("disk.raw");
    let mut images = vec![("raw", raw.clone())];
    for format in ["qcow2", "vdi"] {
        let name = scratch.name(&format!("disk.{format}"));
        run("qemu-img", &["convert", "-f", "raw", "-O", format, &raw, &name]);
        images.push((format, name));
    }
    let chain = scratch.name("overlay.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", &chain]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 9 2M 64k", &chain]);
    images.push(("qcow2", chain));
    images
}

#[test]
fn clients_of_a_snapshot_write_and_the_image_stays_as_it_is() {
    let test = "clients_of_a_snapshot_write_and_the_image_stays_as_it_is";
    if !judges(test, &["qemu-img", "qemu-io", "nbdcopy"]) {
        return;
    }
    let scratch = Scratch::new();
    for (format, image) in images(&scratch) {
        let (socket, before) = (scratch.name("socket"), std::fs::read(&image).unwrap());
        run("qemu-img", &["convert", "-f", format, "-O", "raw", &image, &scratch.name("expected")]);
        let mut expected = std::fs::read(scratch.path("expected")).unwrap();
        let server = ["nbd", "-s", "-t", "-e2", "-f", format, "-k", &socket, &image];
        let server = Running::start(DOORLESS, &server, &socket, Signal::TERM);
        run(
            "qemu-io",
            &["-f", "raw", "-c", "write -P 7 100k 200k", "-c", "write -z 1M 64k", "-c", "flush", &uri(&socket)],
        );
        expected[100 << 10..300 << 10].fill(7);
        expected[1 << 20..(1 << 20) + (64 << 10)].fill(0);
        run("nbdcopy", &[&uri(&socket), &scratch.name("copy")]);
        assert!(std::fs::read(scratch.path("copy")).unwrap() == expected, "{format}: what was written is there");
        run("qemu-io", &["-r", "-f", "raw", "-c", "read -P 7 100k 200k", &uri(&socket)]);
        assert!(
            open_fds(server.0.id()).iter().any(|fd| fd.ends_with("(deleted)")),
            "the overlay is a file without a name"
        );
        drop(server);
        assert!(std::fs::read(&image).unwrap() == before, "{format}: the image is as it was");
        assert!(!Path::new(&socket).exists());
    }
}

#[test]
fn a_client_of_a_snapshot_sees_what_qemu_nbd_shows() {
    let test = "a_client_of_a_snapshot_sees_what_qemu_nbd_shows";
    if !judges(test, &["qemu-nbd", "nbdsh"]) {
        return;
    }
    let Some(python) = harness::python_with(test, "nbd") else { return };
    let scratch = Scratch::new();
    // A disk that ends within a sector is shown up to the end of that sector.
    std::fs::write(scratch.path("disk"), noise((1 << 20) + 100, 3)).unwrap();
    let look = "import nbd, sys\nh = nbd.NBD()\nh.connect_unix(sys.argv[1])\nprint(h.get_size(), h.is_read_only(), \
                h.can_multi_conn(), h.can_flush(), h.can_fua(), h.can_trim(), h.can_zero(), h.can_cache())\n";
    let (disk, link) = (scratch.name("disk"), scratch.name("qemu-nbd"));
    std::os::unix::fs::symlink(DOORLESS, &link).unwrap();
    for options in [&["-s"][..], &["--snapshot", "--read-only"], &["-rs", "-e3"], &["-s", "--discard=unmap"]] {
        let seen = ["qemu-nbd", &link].map(|program| {
            let socket = scratch.name(if program == link { "ours" } else { "theirs" });
            let arguments = [options, &["-t", "-f", "raw", "-k", &socket, &disk]].concat();
            let server = Running::start(program, &arguments, &socket, Signal::TERM);
            let seen = run(python, &["-c", look, &socket]);
            drop(server);
            seen
        });
        assert_eq!(seen[0], seen[1], "{options:?}");
    }
}

#[test]
fn a_snapshot_is_served_in_the_background_over_tcp_from_an_offset() {
    if !judges("a_snapshot_is_served_in_the_background_over_tcp_from_an_offset", &["qemu-io"]) {
        return;
    }
    let scratch = Scratch::new();
    let content = noise(1 << 20, 3);
    std::fs::write(scratch.path("disk"), &content).unwrap();
    // A port that is free now; a test that lost the race would say so.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (port, pid) = (port.to_string(), scratch.name("pid"));
    let disk = scratch.name("disk");
    run(
        DOORLESS,
        &["nbd", "--fork", "-s", "-b", "127.0.0.1", "-p", &port, "-o64k", "--pid-file", &pid, "-f", "raw", &disk],
    );
    let said = run(
        "qemu-io",
        &["-f", "raw", "-c", "write -P 5 0 4k", "-c", "read -P 5 0 4k", &format!("nbd://127.0.0.1:{port}")],
    );
    assert!(!said.contains("Pattern verification failed"), "{said}");
    assert!(std::fs::read(&disk).unwrap() == content);
}

#[test]
fn serve_tells_what_is_written_to_and_what_stays() {
    if !judges("serve_tells_what_is_written_to_and_what_stays", &["qemu-io"]) {
        return;
    }
    let scratch = Scratch::new();
    let content = noise(1 << 20, 3);
    std::fs::write(scratch.path("disk"), &content).unwrap();
    let serve = Serve::start(&["--snapshot", "--format", "raw", &scratch.name("disk")]);
    assert!(
        serve.said[0].starts_with("image: temporary overlay in ") && serve.said[0].contains("read-write"),
        "{:?}",
        serve.said
    );
    assert!(serve.said[1].starts_with("backed by: ") && serve.said[1].contains("read-only"), "{:?}", serve.said);
    run("qemu-io", &["-f", "raw", "-c", "write -P 5 0 4k", "-c", "read -P 5 0 4k", &serve.uri]);
    assert!(serve.interrupt().success());
    assert!(std::fs::read(scratch.path("disk")).unwrap() == content);
}

#[test]
fn a_directory_of_the_users_choice_that_cannot_be_written_is_an_error() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("disk"), [0; 512]).unwrap();
    let mut command = Command::new(DOORLESS);
    command.args(["nbd", "-s", "-f", "raw", "-k", &scratch.name("s"), &scratch.name("disk")]);
    let output = command.env("TMPDIR", scratch.path("missing")).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("to make a temporary file there"), "{said}");
}

/// Runs a script in a mount namespace of its own, in which it may mount; `None` where no such thing may be made.
fn in_own_mounts(test: &str, script: &str, arguments: &[&str]) -> Option<std::process::Output> {
    // Root's: in a user namespace the daemon could not become another user than its root.
    let made = Command::new("unshare").args(["-m", "true"]).stderr(Stdio::null()).status();
    if !made.is_ok_and(|status| status.success()) {
        eprintln!("skipped: {test}: no mount namespace can be made");
        return None;
    }
    Some(Command::new("unshare").args(["-m", "sh", "-ec", script, "sh"]).args(arguments).output().unwrap())
}

#[test]
fn where_the_overlay_finds_no_room_a_write_fails_until_there_is_some() {
    let test = "where_the_overlay_finds_no_room_a_write_fails_until_there_is_some";
    if !judges(test, &["unshare", "qemu-io"]) {
        return;
    }
    let scratch = Scratch::new();
    let content = vec![3; 8 << 20];
    std::fs::write(scratch.path("disk"), &content).unwrap();
    std::fs::create_dir(scratch.path("small")).unwrap();
    let script = r#"
        mount -t tmpfs -o size=4m none "$2"
        head -c 1M /dev/zero >"$2/filler"
        TMPDIR=$2 "$1" nbd --fork -s -t -f raw -k "$4" --pid-file "$4.pid" "$3"
        client() { qemu-io -f raw -c "$1" "nbd+unix:///?socket=$2" 2>&1 || true; }
        client 'write -P 1 0 6M' "$4"
        client 'read -P 3 7M 64k' "$4"
        rm "$2/filler"
        client 'write -P 2 0 64k' "$4"
        client 'read -P 2 0 64k' "$4"
        kill $(cat "$4.pid")"#;
    let names = [DOORLESS, &scratch.name("small"), &scratch.name("disk"), &scratch.name("socket")];
    let Some(output) = in_own_mounts(test, script, &names) else { return };
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert_eq!(said.matches("No space left on device").count(), 1, "{said}");
    assert_eq!(said.matches("65536/65536").count(), 3, "{said}");
    assert!(!said.contains("Pattern verification failed"), "{said}");
    assert!(std::fs::read(scratch.path("disk")).unwrap() == content);
}

#[test]
fn where_no_file_can_be_made_the_overlay_is_memory_and_it_is_said() {
    let test = "where_no_file_can_be_made_the_overlay_is_memory_and_it_is_said";
    if !judges(test, &["unshare", "qemu-io"]) {
        return;
    }
    let scratch = Scratch::new();
    std::fs::write(scratch.path("disk"), vec![3; 1 << 20]).unwrap();
    let script = r#"
        mount -t tmpfs -o ro none /var/tmp
        unset TMPDIR
        "$1" nbd --fork -s -f raw -k "$3" "$2"
        qemu-io -f raw -c 'write -P 1 0 64k' -c 'read -P 1 0 64k' -c 'read -P 3 64k 64k' "nbd+unix:///?socket=$3" 2>&1"#;
    let names = [DOORLESS, &scratch.name("disk"), &scratch.name("socket")];
    let Some(output) = in_own_mounts(test, script, &names) else { return };
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(said.contains("what is written is kept in memory"), "{said}");
    assert_eq!(said.matches("65536/65536").count(), 3, "{said}");
    assert!(std::fs::read(scratch.path("disk")).unwrap() == vec![3; 1 << 20]);
}
