// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is ours beyond QEMU's monitor: life times, events, provenance, quotas, books; and the rest of the command line.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::thread;

use harness::{DOORLESS, Scratch, open_fds, run};
use manager::monitor::Monitor;
use qmp::{Client, ClientError, ReceivedEvent};
use serde_json::{Map, Value, json};

/// `doorless daemon` with monitors `a` and `b` on sockets of their own.
struct Started {
    child: Child,
    scratch: Scratch,
}

impl Started {
    fn with(options: &[&str]) -> Started {
        Started::by(Command::new(DOORLESS).arg("daemon"), "", options)
    }

    /// `lifetime` is appended to monitor `a`'s options.
    fn by(command: &mut Command, lifetime: &str, options: &[&str]) -> Started {
        let scratch = Scratch::new();
        for monitor in ["a", "b"] {
            let socket = format!("socket,id={monitor},path={},server=on,wait=off", scratch.name(monitor));
            let extra = if monitor == "a" { lifetime } else { "" };
            command.args(["--chardev", &socket, "--monitor", &format!("{monitor}{extra}")]);
        }
        let child = command.args(options).stdin(Stdio::null()).spawn().unwrap();
        Started { child, scratch }
    }

    fn client(&self, monitor: &str) -> Qmp {
        let path = self.scratch.path(monitor);
        loop {
            // The socket is there as soon as the daemon has read its options.
            if let Ok(socket) = UnixStream::connect(&path) {
                return Qmp(Client::new(socket).unwrap());
            }
            thread::yield_now();
        }
    }

