// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What qcow2's tables cost: `cargo bench --bench qcow2`.
//!
//! One look into the mapping when its table is in memory (a random cluster of 512 MiB), and a check of 100 GiB, beside qemu-img's
//! where it is installed. All clusters are stored, and the files are sparse.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::cast_precision_loss, missing_docs, reason = "a benchmark")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use block::{
    Ask, Children, Detail, Graph, Host, NodeAccess, NodeSpec, OpenRequest, Options, Target, Wait, driver_named,
};

const CLUSTER: u64 = 65536;
const CLUSTERS: u64 = 8192;
const COPIED: u64 = 1 << 63;
const LOOKUPS: u64 = 2_000_000;
const ROUNDS: usize = 9;

fn main() {
    let image = tempfile::NamedTempFile::new().unwrap();
    full_image(image.as_file(), CLUSTERS);
    for writable in [false, true] {
        let mut times: Vec<f64> = (0..ROUNDS).map(|_| round(image.as_file(), writable)).collect();
        times.sort_by(f64::total_cmp);
        let (mode, median) = (if writable { "read-write" } else { "read-only" }, times[ROUNDS / 2]);
        println!("a look, {mode:<10} {median:>8.1} ns (median of {ROUNDS}, best {:.1})", times[0]);
    }
    let image = tempfile::NamedTempFile::new().unwrap();
    full_image(image.as_file(), (100 << 30) / CLUSTER);
    let programs: [(&str, &[&str]); 2] = [(env!("CARGO_BIN_EXE_doorless"), &["img"]), ("qemu-img", &[])];
    let mut times = [const { Vec::new() }; 2];
    for _ in 0..ROUNDS {
        for (times, (program, arguments)) in times.iter_mut().zip(programs) {
            times.extend(check(program, arguments, image.path()));
        }
    }
    let [ours, theirs] = times;
    let mut ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(ours, theirs)| theirs / ours).collect();
    for (name, mut seconds) in [("doorless", ours), ("qemu-img", theirs)] {
        seconds.sort_by(f64::total_cmp);
        match seconds.get(ROUNDS / 2) {
            Some(median) => println!("check of 100 GiB, {name} {:>8.1} ms", median * 1e3),
            None => println!("left out: {name} is not installed"),
        }
    }
    ratios.sort_by(f64::total_cmp);
    if let Some(ratio) = ratios.get(ROUNDS / 2) {
        println!("qemu-img takes {ratio:.2} x as long");
    }
}

/// Seconds of one check; `None` if there is no such program.
fn check(program: &str, arguments: &[&str], image: &Path) -> Option<f64> {
    let start = Instant::now();
    let mut command = Command::new(program);
    command.args(arguments).args(["check", "-f", "qcow2"]).arg(image).stdout(Stdio::null());
    // With it, symbols are read before confinement, which takes as long as the check.
    let status = command.env_remove("RUST_BACKTRACE").status().ok()?;
    assert!(status.success());
    Some(start.elapsed().as_secs_f64())
}

/// An image of `clusters` clusters, a multiple of 8192. After the header come the refcount table, its blocks, the L1 table and
/// the L2 tables; then data, whose order in the file is another one.
fn full_image(image: &File, clusters: u64) {
    let (blocks, tables) = layout(clusters);
    let (l1, l2) = (2 + blocks, 3 + blocks);
    let put = |at: u64, bytes: &[u8]| image.write_all_at(bytes, at).unwrap();
    put(0, b"QFI\xfb");
    for (at, value) in [(4, 3), (20, 16), (36, u32::try_from(tables).unwrap()), (56, 1), (96, 4), (100, 104)] {
        put(at, &value.to_be_bytes());
    }
    for (at, value) in [(24, clusters * CLUSTER), (40, l1 * CLUSTER), (48, CLUSTER)] {
        put(at, &value.to_be_bytes());
    }
    let words = |words: &mut dyn Iterator<Item = u64>| words.flat_map(u64::to_be_bytes).collect::<Vec<u8>>();
    put(CLUSTER, &words(&mut (0..blocks).map(|block| (2 + block) * CLUSTER)));
    put(2 * CLUSTER, &[0, 1].repeat(usize::try_from(l2 + tables + clusters).unwrap()));
    put(l1 * CLUSTER, &words(&mut (0..tables).map(|table| ((l2 + table) * CLUSTER) | COPIED)));
    put(
        l2 * CLUSTER,
        &words(&mut (0..clusters).map(|index| ((l2 + tables + index * 3 % clusters) * CLUSTER) | COPIED)),
    );
    image.set_len((l2 + tables + clusters) * CLUSTER).unwrap();
}

/// Its refcount blocks and its L2 tables.
fn layout(clusters: u64) -> (u64, u64) {
    let tables = clusters / (CLUSTER / 8);
    let mut blocks = 1;
    while blocks * CLUSTER / 2 < 3 + blocks + tables + clusters {
        blocks += 1;
    }
    (blocks, tables)
}

/// Nanoseconds of one look.
fn round(image: &File, writable: bool) -> f64 {
    let access = NodeAccess { writable, unmap: false };
    let file = Graph::new().add(NodeSpec {
        name: Some("file".into()),
        driver: "file",
        access,
        host: Some(Host::fixed(image.try_clone().unwrap())),
        filename: "image".into(),
        children: [].into(),
        detached: [].into(),
        options: [].into(),
    });
    let mut children = Children::new();
    children.insert("file", file.unwrap());
    let driver = (driver_named("qcow2").unwrap().open)(OpenRequest {
        descriptor: None,
        files: Vec::new(),
        filename: String::new(),
        children,
        detached: [].into(),
        options: Options::new(),
        writable,
        node_name: "image".into(),
        alarm: block::Alarm::default(),
        facts_only: false,
    });
    let driver = driver.unwrap();
    let ask = Ask { detail: Detail::Place, wait: Wait::Allowed };
    let (blocks, tables) = layout(CLUSTERS);
    let place = |index: u64| (3 + blocks + tables + index * 3 % CLUSTERS) * CLUSTER;
    let look = |index: u64| match driver.map(index * CLUSTER + 4096, 4096, ask).unwrap().target {
        Target::Data { offset, .. } => assert_eq!(offset, place(index) + 4096),
        _ => unreachable!("all of it is stored"),
    };
    (0..CLUSTERS).for_each(look);
    let start = Instant::now();
    let mut index = 1;
    for _ in 0..LOOKUPS {
        index = (index * 4093 + 17) % CLUSTERS;
        look(index);
    }
    start.elapsed().as_secs_f64() * 1e9 / LOOKUPS as f64
}
