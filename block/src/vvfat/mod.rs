// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver `vvfat`: a directory as a FAT disk, for reading.
//!
//! The directory is a set of descriptors, each with its path for opaque text. Tables and directories are made up once, when the
//! node is opened; the content of a file is read from its descriptor, whose length stays what it was then: what was cut off
//! since reads as zeroes, and what was added is not there. Every chain is one run of clusters, so the table is worked out as it
//! is read. The same files, names and times always give the same disk.
//!
//! A guest writes to a layer above; this one never changes. [`Vvfat::changes`] tells what a guest has made of it there.

mod changes;
mod entries;
mod guest;
mod names;
mod tree;
mod volume;

use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::driver::{Ask, Detail, Driver, Info, Mapping, Prepared, Target, ZeroFlags};
use crate::drivers::{DriverEntry, OpenRequest, OptionKind, OptionSpec, OptionValue};
use crate::{Error, Result};
pub use changes::{Change, ChangeKind, Changes};
use names::Short;
use tree::{Child, Tree};
use volume::{Kind, SECTOR, Volume};

/// QEMU's volume label.
const LABEL: &str = "QEMU VVFAT";

pub(crate) const ENTRY: DriverEntry = DriverEntry {
    name: "vvfat",
    summary: "a directory as a FAT disk, read-only: the descriptors of a set, with their paths as opaque text",
    children: &[],
    options: &[
        OptionSpec {
            name: "dir",
            kind: OptionKind::Directory,
            summary: "`/dev/fdset/ID`: a set of read-only descriptors of regular files, each with its path in the tree as opaque \
                      text, `docs/readme.txt`. A path that ends in `/` stands for a directory that may be empty, `/` for the \
                      root; the descriptor with it is not read.",
        },
        OptionSpec {
            name: "fat-type",
            kind: OptionKind::Size,
            summary: "12, 16 or 32; default 16, or 32 if more room is needed; 12 for floppy disks.",
        },
        OptionSpec {
            name: "floppy",
            kind: OptionKind::Bool,
            summary: "A floppy disk of 1.44 or 2.88 MB; default a hard disk.",
        },
        OptionSpec {
            name: "label",
            kind: OptionKind::Str,
            summary: "The volume label, at most 11 characters; default `QEMU VVFAT`.",
        },
        OptionSpec { name: "rw", kind: OptionKind::Bool, summary: "Not supported here: must be false." },
    ],
    takes_descriptor: false,
    writes: false,
    probe: |_| false,
    open,
};

/// A directory as a disk.
pub struct Vvfat {
    tree: Tree,
    volume: Volume,
    /// First clusters of the files, 0 for those that are empty.
    starts: Vec<u32>,
    len: u64,
    table: Table,
    /// In order; what is between them is zeroes.
    segments: Vec<Segment>,
}

/// Bytes of the disk that are not all zeroes.
struct Segment {
    start: u64,
    len: u64,
    stored: Stored,
}

enum Stored {
    Bytes(Box<[u8]>),
    /// The file of this number, from its first byte.
    File(usize),
    /// A copy of the table.
    Table,
}

fn open(request: OpenRequest) -> Result<Box<dyn Driver>> {
    if request.options.get("rw") == Some(&OptionValue::Bool(true)) || request.writable {
        return Err(Error::unsupported(
            "a vvfat node is only read: open it with read-only=on, and put an overlay over it for what a guest writes",
        ));
    }
    let kind = match request.size("fat-type") {
        None => None,
        Some(12) => Some(Kind::Fat12),
        Some(16) => Some(Kind::Fat16),
        Some(32) => Some(Kind::Fat32),
        Some(_) => return Err(Error::invalid("Valid FAT types are only 12, 16 and 32")),
    };
    let label = match request.options.get("label") {
        Some(OptionValue::Str(text)) => label(text)?,
        _ => label(LABEL)?,
    };
    let floppy = request.options.get("floppy") == Some(&OptionValue::Bool(true));
    let tree = Tree::new(request.files)?;
    let volume = Volume::for_tree(&tree, kind, floppy)?;
    Ok(Box::new(Vvfat::new(tree, volume, &label)))
}

