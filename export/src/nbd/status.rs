// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Block status replies (proto.md, "`NBD_REPLY_TYPE_BLOCK_STATUS`"): a chunk of extents for each context that was chosen.

use std::io;

use block::{BlockNode, ExtentKind};

use super::context::{Chosen, Context};
use super::proto::{self, chunk};
use super::reply::{Style, To};

/// Most extents in one chunk, as in QEMU.
const MAX_EXTENTS: usize = (1 << 20) / 8;
/// Most runs that are looked at for one chunk: neighbours that merge could go on for ever on a large disk.
const MAX_RUNS: usize = 1 << 20;
/// `NBD_STATE_HOLE | NBD_STATE_ZERO` (proto.md, "`base:allocation` metadata context").
const HOLE_AND_ZERO: u32 = 0b11;
/// `NBD_STATE_DIRTY` (QEMU's nbd.rst).
const DIRTY: u32 = 0b1;

/// The reply for a range that is not empty and ends within the node, one extent for each context if `one`; and whether it is
/// an error.
pub fn reply(style: Style, node: &BlockNode, contexts: &[Chosen], to: To, len: u64, one: bool) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    for (index, Chosen { id, context }) in contexts.iter().enumerate() {
        let extents = match extents(node, context, to.offset, len, one) {
            Ok(extents) => extents,
            // Chunks of other contexts may stand before the one that ends the reply.
            Err(e) => return ([bytes, style.error(to, proto::errno(&e))].concat(), true),
        };
        let done = index + 1 == contexts.len();
        bytes.extend(match style {
            Style::Extended => style.chunk(chunk::BLOCK_STATUS_EXT, done, to, &wide(*id, &extents)),
            Style::Simple | Style::Structured => style.chunk(chunk::BLOCK_STATUS, done, to, &narrow(*id, &extents)),
        });
    }
    (bytes, false)
}

/// A payload with lengths of 32 bits: the request was no longer than that.
fn narrow(id: u32, extents: &[(u64, u32)]) -> Vec<u8> {
    let mut payload = id.to_be_bytes().to_vec();
    for &(len, flags) in extents {
        payload.extend(u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
        payload.extend(flags.to_be_bytes());
    }
    payload
}

/// A payload with lengths and flags of 64 bits.
fn wide(id: u32, extents: &[(u64, u32)]) -> Vec<u8> {
    let mut payload = id.to_be_bytes().to_vec();
    payload.extend(u32::try_from(extents.len()).unwrap_or(u32::MAX).to_be_bytes());
    for &(len, flags) in extents {
        payload.extend(len.to_be_bytes());
        payload.extend(u64::from(flags).to_be_bytes());
    }
    payload
}

/// Lengths and flags from `offset`, neighbours of one kind merged. Together they are no longer than `len`, perhaps shorter.
fn extents(node: &BlockNode, context: &Context, offset: u64, len: u64, one: bool) -> io::Result<Vec<(u64, u32)>> {
    let most = if one { 1 } else { MAX_EXTENTS };
    let mut extents: Vec<(u64, u32)> = Vec::new();
    let mut at = 0;
    for _ in 0..MAX_RUNS {
        if at == len {
            break;
        }
        let (run, flags) = run(node, context, offset + at, len - at)?;
        let run = run.clamp(1, len - at);
        let full = extents.len() == most;
        match extents.last_mut() {
            Some((last, kind)) if *kind == flags => *last += run,
            _ if full => break,
            _ => extents.push((run, flags)),
        }
        at += run;
    }
    Ok(extents)
}

/// The first run at `offset` and its flags.
fn run(node: &BlockNode, context: &Context, offset: u64, len: u64) -> io::Result<(u64, u32)> {
    match context {
        Context::BaseAllocation => {
            let extent = node.status(offset, len)?;
            let flags = match extent.kind {
                ExtentKind::Data => 0,
                ExtentKind::Zero => HOLE_AND_ZERO,
            };
            Ok((extent.len, flags))
        }
        Context::AllocationDepth => {
            let extent = node.status(offset, len)?;
            Ok((extent.len, extent.depth))
        }
        Context::DirtyBitmap(bitmap) => {
            let (run, dirty) = bitmap.runs.run(offset, len)?;
            Ok((run, if dirty { DIRTY } else { 0 }))
        }
    }
}
