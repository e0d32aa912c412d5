// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The sparse extents of ESX, COWD and seSparse: read as qemu-img reads them, and what breaks their rules.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;

use support::{Nodes, Random, judge, memory, name_in, read, run, text, to_disk};

fn put(image: &File, at: u64, bytes: &[u8]) {
    image.write_all_at(bytes, at).unwrap();
}

/// A descriptor over one extent.
fn descriptor(create_type: &str, line: &str) -> File {
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=1234abcd\nparentCID=ffffffff\ncreateType=\"{create_type}\"\n{line}\n"
    );
    let file = memory();
    put(&file, 0, text.as_bytes());
    file
}

/// An extent of ESX with a few grains of numbers, and what a guest sees.
fn cowd() -> (File, Vec<u8>) {
    let (sectors, grain) = (4096 + 100u64, 1u64);
    let mut image = vec![0; 4096 + 2 * 16384];
    image[..4].copy_from_slice(b"COWD");
    for (at, value) in [(4, 1), (8, 3), (12, sectors), (16, grain), (20, 4), (24, 2), (28, 200)] {
        image[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
    }
    let tables = [4096u64, 4096 + 16384];
    for (number, table) in tables.iter().enumerate() {
        image[2048 + number * 4..2052 + number * 4].copy_from_slice(&((table / 512) as u32).to_le_bytes());
    }
    let mut expected = vec![0; sectors as usize * 512];
    for sector in [0usize, 1, 77, 4095, 4096, 4195] {
        let entry = tables[sector / 4096] as usize + sector % 4096 * 4;
        let place = image.len();
        image[entry..entry + 4].copy_from_slice(&((place / 512) as u32).to_le_bytes());
        image.extend([(sector % 250) as u8 + 1; 512]);
        expected[sector * 512..sector * 512 + 512].fill((sector % 250) as u8 + 1);
    }
    let file = memory();
    put(&file, 0, &image);
    (file, expected)
}

/// A space-efficient extent with grains, zeroes and unmapped ones.
fn sesparse() -> (File, Vec<u8>) {
    let sectors = 40_000u64;
    let mut image = vec![0u8; 512 * 512];
    let mut put = |at: u64, value: u64| image[at as usize..at as usize + 8].copy_from_slice(&value.to_le_bytes());
    let (volatile, directory, tables, grains) = (1, 8, 16, 512);
    for (word, value) in [
        (0, 0xcafe_babe),
        (1, 0x2_0000_0001),
        (2, sectors),
        (3, 8),
        (4, 64),
        (10, volatile),
        (11, 1),
        (16, directory),
        (17, 1),
        (18, tables),
        (19, 128),
        (24, grains),
        (25, 64),
    ] {
        put(word * 8, value);
    }
    put(volatile * 512, 0xcafe_cafe);
    // The second table comes first.
    put(directory * 512, 0x1000_0000_0000_0001);
    put(directory * 512 + 8, 0x1000_0000_0000_0000);
    let mut expected = vec![0; sectors as usize * 512];
    for (number, grain) in [0u64, 1, 4095, 4096, 4999].into_iter().enumerate() {
        let table = if grain < 4096 { tables + 64 } else { tables };
        put(table * 512 + grain % 4096 * 8, 3 << 60 | (number as u64) << 48);
        expected[grain as usize * 4096..][..4096].fill(number as u8 + 1);
    }
    put((tables + 64) * 512 + 16, 1 << 60);
    put((tables + 64) * 512 + 24, 2 << 60);
    for number in 0..5u8 {
        image.extend([number + 1; 4096]);
    }
    let file = memory();
    self::put(&file, 0, &image);
    (file, expected)
}

#[test]
fn extents_of_esx_are_read_as_qemu_reads_them() {
    if !judge("extents_of_esx_are_read_as_qemu_reads_them", "qemu-img") {
        return;
    }
    for (create_type, kind, (extent, expected)) in
        [("vmfsSparse", "VMFSSPARSE", cowd()), ("seSparse", "SESPARSE", sesparse())]
    {
        let line = format!("RW {} {kind} \"extent.vmdk\"", expected.len() / 512);
        let dir = tempfile::tempdir().unwrap();
        let (path, name) = name_in(dir.path(), "disk.vmdk");
        to_disk(&descriptor(create_type, &line), &path);
        to_disk(&extent, &dir.path().join("extent.vmdk"));
        let raw = dir.path().join("raw");
        std::fs::write(&raw, &expected).unwrap();
        run("qemu-img", &["compare", "-q", "-f", "vmdk", "-F", "raw", &name, text(&raw)]);
        let mut nodes = Nodes::new();
        let (file, part) = (nodes.file(&descriptor(create_type, &line), false), nodes.file(&extent, false));
        let node = nodes.format("vmdk", &[("file", &file), ("extents.0", &part)], false, &[]).unwrap();
        assert!(read(&node, 0, expected.len()).unwrap() == expected, "{kind}");
        let mut random = Random(4);
        for _ in 0..200 {
            let at = random.below(expected.len() as u64);
            let len = (1 + random.below(70_000)).min(expected.len() as u64 - at) as usize;
            assert!(read(&node, at, len).unwrap() == expected[at as usize..][..len], "{kind} at {at}");
        }
    }
}

#[test]
fn extents_of_esx_that_break_the_rules_are_refused_with_the_reason() {
    type Change = (&'static str, u64, &'static [u8], &'static str);
    let cowd_rows: &[Change] = &[
        ("version", 4, &[2], "version 2"),
        ("grain 0", 16, &[0], "Invalid grain size 0"),
        ("grain 3", 16, &[3], "Invalid grain size"),
        ("too few entries", 24, &[1], "has 1 entries"),
        ("directory past the end", 20, &[0xff, 0xff], "not within the file"),
        ("table past the end", 2048, &[0xff, 0xff, 0xff], "past the end"),
        ("shorter than its line", 12, &[1, 0, 0, 0], "the VMDK descriptor says"),
    ];
    let se_rows: &[Change] = &[
        ("version", 8, &[2], "version"),
        ("grain", 24, &[16], "grain size"),
        ("table", 32, &[1], "grain table size"),
        ("flags", 40, &[1], "flags"),
        ("reserved", 48, &[1], "reserved"),
        ("padding", 300, &[1], "reserved"),
        ("capacity", 16, &[0xff; 8], "too large"),
        ("many tables", 21, &[0xff], "L1 size too big"),
        ("short directory", 136, &[0], "directory has 0 entries"),
        ("directory past the end", 130, &[0xff], "not within the file"),
        ("no volatile header", 512, &[0], "no volatile header"),
        ("dirty", 512 + 24, &[1], "dirty"),
    ];
    for (rows, create_type, kind, make) in [
        (cowd_rows, "vmfsSparse", "VMFSSPARSE", cowd as fn() -> (File, Vec<u8>)),
        (se_rows, "seSparse", "SESPARSE", sesparse),
    ] {
        for (what, at, bytes, reason) in rows {
            let (extent, expected) = make();
            put(&extent, *at, bytes);
            let line = format!("RW {} {kind} \"extent.vmdk\"", expected.len() / 512);
            let mut nodes = Nodes::new();
            let (file, part) = (nodes.file(&descriptor(create_type, &line), false), nodes.file(&extent, false));
            let error = nodes.format("vmdk", &[("file", &file), ("extents.0", &part)], false, &[]);
            let error = error.map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(reason), "{kind}, {what}: {error}");
        }
    }
}
