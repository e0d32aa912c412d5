// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest's FAT disk: what it has made of a directory, told and copied.

use std::sync::{Arc, OnceLock};

use block::{BlockNode, ChangeKind, Graph, Host, NodeAccess, NodeSpec, OptionValue, Wait};

use super::memory;

/// Disks of both ways to find the root directory, and of entries that cross bytes.
const DISKS: [(u64, bool); 3] = [(12, true), (16, true), (32, false)];
/// The guest changes this much of the disk: tables, the root directory and the first directories and files.
const CHANGED: usize = 2 << 20;

/// A directory, and its disk as far as a guest may change it.
struct Disk {
    _graph: Graph,
    base: Arc<BlockNode>,
    start: usize,
    head: Vec<u8>,
}

/// Made once: only what a guest makes of them is new each time.
fn disk(which: usize) -> &'static Disk {
    static DISKS_MADE: [OnceLock<Disk>; DISKS.len()] = [const { OnceLock::new() }; DISKS.len()];
    DISKS_MADE[which].get_or_init(|| {
        let (bits, floppy) = DISKS[which];
        let files = ["one", "A long name that takes two.txt", "sub/deep/er/last", "sub/two", "sub/deep/three", "none/"];
        let files = files.into_iter().zip(1_usize..);
        let files = files
            .map(|(path, number)| (path.to_owned(), Box::new(memory(&vec![7; number * 700])) as block::Descriptor));
        let mut graph = Graph::new();
        let base = graph.add(NodeSpec {
            name: Some("base".into()),
            driver: "vvfat",
            access: NodeAccess::default(),
            host: Some(Host::directory(files.collect())),
            filename: String::new(),
            children: [].into(),
            detached: [].into(),
            options: [("fat-type", OptionValue::Size(bits)), ("floppy", OptionValue::Bool(floppy))].into(),
        });
        let base = base.unwrap();
        // A hard disk's partition begins at 1 MiB.
        let start = if floppy { 0 } else { 1 << 20 };
        let mut head = vec![0; CHANGED.min(usize::try_from(base.len()).unwrap() - start)];
        base.read(&mut head, start as u64, Wait::Allowed).unwrap();
        Disk { _graph: graph, base, start, head }
    })
}

/// The first byte says which disk; then changes to it: three bytes of place, one of length, and the new bytes.
pub fn vvfat(data: &[u8]) {
    let Some((&which, mut rest)) = data.split_first() else { return };
    let disk = disk(usize::from(which) % DISKS.len());
    let mut head = disk.head.clone();
    while let [a, b, c, len, changed @ ..] = rest {
        let at = usize::from(*a) | usize::from(*b) << 8 | (usize::from(*c) & 0x1f) << 16;
        let at = at.min(head.len());
        let count = usize::from(*len).min(changed.len()).min(head.len() - at);
        head[at..at + count].copy_from_slice(&changed[..count]);
        rest = &changed[count..];
    }
    let file = memory(&[]);
    std::os::unix::fs::FileExt::write_all_at(&file, &head, disk.start as u64).unwrap();
    file.set_len(disk.base.len()).unwrap();
    let top = Graph::new().add(NodeSpec {
        name: Some("top".into()),
        driver: "file",
        access: NodeAccess::default(),
        host: Some(Host::fixed(file)),
        filename: "top".into(),
        children: [].into(),
        detached: [].into(),
        options: [].into(),
    });
    let top = top.unwrap();
    let directory = disk.base.directory().unwrap();
    let Ok(found) = directory.changes(&disk.base, &top) else { return };
    let mut files = Vec::new();
    for change in &found.list {
        let plain = |part: &str| !matches!(part, "" | "." | "..") && !part.contains(['\0', '\\']);
        assert!(change.path.split('/').all(plain), "{:?}", change.path);
        if let ChangeKind::Create(len) | ChangeKind::Replace(len) = change.kind
            && files.len() < 20
        {
            files.push((change.path.clone(), memory(&[]), len));
        }
    }
    let empty: Vec<_> = files.iter().map(|(path, file, _)| (path.clone(), file)).collect();
    directory.copy(&top, &empty).unwrap();
    for (path, file, len) in &files {
        assert_eq!(file.metadata().unwrap().len(), u64::from(*len), "{path}");
    }
}
