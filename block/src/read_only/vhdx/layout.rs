// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Headers, regions and metadata of a VHDX ([MS-VHDX] 2.2 and 2.6), checked.

use super::log::Replayed;
use crate::read_only::{u32_le, u64_le};
use crate::{BlockNode, Error, Result, Wait};

pub const MIB: u64 = 1 << 20;
const KIB: u64 = 1 << 10;
pub const HEADERS: [u64; 2] = [64 * KIB, 128 * KIB];
const REGION_TABLES: [u64; 2] = [192 * KIB, 256 * KIB];
const HEADER: usize = 4096;
const REGION_TABLE: usize = 64 << 10;
/// 2.2.3: entries of a region table, and 2.6.1.1: of the metadata table.
const MAX_ENTRIES: u32 = 2047;
/// 2.6.2.2: the largest disk.
const MAX_SIZE: u64 = 64 << 40;
/// 2.2.2: the log's length is a number of MiB. More than this, no writer makes.
const MAX_LOG: u64 = 1 << 30;

type Guid = [u8; 16];
/// As they stand in the file.
const BLOCK_TABLE: Guid = guid(0x2dc2_7766, 0xf623, 0x4200, 0x9d64_115e_9bfd_4a08);
const METADATA: Guid = guid(0x8b7c_a206, 0x4790, 0x4b9a, 0xb8fe_575f_050f_886e);
const FILE_PARAMETERS: Guid = guid(0xcaa1_6737, 0xfa36, 0x4d43, 0xb3b6_33f0_aa44_e76b);
const DISK_SIZE: Guid = guid(0x2fa5_4224, 0xcd1b, 0x4876, 0xb211_5dbe_d83b_f4b8);
const DISK_ID: Guid = guid(0xbeca_12ab, 0xb2e6, 0x4523, 0x93ef_c309_e000_c746);
const LOGICAL_SECTOR: Guid = guid(0x8141_bf1d, 0xa96f, 0x4709, 0xba47_f233_a8fa_ab5f);
const PHYSICAL_SECTOR: Guid = guid(0xcda3_48c7, 0x445d, 0x4471, 0x9cc9_e988_5251_c556);
const PARENT_LOCATOR: Guid = guid(0xa8d3_5f2d, 0xb30b, 0x454d, 0xabf7_d3d8_4834_ab0c);

/// The first three parts are little-endian, the rest is bytes in order.
const fn guid(a: u32, b: u16, c: u16, rest: u64) -> Guid {
    let ([a0, a1, a2, a3], [b0, b1], [c0, c1]) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    let [d0, d1, d2, d3, d4, d5, d6, d7] = rest.to_be_bytes();
    [a0, a1, a2, a3, b0, b1, c0, c1, d0, d1, d2, d3, d4, d5, d6, d7]
}

/// CRC-32C (Castagnoli) of `bytes`, with the four at `hole` taken for zeroes.
pub fn crc(bytes: &[u8], hole: usize) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let (mut at, mut number) = (0, 0u32);
        while at < table.len() {
            let (mut value, mut bit) = (number, 0);
            while bit < 8 {
                value = if value & 1 == 1 { value >> 1 ^ 0x82f6_3b78 } else { value >> 1 };
                bit += 1;
            }
            table[at] = value;
            (at, number) = (at + 1, number + 1);
        }
        table
    };
    let step = |crc: u32, (at, &byte): (usize, &u8)| {
        let byte = if (hole..hole + 4).contains(&at) { 0 } else { byte };
        let [low, ..] = crc.to_le_bytes();
        crc >> 8 ^ TABLE[usize::from(low ^ byte)]
    };
    !bytes.iter().enumerate().fold(!0, step)
}

/// Bytes of the file that belong to something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    pub offset: u64,
    pub len: u64,
}

impl Region {
    pub fn end(self) -> u64 {
        self.offset + self.len
    }
}

/// The header in force: the valid one with the greater sequence number.
pub struct Header {
    pub log_guid: Guid,
    pub log: Region,
}

