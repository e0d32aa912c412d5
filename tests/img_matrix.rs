// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images of every writable format, subformat and option: what qemu-img makes is read by us as it was, what we make is read by
//! qemu-img as it was, and from each format there is a way to every other and back. `DOORLESS_MATRIX=all` takes every case at
//! every size; without it each case has one of the sizes.
#![allow(missing_docs, clippy::unwrap_used)]

mod beside;
mod harness;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use beside::{done, err, out, theirs};
use harness::{Scratch, judges, noise, run_in, text};

const JUDGES: [&str; 1] = ["qemu-img"];

/// How many readings of images by independent readers there are at least: none of them knows everything.
const READINGS: usize = 80;

/// Bytes of disks: whole clusters, and a last sector alone.
const SIZES: [usize; 2] = [1 << 20, (1 << 20) + 1536];

/// Format, options, and whether it is compressed.
const CASES: &[(&str, &str, bool)] = &[
    ("raw", "", false),
    ("raw", "preallocation=falloc", false),
    ("raw", "preallocation=full", false),
    ("qcow2", "", false),
    ("qcow2", "", true),
    ("qcow2", "cluster_size=512", false),
    ("qcow2", "cluster_size=512", true),
    ("qcow2", "cluster_size=4k", false),
    ("qcow2", "cluster_size=4k", true),
    ("qcow2", "cluster_size=16k,refcount_bits=1", false),
    ("qcow2", "cluster_size=1M", false),
    ("qcow2", "cluster_size=2M", false),
    ("qcow2", "cluster_size=2M", true),
    ("qcow2", "compat=0.10", false),
    ("qcow2", "compat=0.10", true),
    ("qcow2", "compat=0.10,cluster_size=4k", false),
    ("qcow2", "compat=v3,lazy_refcounts=on", false),
    ("qcow2", "compression_type=zstd", false),
    ("qcow2", "compression_type=zstd", true),
    ("qcow2", "compression_type=zstd,cluster_size=4k", true),
    ("qcow2", "compression_type=zlib,cluster_size=128k", true),
    ("qcow2", "extended_l2=on", false),
    ("qcow2", "extended_l2=on", true),
    ("qcow2", "extended_l2=on,cluster_size=16k", false),
    ("qcow2", "extended_l2=on,cluster_size=2M", false),
    ("qcow2", "extended_l2=on,compression_type=zstd", true),
    ("qcow2", "refcount_bits=1", false),
    ("qcow2", "refcount_bits=2", false),
    ("qcow2", "refcount_bits=4", true),
    ("qcow2", "refcount_bits=8", false),
    ("qcow2", "refcount_bits=32", false),
    ("qcow2", "refcount_bits=64", true),
    ("qcow2", "preallocation=metadata", false),
    ("qcow2", "preallocation=falloc", false),
    ("qcow2", "preallocation=full", false),
    ("qcow2", "preallocation=metadata,extended_l2=on", false),
    ("qcow2", "preallocation=metadata,cluster_size=512", false),
    ("qcow2", "preallocation=full,compat=0.10", false),
    ("qcow2", "data_file=data.raw", false),
    ("qcow2", "data_file=data.raw,data_file_raw=on", false),
    ("qcow2", "data_file=data.raw,cluster_size=4k", false),
    ("vdi", "", false),
    ("vdi", "static=off", false),
    ("vdi", "static=on", false),
    ("vpc", "", false),
    ("vpc", "force_size=on", false),
    ("vpc", "subformat=dynamic", false),
    ("vpc", "subformat=dynamic,force_size=on", false),
    ("vpc", "subformat=fixed", false),
    ("vpc", "subformat=fixed,force_size=on", false),
    ("vmdk", "", false),
    ("vmdk", "subformat=monolithicSparse", false),
    ("vmdk", "subformat=monolithicSparse,compat6=on", false),
    ("vmdk", "subformat=monolithicSparse,adapter_type=lsilogic", false),
    ("vmdk", "subformat=monolithicSparse,adapter_type=buslogic,hwversion=7", false),
    ("vmdk", "subformat=monolithicFlat", false),
    ("vmdk", "subformat=monolithicFlat,adapter_type=legacyESX", false),
    ("vmdk", "subformat=twoGbMaxExtentSparse", false),
    ("vmdk", "subformat=twoGbMaxExtentSparse,compat6=on", false),
    ("vmdk", "subformat=twoGbMaxExtentFlat", false),
    ("vmdk", "subformat=streamOptimized", false),
    ("vmdk", "subformat=streamOptimized,compat6=on", false),
];

