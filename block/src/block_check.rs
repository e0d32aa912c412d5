// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Checking and repairing images of blocks in one table ([`Blocks`]). An entry can name a place where no block can be, or one that
//! another block has: both can destroy data with the next write. Room that no entry names only takes room.
//!
//! Repairs keep the order of every write: data first, then the entries that name it, then the end of the file.

use std::io;

use rustix::io::Errno;

use crate::blocks::{Blocks, Layout, Place};
use crate::formats::{CheckReport, Repair, Say};
use crate::{Error, Preallocation, Result, Wait};

/// Bytes that are copied at a time.
const PIECE: u64 = 1 << 20;
/// So many blocks more than the file has room for may get a place of their own: an image whose whole table names one block would
/// become as large as it says that its disk is.
const SPARE: usize = 16;

/// Looks at every entry of `blocks`, whose blocks begin at `start` and end at `end` of the file at most.
pub fn check<L: Layout>(blocks: &Blocks<L>, start: u64, end: u64, repair: Repair, say: Say<'_>) -> Result<CheckReport> {
    let failed = |e| Error::io("check the image", e);
    let mut found = survey(blocks, start, end, say).map_err(failed)?;
    let mut report = found.report;
    let step = blocks.layout.step();
    let places = usize::try_from(end.saturating_sub(start) / step).unwrap_or(usize::MAX);
    let shared = found.wrong.iter().filter(|(_, is_shared)| *is_shared).count();
    if repair == Repair::All && shared > places.saturating_add(SPARE) {
        say(&format!(
            "{shared} blocks have their place in common with others, of {places} places: not repaired, the image would grow \
             by {} bytes; convert what can be read of it into another image",
            (shared as u64).saturating_mul(step)
        ));
    } else if repair == Repair::All && !found.wrong.is_empty() {
        mend(blocks, &found, say).map_err(|e| Error::io("repair the image", e))?;
        report.corruptions_fixed = report.corruptions;
        report.corruptions = 0;
        found = survey(blocks, start, end.max(blocks.end()), &mut |_| {}).map_err(failed)?;
        // What got a place of its own may have left others empty.
        report.leaks = found.report.leaks;
    }
    if repair != Repair::Nothing && report.leaks > 0 && found.wrong.is_empty() {
        compact(blocks, &found, start).map_err(|e| Error::io("repair the image", e))?;
        report.leaks_fixed = report.leaks;
        report.leaks = 0;
    }
    report.image_end_offset = blocks.end();
    Ok(report)
}

/// What the table says.
struct Survey {
    report: CheckReport,
    /// Places in use and whose they are, in the order of the file.
    used: Vec<(u64, u64)>,
    /// Blocks whose entry is wrong, and whether another block has the place.
    wrong: Vec<(u64, bool)>,
}

fn survey<L: Layout>(blocks: &Blocks<L>, start: u64, end: u64, say: Say<'_>) -> io::Result<Survey> {
    let size = blocks.layout.block_size();
    let step = blocks.layout.step();
    let mut report = CheckReport { total_clusters: blocks.size().div_ceil(size), ..CheckReport::default() };
    let (mut used, mut wrong) = (Vec::new(), Vec::new());
    // More cannot stand beside each other.
    let most = usize::try_from(end.saturating_sub(start) / step + 1).unwrap_or(usize::MAX);
    let mut previous = None;
    for block in 0..report.total_clusters {
        let place = match blocks.place(block, Wait::Allowed)? {
            Place::None | Place::Zero => continue,
            Place::At(place) => Some(place),
            Place::Invalid => None,
        };
        report.allocated_clusters += 1;
        report.fragmented_clusters += u64::from(previous.is_some_and(|at: u64| Some(at + step) != place));
        previous = place;
        match place {
            Some(place) if place >= start && place.checked_add(step).is_some_and(|stop| stop <= end) => {
                if used.len() <= most {
                    used.push((place, block));
                } else {
                    wrong.push((block, true));
                }
            }
            place => {
                let place = place.map_or("nowhere".into(), |place| format!("at {place:#x}"));
                say(&format!("ERROR: block {block} is {place}, outside the data area from {start:#x} to {end:#x}"));
                wrong.push((block, false));
            }
        }
    }
    used.sort_unstable();
    let mut kept: Vec<(u64, u64)> = Vec::with_capacity(used.len());
    for (place, block) in used {
        match kept.last() {
            Some(&(before, owner)) if place < before + step => {
                say(&format!("ERROR: blocks {owner} and {block} share their place at {place:#x}"));
                wrong.push((block, true));
            }
            _ => kept.push((place, block)),
        }
    }
    let mut at = start;
    for &(place, _) in &kept {
        report.leaks += place.saturating_sub(blocks.layout.next_place(at)) / step;
        at = place + step;
    }
    report.leaks += blocks.end().min(end).saturating_sub(blocks.layout.next_place(at)) / step;
    if report.leaks > 0 {
        say(&format!("Leaked: room for {} blocks that no entry names", report.leaks));
    }
    report.corruptions = wrong.len() as u64;
    Ok(Survey { report, used: kept, wrong })
}

