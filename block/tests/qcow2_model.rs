// SPDX-License-Identifier: Apache-2.0 OR MIT
//! qcow2 against a vector of bytes: random requests in many kinds of images, judged by qemu-img at the end.
//!
//! Now and then the program crashes: what it has in memory is gone, and the image goes on as its files are at that moment. What was
//! flushed must be there, and each byte that was written since is old or new.
//!
//! `DOORLESS_MODEL_OPERATIONS` says how many requests each kind gets (default 2,000).
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use block::bitmap::Bitmap;
use block::{BlockNode, OptionValue, Preallocation, Repair, Secret, ZeroFlags};
use support::{Nodes, Random, in_memory, judge, memory, name_in, read, run, text, to_disk};

/// A kind of image.
struct Kind {
    name: &'static str,
    /// Of `qemu-img create`.
    options: &'static str,
    size: u64,
    backing: Backing,
    /// Done by qemu-io or qemu-img first.
    start: Start,
    discard_no_unref: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Backing {
    None,
    /// Of fewer bytes than the image.
    Raw,
    Qcow2,
}

#[derive(Clone, Copy, PartialEq)]
enum Start {
    Empty,
    Snapshot,
    Compressed,
}

const PLAIN: Kind = Kind {
    name: "64 KiB clusters",
    options: "cluster_size=65536",
    size: 8 << 20,
    backing: Backing::None,
    start: Start::Empty,
    discard_no_unref: false,
};

const KINDS: &[Kind] = &[
    PLAIN,
    Kind { name: "512-byte clusters", options: "cluster_size=512", size: 1 << 20, ..PLAIN },
    Kind { name: "4 KiB clusters", options: "cluster_size=4096", size: 4 << 20, ..PLAIN },
    Kind { name: "2 MiB clusters", options: "cluster_size=2097152", size: 16 << 20, ..PLAIN },
    Kind { name: "version 2", options: "compat=0.10", ..PLAIN },
    Kind { name: "version 2, backing", options: "compat=0.10", backing: Backing::Raw, ..PLAIN },
    Kind { name: "1-bit refcounts", options: "refcount_bits=1,cluster_size=4096", ..PLAIN },
    Kind {
        name: "2-bit refcounts, snapshot",
        options: "refcount_bits=2,cluster_size=4096",
        start: Start::Snapshot,
        ..PLAIN
    },
    Kind { name: "64-bit refcounts", options: "refcount_bits=64,cluster_size=1024", size: 2 << 20, ..PLAIN },
    Kind { name: "extended L2", options: "extended_l2=on,cluster_size=16384", ..PLAIN },
    Kind {
        name: "extended L2, backing",
        options: "extended_l2=on,cluster_size=131072",
        backing: Backing::Qcow2,
        ..PLAIN
    },
    Kind { name: "extended L2, snapshot", options: "extended_l2=on", start: Start::Snapshot, ..PLAIN },
    Kind { name: "extended L2, compressed", options: "extended_l2=on", start: Start::Compressed, ..PLAIN },
    Kind { name: "raw backing", options: "cluster_size=65536", backing: Backing::Raw, ..PLAIN },
    Kind { name: "qcow2 backing", options: "cluster_size=8192", backing: Backing::Qcow2, ..PLAIN },
    Kind { name: "snapshot", options: "cluster_size=65536", start: Start::Snapshot, ..PLAIN },
    Kind { name: "compressed with zlib", options: "compression_type=zlib", start: Start::Compressed, ..PLAIN },
    Kind { name: "compressed with zstd", options: "compression_type=zstd", start: Start::Compressed, ..PLAIN },
    Kind { name: "external data file", options: "data_file=DATA", ..PLAIN },
    Kind { name: "raw external data file", options: "data_file=DATA,data_file_raw=on", ..PLAIN },
    Kind {
        name: "encrypted",
        options: "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10,cluster_size=4096",
        ..PLAIN
    },
    Kind {
        name: "encrypted, extended L2",
        options: "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10,extended_l2=on",
        ..PLAIN
    },
    Kind { name: "lazy refcounts", options: "lazy_refcounts=on,cluster_size=4096", ..PLAIN },
    Kind { name: "preallocated", options: "preallocation=metadata", ..PLAIN },
    Kind { name: "discard without giving back", options: "cluster_size=32768", discard_no_unref: true, ..PLAIN },
];

/// For qemu-img, the key of encrypted images.
const KEY: &str = "secret,id=key,data=passphrase";

/// An image in memory and what a guest should see.
struct Model {
    image: File,
    data: Option<File>,
    backing: Option<File>,
    backing_format: &'static str,
    discard_no_unref: bool,
    encrypted: bool,
    nodes: Nodes,
    node: Option<Arc<BlockNode>>,
    bytes: Vec<u8>,
    first_size: u64,
    /// Ids of the snapshots made here, and what each keeps.
    kept: Vec<(String, Vec<u8>)>,
    /// What the last flush has brought to disk.
    flushed: Vec<u8>,
    /// What was written since, in order: where, and bytes.
    since: Vec<(usize, Vec<u8>)>,
    /// The enabled persistent bitmaps, and which runs must be marked.
    marks: Vec<(String, Vec<bool>)>,
    bitmaps_made: u64,
}

/// Bytes that a mark of a bitmap stands for.
const MARK_BITS: u32 = 12;

fn make(kind: &Kind, dir: &Path) -> Model {
    let (image, image_name) = name_in(dir, "image.qcow2");
    let (data, data_name) = name_in(dir, "data.raw");
    let options = kind.options.replace("DATA", &data_name);
    let size = kind.size.to_string();
    let mut bytes = vec![0; usize::try_from(kind.size).unwrap()];
    let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", &options];
    let encrypted = options.contains("encrypt");
    if encrypted {
        arguments.extend(["--object", KEY]);
    }
    let backing_path = dir.join("backing");
    let backing_format = if kind.backing == Backing::Qcow2 { "qcow2" } else { "raw" };
    if kind.backing != Backing::None {
        let mut random = Random(77);
        // Not a whole number of clusters, and shorter than the image.
        let len = usize::try_from(kind.size * 3 / 4 + 1536).unwrap();
        bytes[..len].iter_mut().enumerate().for_each(|(at, byte)| {
            if at / 20_000 % 3 != 1 {
                *byte = (random.next() >> 32) as u8;
            }
        });
        std::fs::write(dir.join("backing.raw"), &bytes[..len]).unwrap();
        let raw = dir.join("backing.raw");
        run("qemu-img", &["convert", "-f", "raw", "-O", backing_format, text(&raw), text(&backing_path)]);
        arguments.extend(["-b", text(&backing_path), "-F", backing_format]);
    }
    arguments.extend([image_name.as_str(), &size]);
    run("qemu-img", &arguments);
    match kind.start {
        Start::Empty => {}
        Start::Snapshot | Start::Compressed => {
            let half = bytes.len() / 2;
            for (at, byte) in bytes[..half].iter_mut().enumerate() {
                *byte = (at / 4096) as u8 | 1;
            }
            std::fs::write(dir.join("content.raw"), &bytes).unwrap();
            let content = dir.join("content.raw");
            let mut convert = vec!["convert", "-q", "-f", "raw", "-O", "qcow2", "-o", &options];
            if kind.start == Start::Compressed {
                convert.push("-c");
            }
            convert.extend([text(&content), &image_name]);
            run("qemu-img", &convert);
            if kind.start == Start::Snapshot {
                run("qemu-img", &["snapshot", "-c", "before", &image_name]);
            }
        }
    }
    let mut model = Model {
        image: in_memory(&image),
        data: options.contains("data_file=").then(|| in_memory(&data)),
        backing: (kind.backing != Backing::None).then(|| in_memory(&backing_path)),
        backing_format,
        discard_no_unref: kind.discard_no_unref,
        encrypted,
        nodes: Nodes::new(),
        node: None,
        bytes,
        first_size: kind.size,
        kept: Vec::new(),
        flushed: Vec::new(),
        since: Vec::new(),
        marks: Vec::new(),
        bitmaps_made: 0,
    };
    model.is_flushed();
    model.open();
    model
}

impl Model {
    /// Opens the image anew, as a daemon that starts.
    fn open(&mut self) {
        // The last owner of the old nodes brings them to disk.
        self.node = None;
        self.nodes = Nodes::new();
        let file = self.nodes.file(&self.image, true);
        let data = self.data.as_ref().map(|data| self.nodes.file(data, true));
        let backing = self.backing.as_ref().map(|backing| {
            let file = self.nodes.file(backing, false);
            self.nodes.format(self.backing_format, &[("file", &file)], false, &[]).unwrap().name().to_owned()
        });
        let mut children = vec![("file", file.as_str())];
        children.extend(data.as_deref().map(|data| ("data-file", data)));
        children.extend(backing.as_deref().map(|backing| ("backing", backing)));
        let mut options = vec![("discard-no-unref", OptionValue::Bool(self.discard_no_unref))];
        if self.encrypted {
            options.push(("encrypt", OptionValue::Secret(Secret::new(b"passphrase".to_vec()))));
        }
        self.node = Some(self.nodes.format("qcow2", &children, true, &options).unwrap());
    }

