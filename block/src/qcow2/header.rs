// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The header, its extensions, and every rule by which one is refused (qcow2.txt, "Header" and "Header extensions").
//!
//! ```text
//!   0 "QFI\xfb"                24 u64 virtual size        56 u32 clusters of the refcount table
//!   4 u32 version, 2 or 3      32 u32 crypt method        60 u32 snapshots
//!   8 u64 backing name offset  36 u32 entries in L1       64 u64 snapshot table offset
//!  16 u32 backing name length  40 u64 L1 offset           72 u64 incompatible features (version 3 from here)
//!  20 u32 cluster bits, 9..21  48 u64 refcount table      80 u64 compatible features
//!  88 u64 autoclear features   96 u32 refcount order     100 u32 header length   104 u8 compression type
//! ```

use std::ops::Range;

use crate::{BlockNode, Error, Result, Wait};

/// First four bytes.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Places of fields that change while an image is in use, in bytes. None crosses a sector.
pub const AT_SIZE: u64 = 24;
/// Entries (4 bytes) and offset (8 bytes).
pub const AT_L1: u64 = 36;
/// Offset (8 bytes) and clusters (4 bytes).
pub const AT_REFCOUNT_TABLE: u64 = 48;
/// Count (4 bytes) and offset (8 bytes).
pub const AT_SNAPSHOTS: u64 = 60;
pub const AT_INCOMPATIBLE: u64 = 72;
pub const AT_AUTOCLEAR: u64 = 88;
/// Of version 3.
pub const AT_REFCOUNT_ORDER: u64 = 96;

/// Incompatible feature bits.
pub const DIRTY: u64 = 1 << 0;
pub const CORRUPT: u64 = 1 << 1;
pub const DATA_FILE: u64 = 1 << 2;
pub const COMPRESSION: u64 = 1 << 3;
pub const EXTENDED_L2: u64 = 1 << 4;
const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
/// A compatible feature bit.
pub const LAZY_REFCOUNTS: u64 = 1 << 0;
/// Autoclear feature bits.
pub const BITMAPS: u64 = 1 << 0;
pub const DATA_FILE_RAW: u64 = 1 << 1;

/// Limits, as in QEMU.
pub const MAX_L1_BYTES: u64 = 32 << 20;
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
const MAX_SNAPSHOTS: u32 = 65536;
const MAX_NAME: u32 = 1023;

/// Header extension types.
const EXT_END: u32 = 0;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
const EXT_DATA_FILE: u32 = 0x4441_5441;
/// Header extension type of where the LUKS header is.
pub const EXT_LUKS: u32 = 0x0537_be77;
/// Encryption method: LUKS.
pub const CRYPT_LUKS: u64 = 2;
/// Longest LUKS header: eight slots for the longest keys take 2 MiB.
const MAX_LUKS: u64 = 16 << 20;

/// How compressed clusters are compressed (qcow2.txt, "Compression type").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    Zlib,
    /// Zstandard frames.
    Zstd,
}

/// A checked header: tables are aligned, in range, and large enough for the virtual size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub version: u32,
    pub cluster_bits: u32,
    /// Bytes that a guest sees.
    pub size: u64,
    pub l1_offset: u64,
    /// Entries that the virtual size needs; the table has at least these.
    pub l1_entries: u32,
    /// Entries that the table has.
    pub l1_room: u32,
    pub refcount_table_offset: u64,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// A refcount has 2^order bits.
    pub refcount_order: u32,
    pub snapshots: u32,
    pub snapshots_offset: u64,
    pub incompatible: u64,
    pub autoclear: u64,
    pub dirty: bool,
    pub corrupt: bool,
    pub external_data: bool,
    pub data_file_raw: bool,
    pub extended_l2: bool,
    pub lazy_refcounts: bool,
    pub compression: Compression,
    /// Untrusted text.
    pub backing_name: Option<String>,
    /// Untrusted text.
    pub backing_format: Option<String>,
    /// Untrusted text.
    pub data_file_name: Option<String>,
    /// Bytes of the file where the LUKS header stands, of an encrypted image.
    pub luks: Option<Range<u64>>,
}

