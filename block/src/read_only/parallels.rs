// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver `parallels`: Parallels' expanding disk.
//!
//! ```text
//!  0 magic, 16 bytes            28 u32 sectors of a cluster        36 u64 sectors of the disk
//! 16 u32 version 2              32 u32 entries of the table        44 u32 in use: 0x746f6e59       (little-endian)
//! 64 the table: a u32 for each cluster, 0 for none
//! ```
//!
//! An entry counts sectors in images with the older magic, and clusters in the others; the older disks have 2^32 sectors at most.

use std::io;
use std::sync::Arc;

use super::{FILE, Lookup, ReadOnly, Run, Stored, entry, field, header, u32_le, u64_le};
use crate::driver::{Driver, Info};
use crate::drivers::{DriverEntry, OpenRequest};
use crate::{BlockNode, Error, Result, Wait};

pub(crate) const ENTRY: DriverEntry =
    entry("parallels", "Parallels' expanding disk, read only", &[FILE], |start| kind(start).is_some(), open);

const SECTOR: u64 = 512;
const TABLE: u64 = 64;
const IN_USE: u32 = 0x746f_6e59;
/// QEMU's limit: a cluster in bytes is an `int`.
const MAX_SECTORS: u32 = i32::MAX.cast_unsigned() / 513;

/// Whether entries count clusters; `None` for another format.
fn kind(start: &[u8]) -> Option<bool> {
    match start.get(..16)? {
        b"WithoutFreeSpace" => Some(false),
        b"WithouFreSpacExt" => Some(true),
        _ => None,
    }
}

struct Parallels {
    file: Arc<BlockNode>,
    cluster: u64,
    entries: u64,
    /// Bytes that an entry counts.
    unit: u64,
}

fn open(request: OpenRequest) -> Result<Box<dyn Driver>> {
    let file = request.child("file")?;
    let bytes = header::<64>(&file, "parallels")?;
    let (Some(in_clusters), 2) = (kind(&bytes), u32_le(&bytes, 16)) else {
        return Err(Error::corrupt("Image not in Parallels format"));
    };
    let (sectors, entries) = (u32_le(&bytes, 28), u64::from(u32_le(&bytes, 32)));
    if sectors == 0 || sectors > MAX_SECTORS {
        return Err(Error::corrupt(format!(
            "Invalid image: a cluster of {sectors} sectors, 1 to {MAX_SECTORS} can be"
        )));
    }
    let cluster = u64::from(sectors) * SECTOR;
    let total = if in_clusters { u64_le(&bytes, 36) } else { u64_le(&bytes, 36) & 0xffff_ffff };
    let size = total.checked_mul(SECTOR).filter(|size| size.div_ceil(cluster) <= entries);
    let Some(size) = size else {
        return Err(Error::corrupt(format!("the disk has {total} sectors, the table {entries} entries of {sectors}")));
    };
    if TABLE + entries * 4 > file.len() {
        return Err(Error::corrupt(format!("the table ends at {}, the file at {}", TABLE + entries * 4, file.len())));
    }
    let info = Info { cluster_size: Some(cluster), dirty: u32_le(&bytes, 44) == IN_USE, ..Info::default() };
    let unit = if in_clusters { cluster } else { SECTOR };
    ReadOnly::open(&request, Parallels { file, cluster, entries, unit }, size, 1, info)
}

impl Lookup for Parallels {
    fn find(&self, offset: u64, wait: Wait) -> io::Result<Run> {
        let number = (offset / self.cluster).min(self.entries.saturating_sub(1));
        let entry = u32::from_le_bytes(field(&self.file, TABLE + number * 4, wait)?);
        let stored = match entry {
            0 => Stored::Zero,
            entry => Stored::At(u64::from(entry) * self.unit),
        };
        Ok(Run { start: number * self.cluster, len: self.cluster, stored })
    }
}
