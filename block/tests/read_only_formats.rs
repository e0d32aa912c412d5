// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Formats that are only read: images that qemu-img made, and images made here that qemu-img reads the same; a VHDX whose writer
//! died; images that break the rules.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use block::{BlockNode, ExtentKind, inspect};
use flate2::Compression;
use flate2::write::ZlibEncoder;
use support::{Nodes, Random, in_memory, judge, memory, name_in, read, run, text, to_disk};

const SIZE: usize = (5 << 20) + 512;

/// Formats that qemu-img makes, and its options.
const MADE_BY_QEMU: &[(&str, &[&str])] = &[
    ("parallels", &[]),
    ("parallels", &["-o", "cluster_size=64k"]),
    ("qcow", &[]),
    ("qed", &[]),
    ("qed", &["-o", "cluster_size=4k,table_size=2"]),
    ("qed", &["-o", "cluster_size=1M,table_size=16"]),
    ("vhdx", &[]),
    ("vhdx", &["-o", "block_size=1M,log_size=2M"]),
    ("vhdx", &["-o", "subformat=fixed"]),
    ("vhdx", &["-o", "block_state_zero=off"]),
];

/// Holes, patterns and noise.
fn content(size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    let mut random = Random(11);
    for (index, chunk) in bytes.chunks_mut(150_000).enumerate().filter(|(index, _)| index % 3 != 1) {
        chunk.fill(index as u8 + 1);
        if index % 2 == 0 {
            chunk.fill_with(|| random.next() as u8);
        }
    }
    bytes
}

fn open(format: &'static str, image: &File) -> block::Result<(Nodes, Arc<BlockNode>)> {
    let mut nodes = Nodes::new();
    let file = nodes.file(image, false);
    let node = nodes.format(format, &[("file", &file)], false, &[])?;
    Ok((nodes, node))
}

fn refusal(format: &'static str, image: &File) -> String {
    open(format, image).map(|_| ()).unwrap_err().to_string()
}

/// Reads everything at once, and pieces of it.
fn reads_as(what: &str, node: &BlockNode, bytes: &[u8]) {
    assert_eq!(node.len(), bytes.len() as u64, "{what}");
    assert!(read(node, 0, bytes.len()).unwrap() == bytes, "{what}");
    let mut random = Random(3);
    for _ in 0..100 {
        let offset = random.below(node.len());
        let len = (1 + random.below(200_000)).min(node.len() - offset) as usize;
        assert!(read(node, offset, len).unwrap() == bytes[offset as usize..][..len], "{what} at {offset}");
    }
    // What is said to be zeroes is.
    let mut at = 0;
    while at < node.len() {
        let status = node.status(at, node.len() - at).unwrap();
        if status.kind == ExtentKind::Zero {
            assert!(bytes[at as usize..][..status.len as usize].iter().all(|&byte| byte == 0), "{what} at {at}");
        }
        at += status.len;
    }
}

/// What qemu-img reads of an image.
fn read_by_qemu(format: &str, image: &File, dir: &Path) -> Vec<u8> {
    let ((path, name), (raw, raw_name)) = (name_in(dir, "judged"), name_in(dir, "judged.raw"));
    to_disk(image, &path);
    run("qemu-img", &["convert", "-f", format, "-O", "raw", &name, &raw_name]);
    std::fs::read(raw).unwrap()
}

#[test]
fn images_made_by_qemu_are_read_as_it_says() {
    if !judge("images_made_by_qemu_are_read_as_it_says", "qemu-img") {
        return;
    }
    for &(format, options) in MADE_BY_QEMU {
        let what = format!("{format} {options:?}");
        let bytes = content(SIZE);
        let dir = tempfile::tempdir().unwrap();
        let (raw, _) = name_in(dir.path(), "raw");
        std::fs::write(&raw, &bytes).unwrap();
        let (path, name) = name_in(dir.path(), "image");
        let arguments = [&["convert", "-f", "raw", "-O", format], options, &[text(&raw), &name]].concat();
        run("qemu-img", &arguments);
        let image = in_memory(&path);
        let (_nodes, node) = open(format, &image).unwrap();
        // Some disks end with a whole cluster.
        let expected = read_by_qemu(format, &image, dir.path());
        assert!(expected.starts_with(&bytes), "{what}");
        reads_as(&what, &node, &expected);
        let mut nodes = Nodes::new();
        let file = nodes.file(&image, false);
        let found = inspect(nodes.graph.get(&file).unwrap(), None).unwrap();
        assert_eq!((found.format, found.virtual_size, found.writable), (format, node.len(), false), "{what}");
        let file = nodes.file(&image, true);
        let error = nodes.format(format, &[("file", &file)], true, &[]).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("read"), "{what}: {error}");
    }
}