impl Header {
    /// Reads and checks the header of the image in `file`.
    ///
    /// # Errors
    /// `Corrupt` for what breaks the format, `Unsupported` for what this version cannot read; QEMU's words where it has some.
    pub fn read(file: &BlockNode) -> Result<Header> {
        let mut start = [0; 112];
        let there = read(file, &mut start, 0)?;
        if !start.starts_with(&MAGIC) {
            return Err(Error::corrupt("Image is not in qcow2 format"));
        }
        let version = u32_at(&start, 4);
        if !(2..=3).contains(&version) {
            return Err(Error::unsupported(format!("Unsupported qcow2 version {version}")));
        }
        let length = if version == 2 { 72 } else { u32_at(&start, 100) };
        if there < if version == 2 { 72 } else { 104 } {
            return Err(Error::corrupt(format!("qcow2 header ends after {there} bytes")));
        }
        let cluster_bits = u32_at(&start, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(Error::unsupported(format!("Unsupported cluster size: 2^{cluster_bits}")));
        }
        let cluster_size = 1u64 << cluster_bits;
        if version == 3 && length < 104 {
            return Err(Error::corrupt("qcow2 header too short"));
        }
        if u64::from(length) > cluster_size {
            return Err(Error::corrupt("qcow2 header exceeds cluster size"));
        }
        let v3 = |value: u64| if version == 3 { value } else { 0 };
        let incompatible = v3(u64_at(&start, 72));
        let refcount_order = if version == 3 { u32_at(&start, 96) } else { 4 };
        let first_cluster = read_first_cluster(file, cluster_size)?;
        let backing_offset = u64_at(&start, 8);
        let extensions = Extensions::read(&first_cluster, length, backing_offset)?;
        if incompatible & !KNOWN != 0 {
            return Err(Error::unsupported(format!(
                "Unsupported qcow2 feature(s): {}",
                extensions.names_of(incompatible & !KNOWN)
            )));
        }
        if refcount_order > 6 {
            return Err(Error::corrupt("Reference count entry width too large; may not exceed 64 bits"));
        }
        match (u32_at(&start, 32), &extensions.luks) {
            (0, _) | (2, Some(_)) => {}
            (1, _) => {
                return Err(Error::unsupported("the image is encrypted with AES, which is broken and not supported"));
            }
            (2, None) => {
                return Err(Error::corrupt("the image is encrypted with LUKS and says not where the LUKS header is"));
            }
            (other, _) => return Err(Error::corrupt(format!("Unsupported encryption method {other}"))),
        }
        let header = Header {
            version,
            cluster_bits,
            size: size(u64_at(&start, 24))?,
            l1_offset: u64_at(&start, 40),
            l1_entries: 0,
            l1_room: u32_at(&start, 36),
            refcount_table_offset: u64_at(&start, 48),
            refcount_table_clusters: u32_at(&start, 56),
            refcount_order,
            snapshots: u32_at(&start, 60),
            snapshots_offset: u64_at(&start, 64),
            incompatible,
            autoclear: v3(u64_at(&start, 88)),
            dirty: incompatible & DIRTY != 0,
            corrupt: incompatible & CORRUPT != 0,
            external_data: incompatible & DATA_FILE != 0,
            data_file_raw: v3(u64_at(&start, 88)) & DATA_FILE_RAW != 0,
            extended_l2: incompatible & EXTENDED_L2 != 0,
            lazy_refcounts: v3(u64_at(&start, 80)) & LAZY_REFCOUNTS != 0,
            compression: compression(incompatible, length, &start)?,
            backing_name: backing_name(&first_cluster, backing_offset, u32_at(&start, 16))?,
            backing_format: extensions.backing_format,
            data_file_name: extensions.data_file,
            luks: extensions.luks.filter(|_| u32_at(&start, 32) == 2),
        };
        if header.extended_l2 && cluster_bits < 14 {
            return Err(Error::corrupt(format!(
                "extended L2 entries need clusters of 16 KiB or more, not {cluster_size} bytes"
            )));
        }
        if header.data_file_raw && !header.external_data {
            return Err(Error::corrupt("data-file-raw requires an external data file"));
        }
        if let Some(Range { start, end }) = header.luks {
            if end - start > MAX_LUKS {
                return Err(Error::corrupt(format!("LUKS header too large: {} bytes", end - start)));
            }
            header.check_table("LUKS header", start, end - start)?;
        }
        header.check_refcount_table(header.refcount_table_offset, header.refcount_table_clusters)?;
        header.check_snapshot_table(header.snapshots_offset, header.snapshots)?;
        let l1_entries = header.check_l1(header.l1_room)?;
        Ok(Header { l1_entries, ..header })
    }

    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// Bytes in an L2 entry.
    pub fn l2_entry_size(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Entries in an L2 table, which is one cluster.
    pub fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.l2_entry_size()
    }

