// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver `dmg`: Apple's disk image (UDIF), whose chunks are packed in several ways.
//!
//! ```text
//! last 512 bytes: "koly"   24 u64 data fork   216 u64 offset, 224 u64 length of the property list   492 u64 sectors
//! the list has for each partition a table, in Base64: "mish"   8 u64 first sector   16 u64 sectors   24 u64 data offset
//!   200 u32 chunks; from 204 on 40 bytes each: u32 type, u32, u64 first sector, u64 sectors, u64 offset, u64 length (big-endian)
//! ```
//!
//! All chunks are known when the image is open: the table says how many, and that it lies in the file bounds it.

mod chunks;

use std::io::{self, Read};
use std::sync::Arc;

use rustix::io::Errno;

use self::chunks::{Chunk, Chunks};
use super::cloop::zlib;
use super::{FILE, Lookup, ReadOnly, Run, Stored, entry};
use crate::driver::{Driver, Info};
use crate::drivers::{DriverEntry, OpenRequest};
use crate::{BlockNode, Result, Wait};

/// Its mark is at the end, where nobody probes.
pub(crate) const ENTRY: DriverEntry = entry("dmg", "Apple's disk image, read only", &[FILE], |_| false, open);

pub const SECTOR: u64 = 512;

/// How a chunk is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    Zlib,
    Bzip2,
    Lzfse,
}

struct Dmg {
    file: Arc<BlockNode>,
    chunks: Vec<Chunk>,
}

fn open(request: OpenRequest) -> Result<Box<dyn Driver>> {
    let file = request.child("file")?;
    let Chunks { chunks, size, largest } = Chunks::read(&file)?;
    ReadOnly::open(&request, Dmg { file, chunks }, size, largest, Info::default())
}

impl Dmg {
    fn chunk(&self, offset: u64) -> Option<&Chunk> {
        let number = self.chunks.partition_point(|chunk| chunk.start <= offset).checked_sub(1)?;
        self.chunks.get(number)
    }
}

impl Lookup for Dmg {
    fn find(&self, offset: u64, _wait: Wait) -> io::Result<Run> {
        if let Some(chunk) = self.chunk(offset).filter(|chunk| offset - chunk.start < chunk.len) {
            let stored = match chunk.packing {
                Some(_) => Stored::Packed(chunk.start),
                None => Stored::At(chunk.at),
            };
            return Ok(Run { start: chunk.start, len: chunk.len, stored });
        }
        // Zeroes have no chunk: to the next one that there is.
        let next = self.chunks.partition_point(|chunk| chunk.start <= offset);
        let end = self.chunks.get(next).map_or(u64::MAX, |chunk| chunk.start);
        Ok(Run { start: offset, len: end - offset, stored: Stored::Zero })
    }

    fn unpack(&self, run: &Run) -> io::Result<Vec<u8>> {
        let chunk = self.chunk(run.start).ok_or(Errno::IO)?;
        let mut stored = vec![0; usize::try_from(chunk.stored).map_err(|_| Errno::IO)?];
        self.file.read(&mut stored, chunk.at, Wait::Allowed)?;
        let len = usize::try_from(chunk.len).map_err(|_| Errno::IO)?;
        match chunk.packing {
            Some(Packing::Zlib) => zlib(&stored, len),
            Some(Packing::Bzip2) => exactly(bzip2::read::BzDecoder::new(stored.as_slice()), len),
            Some(Packing::Lzfse) => {
                let mut decoder = lzfse_rust::LzfseRingDecoder::default();
                exactly(decoder.reader(stored.as_slice()), len)
            }
            None => Err(Errno::IO.into()),
        }
    }
}

/// The `len` bytes that a stream has; one that breaks off or goes on is broken.
fn exactly(mut stream: impl Read, len: usize) -> io::Result<Vec<u8>> {
    let mut content = vec![0; len];
    stream.read_exact(&mut content).map_err(|_| Errno::IO)?;
    match stream.read(&mut [0]) {
        Ok(0) => Ok(content),
        _ => Err(Errno::IO.into()),
    }
}