/// A volume label, in capitals and padded.
fn label(text: &str) -> Result<Short> {
    let fits = |byte: u8| (b' '..0x7f).contains(&byte) && !b"\"*+,./:;<=>?[\\]|".contains(&byte);
    if text.trim().is_empty() || text.len() > 11 || text.starts_with(' ') || !text.bytes().all(fits) {
        return Err(Error::invalid(format!(
            "'{}' is no volume label: those have 1 to 11 ASCII characters, without \" * + , . / : ; < = > ? [ \\ ] |",
            tree::shown(text)
        )));
    }
    let mut label = [b' '; 11];
    label.iter_mut().zip(text.bytes()).for_each(|(to, byte)| *to = byte.to_ascii_uppercase());
    Ok(label)
}

impl Vvfat {
    fn new(tree: Tree, volume: Volume, label: &Short) -> Vvfat {
        let cluster = volume.cluster_bytes();
        let clusters = |bytes: u64| u32::try_from(bytes.div_ceil(cluster.into())).unwrap_or(u32::MAX);
        let large = volume.kind == Kind::Fat32;
        let mut table = Table { kind: volume.kind, first: volume.first_entries(), ends: Vec::new() };
        let folder_len = |number: usize| (entries::count(&tree.folders[number], number == 0) * entries::ENTRY) as u64;
        let folders: Vec<u32> = (0..tree.folders.len())
            .map(|number| if number > 0 || large { table.add(clusters(folder_len(number))) } else { 0 })
            .collect();
        let files: Vec<u32> = tree.files.iter().map(|file| table.add(clusters(file.len.into()))).collect();
        let place = |child| match child {
            Child::Folder(number) => folders[number],
            Child::File(number) => files[number],
        };
        let sector = |number: u32| u64::from(number) * u64::from(SECTOR);
        let mut segments = Vec::new();
        let mut bytes = |start: u64, bytes: &[u8]| {
            segments.push(Segment { start, len: bytes.len() as u64, stored: Stored::Bytes(bytes.into()) });
        };
        if volume.start > 0 {
            bytes(0, &volume.partition_table());
        }
        // FAT32 has its first sectors twice.
        for copy in if large { &[0, 6][..] } else { &[0] } {
            bytes(sector(volume.start + copy), &volume.boot_sector(label));
            if large {
                bytes(sector(volume.start + copy + 1), &volume.free_counts(table.used()));
            }
        }
        for (number, &first) in folders.iter().enumerate() {
            let start = if first == 0 { sector(volume.data() - volume.root) } else { volume.cluster_at(first) };
            bytes(start, &entries::bytes(&tree, number, label, place));
        }
        for copy in [0, volume.table] {
            let start = sector(volume.start + volume.reserved + copy);
            segments.push(Segment { start, len: table.len(), stored: Stored::Table });
        }
        let content = tree.files.iter().enumerate().zip(&files).filter(|((_, file), _)| file.len > 0);
        segments.extend(content.map(|((number, file), &first)| Segment {
            start: volume.cluster_at(first),
            len: file.len.into(),
            stored: Stored::File(number),
        }));
        segments.sort_by_key(|segment| segment.start);
        let len = sector(volume.disk);
        Vvfat { tree, volume, starts: files, len, table, segments }
    }

    /// The segment that holds the byte at `offset`, or how many zeroes follow.
    fn find(&self, offset: u64) -> std::result::Result<&Segment, u64> {
        let next = self.segments.partition_point(|segment| segment.start <= offset);
        let here = next.checked_sub(1).map(|index| &self.segments[index]);
        here.filter(|segment| offset - segment.start < segment.len)
            .ok_or_else(|| self.segments.get(next).map_or(self.len, |segment| segment.start) - offset)
    }
}

impl Driver for Vvfat {
    fn len(&self) -> u64 {
        self.len
    }