    fn disk(&self) -> File {
        let path = self.scratch.path("disk.raw");
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        File::options().read(true).write(true).open(path).unwrap()
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Qmp(Client);

impl Qmp {
    fn execute(&mut self, command: &str, arguments: Value, fds: &[BorrowedFd<'_>]) -> Result<Value, String> {
        let arguments: Map<String, Value> = serde_json::from_value(arguments).unwrap();
        self.0.execute(command, arguments, fds).map_err(|e| match e {
            ClientError::Qmp { desc, .. } => desc,
            other => panic!("{command}: {other}"),
        })
    }

    fn ok(&mut self, command: &str, arguments: Value) -> Value {
        self.execute(command, arguments, &[]).unwrap()
    }

    fn error(&mut self, command: &str, arguments: Value) -> String {
        self.execute(command, arguments, &[]).unwrap_err()
    }

    fn add_fd(&mut self, set: i64, file: impl AsFd) -> Result<Value, String> {
        self.execute("add-fd", json!({ "fdset-id": set, "opaque": "disk" }), &[file.as_fd()])
    }

    /// Set ids, the highest first.
    fn sets(&mut self) -> Vec<i64> {
        let sets = self.ok("query-fdsets", json!({}));
        sets.as_array().unwrap().iter().map(|set| set["fdset-id"].as_i64().unwrap()).collect()
    }

    fn event(&mut self, name: &str) -> Value {
        loop {
            let ReceivedEvent { name: came, data, .. } = self.0.wait_event().unwrap();
            if came == name {
                return data;
            }
        }
    }
}

fn node(name: &str, set: i64, read_only: bool) -> Value {
    json!({ "driver": "file", "node-name": name, "filename": format!("/dev/fdset/{set}"), "read-only": read_only })
}

#[test]
fn explicit_sets_outlive_every_client() {
    let daemon = Started::with(&[]);
    let mut a = daemon.client("a");
    a.add_fd(3, daemon.disk()).unwrap();
    drop(a);
    assert_eq!(daemon.client("a").sets(), [3]);
}

#[test]
fn with_life_time_monitor_sets_go_with_the_last_client_and_those_in_use_later() {
    let daemon = Started::with(&["--fdset-lifetime", "monitor"]);
    let (mut a, mut b) = (daemon.client("a"), daemon.client("b"));
    a.add_fd(1, daemon.disk()).unwrap();
    a.add_fd(2, daemon.disk()).unwrap();
    a.ok("blockdev-add", node("n", 2, false));
    drop(a);
    assert_eq!(b.sets(), [2, 1], "a client is left");
    drop(b);
    let mut b = daemon.client("b");
    assert_eq!(b.sets(), [2], "what a node uses stays whole");
    b.ok("blockdev-reopen", json!({ "options": [node("n", 2, false)] }));
    b.ok("blockdev-del", json!({ "node-name": "n" }));
    drop(b);
    assert_eq!(daemon.client("b").sets(), [] as [i64; 0]);
}

#[test]
fn a_lease_ends_only_when_nobody_comes_back_and_says_so() {
    let daemon = Started::by(Command::new(DOORLESS).arg("daemon"), ",fdset-lifetime=lease:1", &[]);
    let mut b = daemon.client("b");
    let mut a = daemon.client("a");
    a.add_fd(1, daemon.disk()).unwrap();
    b.add_fd(2, daemon.disk()).unwrap();
    drop(a);
    while b.event("FDSET_CHANGED") != json!({ "fdset-id": 1, "change": "expired" }) {}
    assert_eq!(b.sets(), [2], "the other monitor's sets are its own");

    let patient = Started::with(&["--fdset-lifetime=lease:4294967295"]);
    let mut a = patient.client("a");
    a.add_fd(7, patient.disk()).unwrap();
    drop(a);
    assert_eq!(patient.client("a").sets(), [7]);
}

#[test]
fn descriptors_of_the_command_line_belong_to_no_client() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("disk"), [0; 512]).unwrap();
    let blockdev = format!("file,node-name=disk,filename={}", scratch.name("disk"));
    let daemon = Started::with(&["--fdset-lifetime", "monitor", "--blockdev", &blockdev]);
    drop(daemon.client("a"));
    assert_eq!(daemon.client("b").sets().len(), 1);
}

#[test]
fn a_wrong_life_time_is_refused() {
    for wrong in ["never", "lease", "lease:", "lease:0", "lease:-1", "lease:x"] {
        let (status, _, errors) = harness::doorless(&["daemon", "--fdset-lifetime", wrong]);
        assert!(!status.success() && errors.contains("a life time is"), "{wrong}: {errors}");
    }
}

#[test]
fn sets_that_change_and_descriptors_that_stray_are_told_and_can_be_silenced() {
    let daemon = Started::with(&[]);
    let (mut a, mut b) = (daemon.client("a"), daemon.client("b"));
    a.add_fd(4, daemon.disk()).unwrap();
    assert_eq!(b.event("FDSET_CHANGED"), json!({ "fdset-id": 4, "change": "added" }));
    a.ok("remove-fd", json!({ "fdset-id": 4 }));
    assert_eq!(b.event("FDSET_CHANGED"), json!({ "fdset-id": 4, "change": "removed" }));
    // One descriptor is replaced by the next, three ride on one command, one is left when the client goes.
    let disk = daemon.disk();
    a.execute("query-version", json!({}), &[disk.as_fd()]).unwrap();
    a.execute("query-version", json!({}), &[disk.as_fd()]).unwrap();
    assert_eq!(b.event("FDSET_STRAY_FD"), json!({ "monitor": 0, "count": 1 }));
    a.execute("add-fd", json!({}), &[disk.as_fd(), disk.as_fd(), disk.as_fd()]).unwrap();
    assert_eq!(b.event("FDSET_STRAY_FD"), json!({ "monitor": 0, "count": 3 }), "the one that waited, and two of three");
    a.execute("query-version", json!({}), &[disk.as_fd()]).unwrap();
    drop(a);
    assert_eq!(b.event("FDSET_STRAY_FD"), json!({ "monitor": 0, "count": 1 }));

    let silent = Started::with(&["--fdset-events", "changed=off,stray=off"]);
    let mut a = silent.client("a");
    a.execute("add-fd", json!({}), &[disk.as_fd(), disk.as_fd()]).unwrap();
    assert_eq!(a.0.take_events().len(), 0);
}

#[test]
fn a_monitor_that_has_not_negotiated_hears_of_no_event_not_even_later() {
    let daemon = Started::with(&[]);
    let mut a = daemon.client("a");
    let b = UnixStream::connect(daemon.scratch.path("b")).unwrap();
    let mut lines = BufReader::new(b.try_clone().unwrap());
    let mut next = || {
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        line
    };
    assert!(next().contains("QMP"));
    a.add_fd(4, daemon.disk()).unwrap();
    assert_eq!(a.event("FDSET_CHANGED"), json!({ "fdset-id": 4, "change": "added" }));
    (&b).write_all(br#"{"execute":"qmp_capabilities"}"#).unwrap();
    assert_eq!(next(), "{\"return\": {}}\r\n");
    a.ok("remove-fd", json!({ "fdset-id": 4 }));
    assert!(next().contains("\"change\": \"removed\""));
}

#[test]
fn a_command_waits_for_a_descriptor_that_another_monitor_passes() {
    let daemon = Started::with(&["--fdset-events", "wanted=600"]);
    let mut b = daemon.client("b");
    let mut a = daemon.client("a");
    let waiting = thread::spawn(move || {
        a.ok("blockdev-add", node("n", 5, false));
        a
    });
    let wanted = json!({ "fdset-id": 5, "access": "read-write", "node-name": "n", "seconds": 600 });
    assert_eq!(b.event("FDSET_WANTED"), wanted);
    // What does not fit does not help.
    b.add_fd(5, File::open(DOORLESS).unwrap()).unwrap();
    b.add_fd(5, daemon.disk()).unwrap();
    let mut a = waiting.join().unwrap();
    assert_eq!(a.ok("query-named-block-nodes", json!({}))[0]["node-name"], "n");
}

#[test]
fn a_command_that_waits_in_vain_is_answered_as_ever_and_a_client_that_leaves_waits_no_longer() {
    let daemon = Started::with(&["--fdset-events", "wanted=1"]);
    let mut a = daemon.client("a");
    assert_eq!(a.error("blockdev-add", node("n", 5, false)), "Failed to find fdset /dev/fdset/5");

    let daemon = Started::with(&["--fdset-events", "wanted=100000"]);
    let mut b = daemon.client("b");
    let impatient = UnixStream::connect(daemon.scratch.path("a")).unwrap();
    let add = json!({ "execute": "blockdev-add", "arguments": node("n", 5, false) });
    (&impatient).write_all(format!("{{'execute':'qmp_capabilities'}}{add}").as_bytes()).unwrap();
    b.event("FDSET_WANTED");
    drop(impatient);
    // The monitor takes the next client in, and nothing was made for the one that left.
    assert_eq!(daemon.client("a").ok("query-named-block-nodes", json!({})), json!([]));
}

#[test]
fn on_request_sets_tell_what_a_descriptor_is_where_it_came_from_and_who_uses_it() {
    let daemon = Started::with(&[]);
    let mut a = daemon.client("a");
    let disk = daemon.disk();
    let added = a.add_fd(9, &disk).unwrap();
    a.ok("blockdev-add", node("my-node", 9, false));
    let plain = json!([{ "fdset-id": 9, "fds": [{ "fd": added["fd"], "opaque": "disk" }] }]);
    assert_eq!(a.ok("query-fdsets", json!({})), plain, "QEMU's members and no other");
    let detail = &a.ok("query-fdsets", json!({ "detail": true }))[0]["fds"][0]["detail"];
    let stat = rustix::fs::fstat(&disk).unwrap();
    assert_eq!(detail["inode"], stat.st_ino);
    assert_eq!(detail["device"], format!("{}:{}", rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev)));
    assert_eq!(detail["access"], "read-write");
    assert_eq!((&detail["type"], &detail["size"]), (&json!("regular"), &json!(1 << 20)));
    assert_eq!((&detail["direct"], &detail["deleted"]), (&json!(false), &json!(false)));
    assert_eq!(detail["peer"], json!({ "pid": std::process::id(), "uid": rustix::process::getuid().as_raw() }));
    assert_eq!(detail["users"], json!(["my-node"]));
    assert!(detail["since"].as_u64().unwrap() > 1_700_000_000);
    std::fs::remove_file(daemon.scratch.path("disk.raw")).unwrap();
    assert_eq!(a.ok("query-fdsets", json!({ "detail": true }))[0]["fds"][0]["detail"]["deleted"], true, "as of now");
}

#[test]
fn quotas_are_kept_and_what_is_over_is_closed() {
    let daemon = Started::with(&["--fdset-quota", "per-set=2,total=3"]);
    let mut a = daemon.client("a");
    for set in [1, 1, 2] {
        a.add_fd(set, daemon.disk()).unwrap();
    }
    let before = open_fds(daemon.child.id()).len();
    assert_eq!(a.add_fd(1, daemon.disk()).unwrap_err(), "Too many file descriptors: set 1 may hold 2");
    assert_eq!(a.add_fd(3, daemon.disk()).unwrap_err(), "Too many file descriptors: this process may hold 3");
    assert_eq!(open_fds(daemon.child.id()).len(), before);
    a.ok("remove-fd", json!({ "fdset-id": 1 }));
    a.add_fd(3, daemon.disk()).unwrap();

    let daemon = Started::with(&["--fdset-quota", "per-peer=1"]);
    let mut a = daemon.client("a");
    a.add_fd(1, daemon.disk()).unwrap();
    let refused = a.add_fd(2, daemon.disk()).unwrap_err();
    assert!(refused.starts_with("Too many file descriptors: user "), "{refused}");
}

#[test]
fn at_the_limit_of_descriptors_a_monitors_client_still_gets_in() {
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -n 64; exec \"$@\"", "sh", DOORLESS, "daemon"]);
    let daemon = Started::by(&mut limited, "", &["--fdset-quota", "total=1000"]);
    let mut a = daemon.client("a");
    let disk = daemon.disk();
    let refused = loop {
        if let Err(refused) = a.add_fd(0, &disk) {
            break refused;
        }
    };
    assert!(refused.contains("descriptor"), "{refused}");
    assert!(open_fds(daemon.child.id()).len() >= 64);
    let mut b = daemon.client("b");
    assert_eq!(b.sets(), [0]);
    b.ok("remove-fd", json!({ "fdset-id": 0 }));
    a.add_fd(0, &disk).unwrap();
}

