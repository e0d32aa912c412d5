// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `doorless daemon` in place of `qemu-storage-daemon`: options take effect in order, wrong ones end it with the original's
//! status, and with its words where clients may go by them.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use harness::{DOORLESS, Scratch, doorless, judges, run};

/// Status and errors of a program that must end by itself, with /dev/zero as descriptor 7.
fn ended(program: &[&str], arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" 7</dev/zero", "sh"]).args(program).args(arguments);
    let output = command.stdin(Stdio::null()).output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).trim_end().to_owned())
}

#[test]
fn add_fd_refuses_in_qemus_words() {
    if !judges("add_fd_refuses_in_qemus_words", &["qemu-system-x86_64"]) {
        return;
    }
    let qemu = ["qemu-system-x86_64", "-machine", "none", "-display", "none", "-add-fd"];
    for wrong in [
        "set=1",
        "fd=-1,set=1",
        "fd=0,set=1",
        "fd=2,set=1",
        "fd=99,set=1",
        "fd=99",
        "fd=7",
        "fd=7,set=-1",
        "fd=x,set=1",
        "fd=7,set=x",
        "fd=0x63,set=1",
        "foo=1",
        "fd=7,set=1,foo=1",
    ] {
        let (status, theirs) = ended(&qemu, &[wrong]);
        let words = theirs.rsplit_once(&format!("-add-fd {wrong}: ")).unwrap_or_else(|| panic!("{theirs}")).1;
        let (ours_status, ours) = ended(&[DOORLESS, "daemon", "--add-fd"], &[wrong]);
        assert_eq!((status, ours_status), (Some(1), Some(1)), "{wrong}");
        assert!(ours.ends_with(&format!("{wrong}: {words}")), "{wrong}: QEMU: {theirs}; ours: {ours}");
    }
}

#[test]
fn wrong_options_end_it_with_the_status_of_the_original() {
    let name = "wrong_options_end_it_with_the_status_of_the_original";
    if !judges(name, &["qemu-storage-daemon"]) {
        return;
    }
    let scratch = Scratch::new();
    let link = scratch.name("qemu-storage-daemon");
    std::os::unix::fs::symlink(DOORLESS, &link).unwrap();
    std::fs::write(scratch.path("disk"), [0; 512]).unwrap();
    let blockdev = format!("file,node-name=n,filename={}", scratch.name("disk"));
    let socket = format!("addr.type=unix,addr.path={}", scratch.name("nbd"));
    let (blockdev, socket) = (blockdev.as_str(), socket.as_str());
    let none = format!("driver=file,node-name=x,filename={}", scratch.name("none"));
    // Text that both say, where there is one that matters.
    let wrong: &[(&[&str], &str)] = &[
        (&["--zz"], ""),
        (&["stray"], ""),
        (&["--blockdev"], ""),
        (&["--monitor", "m"], ""),
        (&["--chardev", "zz,id=m"], ""),
        (&["--chardev", "socket,path=/none/m,server=on"], ""),
        (&["--chardev", "socket,id=m,path=/none/m"], "Failed to connect to '/none/m'"),
        (&["--blockdev", "zz,node-name=a"], "Parameter 'driver' does not accept value 'zz'"),
        (&["--blockdev", "{"], "JSON parse error"),
        (&["--blockdev", "file"], "Parameter 'filename' is missing"),
        (&["--blockdev", "file,filename=x,node-name=a,zz=1"], "Parameter 'zz' is unexpected"),
        (&["--blockdev", &none], "No such file or directory"),
        (&["--blockdev", blockdev, "--blockdev", blockdev], "Duplicate nodes with node-name='n'"),
        (&["--export", "nbd,id=e,node-name=n"], "node-name='n'"),
        (&["--blockdev", blockdev, "--export", "nbd,id=e,node-name=n"], "NBD server not running"),
        (
            &["--blockdev", blockdev, "--export", "nbd,id=e,node-name=n", "--nbd-server", socket],
            "NBD server not running",
        ),
        (&["--nbd-server", "addr.type=zz"], "Parameter 'type' does not accept value 'zz'"),
        (&["--nbd-server", socket, "--export", "nbd,id=e,node-name=n"], "node-name='n'"),
        (&["--object", "zz,id=a"], "Parameter 'qom-type' does not accept value 'zz'"),
        (&["--object", "iothread"], "Parameter 'id' is missing"),
        (&["--object", "iothread,id=0"], "Parameter 'id' expects an identifier"),
        (&["--object", "iothread,id=a", "--object", "iothread,id=a"], "'a'"),
    ];
    for (arguments, words) in wrong {
        for program in ["qemu-storage-daemon", &link] {
            let (status, said) = ended(&[program], arguments);
            assert_eq!(status, Some(1), "{program} {arguments:?}: {said}");
            assert!(said.contains(words), "{program} {arguments:?}: {said}");
        }
    }
}

#[test]
fn objects_that_are_not_built_are_refused_by_name() {
    for kind in ["throttle-group", "tls-creds-psk", "secret_keyring", "main-loop"] {
        let (status, _, said) = doorless(&["daemon", "--object", &format!("{kind},id=a")]);
        assert_eq!(status.code(), Some(1));
        assert!(said.contains(&format!("Parameter 'qom-type' does not accept value '{kind}'")), "{said}");
    }
}

