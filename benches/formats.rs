// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Speed of image formats beside QEMU's: `cargo bench --bench formats [-- TEXT]` (only cases whose name contains TEXT).
//!
//! Over NBD: writes that allocate, and reads of what is compressed, until a flush is answered. By the image tool: conversions.
//! Every round runs both sides; the medians of times and of the ratios within a round are printed.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::cast_precision_loss, missing_docs, reason = "a benchmark")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

const OURS: &str = env!("CARGO_BIN_EXE_doorless");
const ROUNDS: usize = 5;
/// Requests that are under way at once.
const DEPTH: usize = 8;
/// Bytes of the disk that is converted and read compressed.
const DISK: usize = 256 << 20;

#[derive(Clone, Copy)]
enum Case {
    /// `count` writes of `len` bytes, each `step` after the last, into an empty image.
    Allocate { format: &'static str, count: u64, len: u32, step: u64 },
    /// `count` reads of 4 KiB anywhere in a compressed qcow2 image.
    ReadCompressed { count: u64 },
    /// A directory of `files` files as a disk, from the start of the server to the answer to its first read.
    OpenDirectory { files: usize },
    /// A conversion from one format to another, with more arguments.
    Convert { from: &'static str, to: &'static str, more: &'static [&'static str] },
}

const CASES: &[(&str, Case)] = &[
    ("vdi, 64k every 1M", Case::Allocate { format: "vdi", count: 500, len: 65536, step: 1 << 20 }),
    ("vpc, 64k every 1M", Case::Allocate { format: "vpc", count: 500, len: 65536, step: 1 << 20 }),
    ("vmdk, 64k every 1M", Case::Allocate { format: "vmdk", count: 500, len: 65536, step: 1 << 20 }),
    ("vpc, sequential 4k", Case::Allocate { format: "vpc", count: 8192, len: 4096, step: 4096 }),
    ("vmdk, sequential 4k", Case::Allocate { format: "vmdk", count: 8192, len: 4096, step: 4096 }),
    ("compressed qcow2, random 4k reads", Case::ReadCompressed { count: 20_000 }),
    ("vvfat, opening 3,500 files of one directory", Case::OpenDirectory { files: 3500 }),
    ("convert qcow2 to qcow2 -c", Case::Convert { from: "qcow2", to: "qcow2", more: &["-c"] }),
    ("convert raw to qcow2, on disk", Case::Convert { from: "raw", to: "qcow2", more: &["-t", "writeback"] }),
    ("convert raw to qcow2, in the cache", Case::Convert { from: "raw", to: "qcow2", more: &["-t", "unsafe"] }),
    (
        "convert raw to streamOptimized",
        Case::Convert { from: "raw", to: "vmdk", more: &["-o", "subformat=streamOptimized"] },
    ),
];

fn main() {
    if Command::new("qemu-nbd").arg("-V").output().is_err() {
        return println!("left out: QEMU is not installed");
    }
    let only = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    let dir = tempfile::tempdir().unwrap();
    make_disks(dir.path());
    println!("{:<44} {:>12} {:>12} {:>10}", "seconds, medians", "doorless", "QEMU", "QEMU takes");
    for (name, case) in CASES.iter().filter(|(name, _)| name.contains(&only)) {
        let (mut ours, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let (a, b) = (case.run(dir.path(), true), case.run(dir.path(), false));
            ours.push(a);
            theirs.push(b);
            ratios.push(b / a);
        }
        let ratio = median(&mut ratios);
        let (least, most) = (ratios[0], ratios[ROUNDS - 1]);
        println!(
            "{name:<44} {:>12.3} {:>12.3} {ratio:>8.2} x ({least:.2} to {most:.2})",
            median(&mut ours),
            median(&mut theirs)
        );
    }
}

impl Case {
    /// Seconds.
    fn run(self, dir: &Path, is_ours: bool) -> f64 {
        match self {
            Case::Allocate { format, count, len, step } => {
                let image = dir.join("empty");
                qemu_img(&["create", "-q", "-f", format, image.to_str().unwrap(), "1G"]);
                let served = Served::start(dir, &["--cache=writeback", "-f", format, image.to_str().unwrap()], is_ours);
                served.time(&(0..count).map(|index| (1, index * step, len)).collect::<Vec<_>>())
            }
            Case::ReadCompressed { count } => {
                let image = dir.join("disk.packed");
                let served = Served::start(dir, &["-r", "-f", "qcow2", image.to_str().unwrap()], is_ours);
                // Numerical Recipes' generator: the same places every time.
                let places = std::iter::successors(Some(1u64), |place| {
                    Some(place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407))
                });
                let places = places.map(|place| (place >> 20) % (DISK as u64 / 4096) * 4096);
                let count = usize::try_from(count).unwrap();
                served.time(&places.take(count).map(|place| (0, place, 4096)).collect::<Vec<_>>())
            }
            Case::OpenDirectory { files } => {
                let tree = make_tree(dir, files);
                let start = Instant::now();
                Served::start(dir, &["-r", "-f", "raw", &format!("fat:{}", tree.display())], is_ours)
                    .time(&[(0, 0, 512)]);
                start.elapsed().as_secs_f64()
            }
            Case::Convert { from, to, more } => {
                let (source, target) = (dir.join(format!("disk.{from}")), dir.join("converted"));
                let _ = std::fs::remove_file(&target);
                let (program, first): (_, &[&str]) = if is_ours { (OURS, &["img"]) } else { ("qemu-img", &[]) };
                let start = Instant::now();
                let mut command = Command::new(program);
                command.args(first).args(["convert", "-q", "-f", from, "-O", to]).args(more).arg(source).arg(target);
                assert!(command.stdout(Stdio::null()).env_remove("RUST_BACKTRACE").status().unwrap().success());
                start.elapsed().as_secs_f64()
            }
        }
    }
}

