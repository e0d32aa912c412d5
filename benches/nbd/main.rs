// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Speed over NBD, side by side with the peers that are installed: `cargo bench --bench nbd -- --help`.
//!
//! Every round measures every server on every workload in turn, so that a machine whose speed drifts does so for all; ratios
//! are taken within a round, and medians over rounds are printed. The load generator speaks plain NBD over a unix socket and
//! checks what it reads. CPU is the server's own, all of its processes together.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::cast_precision_loss, missing_docs, reason = "a benchmark")]

mod load;
mod report;
mod servers;

use std::path::PathBuf;
use std::time::Duration;

use load::{Cache, Workload};
use report::Report;
use servers::{Format, SERVERS, Server};

const HELP: &str = "\
Usage: cargo bench --bench nbd -- [--rounds N] [--seconds N] [--size MIB] [--only TEXT] [--server TEXT] [--dir DIR] [--json FILE]

  --rounds N    rounds, each with every server and workload (default 3)
  --seconds N   length of one measurement (default 2)
  --size MIB    size of the disk (default 512)
  --only TEXT   only workloads whose name contains TEXT, or one that is named so
  --server TEXT only servers whose name contains TEXT
  --dir DIR     where the disks are made (default: the temporary directory)
  --json FILE   write every measurement there, too
";

/// Every workload. `qcow2` ones use allocated clusters of an image made by qemu-img; `empty qcow2` ones allocate all the time.
const WORKLOADS: &[Workload] = &[
    Workload::new("4k randread qd1", Format::Raw, 4096, 1, 1, 0),
    Workload::new("4k randread qd32", Format::Raw, 4096, 32, 1, 0),
    Workload::new("4k randread qd32 x2", Format::Raw, 4096, 32, 2, 0),
    Workload::new("4k randwrite qd32", Format::Raw, 4096, 32, 1, 100),
    Workload::new("4k 70/30 qd32", Format::Raw, 4096, 32, 1, 30),
    Workload::sequential("256k read qd8", Format::Raw, 256 << 10, 8, 0),
    Workload::sequential("256k write qd8", Format::Raw, 256 << 10, 8, 100),
    Workload::new("cold 4k randread qd1", Format::Raw, 4096, 1, 1, 0).cache(Cache::Cold),
    Workload::new("cold 4k randread qd32", Format::Raw, 4096, 32, 1, 0).cache(Cache::Cold),
    Workload::new("cold 4k 70/30 qd32", Format::Raw, 4096, 32, 1, 30).cache(Cache::Cold),
    Workload::sequential("cold 256k read qd8", Format::Raw, 256 << 10, 8, 0).cache(Cache::Cold),
    Workload::new("direct 4k randread qd1", Format::Raw, 4096, 1, 1, 0).cache(Cache::Direct),
    Workload::new("direct 4k randread qd32", Format::Raw, 4096, 32, 1, 0).cache(Cache::Direct),
    Workload::new("direct 4k randwrite qd32", Format::Raw, 4096, 32, 1, 100).cache(Cache::Direct),
    Workload::sequential("direct 256k read qd8", Format::Raw, 256 << 10, 8, 0).cache(Cache::Direct),
    Workload::new("qcow2 4k randread qd32", Format::Qcow2, 4096, 32, 1, 0),
    Workload::new("qcow2 4k randread qd32 x2", Format::Qcow2, 4096, 32, 2, 0),
    Workload::new("qcow2 4k randwrite qd32", Format::Qcow2, 4096, 32, 1, 100),
    Workload::new("empty qcow2 4k randwrite qd32", Format::EmptyQcow2, 4096, 32, 1, 100),
    Workload::new("empty qcow2 4k randwrite qd32 x2", Format::EmptyQcow2, 4096, 32, 2, 100),
];

struct Options {
    rounds: usize,
    seconds: u64,
    size: u64,
    only: String,
    server: String,
    dir: PathBuf,
    json: Option<PathBuf>,
}

fn main() {
    let Some(options) = options() else { return print!("{HELP}") };
    let dir = tempfile::Builder::new().prefix("doorless-bench").tempdir_in(&options.dir).unwrap();
    let raw = dir.path().join("disk.raw");
    load::make_disk(&raw, options.size << 20);
    let qcow2 = servers::convert(&raw, &dir.path().join("disk.qcow2"));
    if qcow2.is_none() {
        println!("left out: qcow2 workloads (qemu-img is not installed)");
    }
    let empty = dir.path().join("empty.qcow2");
    let named = |server: &&Server| server.name.contains(&options.server);
    let mut servers: Vec<&Server> = SERVERS.iter().filter(named).filter(|server| server.is_there()).collect();
    for missing in SERVERS.iter().filter(|server| !server.is_there()) {
        println!("left out: {} (not installed)", missing.name);
    }
    let exactly = WORKLOADS.iter().any(|workload| workload.name == options.only);
    let wanted = |workload: &&Workload| {
        if exactly { workload.name == options.only } else { workload.name.contains(&options.only) }
    };
    let mut report = Report::default();
    for round in 1..=options.rounds {
        for workload in WORKLOADS.iter().filter(wanted) {
            let image = match workload.format {
                Format::Raw => Some(&raw),
                Format::Qcow2 => qcow2.as_ref(),
                Format::EmptyQcow2 => qcow2.as_ref().map(|_| &empty),
            };
            let Some(image) = image else { continue };
            if workload.cache == Cache::Warm && workload.format != Format::EmptyQcow2 {
                load::warm(image, workload);
            }
            // Each is the first one at times: it may find what the last workload left.
            servers.rotate_left(1);
            for server in servers.iter().filter(|server| server.reads(workload.format)) {
                if workload.format == Format::EmptyQcow2 {
                    servers::make_empty(&empty);
                }
                let direct = workload.cache == Cache::Direct;
                if !server.takes_part(workload.cache != Cache::Warm, direct) {
                    continue;
                }
                let running = server.start(image, workload.format, dir.path(), workload.writes == 0, direct);
                let measured = load::measure(&running, workload, image, Duration::from_secs(options.seconds));
                report.add(round, workload.name, server.name, measured);
                eprint!("\rround {round} of {}: {:<28} {:<22}", options.rounds, workload.name, server.name);
            }
        }
    }
    eprintln!("\r{:70}", "");
    report.print();
    if let Some(path) = options.json {
        std::fs::write(path, report.json()).unwrap();
    }
}

fn options() -> Option<Options> {
    let mut options = Options {
        rounds: 3,
        seconds: 2,
        size: 512,
        only: String::new(),
        server: String::new(),
        dir: std::env::temp_dir(),
        json: None,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        // Cargo adds this to every benchmark.
        if argument == "--bench" {
            continue;
        }
        let value = arguments.next()?;
        match argument.as_str() {
            "--rounds" => options.rounds = value.parse().ok()?,
            "--seconds" => options.seconds = value.parse().ok()?,
            "--size" => options.size = value.parse().ok()?,
            "--only" => options.only = value,
            "--server" => options.server = value,
            "--dir" => options.dir = value.into(),
            "--json" => options.json = Some(value.into()),
            _ => return None,
        }
    }
    Some(options)
}
