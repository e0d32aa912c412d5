// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bytes of the NBD protocol (proto.md of the NBD project): numbers, headers, errors. No I/O.

use std::io;

use rustix::io::Errno;

/// `NBDMAGIC`: first eight bytes of a server (proto.md, "Newstyle negotiation").
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: newstyle, and the start of every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Start of every option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Start of a request with 32-bit length.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Start of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Start of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Start of a request with 64-bit length.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Start of a reply chunk with 64-bit length.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Server: fixed newstyle; client: the same.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Both: no 124 zeroes after the answer to `NBD_OPT_EXPORT_NAME`.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Options of the negotiation (proto.md, "Option types").
pub mod opt {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Option replies (proto.md, "Option reply types").
pub mod rep {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    pub const ERR_POLICY: u32 = 0x8000_0002;
    pub const ERR_INVALID: u32 = 0x8000_0003;
    pub const ERR_TLS_REQD: u32 = 0x8000_0005;
    pub const ERR_UNKNOWN: u32 = 0x8000_0006;
    pub const ERR_BLOCK_SIZE_REQD: u32 = 0x8000_0008;
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
    pub const ERR_EXT_HEADER_REQD: u32 = 0x8000_000a;
}

/// Information types (proto.md, "`NBD_INFO_*`").
pub mod info {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags (proto.md, "Transmission flags").
pub mod flag {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    pub const BLOCK_STAT_PAYLOAD: u16 = 1 << 12;
}

/// Command flags (proto.md, "Command flags").
pub mod cmd_flag {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Structured reply chunk types (proto.md, "Structured reply types").
pub mod chunk {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const FLAG_DONE: u16 = 1 << 0;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    pub const ERROR: u16 = (1 << 15) + 1;
}

/// Largest payload of a read or write, bytes: what QEMU and the specification's default allow.
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// Longest string, bytes (proto.md, "Values": strings).
pub const MAX_STRING: usize = 4096;
/// Bytes of a request header with 32-bit length.
pub const REQUEST_LEN: usize = 28;
/// Bytes of a request header with 64-bit length.
pub const EXTENDED_REQUEST_LEN: usize = 32;
/// Bytes of a simple reply header.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Bytes of a structured reply chunk header.
pub const CHUNK_LEN: usize = 20;
/// Bytes of a reply chunk header with 64-bit length.
pub const EXTENDED_CHUNK_LEN: usize = 32;

/// A command (proto.md, "Request types").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read bytes.
    Read,
    /// Write bytes.
    Write,
    /// End the session; has no reply.
    Disconnect,
    /// Everything acknowledged before is on stable storage when this is answered.
    Flush,
    /// The range's content is of no further use.
    Trim,
    /// The range will be read soon.
    Cache,
    /// Zeroes without a payload.
    WriteZeroes,
    /// What stands in the range.
    BlockStatus,
    /// Not in the specification, or not negotiated.
    Unknown(u16),
}

impl From<u16> for Command {
    fn from(number: u16) -> Command {
        match number {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            5 => Command::Cache,
            6 => Command::WriteZeroes,
            7 => Command::BlockStatus,
            other => Command::Unknown(other),
        }
    }
}

/// A request as it came: nothing is checked but the magic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// `NBD_CMD_FLAG_*`.
    pub flags: u16,
    /// What to do.
    pub command: Command,
    /// The client's name for the request, echoed in the reply.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Number of bytes: of the range, or of the payload if [`cmd_flag::PAYLOAD_LEN`] is set.
    pub len: u64,
}

impl Request {
    /// Reads a header with 32-bit length; `None` if the magic is wrong, after which nothing that follows can be understood.
    pub fn parse(header: &[u8; REQUEST_LEN]) -> Option<Request> {
        let len = u32::from_be_bytes(field(header, 24)).into();
        Request::with(REQUEST_MAGIC, header, len)
    }

    /// Reads a header with 64-bit length, as [`Request::parse`] does.
    pub fn parse_extended(header: &[u8; EXTENDED_REQUEST_LEN]) -> Option<Request> {
        let len = u64::from_be_bytes(field(header, 24));
        Request::with(EXTENDED_REQUEST_MAGIC, header, len)
    }