#[test]
fn every_descriptor_is_in_the_books() {
    let daemon = Started::with(&[]);
    let mut a = daemon.client("a");
    a.add_fd(1, daemon.disk()).unwrap();
    a.ok("blockdev-add", node("n", 1, false));
    let listener = std::os::unix::net::UnixListener::bind(daemon.scratch.path("nbd")).unwrap();
    a.execute("getfd", json!({ "fdname": "kept" }), &[daemon.disk().as_fd()]).unwrap();
    a.execute("getfd", json!({ "fdname": "nbd" }), &[listener.as_fd()]).unwrap();
    a.ok("nbd-server-start", json!({ "addr": { "type": "fd", "data": { "str": "nbd" } } }));
    a.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "n" }));
    let mut client = UnixStream::connect(daemon.scratch.path("nbd")).unwrap();
    client.read_exact(&mut [0; 18]).unwrap();
    a.execute("query-version", json!({}), &[daemon.disk().as_fd()]).unwrap();

    let monitor = daemon.scratch.name("b");
    let (status, out, errors) = harness::doorless(&["fdsets", "--monitor", &monitor, "--audit"]);
    assert!(status.success(), "{out}{errors}");
    for owner in ["process", "monitor", "message", "name", "fdset", "dup", "export"] {
        assert!(out.lines().any(|line| line.split_whitespace().nth(1) == Some(owner)), "nothing of {owner}:\n{out}");
    }
    let (status, out, _) = harness::doorless(&["fdsets", "--monitor", &monitor]);
    assert!(status.success());
    let row = out.lines().find(|line| line.starts_with("1 ")).unwrap();
    assert!(row.contains("read-write") && row.contains(" n ") && row.ends_with("disk"), "{out}");

    // What whoever starts the daemon leaves open by mistake is closed before it is confined.
    let mut careless = Command::new("sh");
    careless.args(["-c", "exec 9</dev/null; exec \"$@\"", "sh", DOORLESS, "daemon"]);
    let daemon = Started::by(&mut careless, "", &[]);
    drop(daemon.client("a"));
    let audit = Monitor::connect(&daemon.scratch.path("b")).unwrap().audit().unwrap();
    assert!(audit.is_clean(), "{audit:?}");
}