/// Data, a hole, data, zeroes, and data at the very end.
fn disk(len: usize) -> Vec<u8> {
    let mut disk = noise(len, 11);
    disk[200 << 10..500 << 10].fill(0);
    disk[600 << 10..len - 700].fill(0);
    disk
}

fn cases() -> impl Iterator<Item = (usize, &'static (&'static str, &'static str, bool), usize)> {
    let all = std::env::var_os("DOORLESS_MATRIX").is_some();
    CASES.iter().enumerate().flat_map(move |(index, case)| {
        let sizes: Vec<usize> = if all { SIZES.to_vec() } else { vec![SIZES[index % 2]] };
        sizes.into_iter().map(move |size| (index, case, size))
    })
}

/// VHD has sizes of its own: what it adds reads as zeroes.
fn is_the_disk(read: &[u8], disk: &[u8], format: &str, what: &str) {
    assert!(read.starts_with(disk), "{what}: another content");
    let more = &read[disk.len()..];
    assert!(more.iter().all(|&byte| byte == 0) && (more.is_empty() || format == "vpc"), "{what}: {} more", more.len());
}

fn arguments<'a>(format: &'a str, options: &'a str, compressed: bool) -> Vec<&'a str> {
    let mut arguments = vec!["convert", "-f", "raw", "-O", format];
    if compressed {
        arguments.push("-c");
    }
    if !options.is_empty() {
        arguments.extend(["-o", options]);
    }
    [arguments, vec!["disk.raw", "image"]].concat()
}

fn cleared(dir: &Path, size: usize) -> Vec<u8> {
    let disk = disk(size);
    for entry in std::fs::read_dir(dir).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
    }
    std::fs::write(dir.join("disk.raw"), &disk).unwrap();
    disk
}

