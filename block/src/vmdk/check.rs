// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Checking a sparse extent: every grain's place, the second copy of the tables, and of a stream that every grain can be
//! inflated. An extent that is a file of its own is checked by itself.

use std::sync::Arc;

use super::TEXT;
use super::header::{Header, SECTOR};
use super::sparse::Sparse;
use crate::block_check;
use crate::blocks::Place;
use crate::formats::{CheckReport, Repair, Say};
use crate::{BlockNode, Error, Result, Wait};

/// See [`crate::check`].
pub fn check(file: &Arc<BlockNode>, repair: Repair, say: Say<'_>) -> Result<CheckReport> {
    let mut start = [0; 512];
    file.read_or_zero(&mut start, 0, Wait::Allowed).map_err(|e| Error::io("read the VMDK header", e))?;
    if start.starts_with(TEXT) {
        return Err(Error::unsupported(
            "this VMDK is a descriptor: its extents are files of their own, and each of them can be checked by itself",
        ));
    }
    let header = Header::read(file)?;
    let compressed = header.compressed;
    let grain = header.grain;
    let data = metadata_end(&header);
    let capacity = header.capacity;
    let sparse = Sparse::new(header, Arc::clone(file), None, 0, capacity);
    sparse.check_shared_tables()?;
    if compressed {
        return stream(&sparse, say);
    }
    if repair != Repair::Nothing {
        sparse.check_tables()?;
    }
    // The last grain may be cut off where it holds zeroes.
    let limit = file.len().next_multiple_of(grain);
    let mut end = data;
    for number in 0..capacity.div_ceil(grain) {
        let place = sparse.blocks.place(number, Wait::Allowed).map_err(|e| Error::io("check the VMDK", e))?;
        if let Place::At(place) = place {
            end = end.max(place.checked_add(grain).filter(|&stop| stop <= limit).unwrap_or(0));
        }
    }
    sparse.blocks.set_end(end.next_multiple_of(grain));
    let mut report = block_check::check(&sparse.blocks, data, limit, repair, say)?;
    let differing = copies(&sparse, repair == Repair::All, say)?;
    if repair == Repair::All {
        report.corruptions_fixed += differing;
    } else {
        report.corruptions += differing;
    }
    Ok(report)
}

/// Where the tables and what else stands in front of the grains end.
fn metadata_end(header: &Header) -> u64 {
    let tables = header.tables.iter().chain(&header.copies).max().map_or(0, |table| table + header.entries * 4);
    tables.max(header.descriptor.0 + header.descriptor.1).max(SECTOR)
}

/// Tables of which the second copy says something else; the first is the one that counts.
fn copies(sparse: &Sparse, mends: bool, say: Say<'_>) -> Result<u64> {
    let (header, file) = (&sparse.header, &sparse.blocks.file);
    let failed = |e| Error::io("check the VMDK's grain tables", e);
    let mut differing = 0;
    let mut tables = [0, 1].map(|_| vec![0; usize::try_from(header.entries * 4).unwrap_or(0)]);
    for (number, (&first, &second)) in header.tables.iter().zip(&header.copies).enumerate() {
        for (table, at) in tables.iter_mut().zip([first, second]) {
            table.fill(0);
            if at > 0 {
                file.read_or_zero(table, at, Wait::Allowed).map_err(failed)?;
            }
        }
        if tables[0] != tables[1] {
            say(&format!("ERROR: the two copies of grain table {number} say different things"));
            differing += 1;
            if mends {
                file.write(&tables[0], second, false).map_err(failed)?;
            }
        }
    }
    if mends && differing > 0 {
        file.flush().map_err(failed)?;
    }
    Ok(differing)
}

fn stream(sparse: &Sparse, say: Say<'_>) -> Result<CheckReport> {
    let (grain, blocks) = (sparse.header.grain, &sparse.blocks);
    let total_clusters = blocks.size().div_ceil(grain);
    let mut report = CheckReport { total_clusters, image_end_offset: blocks.file.len(), ..CheckReport::default() };
    for number in 0..total_clusters {
        let place = blocks.place(number, Wait::Allowed).map_err(|e| Error::io("check the VMDK", e))?;
        let is_whole = match place {
            Place::None | Place::Zero => continue,
            Place::At(at) => sparse.load(number, at).is_ok(),
            Place::Invalid => false,
        };
        report.allocated_clusters += 1;
        report.compressed_clusters += 1;
        if !is_whole {
            say(&format!("ERROR: grain {number} cannot be read"));
            report.corruptions += 1;
        }
    }
    Ok(report)
}
