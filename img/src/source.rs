// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is copied: one disk or several, one behind the other, or a part of one.

use std::sync::Arc;

use block::{BlockNode, ExtentKind, Wait};

use crate::disk::{Disk, Layer, Usage};
use crate::tool::{Error, Result, warn};

/// Bytes that are tried at once where reading fails.
const SECTOR: u64 = 512;

/// How a source is read.
#[derive(Clone, Debug, Default)]
pub struct Manner {
    /// Others may write it at the same time.
    pub force_share: bool,
    /// The state of a snapshot in place of the present one.
    pub snapshot: Option<SnapshotWanted>,
    /// Only what the topmost image has: the rest is in a backing file of the target's, too.
    pub top_only: bool,
    /// What cannot be read is copied as zeroes.
    pub salvage: bool,
    /// Say nothing of what is salvaged.
    pub quiet: bool,
}

/// Which snapshot.
#[derive(Clone, Debug)]
pub enum SnapshotWanted {
    /// That with this id and this name, as far as they are given.
    Both(Option<String>, Option<String>),
    /// That with this id, or else of this name.
    Either(String),
}

/// What stands somewhere in a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Data.
    Data,
    /// Zeroes.
    Zero,
    /// What the target's backing file has, too.
    Below,
}

struct Part {
    start: u64,
    len: u64,
    node: Arc<BlockNode>,
}

/// The disks that are copied.
pub struct Source {
    parts: Vec<Part>,
    /// Bytes of the first that are left out.
    skip: u64,
    len: u64,
    manner: Manner,
    disks: Vec<Disk>,
}

impl Source {
    /// Opens the disks; each but the last is filled up to whole sectors.
    ///
    /// # Errors
    /// One is broken, in use, or has no such snapshot.
    pub fn open(chains: Vec<Vec<Layer>>, manner: Manner) -> Result<Source> {
        let (mut parts, mut disks, mut start) = (Vec::new(), Vec::new(), 0u64);
        for chain in chains {
            let disk = Disk::open(chain, Usage { writable: false, force_share: manner.force_share, unflushed: false })?;
            if let Some(wanted) = &manner.snapshot {
                let kept = disk.node.snapshots()?;
                match wanted {
                    SnapshotWanted::Both(id, name) => kept.show(id.as_deref(), name.as_deref())?,
                    SnapshotWanted::Either(word) => {
                        kept.show(Some(word), None).or_else(|_| kept.show(None, Some(word)))?;
                    }
                }
            }
            let len = disk.node.len().checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX);
            parts.push(Part { start, len, node: Arc::clone(&disk.node) });
            start = start
                .checked_add(len)
                .ok_or_else(|| Error::Text("the sources are together larger than a disk can be".into()))?;
            disks.push(disk);
        }
        Ok(Source { parts, skip: 0, len: start, manner, disks })
    }

    /// The same, without its first `skip` bytes and with at most `len` of what follows.
    #[must_use]
    pub fn part(mut self, skip: u64, len: u64) -> Source {
        self.skip = skip.min(self.len);
        self.len = (self.len - self.skip).min(len);
        self
    }

    /// Bytes, whole sectors unless it is a part.
    #[allow(clippy::len_without_is_empty, reason = "an empty disk is not a special case")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The disks, one for each chain.
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// What stands at `at`, for at most `len` bytes.
    ///
    /// # Errors
    /// A layer cannot be read.
    pub fn status(&self, at: u64, len: u64) -> Result<(Kind, u64)> {
        let (part, inside, len) = self.find(at, len);
        let there = part.node.len().saturating_sub(inside);
        if there == 0 {
            return Ok((Kind::Zero, len));
        }
        let asked = len.min(there);
        let found = if self.manner.top_only {
            part.node.place(inside, asked).map(|place| match (place.depth, place.is_present, place.is_zero) {
                (0, true, false) => (Kind::Data, place.len),
                (0, true, true) => (Kind::Zero, place.len),
                _ => (Kind::Below, place.len),
            })
        } else {
            let kind = |kind| if kind == ExtentKind::Zero { Kind::Zero } else { Kind::Data };
            part.node.status(inside, asked).map(|extent| (kind(extent.kind), extent.len))
        };
        match found {
            Ok(found) => Ok(found),
            Err(e) if self.manner.salvage => {
                self.lost(&format!("error while reading block status at offset {at}: {e}"));
                // Reading tells what can be read.
                Ok((Kind::Data, asked.min(1 << 16)))
            }
            Err(e) => Err(failed("reading block status", at, &e)),
        }
    }

    /// Fills `buf` from `at`.
    ///
    /// # Errors
    /// A layer cannot be read.
    pub fn read(&self, buf: &mut [u8], at: u64) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let from = at + done as u64;
            let (part, inside, len) = self.find(from, (buf.len() - done) as u64);
            let piece = &mut buf[done..done + usize::try_from(len).unwrap_or(0)];
            match part.node.read_or_zero(piece, inside, Wait::Allowed) {
                Ok(()) => {}
                Err(_) if self.manner.salvage => self.salvage(part, piece, inside, from),
                Err(e) => return Err(failed("reading", from, &e)),
            }
            done += piece.len();
        }
        Ok(())
    }

    fn salvage(&self, part: &Part, piece: &mut [u8], inside: u64, at: u64) {
        let mut done = 0;
        while done < piece.len() {
            let from = inside + done as u64;
            let len = usize::try_from(SECTOR - from % SECTOR).unwrap_or(512).min(piece.len() - done);
            let sector = &mut piece[done..done + len];
            if let Err(e) = part.node.read_or_zero(sector, from, Wait::Allowed) {
                self.lost(&format!("error while reading at byte {}: {e}", at + done as u64));
                sector.fill(0);
            }
            done += len;
        }
    }

    fn lost(&self, what: &str) {
        if !self.manner.quiet {
            warn(&format!("qemu-img: warning: {what}"));
        }
    }

    /// The part where `at` lies, the place in it, and how many of `len` bytes are in it.
    fn find(&self, at: u64, len: u64) -> (&Part, u64, u64) {
        let at = at + self.skip;
        let index = self.parts.partition_point(|part| part.start + part.len <= at).min(self.parts.len() - 1);
        let part = &self.parts[index];
        let inside = at - part.start;
        (part, inside, len.min(part.len.saturating_sub(inside)).max(1))
    }
}

/// An error of a copy.
pub fn failed(doing: &str, at: u64, e: &std::io::Error) -> Error {
    Error::Text(format!("error while {doing} at byte {at}: {e}"))
}
