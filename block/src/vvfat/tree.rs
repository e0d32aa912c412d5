// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The directory as it was passed: descriptors with paths for names, made a tree.
//!
//! Paths are text from outside. Each part must be a name that FAT can have, and no two parts of one directory may be the same
//! to it; what is named twice is refused. Entries come in the order of their names' bytes, so the same files are the same disk.

use std::collections::{BTreeMap, HashSet};

use rustix::fs::FileType;

use super::names;
use crate::host::Descriptor;
use crate::{Error, Result};

/// Most files and directories.
pub(super) const MOST: usize = 1 << 17;
/// Longest path in bytes, and how deep it may lead.
pub(super) const LONGEST: usize = 4096;
pub(super) const DEEPEST: usize = 64;

/// A directory's files and directories.
pub(super) struct Tree {
    /// The root first, each before those in it.
    pub folders: Vec<Folder>,
    /// In the order of their paths.
    pub files: Vec<File>,
}

pub(super) struct Folder {
    pub parent: usize,
    /// By name.
    pub children: BTreeMap<String, Child>,
    /// Of the newest file in it, seconds since 1970; 0 without any.
    pub time: i64,
    folded: HashSet<String>,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Child {
    Folder(usize),
    File(usize),
}

pub(super) struct File {
    pub fd: Descriptor,
    /// Bytes, as of now.
    pub len: u32,
    /// When it was written last, seconds since 1970.
    pub time: i64,
}

/// A path for messages: short and without control characters.
pub(super) fn shown(path: &str) -> String {
    path.chars().take(200).flat_map(char::escape_debug).collect()
}

impl Tree {
    /// A tree of `passed`. A path that ends in `/` stands for a directory, and its descriptor is closed unread; others are
    /// regular files, and directories on the way to them are there too.
    pub(super) fn new(mut passed: Vec<(String, Descriptor)>) -> Result<Tree> {
        passed.sort_by(|a, b| a.0.cmp(&b.0));
        let mut tree = Tree { folders: vec![Folder::new(0)], files: Vec::new() };
        for (path, fd) in passed {
            let refused = |why: String| Error::invalid(format!("the path '{}' {why}", shown(&path)));
            if path.len() > LONGEST {
                return Err(refused(format!("has {} bytes; at most {LONGEST} can be", path.len())));
            }
            if path == "/" {
                continue;
            }
            let mut at = 0;
            let mut parts = path.split('/').enumerate().peekable();
            while let Some((depth, part)) = parts.next() {
                if depth == DEEPEST {
                    return Err(refused(format!("leads more than {DEEPEST} directories down")));
                }
                if part.is_empty() && depth > 0 && parts.peek().is_none() {
                    break;
                }
                if let Some(why) = names::objection(part) {
                    return Err(refused(format!("has a part '{}', and a FAT name cannot {why}", shown(part))));
                }
                let is_folder = parts.peek().is_some();
                match enter(&mut tree, at, part, is_folder) {
                    Ok(Some(folder)) => at = folder,
                    Ok(None) => {}
                    Err(why) => return Err(refused(why)),
                }
            }
            if path.ends_with('/') {
                continue;
            }
            let file = File::new(fd).map_err(refused)?;
            tree.folders[at].time = tree.folders[at].time.max(file.time);
            tree.files.push(file);
        }
        for folder in (1..tree.folders.len()).rev() {
            let Folder { parent, time, .. } = tree.folders[folder];
            tree.folders[parent].time = tree.folders[parent].time.max(time);
        }
        Ok(tree)
    }
}

/// Goes on from directory `at` to its `part`, which is made if it is not there; the directory, if it is one.
fn enter(tree: &mut Tree, at: usize, part: &str, is_folder: bool) -> std::result::Result<Option<usize>, String> {
    let known = tree.folders[at].children.get(part).copied();
    match (known, is_folder) {
        (Some(Child::Folder(folder)), true) => return Ok(Some(folder)),
        (Some(Child::File(_)), false) => return Err("was passed twice".into()),
        (Some(_), _) => return Err("is a file and a directory".into()),
        (None, _) => {}
    }
    if tree.files.len() + tree.folders.len() >= MOST {
        return Err(format!("is one too many: a disk has at most {MOST} files and directories"));
    }
    if !tree.folders[at].folded.insert(names::folded(part)) {
        return Err("has another beside it that differs in case alone, which are one to FAT".into());
    }
    let child = if is_folder { Child::Folder(tree.folders.len()) } else { Child::File(tree.files.len()) };
    tree.folders[at].children.insert(part.to_owned(), child);
    if !is_folder {
        return Ok(None);
    }
    tree.folders.push(Folder::new(at));
    Ok(Some(tree.folders.len() - 1))
}

impl Folder {
    fn new(parent: usize) -> Folder {
        Folder { parent, children: BTreeMap::new(), time: 0, folded: HashSet::new() }
    }
}

impl File {
    fn new(fd: Descriptor) -> std::result::Result<File, String> {
        let stat = rustix::fs::fstat(fd.as_fd()).map_err(|e| format!("cannot be looked at: {e}"))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err("is no regular file".into());
        }
        let len = u32::try_from(stat.st_size)
            .map_err(|_| format!("has {} bytes; a file on FAT has at most 4294967295", stat.st_size))?;
        Ok(File { fd, len, time: stat.st_mtime })
    }
}
