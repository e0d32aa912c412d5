// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver `vdi`: VirtualBox's disk image, dynamic and static, and differencing with an explicit parent.
//!
//! ```text
//! 0x040 u32 signature 0xbeda107f   0x154 u32 map offset     0x178 u32 block size      (all little-endian)
//! 0x044 u32 version 0x00010001     0x158 u32 data offset    0x17c u32 extra bytes per block
//! 0x04c u32 type                   0x168 u32 sector size    0x180 u32 blocks          0x184 u32 blocks allocated
//!                                  0x170 u64 disk size      0x1a8 UUID of the parent
//! ```
//!
//! The map has a u32 for each block: its number in the data area, all ones for none, all ones but the last bit for zeroes. The
//! count of allocated blocks is on disk before the map names one of them: a count too small would have the next writer put a new
//! block over a living one.

pub mod check;
pub mod create;

use std::io;
use std::sync::Arc;

use crate::blocks::{Blocks, Layout, Place};
use crate::claims::Writes;
use crate::driver::{Ask, Driver, Info, InfoValue, Mapping, Prepared, ZeroFlags};
use crate::drivers::{ChildSpec, DriverEntry, OpenRequest};
use crate::{BlockNode, Error, Preallocation, Result, Wait};

pub(crate) const ENTRY: DriverEntry = DriverEntry {
    name: "vdi",
    summary: "VirtualBox's disk image",
    children: &[
        ChildSpec { name: "file", required: true, writes: Writes::Metadata },
        ChildSpec { name: "backing", required: false, writes: Writes::Never },
    ],
    options: &[],
    takes_descriptor: false,
    writes: true,
    probe: |start| start[0x40..0x44] == SIGNATURE.to_le_bytes(),
    open,
};

const SIGNATURE: u32 = 0xbeda_107f;
const VERSION: u32 = 0x0001_0001;
const HEADER: usize = 512;
/// The only block size that anybody makes.
const BLOCK: u64 = 1 << 20;
/// QEMU's limit: 512 TiB.
const MAX_BLOCKS: u32 = 0x1fff_ff80;
const AT_SIZE: u64 = 0x170;
const AT_ALLOCATED: u64 = 0x184;
/// Blocks that were given up and are found again when an image is opened, at most.
const MAX_HOLES: usize = 1 << 16;
const NONE: u32 = 0xffff_ffff;
const ZERO: u32 = 0xffff_fffe;
/// Blocks that an image can grow by while it is open: 4 TiB.
const MAX_GROWTH: u64 = 4 << 20;
/// Types.
const STATIC: u32 = 2;
const DIFFERENCING: u32 = 4;
/// Bytes of the map that are read at once.
const PIECE: u64 = 1 << 20;

struct Header {
    kind: u32,
    map_offset: u64,
    data_offset: u64,
    size: u64,
    blocks: u32,
    allocated: u32,
    uuid: [u8; 16],
    /// The parent's UUID, of a differencing image.
    parent: [u8; 16],
}