/// A disk that compresses to about half, as raw, as qcow2, and compressed.
fn make_disks(dir: &Path) {
    let mut state = 1u64;
    let mut words = [[0u8; 16]; 256];
    for byte in words.iter_mut().flatten() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        *byte = state.to_be_bytes()[0];
    }
    let mut disk = Vec::with_capacity(DISK);
    while disk.len() < DISK {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        disk.extend(words[usize::from(state.to_be_bytes()[0])]);
    }
    let name = |extension: &str| dir.join(format!("disk.{extension}")).to_str().unwrap().to_owned();
    std::fs::write(name("raw"), &disk).unwrap();
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &name("raw"), &name("qcow2")]);
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", &name("raw"), &name("packed")]);
}

/// A directory with so many files in one below it, if it is not there yet.
fn make_tree(dir: &Path, files: usize) -> PathBuf {
    let (tree, parent) = (dir.join("tree"), dir.join("tree/files"));
    if !tree.exists() {
        std::fs::create_dir_all(&parent).unwrap();
        for index in 0..files {
            std::fs::write(parent.join(format!("a file with a long name, {index}.txt")), index.to_string()).unwrap();
        }
    }
    tree
}

fn qemu_img(arguments: &[&str]) {
    assert!(Command::new("qemu-img").args(arguments).stdout(Stdio::null()).status().unwrap().success());
}

/// A server with one connection to it.
struct Served {
    child: Child,
    socket: PathBuf,
    connection: UnixStream,
}

impl Served {
    /// With arguments that both understand.
    fn start(dir: &Path, arguments: &[&str], is_ours: bool) -> Served {
        let socket = dir.join("socket");
        let _ = std::fs::remove_file(&socket);
        let (program, first): (_, &[&str]) = if is_ours { (OURS, &["nbd"]) } else { ("qemu-nbd", &[]) };
        let mut command = Command::new(program);
        command.args(first).args(["-t", "-k"]).arg(&socket).args(arguments);
        let child = command.stdout(Stdio::null()).env_remove("RUST_BACKTRACE").spawn().unwrap();
        let mut connection = loop {
            if let Ok(connection) = UnixStream::connect(&socket) {
                break connection;
            }
            std::thread::yield_now();
        };
        // Fixed newstyle without zeroes at the end, and NBD_OPT_EXPORT_NAME.
        let mut greeting = [0; 18];
        connection.read_exact(&mut greeting).unwrap();
        connection.write_all(&[&[0, 0, 0, 3][..], b"IHAVEOPT", &[0, 0, 0, 1, 0, 0, 0, 0]].concat()).unwrap();
        connection.read_exact(&mut [0; 10]).unwrap();
        Served { child, socket, connection }
    }

    /// Seconds until all requests (command, offset, length) and a flush are answered.
    fn time(mut self, requests: &[(u8, u64, u32)]) -> f64 {
        let data: Vec<u8> = (0..65536u32).map(|at| ((at * 31) >> 3).to_be_bytes()[3] | 1).collect();
        let mut answer = vec![0; 65536];
        let start = Instant::now();
        let (mut sent, mut answered) = (0, 0);
        let all = requests.iter().copied().chain([(3, 0, 0)]);
        for (command, offset, len) in all {
            let is_flush = command == 3;
            // The flush waits for all that came before.
            while sent - answered == DEPTH || is_flush && answered < sent {
                self.answer(requests, &mut answer);
                answered += 1;
            }
            let mut message = vec![0x25, 0x60, 0x95, 0x13, 0, 0, 0, command];
            message.extend((sent as u64).to_be_bytes());
            message.extend(offset.to_be_bytes());
            message.extend(len.to_be_bytes());
            if command == 1 {
                message.extend(&data[..len as usize]);
            }
            self.connection.write_all(&message).unwrap();
            sent += 1;
        }
        self.answer(requests, &mut answer);
        start.elapsed().as_secs_f64()
    }

    fn answer(&mut self, requests: &[(u8, u64, u32)], data: &mut [u8]) {
        let mut header = [0; 16];
        self.connection.read_exact(&mut header).unwrap();
        assert_eq!(header[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
        let index = usize::try_from(u64::from_be_bytes(*header.last_chunk().unwrap())).unwrap();
        if let Some(&(0, _, len)) = requests.get(index) {
            self.connection.read_exact(&mut data[..len as usize]).unwrap();
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
