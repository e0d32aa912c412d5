// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Replies as bytes, in the style that was negotiated (proto.md, "Transmission phase").

use std::io;

use block::BlockNode;

use super::proto::{self, CHUNK_LEN, EXTENDED_CHUNK_LEN, SIMPLE_REPLY_LEN, chunk};

/// How this connection wants its replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Simple replies only.
    Simple,
    /// Structured replies for reads, block status and errors; simple ones for the success of the rest.
    Structured,
    /// Structured replies with 64-bit headers for everything, and requests of that kind.
    Extended,
}

/// What a reply repeats of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct To {
    /// The client's name for the request.
    pub cookie: u64,
    /// The request's first byte.
    pub offset: u64,
}

impl Style {
    /// All of them, and their names between processes.
    const NAMES: [(Style, &str); 3] =
        [(Style::Simple, "simple"), (Style::Structured, "structured"), (Style::Extended, "extended")];

    /// Its name between processes.
    pub fn word(self) -> &'static str {
        Style::NAMES.iter().find(|(style, _)| *style == self).map_or("", |(_, word)| word)
    }

    /// The style of that name.
    pub fn named(word: &str) -> Option<Style> {
        Style::NAMES.iter().find(|(_, name)| *name == word).map(|(style, _)| *style)
    }

    /// Bytes before the data of a read reply.
    pub fn read_header_len(self) -> usize {
        match self {
            Style::Simple => SIMPLE_REPLY_LEN,
            Style::Structured => CHUNK_LEN + 8,
            Style::Extended => EXTENDED_CHUNK_LEN + 8,
        }
    }

    /// Bytes of a request's header.
    pub fn request_len(self) -> usize {
        match self {
            Style::Simple | Style::Structured => proto::REQUEST_LEN,
            Style::Extended => proto::EXTENDED_REQUEST_LEN,
        }
    }

    /// Writes the header of a read reply with `len` bytes of data into `header`, which has [`Style::read_header_len`] bytes.
    pub fn put_read_header(self, header: &mut [u8], to: To, len: u32) {
        // Lengths of reads are at most MAX_PAYLOAD, so the sums fit.
        match self {
            Style::Simple => header.copy_from_slice(&proto::simple_reply(0, to.cookie)),
            Style::Structured => {
                header[..CHUNK_LEN].copy_from_slice(&proto::structured_chunk(
                    chunk::OFFSET_DATA,
                    true,
                    to.cookie,
                    len + 8,
                ));
                header[CHUNK_LEN..].copy_from_slice(&to.offset.to_be_bytes());
            }
            Style::Extended => {
                let chunk = proto::extended_chunk(chunk::OFFSET_DATA, true, to.cookie, to.offset, u64::from(len) + 8);
                header[..EXTENDED_CHUNK_LEN].copy_from_slice(&chunk);
                header[EXTENDED_CHUNK_LEN..].copy_from_slice(&to.offset.to_be_bytes());
            }
        }
    }

    /// A chunk, structured or extended; its payload fits 32 bits.
    pub fn chunk(self, kind: u16, done: bool, to: To, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(EXTENDED_CHUNK_LEN + payload.len());
        if self == Style::Extended {
            bytes.extend(proto::extended_chunk(kind, done, to.cookie, to.offset, payload.len() as u64));
        } else {
            bytes.extend(proto::structured_chunk(
                kind,
                done,
                to.cookie,
                u32::try_from(payload.len()).unwrap_or(u32::MAX),
            ));
        }
        bytes.extend(payload);
        bytes
    }

    /// The success of a request that returns nothing. An empty read has no data chunk, so it is one of these in every style.
    pub fn done(self, to: To, of_read: bool) -> Vec<u8> {
        match self {
            Style::Structured if of_read => self.chunk(chunk::NONE, true, to, &[]),
            Style::Extended => self.chunk(chunk::NONE, true, to, &[]),
            _ => proto::simple_reply(0, to.cookie).to_vec(),
        }
    }

    /// A failure with an error number of the protocol.
    pub fn error(self, to: To, error: u32) -> Vec<u8> {
        if self == Style::Simple {
            return proto::simple_reply(error, to.cookie).to_vec();
        }
        // The number, and the length of a message that is not there.
        let [a, b, c, d] = error.to_be_bytes();
        self.chunk(chunk::ERROR, true, to, &[a, b, c, d, 0, 0])
    }

    /// Success or failure of a request that returns nothing.
    pub fn outcome(self, to: To, result: io::Result<()>) -> Vec<u8> {
        match result {
            Ok(()) => self.done(to, false),
            Err(e) => self.error(to, proto::errno(&e)),
        }
    }
}

/// A read reply of any size, and whether it is an error: the data is read by this call, which may sleep.
pub fn read(style: Style, node: &BlockNode, to: To, len: u32) -> (Vec<u8>, bool) {
    let header = style.read_header_len();
    let mut bytes = vec![0; header + len as usize];
    match node.read(&mut bytes[header..], to.offset, block::Wait::Allowed) {
        Ok(()) => {
            style.put_read_header(&mut bytes[..header], to, len);
            (bytes, false)
        }
        Err(e) => (style.error(to, proto::errno(&e)), true),
    }
}
