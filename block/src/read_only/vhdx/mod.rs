// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver `vhdx`: Hyper-V's second format ([MS-VHDX]), without a parent. What stands in its log is applied in memory, so an
//! image that was not closed is read as it was to be.
//!
//! ```text
//! 0 "vhdxfile"   64 KiB, 128 KiB two headers   192 KiB, 256 KiB two tables of regions        (little-endian)
//! regions: the block table, a u64 for each block: state in bits 0 to 2, MiB offset from bit 20;
//!          the metadata, a table of items by GUID
//! ```
//!
//! After as many blocks as a sector bitmap of 1 MiB covers, the block table has an entry for that bitmap.

mod layout;
mod log;

use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use self::layout::{Layout, MIB};
use self::log::Replayed;
use super::{FILE, Lookup, ReadOnly, Run, Stored, entry};
use crate::driver::{Driver, Info};
use crate::drivers::{DriverEntry, OpenRequest};
use crate::{Error, Result, Wait};

pub(crate) const ENTRY: DriverEntry =
    entry("vhdx", "Hyper-V's second format, read only", &[FILE], |start| start.starts_with(b"vhdxfile"), open);

/// States of a block ([MS-VHDX] 2.5.1.1).
const FULLY_PRESENT: u64 = 6;
const PARTIALLY_PRESENT: u64 = 7;

struct Vhdx {
    file: Replayed,
    layout: Layout,
}

fn open(request: OpenRequest) -> Result<Box<dyn Driver>> {
    let file = request.child("file")?;
    let header = layout::Header::read(&file)?;
    let file = Replayed::open(Arc::clone(&file), &header)?;
    let layout = Layout::read(&file)?;
    if let Some(at) = file.writes_outside(&layout) {
        return Err(Error::unsupported(format!(
            "the log of this VHDX changes bytes at {at}, which are no metadata: have it replayed by 'qemu-img check -r all'"
        )));
    }
    let info = Info { dirty: file.is_dirty(), cluster_size: Some(layout.block), ..Info::default() };
    let size = layout.size;
    ReadOnly::open(&request, Vhdx { file, layout }, size, 1, info)
}

impl Lookup for Vhdx {
    fn find(&self, offset: u64, wait: Wait) -> io::Result<Run> {
        let Layout { block, per_bitmap, .. } = self.layout;
        let number = offset / block;
        let mut bytes = [0; 8];
        let index = number + number / per_bitmap;
        self.file.read(&mut bytes, self.layout.table.offset + index * 8, wait)?;
        let entry = u64::from_le_bytes(bytes);
        let stored = match entry & 7 {
            FULLY_PRESENT => {
                let at = entry >> 20 << 20;
                if at < MIB || at >= self.file.len() {
                    return Err(Errno::IO.into());
                }
                Stored::At(at)
            }
            PARTIALLY_PRESENT | 4 | 5 => return Err(Errno::IO.into()),
            // Not present, undefined, zero, unmapped.
            _ => Stored::Zero,
        };
        Ok(Run { start: number * block, len: block, stored })
    }
}
