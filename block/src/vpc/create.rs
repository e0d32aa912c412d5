// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Making a VHD, and the rule by which programs that count in cylinders size it: without `force_size` a disk gets as large as a
//! geometry can say.

use super::{COOKIE, DYNAMIC, FIXED, FOOTER, MAX_CHS, MAX_SIZE, SECTOR, checksum};
use crate::drivers::{OptionKind, OptionSpec, OptionValue};
use crate::formats::{CreateRequest, random};
use crate::{Error, Preallocation, Result};

/// QEMU's options, with its names.
pub const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "force_size",
        kind: OptionKind::Bool,
        summary: "exactly the size given; else it is rounded up to what a geometry can say",
    },
    OptionSpec { name: "subformat", kind: OptionKind::Str, summary: "dynamic (default) or fixed" },
];

/// Bytes of a block, the format's default.
const BLOCK: u64 = 2 << 20;
const HEADER_OFFSET: u64 = 512;
const TABLE_OFFSET: u64 = 1536;
/// Midnight of 2000-01-01, from which the format counts, in seconds of Unix.
const EPOCH: u64 = 946_684_800;

/// See [`crate::create`].
pub fn create(request: &CreateRequest) -> Result<()> {
    let kind = match request.options.get("subformat") {
        Some(OptionValue::Str(kind)) if kind == "fixed" => FIXED,
        Some(OptionValue::Str(kind)) if kind != "dynamic" => {
            return Err(Error::invalid(format!("Invalid subformat '{}'", kind.escape_debug())));
        }
        _ => DYNAMIC,
    };
    let is_forced = request.options.get("force_size") == Some(&OptionValue::Bool(true));
    let sectors = request.size.div_ceil(SECTOR);
    let (chs, sectors) = if is_forced { (MAX_CHS, sectors) } else { geometry_for(sectors) };
    let size = sectors.checked_mul(SECTOR).filter(|&size| size <= MAX_SIZE).ok_or_else(|| {
        Error::unsupported(if is_forced {
            "The requested disk size is too large: a VHD has at most 2040 GiB".to_owned()
        } else {
            format!("Disk size is too large, max size is 2040 GiB, not {} bytes", request.size)
        })
    })?;
    let footer = footer(kind, size, chs, is_forced)?;
    let file = &request.file;
    let failed = |e| Error::io("write the VHD", e);
    file.resize(0, Preallocation::Off)?;
    if kind == FIXED {
        file.resize(size + FOOTER, Preallocation::Off)?;
        file.write_growing(&footer, size, false).map_err(failed)?;
        return file.flush().map_err(failed);
    }
    let entries = size.div_ceil(BLOCK);
    let table = (entries * 4).next_multiple_of(SECTOR);
    file.write_growing(&header(entries), HEADER_OFFSET, false).map_err(failed)?;
    let table_bytes = vec![0xff; usize::try_from(table).unwrap_or(0)];
    file.write_growing(&table_bytes, TABLE_OFFSET, false).map_err(failed)?;
    file.write_growing(&footer, TABLE_OFFSET + table, false).map_err(failed)?;
    file.flush().map_err(failed)?;
    // Until the copy at the start is there, there is no image.
    file.write_growing(&footer, 0, false).map_err(failed)?;
    file.flush().map_err(failed)
}

/// The smallest geometry that has `sectors`, and how many it has. The largest one stands for every larger disk.
fn geometry_for(sectors: u64) -> ((u16, u8, u8), u64) {
    let count =
        |(cylinders, heads, sectors): (u16, u8, u8)| u64::from(cylinders) * u64::from(heads) * u64::from(sectors);
    let mut asked = sectors;
    loop {
        let chs = geometry(asked);
        match count(chs) {
            _ if chs == MAX_CHS => return (chs, sectors),
            has if has >= sectors => return (chs, has),
            // A few steps: what a geometry leaves out is less than one of its cylinders.
            _ => asked += 1,
        }
    }
}

