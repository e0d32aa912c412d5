// SPDX-License-Identifier: Apache-2.0 OR MIT
//! qcow2 images that break the rules: refused with the reason, or an error of the request, never more.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use block::{BlockNode, Graph, Host, NodeAccess, NodeSpec, Wait, inspect};

const CLUSTER: u64 = 65536;

/// A tiny image of 1 MiB with one L2 table, made by hand: header, refcount table and block, L1, L2, one data cluster of 0x5a.
struct Image(Vec<u8>);

impl Image {
    fn new() -> Image {
        let mut image = Image(vec![0; 6 * 65536]);
        image.bytes(0, b"QFI\xfb").u32(4, 3).u32(20, 16).u64(24, 1 << 20).u32(36, 1).u64(40, 3 * CLUSTER);
        image.u64(48, CLUSTER).u32(56, 1).u32(96, 4).u32(100, 104);
        image
            .u64(65536, 2 * CLUSTER)
            .u64(3 * 65536, (4 * CLUSTER) | (1 << 63))
            .u64(4 * 65536, (5 * CLUSTER) | (1 << 63));
        image.0[5 * 65536..].fill(0x5a);
        image
    }

    fn bytes(&mut self, at: usize, bytes: &[u8]) -> &mut Image {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn u32(&mut self, at: usize, value: u32) -> &mut Image {
        self.bytes(at, &value.to_be_bytes())
    }

    fn u64(&mut self, at: usize, value: u64) -> &mut Image {
        self.bytes(at, &value.to_be_bytes())
    }

    /// The entry of guest cluster `index`.
    fn l2(&mut self, index: usize, entry: u64) -> &mut Image {
        self.u64(4 * 65536 + index * 8, entry)
    }

    fn file(&self) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&self.0, 0).unwrap();
        file
    }

    fn open(&self) -> block::Result<Arc<BlockNode>> {
        open(self.file(), &[])
    }

    /// Why it is refused; the inspector must agree, and so must an open that writes, which changes nothing.
    fn refused(&self) -> String {
        let error = self.open().unwrap_err().to_string();
        let file = self.file();
        let writing = open_as(file.try_clone().unwrap(), &[], true).unwrap_err().to_string();
        assert_eq!(writing, error);
        let mut after = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut after, 0).unwrap();
        assert!(after == self.0, "an image that was refused has changed: {error}");
        let mut graph = Graph::new();
        let file = graph.add(spec("file", self.file())).unwrap();
        assert!(inspect(&file, Some("qcow2")).is_err(), "{error}");
        error
    }
}

fn spec(driver: &'static str, file: File) -> NodeSpec {
    NodeSpec {
        name: Some("file".into()),
        driver,
        access: NodeAccess::default(),
        host: Some(Host::fixed(file)),
        filename: "image".into(),
        children: [].into(),
        detached: BTreeSet::new(),
        options: [].into(),
    }
}

