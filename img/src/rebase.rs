// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `rebase`: an image over another backing file. What the guest sees stays what it was: the image gets what the old backing file
//! has and the new one has not.

use block::{BlockNode, OptionValue, Options, Wait, ZeroFlags};

use confine::Requirement;

use crate::convert::is_zero;
use crate::disk::{Disk, Layer, Named, Usage};
use crate::progress::Progress;
use crate::source::failed;
use crate::tool::{Error, Result, confine};

/// Bytes that are compared at once where the image has no clusters.
const UNIT: u64 = 64 << 10;

/// What the old and the new backing file are compared by.
pub struct Compared {
    /// The image, writable, and what it is built from now.
    pub now: Vec<Layer>,
    /// What it will be built from; nothing for no backing file.
    pub then: Vec<Layer>,
    /// What it gets is stored compressed.
    pub compress: bool,
    /// Show how far it is.
    pub progress: bool,
}

/// What is asked.
pub struct Request {
    /// The image's file, writable.
    pub image: Named,
    /// The image's format.
    pub format: String,
    /// The new backing file's name; empty for none.
    pub backing: String,
    /// Its format.
    pub backing_format: Option<String>,
    /// `None` changes the name alone, whatever the guest sees then.
    pub compared: Option<Compared>,
    /// Which layers of confinement must be had.
    pub confinement: Requirement,
}

/// Rebases; the exit status. The name changes when everything that the image gets is on disk.
///
/// # Errors
/// An image cannot be opened, read, written, or have such a backing file.
pub fn run(request: Request) -> Result<u8> {
    let Request { image, format, backing, backing_format, compared, confinement } = request;
    confine(confinement)?;
    if let Some(compared) = compared {
        fill(compared)?;
    }
    let disk = Disk::file(image, Usage { writable: true, force_share: false, unflushed: false })?;
    let refused = |e: block::Error| Error::Text(format!("Could not change the backing file to '{backing}': {e}"));
    let mut options = Options::from([("backing_file", OptionValue::Str(backing.clone()))]);
    if let (Some(format), false) = (backing_format, backing.is_empty()) {
        options.insert("backing_fmt", OptionValue::Str(format));
    }
    block::amend(&disk.node, &format, &options).map_err(refused)?;
    disk.close()?;
    Ok(0)
}

/// Gives the image what it will not find below it any more.
fn fill(compared: Compared) -> Result<()> {
    let Compared { now, then, compress, progress } = compared;
    let disk = Disk::open(now, Usage { writable: true, force_share: false, unflushed: false })?;
    let below = match then.is_empty() {
        true => None,
        false => Some(Disk::open(then, Usage { writable: false, force_share: true, unflushed: false })?),
    };
    let below = below.as_ref().map(|below| &*below.node);
    let node = &disk.node;
    let len = node.len();
    let progress = Progress::new(len, progress);
    let unit = node.info().cluster_size.unwrap_or(UNIT).max(512);
    let (mut old, mut new) = (Vec::new(), Vec::new());
    let mut at = 0;
    while at < len {
        let place = node.place(at, len - at).map_err(|e| failed("reading block status", at, &e))?;
        if place.depth == 0 && place.is_present {
            at += place.len;
            continue;
        }
        // A cluster at a time: that is what a write takes room for. What the image has of it reads as it did.
        let end = ((at / unit + 1) * unit).min(len);
        let size = usize::try_from(end - at).unwrap_or(0);
        old.resize(size, 0);
        new.resize(size, 0);
        node.read(&mut old, at, Wait::Allowed).map_err(|e| failed("reading", at, &e))?;
        read_below(below, &mut new, at)?;
        if old != new {
            put(node, &old, at, compress && at.is_multiple_of(unit))?;
        }
        at = end;
        progress.reached(at);
    }
    disk.close()?;
    progress.end();
    Ok(())
}

fn read_below(below: Option<&BlockNode>, buffer: &mut [u8], at: u64) -> Result<()> {
    match below {
        Some(below) => below.read_or_zero(buffer, at, Wait::Allowed).map_err(|e| failed("reading", at, &e)),
        None => {
            buffer.fill(0);
            Ok(())
        }
    }
}

fn put(node: &BlockNode, bytes: &[u8], at: u64, compress: bool) -> Result<()> {
    let written = if is_zero(bytes) {
        let flags = ZeroFlags { may_unmap: true, fast_only: false };
        match node.write_zeroes(at, bytes.len() as u64, flags, false) {
            // What reads as zeroes already need not be the image's own: then it is made so.
            Ok(()) if !is_own(node, at, bytes.len() as u64)? => node.write(bytes, at, false),
            other => other,
        }
    } else if compress {
        node.write_compressed(bytes, at)
    } else {
        node.write(bytes, at, false)
    };
    written.map_err(|e| failed("writing", at, &e))
}

/// Whether the image itself says what is there, all over a range.
fn is_own(node: &BlockNode, at: u64, len: u64) -> Result<bool> {
    let (mut from, end) = (at, at + len);
    while from < end {
        let place = node.place(from, end - from).map_err(|e| failed("reading block status", from, &e))?;
        if place.depth > 0 || !place.is_present {
            return Ok(false);
        }
        from += place.len;
    }
    Ok(true)
}
