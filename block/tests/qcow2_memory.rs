// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory that a qcow2 image takes, whatever it says of itself: the limit of its L2 cache and a constant.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;

use block::OptionValue;
use support::{Nodes, read};

const MIB: u64 = 1 << 20;
/// The L2 cache's limit.
const CACHE: u64 = 4 * MIB;
/// The tables of 32 and 8 MiB that an image may have, and where all that they name stands. Bitmaps with marks may take 512 MiB
/// more; none of these images has so many.
const CONSTANT: u64 = 384 * MIB;

/// A sparse image with clusters of 512 bytes: header, and a refcount table of one cluster with a block that counts 256 clusters.
struct Image(File);

impl Image {
    fn new() -> Image {
        let image = Image(tempfile::tempfile().unwrap());
        image.put(0, b"QFI\xfb");
        for (at, value) in [(4, 3u32), (20, 9), (56, 1), (96, 4), (100, 104)] {
            image.put(at, &value.to_be_bytes());
        }
        // The L1 table stands at 4 MiB.
        image.words(24, &[MIB]).words(40, &[4 * MIB]).words(48, &[512]).words(512, &[1024]);
        image.put(36, &64u32.to_be_bytes());
        image.put(1024, &[0, 1].repeat(256));
        image.0.set_len(8 * MIB).unwrap();
        image
    }

    fn put(&self, at: u64, bytes: &[u8]) -> &Image {
        self.0.write_all_at(bytes, at).unwrap();
        self
    }

    fn words(&self, at: u64, words: &[u64]) -> &Image {
        self.put(at, &words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<u8>>())
    }

    /// The extension that names a directory of `count` bitmaps, `len` bytes at `offset`.
    fn bitmaps(&self, count: u32, len: u64, offset: u64) {
        self.words(88, &[1]);
        self.put(104, &[0x2385_2875u32, 24, count, 0].map(u32::to_be_bytes).concat()).words(120, &[len, offset]);
    }
}

/// An L1 table of 32 MiB that names 4 Mi tables, none beside another, and a refcount table of 8 MiB that names 1 Mi blocks.
fn wide_tables(image: &Image) {
    let place = |index: u64, base: u64| base + index * 1024;
    image.words(24, &[4 * MIB * 64 * 512]);
    image.put(36, &(4u32 << 20).to_be_bytes()).words(40, &[256 * MIB]);
    let l1: Vec<u64> = (0..4 * MIB).map(|index| place(index, 1 << 33) | 1 << 63).collect();
    image.words(256 * MIB, &l1);
    let blocks: Vec<u64> = (0..MIB).map(|index| place(index, 1 << 34)).collect();
    image.words(48, &[512 * MIB]).put(56, &(1u32 << 14).to_be_bytes()).words(512 * MIB, &blocks);
    image.0.set_len(1 << 36).unwrap();
}

/// 65536 snapshots, each with an L1 table of 32 MiB; apart, or all in one place.
fn many_snapshots(image: &Image, apart: bool) {
    let mut table = Vec::new();
    for index in 0..65536u64 {
        let l1 = if apart { (1 << 33) + index * 32 * MIB } else { 1 << 33 };
        table.extend(l1.to_be_bytes());
        table.extend((4u32 << 20).to_be_bytes());
        table.extend([0; 20]);
        table.extend([0, 0, 0, 0, 0, 0, 0, 16]);
        table.extend([0; 16]);
    }
    image.put(60, &65536u32.to_be_bytes()).words(64, &[64 * MIB]).put(64 * MIB, &table);
    image.0.set_len(1 << 42).unwrap();
}

/// `count` bitmaps with tables of `entries` entries in one place, each of which says `entry`.
fn many_bitmaps(image: &Image, count: u32, entries: u32, entry: u64, flags: u32) {
    let mut directory = Vec::new();
    for index in 0..count {
        directory.extend((512 * MIB).to_be_bytes());
        directory.extend(entries.to_be_bytes());
        directory.extend(flags.to_be_bytes());
        directory.extend([1, 9, 0, 8, 0, 0, 0, 0]);
        directory.extend(format!("{index:08}").as_bytes());
    }
    image.bitmaps(count, directory.len() as u64, 64 * MIB);
    image.put(64 * MIB, &directory).words(512 * MIB, &vec![entry; entries as usize]);
    image.words(24, &[u64::from(entries) * 512 * 8 * 512]);
    image.put(36, &(entries * 64).to_be_bytes());
    image.0.set_len(1 << 32).unwrap();
}

/// Bytes of memory that this process took at most since it asked before.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    kib << 10
}

#[test]
fn memory_is_bounded_by_the_limit_and_a_constant_for_any_image() {
    type Make = fn(&Image);
    let cases: &[(&str, Make)] = &[
        ("a small image", |_| ()),
        ("tables as wide as they can be", wide_tables),
        ("65536 snapshots with L1 tables of 32 MiB", |i| many_snapshots(i, true)),
        ("65536 snapshots with one L1 table", |i| many_snapshots(i, false)),
        ("tables as wide as they can be, and snapshots", |i| {
            many_snapshots(i, false);
            wide_tables(i);
            i.0.set_len(1 << 42).unwrap();
        }),
        ("65535 bitmaps with one table of 512 KiB, in use", |i| many_bitmaps(i, 65535, 1 << 16, 1024 * MIB, 1)),
        ("65535 bitmaps with one table of 512 KiB", |i| many_bitmaps(i, 65535, 1 << 16, 1, 0)),
        ("65535 bitmaps of one bit", |i| {
            many_bitmaps(i, 65535, 1, 1024 * MIB, 0);
            i.put(1024 * MIB, &[1]);
        }),
    ];
    peak();
    let start = peak();
    for (case, make) in cases {
        for writable in [false, true] {
            let image = Image::new();
            make(&image);
            peak();
            let mut nodes = Nodes::new();
            let file = nodes.file(&image.0, writable);
            let options = [("l2-cache-size", OptionValue::Size(CACHE))];
            let opened = nodes.format("qcow2", &[("file", &file)], writable, &options);
            let outcome = opened.as_ref().map_or_else(ToString::to_string, |_| "opened".into());
            if let Ok(node) = &opened {
                // Every slice of a stretch that is larger than the cache.
                for offset in (0..node.len().min(1 << 29)).step_by(32 << 10) {
                    let _ = read(node, offset, 512);
                    if writable && offset < 16 << 20 {
                        let _ = node.write(&[1; 512], offset, false);
                    }
                }
            }
            let taken = peak().saturating_sub(start);
            eprintln!("{case}, writable: {writable}: {} MiB; {outcome}", taken / MIB);
            assert!(taken <= CACHE + CONSTANT, "{case}: {taken} bytes");
        }
    }
}
