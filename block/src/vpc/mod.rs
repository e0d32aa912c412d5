// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver `vpc`: Virtual PC's and Hyper-V's VHD, fixed, dynamic and differencing (Virtual Hard Disk Image Format Specification 1.0).
//!
//! ```text
//! footer, 512 bytes, at the end; dynamic disks have a copy at the start            (all big-endian)
//!   0 "conectix"   16 u64 offset of the dynamic header   28 creator   48 u64 size   60 u32 type: 2 fixed, 3 dynamic
//!  56 u16 cylinders, u8 heads, u8 sectors per track      64 u32 checksum: one's complement of the sum of the other bytes
//! dynamic header, 1024 bytes
//!   0 "cxsparse"   16 u64 offset of the table   28 u32 entries   32 u32 block size   36 u32 checksum
//! ```
//!
//! The block allocation table has the sector number of each block, all ones for none. A block is a bitmap of its sectors and
//! then its data; in a disk without parent the bitmap is all ones, and is not looked at. The footer moves with the end of the file, and until the next
//! flush the copy at the start speaks for it.

pub mod check;
pub mod create;
mod differencing;
mod fixed;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use differencing::Differencing;
use fixed::Fixed;

use crate::blocks::{Blocks, Layout, Place};
use crate::claims::Writes;
use crate::driver::{Ask, Driver, Info, InfoValue, Mapping, Prepared, ZeroFlags};
use crate::drivers::{ChildSpec, DriverEntry, OpenRequest, OptionKind, OptionSpec, OptionValue};
use crate::{BlockNode, Error, Preallocation, Result, Wait};

pub(crate) const ENTRY: DriverEntry = DriverEntry {
    name: "vpc",
    summary: "Virtual PC's and Hyper-V's VHD",
    children: &[
        ChildSpec { name: "file", required: true, writes: Writes::Metadata },
        ChildSpec { name: "backing", required: false, writes: Writes::Never },
    ],
    options: &[OptionSpec {
        name: "force-size-calc",
        kind: OptionKind::Str,
        summary: "where the size comes from: chs (the geometry) or current_size; by default the program that made it decides",
    }],
    takes_descriptor: false,
    writes: true,
    probe: |start| start.starts_with(COOKIE),
    open,
};

const COOKIE: &[u8] = b"conectix";
const FOOTER: u64 = 512;
const SECTOR: u64 = 512;
/// The largest geometry: it says only that the disk is at least as large.
const MAX_CHS: (u16, u8, u8) = (65535, 16, 255);
/// QEMU's and the format's limit: 2040 GiB.
const MAX_SIZE: u64 = 0xff00_0000 * SECTOR;
const FIXED: u32 = 2;
const DYNAMIC: u32 = 3;
const DIFFERENCING: u32 = 4;
/// Entries that a table can grow by while the disk is open: 2 TiB of the usual blocks.
const MAX_GROWTH: u64 = 1 << 20;
/// Data of blocks begins at a multiple of this, as pages and sectors of disks do.
const ALIGNMENT: u64 = 4096;
/// Where the first block of an empty disk begins: that leaves the table room to grow.
const FIRST_BLOCK: u64 = 64 << 10;
const NONE: u32 = 0xffff_ffff;
/// Larger blocks than anybody makes would make a small image cost much memory.
const MAX_BLOCK: u64 = 256 << 20;

/// The footer, checked.
struct Footer {
    bytes: [u8; 512],
    kind: u32,
    header_offset: u64,
    size: u64,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |field| u32::from_be_bytes(*field))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |field| u64::from_be_bytes(*field))
}

/// The one's complement of the sum of all bytes but the checksum's own four.
fn checksum(bytes: &[u8], at: usize) -> u32 {
    let sum = bytes.iter().enumerate().filter(|(index, _)| !(at..at + 4).contains(index));
    !sum.fold(0u32, |sum, (_, &byte)| sum.wrapping_add(byte.into()))
}

