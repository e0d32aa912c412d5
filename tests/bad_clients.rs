// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Monitors' clients that come in numbers, read nothing, or are somebody else; and what a monitor costs when nobody asks.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};

use harness::{DOORLESS, Scratch, open_fds};
use qmp::Client;
use serde_json::{Map, Value, json};

/// `doorless daemon` with monitors `a` and `b`, and what it says on standard error.
struct Daemon {
    child: Child,
    scratch: Scratch,
    errors: BufReader<ChildStderr>,
}

impl Daemon {
    /// `options` are appended to both monitors'.
    fn start(options: &str) -> Daemon {
        let scratch = Scratch::new();
        let mut command = Command::new(DOORLESS);
        command.arg("daemon");
        for monitor in ["a", "b"] {
            let socket = format!("socket,id={monitor},path={},server=on,wait=off", scratch.name(monitor));
            command.args(["--chardev", &socket, "--monitor", &format!("{monitor}{options}")]);
        }
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let errors = BufReader::new(child.stderr.take().unwrap());
        Daemon { child, scratch, errors }
    }

    /// A client that has said nothing yet.
    fn connect(&self, monitor: &str) -> UnixStream {
        loop {
            // The socket is there as soon as the daemon has read its options.
            if let Ok(socket) = UnixStream::connect(self.scratch.path(monitor)) {
                return socket;
            }
            std::thread::yield_now();
        }
    }

    fn client(&self, monitor: &str) -> Client {
        Client::new(self.connect(monitor)).unwrap()
    }

