// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bitmap directory and the header extension that names it (qcow2.txt, "Bitmaps extension" and "Bitmap directory").
//!
//! ```text
//! extension   0 u32 bitmaps   4 u32 0   8 u64 directory's bytes   16 u64 its offset
//! entry       0 u64 table     8 u32 its entries   12 u32 flags   16 u8 type, 1   17 u8 granularity bits
//!            18 u16 name     20 u32 extra data    24 extra data, name, padded to 8
//! ```

use std::collections::BTreeSet;

use super::entry::Rules;
use crate::{Error, Result};

/// Flags of an entry.
pub const IN_USE: u32 = 1 << 0;
pub const AUTO: u32 = 1 << 1;
const EXTRA_COMPATIBLE: u32 = 1 << 2;

/// Most bitmaps, and bytes of a name; QEMU's limits.
pub const MAX_BITMAPS: usize = 65535;
pub const MAX_NAME: usize = 1023;
/// Most bytes of a directory.
pub const MAX_DIRECTORY: u64 = 64 << 20;
/// Most bytes of one bitmap's content.
pub const MAX_CONTENT: u64 = 512 << 20;
/// Bytes in front of an entry's extra data, and where its flags stand.
const FIXED: usize = 24;
pub const AT_FLAGS: u64 = 12;

/// An entry of the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub table: u64,
    /// Entries of its table.
    pub entries: u32,
    pub flags: u32,
    pub granularity_bits: u32,
    pub name: String,
}

impl Entry {
    /// Bytes that it takes.
    pub fn len(&self) -> u64 {
        (FIXED + self.name.len()).next_multiple_of(8) as u64
    }
}

/// Where a directory is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    pub bitmaps: u32,
    pub len: u64,
    pub offset: u64,
}

impl Directory {
    /// What the extension's data says.
    ///
    /// # Errors
    /// `Corrupt`, in QEMU's words.
    pub fn parse(data: &[u8], rules: Rules) -> Result<Directory> {
        let corrupt = |text: String| Err(Error::corrupt(format!("bitmaps_ext: {text}")));
        let Some(data) = data.first_chunk::<24>().filter(|_| data.len() == 24) else {
            return corrupt("Invalid extension length".into());
        };
        let found = Directory { bitmaps: u32_at(data, 0), len: u64_at(data, 8), offset: u64_at(data, 16) };
        if u32_at(data, 4) != 0 {
            return corrupt("Reserved field is not zero".into());
        }
        if found.bitmaps == 0 || found.len == 0 {
            return corrupt("found bitmaps extension with zero bitmaps".into());
        }
        if usize::try_from(found.bitmaps).is_ok_and(|bitmaps| bitmaps > MAX_BITMAPS) {
            return corrupt(format!(
                "image has {} bitmaps, exceeding the QEMU supported maximum of 65535",
                found.bitmaps
            ));
        }
        if found.len > MAX_DIRECTORY {
            return corrupt(format!(
                "bitmap directory size ({}) exceeds the maximum supported size ({MAX_DIRECTORY})",
                found.len
            ));
        }
        let ends = found.offset.checked_add(found.len).is_some_and(|end| i64::try_from(end).is_ok());
        if !found.offset.is_multiple_of(rules.cluster_size()) || !ends {
            return corrupt("invalid bitmap directory offset".into());
        }
        Ok(found)
    }

    /// The extension's data.
    pub fn data(self) -> [u8; 24] {
        let mut data = [0; 24];
        data[..4].copy_from_slice(&self.bitmaps.to_be_bytes());
        data[8..16].copy_from_slice(&self.len.to_be_bytes());
        data[16..].copy_from_slice(&self.offset.to_be_bytes());
        data
    }
}

/// The entries of a directory for a disk of `size` bytes.
///
/// # Errors
/// `Corrupt` for one that breaks the rules.
pub fn parse(mut rest: &[u8], count: u32, rules: Rules, size: u64) -> Result<Vec<Entry>> {
    let mut found = Vec::new();
    let mut names = BTreeSet::new();
    for index in 0..count {
        let broken = || Error::corrupt(format!("Broken bitmap directory: bitmap {index} of {count}"));
        let fixed = rest.first_chunk::<FIXED>().ok_or_else(broken)?;
        let (name_len, extra) = (usize::from(u16::from_be_bytes([fixed[18], fixed[19]])), u32_at(fixed, 20));
        if extra != 0 {
            return Err(Error::unsupported(format!("Bitmap extra data is not supported: bitmap {index} has some")));
        }
        let name = rest.get(FIXED..FIXED + name_len).ok_or_else(broken)?;
        let name = String::from_utf8(name.to_vec()).map_err(|_| broken())?;
        let entry = Entry {
            table: u64_at(fixed, 0),
            entries: u32_at(fixed, 8),
            flags: u32_at(fixed, 12),
            granularity_bits: u32::from(fixed[17]),
            name,
        };
        let content = u64::from(entry.entries) << rules.cluster_bits;
        let is_sound = entry.entries > 0
            && content <= MAX_CONTENT
            && entry.table.is_multiple_of(rules.cluster_size())
            && (1..1 << 56).contains(&entry.table)
            && (9..=31).contains(&entry.granularity_bits)
            && fixed[16] == 1
            && entry.flags & !(IN_USE | AUTO | EXTRA_COMPATIBLE) == 0
            && (1..=MAX_NAME).contains(&name_len);
        // One in use was perhaps left behind by a disk of another size.
        let is_long_enough =
            || entry.flags & IN_USE != 0 || size.div_ceil(1 << entry.granularity_bits).div_ceil(8) <= content;
        if !(is_sound && is_long_enough() && names.insert(entry.name.clone())) {
            let name = entry.name.escape_debug();
            return Err(Error::corrupt(format!("Bitmap '{name}' doesn't satisfy the constraints")));
        }
        rest = rest.get(usize::try_from(entry.len()).unwrap_or(usize::MAX)..).unwrap_or_default();
        found.push(entry);
    }
    Ok(found)
}

/// The directory as it stands in the image.
pub fn bytes(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for Entry { table, entries, flags, granularity_bits, name } in entries {
        bytes.extend(table.to_be_bytes());
        bytes.extend(entries.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
        bytes.extend([1, u8::try_from(*granularity_bits).unwrap_or(0)]);
        bytes.extend(u16::try_from(name.len()).unwrap_or(u16::MAX).to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |field| u32::from_be_bytes(*field))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |field| u64::from_be_bytes(*field))
}
