// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images in memory, made by qemu-img and opened here.
#![allow(dead_code, clippy::unwrap_used, reason = "each test takes what it needs")]

pub mod guest;
pub mod image;
pub mod recording;
pub mod requests;
pub mod session;
pub mod walk;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use block::{BlockNode, Graph, Host, NodeAccess, NodeSpec, OptionValue, Wait};

/// Whether a judge is there. Where it is not, says that `test` is skipped; in CI that is a failure.
pub fn judge(test: &str, program: &str) -> bool {
    if Command::new(program).arg("--version").output().is_ok() {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "CI must have {program}");
    eprintln!("skipped: {test}: needs {program} (make judges)");
    false
}

/// What a program prints; it must succeed.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// A file in memory with what stands in the file at `path`.
pub fn in_memory(path: &Path) -> File {
    let bytes = std::fs::read(path).unwrap();
    let file = memory();
    file.write_all_at(&bytes, 0).unwrap();
    file
}

/// An empty file in memory.
pub fn memory() -> File {
    rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into()
}

/// Copies a file in memory to a path.
pub fn to_disk(file: &File, path: &Path) {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// Nodes under construction.
pub struct Nodes {
    pub graph: Graph,
    next: u32,
}

impl Nodes {
    pub fn new() -> Nodes {
        Nodes { graph: Graph::new(), next: 0 }
    }

    /// A file node; its name.
    pub fn file(&mut self, file: &File, writable: bool) -> String {
        let name = format!("file{}", self.next);
        self.next += 1;
        let spec = NodeSpec {
            name: Some(name.clone()),
            driver: "file",
            access: NodeAccess { writable, unmap: true },
            host: Some(Host::fixed(file.try_clone().unwrap())),
            filename: name.clone(),
            children: BTreeMap::new(),
            detached: BTreeSet::new(),
            options: BTreeMap::new(),
        };
        self.graph.add(spec).unwrap();
        name
    }

    /// A node of a format over others.
    pub fn format(
        &mut self,
        driver: &'static str,
        children: &[(&'static str, &str)],
        writable: bool,
        options: &[(&'static str, OptionValue)],
    ) -> block::Result<Arc<BlockNode>> {
        let name = format!("node{}", self.next);
        self.next += 1;
        self.graph.add(NodeSpec {
            name: Some(name),
            driver,
            access: NodeAccess { writable, unmap: true },
            host: None,
            filename: String::new(),
            children: children.iter().map(|(edge, child)| (*edge, (*child).to_owned())).collect(),
            detached: BTreeSet::new(),
            options: options.iter().cloned().collect(),
        })
    }
}

/// Bytes of a node.
pub fn read(node: &BlockNode, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
    let mut buf = vec![0xee; len];
    node.read(&mut buf, offset, Wait::Allowed).map(|()| buf)
}

/// Numbers that are the same in every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// `name` in a directory, as text.
pub fn name_in(dir: &Path, name: &str) -> (PathBuf, String) {
    let path = dir.join(name);
    (path.clone(), path.to_str().unwrap().to_owned())
}
