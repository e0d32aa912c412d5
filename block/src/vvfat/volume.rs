// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The disk around a FAT file system: how large it is, where its parts lie, and what its first sectors say.

use super::entries::ENTRY;
use super::names::Short;
use super::tree::Tree;
use crate::vvfat::entries;
use crate::{Error, Result};

pub(super) const SECTOR: u32 = 512;
/// Sectors before the partition of a hard disk: 1 MiB, so that clusters lie as pages do.
const PARTITION: u32 = 2048;
/// As in QEMU's disks: guests know them by these.
const SERIAL: u32 = 0xfabe_1afd;
const SIGNATURE: u32 = 0xbe1a_fdfa;
/// Entries of the root directory of FAT12 and FAT16, unless more are needed, and the most that can be.
const ROOT_ENTRIES: usize = 512;
const MOST_ROOT_ENTRIES: usize = 65_520;
/// Most entries of any other directory.
const MOST_ENTRIES: usize = 65_536;
/// Fewest clusters of FAT16 and of FAT32: how many there are is what makes a FAT the kind that it is.
pub(super) const FAT16_CLUSTERS: u32 = 4085;
pub(super) const FAT32_CLUSTERS: u32 = 65_525;
/// Sectors of a disk of 504 MiB.
const USUAL: u32 = 1024 * 16 * 63;

/// Bits of an entry of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Fat12,
    Fat16,
    Fat32,
}

impl Kind {
    pub(super) fn bits(self) -> u32 {
        match self {
            Kind::Fat12 => 12,
            Kind::Fat16 => 16,
            Kind::Fat32 => 32,
        }
    }

    /// Bytes of a table of so many entries.
    pub(super) fn table_bytes(self, entries: u64) -> u64 {
        (entries * u64::from(self.bits())).div_ceil(8)
    }
}

/// Where everything is, in sectors.
#[derive(Clone, Debug)]
pub(super) struct Volume {
    pub kind: Kind,
    /// The whole disk.
    pub disk: u32,
    /// Before the file system.
    pub start: u32,
    /// Before its first table.
    pub reserved: u32,
    /// Of one of the two tables.
    pub table: u32,
    /// Of the root directory, for FAT12 and FAT16.
    pub root: u32,
    pub per_cluster: u32,
    pub clusters: u32,
    media: u8,
    heads: u16,
    per_track: u16,
}

impl Volume {
    /// The first sector of cluster 2.
    pub(super) fn data(&self) -> u32 {
        self.start + self.reserved + 2 * self.table + self.root
    }

    pub(super) fn cluster_bytes(&self) -> u32 {
        self.per_cluster * SECTOR
    }

    /// Where a cluster begins on the disk, in bytes.
    pub(super) fn cluster_at(&self, cluster: u32) -> u64 {
        let sector = u64::from(self.data()) + u64::from(cluster.saturating_sub(2)) * u64::from(self.per_cluster);
        sector * u64::from(SECTOR)
    }

    /// A volume of `disk` sectors; `floppy` has no partition and no gaps.
    fn new(kind: Kind, disk: u32, per_cluster: u32, root_entries: usize, floppy: bool) -> Volume {
        let start = if floppy { 0 } else { PARTITION };
        let reserved = if kind == Kind::Fat32 { 32 } else { 1 };
        let root = if kind == Kind::Fat32 { 0 } else { (root_entries * ENTRY).div_ceil(SECTOR as usize) };
        // At most 4095.
        let root = u32::try_from(root).unwrap_or(u32::MAX / 2);
        let sectors = disk - start;
        let most = u64::from(sectors / per_cluster) + 2;
        let table = u32::try_from(kind.table_bytes(most).div_ceil(SECTOR.into())).unwrap_or(u32::MAX / 4);
        let mut volume = Volume {
            kind,
            disk,
            start,
            reserved,
            table,
            root,
            per_cluster,
            clusters: 0,
            media: if floppy { 0xf0 } else { 0xf8 },
            heads: if floppy {
                2
            } else if disk <= USUAL {
                16
            } else {
                255
            },
            per_track: match disk {
                2880 => 18,
                5760 => 36,
                _ => 63,
            },
        };
        if !floppy {
            volume.reserved += volume.data().next_multiple_of(per_cluster) - volume.data();
        }
        volume.clusters = (disk.saturating_sub(volume.data())) / per_cluster;
        volume
    }

    /// Whether so many clusters are a FAT of this kind.
    fn is_of_its_kind(&self) -> bool {
        match self.kind {
            Kind::Fat12 => self.clusters < FAT16_CLUSTERS,
            Kind::Fat16 => (FAT16_CLUSTERS..FAT32_CLUSTERS).contains(&self.clusters),
            Kind::Fat32 => (FAT32_CLUSTERS..0x0fff_fff5).contains(&self.clusters),
        }
    }

