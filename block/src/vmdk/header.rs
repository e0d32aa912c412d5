// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The header of a sparse extent, "KDMV" or, of ESX, "COWD", and where its tables stand.
//!
//! ```text
//!  0 "KDMV"       4 u32 version    8 u32 flags      12 u64 capacity       20 u64 grain     (all little-endian, in sectors)
//! 28 u64 descriptor   36 u64 its size   44 u32 entries of a table   48 u64 redundant directory   56 u64 directory
//! 64 u64 overhead     72 u8 unclean     73 "\n \r\n"                77 u16 compression
//! ```
//!
//! A stream cannot know where its directory will be: its header says "at the end", and a second header stands 1024 bytes before
//! the end of the file.

use crate::{BlockNode, Error, Result, Wait};

use super::descriptor;

pub const SECTOR: u64 = 512;
pub const MAGIC: &[u8] = b"KDMV";
pub const COWD: &[u8] = b"COWD";
/// Entries of a table of the latter.
const COWD_ENTRIES: u64 = 4096;
/// The smallest grain that a format of this family has, and more than anybody makes (64 KiB is usual).
const GRAINS: std::ops::RangeInclusive<u64> = 4096..=64 << 20;
/// 64 TiB in the usual grains; VMware's limit is 62.
const MAX_TABLES: u64 = 2 << 20;
const MAX_ENTRIES: u64 = 512;
/// The directory is where the footer says.
pub const AT_END: u64 = u64::MAX;
/// Footer marker, footer, end-of-stream marker.
const FOOTER: u64 = 3 * SECTOR;
/// Flags.
pub const NEWLINES: u32 = 1;
pub const REDUNDANT: u32 = 1 << 1;
pub const ZERO_GRAINS: u32 = 1 << 2;
pub const COMPRESSED: u32 = 1 << 16;
pub const MARKERS: u32 = 1 << 17;
pub const DEFLATE: u16 = 1;

/// A header, checked. Places and sizes are bytes.
#[derive(Debug)]
pub struct Header {
    pub version: u32,
    pub capacity: u64,
    pub grain: u64,
    /// Start and size of the embedded descriptor; size 0 if there is none.
    pub descriptor: (u64, u64),
    /// Entries of a grain table.
    pub entries: u64,
    /// Where the tables stand, 0 for one that there is not; and the second copy of each.
    pub tables: Vec<u64>,
    pub copies: Vec<u64>,
    /// Start and size of everything that must not be written by way of a table: header, descriptor, directories.
    pub fixed: Vec<(u64, u64)>,
    /// Where metadata ends that stands in front of the grains.
    pub overhead: u64,
    pub unclean: bool,
    pub zero_grains: bool,
    pub compressed: bool,
    pub markers: bool,
    /// An extent of ESX, without descriptor and second directory.
    pub cowd: bool,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |field| u32::from_le_bytes(*field))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |field| u64::from_le_bytes(*field))
}

impl Header {
    pub fn read(file: &BlockNode) -> Result<Header> {
        let failed = |e| Error::io("read the VMDK header", e);
        let mut bytes = [0; 512];
        if file.len() < SECTOR {
            return Err(Error::corrupt(format!(
                "a sparse VMDK has a header of 512 bytes, the file has {}",
                file.len()
            )));
        }
        file.read(&mut bytes, 0, Wait::Allowed).map_err(failed)?;
        if bytes.starts_with(COWD) {
            return Header::parse_cowd(&bytes, file);
        }
        if !bytes.starts_with(MAGIC) {
            return Err(Error::corrupt("Image not in VMDK format: no sparse extent begins like this"));
        }
        if u64_at(&bytes, 56) == AT_END {
            let at = (file.len() / SECTOR * SECTOR).checked_sub(FOOTER).filter(|&at| at >= SECTOR);
            let mut end = [0; 3 * 512];
            file.read_or_zero(
                &mut end,
                at.ok_or_else(|| Error::corrupt("the VMDK stream has no footer"))?,
                Wait::Allowed,
            )
            .map_err(failed)?;
            let is_marker = |at: usize, kind| u32_at(&end, at + 8) == 0 && u32_at(&end, at + 12) == kind;
            if !is_marker(0, 3) || !end[512..].starts_with(MAGIC) || !is_marker(1024, 0) || u64_at(&end, 1024) != 0 {
                return Err(Error::corrupt("the VMDK stream has no footer at its end: it is cut off"));
            }
            bytes.copy_from_slice(&end[512..1024]);
        }
        Header::parse(&bytes, file)
    }

