// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A daemon that is killed is replaced: clients wait and go on, nothing that was flushed is lost, no descriptor is left over.
//! One that is upgraded hands its connections over. `DOORLESS_KILLS` and `DOORLESS_UPGRADES` say how often (default 10).
#![allow(missing_docs, clippy::unwrap_used)]

mod front_end;
mod harness;
#[path = "harness/mounted.rs"]
mod mounted;
mod reconnecting;

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use front_end::{Ask, FrontEnd, Memory, Options, kind};
use harness::{DOORLESS, Scratch, doorless, judges, noise, open_fds, run, text};
use reconnecting::{BLOCK, Client, histogram};
use rustix::process::{Pid, Signal, kill_process};

fn kills() -> usize {
    std::env::var("DOORLESS_KILLS").ok().map_or(10, |kills| kills.parse().unwrap())
}

/// `doorless serve` whose words about its daemons are heard.
struct Kept {
    manager: Child,
    words: BufReader<ChildStderr>,
    daemon: u32,
    /// What it says that restarts took.
    restarts: Vec<Duration>,
}

impl Kept {
    fn start(arguments: &[&str]) -> Kept {
        Kept::start_program(DOORLESS, arguments)
    }

    fn start_program(program: &str, arguments: &[&str]) -> Kept {
        let mut command = Command::new(program);
        command.arg("serve").args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut manager = command.spawn().unwrap();
        let mut daemon = 0;
        for line in BufReader::new(manager.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            if let Some(rest) = line.strip_prefix("daemon: process ") {
                daemon = rest.split(',').next().unwrap().parse().unwrap();
            }
            if line.starts_with("ready: ") {
                let words = BufReader::new(manager.stderr.take().unwrap());
                return Kept { manager, words, daemon, restarts: Vec::new() };
            }
        }
        panic!("{arguments:?} did not get ready: {:?}", manager.wait());
    }

    fn kill(&self) {
        kill_process(Pid::from_raw(self.daemon.cast_signed()).unwrap(), Signal::KILL).unwrap();
    }

    /// Kills the daemon, and returns when another serves.
    fn replace(&mut self) {
        self.kill();
        assert_eq!(self.word(), format!("doorless: the daemon, process {}, was killed by signal 9", self.daemon));
        let word = self.word();
        let rest = word.strip_prefix("doorless: process ").unwrap_or_else(|| panic!("{word}"));
        let (pid, rest) = rest.split_once(" serves in its place, after ").unwrap();
        let milliseconds: f64 = rest.strip_suffix(" ms").unwrap().parse().unwrap();
        self.daemon = pid.parse().unwrap();
        self.restarts.push(Duration::from_secs_f64(milliseconds / 1000.0));
    }

    /// Has another daemon take over; for how long nobody was served.
    fn upgrade(&mut self) -> Duration {
        kill_process(Pid::from_child(&self.manager), Signal::USR1).unwrap();
        let word = self.word();
        let rest = word.strip_prefix("doorless: process ").unwrap_or_else(|| panic!("{word}"));
        let (pid, rest) = rest.split_once(" has taken over, in ").unwrap_or_else(|| panic!("{word}"));
        let pid = pid.parse().unwrap();
        assert_ne!(self.daemon, pid);
        self.daemon = pid;
        let milliseconds: f64 = rest.strip_suffix(" ms").unwrap().parse().unwrap();
        Duration::from_secs_f64(milliseconds / 1000.0)
    }

