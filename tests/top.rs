// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `doorless top` on real daemons: as JSON for scripts, and on a terminal that is not there.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use harness::{DOORLESS, Scratch, Serve, doorless, judges, run};
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use serde_json::Value;

struct Watched {
    scratch: Scratch,
    serve: Serve,
}

impl Watched {
    fn new() -> Watched {
        let scratch = Scratch::new();
        fs::write(scratch.path("image"), vec![0; 1 << 20]).unwrap();
        let options = ["--socket", &scratch.name("nbd"), "--monitor", &scratch.name("monitor")];
        let serve = Serve::start(&[&["--format", "raw", &scratch.name("image")], &options[..]].concat());
        Watched { scratch, serve }
    }

    /// Reads and writes until it is killed.
    fn load(&self) -> Load {
        let script = "while true; do echo 'read 0 64k'; echo 'write 0 4k'; echo 'read 1000000 4k'; done | qemu-io -f raw $0 >/dev/null";
        let mut bash = Command::new("bash");
        // A group of its own: the shell, its loop, and the program behind the pipe.
        bash.args(["-c", script, &self.serve.uri]).stderr(Stdio::null()).process_group(0);
        Load(bash.spawn().unwrap())
    }
}

struct Load(Child);

impl Drop for Load {
    fn drop(&mut self) {
        kill_process_group(Pid::from_child(&self.0), Signal::KILL).unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn scripts_get_an_object_an_interval_for_every_daemon() {
    let test = "scripts_get_an_object_an_interval_for_every_daemon";
    if !judges(test, &["qemu-io"]) {
        return;
    }
    let watched = Watched::new();
    let _load = watched.load();
    let missing = watched.scratch.name("missing");
    let monitor = watched.scratch.name("monitor");
    let out = run(DOORLESS, &["top", "--json", "--count", "3", "--interval", "0.2", &monitor, &missing]);
    let objects: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(objects.len(), 3);
    for object in &objects {
        assert_eq!(
            (&object["daemons"][0]["monitor"], &object["daemons"][1]["monitor"]),
            (&monitor.clone().into(), &missing.clone().into())
        );
        assert!(object["daemons"][1]["error"].as_str().unwrap().contains("No such file"), "{object}");
        assert_eq!(object["daemons"][0]["pid"], watched.serve.daemon_pid());
        assert_eq!(object["daemons"][0]["fdsets"][0]["descriptors"], 1);
    }
    let export = &objects[2]["daemons"][0]["exports"][0];
    assert_eq!((&export["type"], &export["node-name"]), (&"nbd".into(), &"disk".into()));
    for shown in [export, &export["clients"][0], &objects[2]["daemons"][0]["nodes"][0]] {
        // The load stops for no time at all, but who looks may be held up: something came in one interval of three.
        let some = |name: &str| shown[name].as_f64().is_some();
        assert!(some("reads") && some("writes") && some("read-bytes"), "{shown}");
    }
    let busiest = objects.iter().map(|object| &object["daemons"][0]["exports"][0]);
    let busiest = busiest.max_by(|a, b| a["reads"].as_f64().unwrap().total_cmp(&b["reads"].as_f64().unwrap())).unwrap();
    assert!(busiest["reads"].as_f64().unwrap() > 0.0 && busiest["read-bytes"].as_f64().unwrap() > 0.0, "{busiest}");
    let latency = |name: &str| busiest["latency-ns"][name].as_u64().unwrap();
    assert!(latency("p50") > 0 && latency("p50") <= latency("p99") && latency("p99") <= latency("p99.9"));
}

#[test]
fn wrong_uses_get_a_sentence() {
    let error = |arguments: &[&str]| {
        let (status, _, err) = doorless(&[&["top"], arguments].concat());
        assert!(!status.success());
        err
    };
    assert_eq!(error(&["/nowhere"]), "doorless: standard output is no terminal: use --json\n");
    assert_eq!(error(&["--json", "--interval", "0", "/nowhere"]), "doorless: 0 seconds are no interval\n");
    assert_eq!(error(&["--json", "--interval=-1", "/nowhere"]), "doorless: -1 seconds are no interval\n");
    assert!(error(&[]).contains("<SOCKET>..."));
}

#[test]
fn who_is_no_daemon_is_named_and_does_not_hold_up_the_rest() {
    let scratch = Scratch::new();
    // One that never says a word, and one that says nonsense.
    let _silent = UnixListener::bind(scratch.path("silent")).unwrap();
    let odd = UnixListener::bind(scratch.path("odd")).unwrap();
    let speaker = std::thread::spawn(move || {
        let (mut socket, _): (UnixStream, _) = odd.accept().unwrap();
        let _ = socket.write_all(b"220 mail ready\r\n");
    });
    let sockets = [scratch.name("silent"), scratch.name("odd")];
    let out = run(DOORLESS, &["top", "--json", "--count", "1", "--interval", "0.3", &sockets[0], &sockets[1]]);
    let object: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(object["daemons"][0]["error"], "waiting for its monitor");
    assert!(object["daemons"][1]["error"].is_string(), "{object}");
    speaker.join().unwrap();
}

#[test]
fn a_terminal_shows_the_daemon_until_q_is_pressed_and_is_as_before() {
    let watched = Watched::new();
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    tcsetwinsize(&terminal, Winsize { ws_row: 30, ws_col: 140, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let other = || File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
    let before = rustix::termios::tcgetattr(&terminal).unwrap().local_modes;
    let mut command = Command::new(DOORLESS);
    command.args(["top", "--interval", "0.1", &watched.scratch.name("monitor")]);
    let mut top = command.stdin(other()).stdout(other()).stderr(other()).env("TERM", "xterm").spawn().unwrap();
    drop(command);
    let mut terminal = File::from(terminal);
    let mut screen = String::new();
    // Words, because blanks are not drawn: the cursor jumps over them.
    let pid = watched.serve.daemon_pid().to_string();
    let wanted = ["doorless", "nbd", "disk", &pid, "read/s", "#block000"];
    let mut piece = [0; 4096];
    while !wanted.iter().all(|text| screen.contains(text)) {
        let len = terminal.read(&mut piece).unwrap_or_else(|e| panic!("{e}: {screen}"));
        screen.push_str(&String::from_utf8_lossy(&piece[..len]));
    }
    terminal.write_all(b"q").unwrap();
    // What it still says must be read, or it waits.
    let reader = std::thread::spawn({
        let mut terminal = terminal.try_clone().unwrap();
        move || {
            let mut rest = String::new();
            while let Ok(len) = terminal.read(&mut piece) {
                rest.push_str(&String::from_utf8_lossy(&piece[..len]));
                if rest.contains("\x1b[?1049l") {
                    return rest;
                }
            }
            rest
        }
    });
    assert!(top.wait().unwrap().success());
    assert!(reader.join().unwrap().contains("\x1b[?1049l"), "the other screen is left");
    assert_eq!(rustix::termios::tcgetattr(&terminal).unwrap().local_modes, before);
}