    fn check_table(&self, what: &str, offset: u64, bytes: u64) -> Result<()> {
        let ends = offset.checked_add(bytes).filter(|&end| i64::try_from(end).is_ok());
        if !offset.is_multiple_of(self.cluster_size()) || ends.is_none() {
            return Err(Error::corrupt(format!("{what} offset invalid: {offset:#x}")));
        }
        Ok(())
    }

    fn check_refcount_table(&self, offset: u64, clusters: u32) -> Result<()> {
        let bytes = u64::from(clusters) << self.cluster_bits;
        if bytes > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Error::corrupt(format!("Reference count table too large: {bytes} bytes")));
        }
        if clusters == 0 {
            return Err(Error::corrupt("Image does not contain a reference count table"));
        }
        self.check_table("Reference count table", offset, bytes)
    }

    /// Snapshots are ignored, but a table that cannot be one is a sign of more that is wrong.
    fn check_snapshot_table(&self, offset: u64, count: u32) -> Result<()> {
        if count > MAX_SNAPSHOTS {
            return Err(Error::corrupt(format!("Snapshot table too large: {count} snapshots")));
        }
        // An entry has at least 40 bytes.
        if count == 0 { Ok(()) } else { self.check_table("Snapshot table", offset, u64::from(count) * 40) }
    }

    fn check_l1(&self, entries: u32) -> Result<u32> {
        let bytes = u64::from(entries) * 8;
        if bytes > MAX_L1_BYTES {
            return Err(Error::corrupt(format!("Active L1 table too large: {entries} entries")));
        }
        let needed = self.size.div_ceil(self.cluster_size() * self.l2_entries());
        match u32::try_from(needed) {
            Ok(needed) if needed <= entries => {
                self.check_table("Active L1 table", self.l1_offset, bytes)?;
                Ok(needed)
            }
            _ => Err(Error::corrupt(format!(
                "L1 table is too small: {entries} entries, the image's size needs {needed}"
            ))),
        }
    }
}

/// QEMU rounds to sectors; beyond 2^63 no offset could be named.
fn size(size: u64) -> Result<u64> {
    size.checked_next_multiple_of(512)
        .filter(|&size| i64::try_from(size).is_ok())
        .ok_or_else(|| Error::corrupt(format!("Image is too big: {size} bytes")))
}

fn compression(incompatible: u64, header_length: u32, start: &[u8]) -> Result<Compression> {
    let bit = incompatible & COMPRESSION != 0;
    let kind = if header_length > 104 { start[104] } else { 0 };
    match (kind, bit) {
        (0, false) => Ok(Compression::Zlib),
        (1, true) => Ok(Compression::Zstd),
        (0 | 1, _) => Err(Error::corrupt("Compression type and its incompatible feature bit contradict each other")),
        (other, _) => Err(Error::unsupported(format!("Unknown compression type: {other}"))),
    }
}

fn backing_name(first_cluster: &[u8], offset: u64, len: u32) -> Result<Option<String>> {
    if offset == 0 {
        return Ok(None);
    }
    if len > MAX_NAME || u64::from(len) > (first_cluster.len() as u64).saturating_sub(offset) {
        return Err(Error::corrupt(format!("Backing file name too long: {len} bytes at {offset}")));
    }
    // Both fit: the sum is inside the first cluster.
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let name = first_cluster.get(start..start + len as usize).unwrap_or_default();
    Ok((len > 0).then(|| text(name)))
}