    /// Waits until standard error says `text`.
    fn says(&mut self, text: &str) {
        let mut line = String::new();
        while !line.contains(text) {
            line.clear();
            assert!(self.errors.read_line(&mut line).unwrap() > 0, "the daemon never said '{text}'");
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ok(client: &mut Client, command: &str, arguments: Value) -> Value {
    let Value::Object(arguments) = arguments else { unreachable!() };
    client.execute(command, arguments, &[]).unwrap()
}

#[test]
fn case_42_a_client_of_another_user_is_turned_away_before_the_greeting() {
    let own = rustix::process::geteuid().as_raw();
    let daemon = Daemon::start(&format!(",peer-uid={own}"));
    ok(&mut daemon.client("a"), "query-version", json!({}));

    // The number that the kernel shows for everybody who is not in a namespace names nobody.
    let arguments = ["daemon", "--chardev", "socket,id=m,fd=0", "--monitor", "m,peer-uid=65534"];
    assert!(harness::doorless(&arguments).2.contains("may be any user"));

    let mut daemon = Daemon::start(&format!(",peer-uid={}", own + 1));
    for _ in 0..3 {
        let mut said = Vec::new();
        daemon.connect("a").read_to_end(&mut said).unwrap();
        assert_eq!(said, b"", "nothing is said before the door is shut");
        daemon.says("was turned away");
    }
    // The one whom it is for is served by the same monitor.
    if rustix::process::geteuid().is_root() {
        let socket = daemon.scratch.path("a");
        std::fs::set_permissions(&socket, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        std::fs::set_permissions(daemon.scratch.path("."), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .unwrap();
        let speak = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(9))";
        let mut command = Command::new("python3");
        command.args(["-c", speak, socket.to_str().unwrap()]);
        std::os::unix::process::CommandExt::uid(&mut command, own + 1);
        if let Ok(output) = command.output() {
            assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "b'{\"QMP\": {'", "{output:?}");
        }
    }
}

#[test]
fn case_43_clients_that_never_negotiate_take_one_place_and_hold_up_no_other_monitor() {
    let daemon = Daemon::start("");
    let mut b = daemon.client("b");
    ok(&mut b, "query-version", json!({}));
    let before = open_fds(daemon.child.id()).len();
    let mut waiting: Vec<UnixStream> = (0..100).map(|_| daemon.connect("a")).collect();
    let greeted = |client: &mut UnixStream| client.read_exact(&mut [0; 8]).unwrap();
    greeted(&mut waiting[0]);
    ok(&mut b, "query-version", json!({}));
    assert_eq!(open_fds(daemon.child.id()).len(), before + 1, "the others wait in the listener's queue");
    waiting[1].set_nonblocking(true).unwrap();
    assert_eq!(waiting[1].read(&mut [0; 8]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    waiting[1].set_nonblocking(false).unwrap();
    // They leave one by one, and each makes room for the next.
    for mut client in waiting {
        greeted(&mut client);
    }
    ok(&mut daemon.client("a"), "query-version", json!({}));
}

#[test]
fn case_43_events_for_a_client_that_does_not_read_are_bounded_and_counted() {
    let mut daemon = Daemon::start("");
    let mut slow = daemon.client("a");
    let quick = daemon.connect("b");
    let mut lines = BufReader::new(&quick);
    let mut run = |command: &str, until: &str| {
        (&quick).write_all(command.as_bytes()).unwrap();
        let mut line = String::new();
        while !line.contains(until) {
            line.clear();
            lines.read_line(&mut line).unwrap();
        }
    };
    run(r#"{"execute":"qmp_capabilities"}"#, "return");
    let before = resident(daemon.child.id());
    // A name that comes back in six events: some 12 MB in all.
    let id = "j".repeat(100_000);
    for _ in 0..20 {
        let create = json!({ "job-id": id, "options": { "driver": "file", "filename": "/dev/fdset/1", "size": 0 } });
        run(&json!({ "execute": "blockdev-create", "arguments": create }).to_string(), "concluded");
        run(&json!({ "execute": "job-dismiss", "arguments": { "id": id } }).to_string(), "return");
    }
    let grown = resident(daemon.child.id()).saturating_sub(before);
    assert!(grown < 6 << 10, "{grown} KiB: what nobody reads is not kept");
    // It is answered all the same, and what it gets is whole.
    ok(&mut slow, "query-version", json!({}));
    let events = slow.take_events();
    assert!(!events.is_empty() && events.len() < 40, "{}", events.len());
    drop(slow);
    daemon.says("a client that did not read was not told");
}

/// KiB of a process's memory.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let resident = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    resident.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Switches to another thread of every thread of a process, and the processor time that it has had.
fn activity(pid: u32) -> (Vec<String>, Vec<String>) {
    let task = |task: &Path| {
        let status = std::fs::read_to_string(task.join("status")).unwrap();
        let switches = status.lines().filter(|line| line.contains("ctxt_switches")).collect::<String>();
        let stat = std::fs::read_to_string(task.join("stat")).unwrap();
        // proc_pid_stat(5): after the name in brackets, utime and stime are the 12th and 13th.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        (switches, fields[11..13].join(" "))
    };
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.map(|entry| task(&entry.unwrap().path())).unzip()
}

#[test]
fn a_daemon_that_was_asked_in_haste_sleeps_once_nobody_asks() {
    let daemon = Daemon::start("");
    let mut a = daemon.client("a");
    let _b = daemon.client("b");
    for _ in 0..2000 {
        ok(&mut a, "query-version", json!({}));
    }
    // It may look out a moment longer before it sleeps; from then on nothing happens at all.
    let mut before = activity(daemon.child.id());
    for round in 0.. {
        std::thread::sleep(std::time::Duration::from_millis(100));
        let now = activity(daemon.child.id());
        if now == before {
            break;
        }
        assert!(round < 20, "{before:?}, then {now:?}");
        before = now;
    }
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert_eq!(activity(daemon.child.id()), before, "not one wake-up in half a second");
    a.execute("query-version", Map::new(), &[]).unwrap();
}

#[test]
fn a_quick_client_holds_up_neither_another_monitor_nor_a_signal() {
    let mut daemon = Daemon::start("");
    let (mut a, mut b) = (daemon.client("a"), daemon.client("b"));
    let quick = std::thread::spawn(move || {
        let mut answered = 0u64;
        while a.execute("query-version", Map::new(), &[]).is_ok() {
            answered += 1;
        }
        answered
    });
    for _ in 0..200 {
        ok(&mut b, "query-version", json!({}));
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&daemon.child), rustix::process::Signal::TERM)
        .unwrap();
    assert!(daemon.child.wait().unwrap().success());
    assert!(quick.join().unwrap() > 0);
}
