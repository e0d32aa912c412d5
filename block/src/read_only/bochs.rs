// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver `bochs`: a growing redolog of the Bochs emulator.
//!
//! ```text
//!  0 "Bochs Virtual HD Image"   32 "Redolog"   48 "Growing"   64 u32 version 1.0 or 2.0   68 u32 header size
//! 72 u32 entries of the catalog   76 u32 bytes of a bitmap   80 u32 bytes of an extent   84 (1.0) or 88 (2.0) u64 disk size
//! ```
//!
//! The catalog has the number of each extent, all ones for none. An extent is a bitmap of its sectors and then its data, both
//! rounded up to sectors. All little-endian.

use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use super::{FILE, Lookup, ReadOnly, Run, Stored, entry, field, header, u32_le, u64_le};
use crate::driver::{Driver, Info};
use crate::drivers::{DriverEntry, OpenRequest};
use crate::{BlockNode, Error, Result, Wait};

pub(crate) const ENTRY: DriverEntry =
    entry("bochs", "a growing redolog of Bochs, read only", &[FILE], is_growing, open);

const SECTOR: u64 = 512;
const NONE: u32 = 0xffff_ffff;
/// QEMU's limits.
const MAX_ENTRIES: u64 = 0x10_0000;
const MAX_EXTENT: u64 = 0x80_0000;

fn is_growing(start: &[u8; 512]) -> bool {
    let says = |at: usize, text: &[u8]| start[at..].starts_with(text) && start[at + text.len()] == 0;
    says(0, b"Bochs Virtual HD Image") && says(32, b"Redolog") && says(48, b"Growing")
}

struct Bochs {
    file: Arc<BlockNode>,
    catalog: u64,
    data: u64,
    extent: u64,
    /// Bytes of the bitmap in front of an extent, in whole sectors.
    bitmap: u64,
}

fn open(request: OpenRequest) -> Result<Box<dyn Driver>> {
    let file = request.child("file")?;
    let bytes = header::<512>(&file, "Bochs")?;
    let version = u32_le(&bytes, 64);
    if !is_growing(&bytes) || !matches!(version, 0x0001_0000 | 0x0002_0000) {
        return Err(Error::corrupt("Image not in Bochs format"));
    }
    let [catalog, entries, bitmap, extent] = [68, 72, 76, 80].map(|at| u64::from(u32_le(&bytes, at)));
    let size = u64_le(&bytes, if version == 0x0001_0000 { 84 } else { 88 });
    if entries > MAX_ENTRIES {
        return Err(Error::unsupported("Catalog size is too large"));
    }
    if !extent.is_power_of_two() || !(SECTOR..=MAX_EXTENT).contains(&extent) {
        return Err(Error::corrupt(format!("Extent size {extent} is not a power of two from 512 to {MAX_EXTENT}")));
    }
    let size = size / SECTOR * SECTOR;
    if entries < size.div_ceil(extent) {
        return Err(Error::corrupt("Catalog size is too small for this disk size"));
    }
    if bitmap < (extent / SECTOR).div_ceil(8) || bitmap > MAX_EXTENT {
        return Err(Error::corrupt(format!("a bitmap of {bitmap} bytes is not that of an extent of {extent}")));
    }
    let data = catalog + entries * 4;
    if catalog < 512 || data > file.len() {
        return Err(Error::corrupt(format!("the catalog at {catalog} is not in the file")));
    }
    let bitmap = bitmap.next_multiple_of(SECTOR);
    let info = Info { cluster_size: Some(extent), ..Info::default() };
    ReadOnly::open(&request, Bochs { file, catalog, data, extent, bitmap }, size, 1, info)
}

impl Lookup for Bochs {
    fn find(&self, offset: u64, wait: Wait) -> io::Result<Run> {
        let number = offset / self.extent;
        let start = number * self.extent;
        let place = u32::from_le_bytes(field(&self.file, self.catalog + number * 4, wait)?);
        if place == NONE {
            return Ok(Run { start, len: self.extent, stored: Stored::Zero });
        }
        let place = u64::from(place).checked_mul(self.bitmap + self.extent).and_then(|at| at.checked_add(self.data));
        let place = place.ok_or(Errno::IO)?;
        // Eight sectors at once: their bits are one byte. From this one on as many as have the same.
        let sector = (offset - start) / SECTOR;
        let [bits] = field::<1>(&self.file, place + sector / 8, wait)?;
        let bits = bits >> (sector % 8);
        let there = bits & 1 == 1;
        let alike = if there { bits.trailing_ones() } else { bits.trailing_zeros() };
        let len = u64::from(alike).min(8 - sector % 8).min(self.extent / SECTOR - sector) * SECTOR;
        let at = place + self.bitmap + sector * SECTOR;
        Ok(Run { start: start + sector * SECTOR, len, stored: if there { Stored::At(at) } else { Stored::Zero } })
    }
}
