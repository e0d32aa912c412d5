// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the kernel asks (`linux/fuse.h`), checked: numbers of the host's byte order behind a header of 40 bytes.

use rustix::io::Errno;

/// Largest payload of a write, and largest read, bytes.
pub const MAX_WRITE: usize = 1 << 20;
/// `struct fuse_in_header`.
const HEADER_LEN: usize = 40;
/// Room for any request: headers and the payload of a write. The kernel wants the payload's size and room for headers.
pub const REQUEST_ROOM: usize = MAX_WRITE + 4096;
/// The root: the only file there is.
const ROOT: u64 = 1;

/// `SEEK_DATA` and `SEEK_HOLE` (lseek(2)).
pub const SEEK_DATA: u32 = 3;
/// See [`SEEK_DATA`].
pub const SEEK_HOLE: u32 = 4;

/// Bits of `fuse_init_in.flags`, those of `flags2` shifted by 32.
pub mod init_flag {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
}

/// Bits of `fuse_setattr_in.valid`.
pub mod set {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const MTIME: u32 = 1 << 5;
    pub const MTIME_NOW: u32 = 1 << 8;
}

/// A request: its number, and what it asks or why that makes no sense.
#[derive(Debug)]
pub struct Request<'a> {
    /// The number that the reply must bear.
    pub unique: u64,
    /// What is asked.
    pub operation: Result<Operation<'a>, Errno>,
}

/// What is asked of the one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation<'a> {
    /// `FUSE_INIT`: the session begins.
    Init { major: u32, minor: u32, max_readahead: u32, flags: u64 },
    /// `FUSE_GETATTR`
    GetAttributes,
    /// `FUSE_SETATTR`
    SetAttributes(Attributes),
    /// `FUSE_OPEN`, with the flags of open(2).
    Open { flags: u32 },
    /// `FUSE_RELEASE`: what was opened is closed.
    Release,
    /// `FUSE_READ`
    Read { offset: u64, len: u32 },
    /// `FUSE_WRITE`
    Write { offset: u64, data: &'a [u8] },
    /// `FUSE_STATFS`
    FileSystem,
    /// `FUSE_FSYNC`
    Flush,
    /// `FUSE_FALLOCATE`, with the mode of fallocate(2).
    Allocate { offset: u64, len: u64, mode: u32 },
    /// `FUSE_LSEEK`, with `whence` of lseek(2).
    Seek { offset: u64, whence: u32 },
    /// `FUSE_DESTROY`: the session is over.
    Destroy,
    /// `FUSE_FORGET`, `FUSE_BATCH_FORGET`, `FUSE_INTERRUPT`: nothing is done and nothing answered. The root is never
    /// forgotten, and a request that has begun is finished.
    Unanswered,
}

/// `struct fuse_setattr_in`, as far as it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Which of the others are to be set: bits of [`set`].
    pub valid: u32,
    /// Bytes.
    pub size: u64,
    /// Nanoseconds since 1970.
    pub mtime: u64,
    /// Permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl Request<'_> {
    /// Reads a request. `None` if not even its number can be told.
    pub fn parse(bytes: &[u8]) -> Option<Request<'_>> {
        let (header, body) = bytes.split_at_checked(HEADER_LEN)?;
        let header = Fields(header);
        let unique = header.u64(8).ok()?;
        let whole = header.u32(0).is_ok_and(|len| len as usize == bytes.len());
        let operation = match (header.u32(4), header.u64(16)) {
            (Ok(opcode), Ok(node)) if whole => operation(opcode, node, body),
            _ => Err(Errno::IO),
        };
        Some(Request { unique, operation })
    }
}