fn open(file: File, detached: &[&'static str]) -> block::Result<Arc<BlockNode>> {
    open_as(file, detached, false)
}

fn open_as(file: File, detached: &[&'static str], writable: bool) -> block::Result<Arc<BlockNode>> {
    let mut graph = Graph::new();
    let access = NodeAccess { writable, unmap: true };
    graph.add(NodeSpec { access, ..spec("file", file) })?;
    graph.add(NodeSpec {
        name: Some("image".into()),
        driver: "qcow2",
        access,
        host: None,
        filename: String::new(),
        children: [("file", "file".to_owned())].into(),
        detached: detached.iter().copied().collect(),
        options: [].into(),
    })
}

fn read(node: &BlockNode, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
    let mut buf = vec![0xee; len];
    node.read(&mut buf, offset, Wait::Allowed).map(|()| buf)
}

#[test]
fn the_image_made_by_hand_is_a_good_one() {
    let node = Image::new().open().unwrap();
    assert_eq!(read(&node, 0, 65536).unwrap(), [0x5a; 65536]);
    assert_eq!(read(&node, CLUSTER, 512).unwrap(), [0; 512]);
    assert!(read(&node, (1 << 20) - 1, 2).is_err(), "past the end");
}

/// Each row changes one field of the good image.
#[test]
fn cases_53_and_54_every_broken_header_is_refused_with_its_reason() {
    type Change = fn(&mut Image) -> &mut Image;
    let cases: &[(&str, Change, &str)] = &[
        ("magic", |i| i.bytes(0, b"QFI\xfa"), "not in qcow2 format"),
        ("version 1", |i| i.u32(4, 1), "Unsupported qcow2 version 1"),
        ("version 4", |i| i.u32(4, 4), "Unsupported qcow2 version 4"),
        ("case 54: clusters of 2^8", |i| i.u32(20, 8), "Unsupported cluster size: 2^8"),
        ("case 54: clusters of 2^22", |i| i.u32(20, 22), "Unsupported cluster size: 2^22"),
        ("clusters of 2^(2^32-1)", |i| i.u32(20, u32::MAX), "Unsupported cluster size"),
        ("header too short", |i| i.u32(100, 96), "header too short"),
        ("header beyond the cluster", |i| i.u32(100, 65537), "header exceeds cluster size"),
        ("size beyond 2^63", |i| i.u64(24, u64::MAX), "too big"),
        ("AES", |i| i.u32(32, 1), "encrypted with AES"),
        ("LUKS", |i| i.u32(32, 2), "encrypted with LUKS"),
        ("unknown encryption", |i| i.u32(32, 3), "Unsupported encryption method 3"),
        ("case 53: L1 table of 2^32 entries", |i| i.u32(36, u32::MAX), "L1 table too large"),
        ("L1 table too small", |i| i.u32(36, 0), "L1 table is too small"),
        ("case 53: a size that needs a huge L1 table", |i| i.u64(24, 1 << 50), "L1 table is too small"),
        ("L1 table unaligned", |i| i.u64(40, 512), "L1 table offset invalid"),
        ("L1 table beyond 2^63", |i| i.u64(40, u64::MAX - 65535), "L1 table offset invalid"),
        ("refcount table unaligned", |i| i.u64(48, 1), "Reference count table offset invalid"),
        ("case 53: refcount table of 2^32 clusters", |i| i.u32(56, u32::MAX), "Reference count table too large"),
        ("no refcount table", |i| i.u32(56, 0), "does not contain a reference count table"),
        ("refcounts of 128 bits", |i| i.u32(96, 7), "may not exceed 64 bits"),
        ("case 53: 2^32 snapshots", |i| i.u32(60, u32::MAX), "Snapshot table too large"),
        ("snapshot table unaligned", |i| i.u32(60, 1).u64(64, 7), "Snapshot table offset invalid"),
        ("case 59: an unknown incompatible bit", |i| i.u64(72, 1 << 17), "Unsupported qcow2 feature(s): bit 17"),
        ("extended L2 entries in small clusters", |i| i.u32(20, 13).u64(72, 1 << 4), "extended L2"),
        ("zstd without its bit", |i| i.u32(100, 112).bytes(104, &[1]), "contradict"),
        ("its bit without zstd", |i| i.u64(72, 1 << 3), "contradict"),
        ("unknown compression", |i| i.u32(100, 112).bytes(104, &[9]).u64(72, 1 << 3), "Unknown compression type: 9"),
        ("backing name beyond the cluster", |i| i.u64(8, 65537).u32(16, 4), "Invalid backing file offset"),
        ("backing name of 1024 bytes", |i| i.u64(8, 512).u32(16, 1024), "Backing file name too long"),
        ("backing name across the cluster's end", |i| i.u64(8, 65530).u32(16, 100), "Backing file name too long"),
        ("extension of 2^32 bytes", |i| i.u32(104, 0x1234).u32(108, u32::MAX), "Header extension too large"),
        ("backing format of 16 bytes", |i| i.u32(104, 0xe279_2aca).u32(108, 16), "too large (>=16)"),
        ("raw data file without one", |i| i.u64(88, 1 << 1), "data-file-raw requires"),
    ];
    for (case, change, reason) in cases {
        let mut image = Image::new();
        change(&mut image);
        let error = image.refused();
        assert!(error.contains(reason), "{case}: {error}");
    }
}

#[test]
fn a_header_that_ends_early_is_refused_at_every_length() {
    let whole = Image::new().0;
    for len in 0..104 {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&whole[..len], 0).unwrap();
        assert!(open(file, &[]).is_err(), "{len} bytes");
    }
}

#[test]
fn case_59_an_unknown_feature_is_called_by_the_name_that_the_image_gives_it_escaped() {
    let mut image = Image::new();
    let mut name = [0; 48];
    name[1] = 17;
    name[2..10].copy_from_slice(b"evil\n\x1b[m");
    image.u64(72, 1 << 17).u32(104, 0x6803_f857).u32(108, 48).bytes(112, &name);
    assert!(image.refused().contains("evil\\n\\u{1b}[m"));
}

#[test]
fn case_51_names_in_the_image_are_text_and_never_opened() {
    for name in ["/etc/shadow", "json:{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}", "https://host/x", "a\nb"] {
        let mut image = Image::new();
        image.u64(8, 1024).u32(16, u32::try_from(name.len()).unwrap()).bytes(1024, name.as_bytes());
        let error = image.open().unwrap_err().to_string();
        assert!(error.contains(&name.escape_debug().to_string()) && error.contains("never followed"), "{error}");
        let node = open(image.file(), &["backing"]).unwrap();
        assert_eq!(read(&node, CLUSTER, 512).unwrap(), [0; 512], "an explicit null reads as zeroes");
        assert_eq!(node.info().backing_name.as_deref(), Some(name));
    }
}

#[test]
fn case_51_an_external_data_file_must_be_given() {
    let mut image = Image::new();
    image.u64(72, 1 << 2).u32(104, 0x4441_5441).u32(108, 11).bytes(112, b"/etc/shadow");
    let error = image.open().unwrap_err().to_string();
    assert!(error.contains("'data-file' is required") && error.contains("/etc/shadow"), "{error}");
}

#[test]
fn case_52_a_raw_disk_with_a_qcow2_header_stays_raw() {
    let mut graph = Graph::new();
    let file = graph.add(spec("file", Image::new().file())).unwrap();
    assert_eq!(inspect(&file, Some("raw")).unwrap().virtual_size, 6 * CLUSTER);
    let found = inspect(&file, None).unwrap();
    assert_eq!((found.format, found.virtual_size), ("qcow2", 1 << 20));
}

#[test]
fn broken_entries_are_errors_of_the_request_and_the_rest_is_read() {
    let mut image = Image::new();
    image.l2(1, 5 * CLUSTER + 512).l2(2, 1 << 62 | 1 << 54).l2(3, 1 << 62 | (5 * CLUSTER)).l2(4, 1 << 50).l2(5, 1);
    let node = image.open().unwrap();
    assert!(read(&node, CLUSTER, 1).is_err(), "an unaligned cluster");
    assert!(read(&node, 2 * CLUSTER, 1).is_err(), "case 58: no deflate stream");
    assert!(read(&node, 3 * CLUSTER, 1).is_err(), "case 58: not enough to fill a cluster");
    assert_eq!(read(&node, 4 * CLUSTER, 512).unwrap(), [0; 512], "data past the end of the file reads as zeroes");
    assert_eq!(read(&node, 5 * CLUSTER, 512).unwrap(), [0; 512], "a zero cluster");
    assert_eq!(read(&node, 0, 512).unwrap(), [0x5a; 512]);
}

#[test]
fn case_58_a_bomb_gives_one_cluster_and_no_more() {
    use std::io::Write;
    let mut deflate = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    deflate.write_all(&vec![7; 100 << 20]).unwrap();
    let bomb = deflate.finish().unwrap();
    let mut image = Image::new();
    let at = image.0.len() as u64;
    let stored = &bomb[..bomb.len().min(2 * 65536)];
    image.0.extend_from_slice(stored);
    image.l2(1, 1 << 62 | (stored.len() as u64 / 512) << 54 | at);
    // QEMU, too, takes the first cluster of such a stream.
    assert_eq!(read(&image.open().unwrap(), CLUSTER, 65536).unwrap(), [7; 65536]);
}

#[test]
fn case_58_a_cluster_that_breaks_after_it_was_read_is_an_error_too() {
    // Two blocks as they are: whoever zeroes the head of one leaves none.
    let half = [0x5a; 32768];
    let stored = [&[0, 0, 0x80, 0xff, 0x7f][..], &half, &[1, 0, 0x80, 0xff, 0x7f], &half].concat();
    let step = stored.len().next_multiple_of(512);
    let mut image = Image::new();
    // So many that none of the first three is kept until its turn comes again.
    let count = 300;
    image.u64(24, count * CLUSTER);
    for index in 0..usize::try_from(count).unwrap() {
        let at = image.0.len() as u64;
        image.l2(index, 1 << 62 | (step as u64 / 512 - 1) << 54 | at);
        image.0.extend_from_slice(&stored);
        image.0.resize(image.0.len().next_multiple_of(512), 0);
    }
    let file = image.file();
    let node = open(file.try_clone().unwrap(), &[]).unwrap();
    for index in 0..count {
        assert_eq!(read(&node, index * CLUSTER + 4096, 512).unwrap(), [0x5a; 512]);
    }
    file.write_all_at(&vec![0; stored.len()], 6 * CLUSTER).unwrap();
    file.write_all_at(&[0; 1024], 6 * CLUSTER + step as u64 + 5 + 32768).unwrap();
    assert!(read(&node, 0, 512).is_err(), "nothing is left of it");
    assert!(read(&node, CLUSTER + 65024, 512).is_err(), "it ends in the middle");
    for offset in [0, 4096, 65024] {
        assert!(read(&node, CLUSTER + offset, 512).is_err(), "now it is known to be broken, at {offset}, too");
    }
    assert_eq!(read(&node, 2 * CLUSTER, 512).unwrap(), [0x5a; 512], "the next one is not");
    assert_eq!(read(&node, 2 * CLUSTER, 65536).unwrap(), [0x5a; 65536]);
}

#[test]
fn a_table_that_points_into_itself_or_far_away_is_read_as_what_it_says() {
    for l2 in [3 * CLUSTER, 4 * CLUSTER, 1 << 54] {
        let mut image = Image::new();
        image.u64(3 * 65536, l2 | 1 << 63);
        let node = image.open().unwrap();
        for offset in (0..1 << 20).step_by(65536) {
            // Some are errors, some are bytes of tables: none is a panic or a loop.
            let _ = read(&node, offset, 65536);
            let _ = node.status(offset, 65536);
        }
    }
    let mut image = Image::new();
    image.u64(3 * 65536, (4 * CLUSTER + 512) | 1 << 63);
    assert!(read(&image.open().unwrap(), 0, 1).is_err(), "an unaligned L2 table");
}

#[test]
fn case_64_a_sparse_image_of_8_eib_opens_in_little_memory_and_odd_sizes_round_up() {
    let mut image = Image::new();
    image.u32(20, 21).u64(24, 1000);
    let mut large = vec![0; 5 << 21];
    large[..112].copy_from_slice(&image.0[..112]);
    let mut image = Image(large);
    image.u64(40, 3 << 21).u64(48, 1 << 21);
    assert_eq!(image.open().unwrap().len(), 1024);
    // 2^62 bytes in clusters of 2 MiB need 2^23 L1 entries: over the cap of 32 MiB.
    image.u64(24, 1 << 62).u32(36, 1 << 23);
    assert!(image.refused().contains("L1 table too large"));
    // What QEMU's caps allow is opened.
    image.u64(24, 1 << 50).u32(36, 1 << 11);
    let node = image.open().unwrap();
    assert_eq!(read(&node, (1 << 50) - 512, 512).unwrap(), [0; 512]);
    assert_eq!(node.status(0, 1 << 50).unwrap().kind, block::ExtentKind::Zero);
}

#[test]
fn dirty_and_corrupt_images_are_read() {
    for bits in [1, 2, 3] {
        let mut image = Image::new();
        image.u64(72, bits);
        let node = image.open().unwrap();
        assert_eq!(read(&node, 0, 512).unwrap(), [0x5a; 512]);
        assert_eq!(node.info().dirty, bits & 1 == 1);
    }
}

#[test]
fn a_corrupt_image_is_not_written() {
    let mut image = Image::new();
    image.u64(72, 2);
    let mut graph = Graph::new();
    let access = NodeAccess { writable: true, unmap: true };
    graph.add(NodeSpec { access, ..spec("file", image.file()) }).unwrap();
    let node = NodeSpec {
        name: Some("image".into()),
        driver: "qcow2",
        access,
        host: None,
        filename: String::new(),
        children: [("file", "file".to_owned())].into(),
        detached: BTreeSet::new(),
        options: [].into(),
    };
    assert!(graph.add(node).unwrap_err().to_string().contains("Image is corrupt; cannot be opened read/write"));
    assert!(graph.remove("file").is_ok(), "a node that was not made uses nothing");
}

/// Any one or many bytes changed: an answer, always, in bounded time and memory.
#[test]
fn no_mutation_of_a_good_image_panics() {
    let good = Image::new().0;
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for _ in 0..2000 {
        let mut image = Image(good.clone());
        for _ in 0..1 + next() % 4 {
            // The header, the L1 and the L2 table.
            let area = [0, 3 * 65536, 4 * 65536][usize::try_from(next() % 3).unwrap()];
            let at = area + usize::try_from(next() % 128).unwrap();
            image.0[at] = next().to_le_bytes()[0];
        }
        let Ok(node) = open(image.file(), &["backing"]) else { continue };
        let end = node.len().min(1 << 21);
        for offset in (0..end).step_by(4096) {
            let len = usize::try_from((end - offset).min(4096)).unwrap();
            let _ = read(&node, offset, len);
            let _ = node.status(offset, len as u64);
        }
        let _ = node.info();
    }
}
