// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Damaged qcow2 images: the check finds what qemu-img finds, and after the repair qemu-img finds nothing and reads what was there.
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::Command;

use block::{CheckReport, Repair};
use support::{Nodes, judge, name_in, run};

/// An image as bytes, with its structures' places.
struct Image(Vec<u8>);

impl Image {
    fn u32(&self, at: u64) -> u64 {
        let at = usize::try_from(at).unwrap();
        u32::from_be_bytes(self.0[at..at + 4].try_into().unwrap()).into()
    }

    fn u64(&self, at: u64) -> u64 {
        self.u32(at) << 32 | self.u32(at + 4)
    }

    fn put(&mut self, at: u64, value: u64) {
        let at = usize::try_from(at).unwrap();
        self.0[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }

    fn put16(&mut self, at: u64, value: u16) {
        let at = usize::try_from(at).unwrap();
        self.0[at..at + 2].copy_from_slice(&value.to_be_bytes());
    }

    fn size(&self) -> u64 {
        1 << self.u32(20)
    }

    /// Places of the L1 table, of its first L2 table, of the refcount table and its first block.
    fn l1(&self) -> u64 {
        self.u64(40)
    }

    fn l2(&self) -> u64 {
        self.u64(self.l1()) & 0x00ff_ffff_ffff_fe00
    }

    fn table(&self) -> u64 {
        self.u64(48)
    }

    fn block(&self) -> u64 {
        self.u64(self.table())
    }

    /// Where the count of a host cluster stands, with 16 bits to a count.
    fn count(&self, cluster: u64) -> u64 {
        self.block() + cluster * 2
    }

    /// The host cluster of guest cluster `index` of the first table.
    fn data(&self, index: u64) -> u64 {
        (self.u64(self.l2() + index * 8) & 0x00ff_ffff_ffff_fe00) / self.size()
    }

    /// Adds clusters of zeroes.
    fn grow(&mut self, clusters: u64) {
        let end = (self.0.len() as u64).next_multiple_of(self.size()) + clusters * self.size();
        self.0.resize(usize::try_from(end).unwrap(), 0);
    }
}

const COPIED: u64 = 1 << 63;

/// What is done to an image, and whether all of it can be repaired.
type Damage = (&'static str, bool, fn(&mut Image));

/// For images with three guest clusters of data at the start.
const DAMAGES: &[Damage] = &[
    ("nothing", true, |_| {}),
    ("a leak", true, |i| {
        i.grow(1);
        let last = i.0.len() as u64 / i.size() - 1;
        i.put16(i.count(last), 1);
    }),
    ("a count of two with one user", true, |i| i.put16(i.count(i.data(1)), 2)),
    ("a count of two with one user, and no copied flag", true, |i| {
        i.put16(i.count(i.data(1)), 2);
        i.put(i.l2() + 8, i.u64(i.l2() + 8) & !COPIED);
    }),
    ("a count of zero", true, |i| i.put16(i.count(i.data(1)), 0)),
    ("the header's count of zero", true, |i| i.put16(i.count(0), 0)),
    ("the L2 table's count of zero", true, |i| i.put16(i.count(i.l2() / i.size()), 0)),
    ("no copied flag on data", true, |i| i.put(i.l2(), i.u64(i.l2()) & !COPIED)),
    ("no copied flag on the table", true, |i| i.put(i.l1(), i.u64(i.l1()) & !COPIED)),
    ("two guest clusters in one host cluster", true, |i| i.put(i.l2() + 3 * 8, i.u64(i.l2()))),
    ("data in the L1 table's place", true, |i| i.put(i.l2() + 3 * 8, i.l1() | COPIED)),
    ("data in the header's place", true, |i| i.put(i.l2() + 3 * 8, 1 | COPIED)),
    ("data past the end of the file", false, |i| i.put(i.l2() + 3 * 8, (i.0.len() as u64 + 4 * i.size()) | COPIED)),
    ("data unaligned", false, |i| i.put(i.l2(), i.u64(i.l2()) + 512)),
    ("reserved bits in an L2 entry", false, |i| i.put(i.l2(), i.u64(i.l2()) | 1 << 59)),
    ("reserved bits in an L1 entry", false, |i| i.put(i.l1(), i.u64(i.l1()) | 1 << 59)),
    ("a refcount block unaligned", true, |i| i.put(i.table(), i.block() + 512)),
    ("a refcount block with reserved bits", true, |i| i.put(i.table(), i.block() | 1)),
    ("a refcount block past the end", true, |i| i.put(i.table(), i.0.len() as u64 + (1 << 20))),
    ("case 56: no refcount block", true, |i| i.put(i.table(), 0)),
    ("a refcount block in the L1 table's place", true, |i| i.put(i.table(), i.l1())),
    ("case 57: the refcount table as its own block", true, |i| i.put(i.table(), i.table())),
    ("two entries for one refcount block", true, |i| i.put(i.table() + 8, i.block())),
    ("all counts zero", true, |i| {
        let (at, size) = (usize::try_from(i.block()).unwrap(), usize::try_from(i.size()).unwrap());
        i.0[at..at + size].fill(0);
    }),
    ("all counts too high", true, |i| {
        for cluster in 0..20 {
            i.put16(i.count(cluster), 9);
        }
    }),
    ("a compressed cluster with a copied flag", true, |i| {
        // A whole cluster of stored data, as a compressed one would lie.
        let at = i.data(2) * i.size();
        i.put(i.l2() + 2 * 8, 3 << 62 | at);
    }),
    ("a preallocated cluster of zeroes unaligned", true, |i| {
        i.put(i.l2() + 2 * 8, (i.u64(i.l2() + 2 * 8) + 512) | 1);
    }),
    ("the dirty mark and a leak", true, |i| {
        i.put16(i.count(i.data(1)), 2);
        i.put(72, i.u64(72) | 1);
    }),
    ("the corrupt mark", true, |i| i.put(72, i.u64(72) | 2)),
];

fn check(path: &Path, repair: Repair) -> block::Result<CheckReport> {
    let writable = repair != Repair::Nothing;
    let file = std::fs::File::options().read(true).write(writable).open(path).unwrap();
    let mut nodes = Nodes::new();
    let name = nodes.file(&file, writable);
    let mut said = Vec::new();
    let node = nodes.graph.get(&name).unwrap();
    let report = block::check(node, "qcow2", repair, &mut |text| said.push(text.to_owned()));
    if std::env::var_os("SAY").is_some() {
        eprintln!("{said:#?} {report:#?}");
    }
    report
}

/// What qemu-img finds: corruptions, leaks, errors, end, allocated, fragmented and compressed clusters.
fn found_by_qemu(path: &str) -> [u64; 7] {
    let output = Command::new("qemu-img").args(["check", "--output=json", path]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("image-end-offset"), "{path}: {text}{}", String::from_utf8_lossy(&output.stderr));
    let number = |name: &str| {
        let rest = text.split(&format!("\"{name}\": ")).nth(1);
        rest.map_or(0, |rest| rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap())
    };
    [
        "corruptions",
        "leaks",
        "check-errors",
        "image-end-offset",
        "allocated-clusters",
        "fragmented-clusters",
        "compressed-clusters",
    ]
    .map(number)
}

fn found_by_us(report: &CheckReport) -> [u64; 7] {
    [
        report.corruptions,
        report.leaks,
        report.check_errors,
        report.image_end_offset,
        report.allocated_clusters,
        report.fragmented_clusters,
        report.compressed_clusters,
    ]
}

fn qemu_io(path: &str, commands: &[&str]) {
    let mut arguments = vec!["-f", "qcow2"];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    arguments.push(path);
    run("qemu-io", &arguments);
}

/// What a guest would read, if all of it can be read.
fn content(path: &str) -> Option<Vec<u8>> {
    let raw = format!("{path}.raw");
    let converted =
        Command::new("qemu-img").args(["convert", "-f", "qcow2", "-O", "raw", path, &raw]).output().unwrap();
    converted.status.success().then(|| std::fs::read(raw).unwrap())
}

#[test]
fn damage_is_found_as_qemu_finds_it_and_repaired_to_its_satisfaction() {
    if !judge("damage_is_found_as_qemu_finds_it", "qemu-img") || !judge("the same", "qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut wrong = Vec::new();
    for cluster_size in ["65536", "4096"] {
        let (path, base) = name_in(dir.path(), "base.qcow2");
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &format!("cluster_size={cluster_size}"), &base, "8M"]);
        let write = format!("write -P 0x5a 0 {}", 3 * cluster_size.parse::<u64>().unwrap());
        qemu_io(&base, &[&write]);
        let whole = std::fs::read(&path).unwrap();
        for (name, is_repairable, damage) in DAMAGES {
            let mut image = Image(whole.clone());
            damage(&mut image);
            let (path, text) = name_in(dir.path(), "damaged.qcow2");
            std::fs::write(&path, &image.0).unwrap();
            let report = check(&path, Repair::Nothing).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), image.0, "{name}: a check writes nothing");
            let (ours, theirs) = (found_by_us(&report), found_by_qemu(&text));
            if ours != theirs {
                wrong.push(format!("{name}, clusters of {cluster_size}: we {ours:?}, qemu-img {theirs:?}"));
            }
            let before = content(&text);
            let repaired = check(&path, Repair::All).unwrap();
            if *is_repairable {
                let left = [repaired.corruptions, repaired.leaks, repaired.check_errors];
                let theirs = found_by_qemu(&text);
                if left != [0; 3] || theirs[..3] != [0; 3] {
                    wrong.push(format!("{name} repaired: we {repaired:?}, qemu-img {theirs:?}"));
                }
            }
            if before.is_some() && content(&text) != before {
                wrong.push(format!("{name}: the repair changed the content"));
            }
            let again = check(&path, Repair::Nothing).unwrap();
            if is_repairable == &(again.corruptions + again.leaks > 0) {
                wrong.push(format!("{name} repaired, and then {again:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// Images of every kind, made by QEMU with all that QEMU can put into them.
#[test]
fn sound_images_of_every_kind_are_found_sound_with_qemus_numbers() {
    if !judge("sound_images_of_every_kind", "qemu-img") || !judge("the same", "qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let options = [
        "cluster_size=65536",
        "cluster_size=512",
        "cluster_size=2M",
        "compat=0.10",
        "refcount_bits=1",
        "refcount_bits=2",
        "refcount_bits=8",
        "refcount_bits=64",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k,preallocation=metadata",
        "preallocation=metadata",
        "compression_type=zstd",
        "lazy_refcounts=on",
        "data_file=data.raw",
        "data_file=data.raw,data_file_raw=on",
        "data_file=data.raw,preallocation=metadata",
    ];
    for options in options {
        let (path, text) = name_in(dir.path(), "image.qcow2");
        let options = options.replace("data.raw", &name_in(dir.path(), "data.raw").1);
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, &text, "16M"]);
        // Compressed clusters share host clusters, as snapshots do.
        let shares = !options.contains("data_file") && !["refcount_bits=1", "refcount_bits=2"].contains(&&*options);
        qemu_io(&text, &["write 1M 100k", "write 5M 3M", "write -z 2M 64k", "write -z -u 6M 1M"]);
        if shares && !options.contains("preallocation") {
            qemu_io(&text, &["write -c 10M 2M"]);
        }
        if shares {
            run("qemu-img", &["snapshot", "-c", "first", &text]);
            qemu_io(&text, &["write 1M 30k", "write 7M 1M", "discard 10M 512k"]);
            run("qemu-img", &["snapshot", "-c", "second", &text]);
            qemu_io(&text, &["write 12M 1M"]);
        }
        if !options.contains("compat=0.10") {
            run("qemu-img", &["bitmap", "--add", &text, "bitmap"]);
            qemu_io(&text, &["write 3M 1M"]);
        }
        let ours = check(&path, Repair::Nothing).unwrap();
        assert_eq!(found_by_us(&ours), found_by_qemu(&text), "{options}");
        assert_eq!([ours.corruptions, ours.leaks, ours.check_errors], [0; 3], "{options}");
    }
}

/// Damage in what only images with snapshots, bitmaps, subclusters and data files have.
#[test]
fn damage_in_snapshots_bitmaps_and_subclusters_is_found_as_qemu_finds_it() {
    if !judge("damage_in_snapshots_bitmaps_and_subclusters", "qemu-img") || !judge("the same", "qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let make = |options: &str, is_plain: bool| {
        let (path, text) = name_in(dir.path(), "base.qcow2");
        let options = options.replace("data.raw", &name_in(dir.path(), "data.raw").1);
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, &text, "8M"]);
        qemu_io(&text, &["write -P 1 0 256k"]);
        if is_plain {
            run("qemu-img", &["snapshot", "-c", "one", &text]);
            qemu_io(&text, &["write -P 2 0 64k", "write -c -P 3 1M 128k"]);
            run("qemu-img", &["bitmap", "--add", &text, "bitmap"]);
            qemu_io(&text, &["write -P 2 64k 64k"]);
        }
        std::fs::read(path).unwrap()
    };
    type Case = (&'static str, &'static str, bool, fn(&mut Image));
    let cases: &[Case] = &[
        ("snapshot's L1 unaligned", "cluster_size=64k", false, |i| i.put(i.u64(64), i.u64(i.u64(64)) + 8)),
        ("snapshot's L1 past the end", "cluster_size=64k", false, |i| i.put(i.u64(64), 1 << 40)),
        ("a shared cluster with a copied flag", "cluster_size=64k", true, |i| {
            i.put(i.l2() + 16, i.u64(i.l2() + 16) | COPIED);
        }),
        ("a shared cluster counted once", "cluster_size=64k", true, |i| i.put16(i.count(i.data(2)), 1)),
        ("a compressed cluster counted once too often", "cluster_size=64k", true, |i| {
            let cluster = (i.u64(i.l2() + 16 * 8) & 0xff_ffff_ffff) / i.size();
            i.put16(i.count(cluster), 5);
        }),
        ("a compressed cluster with a copied flag", "cluster_size=64k", true, |i| {
            i.put(i.l2() + 16 * 8, i.u64(i.l2() + 16 * 8) | COPIED);
        }),
        ("a compressed cluster past the end", "cluster_size=64k", false, |i| {
            i.put(i.l2() + 16 * 8, 1 << 62 | 1 << 40);
        }),
        ("a subcluster allocated and zero", "extended_l2=on", false, |i| i.put(i.l2() + 8, 0x1_ffff_ffff)),
        ("subclusters of no cluster", "extended_l2=on", false, |i| {
            i.put(i.l2() + 16 * 16, 0);
            i.put(i.l2() + 16 * 16 + 8, 1);
        }),
        ("a data file's cluster without copied flag", "data_file=data.raw", true, |i| {
            i.put(i.l2() + 8, i.u64(i.l2() + 8) & !COPIED);
        }),
        ("a compressed cluster with a data file", "data_file=data.raw", false, |i| i.put(i.l2() + 8, 1 << 62 | 65536)),
    ];
    let mut wrong = Vec::new();
    for (name, options, is_repairable, damage) in cases {
        let mut image = Image(make(options, options.starts_with("cluster")));
        damage(&mut image);
        let (path, text) = name_in(dir.path(), "damaged.qcow2");
        std::fs::write(&path, &image.0).unwrap();
        let (ours, theirs) = (found_by_us(&check(&path, Repair::Nothing).unwrap()), found_by_qemu(&text));
        if ours != theirs {
            wrong.push(format!("{name}: we {ours:?}, qemu-img {theirs:?}"));
        }
        let before = content(&text);
        check(&path, Repair::All).unwrap();
        let theirs = found_by_qemu(&text);
        if *is_repairable && theirs[..3] != [0; 3] {
            wrong.push(format!("{name} repaired: qemu-img {theirs:?}"));
        }
        if before.is_some() && content(&text) != before {
            wrong.push(format!("{name}: the repair changed the content"));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn leaks_alone_are_repaired_alone() {
    if !judge("leaks_alone_are_repaired_alone", "qemu-img") || !judge("the same", "qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, text) = name_in(dir.path(), "image.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &text, "8M"]);
    qemu_io(&text, &["write 0 192k"]);
    let mut image = Image(std::fs::read(&path).unwrap());
    image.put16(image.count(image.data(0)), 2);
    image.put(image.l2(), image.u64(image.l2()) & !COPIED);
    std::fs::write(&path, &image.0).unwrap();
    let report = check(&path, Repair::Leaks).unwrap();
    assert_eq!((report.leaks_fixed, report.leaks, report.corruptions), (1, 0, 0), "the copied flag follows the count");
    assert_eq!(found_by_qemu(&text)[..3], [0; 3]);
    image.put16(image.count(image.data(1)), 0);
    std::fs::write(&path, &image.0).unwrap();
    let report = check(&path, Repair::Leaks).unwrap();
    assert_eq!((report.leaks_fixed, report.leaks), (1, 0));
    assert!(report.corruptions > 0, "{report:?}");
}

#[test]
fn an_image_that_was_not_closed_is_repaired_before_it_is_written() {
    if !judge("an_image_that_was_not_closed_is_repaired", "qemu-img") || !judge("the same", "qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, text) = name_in(dir.path(), "image.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", &text, "8M"]);
    // Ends without closing the image: counts were never written.
    let arguments = ["-f", "qcow2", "-c", "write -P 7 1M 256k", "-c", "flush", "-c", "abort", &text];
    Command::new("qemu-io").args(arguments).output().unwrap();
    assert!(check(&path, Repair::Nothing).unwrap().corruptions > 0);
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    let mut nodes = Nodes::new();
    let name = nodes.file(&file, true);
    let node = nodes.format("qcow2", &[("file", &name)], true, &[]).unwrap();
    assert_eq!(support::read(&node, 1 << 20, 4096).unwrap(), [7; 4096]);
    node.write(&[9; 4096], 4 << 20, false).unwrap();
    drop(node);
    drop(nodes);
    assert_eq!(found_by_qemu(&text)[..3], [0; 3]);
    assert_eq!(content(&text).unwrap()[4 << 20], 9);
}
