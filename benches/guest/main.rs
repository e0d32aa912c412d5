// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Speed over vhost-user-blk with a real guest, beside qemu-storage-daemon: `cargo bench --bench guest`.
//!
//! The guest is emulated in software, and takes most of the time of every request: what is compared is the server's CPU time for
//! each. Rounds are interleaved; a round boots one guest for each server.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::cast_precision_loss, missing_docs, reason = "a benchmark")]

#[path = "../../tests/guest/mod.rs"]
mod guest;
#[path = "../../tests/harness/mod.rs"]
mod harness;
#[allow(dead_code, reason = "it has the servers of NBD, too")]
#[path = "../nbd/servers.rs"]
mod servers;

use std::path::Path;
use std::process::Command;

use guest::Kernel;
use harness::Scratch;
use servers::{Format, VHOST_USER};

const ROUNDS: usize = 3;
const SIZE: usize = 256 << 20;
const REQUESTS: u32 = 40_000;
const DEPTH: u32 = 32;

fn main() {
    let Some(kernel) = Kernel::find() else { return println!("left out: no kernel for a guest (make judges)") };
    let scratch = Scratch::new();
    let (disk, load) = (scratch.path("disk.raw"), scratch.path("load"));
    std::fs::write(&disk, harness::noise(SIZE, 5)).unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/guest/load.rs");
    let mut compile = Command::new("rustc");
    compile.args(["--edition=2024", "-O", "-C", "target-feature=+crt-static", "-o"]).arg(&load).arg(source);
    assert!(compile.status().unwrap().success());
    let len = std::fs::metadata(&load).unwrap().len();
    let mut results = vec![Vec::new(); VHOST_USER.len()];
    for _ in 0..ROUNDS {
        for (server, results) in VHOST_USER.iter().zip(&mut results).filter(|(server, _)| server.is_there()) {
            let dir = Scratch::new();
            let running = server.start(&disk, Format::Raw, &dir.path(""), true, false);
            let script =
                format!("head -c {len} /dev/vdb > /load; chmod +x /load; /load /dev/vda {SIZE} {DEPTH} {REQUESTS}");
            let (socket, program) = (running.socket.to_str().unwrap(), load.to_str().unwrap());
            let before = running.cpu();
            let said = guest::run_vhost_user_beside(&kernel, &dir, socket, program, &script);
            let cpu = (running.cpu() - before).as_secs_f64() * 1e6 / f64::from(REQUESTS);
            let took = said.split("took ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<f64>().ok()).unwrap();
            results.push((f64::from(REQUESTS) / took * 1e3, cpu));
        }
    }
    println!("{:<22} {:>12} {:>16}", "4k randread qd32", "requests/s", "CPU each, us");
    for (server, results) in VHOST_USER.iter().zip(&mut results).filter(|(_, results)| !results.is_empty()) {
        let median = |value: fn(&(f64, f64)) -> f64| {
            let mut values: Vec<f64> = results.iter().map(value).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        println!("{:<22} {:>12.0} {:>16.2}", server.name, median(|result| result.0), median(|result| result.1));
    }
}