    /// Opens the image as it stands in its files, as after a kill -9: nobody brings anything to disk.
    fn crash(&mut self) {
        self.image = copy_of(&self.image);
        self.data = self.data.as_ref().map(copy_of);
        let file = self.nodes.file(&self.image, true);
        let mut found = Vec::new();
        let mut say = |finding: &str| found.push(finding.to_owned());
        let report = block::check(&self.nodes.graph.get(&file).unwrap().clone(), "qcow2", Repair::Leaks, &mut say);
        let report = report.unwrap();
        assert!(report.corruptions + report.check_errors + report.leaks == 0, "after a crash: {found:?}");
        self.open();
        let now = read(self.node(), 0, self.bytes.len()).unwrap();
        let mut wrong: Vec<bool> = now.iter().zip(&self.flushed).map(|(now, flushed)| now != flushed).collect();
        for (at, bytes) in &self.since {
            for (index, byte) in bytes.iter().enumerate() {
                wrong[at + index] &= now[at + index] != *byte;
            }
        }
        assert!(!wrong.contains(&true), "foreign or lost bytes after a crash");
        self.bytes = now;
        self.is_flushed();
        let node = Arc::clone(self.node.as_ref().unwrap());
        for bitmap in node.bitmaps().list() {
            assert!(bitmap.is_inconsistent(), "a bitmap that was in use counts after a crash");
            node.remove_stored_bitmap(bitmap.name()).unwrap();
            node.bitmaps().remove(bitmap.name()).unwrap();
        }
        self.marks.clear();
    }

