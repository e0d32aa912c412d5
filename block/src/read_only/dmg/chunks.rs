// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tables of a disk image of Apple's: trailer, property list, chunks.

use super::{Packing, SECTOR};
use crate::read_only::{u32_be, u64_be};
use crate::{BlockNode, Error, Result, Wait};

const TRAILER: usize = 512;
/// Larger lists nobody makes: a table has 40 bytes for each 512 KiB or so of the disk.
const MAX_LIST: u64 = 64 << 20;
/// QEMU's limit for a chunk, packed and unpacked.
const MAX_CHUNK: u64 = 64 << 20;
const TABLE_HEADER: usize = 204;
const ENTRY: usize = 40;
/// Types of chunks.
const ZERO: u32 = 0;
const RAW: u32 = 1;
const IGNORED: u32 = 2;
const ADC: u32 = 0x8000_0004;
const ZLIB: u32 = 0x8000_0005;
const BZIP2: u32 = 0x8000_0006;
const LZFSE: u32 = 0x8000_0007;
const LZMA: u32 = 0x8000_0008;
const COMMENT: u32 = 0x7fff_fffe;
const END: u32 = 0xffff_ffff;

/// Bytes of the disk that are stored.
#[derive(Clone, Copy, Debug)]
pub struct Chunk {
    /// The first, as a guest sees it.
    pub start: u64,
    pub len: u64,
    /// Byte offset in the file, and how many bytes are there.
    pub at: u64,
    pub stored: u64,
    /// `None` for bytes as they are.
    pub packing: Option<Packing>,
}

/// All chunks in order, without those that are zeroes.
pub struct Chunks {
    pub chunks: Vec<Chunk>,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of the largest packed chunk, unpacked.
    pub largest: u64,
}

impl Chunks {
    pub fn read(file: &BlockNode) -> Result<Chunks> {
        let failed = |e| Error::io("read the disk image's tables", e);
        let (trailer, at) = trailer(file)?;
        let (data_fork, list_at, list_len) = (u64_be(&trailer, 24), u64_be(&trailer, 216), u64_be(&trailer, 224));
        if list_len == 0 {
            return Err(Error::unsupported("this DMG keeps its tables in a resource fork, which is not read here"));
        }
        if list_len > MAX_LIST || list_at.checked_add(list_len).is_none_or(|end| end > at) {
            return Err(Error::corrupt(format!("the DMG's property list of {list_len} bytes at {list_at} cannot be")));
        }
        let mut list = vec![0; usize::try_from(list_len).unwrap_or(0)];
        file.read(&mut list, list_at, Wait::Allowed).map_err(failed)?;
        let mut found = Chunks { chunks: Vec::new(), size: 0, largest: 0 };
        for table in tables(&list) {
            found.add(&table, data_fork, file.len())?;
        }
        if found.size == 0 {
            return Err(Error::corrupt("the DMG's property list has no table of chunks"));
        }
        found.chunks.sort_by_key(|chunk| chunk.start);
        let meet = found.chunks.windows(2).find(|pair| pair[0].start + pair[0].len > pair[1].start);
        if let Some([_, second]) = meet.and_then(<[Chunk]>::as_array::<2>) {
            return Err(Error::corrupt(format!("two chunks of the DMG hold the byte at {}", second.start)));
        }
        Ok(found)
    }