#[test]
fn what_qemu_img_makes_is_read_as_it_was() {
    if !judges("what_qemu_img_makes_is_read_as_it_was", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.path("");
    let mut images = 0;
    for (_, &(format, options, compressed), size) in cases() {
        let disk = cleared(&dir, size);
        let what = format!("{format} {options} {compressed} of {size}");
        let made = theirs(&dir, &arguments(format, options, compressed));
        assert!(made.status.success(), "{what}: {}", err(&made));
        done(&dir, &["convert", "-f", format, "-O", "raw", "image", "copy.raw"]);
        is_the_disk(&std::fs::read(dir.join("copy.raw")).unwrap(), &disk, format, &what);
        images += 1;
    }
    assert!(images >= 60, "{images}");
}

#[test]
fn what_is_made_here_is_read_by_qemu_img_as_it_was() {
    if !judges("what_is_made_here_is_read_by_qemu_img_as_it_was", &JUDGES) {
        return;
    }
    let readers = readers("what_is_made_here_is_read_by_qemu_img_as_it_was");
    let scratch = Scratch::new();
    let dir = scratch.path("");
    let (mut images, mut read) = (0, 0);
    for (_, &(format, options, compressed), size) in cases() {
        let disk = cleared(&dir, size);
        let what = format!("{format} {options} {compressed} of {size}");
        done(&dir, &arguments(format, options, compressed));
        let arguments = ["convert", "-f", format, "-O", "raw", "image", "copy.raw"];
        run_in(&dir, "qemu-img", &arguments);
        is_the_disk(&std::fs::read(dir.join("copy.raw")).unwrap(), &disk, format, &what);
        done(&dir, &arguments);
        is_the_disk(&std::fs::read(dir.join("copy.raw")).unwrap(), &disk, format, &what);
        if ["qcow2", "vdi"].contains(&format) {
            let checked = theirs(&dir, &["check", "-f", format, "image"]);
            assert_eq!(checked.status.code(), Some(0), "{what}: {}{}", out(&checked), err(&checked));
        }
        if let Some(python) = &readers {
            read += independent(python, &dir, format, compressed, &what);
        }
        images += 1;
    }
    assert!(images >= 60, "{images}");
    assert!(readers.is_none() || read >= READINGS, "independent readers have read {read} times");
}

/// The Python that has the independent readers.
fn readers(test: &str) -> Option<PathBuf> {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/judges/python/bin/python3");
    let imports = "import dissect.hypervisor, pyqcow, pyvhdi, pyvmdk";
    let has_them = Command::new(&python).args(["-c", imports]).output().is_ok_and(|output| output.status.success());
    if !has_them {
        assert!(std::env::var_os("CI").is_none(), "{test} needs the independent readers, and CI must have them");
        eprintln!("skipped: {test}, by independent readers: needs dissect.hypervisor and libyal's (make judges)");
    }
    has_them.then_some(python)
}

/// How many independent readers find the disk in the image; others do not know what it has.
fn independent(python: &Path, dir: &Path, format: &str, compressed: bool, what: &str) -> usize {
    // Nobody else reads subclusters: the one that says so takes minutes to fail.
    if format == "raw" || what.contains("extended_l2") {
        return 0;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/readers.py");
    let mut files: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !["disk.raw", "copy.raw", "image"].contains(&name.as_str()))
        .collect();
    files.sort();
    let arguments = [text(&script), format, "image", "disk.raw"].map(str::to_owned);
    let output = Command::new(python).current_dir(dir).args(arguments).args(files).output().unwrap();
    assert!(output.status.success(), "{what}: {}", err(&output));
    let said = out(&output);
    eprintln!("{what}\n{said}");
    // libyal inflates some of qcow2's clusters wrongly, qemu-img's own, too.
    let lines = said.lines().filter(|line| !(compressed && format == "qcow2" && line.starts_with("libyal")));
    let lines: Vec<&str> = lines.collect();
    assert!(!lines.iter().any(|line| line.contains(" other ")), "{what}: {said}");
    lines.iter().filter(|line| line.contains(" same ")).count()
}

#[test]
fn from_each_format_there_is_a_way_to_every_other_and_back() {
    if !judges("from_each_format_there_is_a_way_to_every_other_and_back", &JUDGES) {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.path("");
    let disk = cleared(&dir, SIZES[0]);
    let data: usize = disk.chunks(4096).filter(|page| page.iter().any(|&byte| byte != 0)).count() * 4096;
    let formats = ["raw", "qcow2", "vdi", "vpc", "vmdk"];
    let options = |format: &str| if format == "vpc" { "force_size=on" } else { "" };
    let convert = |from: (&str, &str), to: (&str, &str)| {
        let mut arguments = vec!["convert", "-f", from.0, "-O", to.0];
        if !options(to.0).is_empty() {
            arguments.extend(["-o", options(to.0)]);
        }
        done(&dir, &[arguments, vec![from.1, to.1]].concat());
    };
    for first in formats {
        convert(("raw", "disk.raw"), (first, "first"));
        for second in formats {
            convert((first, "first"), (second, "second"));
            convert((second, "second"), (first, "third"));
            convert((first, "third"), ("raw", "copy.raw"));
            let what = format!("{first} to {second} and back");
            assert!(std::fs::read(dir.join("copy.raw")).unwrap() == disk, "{what}: another content");
            let taken = usize::try_from(std::fs::metadata(dir.join("copy.raw")).unwrap().blocks() * 512).unwrap();
            assert!(taken <= data + (64 << 10), "{what}: {taken} bytes are taken for {data} bytes of data");
        }
    }
}
