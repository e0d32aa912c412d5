// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Checking a VHD: the block allocation table, and the footer that should stand at the end.

use std::sync::Arc;

use super::{FIXED, FOOTER, Footer, Header, Survey};
use crate::block_check;
use crate::blocks::{Layout, Place};
use crate::formats::{CheckReport, Repair, Say};
use crate::{BlockNode, Error, Result, Wait};

/// See [`crate::check`].
pub fn check(file: &Arc<BlockNode>, repair: Repair, say: Say<'_>) -> Result<CheckReport> {
    let footer = Footer::read(file, None)?;
    if footer.kind == FIXED {
        let there = file.len() - FOOTER;
        let mut report = CheckReport { image_end_offset: file.len(), ..CheckReport::default() };
        if footer.size > there {
            say(&format!("ERROR: the VHD has {} bytes for a guest, its file holds {there}", footer.size));
            report.corruptions = 1;
        }
        return Ok(report);
    }
    let header = Header::read(file, &footer)?;
    let step = header.bitmap + header.block_size;
    let failed = |e| Error::io("read the VHD", e);
    let mut last = [0; 512];
    let last_at = file.len().saturating_sub(FOOTER);
    file.read_or_zero(&mut last, last_at, Wait::Allowed).map_err(failed)?;
    let is_whole = last[..] == footer.bytes[..];
    // Blocks end where the footer begins, or, where there is none, with the file.
    let limit = if is_whole { last_at } else { file.len() };
    let blocks = header.open(file, &footer, None, &Survey { first: None, end: header.reserved });
    let mut end = header.reserved;
    for block in 0..blocks.size().div_ceil(header.block_size) {
        if let Place::At(place) = blocks.place(block, Wait::Allowed).map_err(failed)? {
            end = end.max(place.checked_add(step).filter(|&stop| stop <= limit).unwrap_or(0));
        }
    }
    blocks.set_end(end);
    let mut report = block_check::check(&blocks, header.reserved, limit, repair, say)?;
    if !is_whole {
        say("the VHD has no footer at its end that says the same as the copy at its start");
        if repair == Repair::Nothing {
            report.leaks += 1;
        } else {
            let mended = blocks.layout.publish(blocks.end()).and_then(|()| file.flush());
            mended.map_err(|e| Error::io("repair the VHD", e))?;
            let len = blocks.layout.file_len(blocks.end());
            if file.len() > len {
                file.resize(len, crate::Preallocation::Off)?;
            }
            report.leaks_fixed += 1;
        }
    }
    Ok(report)
}
