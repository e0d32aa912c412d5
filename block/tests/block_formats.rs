// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VDI and VHD: random requests against a vector of bytes, read by qemu-img; failed allocations; images that break the rules.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use block::BlockNode;
use support::requests::{random_requests, with_a_full_disk};
use support::{Nodes, in_memory, judge, memory, name_in, read, run, text, to_disk};

/// Format, options of qemu-img, bytes.
const KINDS: &[(&str, &str, u64)] = &[
    ("vdi", "static=off", 9 << 20),
    ("vdi", "static=on", 5 << 20),
    ("vpc", "subformat=dynamic,force_size=on", 13 << 20),
    ("vpc", "subformat=dynamic", 13 << 20),
    ("vpc", "subformat=fixed,force_size=on", 3 << 20),
];

fn create(format: &str, options: &str, size: u64, dir: &Path) -> File {
    let (path, name) = name_in(dir, "image");
    run("qemu-img", &["create", "-q", "-f", format, "-o", options, &name, &size.to_string()]);
    in_memory(&path)
}

fn open(format: &'static str, image: &File, writable: bool) -> block::Result<(Nodes, Arc<BlockNode>)> {
    let mut nodes = Nodes::new();
    let file = nodes.file(image, writable);
    let node = nodes.format(format, &[("file", &file)], writable, &[])?;
    Ok((nodes, node))
}

/// A guest sees the same bytes through qemu-img.
fn compare(format: &str, image: &File, bytes: &[u8], dir: &Path) {
    let (path, name) = name_in(dir, "image");
    to_disk(image, &path);
    let expected = dir.join("expected");
    std::fs::write(&expected, bytes).unwrap();
    run("qemu-img", &["compare", "-q", "-f", format, "-F", "raw", &name, text(&expected)]);
    if format == "vdi" {
        run("qemu-img", &["check", "-q", "-f", format, &name]);
    }
}

#[test]
fn random_requests_leave_what_a_vector_of_bytes_has() {
    if !judge("random_requests_leave_what_a_vector_of_bytes_has", "qemu-img") {
        return;
    }
    for &(format, options, size) in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let image = create(format, options, size, dir.path());
        let len = open(format, &image, false).unwrap().1.len();
        // A VHD's size may be rounded up to what cylinders can say.
        assert!(len >= size && len < size + (1 << 20), "{format} {options}: {len}");
        let kind = format!("{format} {options}");
        let bytes = random_requests(&kind, size ^ options.len() as u64, || open(format, &image, true).unwrap());
        compare(format, &image, &bytes, dir.path());
    }
}

#[test]
fn images_filled_by_qemu_are_read_and_mapped_as_it_says() {
    if !judge("images_filled_by_qemu_are_read_and_mapped_as_it_says", "qemu-img") {
        return;
    }
    for &(format, options, size) in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = vec![0; size as usize];
        for (index, chunk) in bytes.chunks_mut(700_000).enumerate().filter(|(index, _)| index % 3 != 1) {
            chunk.fill(index as u8 + 1);
        }
        let (raw, _) = name_in(dir.path(), "raw");
        std::fs::write(&raw, &bytes).unwrap();
        let (path, name) = name_in(dir.path(), "filled");
        run("qemu-img", &["convert", "-f", "raw", "-O", format, "-o", options, text(&raw), &name]);
        let (_nodes, node) = open(format, &in_memory(&path), false).unwrap();
        bytes.resize(node.len() as usize, 0);
        assert!(read(&node, 0, bytes.len()).unwrap() == bytes, "{format} {options}");
    }
}

#[test]
fn a_failed_allocation_loses_nothing_that_is_flushed_later() {
    if !judge("a_failed_allocation_loses_nothing_that_is_flushed_later", "qemu-img") {
        return;
    }
    for &(format, options, size) in &KINDS[..3] {
        for refused in 0..9 {
            let dir = tempfile::tempdir().unwrap();
            let image = create(format, options, size, dir.path());
            let (bytes, left) = with_a_full_disk(format, &format!("{format} {options}"), &image, refused);
            compare(format, &left, &bytes, dir.path());
        }
    }
}