#[test]
fn blockdev_create_makes_an_image_in_a_passed_file_as_a_job() {
    let daemon = Started::with(&[]);
    let mut a = daemon.client("a");
    let disk = daemon.disk();
    std::os::unix::fs::FileExt::write_all_at(&disk, b"old", 0).unwrap();
    a.add_fd(1, &disk).unwrap();
    let options = |set: i64| json!({ "driver": "file", "filename": format!("/dev/fdset/{set}"), "size": 65536 });
    a.ok("blockdev-create", json!({ "job-id": "j", "options": options(1) }));
    let mut seen = Vec::new();
    while seen.last().is_none_or(|status| status != "concluded") {
        seen.push(a.event("JOB_STATUS_CHANGE")["status"].as_str().unwrap().to_owned());
    }
    assert_eq!(seen, ["created", "running", "waiting", "pending", "concluded"]);
    let job = json!({ "id": "j", "type": "create", "status": "concluded", "current-progress": 1, "total-progress": 1 });
    assert_eq!(a.ok("query-jobs", json!({})), json!([job]));
    assert_eq!(
        a.error("blockdev-create", json!({ "job-id": "j", "options": options(1) })),
        "Job ID 'j' already in use"
    );
    a.ok("job-dismiss", json!({ "id": "j" }));
    assert_eq!(a.event("JOB_STATUS_CHANGE")["status"], "null");
    assert_eq!(a.error("job-dismiss", json!({ "id": "j" })), "Job not found");
    assert_eq!(std::fs::read(daemon.scratch.path("disk.raw")).unwrap(), vec![0; 65536]);
    assert_eq!(
        a.ok("query-fdsets", json!({ "detail": true }))[0]["fds"][0]["detail"]["users"],
        json!([]),
        "no dup stays"
    );

    // Without the rights the job fails, and the file is as it was.
    std::os::unix::fs::FileExt::write_all_at(&disk, b"new", 0).unwrap();
    a.add_fd(2, File::open(daemon.scratch.path("disk.raw")).unwrap()).unwrap();
    a.ok("blockdev-create", json!({ "job-id": "k", "options": options(2) }));
    while a.event("JOB_STATUS_CHANGE") != json!({ "id": "k", "status": "concluded" }) {}
    let jobs = a.ok("query-jobs", json!({}));
    assert_eq!(jobs[0]["error"], "Failed to find file descriptor with matching flags=0x42");
    assert_eq!(&std::fs::read(daemon.scratch.path("disk.raw")).unwrap()[..3], b"new");
}

