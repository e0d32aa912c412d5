// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a guest has made of the file system: its tables and directories, read with suspicion.
//!
//! Every number and name here is the guest's. A cluster belongs to one chain at most, so no walk is longer than the disk; names
//! are held to the rules of those that were passed; anything that does not add up is an error for the whole disk, because
//! what a broken file system says about one file is as little worth as about another.

use std::collections::{BTreeMap, HashSet};

use super::entries::{DIRECTORY, ENTRY, LONG, UNIT_PLACES, UNITS, VOLUME};
use super::names::{self, Short};
use super::tree::{DEEPEST, LONGEST, MOST, shown};
use super::volume::{Kind, SECTOR, Volume};
use crate::{BlockNode, Error, Result, Wait};

/// Most runs of clusters of all files: a disk that is more scattered is refused, not remembered.
const MOST_RUNS: usize = 1 << 20;
/// Most bytes of all paths together.
const MOST_TEXT: usize = 32 << 20;
/// Bytes of the table that are read at a time.
const WINDOW: u64 = 64 << 10;

/// A file or a directory of the guest's.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// `None` for a directory.
    pub len: Option<u32>,
    /// First cluster and number of clusters, in order.
    pub runs: Vec<(u32, u32)>,
}

/// Everything on the disk, by path: a directory comes before what is in it.
pub(super) type FoundTree = BTreeMap<String, Found>;

/// Reads the tree of a guest's disk that was made as `volume`.
///
/// # Errors
/// The disk has another file system now, its file system is broken, or a name in it cannot be a file's of the host.
pub(super) fn read(node: &BlockNode, volume: &Volume) -> Result<FoundTree> {
    check_unchanged(node, volume)?;
    let words = usize::try_from(volume.clusters / 64 + 2).unwrap_or(0);
    let mut disk =
        Disk { node, volume, taken: vec![0; words], runs: 0, window: (u64::MAX, Vec::new()), found: FoundTree::new() };
    let root = if volume.kind == Kind::Fat32 { disk.chain(2, "/")? } else { Vec::new() };
    // Not by recursion: how deep it goes is the guest's choice. Directories are read one at a time.
    let mut rest = vec![(String::new(), root, 0)];
    let mut text = 0;
    while let Some((prefix, runs, depth)) = rest.pop() {
        let bytes = if runs.is_empty() {
            let start = u64::from(volume.data() - volume.root) * u64::from(SECTOR);
            disk.read(start, u64::from(volume.root * SECTOR))?
        } else {
            disk.bytes(&runs, &prefix)?
        };
        let mut names = HashSet::new();
        for raw in entries(&bytes, depth > 0, &prefix)? {
            let path = format!("{prefix}{}", raw.name);
            check_name(&raw.name, &path, &mut names)?;
            if depth == DEEPEST || path.len() > LONGEST {
                return Err(broken(&path, "lies too deep"));
            }
            text += path.len();
            if text > MOST_TEXT {
                return Err(broken(
                    &path,
                    &format!("is one too many: all paths together have at most {MOST_TEXT} bytes"),
                ));
            }
            if disk.found.len() >= MOST {
                return Err(broken(
                    &path,
                    &format!("is one too many: at most {MOST} files and directories are taken back"),
                ));
            }
            let found = if raw.folder {
                let runs = disk.chain(raw.cluster, &path)?;
                rest.push((format!("{path}/"), runs.clone(), depth + 1));
                Found { len: None, runs }
            } else {
                let runs = if raw.cluster == 0 { Vec::new() } else { disk.chain(raw.cluster, &path)? };
                let room: u64 =
                    runs.iter().map(|&(_, count)| u64::from(count) * u64::from(volume.cluster_bytes())).sum();
                if u64::from(raw.len) > room {
                    return Err(broken(
                        &path,
                        &format!("says that it has {} bytes, and has clusters for {room}", raw.len),
                    ));
                }
                Found { len: Some(raw.len), runs }
            };
            disk.found.insert(path, found);
        }
    }
    Ok(disk.found)
}

