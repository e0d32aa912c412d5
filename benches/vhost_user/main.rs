// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Speed over vhost-user-blk without a guest, beside qemu-storage-daemon: `cargo bench --bench vhost_user -- --help`.
//!
//! As in the benchmark of NBD, every round measures every server on every workload in turn, and ratios are taken within a
//! round. The load is a front end in this process that keeps as many requests under way as the workload says.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::cast_precision_loss, missing_docs, reason = "a benchmark")]

#[path = "../../tests/front_end/mod.rs"]
mod front_end;
mod load;
#[path = "../nbd/report.rs"]
mod report;
#[allow(dead_code, reason = "it has the servers of NBD, too")]
#[path = "../nbd/servers.rs"]
mod servers;

use std::time::Duration;

use load::Workload;
use report::Report;
use servers::{Format, VHOST_USER};

const HELP: &str = "\
Usage: cargo bench --bench vhost_user -- [--rounds N] [--seconds N] [--size MIB] [--only TEXT] [--json FILE]

  --rounds N    rounds, each with every server and workload (default 3)
  --seconds N   length of one measurement (default 2)
  --size MIB    size of the disk (default 512)
  --only TEXT   only workloads whose name contains TEXT
  --json FILE   write every measurement there, too
";

const WORKLOADS: &[Workload] = &[
    Workload { name: "4k randread qd1", format: Format::Raw, depth: 1, writes: false },
    Workload { name: "4k randread qd32", format: Format::Raw, depth: 32, writes: false },
    Workload { name: "4k randwrite qd1", format: Format::Raw, depth: 1, writes: true },
    Workload { name: "4k randwrite qd32", format: Format::Raw, depth: 32, writes: true },
    Workload { name: "qcow2 4k randread qd32", format: Format::Qcow2, depth: 32, writes: false },
];

struct Options {
    rounds: usize,
    seconds: u64,
    size: u64,
    only: String,
    json: Option<String>,
}

fn main() {
    let Some(options) = options() else { return print!("{HELP}") };
    let dir = tempfile::Builder::new().prefix("doorless-bench").tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    load::make_disk(&raw, options.size << 20);
    let qcow2 = servers::convert(&raw, &dir.path().join("disk.qcow2"));
    for missing in VHOST_USER.iter().filter(|server| !server.is_there()) {
        println!("left out: {} (not installed)", missing.name);
    }
    let mut report = Report::default();
    for round in 1..=options.rounds {
        for workload in WORKLOADS.iter().filter(|workload| workload.name.contains(&options.only)) {
            let image = if workload.format == Format::Raw { Some(&raw) } else { qcow2.as_ref() };
            let Some(image) = image else { continue };
            for server in VHOST_USER.iter().filter(|server| server.is_there()) {
                let running = server.start(image, workload.format, dir.path(), !workload.writes, false);
                let measured =
                    load::measure(&running, workload, options.size << 20, Duration::from_secs(options.seconds));
                report.add(round, workload.name, server.name, measured);
            }
        }
    }
    report.print();
    if let Some(path) = options.json {
        std::fs::write(path, report.json()).unwrap();
    }
}

fn options() -> Option<Options> {
    let mut options = Options { rounds: 3, seconds: 2, size: 512, only: String::new(), json: None };
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(argument) = arguments.next() {
        let value = arguments.next()?;
        match argument.as_str() {
            "--rounds" => options.rounds = value.parse().ok()?,
            "--seconds" => options.seconds = value.parse().ok()?,
            "--size" => options.size = value.parse().ok()?,
            "--only" => options.only = value,
            "--json" => options.json = Some(value),
            _ => return None,
        }
    }
    Some(options)
}