    fn word(&mut self) -> String {
        let mut line = String::new();
        self.words.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// What the manager has open while it waits for the daemon's end.
    fn at_rest(&self) -> Vec<String> {
        loop {
            if open_fds(self.manager.id()).iter().any(|fd| fd.ends_with("[pidfd]")) {
                return kinds(self.manager.id());
            }
        }
    }

    fn interrupt(mut self) -> ExitStatus {
        kill_process(Pid::from_child(&self.manager), Signal::INT).unwrap();
        self.manager.wait().unwrap()
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let _ = self.manager.kill();
        let _ = self.manager.wait();
    }
}

/// Descriptors of a process by what they are, without what differs from process to process.
fn kinds(pid: u32) -> Vec<String> {
    let mut kinds: Vec<String> = open_fds(pid)
        .iter()
        .map(|fd| fd.split_once(" -> ").unwrap().1.split(":[").next().unwrap().to_owned())
        .collect();
    kinds.sort();
    kinds
}

/// Kills at random moments while a client works; in the end nothing is missing and nothing left over.
fn kill_under_load(format: &str, image: &str, blocks: usize) {
    let scratch = Scratch::new();
    let (socket, monitor) = (scratch.path("nbd"), scratch.name("monitor"));
    let options = ["--format", format, image, "--socket", text(&socket), "--monitor", &monitor];
    let mut kept = Kept::start(&[&options[..], &["--restarts", "1000000"]].concat());
    kept.replace();
    let (manager_had, daemon_had) = (kept.at_rest(), kinds(kept.daemon));
    let over = AtomicBool::new(false);
    let mut client = Client::new(&socket, "", blocks, 1);
    std::thread::scope(|scope| {
        let working = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                client.work();
            }
        });
        let mut random = 88_172_645_463_325_252_u64;
        for _ in 0..kills() {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            std::thread::sleep(Duration::from_micros(random % 40_000));
            kept.replace();
        }
        over.store(true, Ordering::Relaxed);
        working.join().unwrap();
    });
    kept.restarts.remove(0);
    assert!(client.answered > 0 && client.flushes > 0 && !client.pauses.is_empty());
    eprintln!("{}", histogram(&format!("{format}: the manager's restarts"), &kept.restarts));
    eprintln!("{}", histogram(&format!("{format}: pauses as the client saw them"), &client.pauses));
    if format == "raw" {
        client.check_all(&fs::read(image).unwrap());
    }
    drop(client);
    let (status, said, _) = doorless(&["fdsets", "--audit", "--monitor", &monitor]);
    assert!(status.success(), "{said}");
    // The daemon lets go of the client at its own pace.
    while kinds(kept.daemon).len() > daemon_had.len() {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(kinds(kept.daemon), daemon_had);
    assert_eq!(kept.at_rest(), manager_had);
    assert!(kept.interrupt().success());
    assert!(!socket.exists());
}

#[test]
fn clients_of_a_raw_disk_go_on_over_killed_daemons_and_find_all_that_they_flushed() {
    let scratch = Scratch::new();
    fs::write(scratch.path("disk"), vec![0; 512 * BLOCK]).unwrap();
    kill_under_load("raw", &scratch.name("disk"), 512);
}

#[test]
fn clients_of_a_qcow2_disk_go_on_over_killed_daemons_and_find_all_that_they_flushed() {
    let test = "clients_of_a_qcow2_disk_go_on_over_killed_daemons_and_find_all_that_they_flushed";
    if !judges(test, &["qemu-img"]) {
        return;
    }
    let scratch = Scratch::new();
    let image = scratch.name("disk.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", &image, "8M"]);
    kill_under_load("qcow2", &image, 2048);
    // Leaks are what a killed daemon may leave: 3; anything else would be damage.
    let check = Command::new("qemu-img").args(["check", "-q", &image]).output().unwrap().status;
    assert!(matches!(check.code(), Some(0 | 3)), "{check}");
}

fn upgrades() -> usize {
    std::env::var("DOORLESS_UPGRADES").ok().map_or(10, |upgrades| upgrades.parse().unwrap())
}

/// Upgrades while clients work, none of which notices more than a pause.
fn upgrade_under_load(format: &str, image: &str, blocks: usize) {
    let scratch = Scratch::new();
    let (socket, monitor) = (scratch.path("nbd"), scratch.name("monitor"));
    let options = ["--format", format, image, "--socket", text(&socket), "--monitor", &monitor];
    let mut kept = Kept::start(&options);
    let mut pauses = vec![kept.upgrade()];
    let (manager_had, daemon_had) = (kept.at_rest(), kinds(kept.daemon));
    let over = AtomicBool::new(false);
    let mut client = Client::new(&socket, "", blocks, 2);
    std::thread::scope(|scope| {
        let working = scope.spawn(|| {
            let mut longest = Duration::ZERO;
            while !over.load(Ordering::Relaxed) {
                let begun = Instant::now();
                client.work();
                longest = longest.max(begun.elapsed());
            }
            longest
        });
        for round in 0..upgrades() {
            std::thread::sleep(Duration::from_millis(round as u64 * 13 % 40));
            pauses.push(kept.upgrade());
        }
        over.store(true, Ordering::Relaxed);
        eprintln!("{format}: the longest batch took {:.1?}", working.join().unwrap());
    });
    eprintln!("{}", histogram(&format!("{format}: pauses of upgrades"), &pauses));
    assert!(client.answered > 0 && client.flushes > 0);
    assert_eq!(client.pauses, [], "the connection lives on");
    client.work();
    if format == "raw" {
        client.check_all(&fs::read(image).unwrap());
    }
    drop(client);
    let (status, said, _) = doorless(&["fdsets", "--audit", "--monitor", &monitor]);
    assert!(status.success(), "{said}");
    while kinds(kept.daemon).len() > daemon_had.len() {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(kinds(kept.daemon), daemon_had);
    assert_eq!(kept.at_rest(), manager_had);
    assert!(kept.interrupt().success());
}

#[test]
fn connections_to_a_raw_disk_live_on_over_upgrades() {
    let scratch = Scratch::new();
    fs::write(scratch.path("disk"), vec![0; 512 * BLOCK]).unwrap();
    upgrade_under_load("raw", &scratch.name("disk"), 512);
}

#[test]
fn connections_to_a_qcow2_disk_live_on_over_upgrades_and_the_image_is_clean() {
    let test = "connections_to_a_qcow2_disk_live_on_over_upgrades_and_the_image_is_clean";
    if !judges(test, &["qemu-img"]) {
        return;
    }
    let scratch = Scratch::new();
    let image = scratch.name("disk.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", &image, "8M"]);
    upgrade_under_load("qcow2", &image, 2048);
    run("qemu-img", &["check", "-q", &image]);
}