#[test]
fn compressed_clusters_of_qcow_are_read() {
    if !judge("compressed_clusters_of_qcow_are_read", "qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, name) = name_in(dir.path(), "image");
    run("qemu-img", &["create", "-q", "-f", "qcow", &name, "4M"]);
    let (mut expected, mut commands) = (vec![0; 4 << 20], Vec::new());
    for (number, cluster) in expected.chunks_mut(4096).enumerate().filter(|(number, _)| number % 7 < 3) {
        cluster.fill(number as u8 | 1);
        let how = if number % 7 == 2 { "" } else { "-c" };
        commands.push(format!("write {how} -P {} {}k 4k", cluster[0], number * 4));
    }
    let commands = commands.iter().flat_map(|command| ["-c", command]);
    run("qemu-io", &["-f", "qcow", &name].into_iter().chain(commands).collect::<Vec<_>>());
    let (_nodes, node) = open("qcow", &in_memory(&path)).unwrap();
    reads_as("qcow, compressed", &node, &expected);
}

#[test]
fn what_an_overlay_lacks_comes_from_its_backing_node() {
    if !judge("what_an_overlay_lacks_comes_from_its_backing_node", "qemu-img") {
        return;
    }
    for format in ["qcow", "qed"] {
        let dir = tempfile::tempdir().unwrap();
        let base = content(SIZE);
        let (raw, raw_name) = name_in(dir.path(), "base");
        std::fs::write(&raw, &base).unwrap();
        let (path, name) = name_in(dir.path(), "overlay");
        run("qemu-img", &["create", "-q", "-f", format, "-b", &raw_name, "-F", "raw", &name, &SIZE.to_string()]);
        let source = format!(
            "json:{{\"driver\":\"{format}\",\"file.filename\":\"{name}\",\"backing.driver\":\"raw\",\"backing.file.filename\":\"{raw_name}\"}}"
        );
        run("qemu-io", &["-c", "write -P 7 1000k 100k", "-c", "write -P 9 4097k 1k", &source]);
        let mut expected = base.clone();
        expected[1000 << 10..1100 << 10].fill(7);
        expected[4097 << 10..4098 << 10].fill(9);
        let mut nodes = Nodes::new();
        let (file, backing) = (nodes.file(&in_memory(&path), false), nodes.file(&in_memory(&raw), false));
        let node = nodes.format(format.parse_name(), &[("file", &file), ("backing", &backing)], false, &[]).unwrap();
        reads_as(format, &node, &expected);
        let error = refusal(format.parse_name(), &in_memory(&path));
        assert!(error.contains("names in images are never followed") && error.contains("base"), "{error}");
        let found = inspect(nodes.graph.get(&file).unwrap(), None).unwrap();
        assert_eq!(found.backing_name.as_deref(), Some(raw_name.as_str()));
    }
}

/// Names live as long as the table that has them.
trait ParseName {
    fn parse_name(&self) -> &'static str;
}

impl ParseName for str {
    fn parse_name(&self) -> &'static str {
        block::driver_named(self).unwrap().name
    }
}

