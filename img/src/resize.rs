// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `resize`: another size for an image's disk.

use block::Preallocation;

use confine::Requirement;

use crate::disk::{Disk, Layer, Usage};
use crate::tool::{Error, Result, confine, say, warn};

/// The size that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// This many bytes.
    To(u64),
    /// This many bytes more.
    More(u64),
    /// This many bytes less.
    Less(u64),
}

/// The mode of QAPI's `PreallocMode`.
///
/// # Errors
/// There is none of that name.
pub fn preallocation(mode: &str) -> Result<Preallocation> {
    Ok(block::preallocation_named(mode)?)
}

/// What is asked.
pub struct Request {
    /// The chain; its top is writable.
    pub layers: Vec<Layer>,
    /// The size.
    pub wanted: Wanted,
    /// Data beyond the new end may go.
    pub shrink: bool,
    /// How room for what is new is set aside.
    pub preallocation: Preallocation,
    /// Say nothing but errors.
    pub quiet: bool,
    /// Which layers of confinement must be had.
    pub confinement: Requirement,
}

/// Resizes; the exit status.
///
/// # Errors
/// The image cannot be opened, or have that size.
pub fn run(request: Request) -> Result<u8> {
    confine(request.confinement)?;
    let disk = Disk::open(request.layers, Usage { writable: true, force_share: false, unflushed: false })?;
    let now = disk.node.len();
    let wanted = match request.wanted {
        Wanted::To(bytes) => Some(bytes),
        Wanted::More(bytes) => now.checked_add(bytes),
        Wanted::Less(bytes) => now.checked_sub(bytes).filter(|&left| left > 0),
    };
    let wanted = wanted.ok_or_else(|| Error::Text("New image size must be positive".into()))?;
    let wanted = wanted.checked_next_multiple_of(512).unwrap_or(wanted);
    if wanted < now && !request.shrink {
        warn(
            "qemu-img: Use the --shrink option to perform a shrink operation.\nqemu-img: warning: Shrinking an image will delete all \
             data beyond the shrunken image's end. Before performing such an operation, make sure there is no important data there.",
        );
        return Ok(1);
    }
    disk.node.resize(wanted, request.preallocation)?;
    disk.close()?;
    if !request.quiet {
        say("Image resized.\n")?;
    }
    Ok(0)
}
