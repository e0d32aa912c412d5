// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver `qed`: QEMU's enhanced disk (docs/interop/qed_spec.rst of QEMU).
//!
//! ```text
//!  0 "QED\0"                    12 u32 clusters of the header     40 u64 offset of the L1 table
//!  4 u32 cluster size           16 u64 features                   48 u64 disk size
//!  8 u32 clusters of a table    24 u64 compatible features        56 u32 offset, 60 u32 length of the backing file's name
//! ```
//!
//! Both levels of tables have u64 entries, 0 for none; 1 in the second level stands for zeroes. All little-endian.

use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use super::{BACKING, FILE, Lookup, ReadOnly, Run, Stored, backing_name, entry, field, header, u32_le, u64_le};
use crate::driver::{Driver, Info};
use crate::drivers::{DriverEntry, OpenRequest};
use crate::{BlockNode, Error, Result, Wait};

pub(crate) const ENTRY: DriverEntry =
    entry("qed", "QEMU's enhanced disk, read only", &[FILE, BACKING], |start| start.starts_with(MAGIC), open);

const MAGIC: &[u8] = b"QED\0";
/// Features.
const HAS_BACKING: u64 = 1;
const NEED_CHECK: u64 = 2;
const BACKING_IS_RAW: u64 = 4;

struct Qed {
    file: Arc<BlockNode>,
    cluster: u64,
    /// Entries of a table.
    entries: u64,
    l1_offset: u64,
}

fn open(request: OpenRequest) -> Result<Box<dyn Driver>> {
    let file = request.child("file")?;
    let bytes = header::<64>(&file, "QED")?;
    if !bytes.starts_with(MAGIC) {
        return Err(Error::corrupt("Image not in QED format"));
    }
    let (cluster, table) = (u64::from(u32_le(&bytes, 4)), u64::from(u32_le(&bytes, 8)));
    let (features, l1_offset, size) = (u64_le(&bytes, 16), u64_le(&bytes, 40), u64_le(&bytes, 48));
    let refused = |text: String| Err(Error::corrupt(format!("Invalid QED image: {text}")));
    if features & !(HAS_BACKING | NEED_CHECK | BACKING_IS_RAW) != 0 {
        return Err(Error::unsupported(format!("Unsupported QED features: {:x}", features & !7)));
    }
    if !cluster.is_power_of_two() || !(4 << 10..=64 << 20).contains(&cluster) {
        return refused(format!("its cluster size is {cluster}, not a power of two from 4 KiB to 64 MiB"));
    }
    if !table.is_power_of_two() || table > 16 {
        return refused(format!("its tables have {table} clusters, not 1, 2, 4, 8 or 16"));
    }
    let entries = table * cluster / 8;
    // The last multiplication is the disk that the tables can name.
    let most = entries.checked_mul(entries).and_then(|clusters| clusters.checked_mul(cluster)).unwrap_or(u64::MAX);
    if !size.is_multiple_of(512) || size > most {
        return refused(format!("its size is {size}, not a multiple of 512 up to {most}"));
    }
    if l1_offset == 0 || !l1_offset.is_multiple_of(cluster) || l1_offset.saturating_add(table * cluster) > file.len() {
        return refused(format!("its L1 table at {l1_offset} is not in the file"));
    }
    let has_backing = features & HAS_BACKING != 0;
    let name = if has_backing { backing_name(&file, u32_le(&bytes, 56).into(), u32_le(&bytes, 60))? } else { None };
    let is_raw = has_backing && features & BACKING_IS_RAW != 0;
    let info = Info {
        dirty: features & NEED_CHECK != 0,
        cluster_size: Some(cluster),
        backing_name: name,
        backing_format: is_raw.then(|| "raw".to_owned()),
        ..Info::default()
    };
    ReadOnly::open(&request, Qed { file, cluster, entries, l1_offset }, size, 1, info)
}

impl Lookup for Qed {
    fn find(&self, offset: u64, wait: Wait) -> io::Result<Run> {
        let number = offset / self.cluster;
        let entry = |table: u64, index: u64| {
            let at = table.checked_add(index * 8).ok_or(Errno::IO)?;
            field(&self.file, at, wait).map(u64::from_le_bytes)
        };
        let table = entry(self.l1_offset, number / self.entries)?;
        if table == 0 {
            let len = self.entries * self.cluster;
            return Ok(Run { start: number / self.entries * len, len, stored: Stored::Absent });
        }
        if !table.is_multiple_of(self.cluster) {
            return Err(Errno::IO.into());
        }
        let stored = match entry(table, number % self.entries)? {
            0 => Stored::Absent,
            1 => Stored::Zero,
            place if place.is_multiple_of(self.cluster) && place < self.file.len() => Stored::At(place),
            _ => return Err(Errno::IO.into()),
        };
        Ok(Run { start: number * self.cluster, len: self.cluster, stored })
    }
}