    /// Takes up one table.
    fn add(&mut self, table: &[u8], data_fork: u64, file_len: u64) -> Result<()> {
        if !table.starts_with(b"mish") || table.len() < TABLE_HEADER {
            return Ok(());
        }
        let (first, base) = (u64_be(table, 8), u64_be(table, 24));
        let count = usize::try_from(u32_be(table, 200)).unwrap_or(usize::MAX);
        let entries = table[TABLE_HEADER..].chunks_exact(ENTRY);
        if entries.len() < count {
            return Err(Error::corrupt(format!(
                "a table of the DMG has {count} chunks and room for {}",
                entries.len()
            )));
        }
        for entry in entries.take(count) {
            let kind = u32_be(entry, 0);
            let packing = match kind {
                ZERO | IGNORED | RAW => None,
                ZLIB => Some(Packing::Zlib),
                BZIP2 => Some(Packing::Bzip2),
                LZFSE => Some(Packing::Lzfse),
                COMMENT => continue,
                END => break,
                ADC | LZMA => {
                    let name = if kind == ADC { "ADC" } else { "LZMA" };
                    return Err(Error::unsupported(format!(
                        "chunks of this DMG are packed by {name}, which is not read here"
                    )));
                }
                other => return Err(Error::unsupported(format!("the DMG has a chunk of unknown type {other:#x}"))),
            };
            let cannot_be = || Error::corrupt("a chunk of the DMG lies beyond what can be counted");
            let bytes = |sectors: u64| sectors.checked_mul(SECTOR).filter(|bytes| i64::try_from(*bytes).is_ok());
            let start = first.checked_add(u64_be(entry, 8)).and_then(bytes).ok_or_else(cannot_be)?;
            let len = bytes(u64_be(entry, 16)).ok_or_else(cannot_be)?;
            let end = start.checked_add(len).ok_or_else(cannot_be)?;
            self.size = self.size.max(end);
            if len == 0 || matches!(kind, ZERO | IGNORED) {
                continue;
            }
            let at = [data_fork, base, u64_be(entry, 24)].iter().try_fold(0u64, |sum, part| sum.checked_add(*part));
            let (at, stored) = (at.ok_or_else(cannot_be)?, u64_be(entry, 32));
            if at.checked_add(stored).is_none_or(|end| end > file_len) {
                return Err(Error::corrupt(format!("a chunk of the DMG, {stored} bytes at {at}, is not in the file")));
            }
            if packing.is_none() && stored != len {
                return Err(Error::corrupt(format!(
                    "a chunk of {len} bytes that is not packed has {stored} in the DMG"
                )));
            }
            if packing.is_some() && len.max(stored) > MAX_CHUNK {
                return Err(Error::corrupt(format!("a chunk of the DMG has {len} bytes, at most {MAX_CHUNK} can be")));
            }
            if packing.is_some() {
                self.largest = self.largest.max(len);
            }
            self.chunks.push(Chunk { start, len, at, stored, packing });
        }
        Ok(())
    }
}

/// The trailer and where it begins. A node's length is rounded up to sectors, and the file may end in the middle of one.
fn trailer(file: &BlockNode) -> Result<([u8; TRAILER], u64)> {
    let mut end = [0; 2 * TRAILER];
    let before = file.len().saturating_sub(end.len() as u64);
    file.read_or_zero(&mut end, before, Wait::Allowed).map_err(|e| Error::io("read the DMG's trailer", e))?;
    let found = end.windows(TRAILER).rposition(|window| window.starts_with(b"koly"));
    match found.and_then(|at| Some((*end[at..].first_chunk()?, before + at as u64))) {
        Some(found) => Ok(found),
        None => Err(Error::corrupt("this is no DMG: it has no trailer 'koly' at its end")),
    }
}

/// What stands between `<data>` and `</data>` in the list, decoded. What is no table is told from one by its first bytes, so
/// more of the list need not be understood.
fn tables(list: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    let text = |rest: &[u8], mark: &[u8]| rest.windows(mark.len()).position(|window| window == mark);
    let mut rest = list;
    std::iter::from_fn(move || {
        let start = text(rest, b"<data>")? + b"<data>".len();
        let len = text(&rest[start..], b"</data>")?;
        let decoded = base64(&rest[start..start + len]);
        rest = &rest[start + len..];
        Some(decoded)
    })
}

/// Base64 (RFC 4648, 4), with what is no digit skipped.
fn base64(text: &[u8]) -> Vec<u8> {
    let (mut bytes, mut held, mut bits) = (Vec::with_capacity(text.len() / 4 * 3), 0u32, 0);
    for &digit in text {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'=' => break,
            _ => continue,
        };
        held = held << 6 | u32::from(value);
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            let [low, ..] = (held >> bits).to_le_bytes();
            bytes.push(low);
        }
    }
    bytes
}