    /// A disk for `tree`: of the kind that is asked for, else FAT12 on a floppy, and on a hard disk FAT16 if that is enough.
    pub(super) fn for_tree(tree: &Tree, kind: Option<Kind>, floppy: bool) -> Result<Volume> {
        let counts: Vec<usize> = (0..tree.folders.len()).map(|n| entries::count(&tree.folders[n], n == 0)).collect();
        if let Some(many) = counts.iter().find(|&&count| count > MOST_ENTRIES) {
            return Err(Error::invalid(format!(
                "a directory of the tree takes {many} entries, long names several each; a FAT directory has at most {MOST_ENTRIES}"
            )));
        }
        let root_entries = counts[0];
        let needed = |volume: &Volume| {
            let bytes = u64::from(volume.cluster_bytes());
            let skipped = usize::from(volume.kind != Kind::Fat32);
            let folders: u64 =
                counts[skipped..].iter().map(|&count| (count * ENTRY) as u64).map(|n| n.div_ceil(bytes)).sum();
            folders + tree.files.iter().map(|file| u64::from(file.len).div_ceil(bytes)).sum::<u64>()
        };
        let mut largest = None;
        for kind in kinds(kind, floppy)? {
            let roomy = root_entries + if root_entries > ROOT_ENTRIES { root_entries / 4 } else { 0 };
            if kind != Kind::Fat32 && root_entries > MOST_ROOT_ENTRIES {
                largest.get_or_insert(format!(
                    "{root_entries} entries in the root directory, of at most {MOST_ROOT_ENTRIES}"
                ));
                continue;
            }
            for (disk, per_cluster) in
                sizes(kind, floppy, |per_cluster| needed(&Volume::new(Kind::Fat32, u32::MAX, per_cluster, 0, false)))
            {
                let usual = if floppy { if disk == 2880 { 224 } else { 240 } } else { ROOT_ENTRIES };
                let root = roomy.clamp(usual, MOST_ROOT_ENTRIES).next_multiple_of(16);
                let volume = Volume::new(kind, disk, per_cluster, root, floppy);
                let needed = needed(&volume);
                if volume.is_of_its_kind() && needed <= volume.clusters.into() {
                    return Ok(volume);
                }
                let bytes = |clusters: u64| clusters * u64::from(volume.cluster_bytes());
                largest = Some(format!(
                    "files and directories take {} bytes, and FAT{} on {} has room for {}",
                    bytes(needed),
                    kind.bits(),
                    if floppy { "a floppy disk" } else { "a hard disk" },
                    bytes(volume.clusters.into())
                ));
            }
        }
        Err(Error::invalid(format!("the tree does not fit: {}", largest.unwrap_or_default())))
    }

    /// The first sector of a hard disk: one partition.
    pub(super) fn partition_table(&self) -> [u8; SECTOR as usize] {
        let mut sector = [0; SECTOR as usize];
        sector[440..444].copy_from_slice(&SIGNATURE.to_le_bytes());
        let kind = match self.kind {
            Kind::Fat12 => 0x01,
            Kind::Fat16 => 0x0e,
            Kind::Fat32 => 0x0c,
        };
        let (first, last) = (self.place(self.start), self.place(self.disk - 1));
        sector[446..454].copy_from_slice(&[0x80, first[0], first[1], first[2], kind, last[0], last[1], last[2]]);
        sector[454..458].copy_from_slice(&self.start.to_le_bytes());
        sector[458..462].copy_from_slice(&(self.disk - self.start).to_le_bytes());
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        sector
    }

    /// A sector by head, sector and cylinder, or the last that can be said.
    fn place(&self, sector: u32) -> [u8; 3] {
        let (heads, per_track) = (u32::from(self.heads), u32::from(self.per_track));
        let (cylinder, head, sector) =
            (sector / (heads * per_track), sector / per_track % heads, sector % per_track + 1);
        if cylinder > 1023 {
            return [0xfe, 0xff, 0xff];
        }
        let low = |number: u32| u8::try_from(number & 0xff).unwrap_or(0);
        [low(head), low(sector) | low(cylinder >> 2) & 0xc0, low(cylinder)]
    }

