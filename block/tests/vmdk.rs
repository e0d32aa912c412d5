// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMDK: read as qemu-img reads it, random requests against a vector of bytes, failed allocations, parents, and images that
//! break the rules.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use block::{BlockNode, InfoValue, ZeroFlags, inspect};
use rustix::io::Errno;
use support::requests::{random_requests, with_a_full_disk};
use support::{Nodes, Random, in_memory, judge, memory, name_in, read, run, text, to_disk};

const SIZE: u64 = (9 << 20) + 512;
const SPARSE: &[&str] = &["subformat=monolithicSparse,zeroed_grain=on", "subformat=monolithicSparse,zeroed_grain=off"];
const STREAM: &str = "subformat=streamOptimized";

fn create(options: &str, dir: &Path) -> File {
    let (path, name) = name_in(dir, "image");
    run("qemu-img", &["create", "-q", "-f", "vmdk", "-o", options, &name, &SIZE.to_string()]);
    in_memory(&path)
}

/// Bytes with holes, patterns and noise, and an image that qemu-img made of them.
fn filled(options: &str, dir: &Path) -> (Vec<u8>, File) {
    let mut bytes = vec![0; SIZE as usize];
    let mut random = Random(7);
    for (index, chunk) in bytes.chunks_mut(700_000).enumerate().filter(|(index, _)| index % 3 != 1) {
        chunk.fill(index as u8 + 1);
        if index % 2 == 0 {
            chunk.fill_with(|| random.next() as u8);
        }
    }
    let (raw, _) = name_in(dir, "raw");
    std::fs::write(&raw, &bytes).unwrap();
    let (path, name) = name_in(dir, "filled");
    run("qemu-img", &["convert", "-f", "raw", "-O", "vmdk", "-o", options, text(&raw), &name]);
    (bytes, in_memory(&path))
}

fn open(image: &File, writable: bool) -> block::Result<(Nodes, Arc<BlockNode>)> {
    let mut nodes = Nodes::new();
    let file = nodes.file(image, writable);
    let node = nodes.format("vmdk", &[("file", &file)], writable, &[])?;
    Ok((nodes, node))
}

/// A guest sees the same bytes through qemu-img, which finds nothing wrong.
fn compare(image: &File, bytes: &[u8], dir: &Path) {
    let (path, name) = name_in(dir, "image");
    to_disk(image, &path);
    let expected = dir.join("expected");
    std::fs::write(&expected, bytes).unwrap();
    run("qemu-img", &["compare", "-q", "-f", "vmdk", "-F", "raw", &name, text(&expected)]);
    run("qemu-img", &["check", "-q", "-f", "vmdk", &name]);
}

fn fact(node: &BlockNode, name: &str) -> u64 {
    match node.info().specifics.into_iter().find(|(known, _)| *known == name) {
        Some((_, InfoValue::Int(value))) => value,
        other => panic!("{name}: {other:?}"),
    }
}

#[test]
fn images_filled_by_qemu_are_read_as_it_says() {
    if !judge("images_filled_by_qemu_are_read_as_it_says", "qemu-img") {
        return;
    }
    for options in [SPARSE[0], SPARSE[1], STREAM] {
        let dir = tempfile::tempdir().unwrap();
        let (bytes, image) = filled(options, dir.path());
        let (_nodes, node) = open(&image, false).unwrap();
        assert_eq!(node.len(), SIZE, "{options}");
        let mut nodes = Nodes::new();
        let file = nodes.file(&image, false);
        let found = inspect(nodes.graph.get(&file).unwrap(), None).unwrap();
        assert_eq!((found.format, found.virtual_size, found.writable), ("vmdk", SIZE, options != STREAM));
        assert!(read(&node, 0, bytes.len()).unwrap() == bytes, "{options}");
        let mut random = Random(3);
        for _ in 0..100 {
            let offset = random.below(SIZE);
            let len = (1 + random.below(200_000)).min(SIZE - offset) as usize;
            assert!(read(&node, offset, len).unwrap() == bytes[offset as usize..][..len], "{options} at {offset}");
        }
    }
}

