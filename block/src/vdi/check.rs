// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Checking a VDI image: the map, and the count of allocated blocks, behind which the next writer puts new ones.

use std::sync::Arc;

use super::{BLOCK, Header};
use crate::block_check;
use crate::blocks::Layout;
use crate::formats::{CheckReport, Repair, Say};
use crate::{BlockNode, Error, Result};

/// See [`crate::check`].
pub fn check(file: &Arc<BlockNode>, repair: Repair, say: Say<'_>) -> Result<CheckReport> {
    let header = Header::read(file)?;
    let counted = u64::from(header.allocated.min(header.blocks));
    let data = header.data_offset;
    // The file's last block may be cut off where it holds zeroes.
    let end = data + file.len().saturating_sub(data).div_ceil(BLOCK) * BLOCK;
    let blocks = header.open(file, None, (end - data) / BLOCK);
    blocks.set_end(data + counted * BLOCK);
    let mut most = 0;
    let is_there = |place: u64| place.checked_sub(data).map(|at| at / BLOCK + 1).filter(|_| place + BLOCK <= end);
    for block in 0..u64::from(header.blocks) {
        if let Ok(crate::blocks::Place::At(place)) = blocks.place(block, crate::Wait::Allowed) {
            most = most.max(is_there(place).unwrap_or(0));
        }
    }
    blocks.set_end(data + counted.max(most) * BLOCK);
    let mut report = block_check::check(&blocks, data, end, repair, say)?;
    if counted < most || header.allocated > header.blocks {
        say(&format!(
            "ERROR: {} blocks are counted as allocated, and block {most} is: the next writer may put a new one over it",
            header.allocated
        ));
        if repair == Repair::All {
            blocks.layout.publish(blocks.end()).map_err(|e| Error::io("repair the image", e))?;
            file.flush().map_err(|e| Error::io("repair the image", e))?;
            report.corruptions_fixed += 1;
        } else {
            report.corruptions += 1;
        }
    }
    Ok(report)
}
