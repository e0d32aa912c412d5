// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The daemon can open nothing: asked from inside, seen from outside.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::fs::File;
use std::io::Write;
use std::process::Command;

use harness::{DOORLESS, Scratch, Serve, TestDaemon, doorless, judges, noise, run};
use serde_json::json;

#[test]
fn the_demo_reads_its_disk_and_every_attempt_to_get_out_is_denied() {
    let (status, out, err) = doorless(&["demo"]);
    assert!(status.success(), "{out}{err}");
    for line in [
        "checksum 0xb331e331d349131c as expected",
        "This text lives in an ext4 file system",
        "Every attempt was denied",
    ] {
        assert!(out.contains(line), "no '{line}' in:\n{out}");
    }
    for attempt in ["/etc/passwd", "demo.qcow2", "/proc/self/fd"] {
        let row = out.lines().find(|row| row.contains(attempt) && row.contains("  denied")).unwrap_or_default();
        assert!(!row.is_empty(), "no denied attempt on {attempt} in:\n{out}");
    }
}

#[test]
fn the_kernel_says_that_the_daemon_is_confined() {
    let daemon = TestDaemon::start();
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    assert_eq!(field("Seccomp:"), "2");
    assert_eq!(field("NoNewPrivs:"), "1");
    for capabilities in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(capabilities), "0000000000000000", "{capabilities}");
    }
}

#[test]
fn a_daemon_of_root_runs_as_a_user_that_owns_nothing() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: a_daemon_of_root_runs_as_a_user_that_owns_nothing: needs root");
        return;
    }
    let daemon = TestDaemon::start();
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap();
    assert!(ids.split_whitespace().all(|id| id != "0"), "Uid: {ids}");
    assert_eq!(status.lines().find_map(|line| line.strip_prefix("Groups:")).unwrap().trim(), "");
}

#[test]
fn attempts_from_inside_are_denied_one_by_one() {
    let mut daemon = TestDaemon::start();
    let scratch = Scratch::new();
    let image = scratch.path("image.raw");
    std::fs::write(&image, [0; 512]).unwrap();
    daemon.add_fd(File::open(&image).unwrap());
    let confinement = daemon.ok("query-confinement", json!({ "try": true, "paths": ["/etc/passwd", image] }));
    let attempts = confinement["attempts"].as_array().unwrap();
    assert!(attempts.len() > 10);
    for attempt in attempts {
        assert_eq!(attempt["denied"], true, "{attempt}");
    }
}

/// Calls that open something or make something openable, as strace groups and names them.
const OPENING: &str =
    "open,openat,openat2,creat,open_by_handle_at,open_tree,io_uring_setup,memfd_create,socket,execve,fsopen,mq_open";

#[test]
fn strace_sees_no_opening_call_while_serving() {
    if !judges("strace_sees_no_opening_call_while_serving", &["strace", "nbdcopy", "qemu-img"]) {
        return;
    }
    let scratch = Scratch::new();
    std::fs::write(scratch.path("disk.raw"), noise(4 << 20, 3)).unwrap();
    let serve = Serve::start(&["--format", "raw", "--socket", &scratch.name("s"), &scratch.name("disk.raw")]);
    let mut strace = Command::new("strace")
        .args(["-f", "-qq", "-e", &format!("trace={OPENING},sendto,exit_group"), "-o", &scratch.name("trace")])
        .args(["-p", &serve.daemon_pid().to_string()])
        .spawn()
        .unwrap();
    // Attached once the first traced call of a request shows up in its output.
    while !std::fs::read_to_string(scratch.path("trace")).is_ok_and(|trace| trace.contains("sendto")) {
        run("qemu-img", &["info", &serve.uri]);
    }
    run("nbdcopy", &[&serve.uri, &scratch.name("copy.raw")]);
    run("nbdcopy", &["--flush", &scratch.name("copy.raw"), &serve.uri]);
    assert!(serve.interrupt().success());
    strace.wait().unwrap();
    let trace = std::fs::read_to_string(scratch.path("trace")).unwrap();
    assert!(trace.contains("exit_group"), "strace saw it to the end");
    let opening = OPENING.split(',').find(|call| trace.contains(&format!(" {call}(")));
    assert_eq!(opening, None, "{trace}");
}

#[test]
fn strace_sees_no_opening_call_after_confining() {
    if !judges("strace_sees_no_opening_call_after_confining", &["strace", "nbdcopy"]) {
        return;
    }
    let scratch = Scratch::new();
    let mut disk = File::create(scratch.path("disk.raw")).unwrap();
    disk.write_all(&noise(1 << 20, 4)).unwrap();
    let node = format!("driver=raw,node-name=disk,file.driver=file,file.filename={}", scratch.name("disk.raw"));
    let server = format!("addr.type=unix,addr.path={}", scratch.name("s"));
    let mut strace = Command::new("strace")
        .args([
            "-f",
            "-qq",
            "-e",
            &format!("trace={OPENING},seccomp"),
            "-o",
            &scratch.name("trace"),
            DOORLESS,
            "daemon",
        ])
        .args(["--blockdev", &node, "--nbd-server", &server, "--export", "nbd,id=e,node-name=disk,name="])
        .spawn()
        .unwrap();
    let uri = format!("nbd+unix:///?socket={}", scratch.name("s"));
    while !Command::new("nbdcopy").args([&uri, "null:"]).output().unwrap().status.success() {
        assert_eq!(strace.try_wait().unwrap(), None, "the daemon ended");
    }
    let trace = std::fs::read_to_string(scratch.path("trace")).unwrap();
    let pid = trace.split_whitespace().next().unwrap().parse().unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), rustix::process::Signal::TERM).unwrap();
    assert!(strace.wait().unwrap().success());
    let trace = std::fs::read_to_string(scratch.path("trace")).unwrap();
    let lines: Vec<&str> = trace.lines().collect();
    let last_filter = lines.iter().rposition(|line| line.contains("seccomp(")).expect("a filter was installed");
    let after: Vec<&&str> = lines[last_filter + 1..].iter().filter(|line| line.contains('(')).collect();
    assert!(after.is_empty(), "{after:#?}");
}