#[test]
fn a_stream_whose_directory_is_at_its_end_is_read() {
    if !judge("a_stream_whose_directory_is_at_its_end_is_read", "qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (bytes, image) = filled(STREAM, dir.path());
    let mut end = [0; 1536];
    image.read_exact_at(&mut end[512..1024], 0).unwrap();
    end[12..16].copy_from_slice(&3u32.to_le_bytes());
    let len = image.metadata().unwrap().len().next_multiple_of(512);
    image.write_all_at(&end, len).unwrap();
    image.write_all_at(&[0xff; 8], 56).unwrap();
    compare(&image, &bytes, dir.path());
    let (_nodes, node) = open(&image, false).unwrap();
    assert!(read(&node, 0, bytes.len()).unwrap() == bytes);
    image.set_len(len + 1024).unwrap();
    let error = open(&image, false).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("cut off"), "{error}");
}

#[test]
fn a_compressed_grain_that_is_broken_or_another_one_is_an_error() {
    if !judge("a_compressed_grain_that_is_broken_or_another_one_is_an_error", "qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (bytes, image) = filled(STREAM, dir.path());
    let mut start = [0; 512];
    image.read_exact_at(&mut start, 64).unwrap();
    let first_grain = u64::from_le_bytes(*start.first_chunk().unwrap()) * 512;
    let mut marker = [0; 12];
    image.read_exact_at(&mut marker, first_grain).unwrap();
    for (what, at, value) in [
        ("another sector", 0, vec![128]),
        ("size 0", 8, vec![0; 4]),
        ("size of 2^32-1", 8, vec![0xff; 4]),
        ("no zlib stream", 12, vec![0xff; 4]),
        ("half a stream", 8, vec![100, 0, 0, 0]),
    ] {
        let mut before = vec![0; value.len()];
        image.read_exact_at(&mut before, first_grain + at).unwrap();
        image.write_all_at(&value, first_grain + at).unwrap();
        let (_nodes, node) = open(&image, false).unwrap();
        let grain = u64::from_le_bytes(*marker.first_chunk().unwrap()) * 512;
        let error = read(&node, grain, 512).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::IO.raw_os_error()), "{what}");
        // The others are as they were.
        assert!(read(&node, grain + (64 << 10), 65536).unwrap() == bytes[grain as usize + 65536..][..65536], "{what}");
        image.write_all_at(&before, first_grain + at).unwrap();
    }
}

#[test]
fn random_requests_leave_what_a_vector_of_bytes_has() {
    if !judge("random_requests_leave_what_a_vector_of_bytes_has", "qemu-img") {
        return;
    }
    for options in SPARSE {
        let dir = tempfile::tempdir().unwrap();
        let image = create(options, dir.path());
        let bytes = random_requests(options, SIZE ^ options.len() as u64, || open(&image, true).unwrap());
        compare(&image, &bytes, dir.path());
        // The second copy of the tables says the same as the first: QEMU reads one, another program the other.
        let mut header = [0; 64];
        image.read_exact_at(&mut header, 0).unwrap();
        let at = |field: usize| u64::from_le_bytes(*header[field..].first_chunk().unwrap()) * 512;
        let tables = |directory: u64| {
            let mut table = vec![0; 2048];
            let mut sector = [0; 4];
            image.read_exact_at(&mut sector, directory).unwrap();
            image.read_exact_at(&mut table, u64::from(u32::from_le_bytes(sector)) * 512).unwrap();
            table
        };
        let first = tables(at(56));
        assert!(first == tables(at(48)) && first.iter().any(|&byte| byte != 0), "{options}");
    }
}

