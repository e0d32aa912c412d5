// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Making a VDI image: header, map, and for a static one all blocks in order. The data area begins at a whole MiB, so that
//! blocks of the image are blocks of the host's file system; that also leaves the map room to grow. The header's first sector
//! comes last: until then there is no image.

use super::{BLOCK, HEADER, MAX_BLOCKS, SIGNATURE, STATIC, VERSION};
use crate::drivers::{OptionKind, OptionSpec, OptionValue};
use crate::formats::{CreateRequest, preallocation_named, random};
use crate::{Error, Preallocation, Result};

/// QEMU's options, with its names.
pub const OPTIONS: &[OptionSpec] = &[
    OptionSpec { name: "preallocation", kind: OptionKind::Str, summary: "off or metadata; metadata means static" },
    OptionSpec { name: "static", kind: OptionKind::Bool, summary: "every block has its place from the beginning" },
];

const DYNAMIC: u32 = 1;
/// Version 1.1's header without what VirtualBox added later.
const HEADER_SIZE: u32 = 0x180;
const MAP_OFFSET: u64 = 512;
const TEXT: &[u8] = b"<<< Doorless Virtual Disk Image >>>\n";

/// See [`crate::create`].
pub fn create(request: &CreateRequest) -> Result<()> {
    let is_static = match request.options.get("preallocation") {
        Some(OptionValue::Str(mode)) => match preallocation_named(mode)? {
            Preallocation::Off => false,
            Preallocation::Metadata => true,
            Preallocation::Allocate | Preallocation::Full => {
                return Err(Error::unsupported(format!("Preallocation mode '{mode}' is not supported")));
            }
        },
        _ => request.options.get("static") == Some(&OptionValue::Bool(true)),
    };
    let most = u64::from(MAX_BLOCKS) * BLOCK;
    let size = request.size;
    let blocks = u32::try_from(size.div_ceil(BLOCK)).ok().filter(|_| size <= most).ok_or_else(|| {
        Error::unsupported(format!("Unsupported VDI image size (size is {size:#x}, max supported is {most:#x})"))
    })?;
    let allocated = if is_static { blocks } else { 0 };
    let data_offset = (MAP_OFFSET + u64::from(blocks) * 4).next_multiple_of(BLOCK);
    let data_start = u32::try_from(data_offset).map_err(|_| Error::unsupported("the block map is too large"))?;
    let mut header = [0; HEADER];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, TEXT);
    for (at, value) in [
        (0x40, SIGNATURE),
        (0x44, VERSION),
        (0x48, HEADER_SIZE),
        (0x4c, if is_static { STATIC } else { DYNAMIC }),
        (0x154, 512),
        (0x158, data_start),
        (0x168, 512),
        (0x178, 1 << 20),
        (0x180, blocks),
        (0x184, allocated),
    ] {
        put(at, &value.to_le_bytes());
    }
    put(0x170, &size.to_le_bytes());
    put(0x188, &random::<16>()?);
    put(0x198, &random::<16>()?);

    let file = &request.file;
    let failed = |e| Error::io("write the VDI image", e);
    file.resize(0, Preallocation::Off)?;
    file.resize(data_offset + u64::from(allocated) * BLOCK, Preallocation::Off)?;
    // By pieces: the map of the largest image has 2 GiB.
    const PIECE: u32 = 1 << 18;
    for first in (0..blocks).step_by(1 << 18) {
        let piece = first..blocks.min(first.saturating_add(PIECE));
        let entry = |block: u32| if is_static { block.to_le_bytes() } else { super::NONE.to_le_bytes() };
        let bytes: Vec<u8> = piece.flat_map(entry).collect();
        file.write_growing(&bytes, MAP_OFFSET + u64::from(first) * 4, false).map_err(failed)?;
    }
    file.flush().map_err(failed)?;
    file.write_growing(&header, 0, false).map_err(failed)?;
    file.flush().map_err(failed)
}