impl Header {
    pub fn read(file: &BlockNode) -> Result<Header> {
        let mut best: Option<(u64, Vec<u8>)> = None;
        for at in HEADERS {
            let mut bytes = vec![0; HEADER];
            file.read_or_zero(&mut bytes, at, Wait::Allowed).map_err(|e| Error::io("read a VHDX header", e))?;
            let is_valid = bytes.starts_with(b"head") && u32_le(&bytes, 4) == crc(&bytes, 4);
            let sequence = u64_le(&bytes, 8);
            if is_valid && best.as_ref().is_none_or(|(other, _)| sequence > *other) {
                best = Some((sequence, bytes));
            }
        }
        let Some((_, bytes)) = best else {
            return Err(Error::corrupt("no VHDX header is valid: both have a wrong signature or checksum"));
        };
        let version = bytes[66];
        if version != 1 || bytes[67] != 0 {
            return Err(Error::unsupported(format!("a VHDX of version {version} is not known, only 1")));
        }
        let log = Region { offset: u64_le(&bytes, 72), len: u32_le(&bytes, 68).into() };
        if !log.offset.is_multiple_of(MIB) || !log.len.is_multiple_of(MIB) || log.offset < MIB || log.len > MAX_LOG {
            return Err(Error::corrupt(format!("the VHDX log of {} bytes at {} cannot be there", log.len, log.offset)));
        }
        let log_guid = bytes[48..].first_chunk().copied().unwrap_or_default();
        Ok(Header { log_guid, log })
    }
}

/// Where everything is.
pub struct Layout {
    pub table: Region,
    pub metadata: Region,
    /// Bytes of a block.
    pub block: u64,
    /// Blocks that a sector bitmap covers.
    pub per_bitmap: u64,
    /// Bytes of the disk.
    pub size: u64,
}

impl Layout {
    pub fn read(file: &Replayed) -> Result<Layout> {
        let (table, metadata) = regions(file)?;
        let Items { block, has_parent, size, sector } = Items::read(file, metadata)?;
        if has_parent {
            return Err(Error::unsupported("this VHDX is a differencing disk: merge it into its parent first"));
        }
        if !block.is_power_of_two() || !(MIB..=256 * MIB).contains(&block) {
            return Err(Error::corrupt(format!("a VHDX block of {block} bytes is no power of two from 1 to 256 MiB")));
        }
        if sector != 512 && sector != 4096 {
            return Err(Error::corrupt(format!("a VHDX has sectors of 512 or 4096 bytes, not {sector}")));
        }
        if size == 0 || size > MAX_SIZE || !size.is_multiple_of(sector) {
            return Err(Error::corrupt(format!("a VHDX disk of {size} bytes is no multiple of {sector} up to 64 TiB")));
        }
        let per_bitmap = (sector << 23) / block;
        let blocks = size.div_ceil(block);
        let entries = blocks + (blocks - 1) / per_bitmap;
        if entries * 8 > table.len {
            return Err(Error::corrupt(format!("the VHDX block table of {} bytes is too small", table.len)));
        }
        Ok(Layout { table, metadata, block, per_bitmap, size })
    }
}

