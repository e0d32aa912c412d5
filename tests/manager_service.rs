// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `doorless manager`: many daemons for many users; what it was told outlives daemons and managers. `DOORLESS_ROUNDS` says how
//! many rounds the books are kept for (default 40).
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;
mod reconnecting;

use std::fs;
use std::io::{BufRead, BufReader, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::Duration;

use harness::{DOORLESS, Scratch, doorless, judges, noise, open_fds, run};
use manager::service::{Answer, Request, Shown, ask};
use reconnecting::Client;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// A service in a scratch directory, whose policy lets everybody have raw and qcow2 images of their own.
struct Manager {
    scratch: Scratch,
    process: Child,
    words: BufReader<ChildStderr>,
}

impl Manager {
    fn start() -> Manager {
        let scratch = Scratch::new();
        fs::set_permissions(scratch.path(""), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(scratch.path("disks")).unwrap();
        fs::write(scratch.path("disks/a"), noise(1 << 20, 1)).unwrap();
        fs::write(scratch.path("disks/b"), noise(1 << 20, 2)).unwrap();
        let (process, words) = Manager::spawn(&scratch, &[]);
        Manager { scratch, process, words }
    }

    fn spawn(scratch: &Scratch, environment: &[(&str, &str)]) -> (Child, BufReader<ChildStderr>) {
        Manager::spawn_by(&[], scratch, environment)
    }

    /// Started by a program that gives way to what its last arguments say.
    fn spawn_by(starter: &[&str], scratch: &Scratch, environment: &[(&str, &str)]) -> (Child, BufReader<ChildStderr>) {
        if !scratch.path("policy").exists() {
            write_policy(scratch, "read-write");
        }
        let (policy, audit, directory) = (scratch.name("policy"), scratch.name("audit"), scratch.name("run"));
        let line = [starter, &[DOORLESS]].concat();
        let mut command = Command::new(line[0]);
        command.args(&line[1..]).args(["manager", "--policy", &policy, "--audit", &audit, "--directory", &directory]);
        let mut process = command.envs(environment.iter().copied()).stderr(Stdio::piped()).spawn().unwrap();
        let words = BufReader::new(process.stderr.take().unwrap());
        let socket = scratch.path("run/manager.sock");
        while UnixStream::connect(&socket).is_err() {
            assert_eq!(process.try_wait().unwrap(), None);
            std::thread::yield_now();
        }
        (process, words)
    }

    fn policy(&self, access: &str) {
        write_policy(&self.scratch, access);
    }

    fn socket(&self) -> PathBuf {
        self.scratch.path("run/manager.sock")
    }

    fn ask(&self, request: &Request) -> Answer {
        ask(&self.socket(), request).unwrap()
    }

    fn refused(&self, request: &Request) -> String {
        ask(&self.socket(), request).unwrap_err().to_string()
    }

    fn attach(&self, name: &str, disk: &str, image: &str) -> String {
        match self.ask(&attach(name, disk, &self.scratch.path(image))) {
            Answer::Attached { uri } => uri,
            other => panic!("{other:?}"),
        }
    }

    fn list(&self) -> Vec<Shown> {
        match self.ask(&Request::List) {
            Answer::Daemons(daemons) => daemons,
            other => panic!("{other:?}"),
        }
    }

    fn word(&mut self) -> String {
        let mut line = String::new();
        self.words.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn run_files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.scratch.path("run")).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        // Daemons outlive their manager: each is ended by name.
        if let Ok(Answer::Daemons(daemons)) = ask(&self.socket(), &Request::List) {
            for daemon in daemons {
                let _ = ask(&self.socket(), &Request::Stop { name: daemon.name });
            }
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn write_policy(scratch: &Scratch, access: &str) {
    let root = scratch.name("disks");
    let text = format!(
        "version = 1\n[[rule]]\nname = 'disks'\nroot = '{root}'\naccess = '{access}'\nformats = ['raw', 'qcow2']\n\
         [[client]]\nuser = '*'\nrules = ['disks']\nlimits.requests-per-minute = 1000000\n"
    );
    fs::write(scratch.path("policy"), text).unwrap();
}

fn attach(name: &str, disk: &str, image: &Path) -> Request {
    let (name, disk, image, format) = (name.into(), disk.into(), image.to_owned(), Some("raw".into()));
    Request::Attach { name, disk, image, format, backing_format: None, read_only: false }
}

fn start(name: &str) -> Request {
    Request::Start { name: name.into() }
}

#[test]
fn daemons_and_disks_come_and_go_over_the_command_line() {
    if !judges("daemons_and_disks_come_and_go_over_the_command_line", &["nbdinfo", "qemu-img"]) {
        return;
    }
    let manager = Manager::start();
    let socket = manager.scratch.name("run/manager.sock");
    let verb = |arguments: &[&str]| {
        let (status, said, errors) = doorless(&[arguments, &["--manager", &socket]].concat());
        assert!(status.success(), "{arguments:?}: {errors}");
        said.trim_end().to_owned()
    };
    verb(&["start", "vm"]);
    let (a, b) = (manager.scratch.name("disks/a"), manager.scratch.name("disks/b"));
    let uri = verb(&["attach", "vm", "one", &a, "--format", "raw"]);
    verb(&["attach", "vm", "two", &b, "--format", "raw", "--read-only"]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, &a]);
    verb(&["resize", "vm", "one", "2097152"]);
    assert_eq!(run("nbdinfo", &["--size", &uri]).trim(), "2097152");
    let table = verb(&["ps"]);
    assert!(table.lines().count() == 3 && table.contains("read-only"), "{table}");
    verb(&["detach", "vm", "one"]);
    let listed: Value = serde_json::from_str(&verb(&["ps", "--json"])).unwrap();
    assert_eq!(listed[0]["disks"].as_array().unwrap().len(), 1);
    verb(&["stop", "vm"]);
    assert_eq!(manager.list(), []);
    assert_eq!(manager.run_files(), ["manager.sock"]);
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let manager = Manager::start();
    assert!(manager.refused(&start("../x")).contains("is no name"));
    manager.ask(&start("vm"));
    assert!(manager.refused(&start("vm")).contains("is there already"));
    assert!(manager.refused(&Request::Stop { name: "other".into() }).contains("there is no daemon 'other'"));
    let image = manager.scratch.path("disks/a");
    manager.ask(&attach("vm", "one", &image));
    assert!(manager.refused(&attach("vm", "one", &image)).contains("has a disk 'one' already"));
    assert!(manager.refused(&attach("vm", "two", Path::new("/etc/passwd"))).contains("(policy: root)"));
    let detach = Request::Detach { name: "vm".into(), disk: "two".into() };
    assert!(manager.refused(&detach).contains("has no disk 'two'"));
    let shrunk = Request::Resize { name: "vm".into(), disk: "one".into(), size: u64::MAX };
    assert!(!manager.refused(&shrunk).is_empty());
    for line in ["", "{}", "[]", "{\"do\":\"start\"}", "\u{0}"] {
        let mut stream = UnixStream::connect(manager.socket()).unwrap();
        stream.write_all(format!("{line}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("{\"error\":\"that is no request"), "{line}: {answer}");
    }
    // Clients that say nothing hold up nobody, beyond their own share.
    let _silent: Vec<_> = (0..8).map(|_| UnixStream::connect(manager.socket()).unwrap()).collect();
    let mut over = UnixStream::connect(manager.socket()).unwrap();
    assert_eq!(over.read(&mut [0; 1]).unwrap_or(0), 0, "the ninth of a user is hung up on");
    drop(_silent);
    while ask(&manager.socket(), &Request::List).is_err() {}
    assert_eq!(manager.list()[0].disks.len(), 1);
}

#[test]
fn users_have_their_own_daemons_and_files_alone() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: users_have_their_own_daemons_and_files_alone: needs root, to be several users");
        return;
    }
    if !judges("users_have_their_own_daemons_and_files_alone", &["setpriv"]) {
        return;
    }
    let manager = Manager::start();
    let program = manager.scratch.name("doorless");
    fs::copy(DOORLESS, &program).unwrap();
    let socket = manager.scratch.name("run/manager.sock");
    let verb = |user: &str, arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args([&format!("--reuid={user}"), &format!("--regid={user}"), "--clear-groups", &program]);
        let output = command.args(arguments).args(["--manager", &socket]).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.success(), text(&output.stdout), text(&output.stderr))
    };
    let (a, b) = (manager.scratch.name("disks/a"), manager.scratch.name("disks/b"));
    chown(&a, Some(61_001), None).unwrap();
    chown(&b, Some(61_002), None).unwrap();
    assert!(verb("61001", &["start", "one"]).0 && verb("61002", &["start", "two"]).0);
    assert!(verb("61001", &["attach", "one", "disk", &a, "--format", "raw"]).0);
    let (done, _, why) = verb("61001", &["attach", "one", "more", &b, "--format", "raw"]);
    assert!(!done && why.contains("(policy: owner)"), "{why}");
    for arguments in [&["stop", "one"][..], &["detach", "one", "disk"], &["attach", "one", "x", &b, "--format", "raw"]]
    {
        let (done, _, why) = verb("61002", arguments);
        assert!(!done && why.contains("there is no daemon 'one'"), "{arguments:?}: {why}");
    }
    assert!(verb("61002", &["reload"]).2.contains("only root"));
    let (_, seen, _) = verb("61002", &["ps"]);
    assert!(seen.contains("two") && !seen.contains("one"), "{seen}");
    // The socket of one is closed to the other.
    let metadata = fs::metadata(manager.scratch.path("run/one.sock")).unwrap();
    let owner = std::os::unix::fs::MetadataExt::uid(&metadata);
    assert_eq!((owner, metadata.permissions().mode() & 0o777), (61_001, 0o600));
}

