// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Speed of the monitor: `cargo bench --bench monitor`.
//!
//! Round trips of `add-fd` and `query-version` on one connection, beside QEMU's where it is installed; and what adding, opening
//! and removing a descriptor costs in few sets and in many. Medians of interleaved rounds. `-- scale` measures the latter alone;
//! as root it raises the limit of descriptors that the shell was given.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::cast_precision_loss, missing_docs, reason = "a benchmark")]

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fdset::{Access, FdSets};
use qmp::Client;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Map, Value, json};

const ROUNDS: usize = 5;
const LENGTH: Duration = Duration::from_millis(600);

/// A server and how it is started with a monitor at a path.
struct Server {
    name: &'static str,
    program: &'static str,
    arguments: fn(&str) -> Vec<String>,
}

const SERVERS: &[Server] = &[
    Server {
        name: "doorless",
        program: env!("CARGO_BIN_EXE_doorless"),
        arguments: |path| {
            let chardev = format!("socket,id=m,path={path},server=on,wait=off");
            ["daemon", "--chardev", &chardev, "--monitor", "m"].map(str::to_owned).to_vec()
        },
    },
    Server {
        name: "qemu-system-x86_64",
        program: "qemu-system-x86_64",
        arguments: |path| {
            let monitor = format!("unix:{path},server=on,wait=off");
            ["-machine", "none", "-nodefaults", "-display", "none", "-qmp", &monitor].map(str::to_owned).to_vec()
        },
    },
];

fn main() {
    if !std::env::args().any(|argument| argument == "scale") {
        let dir = tempfile::tempdir().unwrap();
        round_trips(dir.path());
    }
    scale();
}

fn round_trips(dir: &Path) {
    let mut running: Vec<(&str, Child, Client)> = Vec::new();
    for server in SERVERS {
        let path = dir.join(server.name);
        let arguments = (server.arguments)(path.to_str().unwrap());
        let Ok(child) = Command::new(server.program).args(arguments).stdin(Stdio::null()).spawn() else {
            println!("left out: {} is not installed", server.name);
            continue;
        };
        let socket = loop {
            if let Ok(socket) = UnixStream::connect(&path) {
                break socket;
            }
        };
        running.push((server.name, child, Client::new(socket).unwrap()));
    }
    let disk = tempfile::tempfile().unwrap();
    let mut added: Vec<Vec<f64>> = vec![Vec::new(); running.len()];
    let mut asked = added.clone();
    for _ in 0..ROUNDS {
        for (index, (_, _, client)) in running.iter_mut().enumerate() {
            added[index].push(per_second(|| {
                let answer = call(client, "add-fd", json!({ "fdset-id": 1 }), &[disk.as_fd()]);
                assert_eq!(answer["fdset-id"], 1);
                // The set is emptied now and then, so that it stays small.
                if answer["fd"].as_i64().unwrap() > 500 {
                    call(client, "remove-fd", json!({ "fdset-id": 1 }), &[]);
                }
            }));
            asked[index].push(per_second(|| drop(call(client, "query-fdsets", json!({}), &[]))));
            // The last round may have emptied the set a moment ago: then it is not there.
            let _ = client.execute("remove-fd", Map::from_iter([("fdset-id".into(), json!(1))]), &[]);
        }
    }
    println!("{:<20} {:>22} {:>30}", "round trips a second", "add-fd", "query-fdsets (up to 500 fds)");
    for (index, (name, child, _)) in running.iter_mut().enumerate() {
        println!("{name:<20} {:>22.0} {:>30.0}", median(&mut added[index]), median(&mut asked[index]));
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn call(client: &mut Client, command: &str, arguments: Value, fds: &[BorrowedFd<'_>]) -> Value {
    let Value::Object(arguments) = arguments else { unreachable!() };
    client.execute(command, arguments, fds).unwrap()
}

fn per_second(mut work: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut count = 0;
    while start.elapsed() < LENGTH {
        work();
        count += 1;
    }
    f64::from(count) / start.elapsed().as_secs_f64()
}

/// Adding, opening and removing one more descriptor where there are few, and where there are as many as the process may have.
fn scale() {
    const WANTED: u64 = 100_200;
    let limit = getrlimit(Resource::Nofile);
    let raised = |to| setrlimit(Resource::Nofile, Rlimit { current: Some(to), maximum: Some(to) }).map(|()| to);
    let most = raised(WANTED).unwrap_or_else(|_| raised(limit.maximum.unwrap_or(WANTED)).unwrap()) - 200;
    let many = i64::try_from(most).unwrap();
    let sets = many / 10;
    println!("\n{:<44} {:>10} {:>10} {:>8}", "nanoseconds each", "10 in 1 set", "many", "ratio");
    let (small, large) = (filled(10, 1), filled(many, sets));
    let disk = tempfile::tempfile().unwrap();
    let (mut few, mut lots, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (a, b) = (cost(&small, &disk, 1), cost(&large, &disk, sets));
        few.push(a);
        lots.push(b);
        ratios.push(b / a);
    }
    println!(
        "{:<44} {:>10.0} {:>10.0} {:>8.2}",
        format!("add, open, drop, remove ({many} in {sets} sets)"),
        median(&mut few),
        median(&mut lots),
        median(&mut ratios)
    );
}

/// `count` descriptors spread over `sets` sets.
fn filled(count: i64, sets: i64) -> FdSets {
    let table = FdSets::new();
    let file = tempfile::tempfile().unwrap();
    for index in 0..count {
        table.add(OwnedFd::from(file.try_clone().unwrap()), Some(index % sets), None).unwrap();
    }
    table
}

/// Nanoseconds to add a descriptor to a set, open it, drop the dup, and remove it.
fn cost(table: &FdSets, disk: &File, sets: i64) -> f64 {
    const TIMES: i64 = 20_000;
    let start = Instant::now();
    for index in 0..TIMES {
        // Far apart, so that the next one is never next in memory.
        let set = index * 7919 % sets;
        let added = table.add(disk.try_clone().unwrap().into(), Some(set), None).unwrap();
        drop(table.open(set, Access::READ_WRITE).unwrap());
        table.remove(set, Some(added.fd.into())).unwrap();
    }
    start.elapsed().as_nanos() as f64 / TIMES as f64
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