    /// All of the disk is on disk.
    fn is_flushed(&mut self) {
        self.flushed.clone_from(&self.bytes);
        self.since.clear();
    }

    /// `range` has been written, or become zeroes.
    fn written(&mut self, range: std::ops::Range<usize>) {
        self.since.push((range.start, self.bytes[range.clone()].to_vec()));
        self.mark(range);
    }

    fn mark(&mut self, range: std::ops::Range<usize>) {
        for (_, marks) in self.marks.iter_mut().filter(|_| !range.is_empty()) {
            marks[range.start >> MARK_BITS..=(range.end - 1) >> MARK_BITS].fill(true);
        }
    }

    /// Adds a persistent bitmap, or takes one away, or clears one.
    fn bitmap(&mut self, random: &mut Random) {
        let node = Arc::clone(self.node.as_ref().unwrap());
        self.check_marks();
        let at = usize::try_from(random.below(self.marks.len().max(1) as u64)).unwrap();
        match random.below(3) {
            0 if self.marks.len() < 3 => {
                self.bitmaps_made += 1;
                let name = format!("bitmap{}", self.bitmaps_made);
                if let Err(e) = node.check_new_bitmap(&name, MARK_BITS) {
                    assert!(e.to_string().contains("v2 files"), "{e}");
                    return;
                }
                let bitmap = Arc::new(Bitmap::new(&name, MARK_BITS, node.len()).unwrap());
                bitmap.set_persistent(true);
                node.bitmaps().add(Arc::clone(&bitmap));
                node.bitmaps().set_enabled(&bitmap, true);
                self.marks.push((name, vec![false; self.bytes.len().div_ceil(1 << MARK_BITS)]));
            }
            1 if at < self.marks.len() => {
                let (name, _) = self.marks.remove(at);
                node.remove_stored_bitmap(&name).unwrap();
                node.bitmaps().remove(&name).unwrap();
            }
            2 if at < self.marks.len() => {
                let (name, marks) = &mut self.marks[at];
                node.bitmaps().get(name).unwrap().clear();
                marks.fill(false);
            }
            _ => {}
        }
    }

    /// Whatever was written is marked.
    fn check_marks(&self) {
        let node = self.node();
        assert_eq!(node.bitmaps().list().len(), self.marks.len());
        for (name, marks) in &self.marks {
            let bitmap = node.bitmaps().get(name).unwrap();
            assert!(!bitmap.is_inconsistent() && bitmap.is_enabled() && bitmap.len() == self.bytes.len() as u64);
            for index in (0..marks.len()).filter(|&index| marks[index]) {
                assert!(bitmap.run((index as u64) << MARK_BITS, 1).1, "bitmap '{name}' lacks mark {index}");
            }
        }
    }

