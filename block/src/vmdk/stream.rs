// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writing a `streamOptimized` image, from its first byte to its last: nothing that was written is ever changed, so it can be
//! made while it is sent away.
//!
//! ```text
//!  header, "the directory is at the end" | descriptor | (grain marker, zlib stream)... | table marker, table | ... grains ...
//!  | directory marker, directory | footer marker, footer | end-of-stream marker
//! ```
//!
//! A table follows the grains that it names; one that would name none is left out. Grains can be packed by any thread
//! ([`Stream::pack`]) but come in the order of the disk.

use std::io;
use std::sync::Arc;

use flate2::{Compress, Compression, FlushCompress, Status};
use rustix::io::Errno;

use super::create::{DESCRIPTOR, ENTRIES, GRAIN, Raw, describe};
use super::header::{AT_END, COMPRESSED, DEFLATE, MARKERS, NEWLINES, SECTOR};
use crate::formats::CreateRequest;
use crate::{BlockNode, Error, Preallocation, Result};

/// Bytes that are gathered before they are written.
const GATHERED: usize = 1 << 20;
/// Kinds of markers.
const END: u32 = 0;
const TABLE: u32 = 1;
const DIRECTORY: u32 = 2;
const FOOTER: u32 = 3;
/// zlib's usual level, as QEMU has it.
const LEVEL: u32 = 6;

/// A stream that is being written.
pub struct Stream {
    file: Arc<BlockNode>,
    header: Raw,
    /// Bytes that are not written yet, and where they go.
    gathered: Vec<u8>,
    at: u64,
    /// Sectors of the tables so far.
    directory: Vec<u32>,
    table: Vec<u32>,
    /// The first grain that may come next.
    next: u64,
}

impl Stream {
    /// Bytes of a grain.
    pub const GRAIN: u64 = GRAIN * SECTOR;

    /// Begins the image that `request` asks for; what is in its file is lost.
    ///
    /// # Errors
    /// Options that contradict each other; those of the file.
    pub fn begin(request: &CreateRequest) -> Result<Stream> {
        let text = describe(request)?;
        let header = Raw {
            version: 3,
            flags: NEWLINES | COMPRESSED | MARKERS,
            capacity: request.size.div_ceil(SECTOR),
            descriptor: DESCRIPTOR,
            directories: [0, AT_END],
            overhead: GRAIN,
            compression: DEFLATE,
        };
        request.file.resize(0, Preallocation::Off)?;
        let mut gathered = header.bytes().to_vec();
        gathered.extend(text.as_bytes());
        gathered.resize(usize::try_from(header.overhead * SECTOR).unwrap_or(0), 0);
        let file = Arc::clone(&request.file);
        Ok(Stream { file, header, gathered, at: 0, directory: Vec::new(), table: Vec::new(), next: 0 })
    }

    /// Packs a grain, or what is left of the last one.
    ///
    /// # Errors
    /// It is longer than a grain.
    pub fn pack(grain: &[u8]) -> io::Result<Vec<u8>> {
        let len = usize::try_from(Self::GRAIN).unwrap_or(0);
        let mut whole = grain.to_vec();
        if whole.len() > len {
            return Err(Errno::INVAL.into());
        }
        whole.resize(len, 0);
        // What cannot be packed becomes a little longer.
        let mut packed = vec![0; len + len / 64 + 64];
        let mut deflater = Compress::new(Compression::new(LEVEL), true);
        match deflater.compress(&whole, &mut packed, FlushCompress::Finish) {
            Ok(Status::StreamEnd) => {
                packed.truncate(usize::try_from(deflater.total_out()).unwrap_or(0));
                Ok(packed)
            }
            _ => Err(Errno::IO.into()),
        }
    }

    /// Appends the packed grain that begins at byte `offset` of the disk, behind every grain before. What is left out reads as
    /// zeroes.
    ///
    /// # Errors
    /// It is no grain of the disk, or comes too late; those of the file. After an error the stream is of no use.
    pub fn put(&mut self, offset: u64, packed: &[u8]) -> io::Result<()> {
        let (number, sector) = (offset / Self::GRAIN, offset / SECTOR);
        if !offset.is_multiple_of(Self::GRAIN) || number < self.next || sector >= self.header.capacity {
            return Err(Errno::INVAL.into());
        }
        self.next = number + 1;
        self.close_tables(number / ENTRIES)?;
        let place = self.sector()?;
        let index = usize::try_from(number % ENTRIES).unwrap_or(0);
        self.table.resize(index, 0);
        self.table.push(place);
        self.gathered.extend(sector.to_le_bytes());
        self.gathered.extend(u32::try_from(packed.len()).map_err(|_| Errno::INVAL)?.to_le_bytes());
        self.gathered.extend(packed);
        self.pad();
        if self.gathered.len() >= GATHERED { self.write() } else { Ok(()) }
    }

    /// Writes what names the grains, and the end.
    ///
    /// # Errors
    /// Those of the file.
    pub fn finish(mut self) -> Result<()> {
        self.end().map_err(|e| Error::io("write the VMDK stream", e))
    }

    fn end(&mut self) -> io::Result<()> {
        self.close_tables(self.header.capacity.div_ceil(GRAIN * ENTRIES))?;
        let directory: Vec<u8> = self.directory.iter().flat_map(|place| place.to_le_bytes()).collect();
        self.marker(DIRECTORY, (directory.len() as u64).div_ceil(SECTOR));
        self.header.directories[1] = u64::from(self.sector()?);
        self.gathered.extend(directory);
        self.pad();
        self.marker(FOOTER, 1);
        self.gathered.extend(self.header.bytes());
        self.marker(END, 0);
        self.write()?;
        self.file.flush()
    }

    /// Ends the tables in front of the one numbered `number`.
    fn close_tables(&mut self, number: u64) -> io::Result<()> {
        while (self.directory.len() as u64) < number {
            let mut place = 0;
            if !self.table.is_empty() {
                self.marker(TABLE, ENTRIES * 4 / SECTOR);
                place = self.sector()?;
                let mut table = std::mem::take(&mut self.table);
                table.resize(usize::try_from(ENTRIES).unwrap_or(0), 0);
                self.gathered.extend(table.iter().flat_map(|entry| entry.to_le_bytes()));
            }
            self.directory.push(place);
        }
        Ok(())
    }

    fn marker(&mut self, kind: u32, sectors: u64) {
        self.gathered.extend(sectors.to_le_bytes());
        self.gathered.extend([0; 4]);
        self.gathered.extend(kind.to_le_bytes());
        self.pad();
    }

    fn pad(&mut self) {
        self.gathered.resize(self.gathered.len().next_multiple_of(512), 0);
    }

    /// The sector at which the next byte goes: a stream of more than 2 TiB cannot say it.
    fn sector(&self) -> io::Result<u32> {
        u32::try_from((self.at + self.gathered.len() as u64) / SECTOR).map_err(|_| Errno::FBIG.into())
    }

    fn write(&mut self) -> io::Result<()> {
        self.file.write_growing(&self.gathered, self.at, false)?;
        self.at += self.gathered.len() as u64;
        self.gathered.clear();
        Ok(())
    }
}