impl Footer {
    /// The copy at the start, or the footer at the end of a fixed disk.
    fn read(file: &BlockNode, calculation: Option<&str>) -> Result<Footer> {
        let failed = |e| Error::io("read the VHD footer", e);
        let mut bytes = [0; 512];
        file.read_or_zero(&mut bytes, 0, Wait::Allowed).map_err(failed)?;
        let at_start = bytes.starts_with(COOKIE);
        if !at_start {
            let Some(at) = file.len().checked_sub(FOOTER) else {
                return Err(Error::corrupt(format!("a VHD has a footer of 512 bytes, the file has {}", file.len())));
            };
            file.read(&mut bytes, at, Wait::Allowed).map_err(failed)?;
            if !bytes.starts_with(COOKIE) || u32_at(&bytes, 60) != FIXED {
                return Err(Error::corrupt(
                    "invalid VPC image: no footer at its start, nor one of a fixed disk at its end",
                ));
            }
        }
        if u32_at(&bytes, 64) != checksum(&bytes, 64) {
            return Err(Error::corrupt("The header checksum of the VHD footer is wrong"));
        }
        let kind = u32_at(&bytes, 60);
        match (kind, at_start) {
            (FIXED, false) | (DYNAMIC | DIFFERENCING, true) => {}
            _ => return Err(Error::corrupt(format!("a VHD of type {kind} does not begin like this one"))),
        }
        let size = size(&bytes, calculation)?;
        if size > MAX_SIZE {
            return Err(Error::unsupported(format!("a VHD has at most {MAX_SIZE} bytes, not {size}")));
        }
        Ok(Footer { bytes, kind, header_offset: u64_at(&bytes, 16), size })
    }
}

impl Footer {
    fn uuid(&self) -> [u8; 16] {
        self.bytes[68..].first_chunk().copied().unwrap_or_default()
    }
}

/// The disk's size: programs that count in cylinders mean the geometry, the others what stands in the footer.
fn size(footer: &[u8; 512], calculation: Option<&str>) -> Result<u64> {
    let chs = (u16::from_be_bytes([footer[56], footer[57]]), footer[58], footer[59]);
    let by_geometry = match calculation {
        None => matches!(&footer[28..32], b"vpc " | b"qemu"),
        Some("chs") => true,
        Some("current_size") => false,
        Some(other) => {
            return Err(Error::invalid(format!(
                "Invalid parameter 'force-size-calc': it is chs or current_size, not '{other}'"
            )));
        }
    };
    let sectors = u64::from(chs.0) * u64::from(chs.1) * u64::from(chs.2);
    let size = if by_geometry && chs != MAX_CHS { sectors * SECTOR } else { u64_at(footer, 48) };
    Ok(size.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX))
}

/// What holds for every disk that gets another size.
fn check_resize(len: u64, preallocation: Preallocation) -> Result<()> {
    if len > MAX_SIZE {
        return Err(Error::unsupported(format!("a VHD has at most {MAX_SIZE} bytes, not {len}")));
    }
    if preallocation != Preallocation::Off {
        return Err(Error::unsupported("VHDs change their size without preallocation only"));
    }
    Ok(())
}

fn open(request: OpenRequest) -> Result<Box<dyn Driver>> {
    let file = request.child("file")?;
    let calculation = match request.options.get("force-size-calc") {
        Some(OptionValue::Str(text)) => Some(text.as_str()),
        _ => None,
    };
    let footer = Footer::read(&file, calculation)?;
    let backing = request.children.get("backing").cloned();
    if backing.is_some() && footer.kind != DIFFERENCING {
        return Err(Error::invalid("'backing' can only be set for differencing VHDs"));
    }
    if footer.kind == FIXED {
        let there = file.len().saturating_sub(FOOTER);
        if footer.size > there {
            return Err(Error::corrupt(format!(
                "the VHD has {} bytes for a guest, its file holds {there}",
                footer.size
            )));
        }
        return Ok(Box::new(Fixed::new(file, &footer)));
    }
    let header = Header::read(&file, &footer)?;
    let survey = header.survey(&file)?;
    let uuid = footer.uuid();
    if footer.kind == DIFFERENCING {
        let is_detached = request.detached.contains("backing");
        let parent = differencing::Parent::read(&file, &header, backing.as_ref(), is_detached)?;
        let blocks = header.open(&file, &footer, backing.clone(), &survey);
        return Ok(Box::new(Differencing::new(blocks, backing, parent, uuid)));
    }
    let room = header.room(&survey);
    Ok(Box::new(Dynamic { blocks: header.open(&file, &footer, None, &survey), room, header_at: header.at, uuid }))
}

/// The dynamic header, checked.
struct Header {
    bytes: [u8; 1024],
    at: u64,
    table_offset: u64,
    entries: u64,
    block_size: u64,
    /// Bytes of the bitmap in front of each block.
    bitmap: u64,
    /// No block begins in front of this.
    reserved: u64,
}

/// What a look at every entry finds.
struct Survey {
    /// Where the first block begins, if there is one.
    first: Option<u64>,
    /// Where the last one ends, or the first one would begin.
    end: u64,
}

