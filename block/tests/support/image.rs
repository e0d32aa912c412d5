// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Small qcow2 images of many kinds on [recorded](super::recording) host files, filled with [tags](super::guest).
#![allow(dead_code, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "each test takes what it needs")]

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

use block::{
    Alarm, BlockNode, Children, Driver, Graph, Host, NodeAccess, NodeSpec, OpenRequest, OptionValue, driver_named,
};

use super::guest::{ATOM, bytes_of};
use super::recording::{Journal, recorded};
use super::{in_memory, name_in, run, text};

/// A kind of image.
#[derive(Clone, Copy)]
pub struct Kind {
    pub name: &'static str,
    /// Of `qemu-img create`; `DATA` stands for the data file's name.
    pub options: &'static str,
    pub size: u64,
    /// Shorter than the image.
    pub backing: bool,
    pub start: Start,
    pub discard_no_unref: bool,
    /// Bytes of L2 tables in memory, if not the default.
    pub cache: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Start {
    Empty,
    Full,
    Snapshot,
    Compressed,
}

pub const TINY: Kind = Kind {
    name: "512-byte clusters",
    options: "cluster_size=512",
    size: 96 << 10,
    backing: false,
    start: Start::Empty,
    discard_no_unref: false,
    cache: None,
};

pub const KINDS: &[Kind] = &[
    TINY,
    Kind { name: "512-byte clusters, small cache", cache: Some(512), start: Start::Full, ..TINY },
    Kind { name: "refcount tables that grow", options: "cluster_size=512,refcount_bits=64", size: 192 << 10, ..TINY },
    Kind { name: "1-bit refcounts", options: "cluster_size=512,refcount_bits=1", start: Start::Compressed, ..TINY },
    Kind { name: "snapshot", start: Start::Snapshot, ..TINY },
    Kind {
        name: "snapshot, 2-bit refcounts",
        options: "cluster_size=1024,refcount_bits=2",
        start: Start::Snapshot,
        ..TINY
    },
    Kind { name: "compressed", options: "cluster_size=2048", start: Start::Compressed, ..TINY },
    Kind {
        name: "compressed with zstd",
        options: "cluster_size=4096,compression_type=zstd",
        start: Start::Compressed,
        ..TINY
    },
    Kind { name: "extended L2", options: "extended_l2=on,cluster_size=16384", size: 256 << 10, ..TINY },
    Kind {
        name: "extended L2, backing",
        options: "extended_l2=on,cluster_size=16384",
        size: 256 << 10,
        backing: true,
        ..TINY
    },
    Kind {
        name: "extended L2, snapshot",
        options: "extended_l2=on,cluster_size=16384",
        size: 256 << 10,
        start: Start::Snapshot,
        ..TINY
    },
    Kind { name: "backing", options: "cluster_size=1024", backing: true, ..TINY },
    Kind { name: "version 2", options: "cluster_size=512,compat=0.10", ..TINY },
    Kind { name: "version 2, backing", options: "cluster_size=1024,compat=0.10", backing: true, ..TINY },
    Kind { name: "external data file", options: "cluster_size=1024,data_file=DATA", ..TINY },
    Kind { name: "raw external data file", options: "cluster_size=1024,data_file=DATA,data_file_raw=on", ..TINY },
    Kind { name: "discard without giving back", discard_no_unref: true, start: Start::Full, ..TINY },
    Kind { name: "64 KiB clusters", options: "cluster_size=65536", size: 512 << 10, ..TINY },
];

/// An image's files at rest, and what a guest sees.
pub struct Made {
    pub kind: Kind,
    /// The image, and its data file if it has one.
    pub files: Vec<Vec<u8>>,
    pub backing: Option<Arc<BlockNode>>,
    pub tags: Vec<u64>,
    /// Of the backing file.
    pub below: Vec<u64>,
}

/// What the atom at `index` of a backing file, or of an image's first content, holds.
fn first_tag(index: usize, layer: u64) -> u64 {
    // Runs of zeroes in between.
    if index / 10 % 3 == 2 { 0 } else { (layer << 48) | (index as u64 + 1) }
}

/// The image as qemu-img makes it.
pub fn make(kind: &Kind) -> Arc<Made> {
    // Making one takes several processes; tests in one program share them.
    static MADE: OnceLock<Mutex<HashMap<&'static str, Arc<Made>>>> = OnceLock::new();
    let mut made = MADE.get_or_init(Mutex::default).lock().unwrap();
    Arc::clone(made.entry(kind.name).or_insert_with(|| Arc::new(make_anew(kind))))
}

fn make_anew(kind: &Kind) -> Made {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    let (image, image_name) = name_in(dir, "image.qcow2");
    let (data, data_name) = name_in(dir, "data.raw");
    let options = kind.options.replace("DATA", &data_name);
    let mut tags = vec![0; kind.size as usize / ATOM];
    let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", &options];
    let mut below = Vec::new();
    let backing_path = dir.join("backing.raw");
    if kind.backing {
        below = (0..tags.len() * 3 / 4 / 2 * 2 + 2).map(|index| first_tag(index, 0xbacc)).collect();
        tags[..below.len()].copy_from_slice(&below);
        std::fs::write(&backing_path, bytes_of(below.iter().copied())).unwrap();
        arguments.extend(["-b", text(&backing_path), "-F", "raw"]);
    }
    let size = kind.size.to_string();
    arguments.extend([image_name.as_str(), &size]);
    run("qemu-img", &arguments);
    if kind.start != Start::Empty {
        let half = tags.len() / 2;
        for (index, tag) in tags[..half].iter_mut().enumerate() {
            *tag = first_tag(index, 0xf1);
        }
        let content = dir.join("content.raw");
        std::fs::write(&content, bytes_of(tags.iter().copied())).unwrap();
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
    let read = |path: &Path| std::fs::read(path).unwrap();
    let mut files = vec![read(&image)];
    if options.contains("data_file=") {
        files.push(read(&data));
    }
    let backing = kind.backing.then(|| {
        let spec = NodeSpec {
            name: Some("backing".into()),
            driver: "file",
            access: NodeAccess::default(),
            host: Some(Host::fixed(in_memory(&backing_path))),
            filename: "backing".into(),
            children: [].into(),
            detached: BTreeSet::new(),
            options: [].into(),
        };
        Graph::new().add(spec).unwrap()
    });
    Made { kind: *kind, files, backing, tags, below }
}

/// What files hold, by number.
pub type Contents = Vec<Arc<Mutex<Vec<u8>>>>;

/// An open image over recorded files.
pub struct Open {
    pub node: BlockNode,
    /// What the files hold.
    pub files: Contents,
}

impl Made {
    /// Opens the image whose files hold `files`, for writing.
    ///
    /// # Errors
    /// The driver's.
    pub fn open(&self, journal: &Arc<Journal>, files: &[Vec<u8>]) -> block::Result<Open> {
        let (driver, files) = self.driver(journal, files)?;
        let access = NodeAccess { writable: true, unmap: true };
        Ok(Open { node: BlockNode::new("image", "qcow2", "image", access, driver), files })
    }

    /// The same without a node, and what the files hold.
    ///
    /// # Errors
    /// The driver's.
    pub fn driver(&self, journal: &Arc<Journal>, files: &[Vec<u8>]) -> block::Result<(Box<dyn Driver>, Contents)> {
        let recorded: Vec<_> =
            files.iter().enumerate().map(|(at, content)| recorded(journal, at, content.clone())).collect();
        let mut children = Children::new();
        children.insert("file", Arc::clone(&recorded[0].0));
        if let Some((data, _)) = recorded.get(1) {
            children.insert("data-file", Arc::clone(data));
        }
        if let Some(backing) = &self.backing {
            children.insert("backing", Arc::clone(backing));
        }
        let mut options = block::Options::new();
        options.insert("discard-no-unref", OptionValue::Bool(self.kind.discard_no_unref));
        if let Some(bytes) = self.kind.cache {
            options.insert("l2-cache-size", OptionValue::Size(bytes));
        }
        let driver = (driver_named("qcow2").unwrap().open)(OpenRequest {
            descriptor: None,
            files: Vec::new(),
            filename: String::new(),
            children,
            detached: BTreeSet::new(),
            options,
            writable: true,
            facts_only: false,
            node_name: "image".into(),
            alarm: Alarm::default(),
        })?;
        Ok((driver, recorded.into_iter().map(|(_, content)| content).collect()))
    }
}

impl Open {
    /// What the files hold now.
    pub fn content(&self) -> Vec<Vec<u8>> {
        self.files.iter().map(|content| content.lock().unwrap().clone()).collect()
    }

    /// Closes the image; what its files hold then.
    pub fn close(self) -> Vec<Vec<u8>> {
        let Open { node, files } = self;
        drop(node);
        files.iter().map(|content| content.lock().unwrap().clone()).collect()
    }

    /// All that a guest sees.
    pub fn all(&self) -> std::io::Result<Vec<u8>> {
        super::read(&self.node, 0, self.node.len() as usize)
    }
}