    fn node(&self) -> &BlockNode {
        self.node.as_ref().unwrap()
    }

    fn step(&mut self, random: &mut Random, cluster: u64) {
        let size = self.bytes.len() as u64;
        let offset = random.below(size / 512) * 512 + if random.below(8) == 0 { random.below(512) } else { 0 };
        let most = match random.below(4) {
            0 => 512,
            1 => 4096,
            2 => cluster,
            _ => cluster * 3,
        };
        let (offset, most) = if random.below(3) == 0 {
            (offset / cluster * cluster, most.next_multiple_of(cluster))
        } else {
            (offset, most)
        };
        let len = (1 + random.below(most)).min(size - offset);
        let len = if random.below(2) == 0 { len } else { len.next_multiple_of(512).min(size - offset) };
        let range = usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap();
        match random.below(100) {
            0..45 => {
                let fill = (random.next() >> 40) as u8;
                let bytes: Vec<u8> = (0..range.len()).map(|at| fill.wrapping_add((at >> 9) as u8)).collect();
                self.node().write(&bytes, offset, random.below(16) == 0).unwrap();
                self.bytes[range.clone()].copy_from_slice(&bytes);
                self.written(range);
            }
            45..60 => {
                let flags = ZeroFlags { may_unmap: random.below(2) == 0, fast_only: false };
                self.node().write_zeroes(offset, len, flags, false).unwrap();
                self.bytes[range.clone()].fill(0);
                self.written(range);
            }
            60..70 => {
                self.node().discard(offset, len).unwrap();
                // Whatever it reads as now, it must go on to do so; and that is the old content or zeroes, byte for byte.
                let after = read(self.node(), offset, range.len()).unwrap();
                for (at, now) in range.clone().zip(after) {
                    let before = std::mem::replace(&mut self.bytes[at], now);
                    assert!(now == before || now == 0, "foreign bytes after a discard");
                    if now != before {
                        self.mark(at..at + 1);
                    }
                }
                self.since.push((range.start, vec![0; range.len()]));
            }
            70..73 => {
                let start = usize::try_from(offset / cluster * cluster).unwrap();
                let end = self.bytes.len().min(start + usize::try_from(cluster).unwrap());
                let fill = (random.next() >> 40) as u8;
                let bytes: Vec<u8> = (start..end).map(|at| fill.wrapping_add((at >> 6) as u8)).collect();
                match self.node().write_compressed(&bytes, start as u64) {
                    Ok(()) => {
                        self.bytes[start..end].copy_from_slice(&bytes);
                        self.written(start..end);
                    }
                    Err(e) => assert!((self.data.is_some() || self.encrypted) && e.raw_os_error() == Some(95), "{e}"),
                }
            }
            73 if random.below(3) == 0 => self.snapshot(random),
            73 => {
                let size = (size + 512 * (1 + random.below(512))).min(2 * self.first_size);
                let size = if random.below(2) == 0 { size } else { 512 * (1 + random.below(size / 512)) };
                match self.node().resize(size, Preallocation::Off) {
                    Ok(()) => {
                        self.bytes.resize(usize::try_from(size).unwrap(), 0);
                        self.is_flushed();
                        let marks = self.bytes.len().div_ceil(1 << MARK_BITS);
                        self.marks.iter_mut().for_each(|(_, runs)| runs.resize(marks, false));
                    }
                    Err(e) => assert!(e.to_string().contains("version 2 image which has snapshots"), "{e}"),
                }
            }
            74..95 => assert_eq!(read(self.node(), offset, range.len()).unwrap(), self.bytes[range], "at {offset}"),
            95..99 => {
                self.node().flush().unwrap();
                self.is_flushed();
            }
            _ => match random.below(8) {
                0 => self.crash(),
                1..4 => self.bitmap(random),
                _ => {
                    self.open();
                    self.is_flushed();
                    self.check_marks();
                }
            },
        }
    }