/// Whether descriptors can be got back from daemons.
fn may_trace(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: {test}: needs root, to get descriptors back from confined daemons");
    }
    root
}

#[test]
fn daemons_serve_on_without_a_manager_and_the_next_one_keeps_them() {
    if !may_trace("daemons_serve_on_without_a_manager_and_the_next_one_keeps_them") {
        return;
    }
    let mut manager = Manager::start();
    let blocks = 64;
    let image = manager.scratch.path("disks/c");
    fs::write(&image, vec![0; blocks * reconnecting::BLOCK]).unwrap();
    manager.ask(&start("vm"));
    manager.attach("vm", "disk", "disks/c");
    let mut client = Client::new(&manager.scratch.path("run/vm.sock"), "disk", blocks, 7);
    (0..50).for_each(|_| client.work());
    let mut had = None;
    for (round, signal) in [Signal::KILL, Signal::TERM, Signal::KILL].into_iter().enumerate() {
        let before = manager.list();
        kill_process(Pid::from_child(&manager.process), signal).unwrap();
        manager.process.wait().unwrap();
        (0..50).for_each(|_| client.work());
        assert_eq!(client.pauses.len(), round, "the manager's end is no pause");
        (manager.process, manager.words) = Manager::spawn(&manager.scratch, &[]);
        assert_eq!(manager.word(), "doorless manager: adopted the daemon 'vm'");
        let after = manager.list();
        assert_eq!((before[0].pid, &before[0].disks), (after[0].pid, &after[0].disks));
        // What it adopted it keeps: one more daemon dies.
        let pid = i32::try_from(after[0].pid.unwrap()).unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
        assert!(manager.word().contains("the daemon, process "));
        assert!(manager.word().contains("serves in its place"));
        (0..50).for_each(|_| client.work());
        assert_eq!(client.pauses.len(), round + 1);
        // And it can be upgraded, whoever started it.
        let Answer::Upgraded { pause } = manager.ask(&Request::Upgrade { name: "vm".into() }) else { panic!() };
        assert!(pause > 0.0);
        (0..50).for_each(|_| client.work());
        assert_eq!(client.pauses.len(), round + 1, "an upgrade is no pause");
        let has = || open_fds(manager.process.id()).len();
        let had = *had.get_or_insert_with(|| {
            std::thread::sleep(Duration::from_millis(200));
            has()
        });
        // It waits again when it has let go of what the last request took.
        while has() != had {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    client.check_all(&fs::read(&image).unwrap());
    // The books hold what was there before.
    manager.ask(&Request::Detach { name: "vm".into(), disk: "disk".into() });
    manager.ask(&Request::Stop { name: "vm".into() });
    assert_eq!(manager.run_files(), ["manager.sock"]);
}

#[test]
fn a_daemon_that_died_without_a_manager_is_forgotten_with_its_files() {
    let mut manager = Manager::start();
    manager.ask(&start("vm"));
    let pid = i32::try_from(manager.list()[0].pid.unwrap()).unwrap();
    kill_process(Pid::from_child(&manager.process), Signal::KILL).unwrap();
    manager.process.wait().unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    while fs::metadata(format!("/proc/{pid}/fd/0")).is_ok() {
        std::thread::yield_now();
    }
    (manager.process, manager.words) = Manager::spawn(&manager.scratch, &[]);
    assert!(manager.word().contains("could not adopt a daemon"));
    assert_eq!(manager.list(), []);
    assert_eq!(manager.run_files(), ["manager.sock"]);
    manager.ask(&start("vm"));
}

#[test]
fn a_new_policy_withdraws_disks_and_leaves_the_others_alone() {
    let mut manager = Manager::start();
    manager.ask(&start("vm"));
    manager.attach("vm", "one", "disks/a");
    let read = |disk: &str, image: &str| match attach("vm", disk, &manager.scratch.path(image)) {
        Request::Attach { name, disk, image, format, backing_format, .. } => {
            Request::Attach { name, disk, image, format, backing_format, read_only: true }
        }
        other => other,
    };
    manager.ask(&read("two", "disks/b"));
    let pid = manager.list()[0].pid;
    manager.policy("read-only");
    assert_eq!(manager.ask(&Request::Reload), Answer::Reloaded { withdrawn: vec!["vm/one".into()] });
    let left = manager.list();
    assert_eq!((left[0].pid, left[0].disks.len(), left[0].disks[0].name.as_str()), (pid, 1, "two"));
    // A policy that is wrong changes nothing; by signal as by request.
    fs::write(manager.scratch.path("policy"), "version = 2").unwrap();
    assert!(manager.refused(&Request::Reload).contains("version 2 is not known"));
    kill_process(Pid::from_child(&manager.process), Signal::HUP).unwrap();
    assert!(manager.word().contains("the old policy holds: "));
    assert_eq!(manager.list()[0].disks.len(), 1);
    let log = fs::read_to_string(manager.scratch.path("audit")).unwrap();
    let events: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for event in ["start", "reload", "withdrawn"] {
        assert!(events.iter().any(|line| line["event"] == event), "{event}");
    }
}

#[test]
fn a_service_manager_is_told_and_given_the_sockets() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("disks")).unwrap();
    let notify = UnixDatagram::bind(scratch.path("notify")).unwrap();
    let (process, words) = Manager::spawn(&scratch, &[("NOTIFY_SOCKET", &scratch.name("notify"))]);
    let manager = Manager { scratch, process, words };
    let heard = || {
        let mut room = [0; 256];
        let count = notify.recv(&mut room).unwrap();
        String::from_utf8(room[..count].to_vec()).unwrap()
    };
    assert_eq!(heard(), "READY=1\n");
    manager.ask(&start("vm"));
    assert_eq!([heard(), heard()], ["FDSTORE=1\nFDNAME=vm.monitor\n", "FDSTORE=1\nFDNAME=vm.nbd\n"]);
    manager.ask(&Request::Stop { name: "vm".into() });
    assert_eq!([heard(), heard()], ["FDSTOREREMOVE=1\nFDNAME=vm.monitor\n", "FDSTOREREMOVE=1\nFDNAME=vm.nbd\n"]);
}