#[test]
fn nbdcopy_notices_no_upgrade() {
    if !judges("nbdcopy_notices_no_upgrade", &["nbdcopy"]) {
        return;
    }
    let scratch = Scratch::new();
    let (image, copy, socket) = (scratch.name("image"), scratch.name("copy"), scratch.name("nbd"));
    fs::write(&image, noise(64 << 20, 12)).unwrap();
    let mut kept = Kept::start(&["--format", "raw", &image, "--socket", &socket]);
    let uri = manager::serve::uri(std::path::Path::new(&socket), "");
    let mut copying = 0;
    // Copies until one was under way at an upgrade: which of the two is quicker decides nothing else.
    while copying == 0 {
        let mut child =
            Command::new("nbdcopy").args(["--requests=4", "--request-size=65536", &uri, &copy]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        kept.upgrade();
        copying += usize::from(child.try_wait().unwrap().is_none());
        assert!(child.wait().unwrap().success());
        assert!(fs::read(&copy).unwrap() == fs::read(&image).unwrap());
    }
}

#[test]
fn a_mounted_file_and_a_guest_s_disk_live_on_over_an_upgrade() {
    let scratch = Scratch::new();
    let (image, disk, socket) = (scratch.name("image"), scratch.name("disk"), scratch.path("vhost"));
    fs::write(&image, vec![0; 256 * BLOCK]).unwrap();
    fs::write(&disk, "").unwrap();
    let mounts = mounted::can_mount("a_mounted_file_and_a_guest_s_disk_live_on_over_an_upgrade");
    let mut arguments = vec!["--format", "raw", &image, "--vhost-user", text(&socket)];
    if mounts {
        arguments.extend(["--fuse", &disk]);
    }
    let mut kept = Kept::start(&arguments);
    let file = mounts.then(|| File::options().read(true).write(true).open(&disk).unwrap());
    let memory = Memory::new(1);
    let mut front = FrontEnd::start(&socket, &memory, Options::default());
    for round in 1..4_u8 {
        assert_eq!(front.write(0, &[round; BLOCK]), 0);
        kept.upgrade();
        assert_eq!(front.read(0, BLOCK as u64), vec![round; BLOCK]);
        if let Some(file) = &file {
            let mut read = [0; BLOCK];
            file.read_exact_at(&mut read, 0).unwrap();
            assert_eq!(read, [round; BLOCK]);
        }
    }
}

#[test]
fn a_guest_works_on_over_upgrades_on_the_connection_that_it_has() {
    let scratch = Scratch::new();
    let (image, socket) = (scratch.name("image"), scratch.path("vhost"));
    fs::write(&image, vec![0; 64 * BLOCK]).unwrap();
    let mut kept = Kept::start(&["--format", "raw", &image, "--vhost-user", text(&socket), "--queues", "2"]);
    let memory = Memory::new(2);
    let mut front = FrontEnd::start(&socket, &memory, Options { queues: 2, ..Options::default() });
    assert_eq!(front.write(0, &[1; BLOCK]), 0);
    let mut pauses = vec![kept.upgrade()];
    assert_eq!(front.read(0, BLOCK as u64), vec![1; BLOCK]);
    let (manager_had, daemon_had) = (kept.at_rest(), kinds(kept.daemon));
    let (over, sectors) = (AtomicBool::new(false), (BLOCK / 512) as u64);
    let written = std::thread::scope(|scope| {
        let upgrading = scope.spawn(|| {
            for _ in 0..upgrades() {
                pauses.push(kept.upgrade());
            }
            over.store(true, Ordering::Relaxed);
        });
        // Every block, over both queues in turn, is read back after it was written over.
        let mut round = 0_u64;
        while !over.load(Ordering::Relaxed) {
            let (block, mark) = (round % 64, (round % 251) as u8);
            let queue = usize::from(round % 2 == 1);
            let ask = |kind| Ask::new(kind, block * sectors, BLOCK as u64);
            assert_eq!(front.one_on(queue, ask(kind::WRITE), &[mark; BLOCK]).0, 0);
            assert!(front.one_on(1 - queue, ask(kind::READ), &[]) == (0, vec![mark; BLOCK]), "round {round}");
            round += 1;
        }
        upgrading.join().unwrap();
        round
    });
    eprintln!("{}", histogram(&format!("vhost-user: {written} writes, pauses of upgrades"), &pauses));
    assert!(written > 0);
    assert_eq!(kinds(kept.daemon), daemon_had);
    assert_eq!(kept.at_rest(), manager_had);
    // Once it has moved it can still be killed: what a front end keeps for that is what it was.
    kept.replace();
    assert!(front.was_hung_up_on());
    let mut front = front.resume(&socket);
    assert_eq!(front.write(0, &[9; BLOCK]), 0);
}

#[test]
fn a_guest_with_as_many_queues_as_there_can_be_goes_on_over_an_upgrade() {
    let scratch = Scratch::new();
    let (image, socket) = (scratch.name("image"), scratch.path("vhost"));
    fs::write(&image, vec![0; 64 * BLOCK]).unwrap();
    let mut kept = Kept::start(&["--format", "raw", &image, "--vhost-user", text(&socket), "--queues", "128"]);
    let memory = Memory::new(128);
    let mut front = FrontEnd::start(&socket, &memory, Options { queues: 128, ..Options::default() });
    kept.upgrade();
    for (queue, mark) in (0..128_usize).zip(0_u8..) {
        let ask = |kind| Ask::new(kind, queue as u64 % 64 * 8, 4096);
        assert_eq!(front.one_on(queue, ask(kind::WRITE), &[mark; 4096]).0, 0);
        assert!(front.one_on(127 - queue, ask(kind::READ), &[]) == (0, vec![mark; 4096]));
    }
}

#[test]
fn an_upgrade_to_what_is_no_daemon_changes_nothing() {
    let scratch = Scratch::new();
    let (program, image, socket) = (scratch.name("doorless"), scratch.name("image"), scratch.path("nbd"));
    fs::copy(DOORLESS, &program).unwrap();
    fs::write(&image, vec![0; 64 * BLOCK]).unwrap();
    let mut kept = Kept::start_program(&program, &["--format", "raw", &image, "--socket", text(&socket)]);
    let mut client = Client::new(&socket, "", 64, 3);
    client.work();
    // The file is replaced, as a package does it.
    fs::write(scratch.path("new"), "#!/bin/false\n").unwrap();
    fs::set_permissions(scratch.path("new"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    fs::rename(scratch.path("new"), &program).unwrap();
    kill_process(Pid::from_child(&kept.manager), Signal::USR1).unwrap();
    assert!(kept.word().starts_with("doorless: no daemon could take over: "));
    client.work();
    assert_eq!(client.pauses, []);
    fs::copy(DOORLESS, scratch.path("new")).unwrap();
    fs::rename(scratch.path("new"), &program).unwrap();
    kept.upgrade();
    client.work();
    assert_eq!(client.pauses, []);
}

#[test]
fn qemu_copies_a_disk_through_killed_daemons() {
    if !judges("qemu_copies_a_disk_through_killed_daemons", &["qemu-img"]) {
        return;
    }
    let scratch = Scratch::new();
    let (source, image, socket) = (scratch.name("source"), scratch.name("disk"), scratch.name("nbd"));
    fs::write(&source, noise(64 << 20, 11)).unwrap();
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let mut kept = Kept::start(&["--format", "raw", &image, "--socket", &socket, "--restarts", "1000000"]);
    let target = format!("driver=nbd,server.type=unix,server.path={socket},reconnect-delay=600");
    let copy = ["convert", "-n", "-f", "raw", "--target-image-opts", "-r", "60M", &source, &target];
    let mut copying = Command::new("qemu-img").args(copy).spawn().unwrap();
    let mut replaced = 0;
    while copying.try_wait().unwrap().is_none() && replaced < 3 {
        std::thread::sleep(Duration::from_millis(100));
        kept.replace();
        replaced += 1;
    }
    assert!(copying.wait().unwrap().success());
    assert!(replaced > 0);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &source, &image]);
}

#[test]
fn a_mounted_disk_goes_on_under_the_programs_that_have_it_open() {
    if !mounted::can_mount("a_mounted_disk_goes_on_under_the_programs_that_have_it_open") {
        return;
    }
    let scratch = Scratch::new();
    let (image, disk) = (scratch.name("image"), scratch.name("disk"));
    fs::write(&image, vec![0; 256 * BLOCK]).unwrap();
    fs::write(&disk, "").unwrap();
    let mut kept = Kept::start(&["--format", "raw", &image, "--fuse", &disk, "--restarts", "1000000"]);
    kept.replace();
    let had = kept.at_rest();
    let file = File::options().read(true).write(true).open(&disk).unwrap();
    let over = AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let writing = scope.spawn(|| {
            let mut rounds = 0_u64;
            while !over.load(Ordering::Relaxed) {
                let value = u8::try_from(rounds % 251).unwrap();
                let at = rounds % 256 * BLOCK as u64;
                file.write_all_at(&[value; BLOCK], at).unwrap();
                let mut read = [0; BLOCK];
                file.read_exact_at(&mut read, at).unwrap();
                assert_eq!(read, [value; BLOCK]);
                rounds += 1;
            }
            rounds
        });
        for round in 0..kills() {
            std::thread::sleep(Duration::from_millis(round as u64 * 7 % 30));
            kept.replace();
        }
        over.store(true, Ordering::Relaxed);
        writing.join().unwrap()
    });
    eprintln!("{}", histogram("a mounted disk: the manager's restarts", &kept.restarts));
    assert!(written > 0);
    drop(file);
    assert_eq!(kept.at_rest(), had);
    assert!(kept.interrupt().success());
    assert_eq!(mounted::mounts(&scratch.path("disk")), 0);
}