fn operation(opcode: u32, node: u64, body: &[u8]) -> Result<Operation<'_>, Errno> {
    let fields = Fields(body);
    // These name no file, or several.
    match opcode {
        2 | 36 | 42 => return Ok(Operation::Unanswered),
        26 => {
            let extended = u64::from(fields.u32(16).unwrap_or(0)) << 32;
            return Ok(Operation::Init {
                major: fields.u32(0)?,
                minor: fields.u32(4)?,
                max_readahead: fields.u32(8)?,
                flags: u64::from(fields.u32(12)?) | extended,
            });
        }
        38 => return Ok(Operation::Destroy),
        _ if node != ROOT => return Err(Errno::STALE),
        _ => {}
    }
    Ok(match opcode {
        3 => Operation::GetAttributes,
        4 => Operation::SetAttributes(Attributes {
            valid: fields.u32(0)?,
            size: fields.u64(16)?,
            mtime: fields.u64(40)?.saturating_mul(1_000_000_000).saturating_add(fields.u32(60)?.into()),
            mode: fields.u32(68)?,
            uid: fields.u32(76)?,
            gid: fields.u32(80)?,
        }),
        14 => Operation::Open { flags: fields.u32(0)? },
        15 => Operation::Read { offset: fields.u64(8)?, len: fields.u32(16)? },
        16 => {
            let data = body.get(40..).ok_or(Errno::IO)?;
            if fields.u32(16)? as usize != data.len() {
                return Err(Errno::IO);
            }
            Operation::Write { offset: fields.u64(8)?, data }
        }
        17 => Operation::FileSystem,
        18 => Operation::Release,
        20 => Operation::Flush,
        43 => Operation::Allocate { offset: fields.u64(8)?, len: fields.u64(16)?, mode: fields.u32(24)? },
        46 => Operation::Seek { offset: fields.u64(8)?, whence: fields.u32(16)? },
        // FUSE_FLUSH (25) among them: close(2) promises nothing, and after this answer the kernel asks no more.
        _ => return Err(Errno::NOSYS),
    })
}

/// Numbers in the host's byte order; one that the kernel did not send is an I/O error.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&self, at: usize) -> Result<u32, Errno> {
        self.array(at).map(u32::from_ne_bytes)
    }

    fn u64(&self, at: usize) -> Result<u64, Errno> {
        self.array(at).map(u64::from_ne_bytes)
    }

    fn array<const N: usize>(&self, at: usize) -> Result<[u8; N], Errno> {
        self.0.get(at..).and_then(|rest| rest.first_chunk()).copied().ok_or(Errno::IO)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let len = u32::try_from(HEADER_LEN + body.len()).expect("small");
        let mut bytes = [len.to_ne_bytes(), opcode.to_ne_bytes()].concat();
        bytes.extend([7u64.to_ne_bytes(), node.to_ne_bytes()].concat());
        bytes.extend([0; 16]);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn a_write_must_be_as_long_as_it_says() {
        let body = |size: u32| {
            let mut body = [0u64.to_ne_bytes(), 4096u64.to_ne_bytes()].concat();
            body.extend(size.to_ne_bytes());
            body.extend([0; 20]);
            body.extend(b"abc");
            body
        };
        let good = request(16, ROOT, &body(3));
        let parsed = Request::parse(&good).expect("a header");
        assert_eq!((parsed.unique, parsed.operation), (7, Ok(Operation::Write { offset: 4096, data: b"abc" })));
        let long = request(16, ROOT, &body(4));
        assert_eq!(Request::parse(&long).expect("a header").operation, Err(Errno::IO));
    }

    #[test]
    fn only_the_root_is_a_file_and_cut_requests_are_no_requests() {
        assert_eq!(Request::parse(&request(3, 2, &[0; 16])).expect("a header").operation, Err(Errno::STALE));
        assert_eq!(Request::parse(&request(15, ROOT, &[0; 12])).expect("a header").operation, Err(Errno::IO));
        let mut liar = request(3, ROOT, &[0; 16]);
        liar.pop();
        assert_eq!(Request::parse(&liar).expect("a header").operation, Err(Errno::IO));
        assert!(Request::parse(&liar[..39]).is_none());
    }
}
