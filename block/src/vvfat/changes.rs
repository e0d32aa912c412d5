// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a guest has changed in the directory, as a list for whoever can: this process can make no file.

use std::collections::BTreeMap;
use std::os::fd::AsFd;

use super::Vvfat;
use super::guest::{self, Found, FoundTree};
use super::tree::{Child, shown};
use crate::{BlockNode, Error, Result, Wait};

/// Bytes that are compared or copied at a time.
const PIECE: u32 = 256 << 10;

/// A change, to be made in the order of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Relative to the directory; its parts are names and not `.` or `..`.
    pub path: String,
    /// What is to be done.
    pub kind: ChangeKind,
}

/// What is to be done to a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    /// A new directory.
    MakeDirectory,
    /// A file that was not there, of so many bytes.
    Create(u32),
    /// A file with other content, of so many bytes.
    Replace(u32),
    /// A file that is there no more.
    Delete,
    /// A directory that is there no more, and empty by then.
    RemoveDirectory,
}

/// What a guest has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// In an order that works: files in the way of directories go first, then directories and files come, then the others go.
    pub list: Vec<Change>,
    /// Whether the guest had the file system in use, so that something may be missing.
    pub unclean: bool,
}

impl Vvfat {
    /// What a guest has changed: its disk is `top`, which lies over `base`, the node of this driver. Nobody writes to `top`
    /// meanwhile.
    ///
    /// # Errors
    /// `Corrupt` if the guest's file system is broken: then there is nothing to be taken from it. `Io`.
    pub fn changes(&self, base: &BlockNode, top: &BlockNode) -> Result<Changes> {
        let found = self.guest_tree(top)?;
        let original = self.originals();
        let mut list = Vec::new();
        let mut late = Vec::new();
        for (path, original) in &original {
            let now = found.get(path);
            match (original.is_some(), now.map(|now| now.len.is_some())) {
                (true, Some(false)) => list.push(Change { path: path.clone(), kind: ChangeKind::Delete }),
                (true, None) => late.push(Change { path: path.clone(), kind: ChangeKind::Delete }),
                (false, Some(true)) => {
                    let text = format!("the guest has put a file in the place of the directory '{}'", shown(path));
                    return Err(Error::unsupported(text + ", which is not done at once: remove it first"));
                }
                _ => {}
            }
        }
        for (path, now) in &found {
            let kind = match (now.len, original.get(path)) {
                (None, Some(None)) => continue,
                (None, _) => ChangeKind::MakeDirectory,
                (Some(len), Some(Some(place))) if self.differs(now, len, *place, base, top)? => {
                    ChangeKind::Replace(len)
                }
                (Some(_), Some(Some(_))) => continue,
                (Some(len), _) => ChangeKind::Create(len),
            };
            list.push(Change { path: path.clone(), kind });
        }
        // What lies deeper comes first when the order of paths is turned round.
        let gone = original.iter().rev().filter(|(path, file)| file.is_none() && !found.contains_key(*path));
        late.extend(gone.map(|(path, _)| Change { path: path.clone(), kind: ChangeKind::RemoveDirectory }));
        list.append(&mut late);
        Ok(Changes { list, unclean: guest::is_unclean(top, &self.volume) })
    }

    /// Copies files of the guest's disk `top` into empty files, by path.
    ///
    /// # Errors
    /// As [`changes`](Vvfat::changes); `Invalid` for a path that is no file of the guest's; `Io`.
    pub fn copy<F: AsFd>(&self, top: &BlockNode, files: &[(String, F)]) -> Result<()> {
        let found = self.guest_tree(top)?;
        for (path, file) in files {
            let Some(Found { len: Some(len), runs }) = found.get(path) else {
                return Err(Error::invalid(format!("'{}' is no file on the guest's disk", shown(path))));
            };
            let failed = |e| Error::io(&format!("copy '{}' from the guest's disk", shown(path)), e);
            rustix::fs::ftruncate(file, u64::from(*len)).map_err(|e| failed(e.into()))?;
            self.pieces(*len, runs, |at, bytes, offset| {
                top.read(bytes, at, Wait::Allowed).map_err(failed)?;
                if bytes.iter().any(|&byte| byte != 0) {
                    sys::file::write_at(file, bytes, offset, false).map_err(failed)?;
                }
                Ok(true)
            })?;
        }
        Ok(())
    }

    fn guest_tree(&self, top: &BlockNode) -> Result<FoundTree> {
        if top.len() != self.len {
            return Err(Error::invalid(format!(
                "node '{}' does not have the size of the directory's disk",
                top.name()
            )));
        }
        guest::read(top, &self.volume)
    }

    /// Every path that was passed: `None` for a directory, else a file's length and first cluster.
    fn originals(&self) -> BTreeMap<String, Option<(u32, u32)>> {
        let mut all = BTreeMap::new();
        let mut rest = vec![(0, String::new())];
        while let Some((folder, prefix)) = rest.pop() {
            for (name, child) in &self.tree.folders[folder].children {
                let path = format!("{prefix}{name}");
                match *child {
                    Child::Folder(number) => {
                        rest.push((number, format!("{path}/")));
                        all.insert(path, None);
                    }
                    Child::File(number) => {
                        all.insert(path, Some((self.tree.files[number].len, self.starts[number])));
                    }
                }
            }
        }
        all
    }

    /// Whether a file is not what it was, of a length and from a cluster on.
    fn differs(&self, now: &Found, len: u32, was: (u32, u32), base: &BlockNode, top: &BlockNode) -> Result<bool> {
        let clusters = was.0.div_ceil(self.volume.cluster_bytes());
        let run = if clusters == 0 { Vec::new() } else { vec![(was.1, clusters)] };
        if len != was.0 || now.runs != run {
            return Ok(true);
        }
        let failed = |e| Error::io("compare a file with what it was", e);
        let (mut differs, mut before) = (false, Vec::new());
        self.pieces(len, &now.runs, |at, bytes, _| {
            let mut skip = 0;
            while skip < bytes.len() {
                let status = top.status(at + skip as u64, (bytes.len() - skip) as u64).map_err(failed)?;
                let count = usize::try_from(status.len).unwrap_or(usize::MAX).min(bytes.len() - skip);
                // What the overlay does not have is what it was.
                if status.depth == 1 {
                    let (now, place) = (&mut bytes[skip..skip + count], at + skip as u64);
                    before.resize(count, 0);
                    top.read(now, place, Wait::Allowed).map_err(failed)?;
                    base.read(&mut before, place, Wait::Allowed).map_err(failed)?;
                    differs |= *now != *before;
                }
                skip += count;
            }
            Ok(!differs)
        })?;
        Ok(differs)
    }

    /// Goes through a file's clusters as long as `each` says: their place on the disk, a buffer, their place in the file.
    fn pieces(
        &self,
        len: u32,
        runs: &[(u32, u32)],
        mut each: impl FnMut(u64, &mut [u8], u64) -> Result<bool>,
    ) -> Result<()> {
        let mut buffer = vec![0; PIECE as usize];
        let (mut left, mut offset) = (u64::from(len), 0);
        for &(first, count) in runs {
            let mut at = self.volume.cluster_at(first);
            let mut run = (u64::from(count) * u64::from(self.volume.cluster_bytes())).min(left);
            while run > 0 {
                let now = run.min(PIECE.into());
                let piece = &mut buffer[..usize::try_from(now).unwrap_or(0)];
                if !each(at, piece, offset)? {
                    return Ok(());
                }
                (run, left, at, offset) = (run - now, left - now, at + now, offset + now);
            }
        }
        Ok(())
    }
}
