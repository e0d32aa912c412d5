// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Correctness under disorder: many connections, overlapping requests, clients and daemons that are killed; every read is
//! held against what NBD's ordering rules allow.
//!
//! `DOORLESS_DISORDER_SECONDS` makes it run for that long; without it a fixed number of requests is sent.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, clippy::print_stdout)]

mod disorder;
mod harness;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use disorder::client::{Client, Dice, Style};
use disorder::{Model, SECTOR};
use harness::{TestDaemon, judges, text};
use rustix::process::{Pid, Signal, kill_process};

const CONNECTIONS: u64 = 16;
/// Batches of requests in one connection's life.
const BATCHES: u64 = 24;
const SECTORS: usize = 1024;
/// The variable by which this program knows that it is a client's body.
const RELAY: &str = "DOORLESS_TEST_RELAY";

/// A connection in a process of its own, which can be killed with what it has on the way.
struct Relay(Child);

impl Relay {
    fn start(server: &Path) -> (UnixStream, Relay) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_relay_carries_bytes_between_two_sockets"])
            .env(RELAY, server)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        (ours, Relay(child))
    }

    fn kill(&mut self) {
        kill_process(Pid::from_child(&self.0), Signal::KILL).unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The relay itself; as a test, a relay between two pairs.
#[test]
fn a_relay_carries_bytes_between_two_sockets() {
    if let Some(server) = std::env::var_os(RELAY) {
        let client = UnixStream::from(sys::fd::standard_input().unwrap());
        return carry(client, UnixStream::connect(server).unwrap());
    }
    let ((mut a, b), (c, mut d)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    let relay = std::thread::spawn(|| carry(b, c));
    a.write_all(b"there").unwrap();
    let mut got = [0; 5];
    d.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"there");
    drop((a, d));
    relay.join().unwrap();
}

fn carry(a: UnixStream, b: UnixStream) {
    let copy = |mut from: UnixStream, mut to: UnixStream| {
        let _ = io::copy(&mut from, &mut to);
        let _ = to.shutdown(std::net::Shutdown::Both);
        let _ = from.shutdown(std::net::Shutdown::Both);
    };
    let there = { (a.try_clone().unwrap(), b.try_clone().unwrap()) };
    let back = std::thread::spawn(move || copy(there.1, there.0));
    copy(a, b);
    back.join().unwrap();
}

fn start(image: &Path, format: &str) -> TestDaemon {
    let mut daemon = TestDaemon::start();
    let file = File::options().read(true).write(true).open(image).unwrap();
    daemon.add_node("disk", format, file, false);
    daemon.start_nbd();
    daemon.export("disk", true);
    daemon
}

/// One connection's life: batches, which `done` counts, to their end or until its relay is killed.
fn live(server: &Path, model: &Mutex<Model>, dice: &mut Dice, done: &AtomicU64) -> Result<(), String> {
    let style = [Style::Simple, Style::Structured, Style::Extended][dice.roll(3) as usize];
    let mortal = dice.roll(4) == 0;
    let (socket, mut relay) = match mortal {
        true => {
            let (socket, relay) = Relay::start(server);
            (socket, Some(relay))
        }
        // The daemon may have been killed before this connection began.
        false => match UnixStream::connect(server) {
            Ok(socket) => (socket, None),
            Err(_) => return Ok(()),
        },
    };
    let Ok(mut client) = Client::negotiate(socket, style) else { return Ok(()) };
    for _ in 0..BATCHES {
        let count = 1 + dice.roll(12) as usize;
        let dies = relay.is_some() && dice.roll(6) == 0;
        let outcome = std::thread::scope(|scope| {
            let killer = relay.as_mut().filter(|_| dies);
            let killing = killer.map(|relay| scope.spawn(|| relay.kill()));
            let outcome = client.batch(model, dice, count);
            if let Some(killing) = killing {
                killing.join().unwrap();
            }
            outcome
        });
        match outcome {
            Ok(checked) => checked?,
            // Its relay was killed, or the daemon was.
            Err(_) => return Ok(()),
        }
        if dies {
            return Ok(());
        }
        done.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Everything once, on a fresh image: rounds of all connections, each ended by the daemon's end or by a drain.
fn disorder(format: &str, image: &Path, seed: u64, rounds: usize, until: Option<Instant>) -> u64 {
    let model = Mutex::new(Model::zeroes(SECTORS));
    let mut dice = Dice(seed);
    let mut daemon = start(image, format);
    let mut round = 0;
    while until.map_or(round < rounds, |end| Instant::now() < end) {
        let server = daemon.socket();
        let (violent, moment) = (dice.roll(3) == 0, dice.roll(CONNECTIONS * BATCHES));
        let done = AtomicU64::new(0);
        let seeds: Vec<u64> = (0..CONNECTIONS).map(|_| dice.roll(u64::MAX)).collect();
        std::thread::scope(|scope| {
            let clients: Vec<_> = seeds
                .iter()
                .map(|&seed| {
                    let (server, model, done) = (&server, &model, &done);
                    scope.spawn(move || live(server, model, &mut Dice(seed), done))
                })
                .collect();
            if violent {
                while done.load(Ordering::Relaxed) < moment && !clients.iter().all(ScopedJoinHandle::is_finished) {
                    std::thread::yield_now();
                }
                kill_process(Pid::from_raw(daemon.pid().cast_signed()).unwrap(), Signal::KILL).unwrap();
            }
            for client in clients {
                client.join().unwrap().unwrap();
            }
        });
        if violent {
            daemon.daemon.wait().unwrap();
            if format == "qcow2" {
                assert_sound(image);
            }
            daemon = start(image, format);
        } else {
            // Refused while a client is there: what died has been let go of when it is not.
            let delete = serde_json::json!({ "id": "disk" });
            while daemon.daemon.execute("block-export-del", delete.clone(), &[]).is_err() {
                std::thread::sleep(Duration::from_millis(1));
            }
            daemon.export("disk", true);
        }
        let mut model = model.lock().unwrap();
        match violent && format == "qcow2" {
            true => model.crash(),
            false => model.settle(),
        }
        drop(model);
        round += 1;
    }
    // In the end the file itself is what clients were told.
    daemon.daemon.stop().unwrap();
    let mut model = model.into_inner().unwrap();
    let bytes = match format {
        "qcow2" => {
            model.crash();
            assert_sound(image);
            let plain = tempfile::NamedTempFile::new().unwrap();
            let arguments = ["convert", "-f", "qcow2", "-O", "raw", text(image), text(plain.path())];
            assert!(Command::new("qemu-img").args(arguments).status().unwrap().success());
            std::fs::read(plain.path()).unwrap()
        }
        _ => std::fs::read(image).unwrap(),
    };
    let read = model.begin(0, SECTORS, None);
    model.end_read(read, &bytes).unwrap();
    round as u64
}

/// Leaked clusters are all that a killed daemon may leave.
fn assert_sound(image: &Path) {
    let checked = Command::new("qemu-img").args(["check", "-f", "qcow2", text(image)]).output().unwrap();
    assert!(matches!(checked.status.code(), Some(0 | 3)), "{checked:?}");
}

fn until() -> Option<Instant> {
    let seconds = std::env::var("DOORLESS_DISORDER_SECONDS").ok()?;
    Some(Instant::now() + Duration::from_secs(seconds.parse().unwrap()))
}

#[test]
fn sixteen_connections_in_disorder_see_only_what_nbd_allows() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len((SECTORS * SECTOR) as u64).unwrap();
    let rounds = disorder("raw", image.path(), 0x0d15_0bde, 8, until());
    println!("{rounds} rounds of {CONNECTIONS} connections");
}

#[test]
fn sixteen_connections_in_disorder_see_only_what_nbd_allows_of_qcow2() {
    if !judges("sixteen_connections_in_disorder_see_only_what_nbd_allows_of_qcow2", &["qemu-img"]) {
        return;
    }
    let image = tempfile::NamedTempFile::new().unwrap();
    let size = (SECTORS * SECTOR).to_string();
    let options = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", text(image.path()), &size];
    assert!(Command::new("qemu-img").args(options).status().unwrap().success());
    let rounds = disorder("qcow2", image.path(), 0x0d15_0bdf, 6, until());
    println!("{rounds} rounds of {CONNECTIONS} connections");
}