#[test]
fn images_that_break_the_rules_are_refused_with_the_reason() {
    if !judge("images_that_break_the_rules_are_refused_with_the_reason", "qemu-img") {
        return;
    }
    type Change = fn(&mut Vec<u8>);
    let rows: &[(&str, &str, Change, &str)] = &[
        ("vdi", "signature", |image| image[0x40] ^= 1, "bad signature"),
        ("vdi", "version", |image| image[0x44] = 2, "version 1.2"),
        ("vdi", "size of 2^60", |image| image[0x177] = 0x10, "size is"),
        ("vdi", "map in the middle of a sector", |image| image[0x154] = 1, "unaligned block map offset"),
        (
            "vdi",
            "data inside the map",
            |image| image[0x158..0x15c].copy_from_slice(&512u32.to_le_bytes()),
            "in the data area",
        ),
        ("vdi", "sector size", |image| image[0x169] = 4, "sector size"),
        ("vdi", "block size 0", |image| image[0x178..0x17c].fill(0), "block size 0"),
        ("vdi", "extra bytes", |image| image[0x17c] = 1, "extra bytes"),
        ("vdi", "2^32-1 blocks", |image| image[0x180..0x184].fill(0xff), "blocks"),
        ("vdi", "type", |image| image[0x4c] = 9, "unknown image type 9"),
        ("vdi", "type that needs a parent", |image| image[0x4c] = 4, "give 'backing' a node"),
        ("vdi", "parent of a type without one", |image| image[0x1a8] = 1, "names a parent"),
        ("vdi", "map cut off", |image| image.truncate(512), "the file at"),
        ("vdi", "header cut off", |image| image.truncate(0), "header of 512 bytes"),
        (
            "vdi",
            "entry beyond the blocks",
            |image| image[512..516].copy_from_slice(&99u32.to_le_bytes()),
            "names block 99",
        ),
        ("vdi", "two entries for one block", |image| image[512..520].fill(0), "share one block"),
        ("vpc", "checksum", |image| image[30] ^= 1, "checksum of the VHD footer"),
        ("vpc", "no cookie", |image| image[0] = 0, "no footer at its start"),
        (
            "vpc",
            "dynamic header elsewhere",
            |image| put(image, 0, 16, &(1u64 << 40).to_be_bytes()),
            "not within the file",
        ),
        ("vpc", "differencing", |image| put(image, 0, 60, &4u32.to_be_bytes()), "give 'backing' a node"),
        ("vpc", "block size 0", |image| put(image, 512, 32, &0u32.to_be_bytes()), "Invalid block size 0"),
        ("vpc", "block size 3", |image| put(image, 512, 32, &3000u32.to_be_bytes()), "Invalid block size"),
        ("vpc", "one entry", |image| put(image, 512, 28, &1u32.to_be_bytes()), "Table too small"),
        ("vpc", "2^32-1 entries", |image| put(image, 512, 28, &u32::MAX.to_be_bytes()), "not within the file"),
        ("vpc", "table in the header", |image| put(image, 512, 16, &0u64.to_be_bytes()), "not within the file"),
        (
            "vpc",
            "table over the header",
            |image| put(image, 512, 16, &1024u64.to_be_bytes()),
            "over the dynamic header",
        ),
        ("vpc", "block in the header", |image| image[1536..1540].copy_from_slice(&1u32.to_be_bytes()), "data area"),
        ("vpc", "block past the end", |image| image[1536..1540].copy_from_slice(&9999u32.to_be_bytes()), "data area"),
    ];
    for &(format, what, change, reason) in rows {
        let dir = tempfile::tempdir().unwrap();
        let options = if format == "vdi" { "static=off" } else { "subformat=dynamic,force_size=on" };
        create(format, options, 9 << 20, dir.path());
        let mut content = std::fs::read(dir.path().join("image")).unwrap();
        change(&mut content);
        let image = memory();
        image.write_all_at(&content, 0).unwrap();
        let error = open(format, &image, true).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(reason), "{format}, {what}: {error}");
    }
}

/// Changes a field of a VHD's structure at `at` and mends its checksum.
fn put(image: &mut [u8], at: usize, field: usize, value: &[u8]) {
    let (len, sum_at) = if at == 0 { (512, 64) } else { (1024, 36) };
    image[at + field..at + field + value.len()].copy_from_slice(value);
    let structure = &mut image[at..at + len];
    structure[sum_at..sum_at + 4].fill(0);
    let sum = !structure.iter().fold(0u32, |sum, &byte| sum.wrapping_add(byte.into()));
    structure[sum_at..sum_at + 4].copy_from_slice(&sum.to_be_bytes());
}