#[test]
fn a_vhdx_whose_writer_died_is_read_with_its_log_applied() {
    const NAME: &str = "a_vhdx_whose_writer_died_is_read_with_its_log_applied";
    if !judge(NAME, "qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, name) = name_in(dir.path(), "image");
    run("qemu-img", &["create", "-q", "-f", "vhdx", "-o", "block_size=1M", &name, "32M"]);
    let writes = (0..20).map(|block| format!("write -P {} {}k 64k", block + 1, block * 1500));
    let mut arguments: Vec<String> = ["-f", "vhdx"].map(str::to_owned).into();
    arguments.extend(
        writes.chain(["flush".to_owned(), "sigraise 9".to_owned()]).flat_map(|command| ["-c".to_owned(), command]),
    );
    let killed = Command::new("qemu-io").args(&arguments).arg(&name).output().unwrap();
    assert!(!killed.status.success(), "it was to be killed");
    // As if it had died a moment earlier, with the log in force and the last entry of the block table not on disk.
    let image = in_memory(&path);
    let mut header = [0; 4096];
    let mut ring = vec![0; 1 << 20];
    image.read_exact_at(&mut ring, log_of(&image)).unwrap();
    let entries = ring.chunks(4096).filter(|sector| sector.starts_with(b"loge"));
    // By sequence number; each time QEMU gives its log another GUID.
    let newest = entries.max_by_key(|entry| u64::from_le_bytes(*entry[16..].first_chunk().unwrap())).unwrap();
    let newest = newest[32..48].to_vec();
    for at in [64 << 10, 128 << 10] {
        image.read_exact_at(&mut header, at).unwrap();
        header[48..64].copy_from_slice(&newest);
        header[4..8].fill(0);
        let sum = crc32c(&header);
        header[4..8].copy_from_slice(&sum.to_le_bytes());
        image.write_all_at(&header, at).unwrap();
    }
    let mut table = 0;
    let mut entry = [0; 32];
    for number in 0..2u64 {
        image.read_exact_at(&mut entry, (192 << 10) + 16 + number * 32).unwrap();
        if entry.starts_with(&0x2dc2_7766u32.to_le_bytes()) {
            table = u64::from_le_bytes(*entry[16..].first_chunk().unwrap());
        }
    }
    let last = (19 * 1500 + 63) / 1024;
    image.write_all_at(&[0; 8], table + last * 8).unwrap();
    let (_nodes, node) = open("vhdx", &image).unwrap();
    assert!(node.info().dirty);
    let (path, name) = name_in(dir.path(), "repaired");
    to_disk(&image, &path);
    run("qemu-img", &["check", "-q", "-f", "vhdx", "-r", "all", &name]);
    let expected = read_by_qemu("vhdx", &in_memory(&path), dir.path());
    assert!(expected[(19 * 1500) << 10..][..64 << 10].iter().all(|&byte| byte == 20));
    reads_as(NAME, &node, &expected);
    // A log that is damaged is none: what it had promised is not there, and what stands in place is.
    for sector in ring.chunks_mut(4096).filter(|sector| sector.starts_with(b"loge")) {
        sector[70] ^= 1;
    }
    image.write_all_at(&ring, log_of(&image)).unwrap();
    let (_nodes, node) = open("vhdx", &image).unwrap();
    assert_eq!(read(&node, (19 * 1500) << 10, 512).unwrap(), [0; 512]);
}

fn log_of(image: &File) -> u64 {
    let mut field = [0; 8];
    image.read_exact_at(&mut field, (64 << 10) + 72).unwrap();
    u64::from_le_bytes(field)
}

fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |sum, &byte| {
        (0..8).fold(sum ^ u32::from(byte), |sum, _| if sum & 1 == 1 { sum >> 1 ^ 0x82f6_3b78 } else { sum >> 1 })
    })
}