    fn with(magic: u32, header: &[u8], len: u64) -> Option<Request> {
        (u32::from_be_bytes(field(header, 0)) == magic).then(|| Request {
            flags: u16::from_be_bytes(field(header, 4)),
            command: u16::from_be_bytes(field(header, 6)).into(),
            cookie: u64::from_be_bytes(field(header, 8)),
            offset: u64::from_be_bytes(field(header, 16)),
            len,
        })
    }
}

/// The `N` bytes at `at`; the caller has checked that they are there.
pub fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// An option reply: header and payload in one.
pub fn option_reply(option: u32, reply: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(20 + payload.len());
    bytes.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    bytes.extend(option.to_be_bytes());
    bytes.extend(reply.to_be_bytes());
    bytes.extend(u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A simple reply's header; `error` is 0 or an [`errno`].
pub fn simple_reply(error: u32, cookie: u64) -> [u8; SIMPLE_REPLY_LEN] {
    let mut header = [0; SIMPLE_REPLY_LEN];
    header[0..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    header[4..8].copy_from_slice(&error.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    header
}

/// A structured reply chunk's header; `len` counts the payload that follows, `done` says that no chunk follows.
pub fn structured_chunk(kind: u16, done: bool, cookie: u64, len: u32) -> [u8; CHUNK_LEN] {
    let mut header = [0; CHUNK_LEN];
    header[0..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    header[4..6].copy_from_slice(&(if done { chunk::FLAG_DONE } else { 0 }).to_be_bytes());
    header[6..8].copy_from_slice(&kind.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    header[16..20].copy_from_slice(&len.to_be_bytes());
    header
}

/// The same with 64-bit length; `offset` is the request's.
pub fn extended_chunk(kind: u16, done: bool, cookie: u64, offset: u64, len: u64) -> [u8; EXTENDED_CHUNK_LEN] {
    let mut header = [0; EXTENDED_CHUNK_LEN];
    header[0..4].copy_from_slice(&EXTENDED_REPLY_MAGIC.to_be_bytes());
    header[4..6].copy_from_slice(&(if done { chunk::FLAG_DONE } else { 0 }).to_be_bytes());
    header[6..8].copy_from_slice(&kind.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    header[16..24].copy_from_slice(&offset.to_be_bytes());
    header[24..32].copy_from_slice(&len.to_be_bytes());
    header
}

/// The protocol's number for an error of the data path (proto.md, "Error values"): ENOSPC stays ENOSPC to the guest, what
/// the list does not have becomes EIO.
pub fn errno(error: &io::Error) -> u32 {
    const KNOWN: [(Errno, u32); 10] = [
        (Errno::PERM, 1),
        (Errno::ROFS, 1),
        (Errno::IO, 5),
        (Errno::NOMEM, 12),
        (Errno::INVAL, 22),
        (Errno::NOSPC, 28),
        (Errno::DQUOT, 28),
        (Errno::FBIG, 28),
        (Errno::OVERFLOW, 75),
        (Errno::OPNOTSUPP, 95),
    ];
    let raw = error.raw_os_error();
    match KNOWN.iter().find(|(known, _)| Some(known.raw_os_error()) == raw) {
        Some(&(_, number)) => number,
        None if error.kind() == io::ErrorKind::Unsupported => 95,
        None => 5,
    }
}

/// `EINVAL` on the wire.
pub const EINVAL: u32 = 22;
/// `EPERM` on the wire.
pub const EPERM: u32 = 1;
/// `ENOSPC` on the wire.
pub const ENOSPC: u32 = 28;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_with_a_wrong_magic_is_not_understood() {
        assert_eq!(Request::parse(&[0; REQUEST_LEN]), None);
        let mut compact = [0; EXTENDED_REQUEST_LEN];
        compact[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        assert_eq!(Request::parse_extended(&compact), None);
    }

    #[test]
    fn a_request_keeps_every_field() {
        let mut header = [0u8; REQUEST_LEN];
        header[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        header[4..6].copy_from_slice(&cmd_flag::FUA.to_be_bytes());
        header[6..8].copy_from_slice(&1u16.to_be_bytes());
        header[8..16].copy_from_slice(&7u64.to_be_bytes());
        header[16..24].copy_from_slice(&u64::MAX.to_be_bytes());
        header[24..28].copy_from_slice(&u32::MAX.to_be_bytes());
        let wanted = Request {
            flags: cmd_flag::FUA,
            command: Command::Write,
            cookie: 7,
            offset: u64::MAX,
            len: u32::MAX.into(),
        };
        assert_eq!(Request::parse(&header), Some(wanted));
    }

    #[test]
    fn a_full_disk_stays_a_full_disk_and_the_unknown_becomes_an_io_error() {
        assert_eq!(errno(&Errno::NOSPC.into()), ENOSPC);
        assert_eq!(errno(&Errno::NOTBLK.into()), 5);
        assert_eq!(errno(&io::ErrorKind::UnexpectedEof.into()), 5);
    }
}