#[derive(Default)]
struct Extensions {
    backing_format: Option<String>,
    data_file: Option<String>,
    luks: Option<Range<u64>>,
    /// Type (0 is incompatible), bit, name.
    feature_names: Vec<(u8, u8, String)>,
}

impl Extensions {
    /// From the end of the header to the backing file's name, or to the end of the first cluster.
    fn read(first_cluster: &[u8], header_length: u32, backing_offset: u64) -> Result<Extensions> {
        let cluster_size = first_cluster.len() as u64;
        if backing_offset > cluster_size {
            return Err(Error::corrupt(format!("Invalid backing file offset: {backing_offset}")));
        }
        let end = if backing_offset == 0 { cluster_size } else { backing_offset };
        let end = usize::try_from(end).unwrap_or(usize::MAX).min(first_cluster.len());
        let mut rest = first_cluster.get(header_length as usize..end).unwrap_or_default();
        let mut found = Extensions::default();
        while let Some((head, after)) = rest.split_first_chunk::<8>() {
            let (kind, len) = (u32_at(head, 0), u32_at(head, 4) as usize);
            if kind == EXT_END {
                break;
            }
            let Some(data) = after.get(..len) else {
                return Err(Error::corrupt(format!("Header extension too large: type {kind:#x}, {len} bytes")));
            };
            match kind {
                EXT_BACKING_FORMAT if len >= 16 => {
                    return Err(Error::corrupt(format!("ERROR: ext_backing_format: len={len} too large (>=16)")));
                }
                EXT_BACKING_FORMAT => found.backing_format = Some(text(data)),
                EXT_DATA_FILE if len > MAX_NAME as usize => {
                    return Err(Error::corrupt(format!("Data file name too long: {len} bytes")));
                }
                EXT_DATA_FILE => found.data_file = Some(text(data)),
                EXT_LUKS => {
                    let Some(place) = data.first_chunk::<16>().map(|place| (u64_at(place, 0), u64_at(place, 8))) else {
                        return Err(Error::corrupt(format!("LUKS header extension too small: {len} bytes")));
                    };
                    let end = place.0.checked_add(place.1).filter(|_| place.1 > 0);
                    let end =
                        end.ok_or_else(|| Error::corrupt(format!("LUKS header offset invalid: {:#x}", place.0)))?;
                    found.luks = Some(place.0..end);
                }
                EXT_FEATURE_NAMES => {
                    let names = data.as_chunks::<48>().0.iter().take(64 * 3);
                    found.feature_names = names
                        .map(|entry| (entry[0], entry[1], text(entry[2..].split(|&b| b == 0).next().unwrap_or(&[]))))
                        .collect();
                }
                _ => {}
            }
            rest = after.get(len.next_multiple_of(8)..).unwrap_or_default();
        }
        Ok(found)
    }

    /// Names of incompatible feature bits: the image's own, escaped, or numbers.
    fn names_of(&self, features: u64) -> String {
        let name = |bit: u8| match self.feature_names.iter().find(|(kind, b, _)| *kind == 0 && *b == bit) {
            Some((_, _, name)) => name.escape_debug().to_string(),
            None => format!("bit {bit}"),
        };
        (0..64).filter(|bit| features >> bit & 1 == 1).map(name).collect::<Vec<_>>().join(", ")
    }
}

/// Zeroes beyond the end of the file, like every read of metadata.
fn read_first_cluster(file: &BlockNode, cluster_size: u64) -> Result<Vec<u8>> {
    // At most 2 MiB.
    let mut cluster = vec![0; usize::try_from(cluster_size).unwrap_or(0)];
    read(file, &mut cluster, 0)?;
    Ok(cluster)
}

/// Fills `buf`, with zeroes past the end of the file; returns how many bytes were there.
fn read(file: &BlockNode, buf: &mut [u8], offset: u64) -> Result<usize> {
    file.read_or_zero(buf, offset, Wait::Allowed).map_err(|e| Error::io("read the qcow2 header", e))?;
    Ok(usize::try_from(file.len().saturating_sub(offset)).unwrap_or(usize::MAX).min(buf.len()))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(field)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(field)
}
