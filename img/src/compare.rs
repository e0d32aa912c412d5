// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `compare`: do two images show a guest the same?

use block::{BlockNode, ExtentKind, Wait};

use confine::Requirement;

use crate::disk::{Disk, Layer, Usage};
use crate::tool::{Error, Result, confine, say};

/// Bytes that are compared at once.
const PIECE: u64 = 2 << 20;

/// What is asked.
pub struct Request {
    /// The chains.
    pub images: [Vec<Layer>; 2],
    /// Sizes must be the same, too.
    pub strict: bool,
    /// Say nothing but errors.
    pub quiet: bool,
    /// Others may write at the same time.
    pub force_share: bool,
    /// Which layers of confinement must be had.
    pub confinement: Requirement,
}

/// Compares; the exit status is 0 for identical images, 1 for others.
///
/// # Errors
/// An image cannot be opened or read.
pub fn run(request: Request) -> Result<u8> {
    let Request { images: [one, two], strict, quiet, force_share, confinement } = request;
    confine(confinement)?;
    let usage = Usage { writable: false, force_share, unflushed: false };
    let (one, two) = (Disk::open(one, usage)?, Disk::open(two, usage)?);
    let tell = |text: String| if quiet { Ok(()) } else { say(&text) };
    let (shorter, longer) = if one.node.len() <= two.node.len() { (&one, &two) } else { (&two, &one) };
    let (len, end) = (shorter.node.len(), longer.node.len());
    if strict && len != end {
        tell("Strict mode: Image size mismatch!\n".into())?;
        return Ok(1);
    }
    let mut buffers = (Vec::new(), Vec::new());
    let mut at = 0;
    while at < len {
        let (a, b) = (status(&one.node, at, len - at)?, status(&two.node, at, len - at)?);
        let piece = a.1.min(b.1);
        if a.0 == ExtentKind::Zero && b.0 == ExtentKind::Zero {
            at += piece;
            continue;
        }
        let piece = piece.min(PIECE);
        read(&one.node, &mut buffers.0, at, piece)?;
        read(&two.node, &mut buffers.1, at, piece)?;
        if buffers.0 != buffers.1 {
            let differs = buffers.0.iter().zip(&buffers.1).position(|(a, b)| a != b).unwrap_or(0) as u64;
            // QEMU tells the sector.
            tell(format!("Content mismatch at offset {}!\n", at + differs / 512 * 512))?;
            return Ok(1);
        }
        at += piece;
    }
    if len != end {
        tell("Warning: Image size mismatch!\n".into())?;
        while at < end {
            let (kind, piece) = status(&longer.node, at, end - at)?;
            if kind == ExtentKind::Data {
                let piece = piece.min(PIECE);
                read(&longer.node, &mut buffers.0, at, piece)?;
                if let Some(differs) = buffers.0.iter().position(|&byte| byte != 0) {
                    tell(format!("Content mismatch at offset {}!\n", at + differs as u64 / 512 * 512))?;
                    return Ok(1);
                }
                at += piece;
            } else {
                at += piece;
            }
        }
    }
    tell("Images are identical.\n".into())?;
    Ok(0)
}

fn status(node: &BlockNode, at: u64, len: u64) -> Result<(ExtentKind, u64)> {
    let extent = node.status(at, len);
    let extent = extent.map_err(|e| Error::Text(format!("Sector allocation test failed at offset {at}: {e}")))?;
    Ok((extent.kind, extent.len))
}

fn read(node: &BlockNode, buffer: &mut Vec<u8>, at: u64, len: u64) -> Result<()> {
    buffer.resize(usize::try_from(len).unwrap_or(0), 0);
    let read = node.read(buffer, at, Wait::Allowed);
    read.map_err(|e| Error::Text(format!("Error while reading offset {at}: {e}")))
}