impl Header {
    fn read(file: &BlockNode, footer: &Footer) -> Result<Header> {
        let mut header = [0; 1024];
        let at = footer.header_offset;
        if at.checked_add(1024).is_none_or(|end| end > file.len()) {
            return Err(Error::corrupt(format!("the dynamic header at {at:#x} is not within the file")));
        }
        file.read(&mut header, at, Wait::Allowed).map_err(|e| Error::io("read the dynamic header", e))?;
        if !header.starts_with(b"cxsparse") {
            return Err(Error::corrupt("the VHD has no dynamic header where its footer says"));
        }
        if u32_at(&header, 36) != checksum(&header, 36) {
            return Err(Error::corrupt("the checksum of the VHD's dynamic header is wrong"));
        }
        let (table_offset, entries) = (u64_at(&header, 16), u64::from(u32_at(&header, 28)));
        let block_size = u64::from(u32_at(&header, 32));
        if !block_size.is_power_of_two() || !(SECTOR..=MAX_BLOCK).contains(&block_size) {
            return Err(Error::corrupt(format!(
                "Invalid block size {block_size}: a power of two from 512 to {MAX_BLOCK}"
            )));
        }
        if entries * block_size < footer.size {
            return Err(Error::corrupt(format!(
                "Page Allocation Table too small: {entries} blocks of {block_size} bytes for {} bytes",
                footer.size
            )));
        }
        let table_end = table_offset.checked_add((entries * 4).next_multiple_of(SECTOR));
        let table_end = table_end.filter(|&end| end <= file.len());
        let Some(table_end) = table_end.filter(|_| table_offset.is_multiple_of(SECTOR) && table_offset >= FOOTER)
        else {
            return Err(Error::corrupt(format!(
                "the block allocation table at {table_offset:#x} is not within the file"
            )));
        };
        if table_offset < at + 1024 && at < table_end {
            return Err(Error::corrupt(format!(
                "the block allocation table at {table_offset:#x} lies over the dynamic header at {at:#x}"
            )));
        }
        // Bits for the block's sectors, in whole sectors.
        let bitmap = (block_size / SECTOR / 8).max(1).next_multiple_of(SECTOR);
        let reserved = table_end.max(at + 1024);
        Ok(Header { bytes: header, at, table_offset, entries, block_size, bitmap, reserved })
    }

    /// No block may stand in front of the data area or past the end of the file.
    fn survey(&self, file: &BlockNode) -> Result<Survey> {
        const PIECE: u64 = 1 << 20;
        let mut found = Survey { first: None, end: self.reserved };
        let mut piece = vec![0; usize::try_from(PIECE.min(self.entries * 4)).unwrap_or(0)];
        for first in (0..self.entries * 4).step_by(1 << 20) {
            let len = usize::try_from((self.entries * 4 - first).min(PIECE)).unwrap_or(0);
            let read = file.read_or_zero(&mut piece[..len], self.table_offset + first, Wait::Allowed);
            read.map_err(|e| Error::io("read the block allocation table", e))?;
            for entry in piece[..len].as_chunks::<4>().0 {
                let sector = u32::from_be_bytes(*entry);
                if sector == NONE {
                    continue;
                }
                let start = u64::from(sector) * SECTOR;
                let stop = start + self.bitmap + self.block_size;
                if start < self.reserved || stop > file.len() {
                    return Err(Error::corrupt(format!("a block at {start:#x} is not in the file's data area")));
                }
                found.first = Some(found.first.map_or(start, |first: u64| first.min(start)));
                found.end = found.end.max(stop);
            }
        }
        if found.first.is_none() {
            found.end = found.end.max(FIRST_BLOCK);
        }
        Ok(found)
    }

    /// Entries that the table has room for.
    fn room(&self, survey: &Survey) -> u64 {
        let next = if self.at > self.table_offset { self.at } else { u64::MAX };
        let room = survey.first.unwrap_or(survey.end).min(next).saturating_sub(self.table_offset) / 4;
        room.clamp(self.entries, self.entries + MAX_GROWTH)
    }

    fn open(
        &self,
        file: &Arc<BlockNode>,
        footer: &Footer,
        backing: Option<Arc<BlockNode>>,
        survey: &Survey,
    ) -> Blocks<Table> {
        let table = Table {
            file: Arc::clone(file),
            table_offset: self.table_offset,
            block_size: self.block_size,
            bitmap: self.bitmap,
            footer: Mutex::new(footer.bytes),
        };
        Blocks::new(table, Arc::clone(file), backing, footer.size, self.room(survey), survey.end)
    }
}

