// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What clients get is what QEMU reads, and what they write is there: judged by qemu-img, libnbd and qemu-io.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::path::Path;
use std::process::{Command, Stdio};

use harness::{Scratch, Serve, TestDaemon, judges, noise, python_with, run, run_in};
use serde_json::Value;

/// A kind of image: its name, and the commands that make `image.qcow2` in a directory that has `content.raw` (8 MiB of noise
/// with holes).
const KINDS: &[(&str, &[&[&str]])] = &[
    ("v2", &[&["qemu-img", "convert", "-O", "qcow2", "-o", "compat=0.10", "content.raw", "image.qcow2"]]),
    ("v3", &[&["qemu-img", "convert", "-O", "qcow2", "content.raw", "image.qcow2"]]),
    (
        "clusters of 512 bytes",
        &[&["qemu-img", "convert", "-O", "qcow2", "-o", "cluster_size=512", "content.raw", "image.qcow2"]],
    ),
    (
        "clusters of 4 KiB",
        &[&["qemu-img", "convert", "-O", "qcow2", "-o", "cluster_size=4k", "content.raw", "image.qcow2"]],
    ),
    (
        "clusters of 2 MiB",
        &[&["qemu-img", "convert", "-O", "qcow2", "-o", "cluster_size=2M", "content.raw", "image.qcow2"]],
    ),
    ("zlib", &[&["qemu-img", "convert", "-c", "-O", "qcow2", "content.raw", "image.qcow2"]]),
    (
        "zstd",
        &[&["qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", "content.raw", "image.qcow2"]],
    ),
    (
        "extended L2 entries",
        &[
            &["qemu-img", "create", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=128k", "image.qcow2", "8M"],
            &[
                "qemu-io",
                "-c",
                "write -P 7 4k 12k",
                "-c",
                "write -P 8 1M 300k",
                "-c",
                "write -z 1040k 8k",
                "image.qcow2",
            ],
        ],
    ),
    (
        "a chain of three",
        &[
            &["qemu-img", "create", "-f", "qcow2", "-b", "content.raw", "-F", "raw", "middle.qcow2", "10M"],
            &["qemu-io", "-c", "write -P 3 1M 100k", "-c", "write -z 2M 128k", "middle.qcow2"],
            &["qemu-img", "create", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", "image.qcow2", "12M"],
            &["qemu-io", "-c", "write -P 4 1100k 64k", "-c", "write -P 5 11M 64k", "image.qcow2"],
        ],
    ),
    (
        "an external data file",
        &[&["qemu-img", "convert", "-O", "qcow2", "-o", "data_file=data.raw", "content.raw", "image.qcow2"]],
    ),
    (
        "a raw external data file",
        &[&[
            "qemu-img",
            "convert",
            "-O",
            "qcow2",
            "-o",
            "data_file=data.raw,data_file_raw=on",
            "content.raw",
            "image.qcow2",
        ]],
    ),
    (
        "zero clusters",
        &[
            &["qemu-img", "convert", "-O", "qcow2", "content.raw", "image.qcow2"],
            &["qemu-io", "-c", "write -z 1M 256k", "-c", "write -z -u 2M 256k", "-c", "discard 3M 128k", "image.qcow2"],
        ],
    ),
    (
        "refcounts of 1 bit",
        &[&["qemu-img", "convert", "-O", "qcow2", "-o", "refcount_bits=1", "content.raw", "image.qcow2"]],
    ),
    (
        "refcounts of 64 bits",
        &[&["qemu-img", "convert", "-O", "qcow2", "-o", "refcount_bits=64", "content.raw", "image.qcow2"]],
    ),
    (
        "snapshots inside",
        &[
            &["qemu-img", "convert", "-O", "qcow2", "content.raw", "image.qcow2"],
            &["qemu-img", "snapshot", "-c", "one", "image.qcow2"],
            &["qemu-io", "-c", "write -P 9 64k 512k", "image.qcow2"],
            &["qemu-img", "snapshot", "-c", "two", "image.qcow2"],
            &["qemu-io", "-c", "write -P 10 128k 64k", "image.qcow2"],
        ],
    ),
    (
        "metadata preallocated",
        &[&["qemu-img", "create", "-f", "qcow2", "-o", "preallocation=metadata", "image.qcow2", "8M"]],
    ),
];

fn make(scratch: &Scratch, commands: &[&[&str]]) {
    let mut content = noise(8 << 20, 1);
    content[5 << 20..6 << 20].fill(0);
    std::fs::write(scratch.path("content.raw"), content).unwrap();
    for command in commands {
        let output = Command::new(command[0]).args(&command[1..]).current_dir(scratch.path("")).output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// `nbdinfo --map` in runs of data (0) and holes that read as zeroes (3).
fn nbd_map(uri: &str) -> Vec<(u64, u64, bool)> {
    let map: Value = serde_json::from_str(&run("nbdinfo", &["--map", "--json", uri])).unwrap();
    merged(map.as_array().unwrap().iter().map(|run| {
        (run["offset"].as_u64().unwrap(), run["length"].as_u64().unwrap(), run["type"].as_u64().unwrap() == 3)
    }))
}

/// `qemu-img map` in the same terms.
fn qemu_map(directory: &Path, image: &str) -> Vec<(u64, u64, bool)> {
    let map: Value = serde_json::from_str(&run_in(directory, "qemu-img", &["map", "--output=json", image])).unwrap();
    merged(map.as_array().unwrap().iter().map(|run| {
        let zero = run["zero"] == true && run["data"] == false;
        (run["start"].as_u64().unwrap(), run["length"].as_u64().unwrap(), zero)
    }))
}

fn merged(runs: impl Iterator<Item = (u64, u64, bool)>) -> Vec<(u64, u64, bool)> {
    let mut merged: Vec<(u64, u64, bool)> = Vec::new();
    for (start, len, zero) in runs {
        match merged.last_mut() {
            Some(last) if last.2 == zero => last.1 += len,
            _ => merged.push((start, len, zero)),
        }
    }
    merged
}

#[test]
fn every_kind_of_qcow2_reads_and_maps_as_qemu_says() {
    if !judges("every_kind_of_qcow2_reads_and_maps_as_qemu_says", &["qemu-img", "qemu-io", "nbdinfo"]) {
        return;
    }
    for (kind, commands) in KINDS {
        let scratch = Scratch::new();
        make(&scratch, commands);
        let image = scratch.name("image.qcow2");
        let serve = Serve::start(&["--read-only", "--socket", &scratch.name("s"), &image]);
        // QEMU looks for an external data file in the working directory.
        run_in(&scratch.path(""), "qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &serve.uri, &image]);
        assert_eq!(nbd_map(&serve.uri), qemu_map(&scratch.path(""), &image), "the map of {kind}");
        assert!(serve.interrupt().success());
    }
}

#[test]
fn raw_reads_and_maps_as_qemu_says() {
    if !judges("raw_reads_and_maps_as_qemu_says", &["qemu-img", "nbdinfo"]) {
        return;
    }
    let scratch = Scratch::new();
    make(
        &scratch,
        &[
            &["fallocate", "--punch-hole", "-o", "1MiB", "-l", "2MiB", "content.raw"],
            &["truncate", "-s", "+1000", "content.raw"],
        ],
    );
    let image = scratch.name("content.raw");
    let serve = Serve::start(&["--format", "raw", "--socket", &scratch.name("s"), &image]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &serve.uri, &image]);
    let qemu = run("qemu-img", &["map", "--output=json", "-f", "raw", &image]);
    let map: Value = serde_json::from_str(&qemu).unwrap();
    let runs = map.as_array().unwrap().iter();
    let runs =
        merged(runs.map(|run| (run["start"].as_u64().unwrap(), run["length"].as_u64().unwrap(), run["zero"] == true)));
    assert_eq!(nbd_map(&serve.uri), runs);
}

#[test]
fn nbdcopy_into_and_out_of_a_raw_export_round_trips() {
    if !judges("nbdcopy_into_and_out_of_a_raw_export_round_trips", &["nbdcopy", "cmp"]) {
        return;
    }
    let scratch = Scratch::new();
    make(&scratch, &[]);
    std::fs::write(scratch.path("disk.raw"), vec![0xff; 8 << 20]).unwrap();
    let serve = Serve::start(&["--format", "raw", "--socket", &scratch.name("s"), &scratch.name("disk.raw")]);
    run("nbdcopy", &["--flush", &scratch.name("content.raw"), &serve.uri]);
    run("cmp", &[&scratch.name("content.raw"), &scratch.name("disk.raw")]);
    run("nbdcopy", &[&serve.uri, &scratch.name("copy.raw")]);
    run("cmp", &[&scratch.name("content.raw"), &scratch.name("copy.raw")]);
}

#[test]
fn a_write_with_fua_is_there_after_the_daemon_is_killed() {
    if !judges("a_write_with_fua_is_there_after_the_daemon_is_killed", &["qemu-io"]) {
        return;
    }
    let scratch = Scratch::new();
    let path = scratch.path("disk.raw");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let mut daemon = TestDaemon::start();
    daemon.add_node("disk", "raw", std::fs::File::options().read(true).write(true).open(&path).unwrap(), false);
    daemon.start_nbd();
    daemon.export("disk", true);
    run("qemu-io", &["-f", "raw", "-c", "write -P 0xa5 -f 64k 64k", &daemon.uri("disk")]);
    let pid = rustix::process::Pid::from_raw(daemon.pid().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert!(!daemon.daemon.wait().unwrap().unwrap().success());
    let content = std::fs::read(&path).unwrap();
    assert!(content[64 << 10..128 << 10].iter().all(|&byte| byte == 0xa5));
    assert!(content[..64 << 10].iter().all(|&byte| byte == 0));
}

#[test]
fn an_honest_client_of_libnbd_does_everything() {
    let Some(python) = python_with("an_honest_client_of_libnbd_does_everything", "nbd") else { return };
    let scratch = Scratch::new();
    make(&scratch, &[]);
    let serve = Serve::start(&["--format", "raw", "--socket", &scratch.name("s"), &scratch.name("content.raw")]);
    let script = "
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.set_opt_mode(True)
h.connect_uri(URI)
assert h.get_structured_replies_negotiated()
h.opt_go()
assert h.can_fua() and h.can_zero() and h.can_fast_zero() and h.can_trim() and h.can_cache() and h.can_df()
buf = bytes(range(256)) * 16
h.pwrite(buf, 4096, nbd.CMD_FLAG_FUA)
assert h.pread(4096, 4096) == buf
h.zero(2048, 4096, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(4096, 4096) == bytes(2048) + buf[2048:]
h.trim(65536, 1 << 20)
h.cache(65536, 0)
h.flush()
extents = []
h.block_status(1 << 20, 1 << 20, lambda c, o, e, err: extents.extend(e))
assert extents[:2] == [65536, 3], extents
try:
    h.set_strict_mode(0)
    h.pread(512, h.get_size())
    assert False
except nbd.Error as e:
    assert e.errnum == 22, e
cookies = [h.aio_pread(nbd.Buffer(4096), i * 4096) for i in range(64)]
while h.aio_in_flight(): h.poll(-1)
h.shutdown()
";
    let script = format!("URI = '{}'\n{script}", serve.uri);
    let mut child = Command::new(python).args(["-m", "nbd", "-c", &script]).stdin(Stdio::null()).spawn().unwrap();
    assert!(child.wait().unwrap().success());
}
