// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver `cloop`: a compressed loop image, version 2.0 (Knoppix).
//!
//! ```text
//! 0 a script, 128 bytes   128 u32 block size   132 u32 blocks   136 u64 offset of each block, and the last one's end (big-endian)
//! ```
//!
//! Each block is a zlib stream of exactly the block size.

use std::io;
use std::sync::Arc;

use flate2::{Decompress, FlushDecompress, Status};
use rustix::io::Errno;

use super::{FILE, Lookup, ReadOnly, Run, Stored, entry, field, header, u32_be};
use crate::driver::{Driver, Info};
use crate::drivers::{DriverEntry, OpenRequest};
use crate::{BlockNode, Error, Result, Wait};

pub(crate) const ENTRY: DriverEntry =
    entry("cloop", "a compressed loop image, read only", &[FILE], |start| start.starts_with(SCRIPT), open);

const SCRIPT: &[u8] = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n";
const OFFSETS: u64 = 136;
/// QEMU's limit.
const MAX_BLOCK: u64 = 64 << 20;

struct Cloop {
    file: Arc<BlockNode>,
    block: u64,
}

fn open(request: OpenRequest) -> Result<Box<dyn Driver>> {
    let file = request.child("file")?;
    let bytes = header::<136>(&file, "cloop")?;
    let (block, blocks) = (u64::from(u32_be(&bytes, 128)), u64::from(u32_be(&bytes, 132)));
    // QEMU looks no closer at the script, either, when it is told the format.
    if block == 0 || !block.is_multiple_of(512) || block > MAX_BLOCK {
        return Err(Error::corrupt(format!("block_size {block} must be a multiple of 512, 512 to {MAX_BLOCK}")));
    }
    if OFFSETS + (blocks + 1) * 8 > file.len() {
        return Err(Error::corrupt(format!("the offsets of {blocks} blocks do not fit into the file")));
    }
    let info = Info { cluster_size: Some(block), ..Info::default() };
    ReadOnly::open(&request, Cloop { file, block }, blocks * block, block, info)
}

impl Lookup for Cloop {
    fn find(&self, offset: u64, _wait: Wait) -> io::Result<Run> {
        let number = offset / self.block;
        Ok(Run { start: number * self.block, len: self.block, stored: Stored::Packed(number) })
    }

    fn unpack(&self, run: &Run) -> io::Result<Vec<u8>> {
        let pair = field::<16>(&self.file, OFFSETS + run.start / self.block * 8, Wait::Allowed)?;
        let (at, end) = (super::u64_be(&pair, 0), super::u64_be(&pair, 8));
        // Deflate grows what it cannot pack by little.
        let len =
            end.checked_sub(at).filter(|len| *len <= 2 * self.block && end <= self.file.len()).ok_or(Errno::IO)?;
        let mut stored = vec![0; usize::try_from(len).map_err(|_| Errno::IO)?];
        self.file.read(&mut stored, at, Wait::Allowed)?;
        zlib(&stored, usize::try_from(self.block).map_err(|_| Errno::IO)?)
    }
}

/// A zlib stream (RFC 1950) of exactly `len` bytes.
pub fn zlib(stored: &[u8], len: usize) -> io::Result<Vec<u8>> {
    let mut content = vec![0; len];
    let mut inflater = Decompress::new(true);
    let status = inflater.decompress(stored, &mut content, FlushDecompress::Finish);
    if matches!(status, Ok(Status::StreamEnd)) && inflater.total_out() == len as u64 {
        Ok(content)
    } else {
        Err(Errno::IO.into())
    }
}