/// The block table's region and the metadata's.
fn regions(file: &Replayed) -> Result<(Region, Region)> {
    let mut bytes = vec![0; REGION_TABLE];
    let mut read = |at| {
        file.read(&mut bytes, at, Wait::Allowed).map_err(|e| Error::io("read the VHDX region table", e))?;
        let is_valid = bytes.starts_with(b"regi") && u32_le(&bytes, 4) == crc(&bytes, 4);
        Ok(is_valid.then(|| bytes.clone()))
    };
    let found = match read(REGION_TABLES[0])? {
        Some(found) => Some(found),
        None => read(REGION_TABLES[1])?,
    };
    let Some(bytes) = found else {
        return Err(Error::corrupt("no VHDX region table is valid: both have a wrong signature or checksum"));
    };
    let count = u32_le(&bytes, 8);
    if count > MAX_ENTRIES {
        return Err(Error::corrupt(format!("a VHDX region table of {count} entries, at most {MAX_ENTRIES} can be")));
    }
    let (mut table, mut metadata, mut taken) = (None, None, Vec::new());
    for entry in bytes[16..].chunks_exact(32).take(usize::try_from(count).unwrap_or(0)) {
        let region = Region { offset: u64_le(entry, 16), len: u32_le(entry, 24).into() };
        let is_placed = region.offset >= MIB
            && region.offset.is_multiple_of(MIB)
            && region.len.is_multiple_of(MIB)
            && region.offset.checked_add(region.len).is_some_and(|end| end <= file.len());
        let overlaps = |other: &Region| region.offset < other.end() && other.offset < region.end();
        if !is_placed || taken.iter().any(overlaps) || overlaps(&file.log()) {
            return Err(Error::corrupt(format!(
                "a VHDX region of {} bytes at {} is not in the file or meets another",
                region.len, region.offset
            )));
        }
        taken.push(region);
        let place = match entry.first_chunk::<16>() {
            Some(&BLOCK_TABLE) => &mut table,
            Some(&METADATA) => &mut metadata,
            _ if u32_le(entry, 28) & 1 == 1 => {
                return Err(Error::unsupported("this VHDX needs a region that is not known here"));
            }
            _ => continue,
        };
        if place.replace(region).is_some() {
            return Err(Error::corrupt("the VHDX region table names a region twice"));
        }
    }
    table.zip(metadata).ok_or_else(|| Error::corrupt("this VHDX has no block table or no metadata"))
}

/// What the metadata say.
struct Items {
    block: u64,
    has_parent: bool,
    size: u64,
    sector: u64,
}

impl Items {
    fn read(file: &Replayed, region: Region) -> Result<Items> {
        let failed = |e| Error::io("read the VHDX metadata", e);
        let mut table = vec![0; 64 << 10];
        file.read(&mut table, region.offset, Wait::Allowed).map_err(failed)?;
        let count = u32::from(u16::from_le_bytes([table[10], table[11]]));
        if !table.starts_with(b"metadata") || count > MAX_ENTRIES {
            return Err(Error::corrupt("the VHDX metadata have a wrong signature or too many entries"));
        }
        let (mut parameters, mut size, mut sector) = (None, None, None);
        for entry in table[32..].chunks_exact(32).take(usize::try_from(count).unwrap_or(0)) {
            let (at, len) = (u64::from(u32_le(entry, 16)), u64::from(u32_le(entry, 20)));
            let is_required = u32_le(entry, 24) & 4 != 0;
            let (wanted, place) = match entry.first_chunk::<16>() {
                Some(&FILE_PARAMETERS) => (8, &mut parameters),
                Some(&DISK_SIZE) => (8, &mut size),
                Some(&LOGICAL_SECTOR) => (4, &mut sector),
                Some(&(DISK_ID | PHYSICAL_SECTOR | PARENT_LOCATOR)) => continue,
                _ if is_required => {
                    return Err(Error::unsupported("this VHDX needs a metadata item that is not known here"));
                }
                _ => continue,
            };
            if len < wanted || at < table.len() as u64 || at + len > region.len {
                return Err(Error::corrupt(format!(
                    "a VHDX metadata item of {len} bytes at {at} is not in its region"
                )));
            }
            let mut bytes = [0; 8];
            let bytes_wanted = usize::try_from(wanted).unwrap_or(8);
            file.read(&mut bytes[..bytes_wanted], region.offset + at, Wait::Allowed).map_err(failed)?;
            if place.replace(bytes).is_some() {
                return Err(Error::corrupt("the VHDX metadata have an item twice"));
            }
        }
        let (Some(parameters), Some(size), Some(sector)) = (parameters, size, sector) else {
            return Err(Error::corrupt("the VHDX metadata lack the block size, the disk size or the sector size"));
        };
        Ok(Items {
            block: u32_le(&parameters, 0).into(),
            has_parent: u32_le(&parameters, 4) & 2 != 0,
            size: u64::from_le_bytes(size),
            sector: u32_le(&sector, 0).into(),
        })
    }
}