#[test]
fn keys_with_dots_and_json_say_the_same() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("disk"), [7; 1 << 16]).unwrap();
    let disk = scratch.name("disk");
    let json = format!(
        r#"{{"driver":"raw","node-name":"n","offset":512,"file":{{"driver":"file","filename":"{disk}","read-only":true}},"read-only":true}}"#
    );
    let keys =
        format!("raw,node-name=n,offset=512,file.driver=file,file.filename={disk},file.read-only=on,read-only=on");
    for (number, blockdev) in [json, keys].into_iter().enumerate() {
        let socket = scratch.path(&format!("nbd{number}"));
        let listener = OwnedFd::from(UnixListener::bind(&socket).unwrap());
        let mut client = UnixStream::connect(&socket).unwrap();
        let mut child = Command::new(DOORLESS)
            .args(["daemon", "--blockdev", &blockdev, "--nbd-server", r#"{"addr":{"type":"fd","str":"0"}}"#])
            .args(["--export", r#"{"type":"nbd","id":"e","node-name":"n","name":"e"}"#, "--ends-with-clients"])
            .stdin(listener)
            .spawn()
            .unwrap();
        assert_eq!(size(&mut client, "e"), (1 << 16) - 512);
        drop(client);
        assert!(child.wait().unwrap().success());
    }
}

#[test]
fn a_client_that_is_there_before_the_daemon_finds_every_export_of_the_command_line() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("disk"), [7; 1 << 16]).unwrap();
    let socket = scratch.path("nbd");
    let listener = OwnedFd::from(UnixListener::bind(&socket).unwrap());
    let mut client = UnixStream::connect(&socket).unwrap();
    let mut command = Command::new(DOORLESS);
    command.args(["daemon", "--nbd-server", "addr.type=fd,addr.str=0", "--ends-with-clients", "--blockdev"]);
    command.arg(format!("file,node-name=n,read-only=on,filename={}", scratch.name("disk")));
    for export in 0..100 {
        command.args(["--export", &format!("nbd,id=e{export},node-name=n,name=e{export}")]);
    }
    let mut child = command.stdin(listener).spawn().unwrap();
    assert_eq!(size(&mut client, "e99"), 1 << 16);
    drop(client);
    assert!(child.wait().unwrap().success());
}

#[test]
fn its_sockets_and_pid_file_go_with_it_however_it_ends() {
    for killed in [false, true] {
        let scratch = Scratch::new();
        let (monitor, nbd, pid) = (scratch.name("monitor"), scratch.name("nbd"), scratch.name("pid"));
        let (keep, other) = (scratch.path("keep"), scratch.path("other"));
        let mut child = Command::new(DOORLESS)
            .args(["daemon", "--chardev", &format!("socket,id=m,path={monitor},server=on,wait=off"), "--monitor", "m"])
            .args(["--chardev", &format!("socket,id=k,path={},server=on,wait=off", keep.display()), "--monitor", "k"])
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={nbd}"), "--pidfile", &pid])
            .spawn()
            .unwrap();
        // Its answer comes when everything is done.
        while !std::fs::read_to_string(&pid).is_ok_and(|text| text.ends_with('\n')) {
            std::thread::yield_now();
        }
        // Somebody puts a file of his own in the place of one: that one stays.
        std::fs::write(&other, "his").unwrap();
        std::fs::rename(&other, &keep).unwrap();
        let process = rustix::process::Pid::from_child(&child);
        let signal = if killed { rustix::process::Signal::KILL } else { rustix::process::Signal::TERM };
        rustix::process::kill_process(process, signal).unwrap();
        assert_eq!(child.wait().unwrap().success(), !killed);
        let left = || [&monitor, &nbd, &pid].iter().filter(|path| Path::new(path).exists()).count();
        // Nobody can wait for what cleans up after a daemon that was killed.
        while killed && left() > 0 {
            std::thread::yield_now();
        }
        assert_eq!(left(), 0);
        assert_eq!(std::fs::read_to_string(&keep).unwrap(), "his");
    }
}

#[test]
fn help_and_version_are_answers() {
    assert!(run(DOORLESS, &["daemon", "--help"]).contains("--blockdev"));
    assert!(run(DOORLESS, &["daemon", "--version"]).starts_with("doorless "));
    let (status, out, said) = doorless(&["daemon", "--trace"]);
    assert_eq!((status.code(), out.as_str()), (Some(1), ""));
    assert!(said.contains("option '--trace' requires an argument"), "{said}");
}

/// Chooses an export; its size. A name that is not there is answered by hanging up, and then this panics.
fn size(client: &mut UnixStream, name: &str) -> u64 {
    client.read_exact(&mut [0; 18]).unwrap();
    let len = u32::try_from(name.len()).unwrap().to_be_bytes();
    client.write_all(&[&[0, 0, 0, 3], &b"IHAVEOPT"[..], &[0, 0, 0, 1], &len, name.as_bytes()].concat()).unwrap();
    let mut size = [0; 8];
    client.read_exact(&mut size).unwrap();
    u64::from_be_bytes(size)
}
