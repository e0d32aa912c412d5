// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver `qcow`: QEMU's first copy-on-write format, version 1.
//!
//! ```text
//!  0 "QFI\xfb"   4 u32 version 1   8 u64 offset, 16 u32 length of the backing file's name   20 u32 its time   24 u64 disk size
//! 32 u8 cluster bits, u8 L2 bits   36 u32 encryption   40 u64 offset of the L1 table                         (big-endian)
//! ```
//!
//! Entries of the second level with the top bit set are compressed: below it stand `cluster bits` bits of length and the rest is
//! the offset. The stream is raw deflate.

use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use super::{BACKING, FILE, Lookup, ReadOnly, Run, Stored, backing_name, entry, field, header, u32_be, u64_be};
use crate::driver::{Driver, Info};
use crate::drivers::{DriverEntry, OpenRequest};
use crate::qcow2::header::Compression;
use crate::qcow2::inflate::Inflater;
use crate::{BlockNode, Error, Result, Wait};

pub(crate) const ENTRY: DriverEntry = entry(
    "qcow",
    "QEMU's first copy-on-write format, read only",
    &[FILE, BACKING],
    |start| start.starts_with(MAGIC),
    open,
);

/// With the version: later ones are qcow2.
const MAGIC: &[u8] = b"QFI\xfb\0\0\0\x01";
const COMPRESSED: u64 = 1 << 63;

struct Qcow {
    file: Arc<BlockNode>,
    cluster_bits: u32,
    l2_bits: u32,
    l1_offset: u64,
}

fn open(request: OpenRequest) -> Result<Box<dyn Driver>> {
    let file = request.child("file")?;
    let bytes = header::<48>(&file, "qcow")?;
    if !bytes.starts_with(MAGIC) {
        return Err(Error::corrupt("Image not in qcow format"));
    }
    let (size, cluster_bits, l2_bits) = (u64_be(&bytes, 24), u32::from(bytes[32]), u32::from(bytes[33]));
    let (encryption, l1_offset) = (u32_be(&bytes, 36), u64_be(&bytes, 40));
    if size <= 1 {
        return Err(Error::corrupt("Image size is too small (must be at least 2 bytes)"));
    }
    if !(9..=16).contains(&cluster_bits) {
        return Err(Error::corrupt("Cluster size must be between 512 and 64k"));
    }
    // A table of the second level has 512 bytes to 64 KiB.
    if !(6..=13).contains(&l2_bits) {
        return Err(Error::corrupt("L2 table size must be between 512 and 64k"));
    }
    if encryption != 0 {
        return Err(Error::unsupported(
            "this qcow image is encrypted with AES, which keeps no secret: convert it with the program that made it",
        ));
    }
    let entries = size.div_ceil(1 << (cluster_bits + l2_bits));
    if size > i64::MAX as u64 || entries > u64::from(u32::MAX) / 8 {
        return Err(Error::corrupt("Image too large"));
    }
    if l1_offset.saturating_add(entries * 8) > file.len() {
        return Err(Error::corrupt(format!("the L1 table at {l1_offset} is not in the file")));
    }
    let info = Info {
        cluster_size: Some(1 << cluster_bits),
        backing_name: backing_name(&file, u64_be(&bytes, 8), u32_be(&bytes, 16))?,
        ..Info::default()
    };
    let qcow = Qcow { file, cluster_bits, l2_bits, l1_offset };
    ReadOnly::open(&request, qcow, size, 1 << cluster_bits, info)
}

impl Lookup for Qcow {
    fn find(&self, offset: u64, wait: Wait) -> io::Result<Run> {
        let entry = |table: u64, index: u64| {
            let at = table.checked_add(index * 8).ok_or(Errno::IO)?;
            field(&self.file, at, wait).map(u64::from_be_bytes)
        };
        let (cluster, per_table) = (1u64 << self.cluster_bits, self.cluster_bits + self.l2_bits);
        let table = entry(self.l1_offset, offset >> per_table)?;
        if table == 0 {
            let len = 1u64 << per_table;
            return Ok(Run { start: offset & !(len - 1), len, stored: Stored::Absent });
        }
        let stored = match entry(table, offset >> self.cluster_bits & ((1 << self.l2_bits) - 1))? {
            0 => Stored::Absent,
            packed if packed & COMPRESSED != 0 => Stored::Packed(packed),
            place => Stored::At(place),
        };
        Ok(Run { start: offset & !(cluster - 1), len: cluster, stored })
    }

    fn unpack(&self, run: &Run) -> io::Result<Vec<u8>> {
        let Stored::Packed(entry) = run.stored else { return Err(Errno::IO.into()) };
        let cluster = 1u64 << self.cluster_bits;
        let len = entry >> (63 - self.cluster_bits) & (cluster - 1);
        let at = entry & ((1 << (63 - self.cluster_bits)) - 1);
        let mut content = vec![0; usize::try_from(cluster).unwrap_or(0)];
        Inflater::default().inflate(&self.file, at, len, Compression::Zlib, &mut content)?;
        Ok(content)
    }
}