/// Whether the guest had the file system in use when it was read; none of FAT12 says.
pub(super) fn is_unclean(node: &BlockNode, volume: &Volume) -> bool {
    let at = match volume.kind {
        Kind::Fat12 | Kind::Fat16 => 37,
        Kind::Fat32 => 65,
    };
    let mut flags = [0];
    let start = u64::from(volume.start) * u64::from(SECTOR);
    node.read(&mut flags, start + at, Wait::Allowed).is_ok() && flags[0] & 1 != 0
}

fn broken(path: &str, why: &str) -> Error {
    Error::corrupt(format!("the guest's file system is broken: '{}' {why}", shown(path)))
}

/// The layout must be the one that was given: another would be the guest's word for everything.
fn check_unchanged(node: &BlockNode, volume: &Volume) -> Result<()> {
    let mut sector = [0; SECTOR as usize];
    let failed = |e| Error::io("read the guest's file system", e);
    node.read(&mut sector, u64::from(volume.start) * u64::from(SECTOR), Wait::Allowed).map_err(failed)?;
    let made = volume.boot_sector(b"           ");
    let end = if volume.kind == Kind::Fat32 { 52 } else { 36 };
    if sector[11..end] != made[11..end] {
        return Err(Error::corrupt(
            "the disk does not have the file system any more that it was served with: the guest has formatted it, or written over it",
        ));
    }
    Ok(())
}

fn check_name(name: &str, path: &str, names: &mut HashSet<String>) -> Result<()> {
    if let Some(why) = names::objection(name) {
        return Err(broken(path, &format!("has a name that cannot be: a FAT name cannot {why}")));
    }
    if !names.insert(names::folded(name)) {
        return Err(broken(path, "is there twice, or with another that differs in case alone"));
    }
    Ok(())
}

struct Disk<'a> {
    node: &'a BlockNode,
    volume: &'a Volume,
    /// A bit for each cluster.
    taken: Vec<u64>,
    runs: usize,
    /// A part of the table, and its first byte there.
    window: (u64, Vec<u8>),
    found: FoundTree,
}

impl Disk<'_> {
    fn read(&self, at: u64, len: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        self.node.read(&mut bytes, at, Wait::Allowed).map_err(|e| Error::io("read the guest's file system", e))?;
        Ok(bytes)
    }

    /// The runs of the chain that begins at `cluster`; they are no other chain's.
    fn chain(&mut self, mut cluster: u32, path: &str) -> Result<Vec<(u32, u32)>> {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        let end = match self.volume.kind {
            Kind::Fat12 => 0xff8,
            Kind::Fat16 => 0xfff8,
            Kind::Fat32 => 0x0fff_fff8,
        };
        loop {
            if cluster < 2 || cluster - 2 >= self.volume.clusters {
                return Err(broken(path, &format!("has cluster {cluster} in its chain, which is none of a file's")));
            }
            let (word, bit) = (cluster as usize / 64, 1u64 << (cluster % 64));
            let taken =
                self.taken.get_mut(word).ok_or_else(|| broken(path, "has a chain that leads out of the disk"))?;
            if *taken & bit != 0 {
                return Err(broken(path, &format!("has cluster {cluster}, which is in a chain already")));
            }
            *taken |= bit;
            match runs.last_mut() {
                Some((first, count)) if *first + *count == cluster => *count += 1,
                _ => {
                    self.runs += 1;
                    if self.runs > MOST_RUNS {
                        return Err(broken(path, "is one of too many scattered files"));
                    }
                    runs.push((cluster, 1));
                }
            }
            let next = self.entry(cluster)?;
            if next >= end {
                return Ok(runs);
            }
            cluster = next;
        }
    }

    /// An entry of the first table.
    fn entry(&mut self, cluster: u32) -> Result<u32> {
        let bits = u64::from(self.volume.kind.bits());
        let at = u64::from(cluster) * bits / 8;
        // FAT12 fits into one window, and the entries of the others into any.
        let start = at / WINDOW * WINDOW;
        if self.window.0 != start {
            let table = u64::from(self.volume.table) * u64::from(SECTOR);
            let first = u64::from(self.volume.start + self.volume.reserved) * u64::from(SECTOR);
            self.window = (start, self.read(first + start, WINDOW.min(table.saturating_sub(start)))?);
        }
        let at = usize::try_from(at - start).unwrap_or(usize::MAX);
        let byte = |index: usize| self.window.1.get(at.saturating_add(index)).copied().map_or(0, u32::from);
        let pair = byte(0) | byte(1) << 8;
        Ok(match self.volume.kind {
            Kind::Fat12 if cluster % 2 == 1 => pair >> 4,
            Kind::Fat12 => pair & 0xfff,
            Kind::Fat16 => pair,
            Kind::Fat32 => (pair | byte(2) << 16 | byte(3) << 24) & 0x0fff_ffff,
        })
    }

    /// What stands in the clusters of a directory.
    fn bytes(&self, runs: &[(u32, u32)], path: &str) -> Result<Vec<u8>> {
        let cluster = u64::from(self.volume.cluster_bytes());
        let len: u64 = runs.iter().map(|&(_, count)| u64::from(count) * cluster).sum();
        if len > (2 << 20) + cluster {
            return Err(broken(path, "is a directory of more than 65536 entries"));
        }
        let mut bytes = Vec::new();
        for &(first, count) in runs {
            bytes.extend(self.read(self.volume.cluster_at(first), u64::from(count) * cluster)?);
        }
        Ok(bytes)
    }
}