#[test]
fn a_guest_s_disk_goes_on_at_the_same_socket() {
    let scratch = Scratch::new();
    let (image, socket) = (scratch.name("image"), scratch.path("vhost"));
    fs::write(&image, vec![0; 256 * BLOCK]).unwrap();
    let arguments = ["--format", "raw", &image, "--vhost-user", text(&socket), "--restarts", "1000000"];
    let mut kept = Kept::start(&arguments);
    let memory = Memory::new(1);
    let mut front = FrontEnd::start(&socket, &memory, Options::default());
    for round in 0..3 {
        assert_eq!(front.write(u64::from(round) * 8, &[round + 1; BLOCK]), 0);
        kept.replace();
        assert!(front.was_hung_up_on());
        front = front.resume(&socket);
        for done in 0..=round {
            assert_eq!(front.read(u64::from(done) * 8, BLOCK as u64), vec![done + 1; BLOCK]);
        }
    }
}

#[test]
fn a_daemon_that_dies_too_often_is_given_up_and_leaves_nothing() {
    let scratch = Scratch::new();
    let (image, socket) = (scratch.name("image"), scratch.path("nbd"));
    fs::write(&image, [0; BLOCK]).unwrap();
    for (restarts, deaths) in [("0", 0), ("2", 2)] {
        let arguments = ["--format", "raw", &image, "--socket", text(&socket), "--restarts", restarts];
        let mut kept = Kept::start(&arguments);
        for _ in 0..deaths {
            kept.replace();
        }
        kept.kill();
        assert!(kept.word().contains("was killed by signal 9"));
        assert_eq!(kept.word(), format!("doorless: the daemon has died too often (--restarts {restarts})"));
        assert!(!kept.manager.wait().unwrap().success());
        assert!(!socket.exists());
    }
}

#[test]
fn an_image_that_was_cut_short_is_passed_to_no_other_daemon() {
    let scratch = Scratch::new();
    let (image, socket) = (scratch.name("image"), scratch.path("nbd"));
    fs::write(&image, [0; 2 * BLOCK]).unwrap();
    let mut kept = Kept::start(&["--format", "raw", &image, "--socket", text(&socket)]);
    File::options().write(true).open(&image).unwrap().set_len(BLOCK as u64).unwrap();
    kept.kill();
    assert!(kept.word().contains("was killed by signal 9"));
    let refused = kept.word();
    assert!(refused.contains("has 4096 bytes, and had 8192 when it was passed"), "{refused}");
    assert!(!kept.manager.wait().unwrap().success());
}
