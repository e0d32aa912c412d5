// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Many exports and clients in one daemon, and what one client can do to another: `cargo bench --bench scale -- --help`.
//!
//! Every round measures every size, and every neighbour, in turn; ratios are taken within a round, and medians over rounds are
//! printed. CPU is the daemon's own, from its threads' schedstat, in nanoseconds.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::cast_precision_loss, missing_docs, reason = "a benchmark")]

mod client;
mod crowd;
mod neighbours;

use std::time::Duration;

use crowd::Crowd;
use neighbours::Neighbour;

const HELP: &str = "\
Usage: cargo bench --bench scale -- [--rounds N] [--seconds N] [--requests N] [--only crowd|neighbours]

  --rounds N    rounds, each with every size and every neighbour (default 5)
  --seconds N   how long a client's latency is looked at (default 3)
  --requests N  requests of a measurement of CPU (default 400000)
  --only PART   cost of many exports and clients, or latency beside bad ones
";

/// Exports; clients are twice as many.
const SIZES: [usize; 3] = [10, 100, 500];
/// What is told of a crowd, in the order of the table.
const FIGURES: [fn(&Crowd) -> f64; 4] = [|it| it.cpu, |it| it.per_export, |it| it.per_client, |it| it.set_up];
const TARGET_CROWD: f64 = 1.2;
const TARGET_NEIGHBOUR: f64 = 2.0;

struct Options {
    rounds: usize,
    seconds: u64,
    requests: usize,
    only: String,
}

fn main() {
    let Some(options) = options() else { return print!("{HELP}") };
    let load = || std::fs::read_to_string("/proc/loadavg").unwrap().split(' ').next().unwrap().to_owned();
    println!("load average at first: {}", load());
    // A client is a descriptor here, and several in the daemon.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let all = rustix::process::Rlimit { current: limit.maximum, ..limit };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, all).unwrap();
    if options.only != "neighbours" {
        crowds(&options);
    }
    if options.only != "crowd" {
        beside(&options);
    }
    println!("load average at last: {}", load());
}

fn crowds(options: &Options) {
    let rounds: Vec<[Crowd; SIZES.len()]> =
        (0..options.rounds).map(|_| SIZES.map(|exports| Crowd::measure(exports, options.requests))).collect();
    println!(
        "\n{:>8} {:>8} {:>14} {:>12} {:>12} {:>14}",
        "exports", "clients", "CPU us/request", "KiB/export", "KiB/client", "set-up us/item"
    );
    let of = |index: usize, value: fn(&Crowd) -> f64| median(rounds.iter().map(|round| value(&round[index])).collect());
    for (index, exports) in SIZES.into_iter().enumerate() {
        let [cpu, per_export, per_client, set_up] = FIGURES.map(|figure| of(index, figure));
        println!("{exports:>8} {:>8} {cpu:>14.2} {per_export:>12.1} {per_client:>12.1} {set_up:>14.0}", 2 * exports);
    }
    let last = SIZES.len() - 1;
    for (what, figure) in ["CPU per request", "memory per export", "memory per client"].into_iter().zip(FIGURES) {
        let ratio = median(rounds.iter().map(|round| figure(&round[last]) / figure(&round[0])).collect());
        println!("{what}, {} exports against {}: {ratio:.2} x{}", SIZES[last], SIZES[0], verdict(ratio, TARGET_CROWD));
    }
}

fn beside(options: &Options) {
    let length = Duration::from_secs(options.seconds);
    println!("\n{:<34} {:>10} {:>10} {:>14}", "a client at depth 1, beside", "p50 us", "p99 us", "p99 / alone");
    let mut rounds = Vec::new();
    for _ in 0..options.rounds {
        rounds.push(Neighbour::ALL.map(|neighbour| neighbours::latency(neighbour, length)));
    }
    for (index, neighbour) in Neighbour::ALL.into_iter().enumerate() {
        let of = |which: usize| median(rounds.iter().map(|round| round[index][which]).collect());
        let ratio = median(rounds.iter().map(|round| round[index][1] / round[0][1]).collect());
        let against = if neighbour.is_bad() { verdict(ratio, TARGET_NEIGHBOUR) } else { "" };
        println!("{:<34} {:>10.1} {:>10.1} {ratio:>12.2} x{against}", neighbour.name(), of(0), of(1));
    }
}

fn verdict(ratio: f64, target: f64) -> &'static str {
    if ratio <= target { "" } else { "   MISSES THE TARGET" }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn options() -> Option<Options> {
    let mut options = Options { rounds: 5, seconds: 3, requests: 400_000, only: String::new() };
    // Cargo adds `--bench` to every benchmark.
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(argument) = arguments.next() {
        let value = arguments.next()?;
        match argument.as_str() {
            "--rounds" => options.rounds = value.parse().ok()?,
            "--seconds" => options.seconds = value.parse().ok()?,
            "--requests" => options.requests = value.parse().ok()?,
            "--only" if value == "crowd" || value == "neighbours" => options.only = value,
            _ => return None,
        }
    }
    Some(options)
}