/// An entry of a directory.
#[derive(Debug, PartialEq, Eq)]
struct Raw {
    name: String,
    folder: bool,
    cluster: u32,
    len: u32,
}

/// The files and directories that a directory's bytes tell of; one that is not the root has two entries for itself and its parent.
fn entries(bytes: &[u8], has_own: bool, prefix: &str) -> Result<Vec<Raw>> {
    let mut all = Vec::new();
    let mut long = Long::default();
    for (index, entry) in bytes.chunks_exact(ENTRY).enumerate() {
        let attributes = entry[11];
        match entry[0] {
            0 => break,
            0xe5 => {
                long = Long::default();
                continue;
            }
            _ => {}
        }
        if attributes & 0x3f == LONG {
            long.add(entry);
            continue;
        }
        let told = std::mem::take(&mut long);
        let mut short: Short = [0; 11];
        short.copy_from_slice(&entry[..11]);
        if attributes & VOLUME != 0 {
            continue;
        }
        let own = [b".          ", b"..         "];
        if has_own && own.get(index).is_some_and(|own| **own == short) && attributes & DIRECTORY != 0 {
            continue;
        }
        let name = match told.name(&short) {
            Some(name) => name,
            None => short_name(&short, entry[12]).ok_or_else(|| {
                broken(&format!("{prefix}{}", names::shown(&short)), "has a short name that is not ASCII")
            })?,
        };
        let word = |at: usize| u32::from(entry[at]) | u32::from(entry[at + 1]) << 8;
        let (cluster, len) = (word(26) | word(20) << 16, word(28) | word(30) << 16);
        all.push(Raw { name, folder: attributes & DIRECTORY != 0, cluster, len });
    }
    Ok(all)
}

/// A short name in the letters that its flags say.
fn short_name(short: &Short, flags: u8) -> Option<String> {
    let mut short = *short;
    if !short.is_ascii() {
        return None;
    }
    let (base, extension) = short.split_at_mut(8);
    if flags & 0x08 != 0 {
        base.make_ascii_lowercase();
    }
    if flags & 0x10 != 0 {
        extension.make_ascii_lowercase();
    }
    Some(names::shown(&short))
}

/// Entries of a long name on the way to the short one that they belong to.
#[derive(Default)]
struct Long {
    units: Vec<u16>,
    /// The number that the next must have; 0 when all are there.
    next: u8,
    checksum: u8,
    begun: bool,
}

