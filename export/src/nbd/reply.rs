// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Replies as bytes, simple or structured as negotiated (proto.md, "Transmission phase").

use std::io;

use block::{BlockNode, ExtentKind};

use super::proto::{self, CHUNK_LEN, SIMPLE_REPLY_LEN, chunk};

/// Most extents in one block status reply, as in QEMU.
const MAX_EXTENTS: usize = (1 << 20) / 8;
/// `NBD_STATE_HOLE | NBD_STATE_ZERO` (proto.md, "`base:allocation` metadata context").
const HOLE_AND_ZERO: u32 = 0b11;

/// How this connection wants its replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Simple replies only.
    Simple,
    /// Structured replies for reads, block status and errors; simple ones for the success of the rest.
    Structured,
}

impl Style {
    /// Bytes before the data of a read reply.
    pub fn read_header_len(self) -> usize {
        match self {
            Style::Simple => SIMPLE_REPLY_LEN,
            Style::Structured => CHUNK_LEN + 8,
        }
    }

    /// Writes the header of a read reply with `len` bytes of data into `header`, which has [`Style::read_header_len`] bytes.
    pub fn put_read_header(self, header: &mut [u8], cookie: u64, offset: u64, len: u32) {
        match self {
            Style::Simple => header.copy_from_slice(&proto::simple_reply(0, cookie)),
            Style::Structured => {
                // Lengths of reads are at most MAX_PAYLOAD, so the sum fits.
                header[..CHUNK_LEN].copy_from_slice(&proto::last_chunk(chunk::OFFSET_DATA, cookie, len + 8));
                header[CHUNK_LEN..].copy_from_slice(&offset.to_be_bytes());
            }
        }
    }

    /// The success of a request that returns nothing. An empty read has no data chunk, so it is one of these in both styles.
    pub fn done(self, cookie: u64, of_read: bool) -> Vec<u8> {
        match self {
            Style::Structured if of_read => proto::last_chunk(chunk::NONE, cookie, 0).to_vec(),
            _ => proto::simple_reply(0, cookie).to_vec(),
        }
    }

    /// A failure with an error number of the protocol.
    pub fn error(self, cookie: u64, error: u32) -> Vec<u8> {
        match self {
            Style::Simple => proto::simple_reply(error, cookie).to_vec(),
            Style::Structured => {
                let mut bytes = proto::last_chunk(chunk::ERROR, cookie, 6).to_vec();
                bytes.extend(error.to_be_bytes());
                bytes.extend(0u16.to_be_bytes());
                bytes
            }
        }
    }

    /// Success or failure of a request that returns nothing.
    pub fn outcome(self, cookie: u64, result: io::Result<()>) -> Vec<u8> {
        match result {
            Ok(()) => self.done(cookie, false),
            Err(e) => self.error(cookie, proto::errno(&e)),
        }
    }
}

/// A read reply of any size, and whether it is an error: the data is read by this call, which may sleep.
pub fn read(style: Style, node: &BlockNode, cookie: u64, offset: u64, len: u32) -> (Vec<u8>, bool) {
    let header = style.read_header_len();
    let mut bytes = vec![0; header + len as usize];
    match node.read(&mut bytes[header..], offset, block::Wait::Allowed) {
        Ok(()) => {
            style.put_read_header(&mut bytes[..header], cookie, offset, len);
            (bytes, false)
        }
        Err(e) => (style.error(cookie, proto::errno(&e)), true),
    }
}

/// A block status reply (proto.md, "`NBD_REPLY_TYPE_BLOCK_STATUS`"), one extent only if `one`; whether it is an error.
pub fn block_status(node: &BlockNode, context: u32, cookie: u64, offset: u64, len: u32, one: bool) -> (Vec<u8>, bool) {
    match extents(node, offset, len, one) {
        Ok(extents) => {
            let mut payload = context.to_be_bytes().to_vec();
            for (len, flags) in extents {
                payload.extend(len.to_be_bytes());
                payload.extend(flags.to_be_bytes());
            }
            // At most MAX_EXTENTS * 8 + 4 bytes.
            let payload_len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
            let mut bytes = proto::last_chunk(chunk::BLOCK_STATUS, cookie, payload_len).to_vec();
            bytes.extend(payload);
            (bytes, false)
        }
        Err(e) => (Style::Structured.error(cookie, proto::errno(&e)), true),
    }
}

/// Lengths and flags from `offset`, neighbours of one kind merged.
fn extents(node: &BlockNode, offset: u64, len: u32, one: bool) -> io::Result<Vec<(u32, u32)>> {
    let most = if one { 1 } else { MAX_EXTENTS };
    let mut extents: Vec<(u32, u32)> = Vec::new();
    let mut at = 0u32;
    while at < len {
        let extent = node.status(offset + u64::from(at), u64::from(len - at))?;
        let flags = match extent.kind {
            ExtentKind::Data => 0,
            ExtentKind::Zero => HOLE_AND_ZERO,
        };
        // Never more than was asked, which fits 32 bits.
        let run = u32::try_from(extent.len).unwrap_or(len - at).min(len - at);
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
