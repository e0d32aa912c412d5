// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bytes of the NBD protocol as a client needs them (proto.md of the NBD project).

use std::io;

use rustix::io::Errno;

/// First eight bytes of a server.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Start of every option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Start of a request with 32-bit length.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Start of a request with 64-bit length.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Start of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Start of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Start of a reply chunk with 64-bit length.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Most bytes of one read or write unless the server says less.
pub const MAX_PAYLOAD: u64 = 32 << 20;

/// Commands.
pub mod command {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISCONNECT: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flags.
pub mod flag {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const NO_HOLE: u16 = 1 << 1;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Transmission flags.
pub mod can {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const READ_ONLY: u16 = 1 << 1;
    pub const FLUSH: u16 = 1 << 2;
    pub const TRIM: u16 = 1 << 5;
    pub const WRITE_ZEROES: u16 = 1 << 6;
    pub const FAST_ZERO: u16 = 1 << 11;
}

/// Chunk types.
pub mod chunk {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const DONE: u16 = 1 << 0;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    pub const ERROR_BIT: u16 = 1 << 15;
}

/// A big-endian number of the `N` bytes at `at`, which the caller knows to be there.
pub fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// A server's error number as one of this host; what the list does not have is an I/O error.
pub fn error(number: u32) -> io::Error {
    const KNOWN: [(u32, Errno); 6] = [
        (1, Errno::PERM),
        (12, Errno::NOMEM),
        (22, Errno::INVAL),
        (28, Errno::NOSPC),
        (75, Errno::OVERFLOW),
        (95, Errno::OPNOTSUPP),
    ];
    KNOWN.iter().find(|(known, _)| *known == number).map_or(Errno::IO, |&(_, errno)| errno).into()
}

/// A server that breaks the protocol.
pub fn broken(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}