/// A growing redolog, of extents of 64 KiB.
fn bochs(bytes: &[u8], version: u32) -> File {
    const EXTENT: usize = 64 << 10;
    let image = memory();
    let extents = bytes.len().div_ceil(EXTENT);
    let mut header = vec![0; 512];
    header[..22].copy_from_slice(b"Bochs Virtual HD Image");
    header[32..39].copy_from_slice(b"Redolog");
    header[48..55].copy_from_slice(b"Growing");
    let bitmap = (EXTENT / 512 / 8) as u32;
    for (at, value) in [(64, version), (68, 512), (72, extents as u32), (76, bitmap), (80, EXTENT as u32)] {
        header[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    let at = if version == 0x0001_0000 { 84 } else { 88 };
    header[at..at + 8].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    let (mut catalog, mut data) = (Vec::new(), Vec::new());
    let mut next = 0u32;
    for extent in bytes.chunks(EXTENT) {
        if extent.iter().all(|&byte| byte == 0) {
            catalog.extend([0xff; 4]);
            continue;
        }
        catalog.extend(next.to_le_bytes());
        next += 1;
        let mut bits = [0; 512];
        for (number, sector) in
            extent.chunks(512).enumerate().filter(|(_, sector)| sector.iter().any(|&byte| byte != 0))
        {
            bits[number / 8] |= 1 << (number % 8);
            assert!(!sector.is_empty());
        }
        let mut stored = extent.to_vec();
        stored.resize(EXTENT, 0);
        data.extend(bits);
        data.extend(stored);
    }
    image.write_all_at(&[header, catalog, data].concat(), 0).unwrap();
    image
}

fn packed(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn cloop(bytes: &[u8], block: usize) -> File {
    let image = memory();
    let mut header = vec![0; 128];
    let script = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n";
    header[..script.len()].copy_from_slice(script);
    let blocks: Vec<Vec<u8>> = bytes.chunks(block).map(packed).collect();
    header.extend((block as u32).to_be_bytes());
    header.extend((blocks.len() as u32).to_be_bytes());
    let mut at = 136 + (blocks.len() as u64 + 1) * 8;
    for block in &blocks {
        header.extend(at.to_be_bytes());
        at += block.len() as u64;
    }
    header.extend(at.to_be_bytes());
    image.write_all_at(&[header, blocks.concat()].concat(), 0).unwrap();
    image
}

/// How a chunk of a DMG is packed here.
type Pack = fn(&[u8]) -> Vec<u8>;

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for (index, group) in bytes.chunks(3).enumerate() {
        let held = group.iter().fold(0u32, |held, &byte| held << 8 | u32::from(byte)) << (8 * (3 - group.len()));
        for digit in 0..4 {
            let is_there = digit <= group.len();
            text.push(if is_there { DIGITS[(held >> (18 - 6 * digit)) as usize & 63] as char } else { '=' });
        }
        if index % 15 == 14 {
            text.push_str("\n\t\t\t");
        }
    }
    text
}

/// A disk image of two partitions; every chunk has 64 KiB.
fn dmg(bytes: &[u8], kind: u32, pack: Pack) -> File {
    const CHUNK: usize = 64 << 10;
    let (mut fork, mut lists) = (Vec::new(), String::new());
    let middle = bytes.len() / 2 / CHUNK * CHUNK;
    for (start, part) in [(0, &bytes[..middle]), (middle, &bytes[middle..])] {
        let mut table = vec![0; 200];
        table[..4].copy_from_slice(b"mish");
        table[4..8].copy_from_slice(&1u32.to_be_bytes());
        table[8..16].copy_from_slice(&(start as u64 / 512).to_be_bytes());
        table[16..24].copy_from_slice(&(part.len() as u64 / 512).to_be_bytes());
        let mut chunks = Vec::new();
        let mut entry = |kind: u32, first: usize, len: usize, at: usize, stored: usize| {
            chunks.extend(kind.to_be_bytes());
            chunks.extend([0; 4]);
            for value in [first / 512, len / 512, at, stored] {
                chunks.extend((value as u64).to_be_bytes());
            }
        };
        for (number, chunk) in part.chunks(CHUNK).enumerate() {
            let first = number * CHUNK;
            if chunk.iter().all(|&byte| byte == 0) {
                entry(if number % 2 == 0 { 0 } else { 2 }, first, chunk.len(), fork.len(), 0);
            } else if number % 5 == 4 {
                entry(1, first, chunk.len(), fork.len(), chunk.len());
                fork.extend(chunk);
            } else {
                let stored = pack(chunk);
                entry(kind, first, chunk.len(), fork.len(), stored.len());
                fork.extend(stored);
            }
        }
        entry(0xffff_ffff, part.len(), 0, fork.len(), 0);
        table.extend(((chunks.len() / 40) as u32).to_be_bytes());
        table.extend(chunks);
        lists += &format!("<dict><key>Data</key>\n<data>\n{}\n</data></dict>\n", base64(&table));
    }
    let list = format!(
        "<?xml version=\"1.0\"?><plist><dict><key>resource-fork</key><dict><key>blkx</key><array>{lists}</array></dict></dict></plist>"
    );
    let mut trailer = vec![0; 512];
    trailer[..4].copy_from_slice(b"koly");
    for (at, value) in [(4, 4u32), (8, 512)] {
        trailer[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }
    for (at, value) in [(32, fork.len()), (216, fork.len()), (224, list.len()), (492, bytes.len() / 512)] {
        trailer[at..at + 8].copy_from_slice(&(value as u64).to_be_bytes());
    }
    let image = memory();
    image.write_all_at(&[fork, list.into_bytes(), trailer].concat(), 0).unwrap();
    image
}

fn bzip2(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn lzfse(bytes: &[u8]) -> Vec<u8> {
    let mut stored = Vec::new();
    lzfse_rust::LzfseRingEncoder::default().encode(&mut &bytes[..], &mut stored).unwrap();
    stored
}

#[test]
fn images_made_here_are_read_as_qemu_reads_them() {
    if !judge("images_made_here_are_read_as_qemu_reads_them", "qemu-img") {
        return;
    }
    let bytes = content(SIZE);
    let images = [
        ("bochs", bochs(&bytes, 0x0002_0000)),
        ("bochs", bochs(&bytes, 0x0001_0000)),
        ("cloop", cloop(&bytes[..5 << 20], 64 << 10)),
        ("cloop", cloop(&bytes[..5 << 20], 1 << 20)),
        ("dmg", dmg(&bytes, 0x8000_0005, packed)),
    ];
    for (format, image) in images {
        let dir = tempfile::tempdir().unwrap();
        let (_nodes, node) = open(format, &image).unwrap();
        let expected = read_by_qemu(format, &image, dir.path());
        assert!(bytes.starts_with(&expected), "{format}");
        reads_as(format, &node, &expected);
    }
}

/// Debian's qemu-img has these as modules of another package.
#[test]
fn chunks_packed_by_bzip2_and_lzfse_are_read() {
    let bytes = content(SIZE);
    for (kind, pack) in [(0x8000_0006, bzip2 as Pack), (0x8000_0007, lzfse)] {
        let (_nodes, node) = open("dmg", &dmg(&bytes, kind, pack)).unwrap();
        reads_as("dmg", &node, &bytes);
    }
    let error = refusal("dmg", &dmg(&bytes, 0x8000_0004, packed));
    assert_eq!(error, "chunks of this DMG are packed by ADC, which is not read here");
}

#[test]
fn images_that_break_the_rules_are_refused_with_the_rule() {
    let bytes = content(1 << 20);
    let with = |image: File, at: u64, bytes: &[u8]| {
        image.write_all_at(bytes, at).unwrap();
        image
    };
    let le = |value: u32| value.to_le_bytes();
    let bochs = || bochs(&bytes, 0x0002_0000);
    let cloop = || cloop(&bytes, 64 << 10);
    let dmg = || dmg(&bytes, 0x8000_0005, packed);
    let end = |image: &File| image.metadata().unwrap().len() - 512;
    let dmg_end = end(&dmg());
    let cases: Vec<(&'static str, File, &str)> = vec![
        ("bochs", with(bochs(), 64, &le(3)), "Image not in Bochs format"),
        ("bochs", with(bochs(), 72, &le(0x10_0001)), "Catalog size is too large"),
        ("bochs", with(bochs(), 72, &le(3)), "Catalog size is too small for this disk size"),
        ("bochs", with(bochs(), 80, &le(0)), "Extent size 0"),
        ("bochs", with(bochs(), 80, &le(0x100_0000)), "Extent size 16777216"),
        ("bochs", with(bochs(), 76, &le(1)), "a bitmap of 1 bytes"),
        ("bochs", with(bochs(), 68, &le(0xffff_ff00)), "the catalog at 4294967040"),
        ("cloop", with(cloop(), 128, &[0; 4]), "block_size 0"),
        ("cloop", with(cloop(), 128, &513u32.to_be_bytes()), "block_size 513"),
        ("cloop", with(cloop(), 128, &(128u32 << 20).to_be_bytes()), "block_size 134217728"),
        ("cloop", with(cloop(), 132, &u32::MAX.to_be_bytes()), "do not fit into the file"),
        ("dmg", with(dmg(), dmg_end, b"kool"), "no trailer"),
        ("dmg", with(dmg(), dmg_end + 224, &u64::MAX.to_be_bytes()), "property list"),
        ("dmg", with(dmg(), dmg_end + 216, &u64::MAX.to_be_bytes()), "property list"),
        ("dmg", with(dmg(), dmg_end + 224, &[0; 8]), "resource fork"),
        ("dmg", with(dmg(), dmg_end + 24, &u64::MAX.to_be_bytes()), "is not in the file"),
        ("dmg", with(dmg(), dmg_end + 24, &(1u64 << 40).to_be_bytes()), "is not in the file"),
    ];
    for (number, (format, image, expected)) in cases.into_iter().enumerate() {
        let error = refusal(format, &image);
        assert!(error.contains(expected), "case {number}, {format}: {error}");
    }
    for format in ["bochs", "cloop", "dmg", "parallels", "qcow", "qed", "vhdx"] {
        for len in [0, 3, 100, 600] {
            let image = memory();
            image.set_len(len).unwrap();
            assert!(!refusal(format.parse_name(), &image).is_empty());
        }
    }
}

#[test]
fn headers_of_qemus_images_that_break_the_rules_are_refused_with_the_rule() {
    if !judge("headers_of_qemus_images_that_break_the_rules_are_refused_with_the_rule", "qemu-img") {
        return;
    }
    let le = |value: u64| value.to_le_bytes().to_vec();
    let le32 = |value: u32| value.to_le_bytes().to_vec();
    let be = |value: u64| value.to_be_bytes().to_vec();
    let cases: Vec<(&'static str, u64, Vec<u8>, &str)> = vec![
        ("parallels", 0, vec![0], "Image not in Parallels format"),
        ("parallels", 16, le32(3), "Image not in Parallels format"),
        ("parallels", 28, le32(0), "a cluster of 0 sectors"),
        ("parallels", 28, le32(0x7fff_ffff), "a cluster of 2147483647 sectors"),
        ("parallels", 32, le32(0), "the table 0 entries"),
        ("parallels", 32, le32(0xffff_ffff), "the table ends at"),
        ("parallels", 36, le(u64::MAX), "the disk has 18446744073709551615 sectors"),
        ("qcow", 24, be(1), "Image size is too small"),
        ("qcow", 24, be(u64::MAX), "Image too large"),
        ("qcow", 32, vec![8], "Cluster size must be between 512 and 64k"),
        ("qcow", 32, vec![17], "Cluster size must be between 512 and 64k"),
        ("qcow", 33, vec![5], "L2 table size must be between 512 and 64k"),
        ("qcow", 33, vec![14], "L2 table size must be between 512 and 64k"),
        ("qcow", 36, vec![0, 0, 0, 1], "encrypted"),
        ("qcow", 40, be(u64::MAX - 7), "is not in the file"),
        ("qcow", 8, [be(1 << 40), 5u32.to_be_bytes().to_vec()].concat(), "lies behind the end"),
        ("qcow", 8, [be(64), 1024u32.to_be_bytes().to_vec()].concat(), "Backing file name too long"),
        ("qed", 4, le32(4097), "its cluster size is 4097"),
        ("qed", 4, le32(2048), "its cluster size is 2048"),
        ("qed", 8, le32(3), "its tables have 3 clusters"),
        ("qed", 8, le32(32), "its tables have 32 clusters"),
        ("qed", 16, le(16), "Unsupported QED features: 10"),
        ("qed", 40, le(100), "its L1 table at 100 is not in the file"),
        ("qed", 40, le(1 << 40), "is not in the file"),
        ("qed", 48, le(513), "its size is 513"),
        ("qed", 48, le(u64::MAX - 511), "its size is"),
        ("vhdx", 64 << 10, [vec![0; 4096], vec![0; 61440], vec![0; 4096]].concat(), "no VHDX header is valid"),
        ("vhdx", 192 << 10, vec![0; 128 << 10], "no VHDX region table is valid"),
    ];
    for (number, (format, at, bytes, expected)) in cases.into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let (path, name) = name_in(dir.path(), "image");
        run("qemu-img", &["create", "-q", "-f", format, &name, "20M"]);
        let image = in_memory(&path);
        image.write_all_at(&bytes, at).unwrap();
        let error = refusal(format, &image);
        assert!(error.contains(expected), "case {number}, {format}: {error}");
    }
}