/// A descriptor that came with a notification, and its name.
fn stored(notify: &UnixDatagram) -> (String, OwnedFd) {
    let (mut text, mut space) = ([0; 256], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(notify, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let text = str::from_utf8(&text[..got.bytes]).unwrap();
    let name = text.strip_prefix("FDSTORE=1\nFDNAME=").unwrap().trim_end().to_owned();
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    (name, fds.flatten().next().unwrap())
}

#[test]
fn the_service_manager_s_sockets_bring_a_daemon_back_that_cannot_be_traced() {
    let test = "the_service_manager_s_sockets_bring_a_daemon_back_that_cannot_be_traced";
    if !may_trace(test) || !judges(test, &["setpriv", "bash"]) {
        return;
    }
    let blind = ["setpriv", "--bounding-set=-sys_ptrace"];
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("disks")).unwrap();
    let image = scratch.path("disks/c");
    fs::write(&image, vec![0; 64 * reconnecting::BLOCK]).unwrap();
    let notify = UnixDatagram::bind(scratch.path("notify")).unwrap();
    let told = scratch.name("notify");
    let environment = [("NOTIFY_SOCKET", told.as_str())];
    let (process, words) = Manager::spawn_by(&blind, &scratch, &environment);
    let mut manager = Manager { scratch, process, words };
    notify.recv(&mut [0; 256]).unwrap();
    manager.ask(&start("vm"));
    let kept = [stored(&notify), stored(&notify)];
    manager.attach("vm", "disk", "disks/c");
    let mut client = Client::new(&manager.scratch.path("run/vm.sock"), "disk", 64, 7);
    client.work();
    let before = manager.list();
    let mut ended = |manager: &mut Manager| {
        manager.process.kill().unwrap();
        manager.process.wait().unwrap();
        client.work();
        assert_eq!(client.pauses, [], "the daemon serves on");
    };
    ended(&mut manager);
    // Without its sockets nobody can keep it.
    (manager.process, manager.words) = Manager::spawn_by(&blind, &manager.scratch, &environment);
    let word = manager.word();
    assert!(word.contains("cannot be asked for its monitor's socket: that takes the right to trace it"), "{word}");
    ended(&mut manager);
    for (_, fd) in &kept {
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).unwrap();
    }
    let [(first, one), (second, two)] = &kept;
    let passing = format!(
        "exec 3<&{} 4<&{}; export LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES={first}:{second}; exec \"$@\"",
        one.as_raw_fd(),
        two.as_raw_fd()
    );
    let starter = [&["bash", "-c", &passing, "bash"], &blind[..]].concat();
    (manager.process, manager.words) = Manager::spawn_by(&starter, &manager.scratch, &environment);
    assert_eq!(manager.word(), "doorless manager: adopted the daemon 'vm'");
    assert_eq!(before[0].pid, manager.list()[0].pid);
    // And what it adopted it keeps.
    kill_process(Pid::from_raw(before[0].pid.unwrap().cast_signed()).unwrap(), Signal::KILL).unwrap();
    assert!(manager.word().contains("the daemon, process "));
    assert!(manager.word().contains("serves in its place"));
    client.work();
    assert_eq!(client.pauses.len(), 1);
    client.check_all(&fs::read(&image).unwrap());
}