#[test]
fn the_first_write_after_each_open_gives_the_image_a_new_cid() {
    if !judge("the_first_write_after_each_open_gives_the_image_a_new_cid", "qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = create(SPARSE[0], dir.path());
    let mut seen = Vec::new();
    for round in 0..3u8 {
        let (_nodes, node) = open(&image, true).unwrap();
        seen.push(fact(&node, "cid"));
        node.write(&[round; 512], 0, false).unwrap();
        let after = fact(&node, "cid");
        node.write(&[round; 512], 1 << 20, false).unwrap();
        assert_eq!(fact(&node, "cid"), after, "once, not with every write");
        assert_ne!(seen.last(), Some(&after));
    }
    let (_nodes, node) = open(&image, true).unwrap();
    assert_eq!(read(&node, 0, 1).unwrap(), [2]);
    let kept = fact(&node, "cid");
    drop((node, _nodes));
    let (path, name) = name_in(dir.path(), "image");
    to_disk(&image, &path);
    let said = run("qemu-img", &["info", "--output=json", &name]);
    assert!(said.contains(&format!("\"cid\": {kept}")), "{kept} in {said}");
}

#[test]
fn a_failed_allocation_loses_nothing_that_is_flushed_later() {
    if !judge("a_failed_allocation_loses_nothing_that_is_flushed_later", "qemu-img") {
        return;
    }
    for refused in 0..20 {
        let dir = tempfile::tempdir().unwrap();
        let image = create(SPARSE[0], dir.path());
        let (bytes, left) = with_a_full_disk("vmdk", SPARSE[0], &image, refused);
        compare(&left, &bytes, dir.path());
    }
}

#[test]
fn an_overlay_shows_its_parent_until_that_is_another_content() {
    if !judge("an_overlay_shows_its_parent_until_that_is_another_content", "qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (bytes, parent) = filled(SPARSE[0], dir.path());
    let (path, name) = name_in(dir.path(), "overlay");
    let (_, parent_name) = name_in(dir.path(), "filled");
    let options = "zeroed_grain=on";
    run("qemu-img", &["create", "-q", "-f", "vmdk", "-o", options, "-b", &parent_name, "-F", "vmdk", &name]);
    // A grain of zeroes over data below, of which a part is written later.
    run("qemu-io", &["-f", "vmdk", "-c", "write -z 0 128k", &name]);
    let overlay = in_memory(&path);
    let mut nodes = Nodes::new();
    let (top, bottom) = (nodes.file(&overlay, true), nodes.file(&parent, false));
    let missing = nodes.format("vmdk", &[("file", &top)], true, &[]).unwrap_err().to_string();
    assert!(missing.contains("filled': give 'backing' a node"), "{missing}");
    let below = nodes.format("vmdk", &[("file", &bottom)], false, &[]).unwrap();
    let node = nodes.format("vmdk", &[("file", &top), ("backing", below.name())], true, &[]).unwrap();
    let mut expected = bytes.clone();
    expected[..128 << 10].fill(0);
    assert!(read(&node, 0, expected.len()).unwrap() == expected);
    for offset in [4096, 5_000_000, 8_999_000, SIZE as usize - 300] {
        node.write(&[0x5a; 200], offset as u64, false).unwrap();
        expected[offset..offset + 200].fill(0x5a);
    }
    assert!(read(&node, 0, expected.len()).unwrap() == expected);
    drop((node, below, nodes));
    to_disk(&overlay, &path);
    let raw = dir.path().join("expected");
    std::fs::write(&raw, &expected).unwrap();
    run("qemu-img", &["compare", "-q", "-f", "vmdk", "-F", "raw", &name, text(&raw)]);

    let (changed, writer) = open(&parent, true).unwrap();
    writer.write(&[1], 0, false).unwrap();
    drop((writer, changed));
    let mut nodes = Nodes::new();
    let (top, bottom) = (nodes.file(&overlay, false), nodes.file(&parent, false));
    let below = nodes.format("vmdk", &[("file", &bottom)], false, &[]).unwrap();
    let error = nodes.format("vmdk", &[("file", &top), ("backing", below.name())], false, &[]).unwrap_err().to_string();
    assert!(error.contains("parent was changed"), "{error}");
    // Of another format nothing can be asked: the caller is believed.
    nodes.format("vmdk", &[("file", &top), ("backing", &bottom)], false, &[]).unwrap();
}

/// Opens the descriptor `name` in a directory and its extents, the files called `extents`.
fn open_parts(dir: &Path, name: &str, extents: &[&str], writable: bool) -> block::Result<(Nodes, Arc<BlockNode>)> {
    let edges = ["extents.0", "extents.1", "extents.2", "extents.3"];
    let mut nodes = Nodes::new();
    let mut node = |name: &str| {
        let file = File::options().read(true).write(writable).open(dir.join(name)).unwrap();
        nodes.file(&file, writable)
    };
    let names: Vec<String> = std::iter::once(name).chain(extents.iter().copied()).map(&mut node).collect();
    let children: Vec<(&'static str, &str)> =
        std::iter::once("file").chain(edges).zip(&names).map(|(edge, name)| (edge, name.as_str())).collect();
    let node = nodes.format("vmdk", &children, writable, &[])?;
    Ok((nodes, node))
}

#[test]
fn disks_in_several_files_are_written_as_qemu_reads_them() {
    if !judge("disks_in_several_files_are_written_as_qemu_reads_them", "qemu-img") {
        return;
    }
    let rows: &[(&str, u64, &[&str])] = &[
        ("monolithicFlat", 9 << 20, &["d-flat.vmdk"]),
        ("twoGbMaxExtentSparse", 3 << 30, &["d-s001.vmdk", "d-s002.vmdk"]),
        ("twoGbMaxExtentFlat", 3 << 30, &["d-f001.vmdk", "d-f002.vmdk"]),
    ];
    for &(subformat, size, extents) in rows {
        let dir = tempfile::tempdir().unwrap();
        let (_, name) = name_in(dir.path(), "d.vmdk");
        let options = format!("subformat={subformat}");
        run("qemu-img", &["create", "-q", "-f", "vmdk", "-o", &options, &name, &size.to_string()]);
        let (path, raw) = name_in(dir.path(), "raw");
        let expected = File::create(path).unwrap();
        expected.set_len(size).unwrap();
        let (nodes, node) = open_parts(dir.path(), "d.vmdk", extents, true).unwrap();
        let before = fact(&node, "cid");
        assert_eq!(node.len(), size);
        for (index, offset) in [0, size - 700, size / 2, (2 << 30) - 100_000].into_iter().enumerate() {
            if offset >= size {
                continue;
            }
            // The last one goes over the end of an extent.
            let bytes = vec![index as u8 + 1; (size - offset).min(200_000) as usize];
            node.write(&bytes, offset, false).unwrap();
            expected.write_all_at(&bytes, offset).unwrap();
            assert!(read(&node, offset, bytes.len()).unwrap() == bytes, "{subformat} at {offset}");
        }
        node.write_zeroes(size / 2 + 5000, 100_000, ZeroFlags::default(), false).unwrap();
        expected.write_all_at(&[0; 100_000], size / 2 + 5000).unwrap();
        assert_ne!(fact(&node, "cid"), before);
        drop((node, nodes));
        run("qemu-img", &["compare", "-q", "-f", "vmdk", "-F", "raw", &name, &raw]);
        let (_nodes, node) = open_parts(dir.path(), "d.vmdk", extents, false).unwrap();
        assert_eq!(read(&node, 199_999, 2).unwrap(), [1, 0], "{subformat}");
    }
}

#[test]
fn extent_lines_say_where_bytes_are_and_who_may_have_them() {
    let dir = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = (0..16 * 512u32).map(|index| (index / 512) as u8 + 1).collect();
    std::fs::write(dir.path().join("flat"), &bytes).unwrap();
    std::fs::write(dir.path().join("other"), &bytes).unwrap();
    let text = "# Disk DescriptorFile\nparentCID=ffffffff\nCID=00000001\ncreateType=\"twoGbMaxExtentFlat\"\n\
                RW 2 FLAT \"a b.vmdk\" 3\nRDONLY 2 ZERO\nRDONLY 4 FLAT \"/etc/passwd\" 0\nNOACCESS 1 FLAT \"json:{}\" 5\n";
    std::fs::write(dir.path().join("d"), text).unwrap();
    // One file can be more than one extent, for reading.
    let (_nodes, node) = open_parts(dir.path(), "d", &["flat", "other", "other"], true).unwrap();
    assert_eq!(node.len(), 9 * 512);
    let seen = read(&node, 0, 8 * 512).unwrap();
    let sectors: Vec<u8> = seen.chunks(512).map(|sector| sector[0]).collect();
    assert_eq!(sectors, [4, 5, 0, 0, 1, 2, 3, 4]);
    let errno = |result: std::io::Result<()>| result.unwrap_err().raw_os_error();
    assert_eq!(errno(read(&node, 8 * 512, 512).map(drop)), Some(Errno::ACCESS.raw_os_error()));
    for sector in [2, 4, 8] {
        assert_eq!(errno(node.write(&[9; 512], sector * 512, false)), Some(Errno::ROFS.raw_os_error()));
    }
    node.write(&[9; 512], 512, true).unwrap();
    let written = std::fs::read(dir.path().join("flat")).unwrap();
    assert_eq!((written[4 * 512], written[5 * 512]), (9, 6));
    assert!(std::fs::read(dir.path().join("other")).unwrap() == bytes);
    // The CID changed, and not the end of `parentCID`.
    let text = std::fs::read_to_string(dir.path().join("d")).unwrap();
    assert!(text.contains("parentCID=ffffffff\n") && !text.contains("CID=00000001"), "{text}");
}

#[test]
fn descriptors_that_break_the_rules_are_refused_with_the_reason() {
    let rows: &[(&str, &str, &str)] = &[
        ("monolithicFlat", "", "names no extents"),
        ("monolithicFlat", "RW 0 FLAT \"a\" 0\n", "names no extents"),
        (
            "monolithicFlat",
            "RW 2 FLAT \"a\" 0\nRW 2 FLAT \"b.vmdk\" 0\n",
            "'extents.1' is missing: a node with what the VMDK calls 'b.vmdk'",
        ),
        ("monolithicFlat", "RW 2 ZERO\n", "has 1 nodes"),
        ("monolithicFlat", "RW 2 FLAT \"a\"\n", "begins nowhere"),
        ("monolithicFlat", "RW 99 FLAT \"a\" 0\n", "has 8192 bytes"),
        ("monolithicFlat", "RW 2 FLAT \"a\" 15\n", "has 512 bytes"),
        ("monolithicFlat", "RW 2 FLAT \"a\" 36028797018963967\n", "has 0 bytes"),
        ("monolithicFlat", "RW 18446744073709551615 FLAT \"a\" 0\n", "too large together"),
        ("monolithicFlat", "RW 99999999999999999999 FLAT \"a\" 0\n", "Invalid extent line"),
        ("monolithicFlat", "RW 2 FLAT a 0\n", "Invalid extent line"),
        ("monolithicFlat", "RW -2 FLAT \"a\" 0\n", "Invalid extent line"),
        ("monolithicFlat", "RW 2 SESPARSE \"a\"\n", "does not begin like one"),
        ("monolithicFlat", "RW 2 VMFSRDM \"a\"\n", "Unsupported extent type 'VMFSRDM'"),
        ("twoGbMaxExtentSparse", "RW 2 SPARSE \"a\"\n", "not in VMDK format"),
        ("monolithicFlat", "RDONLY 2 FLAT \"a\" 0\n", "lets nobody write"),
        ("fullDevice", "RW 2 FLAT \"a\" 0\n", "Unsupported image type 'fullDevice'"),
        ("monolithicSparse", "RW 2 SPARSE \"a\"\n", "Unsupported image type 'monolithicSparse'"),
    ];
    for (kind, lines, reason) in rows {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("flat"), [1; 8192]).unwrap();
        let text = format!("# Disk DescriptorFile\nCID=1234abcd\ncreateType=\"{kind}\"\n{lines}");
        std::fs::write(dir.path().join("d"), text).unwrap();
        let error = open_parts(dir.path(), "d", &["flat"], true).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(reason), "{kind} {lines}: {error}");
    }
}

#[test]
fn images_that_break_the_rules_are_refused_with_the_reason() {
    if !judge("images_that_break_the_rules_are_refused_with_the_reason", "qemu-img") {
        return;
    }
    type Change = fn(&mut Vec<u8>);
    fn put(image: &mut [u8], at: usize, value: &[u8]) {
        image[at..at + value.len()].copy_from_slice(value);
    }
    fn swap(image: &mut [u8], old: &[u8], new: &[u8]) {
        let at = image.windows(old.len()).position(|window| window == old).unwrap();
        image[at..at + old.len()].copy_from_slice(new);
    }
    /// Where the first table that the directory named at `field` names stands.
    fn table(image: &[u8], field: usize) -> usize {
        let directory = u64::from_le_bytes(*image[field..].first_chunk().unwrap()) as usize * 512;
        u32::from_le_bytes(*image[directory..].first_chunk().unwrap()) as usize * 512
    }
    let rows: &[(&str, Change, &str)] = &[
        ("magic", |image| image[0] = 0, "not in VMDK format"),
        ("ESX", |image| put(image, 0, b"COWD"), "COWD"),
        ("seSparse", |image| put(image, 0, &0xcafe_babe_u64.to_le_bytes()), "seSparse"),
        ("version 0", |image| image[4] = 0, "version 0"),
        ("version 4", |image| image[4] = 4, "version 4"),
        ("version 3, writable", |image| image[4] = 3, "must be read only"),
        ("text copy", |image| image[75] = b'\n', "copied as text"),
        ("compressed, writable", |image| put(image, 10, &[3]), "compression 0"),
        ("grain 0", |image| put(image, 20, &[0; 8]), "Invalid grain size 0"),
        ("grain 3", |image| put(image, 20, &[3]), "Invalid grain size"),
        ("grain of 2^63", |image| image[27] = 0x80, "too large"),
        ("grain of 128 MiB", |image| put(image, 20, &(1u64 << 18).to_le_bytes()), "Invalid grain size"),
        ("no entries", |image| put(image, 44, &[0; 4]), "L2 table size 0"),
        ("2^32-1 entries", |image| put(image, 44, &[0xff; 4]), "L2 table size"),
        ("capacity of 2^64", |image| put(image, 12, &[0xff; 8]), "too large"),
        ("capacity of 2^52", |image| put(image, 12, &(1u64 << 43).to_le_bytes()), "L1 size too big"),
        ("capacity 0", |image| put(image, 12, &[0; 8]), "capacity of 0"),
        ("capacity beyond the directory", |image| put(image, 12, &(1u64 << 37).to_le_bytes()), "not within the file"),
        ("overhead", |image| put(image, 64, &[0xff; 4]), "File truncated"),
        ("descriptor beyond the end", |image| put(image, 28, &[0xff; 4]), "not within the file"),
        ("no descriptor", |image| put(image, 28, &[0; 8]), "one extent of a VMDK"),
        ("directory beyond the end", |image| put(image, 56, &[0xff; 4]), "grain directory at"),
        ("copy beyond the end", |image| put(image, 48, &[0xff; 4]), "redundant grain directory at"),
        ("footer that is none", |image| put(image, 56, &[0xff; 8]), "cut off"),
        ("header cut off", |image| image.truncate(0), "header of 512 bytes"),
        (
            "table beyond the end",
            |image| {
                let at = u64::from_le_bytes(*image[56..].first_chunk().unwrap()) as usize * 512;
                put(image, at, &[0xff; 4]);
            },
            "past the end",
        ),
        (
            "one place for both tables",
            |image| {
                let at = u64::from_le_bytes(*image[56..].first_chunk().unwrap()) as usize * 512;
                let copy = (table(image, 48) / 512) as u32;
                put(image, at, &copy.to_le_bytes());
            },
            "share their place",
        ),
        (
            "no table",
            |image| {
                let at = u64::from_le_bytes(*image[56..].first_chunk().unwrap()) as usize * 512;
                put(image, at, &[0; 4]);
            },
            "tables are missing",
        ),
        (
            "grain in the header",
            |image| {
                let at = table(image, 56);
                put(image, at, &2u32.to_le_bytes());
            },
            "data area",
        ),
        (
            "grain past the end",
            |image| {
                let at = table(image, 56);
                put(image, at, &999_999u32.to_le_bytes());
            },
            "data area",
        ),
        (
            "one grain twice",
            |image| {
                let at = table(image, 56);
                let entry: [u8; 4] = *image[at..].first_chunk().unwrap();
                put(image, at + 8, &entry);
            },
            "share one grain",
        ),
        ("cut off behind the header", |image| image.truncate(512), "File truncated"),
        ("no CID", |image| swap(image, b"\nCID", b"\nXID"), "no CID"),
        (
            "CID that is no number",
            |image| {
                let at = image.windows(5).position(|window| window == b"\nCID=").unwrap();
                put(image, at + 5, b"+1ff");
            },
            "no number",
        ),
        ("type", |image| swap(image, b"monolithicSparse", b"monolithicXXarse"), "monolithicXXarse"),
        ("extent line", |image| swap(image, b"RW 1", b"RW x"), "Invalid extent line"),
        ("no extent", |image| swap(image, b"\nRW ", b"\n#W "), "names 0"),
        ("read-only extent", |image| swap(image, b"\nRW 18433 ", b"\nRDONLY 1 "), "RDONLY"),
        (
            "forbidden extent",
            |image| swap(image, b"\n# Extent description\nRW 18433 ", b"\n# Extents\nNOACCESS      18433 "),
            "NOACCESS",
        ),
        ("flat extent", |image| swap(image, b" SPARSE ", b" FLAT   "), "says that it is none"),
        ("parent", |image| swap(image, b"parentCID=ffffffff", b"parentCID=0fffffff"), "give 'backing' a node"),
    ];
    for &(what, change, reason) in rows {
        let dir = tempfile::tempdir().unwrap();
        let (_, image) = filled(SPARSE[0], dir.path());
        let mut content = vec![0; image.metadata().unwrap().len() as usize];
        image.read_exact_at(&mut content, 0).unwrap();
        change(&mut content);
        let image = memory();
        image.write_all_at(&content, 0).unwrap();
        let error = open(&image, true).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(reason), "{what}: {error}");
    }
}
