// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The cell: namespaces with nothing in them, a user that owns nothing, and what happens where they cannot be had.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use harness::{DOORLESS, Scratch, Serve, doorless, judges, run};
use rustix::process::{Pid, Signal, geteuid, kill_process};

/// A user that is not root and owns nothing of this test.
const NOBODY: u32 = 65534;

/// Whether an ordinary user may make a user namespace here.
fn users_make_namespaces(test: &str) -> bool {
    let mut unshare = Command::new("unshare");
    if geteuid().is_root() {
        unshare.uid(NOBODY).gid(NOBODY);
    }
    let may = unshare.args(["-Urmnp", "--fork", "true"]).output().is_ok_and(|output| output.status.success());
    if !may {
        eprintln!("skipped: {test}: users make no namespaces here");
    }
    may
}

/// A file of `/proc/PID/`, as a field of it.
fn status(pid: u32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    text.lines().find_map(|line| line.strip_prefix(field)).unwrap().trim().to_owned()
}

#[test]
fn a_daemon_of_serve_lives_in_namespaces_with_nothing_in_them() {
    let test = "a_daemon_of_serve_lives_in_namespaces_with_nothing_in_them";
    if !geteuid().is_root() {
        eprintln!("skipped: {test}: only root may look");
        return;
    }
    let scratch = Scratch::new();
    fs::write(scratch.path("disk.raw"), [7; 4096]).unwrap();
    let serve = Serve::start(&["--confine=require", "--format", "raw", &scratch.name("disk.raw")]);
    let pid = serve.daemon_pid();
    for namespace in ["mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
    }
    assert!(status(pid, "NSpid:").ends_with("\t1"), "{}", status(pid, "NSpid:"));
    assert_eq!(fs::read_dir(format!("/proc/{pid}/root/")).unwrap().count(), 0);
    let interfaces = fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap();
    assert!(interfaces.lines().skip(2).all(|line| line.trim_start().starts_with("lo:")), "{interfaces}");
    if judges(test, &["nbdcopy"]) {
        run("nbdcopy", &[&serve.uri, &scratch.name("copy")]);
        assert_eq!(fs::read(scratch.path("copy")).unwrap(), [7; 4096]);
    }
    assert!(serve.interrupt().success());
}

#[test]
fn two_daemons_of_root_are_two_users() {
    if !geteuid().is_root() {
        eprintln!("skipped: two_daemons_of_root_are_two_users: needs root");
        return;
    }
    let scratch = Scratch::new();
    fs::write(scratch.path("disk.raw"), [7; 4096]).unwrap();
    let serve = || Serve::start(&["--read-only", "--format", "raw", &scratch.name("disk.raw")]);
    let (one, two) = (serve(), serve());
    assert_ne!(status(one.daemon_pid(), "Uid:"), status(two.daemon_pid(), "Uid:"));
}

#[test]
fn an_ordinary_user_has_every_layer_where_users_make_namespaces() {
    let test = "an_ordinary_user_has_every_layer_where_users_make_namespaces";
    if !users_make_namespaces(test) {
        return;
    }
    let (_place, program) = for_everybody();
    let mut command = Command::new(&program);
    if geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    let output = command.args(["demo", "--confine=require"]).current_dir("/tmp").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    for layer in ["namespaces", "pid-namespace", "capabilities", "landlock", "seccomp"] {
        let row = said.lines().find(|line| line.trim_start().starts_with(layer)).unwrap_or_default();
        assert!(row.contains("  yes  "), "{layer} in:\n{said}");
    }
    assert!(said.contains("none in any set\n"), "the bounding set is empty, too:\n{said}");
}

/// The program where any user can run it.
fn for_everybody() -> (tempfile::TempDir, std::path::PathBuf) {
    let place = tempfile::tempdir_in("/tmp").unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = place.path().join("doorless");
    fs::copy(DOORLESS, &program).unwrap();
    (place, program)
}

#[test]
fn a_daemon_that_was_started_by_hand_names_the_layer_that_it_cannot_have() {
    let (status, _, said) = doorless(&["daemon", "--confine=require"]);
    assert!(!status.success());
    assert!(said.contains("'pid-namespace'") || said.contains("'namespaces'"), "{said}");
    assert!(said.contains("cannot be had here"), "{said}");
}

#[test]
fn a_level_that_there_is_not_is_refused_with_those_that_there_are() {
    for verb in [&["daemon", "--confine=landlok"][..], &["img", "info", "--confine=landlok", "x"]] {
        let (status, _, said) = doorless(verb);
        assert!(!status.success());
        assert!(said.contains("'landlok' is no layer of confinement") && said.contains("not-dumpable"), "{said}");
    }
}

/// `doorless ARGUMENTS` where not even root may make a namespace of mounts.
fn without_namespaces(arguments: &[&str]) -> Child {
    let script =
        "echo 0 > /proc/sys/user/max_mnt_namespaces && echo 0 > /proc/sys/user/max_pid_namespaces && exec \"$@\"";
    Command::new("unshare")
        .args(["-Ur", "sh", "-c", script, "sh", DOORLESS])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn without_namespaces_a_disk_is_served_and_says_so_unless_they_are_required() {
    let test = "without_namespaces_a_disk_is_served_and_says_so_unless_they_are_required";
    if !users_make_namespaces(test) {
        return;
    }
    let scratch = Scratch::new();
    fs::write(scratch.path("disk.raw"), [7; 4096]).unwrap();
    // Inside, there is no other user to become: the layer of users cannot be had either.
    let serve = |level: &str| without_namespaces(&["serve", level, "--format", "raw", &scratch.name("disk.raw")]);

    let refused = serve("--confine=landlock,seccomp,namespaces").wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && said.contains("the layer 'namespaces' of confinement cannot be had"),
        "{said}"
    );

    let mut served = serve("--confine=landlock,seccomp");
    let mut lines = BufReader::new(served.stdout.take().unwrap()).lines().map(Result::unwrap);
    let said: Vec<String> = lines.by_ref().take_while(|line| !line.starts_with("ready: ")).collect();
    for layer in ["namespaces", "pid-namespace", "user"] {
        let line = format!("  without the layer {layer}: ");
        assert!(said.iter().any(|said| said.starts_with(&line)), "no '{line}' in {said:#?}");
    }
    kill_process(Pid::from_child(&served), Signal::INT).unwrap();
    let ended = served.wait_with_output().unwrap();
    let warned = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success() && warned.contains("confined without the layer 'namespaces'"), "{warned}");
}