#[test]
fn daemonize_returns_when_everything_is_done_and_the_pid_file_names_the_process() {
    let scratch = Scratch::new();
    let (pidfile, socket) = (scratch.name("pid"), scratch.name("socket"));
    let chardev = format!("socket,id=m,path={socket},server=on,wait=off");
    let arguments = ["daemon", "--daemonize", "--pidfile", &pidfile, "--chardev", &chardev, "--monitor", "m"];
    run(DOORLESS, &arguments);
    let pid: i32 = std::fs::read_to_string(&pidfile).unwrap().trim().parse().unwrap();
    // Ready means that nobody has to wait for the socket.
    let mut client = Qmp(Client::new(UnixStream::connect(&socket).unwrap()).unwrap());
    assert_eq!(client.ok("query-descriptors", json!({}))["pid"], pid);
    let (status, _, errors) = harness::doorless(&arguments[..4]);
    assert!(!status.success() && errors.contains("belongs to a process that runs"), "{errors}");
    client.ok("quit", json!({}));

    let (status, _, errors) =
        harness::doorless(&["daemon", "--daemonize", "--blockdev", "file,node-name=n,filename=/none"]);
    assert!(!status.success() && errors.contains("Could not open '/none'"), "{errors}");
}

#[test]
fn the_command_line_serves_over_tcp_and_a_unix_socket_before_it_is_confined() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("disk"), vec![0; 1 << 20]).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let blockdev = format!("file,node-name=disk,filename={}", scratch.name("disk"));
    for address in [
        format!("addr.type=inet,addr.host=127.0.0.1,addr.port={port}"),
        format!("addr.type=unix,addr.path={}", scratch.name("nbd")),
    ] {
        let export = "nbd,id=e,node-name=disk,name=disk";
        let daemon = Started::with(&["--blockdev", &blockdev, "--nbd-server", &address, "--export", export]);
        assert_eq!(daemon.client("a").ok("query-block-exports", json!({}))[0]["id"], "e");
        let mut greeting = [0; 8];
        if address.contains("inet") {
            std::net::TcpStream::connect(("127.0.0.1", port)).unwrap().read_exact(&mut greeting).unwrap();
        } else {
            UnixStream::connect(scratch.path("nbd")).unwrap().read_exact(&mut greeting).unwrap();
        }
        assert_eq!(&greeting, b"NBDMAGIC");
    }
    let (status, _, errors) =
        harness::doorless(&["daemon", "--nbd-server", "addr.type=inet,addr.host=127.0.0.1,addr.port=x"]);
    assert!(!status.success() && errors.contains("'x' is not the number of a port"), "{errors}");
}