impl Long {
    fn add(&mut self, entry: &[u8]) {
        let number = entry[0] & 0x3f;
        if entry[0] & 0x40 != 0 {
            *self = Long { units: Vec::new(), next: number, checksum: entry[13], begun: (1..=20).contains(&number) };
        }
        if !self.begun || number != self.next || number == 0 || entry[13] != self.checksum {
            *self = Long::default();
            return;
        }
        self.next -= 1;
        let units = UNIT_PLACES.map(|at| u16::from_le_bytes([entry[at], entry[at + 1]]));
        // The last part comes first.
        let later = std::mem::replace(&mut self.units, Vec::with_capacity(20 * UNITS));
        self.units.extend(units);
        self.units.extend(later);
    }

    /// The name, if all its parts were there and belong to `short`.
    fn name(mut self, short: &Short) -> Option<String> {
        if !self.begun || self.next != 0 || names::checksum(short) != self.checksum {
            return None;
        }
        let end = self.units.iter().position(|&unit| unit == 0).unwrap_or(self.units.len());
        self.units.truncate(end);
        String::from_utf16(&self.units).ok()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::entries::ARCHIVE;
    use super::*;

    fn entry(short: &[u8; 11], attributes: u8) -> [u8; ENTRY] {
        let mut entry = [0; ENTRY];
        entry[..11].copy_from_slice(short);
        entry[11] = attributes;
        entry
    }

    fn part(number: u8, units: [u8; UNITS], checksum: u8) -> [u8; ENTRY] {
        let mut entry = [0; ENTRY];
        (entry[0], entry[11], entry[13]) = (number, LONG, checksum);
        UNIT_PLACES.into_iter().zip(units).for_each(|(at, unit)| entry[at] = unit);
        entry
    }

    fn named(list: &[[u8; ENTRY]]) -> Vec<String> {
        entries(&list.concat(), false, "").unwrap().into_iter().map(|raw| raw.name).collect()
    }

    #[test]
    fn a_long_name_counts_only_if_all_of_it_is_there_and_its_sum_is_right() {
        let short = entry(b"ABCDEF~1   ", ARCHIVE);
        let sum = names::checksum(b"ABCDEF~1   ");
        let (last, first) = (part(0x42, *b"nd more\0\0\0\0\0\0", sum), part(1, *b"a long name a", sum));
        assert_eq!(named(&[last, first, short]), ["a long name and more"]);
        assert_eq!(named(&[first, short]), ["ABCDEF~1"]);
        assert_eq!(named(&[last, short]), ["ABCDEF~1"]);
        assert_eq!(named(&[last, part(1, *b"a long name a", sum + 1), short]), ["ABCDEF~1"]);
        assert_eq!(named(&[last, first, entry(b"\xe5BCDEF~1   ", ARCHIVE), short]), ["ABCDEF~1"]);
        let half = part(0x41, [0; UNITS], sum);
        assert_eq!(named(&[half, short]), [""], "refused where names are checked");
    }

    #[test]
    fn the_label_what_was_removed_and_what_is_behind_the_end_are_no_files() {
        let list = [
            entry(b"LABEL      ", VOLUME),
            entry(b"\xe5ONE    TXT", ARCHIVE),
            entry(b"HERE    TXT", ARCHIVE),
            entry(b"DIR        ", DIRECTORY),
            [0; ENTRY],
            entry(b"BEHIND     ", ARCHIVE),
        ];
        assert_eq!(named(&list), ["HERE.TXT", "DIR"]);
        let mut lower = entry(b"HERE    TXT", ARCHIVE);
        lower[12] = 0x08;
        assert_eq!(named(&[lower]), ["here.TXT"]);
        assert!(entries(&entry(b"H\x80RE    TXT", ARCHIVE), false, "").is_err());
        assert_eq!(named(&[entry(b"..         ", DIRECTORY)]), [".."], "refused where names are checked");
    }
}