    fn map(&self, offset: u64, len: u64, ask: Ask) -> io::Result<Mapping<'_>> {
        let segment = match self.find(offset) {
            Ok(segment) => segment,
            Err(zeroes) => return Ok(Mapping::fixed(Target::Zero, len.min(zeroes))),
        };
        let skip = offset - segment.start;
        let len = len.min(segment.len - skip);
        let target = match segment.stored {
            Stored::File(number) if ask.detail == Detail::Allocation => {
                return Ok(allocation(self.tree.files[number].fd.as_fd(), skip, len));
            }
            Stored::File(number) => Target::Fd { fd: self.tree.files[number].fd.as_fd(), offset: skip },
            Stored::Bytes(_) | Stored::Table => Target::Computed,
        };
        Ok(Mapping::fixed(target, len))
    }

    fn read_computed(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let segment = self.find(offset).map_err(|_| Errno::IO)?;
        let skip = offset - segment.start;
        match &segment.stored {
            Stored::Table => self.table.read(buf, skip),
            Stored::Bytes(bytes) => {
                let skip = usize::try_from(skip).map_err(|_| Errno::IO)?;
                buf.copy_from_slice(bytes.get(skip..).and_then(|bytes| bytes.get(..buf.len())).ok_or(Errno::IO)?);
            }
            Stored::File(_) => return Err(Errno::IO.into()),
        }
        Ok(())
    }

    fn prepare_write(&self, _offset: u64, _len: u64) -> io::Result<Prepared<'_>> {
        Err(Errno::ROFS.into())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _flags: ZeroFlags) -> io::Result<()> {
        Err(Errno::ROFS.into())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(Errno::ROFS.into())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn reopen(&self, writable: bool) -> Result<()> {
        if writable { Err(Error::unsupported("a vvfat node is only read")) } else { Ok(()) }
    }

    fn directory(&self) -> Option<&Vvfat> {
        Some(self)
    }

    fn info(&self) -> Info {
        Info { cluster_size: Some(self.volume.cluster_bytes().into()), ..Info::default() }
    }
}

/// What stands in a file from `offset` on: data, or a hole. A file system that cannot tell has data everywhere.
fn allocation(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Mapping<'_> {
    let data = |len| Mapping::fixed(Target::Fd { fd, offset }, len);
    match rustix::fs::seek(fd, SeekFrom::Data(offset)) {
        Ok(start) if start > offset => Mapping::fixed(Target::Zero, len.min(start - offset)),
        Ok(_) => match rustix::fs::seek(fd, SeekFrom::Hole(offset)) {
            Ok(end) if end > offset => data(len.min(end - offset)),
            _ => data(len),
        },
        Err(Errno::NXIO) => Mapping::fixed(Target::Zero, len),
        Err(_) => data(len),
    }
}

/// The file allocation table: chains that are runs, one behind the other from cluster 2 on.
struct Table {
    kind: Kind,
    /// Its first two entries.
    first: [u32; 2],
    /// The last cluster of each chain.
    ends: Vec<u32>,
}

impl Table {
    /// A chain of so many clusters: its first one, 0 if it has none.
    fn add(&mut self, clusters: u32) -> u32 {
        if clusters == 0 {
            return 0;
        }
        let first = self.ends.last().map_or(2, |end| end + 1);
        self.ends.push(first + (clusters - 1));
        first
    }

    /// How many clusters are used.
    fn used(&self) -> u32 {
        self.ends.last().map_or(0, |end| end - 1)
    }

    /// Bytes until its last entry that is not zero.
    fn len(&self) -> u64 {
        self.kind.table_bytes(u64::from(self.used()) + 2)
    }

    /// Entry `cluster`, with the bits that FAT32 has.
    fn entry(&self, cluster: u64) -> u32 {
        let Ok(cluster) = u32::try_from(cluster) else { return 0 };
        if let Some(first) = usize::try_from(cluster).ok().and_then(|index| self.first.get(index)) {
            return *first;
        }
        match self.ends.get(self.ends.partition_point(|&end| end < cluster)) {
            None => 0,
            Some(&end) if end == cluster => 0x0fff_ffff,
            Some(_) => cluster + 1,
        }
    }

    fn read(&self, buf: &mut [u8], offset: u64) {
        // Two entries of 12 bits are three bytes.
        let (entries, bytes) = match self.kind {
            Kind::Fat12 => (2, 3),
            Kind::Fat16 => (1, 2),
            Kind::Fat32 => (1, 4),
        };
        let mut skip = usize::try_from(offset % bytes).unwrap_or(0);
        let mut group = offset / bytes;
        let mut rest = buf;
        while !rest.is_empty() {
            let stored = match self.kind {
                Kind::Fat12 => {
                    let pair = self.entry(group * entries) & 0xfff | (self.entry(group * entries + 1) & 0xfff) << 12;
                    pair.to_le_bytes()
                }
                Kind::Fat16 | Kind::Fat32 => self.entry(group).to_le_bytes(),
            };
            let stored = &stored[skip..usize::try_from(bytes).unwrap_or(0)];
            let count = stored.len().min(rest.len());
            let (now, later) = rest.split_at_mut(count);
            now.copy_from_slice(&stored[..count]);
            (rest, skip, group) = (later, 0, group + 1);
        }
    }
}