#[test]
fn the_books_are_the_same_after_every_round() {
    let rounds = std::env::var("DOORLESS_ROUNDS").ok().map_or(40, |rounds| rounds.parse().unwrap());
    let manager = Manager::start();
    let round = || {
        manager.ask(&start("vm"));
        manager.attach("vm", "one", "disks/a");
        manager.attach("vm", "two", "disks/b");
        manager.ask(&Request::Detach { name: "vm".into(), disk: "one".into() });
        manager.ask(&Request::Stop { name: "vm".into() });
    };
    round();
    let pid = manager.process.id();
    let memory = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap().trim().to_owned();
        line.strip_suffix(" kB").unwrap().parse::<u64>().unwrap()
    };
    let children = || fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    // When it waits for requests again it has let go of what the last one took.
    let idle = || loop {
        let fds = open_fds(pid);
        if !fds.iter().any(|fd| fd.ends_with("[pidfd]")) {
            return fds;
        }
    };
    let (had, resident) = (idle(), memory());
    for _ in 0..rounds {
        round();
    }
    assert_eq!(idle().len(), had.len(), "{had:?}\n{:?}", idle());
    assert_eq!(children(), "");
    assert_eq!(manager.run_files(), ["manager.sock"]);
    let grown = memory().saturating_sub(resident);
    eprintln!("{rounds} rounds: {} descriptors, {resident} KiB and {grown} KiB more", had.len());
    assert!(grown < 4096, "{grown} KiB more");
}