impl Header {
    fn read(file: &BlockNode) -> Result<Header> {
        let mut bytes = [0; HEADER];
        if file.len() < HEADER as u64 {
            return Err(Error::corrupt(format!("a VDI image has a header of 512 bytes, the file has {}", file.len())));
        }
        file.read(&mut bytes, 0, Wait::Allowed).map_err(|e| Error::io("read the VDI header", e))?;
        let u32_at = |at: usize| bytes[at..].first_chunk().map_or(0, |field| u32::from_le_bytes(*field));
        let u64_at = |at: usize| bytes[at..].first_chunk().map_or(0, |field| u64::from_le_bytes(*field));
        let uuid_at = |at: usize| bytes[at..].first_chunk::<16>().copied().unwrap_or_default();
        let size = u64_at(0x170);
        let header = Header {
            kind: u32_at(0x4c),
            map_offset: u32_at(0x154).into(),
            data_offset: u32_at(0x158).into(),
            size: size.checked_next_multiple_of(512).unwrap_or(u64::MAX),
            blocks: u32_at(0x180),
            allocated: u32_at(0x184),
            uuid: uuid_at(0x188),
            parent: uuid_at(0x1a8),
        };
        let refused = |text: String| Err(Error::unsupported(format!("unsupported VDI image ({text})")));
        if u32_at(0x40) != SIGNATURE {
            return Err(Error::corrupt(format!("Image not in VDI format (bad signature {:08x})", u32_at(0x40))));
        }
        if u32_at(0x44) != VERSION {
            return refused(format!("version {}.{}", u32_at(0x44) >> 16, u32_at(0x44) & 0xffff));
        }
        if header.size > u64::from(MAX_BLOCKS) * BLOCK {
            return refused(format!("size is {size:#x}, most is {:#x}", u64::from(MAX_BLOCKS) * BLOCK));
        }
        for (what, offset) in [("block map", header.map_offset), ("data", header.data_offset)] {
            if !offset.is_multiple_of(512) || offset < HEADER as u64 {
                return refused(format!("unaligned {what} offset {offset:#x}"));
            }
        }
        if u32_at(0x168) != 512 {
            return refused(format!("sector size {} is not 512", u32_at(0x168)));
        }
        if u64::from(u32_at(0x178)) != BLOCK {
            return refused(format!("block size {} is not {BLOCK}", u32_at(0x178)));
        }
        if u32_at(0x17c) != 0 {
            return refused(format!("{} extra bytes in front of each block", u32_at(0x17c)));
        }
        if header.blocks > MAX_BLOCKS || header.size > u64::from(header.blocks) * BLOCK {
            return refused(format!("disk size {size} with {} blocks of {BLOCK} bytes", header.blocks));
        }
        if !(1..=DIFFERENCING).contains(&header.kind) {
            return refused(format!("unknown image type {}", header.kind));
        }
        if header.kind != DIFFERENCING && (uuid_at(0x1a8) != [0; 16] || uuid_at(0x1b8) != [0; 16]) {
            return refused("it names a parent and is no differencing image".into());
        }
        let map_end = header.map_offset + u64::from(header.blocks) * 4;
        if map_end > header.data_offset {
            return Err(Error::corrupt(format!("the block map ends at {map_end:#x}, in the data area")));
        }
        if map_end > file.len() {
            return Err(Error::corrupt(format!("the block map ends at {map_end:#x}, the file at {:#x}", file.len())));
        }
        Ok(header)
    }

    /// How many blocks the data area has as the map knows it, which of them no entry names, and whether two name one.
    fn survey(&self, file: &BlockNode) -> Result<(u64, Vec<u64>, bool)> {
        let mut seen = vec![0u64; usize::try_from(self.blocks.div_ceil(64)).unwrap_or(0)];
        let (mut most, mut twice) = (u64::from(self.allocated.min(self.blocks)), false);
        let mut at = 0;
        let end = u64::from(self.blocks) * 4;
        let mut piece = vec![0; usize::try_from(PIECE.min(end)).unwrap_or(0)];
        while at < end {
            let len = usize::try_from((end - at).min(PIECE)).unwrap_or(piece.len());
            file.read_or_zero(&mut piece[..len], self.map_offset + at, Wait::Allowed)
                .map_err(|e| Error::io("read the block map", e))?;
            for entry in piece[..len].as_chunks::<4>().0 {
                let number = u32::from_le_bytes(*entry);
                if number >= ZERO {
                    continue;
                }
                if number >= self.blocks {
                    return Err(Error::corrupt(format!("the block map names block {number} of {}", self.blocks)));
                }
                let (word, bit) = (usize::try_from(number / 64).unwrap_or(0), 1 << (number % 64));
                twice |= seen[word] & bit != 0;
                seen[word] |= bit;
                most = most.max(u64::from(number) + 1);
            }
            at += len as u64;
        }
        let is_hole = |number: &u64| {
            let word = usize::try_from(number / 64).ok().and_then(|word| seen.get(word));
            word.is_some_and(|word| word & (1 << (number % 64)) == 0)
        };
        Ok((most, (0..most).filter(is_hole).take(MAX_HOLES).collect(), twice))
    }

    /// How many blocks the map has room for.
    fn room(&self) -> u64 {
        let room = (self.data_offset - self.map_offset) / 4;
        room.min(u64::from(self.blocks) + MAX_GROWTH).min(MAX_BLOCKS.into())
    }

    fn open(&self, file: &Arc<BlockNode>, backing: Option<Arc<BlockNode>>, allocated: u64) -> Blocks<Map> {
        let map = Map { file: Arc::clone(file), map_offset: self.map_offset, data_offset: self.data_offset };
        Blocks::new(map, Arc::clone(file), backing, self.size, self.room(), self.data_offset + allocated * BLOCK)
    }
}

struct Map {
    file: Arc<BlockNode>,
    map_offset: u64,
    data_offset: u64,
}

impl Layout for Map {
    fn block_size(&self) -> u64 {
        BLOCK
    }

    fn chunk_at(&self, chunk: u64) -> Option<u64> {
        Some(self.map_offset + chunk * self.chunk_entries() * 4)
    }

    fn decode(&self, entry: [u8; 4]) -> Place {
        match u32::from_le_bytes(entry) {
            NONE => Place::None,
            ZERO => Place::Zero,
            number if number < MAX_BLOCKS => Place::At(self.data_offset + u64::from(number) * BLOCK),
            _ => Place::Invalid,
        }
    }