#[test]
fn under_the_name_of_qemus_storage_daemon_every_descriptor_is_taken() {
    let scratch = Scratch::new();
    let link = scratch.path("qemu-storage-daemon");
    std::os::unix::fs::symlink(DOORLESS, &link).unwrap();
    assert!(run(link.to_str().unwrap(), &["--version"]).starts_with("qemu-storage-daemon (doorless) "));
    assert!(run(link.to_str().unwrap(), &["--help"]).contains("--blockdev"));
    let daemon = Started::by(&mut Command::new(&link), "", &["--object", "iothread,id=io0", "--trace", "enable=*"]);
    let mut a = daemon.client("a");
    a.execute("add-fd", json!({}), &[File::open("/").unwrap().as_fd()]).unwrap();
    a.add_fd(1, daemon.disk()).unwrap();
    a.ok("blockdev-add", node("n", 1, false));
    assert_eq!(a.error("object-add", json!({ "qom-type": "iothread", "id": "io0" })).split('\'').nth(1), Some("io0"));
    let export = |iothread: &str| json!({ "type": "nbd", "id": "e", "node-name": "n", "iothread": iothread });
    assert_eq!(a.error("block-export-add", export("none")), "iothread \"none\" not found");
    assert_eq!(a.error("block-export-add", export("io0")), "NBD server not running");
    a.ok("object-del", json!({ "id": "io0" }));
    assert_eq!(a.error("object-del", json!({ "id": "io0" })), "object 'io0' not found");
}

#[test]
fn serve_gives_others_a_monitor_and_still_ends_with_its_manager() {
    let scratch = Scratch::new();
    let disk = scratch.name("disk.raw");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let monitor = scratch.name("monitor");
    let serve = harness::Serve::start(&["--format", "raw", "--monitor", &monitor, &disk]);
    let (status, out, errors) = harness::doorless(&["fdsets", "--monitor", &monitor]);
    assert!(status.success() && out.contains(&disk), "{out}{errors}");
    let (status, out, errors) = harness::doorless(&["fdsets", "--monitor", &monitor, "--audit", "--json"]);
    assert!(status.success(), "{out}{errors}");
    let pidfd = rustix::process::pidfd_open(
        rustix::process::Pid::from_raw(i32::try_from(serve.daemon_pid()).unwrap()).unwrap(),
        rustix::process::PidfdFlags::empty(),
    );
    drop(serve);
    // The manager was killed; the daemon ends by itself.
    let pidfd = pidfd.unwrap();
    rustix::event::poll(&mut [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)], None).unwrap();
}
