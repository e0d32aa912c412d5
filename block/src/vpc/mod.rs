// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver `vpc`: Virtual PC's and Hyper-V's VHD, fixed and dynamic (Virtual Hard Disk Image Format Specification 1.0).
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
//! then its data; in a disk without parent the bitmap is all ones. The footer moves with the end of the file, and until the next
//! flush the copy at the start speaks for it.

pub mod create;

use std::io;
use std::sync::Arc;

use crate::blocks::{Blocks, Layout, Place};
use crate::claims::Writes;
use crate::driver::{
    Ask, ChildSpec, Driver, DriverEntry, Info, InfoValue, Mapping, OpenRequest, OptionKind, OptionSpec, OptionValue,
    Prepared, Target, ZeroFlags,
};
use crate::{BlockNode, Error, Result, Wait};

pub(crate) const ENTRY: DriverEntry = DriverEntry {
    name: "vpc",
    summary: "Virtual PC's and Hyper-V's VHD",
    children: &[ChildSpec { name: "file", required: true, writes: Writes::Metadata }],
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
            (FIXED, false) | (DYNAMIC, true) => {}
            (4, _) => {
                return Err(Error::unsupported(
                    "this is a differencing VHD, and this version reads none: merge it into its parent first",
                ));
            }
            _ => return Err(Error::corrupt(format!("a VHD of type {kind} does not begin like this one"))),
        }
        let size = size(&bytes, calculation)?;
        if size > MAX_SIZE {
            return Err(Error::unsupported(format!("a VHD has at most {MAX_SIZE} bytes, not {size}")));
        }
        Ok(Footer { bytes, kind, header_offset: u64_at(&bytes, 16), size })
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

fn open(request: OpenRequest) -> Result<Box<dyn Driver>> {
    let file = request.child("file")?;
    let calculation = match request.options.get("force-size-calc") {
        Some(OptionValue::Str(text)) => Some(text.as_str()),
        _ => None,
    };
    let footer = Footer::read(&file, calculation)?;
    if footer.kind == FIXED {
        let there = file.len().saturating_sub(FOOTER);
        if footer.size > there {
            return Err(Error::corrupt(format!(
                "the VHD has {} bytes for a guest, its file holds {there}",
                footer.size
            )));
        }
        return Ok(Box::new(Fixed { file, size: footer.size }));
    }
    Ok(Box::new(Dynamic(open_dynamic(file, &footer)?)))
}

fn open_dynamic(file: Arc<BlockNode>, footer: &Footer) -> Result<Blocks<Table>> {
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
        return Err(Error::corrupt(format!("Invalid block size {block_size}: a power of two from 512 to {MAX_BLOCK}")));
    }
    if entries * block_size < footer.size {
        return Err(Error::corrupt(format!(
            "Page Allocation Table too small: {entries} blocks of {block_size} bytes for {} bytes",
            footer.size
        )));
    }
    let table_end = table_offset.checked_add((entries * 4).next_multiple_of(SECTOR));
    if !table_offset.is_multiple_of(SECTOR) || table_offset < FOOTER || table_end.is_none_or(|end| end > file.len()) {
        return Err(Error::corrupt(format!("the block allocation table at {table_offset:#x} is not within the file")));
    }
    // Bits for the block's sectors, in whole sectors.
    let bitmap = (block_size / SECTOR / 8).max(1).next_multiple_of(SECTOR);
    let table = Table { file: Arc::clone(&file), table_offset, block_size, bitmap, footer: footer.bytes };
    let reserved = table_end.unwrap_or(0).max(at + 1024);
    let end = table.survey(entries, reserved)?;
    Ok(Blocks::new(table, file, None, footer.size, end))
}

struct Table {
    file: Arc<BlockNode>,
    table_offset: u64,
    block_size: u64,
    /// Bytes of the bitmap in front of each block.
    bitmap: u64,
    footer: [u8; 512],
}

impl Table {
    /// Where the last block ends, at least `reserved`; no block may stand in front of that or past the end of the file.
    fn survey(&self, entries: u64, reserved: u64) -> Result<u64> {
        const PIECE: u64 = 1 << 20;
        let mut end = reserved;
        let mut piece = vec![0; usize::try_from(PIECE.min(entries * 4)).unwrap_or(0)];
        for first in (0..entries * 4).step_by(1 << 20) {
            let len = usize::try_from((entries * 4 - first).min(PIECE)).unwrap_or(0);
            let read = self.file.read_or_zero(&mut piece[..len], self.table_offset + first, Wait::Allowed);
            read.map_err(|e| Error::io("read the block allocation table", e))?;
            for entry in piece[..len].as_chunks::<4>().0 {
                let sector = u32::from_be_bytes(*entry);
                if sector == NONE {
                    continue;
                }
                let (start, stop) =
                    (u64::from(sector) * SECTOR, u64::from(sector) * SECTOR + self.bitmap + self.block_size);
                if start < reserved || stop > self.file.len() {
                    return Err(Error::corrupt(format!("a block at {start:#x} is not in the file's data area")));
                }
                end = end.max(stop);
            }
        }
        Ok(end)
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

    fn begin_block(&self, place: u64) -> io::Result<()> {
        let bitmap = vec![0xff; usize::try_from(self.bitmap).unwrap_or(0)];
        self.file.write_growing(&bitmap, place, false)
    }

    fn publish(&self, end: u64) -> io::Result<()> {
        self.file.write_growing(&self.footer, end, false)
    }
}

struct Dynamic(Blocks<Table>);

impl Driver for Dynamic {
    fn len(&self) -> u64 {
        self.0.size
    }

    fn map(&self, offset: u64, len: u64, ask: Ask) -> io::Result<Mapping<'_>> {
        self.0.map(offset, len, ask)
    }

    fn prepare_write(&self, offset: u64, len: u64) -> io::Result<Prepared<'_>> {
        self.0.prepare_write(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.0.write_zeroes(offset, len, flags)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.discard(offset, len)
    }

    fn bypasses_cache(&self) -> bool {
        self.0.file.bypasses_cache()
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }

    fn info(&self) -> Info {
        Info {
            allocated_size: self.0.file.info().allocated_size,
            cluster_size: Some(self.0.layout.block_size),
            specifics: vec![("subformat", InfoValue::Str("dynamic".into()))],
            ..Info::default()
        }
    }
}

/// A fixed disk: the guest's bytes, then the footer.
struct Fixed {
    file: Arc<BlockNode>,
    size: u64,
}

impl Driver for Fixed {
    fn len(&self) -> u64 {
        self.size
    }

    fn map(&self, offset: u64, len: u64, _: Ask) -> io::Result<Mapping<'_>> {
        Ok(Mapping::fixed(Target::Child { node: &self.file, offset }, len))
    }

    fn prepare_write(&self, offset: u64, len: u64) -> io::Result<Prepared<'_>> {
        Ok(Prepared::in_place(Target::Data { node: &self.file, offset }, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.file.write_zeroes(offset, len, flags, false)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.discard(offset, len)
    }

    fn bypasses_cache(&self) -> bool {
        self.file.bypasses_cache()
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    fn info(&self) -> Info {
        Info {
            allocated_size: self.file.info().allocated_size,
            specifics: vec![("subformat", InfoValue::Str("fixed".into()))],
            ..Info::default()
        }
    }
}
