// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VDI, VHD and VMDK: checks and repairs, other sizes, parents, streams.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use block::{BlockNode, CheckReport, CreateRequest, NewExtent, OptionValue, Preallocation, Repair, ZeroFlags};
use support::recording::{Journal, What, recorded};
use support::{Nodes, Random, judge, memory, name_in, read, run, text, to_disk};

const MIB: u64 = 1 << 20;

fn request(file: Arc<BlockNode>, size: u64, options: &[(&'static str, &str)]) -> CreateRequest {
    let value = |value: &str| match value {
        "on" => OptionValue::Bool(true),
        other => OptionValue::Str(other.to_owned()),
    };
    CreateRequest {
        file,
        data_file: None,
        extents: Vec::new(),
        parent_cid: None,
        size,
        options: options.iter().map(|(name, text)| (*name, value(text))).collect(),
    }
}

/// An empty image in memory.
fn make(format: &str, size: u64, options: &[(&'static str, &str)]) -> File {
    let image = memory();
    let mut nodes = Nodes::new();
    let file = nodes.file(&image, true);
    let file = nodes.graph.get(&file).unwrap().clone();
    block::create(format, &request(file, size, options)).unwrap();
    image
}

fn open(format: &'static str, image: &File, writable: bool) -> block::Result<(Nodes, Arc<BlockNode>)> {
    let mut nodes = Nodes::new();
    let file = nodes.file(image, writable);
    let node = nodes.format(format, &[("file", &file)], writable, &[])?;
    Ok((nodes, node))
}

fn content(image: &File) -> Vec<u8> {
    let mut bytes = vec![0; image.metadata().unwrap().len() as usize];
    image.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn put(image: &File, at: u64, bytes: &[u8]) {
    image.write_all_at(bytes, at).unwrap();
}

fn check(format: &str, image: &File, repair: Repair) -> CheckReport {
    let mut nodes = Nodes::new();
    let file = nodes.file(image, repair != Repair::Nothing);
    block::check(nodes.graph.get(&file).unwrap(), format, repair, &mut |text| eprintln!("{format}: {text}")).unwrap()
}

/// Damage and leaks.
fn faults(format: &str, image: &File) -> (u64, u64) {
    let report = check(format, image, Repair::Nothing);
    (report.corruptions, report.leaks)
}

/// Where the first entry of the table stands, how entries are written, and bytes from a block's place to the next one's.
fn table(format: &str, image: &[u8]) -> (u64, fn(u32) -> [u8; 4], u64) {
    match format {
        "vdi" => (512, u32::to_le_bytes, MIB),
        "vpc" => (1536, u32::to_be_bytes, (2 * MIB + 512).next_multiple_of(4096)),
        _ => {
            let directory = u64::from_le_bytes(*image[56..].first_chunk().unwrap()) as usize * 512;
            (u64::from(u32::from_le_bytes(*image[directory..].first_chunk().unwrap())) * 512, u32::to_le_bytes, 65536)
        }
    }
}

const SIZE: u64 = 16 * MIB;
const FORMATS: [&str; 3] = ["vdi", "vpc", "vmdk"];

/// An image with three blocks that hold 1, 2 and 3.
fn with_three_blocks(format: &'static str) -> (File, u64, Vec<u8>) {
    let image = make(format, SIZE, &[]);
    let (nodes, node) = open(format, &image, true).unwrap();
    let block = node.info().cluster_size.unwrap();
    let mut expected = vec![0; node.len() as usize];
    for number in 0..3u64 {
        let at = (number * 2 * block) as usize;
        node.write(&[number as u8 + 1; 4096], at as u64, false).unwrap();
        expected[at..at + 4096].fill(number as u8 + 1);
    }
    drop((node, nodes));
    (image, block, expected)
}

#[test]
fn a_check_counts_what_is_there_and_finds_nothing_wrong() {
    for format in FORMATS {
        let (image, block, expected) = with_three_blocks(format);
        let report = check(format, &image, Repair::Nothing);
        assert_eq!((report.corruptions, report.leaks, report.allocated_clusters), (0, 0, 3), "{format}");
        assert_eq!(report.total_clusters, (expected.len() as u64).div_ceil(block), "{format}");
        let empty = check(format, &make(format, SIZE, &[]), Repair::Nothing);
        assert_eq!((empty.corruptions, empty.leaks, empty.allocated_clusters), (0, 0, 0), "{format}");
    }
    for (format, options) in [("vdi", ("static", "on")), ("vpc", ("subformat", "fixed"))] {
        assert_eq!(faults(format, &make(format, SIZE, &[options])), (0, 0), "{format}");
    }
}

#[test]
fn two_blocks_in_one_place_get_one_each_and_keep_what_they_showed() {
    for format in FORMATS {
        let (image, block, mut expected) = with_three_blocks(format);
        let bytes = content(&image);
        let (at, _, _) = table(format, &bytes);
        let first = &bytes[at as usize..][..4];
        // The second of the three, block 2, shows what block 0 has; what it had is leaked.
        put(&image, at + 8, first);
        let report = check(format, &image, Repair::Nothing);
        assert_eq!((report.corruptions > 0, report.leaks), (true, 1), "{format}: {report:?}");
        assert!(open(format, &image, true).is_err() || format == "vpc", "{format}");
        let report = check(format, &image, Repair::All);
        assert!(report.corruptions_fixed > 0, "{format}: {report:?}");
        check(format, &image, Repair::Leaks);
        assert_eq!(faults(format, &image), (0, 0), "{format}");
        expected[(2 * block) as usize..][..4096].fill(1);
        let (_nodes, node) = open(format, &image, true).unwrap();
        assert!(read(&node, 0, expected.len()).unwrap() == expected, "{format}");
        node.write(&[9; 512], 2 * block, false).unwrap();
        assert_eq!(read(&node, 0, 512).unwrap(), [1; 512], "{format}");
    }
}

#[test]
fn an_entry_that_leads_nowhere_says_nothing_after_a_repair() {
    for format in FORMATS {
        let (image, block, mut expected) = with_three_blocks(format);
        let (at, entry, _) = table(format, &content(&image));
        put(&image, at + 8, &entry(0x00ff_fff0));
        if format == "vdi" {
            put(&image, at + 8, &entry(15));
        }
        assert!(faults(format, &image).0 > 0, "{format}");
        check(format, &image, Repair::All);
        check(format, &image, Repair::Leaks);
        assert_eq!(faults(format, &image), (0, 0), "{format}");
        expected[(2 * block) as usize..][..4096].fill(0);
        let (_nodes, node) = open(format, &image, true).unwrap();
        assert!(read(&node, 0, expected.len()).unwrap() == expected, "{format}");
    }
}

#[test]
fn a_repair_does_not_write_out_what_a_whole_table_takes_from_one_block() {
    let image = make("vdi", 64 * MIB, &[]);
    let (nodes, node) = open("vdi", &image, true).unwrap();
    node.write(&[1; 4096], 0, false).unwrap();
    drop((node, nodes));
    let len = image.metadata().unwrap().len();
    put(&image, 512, &[0; 64 * 4]);
    let repaired = check("vdi", &image, Repair::All);
    assert_eq!((repaired.corruptions, repaired.corruptions_fixed), (63, 0));
    assert_eq!(image.metadata().unwrap().len(), len);
    // As few as an accident leaves get places of their own.
    put(&image, 512 + 4 * 4, &[0xff; 60 * 4]);
    let repaired = check("vdi", &image, Repair::All);
    assert_eq!((repaired.corruptions, repaired.corruptions_fixed), (0, 3));
    assert_eq!(faults("vdi", &image), (0, 0));
}

#[test]
fn leaked_room_is_given_back_and_the_file_gets_shorter() {
    if !judge("leaked_room_is_given_back_and_the_file_gets_shorter", "qemu-img") {
        return;
    }
    for format in FORMATS {
        let (image, block, mut expected) = with_three_blocks(format);
        let before = image.metadata().unwrap().len();
        let (at, entry, _) = table(format, &content(&image));
        // The first of the three: the last one moves to its place.
        let none = if format == "vmdk" { 0 } else { u32::MAX };
        put(&image, at, &entry(none));
        expected[..4096].fill(0);
        if format == "vmdk" {
            let bytes = content(&image);
            let directory = u64::from_le_bytes(*bytes[48..].first_chunk().unwrap()) as usize * 512;
            put(&image, u64::from(u32::from_le_bytes(*bytes[directory..].first_chunk().unwrap())) * 512, &entry(none));
        }
        assert_eq!(faults(format, &image), (0, 1), "{format}");
        assert_eq!(check(format, &image, Repair::Leaks).leaks_fixed, 1, "{format}");
        assert_eq!(faults(format, &image), (0, 0), "{format}");
        assert!(image.metadata().unwrap().len() + block <= before, "{format}");
        let dir = tempfile::tempdir().unwrap();
        let ((path, name), raw) = (name_in(dir.path(), "image"), dir.path().join("raw"));
        to_disk(&image, &path);
        std::fs::write(&raw, &expected).unwrap();
        run("qemu-img", &["compare", "-q", "-f", format, "-F", "raw", &name, text(&raw)]);
        if format != "vpc" {
            run("qemu-img", &["check", "-q", "-f", format, &name]);
        }
    }
}

#[test]
fn a_count_of_blocks_that_is_too_small_is_damage_and_a_writer_puts_nothing_over_them() {
    let (image, block, expected) = with_three_blocks("vdi");
    put(&image, 0x184, &[0; 4]);
    assert_eq!(faults("vdi", &image).0, 1);
    let (nodes, node) = open("vdi", &image, true).unwrap();
    node.write(&[7; 512], 7 * block, false).unwrap();
    assert!(read(&node, 0, 7 << 20).unwrap() == expected[..7 << 20]);
    drop((node, nodes));
    assert_eq!(faults("vdi", &image), (0, 0));
    put(&image, 0x184, &[0; 4]);
    check("vdi", &image, Repair::All);
    assert_eq!(faults("vdi", &image), (0, 0));
}

#[test]
fn room_that_a_crash_leaked_is_used_again() {
    let (image, block, mut expected) = with_three_blocks("vdi");
    put(&image, 512, &[0xff; 4]);
    expected[..4096].fill(0);
    let len = image.metadata().unwrap().len();
    let (nodes, node) = open("vdi", &image, true).unwrap();
    node.write(&[9; 512], 9 * block, false).unwrap();
    expected[9 << 20..(9 << 20) + 512].fill(9);
    assert!(read(&node, 0, expected.len()).unwrap() == expected);
    drop((node, nodes));
    assert_eq!(image.metadata().unwrap().len(), len);
    assert_eq!(faults("vdi", &image), (0, 0));
}

#[test]
fn a_missing_last_footer_of_a_vhd_is_written_by_a_repair() {
    let (image, _, expected) = with_three_blocks("vpc");
    let len = image.metadata().unwrap().len();
    image.set_len(len - 512).unwrap();
    assert_eq!(faults("vpc", &image), (0, 1));
    check("vpc", &image, Repair::Leaks);
    assert_eq!(faults("vpc", &image), (0, 0));
    assert_eq!(content(&image)[..512], content(&image)[len as usize - 512..]);
    let (_nodes, node) = open("vpc", &image, true).unwrap();
    assert!(read(&node, 0, expected.len()).unwrap() == expected);
}

#[test]
fn images_grow_to_what_qemu_reads_and_new_bytes_are_zeroes() {
    if !judge("images_grow_to_what_qemu_reads_and_new_bytes_are_zeroes", "qemu-img") {
        return;
    }
    type Row = (&'static str, &'static [(&'static str, &'static str)], u64, u64);
    let rows: &[Row] = &[
        ("vdi", &[], 3 * MIB + 512, 9 * MIB + 1024),
        ("vdi", &[("static", "on")], 3 * MIB, 5 * MIB),
        ("vpc", &[("force_size", "on")], 3 * MIB + 512, 100 * MIB),
        ("vpc", &[], 3 * MIB, 9 * MIB),
        ("vpc", &[("subformat", "fixed")], 3 * MIB, 9 * MIB),
        ("vpc", &[("subformat", "fixed"), ("force_size", "on")], 3 * MIB, 3 * MIB + 512),
    ];
    for &(format, options, small, large) in rows {
        let image = make(format, small, options);
        let (nodes, node) = open(driver(format), &image, true).unwrap();
        let small = node.len();
        let mut expected = vec![0; large as usize];
        for at in [0, small - 512] {
            node.write(&[5; 512], at, false).unwrap();
            expected[at as usize..at as usize + 512].fill(5);
        }
        node.resize(large, Preallocation::Off).unwrap();
        assert_eq!(node.len(), large, "{format} {options:?}");
        assert!(read(&node, 0, large as usize).unwrap() == expected, "{format} {options:?}");
        for at in [small, large - 1024] {
            node.write(&[6; 512], at, false).unwrap();
            expected[at as usize..at as usize + 512].fill(6);
        }
        drop((node, nodes));
        assert_eq!(faults(format, &image), (0, 0), "{format} {options:?}");
        let dir = tempfile::tempdir().unwrap();
        let ((path, name), raw) = (name_in(dir.path(), "image"), dir.path().join("raw"));
        to_disk(&image, &path);
        std::fs::write(&raw, &expected).unwrap();
        let info = run("qemu-img", &["info", "--output=json", "-f", format, &name]);
        assert!(info.contains(&format!("\"virtual-size\": {large}")), "{format} {options:?}: {info}");
        run("qemu-img", &["compare", "-q", "-f", format, "-F", "raw", &name, text(&raw)]);
    }
}

/// The name of a driver, for ever.
fn driver(format: &str) -> &'static str {
    block::driver_named(format).unwrap().name
}

#[test]
fn a_fixed_vhd_gets_smaller_and_others_say_that_they_do_not() {
    let image = make("vpc", 3 * MIB, &[("subformat", "fixed"), ("force_size", "on")]);
    let (nodes, node) = open("vpc", &image, true).unwrap();
    node.resize(MIB, Preallocation::Off).unwrap();
    drop((node, nodes));
    assert_eq!(image.metadata().unwrap().len(), MIB + 512);
    assert_eq!(open("vpc", &image, true).unwrap().1.len(), MIB);
    for (format, options, to, reason) in [
        ("vdi", &[][..], MIB, "do not become smaller"),
        ("vdi", &[], 1 << 42, "has room for"),
        ("vpc", &[], MIB, "do not become smaller"),
        ("vpc", &[], 1 << 38, "has room for"),
        ("vpc", &[], 1 << 42, "at most"),
        ("vmdk", &[], 4 * MIB, "does not support resize"),
    ] {
        let image = make(format, 3 * MIB, options);
        let (_nodes, node) = open(format, &image, true).unwrap();
        let len = node.len();
        let error = node.resize(to, Preallocation::Off).unwrap_err().to_string();
        assert!(error.contains(reason), "{format}: {error}");
        assert_eq!(node.len(), len, "{format}");
    }
}

#[test]
fn a_stream_is_written_from_front_to_end() {
    let journal = Journal::new();
    let (file, _) = recorded(&journal, 0, Vec::new());
    let request = request(file, 70 * MIB, &[("subformat", "streamOptimized")]);
    let mut stream = block::stream("vmdk", &request).unwrap().unwrap();
    let mut random = Random(5);
    for number in (0..1120).step_by(3) {
        let grain: Vec<u8> = (0..65536).map(|_| random.next() as u8).collect();
        stream.put(number * 65536, &block::Stream::pack(&grain).unwrap()).unwrap();
    }
    assert!(stream.put(0, &block::Stream::pack(&[1]).unwrap()).is_err(), "what is over does not come again");
    assert!(stream.put(70 << 20, &block::Stream::pack(&[1]).unwrap()).is_err(), "behind the end there is nothing");
    stream.finish().unwrap();
    let mut end = 0;
    for event in journal.events() {
        if let What::Write(at, bytes) = event.what {
            assert_eq!(at, end, "nothing is written twice, nothing is left out");
            end = at + bytes.len() as u64;
        }
    }
}

/// Makes a differencing VHD over a disk with this UUID out of a dynamic one.
fn make_differencing(image: &File, parent: &[u8]) {
    let mut bytes = content(image);
    let end = bytes.len() - 512;
    for at in [0, end] {
        bytes[at + 60..at + 64].copy_from_slice(&4u32.to_be_bytes());
        bytes[at + 68..at + 84].fill(u8::from(at.is_multiple_of(2)));
        sum(&mut bytes[at..at + 512], 64);
    }
    let header = &mut bytes[512..1536];
    header[40..56].copy_from_slice(parent);
    for (at, unit) in "C:\\disks\\base.vhd".encode_utf16().enumerate() {
        header[64 + at * 2..66 + at * 2].copy_from_slice(&unit.to_be_bytes());
    }
    sum(header, 36);
    put(image, 0, &bytes);
}

fn sum(structure: &mut [u8], at: usize) {
    structure[at..at + 4].fill(0);
    let sum = !structure.iter().fold(0u32, |sum, &byte| sum.wrapping_add(byte.into()));
    structure[at..at + 4].copy_from_slice(&sum.to_be_bytes());
}

#[test]
fn a_differencing_vhd_shows_its_parent_sector_by_sector_and_completes_what_it_writes() {
    let size = 8 * MIB;
    let base = make("vpc", size, &[("force_size", "on")]);
    let (nodes, node) = open("vpc", &base, true).unwrap();
    let mut expected: Vec<u8> = (0..size).map(|at| (at / 512 % 251) as u8 + 1).collect();
    node.write(&expected, 0, false).unwrap();
    drop((node, nodes));
    let top = make("vpc", size, &[("force_size", "on")]);
    let (nodes, node) = open("vpc", &top, true).unwrap();
    node.write(&[0xaa; 8192], 2 * MIB, false).unwrap();
    drop((node, nodes));
    make_differencing(&top, &content(&base)[68..84]);
    // Of the block it has every third sector, as other programs leave it.
    let bytes = content(&top);
    let place = u64::from(u32::from_be_bytes(*bytes[1540..].first_chunk().unwrap())) * 512;
    let bitmap: Vec<u8> = (0..512u64)
        .map(|byte| (0..8).fold(0, |bits, bit| bits | if (byte * 8 + bit) % 3 == 0 { 0x80 >> bit } else { 0 }))
        .collect();
    put(&top, place, &bitmap);
    for sector in (0..4096).step_by(3) {
        let at = 2 * MIB as usize + sector * 512;
        expected[at..at + 512].fill(if sector < 16 { 0xaa } else { 0 });
    }
    let open_over = |base: &File, writable| {
        let mut nodes = Nodes::new();
        let (top, bottom) = (nodes.file(&top, writable), nodes.file(base, false));
        let below = nodes.format("vpc", &[("file", &bottom)], false, &[])?;
        let node = nodes.format("vpc", &[("file", &top), ("backing", below.name())], writable, &[])?;
        Ok::<_, block::Error>((nodes, node))
    };
    let missing = open("vpc", &top, false).map(|_| ()).unwrap_err().to_string();
    assert!(missing.contains("parent 'C:/disks/base.vhd': give 'backing' a node"), "{missing}");
    let other = make("vpc", size, &[("force_size", "on")]);
    let error = open_over(&other, false).map(|_| ()).unwrap_err().to_string();
    let uuid = |image: &File| content(image)[68..84].iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let flat = error.replace('-', "");
    assert!(flat.contains(&uuid(&base)) && flat.contains(&uuid(&other)), "both are named: {error}");
    let (nodes, node) = open_over(&base, false).unwrap();
    assert!(read(&node, 0, expected.len()).unwrap() == expected);
    drop((node, nodes));
    let (nodes, node) = open_over(&base, true).unwrap();
    let mut random = Random(11);
    for _ in 0..300 {
        let offset = random.below(size);
        let len = (1 + random.below(9000)).min(size - offset);
        let range = offset as usize..(offset + len) as usize;
        match random.below(4) {
            0 => {
                node.write_zeroes(offset, len, ZeroFlags::default(), false).unwrap();
                expected[range].fill(0);
            }
            1 => {
                node.write(&vec![0x77; range.len()], offset, false).unwrap();
                expected[range].fill(0x77);
            }
            _ => assert!(read(&node, offset, range.len()).unwrap() == expected[range], "at {offset}"),
        }
    }
    drop((node, nodes));
    let (_nodes, node) = open_over(&base, false).unwrap();
    assert!(read(&node, 0, expected.len()).unwrap() == expected);
    assert_eq!(faults("vpc", &top), (0, 0));
    let dir = tempfile::tempdir().unwrap();
    let names = ["top.vhd", "disk", "base.vhd"].map(|name| dir.path().join(name).to_str().unwrap().to_owned());
    for (name, bytes) in names.iter().zip([&content(&top), &expected, &content(&base)]) {
        std::fs::write(name, bytes).unwrap();
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let python = root.join("target/judges/python/bin/python3");
    if judge("a_differencing_vhd_shows_its_parent_sector_by_sector", python.to_str().unwrap()) {
        let [top, disk, base] = &names;
        let script = root.join("tests/python/readers.py");
        let said = run(python.to_str().unwrap(), &[script.to_str().unwrap(), "vpc", top, disk, base]);
        assert_eq!(said, format!("libyal same {size}\n"));
    }
}

#[test]
fn a_differencing_vdi_refuses_the_wrong_parent_and_names_both() {
    let base = make("vdi", 4 * MIB, &[]);
    let (nodes, node) = open("vdi", &base, true).unwrap();
    node.write(&[3; 4096], MIB, false).unwrap();
    drop((node, nodes));
    let (top, other) = (make("vdi", 4 * MIB, &[]), make("vdi", 4 * MIB, &[]));
    put(&top, 0x4c, &[4]);
    put(&top, 0x1a8, &content(&base)[0x188..0x198]);
    let open_over = |base: &File| {
        let mut nodes = Nodes::new();
        let (top, bottom) = (nodes.file(&top, true), nodes.file(base, false));
        let below = nodes.format("vdi", &[("file", &bottom)], false, &[])?;
        let node = nodes.format("vdi", &[("file", &top), ("backing", below.name())], true, &[])?;
        Ok::<_, block::Error>((nodes, node))
    };
    let error = open_over(&other).map(|_| ()).unwrap_err().to_string();
    let last = |image: &File| content(image)[0x192..0x198].iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert!(error.contains(&last(&base)) && error.contains(&last(&other)), "both are named: {error}");
    let (_nodes, node) = open_over(&base).unwrap();
    node.write(&[4; 512], MIB + 512, false).unwrap();
    assert_eq!(read(&node, MIB, 1024).unwrap(), [[3; 512], [4; 512]].concat());
    assert_eq!(
        node.resize(8 * MIB, Preallocation::Off).unwrap_err().to_string(),
        "a differencing VDI image is as large as its parent"
    );
}

#[test]
fn a_disk_is_made_in_extents_that_are_nodes() {
    let mut nodes = Nodes::new();
    let (image, first, second) = (memory(), memory(), memory());
    let names = [nodes.file(&image, true), nodes.file(&first, true), nodes.file(&second, true)];
    let [file, first, second] = names.clone().map(|name| nodes.graph.get(&name).unwrap().clone());
    let mut wanted = request(file, 3 << 30, &[("subformat", "twoGbMaxExtentSparse")]);
    let error = block::create("vmdk", &wanted).unwrap_err().to_string();
    assert!(error.contains("'extents' has 0 nodes"), "{error}");
    wanted.extents = [("one", first), ("two", second)].map(|(name, node)| NewExtent { name: name.into(), node }).into();
    block::create("vmdk", &wanted).unwrap();
    drop(wanted);
    let children = [("file", names[0].as_str()), ("extents.0", &names[1]), ("extents.1", &names[2])];
    let node = nodes.format("vmdk", &children, true, &[]).unwrap();
    assert_eq!(node.len(), 3 << 30);
    node.write(&[1; 1024], (2 << 30) - 512, false).unwrap();
    assert_eq!(read(&node, (2 << 30) - 1024, 2048).unwrap(), [[0; 512], [1; 512], [1; 512], [0; 512]].concat());
}