/// The geometry of the format's specification ("CHS Calculation"): perhaps of fewer sectors, never of more.
pub fn geometry(sectors: u64) -> (u16, u8, u8) {
    let sectors = sectors.min(65535 * 16 * 255);
    let (heads, per_track, tracks) = if sectors >= 65535 * 16 * 63 {
        (16, 255, sectors / 255)
    } else {
        let tracks = sectors / 17;
        let heads = tracks.div_ceil(1024).max(4);
        if heads <= 16 && tracks < heads * 1024 {
            (heads, 17, tracks)
        } else if sectors / 31 < 16 * 1024 {
            (16, 31, sectors / 31)
        } else {
            (16, 63, sectors / 63)
        }
    };
    let narrow = |number: u64| u8::try_from(number).unwrap_or(u8::MAX);
    (u16::try_from(tracks / heads).unwrap_or(u16::MAX), narrow(heads), narrow(per_track))
}

fn footer(kind: u32, size: u64, chs: (u16, u8, u8), is_forced: bool) -> Result<[u8; 512]> {
    let mut footer = [0; 512];
    let mut put = |at: usize, bytes: &[u8]| footer[at..at + bytes.len()].copy_from_slice(bytes);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    put(0, COOKIE);
    put(8, &2u32.to_be_bytes());
    put(12, &0x10000u32.to_be_bytes());
    put(16, &if kind == FIXED { u64::MAX } else { HEADER_OFFSET }.to_be_bytes());
    put(24, &u32::try_from(now.saturating_sub(EPOCH)).unwrap_or(u32::MAX).to_be_bytes());
    // QEMU's names for its two ways to count: readers go by them.
    put(28, if is_forced { b"qem2" } else { b"qemu" });
    put(32, &[0, 1, 0, 0]);
    put(36, b"Wi2k");
    put(40, &size.to_be_bytes());
    put(48, &size.to_be_bytes());
    put(56, &chs.0.to_be_bytes());
    put(58, &[chs.1, chs.2]);
    put(60, &kind.to_be_bytes());
    put(68, &random::<16>()?);
    let sum = checksum(&footer, 64);
    footer[64..68].copy_from_slice(&sum.to_be_bytes());
    Ok(footer)
}

/// The footer of a disk that has `size` bytes from now on. Where its creator counts in cylinders and no geometry has the size, it
/// says that the bytes count.
pub fn resized(footer: &[u8; 512], size: u64) -> [u8; 512] {
    let mut footer = *footer;
    let (chs, has) = geometry_for(size / SECTOR);
    let by_geometry = matches!(&footer[28..32], b"vpc " | b"qemu");
    let chs = if has * SECTOR == size { chs } else { MAX_CHS };
    if by_geometry && chs == MAX_CHS {
        footer[28..32].copy_from_slice(b"qem2");
    }
    footer[48..56].copy_from_slice(&size.to_be_bytes());
    footer[56..58].copy_from_slice(&chs.0.to_be_bytes());
    footer[58..60].copy_from_slice(&[chs.1, chs.2]);
    let sum = checksum(&footer, 64);
    footer[64..68].copy_from_slice(&sum.to_be_bytes());
    footer
}

fn header(entries: u64) -> [u8; 1024] {
    let mut header = [0; 1024];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"cxsparse");
    put(8, &[0xff; 8]);
    put(16, &TABLE_OFFSET.to_be_bytes());
    put(24, &0x10000u32.to_be_bytes());
    put(28, &u32::try_from(entries).unwrap_or(u32::MAX).to_be_bytes());
    put(32, &(2u32 << 20).to_be_bytes());
    let sum = checksum(&header, 36);
    header[36..40].copy_from_slice(&sum.to_be_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_geometry_has_the_size_that_was_asked_for_or_more() {
        for sectors in (0..70_000_000).step_by(12_345).chain([0, 1, 67, 68, 20480, 65535 * 16 * 63]) {
            let (chs, has) = geometry_for(sectors);
            assert!(has >= sectors, "{sectors}: {chs:?}");
            assert!(has - sectors <= 16 * 255, "{sectors}: {chs:?} has {has}");
        }
        assert_eq!(geometry_for(20480), ((302, 4, 17), 20536));
    }

    #[test]
    fn the_largest_geometry_stands_for_every_larger_disk() {
        for sectors in [65535 * 16 * 255, 65535 * 16 * 255 + 1, 0xff00_0000] {
            assert_eq!(geometry_for(sectors), (MAX_CHS, sectors));
        }
    }
}