    /// Makes a snapshot, goes back to one, or lets one go.
    fn snapshot(&mut self, random: &mut Random) {
        let at = usize::try_from(random.below(self.kept.len().max(1) as u64)).unwrap();
        let node = Arc::clone(self.node.as_ref().unwrap());
        let snapshots = node.snapshots().unwrap();
        match random.below(3) {
            0 if self.kept.len() < 4 => match snapshots.create("model", (1, 2)) {
                Ok(made) => {
                    self.kept.push((made.id, self.bytes.clone()));
                    self.is_flushed();
                }
                Err(e) => assert!(self.data.is_some() || e.to_string().contains("bits of refcount"), "{e}"),
            },
            1 if at < self.kept.len() => {
                let (id, bytes) = self.kept[at].clone();
                match snapshots.apply(&id) {
                    Ok(()) => {
                        self.bytes = bytes;
                        self.is_flushed();
                        let marks = vec![true; self.bytes.len().div_ceil(1 << MARK_BITS)];
                        self.marks.iter_mut().for_each(|(_, runs)| runs.clone_from(&marks));
                    }
                    Err(e) => assert!(e.to_string().contains("bits of refcount"), "{e}"),
                }
            }
            2 if at < self.kept.len() => {
                let (id, _) = self.kept.remove(at);
                snapshots.delete(Some(&id), Some("model")).unwrap();
                self.is_flushed();
            }
            _ => {}
        }
    }

    /// What a guest sees, and what qemu-img says.
    fn judge(self, dir: &Path) {
        assert!(read(self.node(), 0, self.bytes.len()).unwrap() == self.bytes);
        self.check_marks();
        let names: Vec<_> = self.marks.iter().map(|(name, _)| format!("\"name\": \"{name}\"")).collect();
        let Model { image, data, node, nodes, bytes, kept, encrypted, .. } = self;
        drop((node, nodes));
        let (path, name) = name_in(dir, "image.qcow2");
        to_disk(&image, &path);
        if let Some(data) = data {
            to_disk(&data, &dir.join("data.raw"));
        }
        // An encrypted image is named together with its key.
        let opened = format!("driver=qcow2,file.filename={name},encrypt.key-secret=key");
        if encrypted {
            run("qemu-img", &["check", "-q", "--object", KEY, "--image-opts", &opened]);
        } else {
            run("qemu-img", &["check", "-q", &name]);
            let info = run("qemu-img", &["info", "--output=json", &name]);
            assert!(names.iter().all(|bitmap| info.contains(bitmap)), "{names:?}: {info}");
        }
        let expected = dir.join("expected.raw");
        std::fs::write(&expected, bytes).unwrap();
        let plain = dir.join("plain.raw");
        let compared = if encrypted {
            let convert = ["convert", "--object", KEY, "--image-opts", "-O", "raw", &opened, text(&plain)];
            run("qemu-img", &convert);
            ["raw", text(&plain)]
        } else {
            ["qcow2", &name]
        };
        run("qemu-img", &["compare", "-q", "-f", compared[0], "-F", "raw", compared[1], text(&expected)]);
        // qemu-img takes no key together with the choice of a snapshot.
        for (id, bytes) in kept.into_iter().filter(|_| !encrypted) {
            let (snapshot, kept) = (format!("snapshot.id={id}"), dir.join("kept.raw"));
            run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", "-l", &snapshot, &name, text(&kept)]);
            let kept = std::fs::read(&kept).unwrap();
            // qemu-img shows a snapshot as large as the disk is now.
            let len = kept.len().min(bytes.len());
            assert!(kept[..len] == bytes[..len], "snapshot {id}");
        }
    }
}

/// Another file in memory with what `file` holds.
fn copy_of(file: &File) -> File {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let copy = memory();
    copy.write_all_at(&bytes, 0).unwrap();
    copy
}

fn operations() -> u64 {
    std::env::var("DOORLESS_MODEL_OPERATIONS").ok().and_then(|number| number.parse().ok()).unwrap_or(2000)
}

#[test]
fn random_requests_leave_what_a_vector_of_bytes_has_and_qemu_finds_no_fault() {
    if !judge("random_requests_leave_what_a_vector_of_bytes_has_and_qemu_finds_no_fault", "qemu-img") {
        return;
    }
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(kind) = KINDS.get(next.fetch_add(1, std::sync::atomic::Ordering::SeqCst)) {
                    eprintln!("{}", kind.name);
                    let dir = tempfile::tempdir().unwrap();
                    let mut model = make(kind, dir.path());
                    let cluster = model.node().info().cluster_size.unwrap();
                    let mut random = Random(0x5eed ^ kind.name.len() as u64);
                    for _ in 0..operations() {
                        model.step(&mut random, cluster);
                    }
                    model.judge(dir.path());
                }
            });
        }
    });
}