    fn encode(&self, place: u64) -> Option<[u8; 4]> {
        let number = place.checked_sub(self.data_offset)? / BLOCK;
        u32::try_from(number).ok().filter(|&number| number < MAX_BLOCKS).map(u32::to_le_bytes)
    }

    fn none(&self) -> [u8; 4] {
        NONE.to_le_bytes()
    }

    fn publish(&self, end: u64) -> io::Result<()> {
        let allocated = u32::try_from((end - self.data_offset) / BLOCK).unwrap_or(MAX_BLOCKS);
        self.file.write(&allocated.to_le_bytes(), AT_ALLOCATED, false)
    }
}

struct Vdi {
    blocks: Blocks<Map>,
    kind: u32,
    uuid: [u8; 16],
}

fn open(request: OpenRequest) -> Result<Box<dyn Driver>> {
    let file = request.child("file")?;
    let header = Header::read(&file)?;
    let backing = request.children.get("backing").cloned();
    match (header.kind == DIFFERENCING, backing.is_some() || request.detached.contains("backing")) {
        (true, false) => {
            return Err(Error::invalid(
                "this is a differencing VDI image: give 'backing' a node, or null to read what only its parent holds as zeroes",
            ));
        }
        (false, true) if backing.is_some() => {
            return Err(Error::invalid("'backing' can only be set for differencing VDI images"));
        }
        _ => {}
    }
    if let Some(parent) = backing.as_ref().filter(|parent| parent.driver_name() == "vdi") {
        let uuid = parent.info().uuid.unwrap_or_default();
        if header.parent != [0; 16] && uuid != header.parent {
            return Err(Error::invalid(format!(
                "the VDI image was made over the image {}, and the node '{}' is {}",
                uuid_text(&header.parent),
                parent.name(),
                uuid_text(&uuid)
            )));
        }
    }
    let (allocated, holes, twice) = header.survey(&file)?;
    if twice && request.writable {
        return Err(Error::corrupt("two guest blocks share one block of the VDI image; it can be read only"));
    }
    let blocks = header.open(&file, backing, allocated);
    blocks.reuse(holes.into_iter().map(|number| header.data_offset + number * BLOCK).collect());
    Ok(Box::new(Vdi { blocks, kind: header.kind, uuid: header.uuid }))
}

/// As people write UUIDs: the first three fields are stored little-endian.
fn uuid_text(uuid: &[u8; 16]) -> String {
    let [a, b, c, d, e, f, g, h, rest @ ..] = uuid;
    [d, c, b, a, f, e, h, g].into_iter().chain(rest).enumerate().fold(String::new(), |mut text, (index, byte)| {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text + &format!("{byte:02x}")
    })
}

impl Driver for Vdi {
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
        if len == now {
            return Ok(());
        }
        if self.kind == DIFFERENCING {
            return Err(Error::unsupported("a differencing VDI image is as large as its parent"));
        }
        if len < now {
            return Err(Error::unsupported("VDI images do not become smaller; convert the image to a smaller one"));
        }
        if preallocation != Preallocation::Off {
            return Err(Error::unsupported("VDI images grow without preallocation only"));
        }
        let map = &self.blocks.layout;
        let room = (map.data_offset - map.map_offset) / 4;
        let room = room.min(now.div_ceil(BLOCK) + MAX_GROWTH).min(MAX_BLOCKS.into());
        let blocks = u32::try_from(len.div_ceil(BLOCK)).ok().filter(|&blocks| u64::from(blocks) <= room);
        let blocks = blocks.ok_or_else(|| {
            Error::unsupported(format!(
                "the VDI image's block map has room for {} bytes, not {len}: convert the image to a new one",
                room * BLOCK
            ))
        })?;
        let grown = self.blocks.grow(len, |_| {
            let file = &self.blocks.file;
            // Size and blocks stand in one sector, which is written whole or not.
            let mut fields = [0; 20];
            file.read(&mut fields, AT_SIZE, Wait::Allowed)?;
            fields[..8].copy_from_slice(&len.to_le_bytes());
            fields[16..].copy_from_slice(&blocks.to_le_bytes());
            file.write(&fields, AT_SIZE, false)
        });
        grown.map_err(|e| Error::io("resize the VDI image", e))
    }

    fn info(&self) -> Info {
        Info {
            uuid: Some(self.uuid),
            allocated_size: self.blocks.file.info().allocated_size,
            cluster_size: Some(BLOCK),
            specifics: vec![("static", InfoValue::Bool(self.kind == STATIC))],
            ..Info::default()
        }
    }
}
