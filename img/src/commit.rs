// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `commit`: what the upper images of a chain have goes down into a lower one, whose guest then sees what theirs did.

use block::{BlockNode, Preallocation, Wait, ZeroFlags};

use confine::Requirement;

use crate::disk::{Disk, Layer, Usage};
use crate::pace::Pace;
use crate::progress::Progress;
use crate::source::failed;
use crate::tool::{Error, Result, confine, say};

/// Bytes that are copied at once.
const PIECE: u64 = 2 << 20;

/// What is asked.
pub struct Request {
    /// The images whose content goes down, the top first; the top is writable if it is emptied.
    pub upper: Vec<Layer>,
    /// Where it goes, writable, and what that is built from.
    pub lower: Vec<Layer>,
    /// Afterwards the top has nothing of its own any more.
    pub empties: bool,
    /// Most bytes a second; 0 is any number.
    pub rate: u64,
    /// Show how far it is.
    pub progress: bool,
    /// Say nothing but errors.
    pub quiet: bool,
    /// Which layers of confinement must be had.
    pub confinement: Requirement,
}

/// Commits; the exit status. The top is emptied when everything below is on disk.
///
/// # Errors
/// An image cannot be opened, read, written or resized.
pub fn run(request: Request) -> Result<u8> {
    let Request { upper, lower, empties, rate, progress, quiet, confinement } = request;
    confine(confinement)?;
    // The two are opened apart: what the lower one is written must be nobody's backing file meanwhile.
    let upper = Disk::open(upper, Usage { writable: empties, force_share: false, unflushed: false })?;
    let lower = Disk::open(lower, Usage { writable: true, force_share: false, unflushed: false })?;
    let len = upper.node.len();
    if lower.node.len() < len {
        lower.node.resize(len, Preallocation::Off)?;
    }
    let (pace, progress) = (Pace::new(rate), Progress::new(len, progress));
    let mut buffer = Vec::new();
    let mut at = 0;
    while at < len {
        let place = upper.node.place(at, len - at).map_err(|e| failed("reading block status", at, &e))?;
        let piece = if place.is_present && !place.is_zero { place.len.min(PIECE) } else { place.len };
        match (place.is_present, place.is_zero) {
            (false, _) => {}
            (true, true) => zero(&lower.node, at, piece)?,
            (true, false) => {
                pace.wait(piece);
                buffer.resize(usize::try_from(piece).unwrap_or(0), 0);
                upper.node.read(&mut buffer, at, Wait::Allowed).map_err(|e| failed("reading", at, &e))?;
                lower.node.write(&buffer, at, false).map_err(|e| failed("writing", at, &e))?;
            }
        }
        at += piece;
        progress.reached(at);
    }
    lower.close()?;
    if empties {
        upper.node.empty().map_err(|e| {
            Error::Text(format!(
                "everything is in the backing file, but the image still has it, too: {e} (-d leaves it so)"
            ))
        })?;
    }
    upper.close()?;
    progress.end();
    if !quiet {
        say("Image committed.\n")?;
    }
    Ok(0)
}

fn zero(node: &BlockNode, at: u64, len: u64) -> Result<()> {
    let flags = ZeroFlags { may_unmap: true, fast_only: false };
    node.write_zeroes(at, len, flags, false).map_err(|e| failed("writing", at, &e))
}