    /// The file system's first sector.
    pub(super) fn boot_sector(&self, label: &Short) -> [u8; SECTOR as usize] {
        let mut sector = [0; SECTOR as usize];
        let large = self.kind == Kind::Fat32;
        let sectors = self.disk - self.start;
        let mut put = |at: usize, bytes: &[u8]| sector[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[0xeb, if large { 0x58 } else { 0x3c }, 0x90]);
        put(3, b"MSWIN4.1");
        put(11, &[0, 2]);
        // All of these are small: 64 sectors in a cluster at most, and 256 or fewer before the first table.
        put(13, &[u8::try_from(self.per_cluster).unwrap_or(0)]);
        put(14, &u16::try_from(self.reserved).unwrap_or(0).to_le_bytes());
        put(16, &[2]);
        put(17, &u16::try_from(self.root * SECTOR / 32).unwrap_or(0).to_le_bytes());
        match u16::try_from(sectors) {
            Ok(sectors) if !large => put(19, &sectors.to_le_bytes()),
            _ => put(32, &sectors.to_le_bytes()),
        }
        put(21, &[self.media]);
        put(24, &self.per_track.to_le_bytes());
        put(26, &self.heads.to_le_bytes());
        put(28, &self.start.to_le_bytes());
        let name: &[u8; 8] = match self.kind {
            Kind::Fat12 => b"FAT12   ",
            Kind::Fat16 => b"FAT16   ",
            Kind::Fat32 => b"FAT32   ",
        };
        let at = if large {
            put(36, &self.table.to_le_bytes());
            // The root's cluster, the sector of free counts, the copy of this one.
            put(44, &2u32.to_le_bytes());
            put(48, &[1, 0, 6, 0]);
            64
        } else {
            put(22, &u16::try_from(self.table).unwrap_or(0).to_le_bytes());
            36
        };
        put(at, &[if self.start == 0 { 0 } else { 0x80 }, 0, 0x29]);
        put(at + 3, &SERIAL.to_le_bytes());
        put(at + 7, label);
        put(at + 18, name);
        // Nothing to boot: on to the next device (INT 18h).
        put(at + 26, &[0xcd, 0x18, 0xf4, 0xeb, 0xfd]);
        put(510, &[0x55, 0xaa]);
        sector
    }

    /// FAT32's sector that says how many clusters are free, of which `used` are not.
    pub(super) fn free_counts(&self, used: u32) -> [u8; SECTOR as usize] {
        let mut sector = [0; SECTOR as usize];
        sector[..4].copy_from_slice(b"RRaA");
        sector[484..488].copy_from_slice(b"rrAa");
        sector[488..492].copy_from_slice(&(self.clusters - used).to_le_bytes());
        sector[492..496].copy_from_slice(&(used + 2).min(self.clusters + 1).to_le_bytes());
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        sector
    }

    /// What the entries 0 and 1 of the table are.
    pub(super) fn first_entries(&self) -> [u32; 2] {
        [0x0fff_ff00 | u32::from(self.media), 0x0fff_ffff]
    }
}

/// The kinds to try.
fn kinds(asked: Option<Kind>, floppy: bool) -> Result<Vec<Kind>> {
    match (asked, floppy) {
        (Some(Kind::Fat32), true) => Err(Error::invalid(
            "'fat-type' 32 is for hard disks: a FAT32 has at least 65525 clusters, and no floppy disk has as many sectors",
        )),
        (Some(kind), _) => Ok(vec![kind]),
        (None, true) => Ok(vec![Kind::Fat12]),
        (None, false) => Ok(vec![Kind::Fat16, Kind::Fat32]),
    }
}

/// Disks of a kind, the smallest first: sectors, and sectors of a cluster. `needed` tells how many clusters of a size are used.
fn sizes(kind: Kind, floppy: bool, needed: impl Fn(u32) -> u64) -> Vec<(u32, u32)> {
    match (kind, floppy) {
        (Kind::Fat12, true) => vec![(2880, 1), (5760, 2)],
        (_, true) => vec![(5760, 1)],
        (Kind::Fat12, _) => vec![(64_512, 16), (129_024, 32), (258_048, 64)],
        (Kind::Fat16, _) => vec![(USUAL, 16), (2 * USUAL, 32), (4 * USUAL, 64)],
        (Kind::Fat32, _) => {
            // A quarter more than what is there, 8 bytes of tables to each cluster, and the partition's start.
            let disk = |per_cluster: u32| {
                let clusters = needed(per_cluster).saturating_mul(5) / 4;
                let sectors = clusters.saturating_mul(u64::from(per_cluster)).saturating_add(clusters / 64);
                let sectors = (sectors + 64 + u64::from(PARTITION)).next_multiple_of(PARTITION.into());
                u32::try_from(sectors).unwrap_or(u32::MAX - PARTITION + 1).max(USUAL)
            };
            // What a cluster of 4, 8 and 16 KiB is used for, in sectors.
            let most = [(8, 16 << 20), (16, 32 << 20), (32, 64 << 20), (64, u32::MAX)];
            most.into_iter()
                .filter(|&(per_cluster, most)| disk(per_cluster) <= most)
                .map(|(n, _)| (disk(n), n))
                .collect()
        }
    }
}