struct Table {
    file: Arc<BlockNode>,
    table_offset: u64,
    block_size: u64,
    /// Bytes of the bitmap in front of each block.
    bitmap: u64,
    footer: Mutex<[u8; 512]>,
}

impl Table {
    fn footer(&self) -> MutexGuard<'_, [u8; 512]> {
        self.footer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Layout for Table {
    fn block_size(&self) -> u64 {
        self.block_size
    }

    fn lead(&self) -> u64 {
        self.bitmap
    }

    fn chunk_at(&self, chunk: u64) -> Option<u64> {
        Some(self.table_offset + chunk * self.chunk_entries() * 4)
    }

    fn decode(&self, entry: [u8; 4]) -> Place {
        match u32::from_be_bytes(entry) {
            NONE => Place::None,
            sector => Place::At(u64::from(sector) * SECTOR),
        }
    }

    fn encode(&self, place: u64) -> Option<[u8; 4]> {
        u32::try_from(place / SECTOR).ok().filter(|&sector| sector != NONE).map(u32::to_be_bytes)
    }

    fn none(&self) -> [u8; 4] {
        NONE.to_be_bytes()
    }

    fn next_place(&self, end: u64) -> u64 {
        (end + self.bitmap).next_multiple_of(ALIGNMENT) - self.bitmap
    }

    fn file_len(&self, end: u64) -> u64 {
        end + FOOTER
    }

    fn begin_block(&self, place: u64) -> io::Result<()> {
        let bitmap = vec![0xff; usize::try_from(self.bitmap).unwrap_or(0)];
        self.file.write_growing(&bitmap, place, false)
    }

    fn publish(&self, end: u64) -> io::Result<()> {
        let footer = *self.footer();
        self.file.write_growing(&footer, end, false)
    }
}

struct Dynamic {
    blocks: Blocks<Table>,
    /// Entries that the table has room for.
    room: u64,
    /// Where the dynamic header stands.
    header_at: u64,
    uuid: [u8; 16],
}

impl Driver for Dynamic {
    fn len(&self) -> u64 {
        self.blocks.size()
    }

    fn map(&self, offset: u64, len: u64, ask: Ask) -> io::Result<Mapping<'_>> {
        self.blocks.map(offset, len, ask)
    }

    fn prepare_write(&self, offset: u64, len: u64) -> io::Result<Prepared<'_>> {
        self.blocks.prepare_write(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.blocks.write_zeroes(offset, len, flags)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.blocks.discard(offset, len)
    }

    fn bypasses_cache(&self) -> bool {
        self.blocks.file.bypasses_cache()
    }

    fn flush(&self) -> io::Result<()> {
        self.blocks.flush()
    }

    fn resize(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        let now = self.len();
        check_resize(len, preallocation)?;
        if len < now {
            return Err(Error::unsupported("dynamic VHDs do not become smaller; convert the image to a smaller one"));
        }
        let table = &self.blocks.layout;
        let entries = u32::try_from(len.div_ceil(table.block_size)).unwrap_or(u32::MAX);
        if u64::from(entries) > self.room {
            return Err(Error::unsupported(format!(
                "the VHD's block allocation table has room for {} bytes, not {len}: convert the image to a new one",
                self.room * table.block_size
            )));
        }
        if len == now {
            return Ok(());
        }
        let grown = self.blocks.grow(len, |end| {
            // Entries and checksum stand in the header's first sector, which is written whole or not.
            let mut header = [0; 1024];
            self.blocks.file.read(&mut header, self.header_at, Wait::Allowed)?;
            let entries = entries.max(u32_at(&header, 28));
            header[28..32].copy_from_slice(&entries.to_be_bytes());
            let sum = checksum(&header, 36);
            header[36..40].copy_from_slice(&sum.to_be_bytes());
            self.blocks.file.write(&header[..512], self.header_at, false)?;
            self.blocks.file.flush()?;
            let footer = create::resized(&table.footer(), len);
            self.blocks.file.write(&footer, 0, false)?;
            *table.footer() = footer;
            table.publish(end)
        });
        grown.map_err(|e| Error::io("resize the VHD", e))
    }

    fn info(&self) -> Info {
        Info {
            allocated_size: self.blocks.file.info().allocated_size,
            cluster_size: Some(self.blocks.layout.block_size),
            uuid: Some(self.uuid),
            specifics: vec![("subformat", InfoValue::Str("dynamic".into()))],
            ..Info::default()
        }
    }
}