    fn parse(bytes: &[u8; 512], file: &BlockNode) -> Result<Header> {
        let corrupt = |text: String| Err(Error::corrupt(text));
        let (version, flags) = (u32_at(bytes, 4), u32_at(bytes, 8));
        if !(1..=3).contains(&version) {
            return Err(Error::unsupported(format!("Unsupported VMDK version {version}: there are 1 to 3")));
        }
        if flags & NEWLINES != 0 && &bytes[73..77] != b"\n \r\n" {
            return corrupt("the line ends in the VMDK header were converted: it was copied as text".into());
        }
        let compressed = flags & COMPRESSED != 0;
        let compression = u16::from_le_bytes([bytes[77], bytes[78]]);
        if compressed && compression != DEFLATE {
            return Err(Error::unsupported(format!("Unsupported VMDK compression {compression}: deflate is 1")));
        }
        let bytes_of = |what: &str, sectors: u64| match sectors.checked_mul(SECTOR) {
            Some(bytes) if i64::try_from(bytes).is_ok() => Ok(bytes),
            _ => Err(Error::corrupt(format!("the VMDK's {what} of {sectors} sectors is too large"))),
        };
        let capacity = bytes_of("capacity", u64_at(bytes, 12))?;
        let grain = bytes_of("grain", u64_at(bytes, 20))?;
        if !grain.is_power_of_two() || !GRAINS.contains(&grain) {
            return corrupt(format!("Invalid grain size {grain}: a power of two from 4096 to {}", GRAINS.end()));
        }
        let entries = u64::from(u32_at(bytes, 44));
        if !(1..=MAX_ENTRIES).contains(&entries) {
            return corrupt(format!("L2 table size {entries} is not within 1 to {MAX_ENTRIES}"));
        }
        let overhead = bytes_of("overhead", u64_at(bytes, 64))?;
        if overhead > file.len() {
            return corrupt(format!(
                "File truncated, expecting at least {overhead} bytes; the file has {}",
                file.len()
            ));
        }
        let (at, size) =
            (bytes_of("descriptor offset", u64_at(bytes, 28))?, bytes_of("descriptor", u64_at(bytes, 36))?);
        let embedded = if at == 0 { 0 } else { size };
        if embedded > descriptor::MAX_LEN || at.saturating_add(embedded) > file.len() {
            return corrupt(format!("the descriptor of {size} bytes at {at:#x} is not within the file"));
        }
        if capacity == 0 {
            return Err(Error::unsupported(
                "the VMDK has a capacity of 0: it has no data of its own, and no more is read",
            ));
        }
        let tables = capacity.div_ceil(entries * grain);
        if tables > MAX_TABLES {
            return corrupt(format!("L1 size too big: {tables} tables, most is {MAX_TABLES}"));
        }
        let mut fixed = vec![(0, SECTOR), (at, embedded)];
        let mut directory = |what: &str, sector: u64| {
            let at = bytes_of(what, sector)?;
            fixed.push((at, tables * 4));
            read_directory(file, what, at, tables, entries)
        };
        let primary = directory("grain directory", u64_at(bytes, 56))?;
        let copies = match flags & REDUNDANT {
            0 => Vec::new(),
            _ => directory("redundant grain directory", u64_at(bytes, 48))?,
        };
        Ok(Header {
            version,
            capacity,
            grain,
            descriptor: (at, embedded),
            entries,
            tables: primary,
            copies,
            fixed,
            overhead,
            unclean: bytes[72] != 0,
            zero_grains: flags & ZERO_GRAINS != 0,
            compressed,
            markers: flags & MARKERS != 0,
            cowd: false,
        })
    }

    /// An ESX sparse extent: 4 version (1), 12 capacity, 16 grain, 20 directory, 24 its entries, u32 each, in sectors.
    fn parse_cowd(bytes: &[u8; 512], file: &BlockNode) -> Result<Header> {
        let sectors = |at: usize| u64::from(u32_at(bytes, at)) * SECTOR;
        let (version, capacity, grain, directory) = (u32_at(bytes, 4), sectors(12), sectors(16), sectors(20));
        if version != 1 {
            return Err(Error::unsupported(format!("Unsupported version {version} of an ESX sparse extent: it is 1")));
        }
        if !grain.is_power_of_two() || grain > *GRAINS.end() {
            return Err(Error::corrupt(format!(
                "Invalid grain size {grain}: a power of two from 512 to {}",
                GRAINS.end()
            )));
        }
        let tables = capacity.div_ceil(COWD_ENTRIES * grain);
        let there = u64::from(u32_at(bytes, 24));
        if there < tables {
            return Err(Error::corrupt(format!("the extent's directory has {there} entries, the disk needs {tables}")));
        }
        Ok(Header {
            version,
            capacity,
            grain,
            descriptor: (0, 0),
            entries: COWD_ENTRIES,
            tables: read_directory(file, "grain directory", directory, tables, COWD_ENTRIES)?,
            copies: Vec::new(),
            fixed: vec![(0, SECTOR), (directory, tables * 4)],
            overhead: directory + tables * 4,
            unclean: false,
            zero_grains: false,
            compressed: false,
            markers: false,
            cowd: true,
        })
    }
}

/// Where the tables stand that the directory at byte `at` names.
fn read_directory(file: &BlockNode, what: &str, at: u64, tables: u64, entries: u64) -> Result<Vec<u64>> {
    if at < SECTOR || at.checked_add(tables * 4).is_none_or(|end| end > file.len()) {
        return Err(Error::corrupt(format!("the {what} at {at:#x} is not within the file")));
    }
    let mut bytes = vec![0; usize::try_from(tables * 4).unwrap_or(0)];
    file.read(&mut bytes, at, Wait::Allowed).map_err(|e| Error::io(&format!("read the {what}"), e))?;
    let places: Vec<u64> =
        bytes.as_chunks::<4>().0.iter().map(|entry| u64::from(u32::from_le_bytes(*entry)) * SECTOR).collect();
    match places.iter().find(|&&place| place + entries * 4 > file.len()) {
        Some(place) => Err(Error::corrupt(format!("the {what} names a table at {place:#x}, past the end of the file"))),
        None => Ok(places),
    }
}