/// Gives each block that shares its place one of its own, with what it shows; an entry that names no place says nothing afterwards.
fn mend<L: Layout>(blocks: &Blocks<L>, found: &Survey, say: Say<'_>) -> io::Result<()> {
    let step = blocks.layout.step();
    for &(block, is_shared) in &found.wrong {
        let Place::At(old) = blocks.place(block, Wait::Allowed)? else {
            blocks.set(block, None)?;
            say(&format!("block {block} shows nothing of its own from now on"));
            continue;
        };
        if !is_shared {
            blocks.set(block, None)?;
            say(&format!("block {block} shows nothing of its own from now on"));
            continue;
        }
        let new = blocks.layout.next_place(blocks.end());
        copy(blocks, old, new)?;
        blocks.set_end(new + step);
        blocks.set(block, Some(new))?;
        say(&format!("block {block} has the place {new:#x} from now on"));
    }
    blocks.flush()
}

/// Moves the last blocks to where nothing is, and makes the file shorter.
fn compact<L: Layout>(blocks: &Blocks<L>, found: &Survey, start: u64) -> io::Result<()> {
    let step = blocks.layout.step();
    let mut holes = Vec::new();
    let mut at = start;
    for &(place, _) in &found.used {
        while blocks.layout.next_place(at) + step <= place {
            holes.push(blocks.layout.next_place(at));
            at = blocks.layout.next_place(at) + step;
        }
        at = place + step;
    }
    let mut last = found.used.as_slice();
    let mut end = start;
    for hole in holes {
        match last.split_last() {
            Some((&(place, block), rest)) if place > hole => {
                copy(blocks, place, hole)?;
                blocks.set(block, Some(hole))?;
                last = rest;
                end = end.max(hole + step);
            }
            _ => break,
        }
    }
    // What moved is at its new place, and named there, before the old one goes.
    blocks.flush()?;
    end = end.max(last.last().map_or(start, |(place, _)| place + step));
    blocks.set_end(end);
    blocks.layout.publish(end)?;
    blocks.file.flush()?;
    blocks.file.resize(blocks.layout.file_len(end), Preallocation::Off).map_err(Error::into_io)?;
    blocks.file.flush()
}

/// Copies a block with what stands in front of it.
fn copy<L: Layout>(blocks: &Blocks<L>, from: u64, to: u64) -> io::Result<()> {
    let step = blocks.layout.step();
    let mut piece = vec![0; usize::try_from(PIECE.min(step)).map_err(|_| Errno::FBIG)?];
    for at in (0..step).step_by(1 << 20) {
        let len = usize::try_from((step - at).min(PIECE)).map_err(|_| Errno::FBIG)?;
        blocks.file.read_or_zero(&mut piece[..len], from + at, Wait::Allowed)?;
        blocks.file.write_growing(&piece[..len], to + at, false)?;
    }
    Ok(())
}
