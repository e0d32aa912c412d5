// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The snapshot table (qcow2.txt, "Snapshots"): read with every bound checked, written as a whole.
//!
//! ```text
//!  0 u64 L1 offset    12 u16 id length     16 u32 seconds       24 u64 guest's clock    36 u32 extra length
//!  8 u32 L1 entries   14 u16 name length   20 u32 nanoseconds   32 u32 VM state bytes   40 extra, id, name, padded to 8
//! extra: 0 u64 VM state bytes   8 u64 disk size   16 u64 instructions
//! ```

use super::header::MAX_L1_BYTES;
use crate::snapshot::Snapshot;
use crate::{BlockNode, Error, Result, Wait};

/// Most bytes of a table, of an entry's extra data: QEMU's limits.
const MAX_BYTES: u64 = 64 << 20;
const MAX_EXTRA: usize = 1024;
/// Bytes in front of an entry's extra data.
const FIXED: usize = 40;

/// An entry of the table.
#[derive(Clone, Debug)]
pub struct Entry {
    pub l1_offset: u64,
    pub l1_entries: u32,
    pub snapshot: Snapshot,
    /// Extra data that nobody here knows: kept.
    pub unknown: Vec<u8>,
}

/// The table with `count` entries at `offset`.
///
/// # Errors
/// `Corrupt` for a table that breaks the rules; `Io`. At most 64 MiB are read.
pub fn read(file: &BlockNode, offset: u64, count: u32, size: u64) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut at = offset;
    for index in 0..count {
        let take = |at: u64, len: usize| -> Result<Vec<u8>> {
            let end = at.checked_add(len as u64).filter(|end| end - offset <= MAX_BYTES && *end <= file.len());
            let Some(_) = end else {
                return Err(Error::corrupt(format!(
                    "the snapshot table ends in the middle of snapshot {index} of {count}"
                )));
            };
            let mut bytes = vec![0; len];
            file.read(&mut bytes, at, Wait::Allowed).map_err(|e| Error::io("read the snapshot table", e))?;
            Ok(bytes)
        };
        let fixed = take(at, FIXED)?;
        let u16_at = |at: usize| usize::from(u16::from_be_bytes([fixed[at], fixed[at + 1]]));
        let u32_at = |at: usize| fixed[at..].first_chunk().map_or(0, |field| u32::from_be_bytes(*field));
        let u64_at = |bytes: &[u8], at: usize| bytes.get(at..)?.first_chunk().map(|field| u64::from_be_bytes(*field));
        let extra_len = usize::try_from(u32_at(36)).unwrap_or(usize::MAX);
        if extra_len > MAX_EXTRA {
            return Err(Error::corrupt(format!(
                "Too much extra metadata in snapshot table entry {index}: {extra_len} bytes"
            )));
        }
        let (id_len, name_len) = (u16_at(12), u16_at(14));
        let rest = take(at + FIXED as u64, extra_len + id_len + name_len)?;
        let (extra, names) = rest.split_at(extra_len);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let entry = Entry {
            l1_offset: u64_at(&fixed, 0).unwrap_or(0),
            l1_entries: u32_at(8),
            snapshot: Snapshot {
                id: text(&names[..id_len]),
                name: text(&names[id_len..]),
                vm_state_size: u64_at(extra, 0).unwrap_or_else(|| u32_at(32).into()),
                date: (u32_at(16), u32_at(20)),
                vm_clock: u64_at(&fixed, 24).unwrap_or(0),
                disk_size: u64_at(extra, 8).unwrap_or(size),
                icount: u64_at(extra, 16).filter(|&count| count != u64::MAX),
            },
            unknown: extra.get(24..).unwrap_or_default().to_vec(),
        };
        if u64::from(entry.l1_entries) * 8 > MAX_L1_BYTES {
            return Err(Error::corrupt(format!("Snapshot L1 table too large: {} entries", entry.l1_entries)));
        }
        entries.push(entry);
        at += (FIXED + rest.len()).next_multiple_of(8) as u64;
    }
    Ok(entries)
}

/// The table as it stands in the image.
pub fn bytes(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for Entry { l1_offset, l1_entries, snapshot, unknown } in entries {
        let len = |text: &str| u16::try_from(text.len()).unwrap_or(u16::MAX);
        bytes.extend(l1_offset.to_be_bytes());
        bytes.extend(l1_entries.to_be_bytes());
        bytes.extend(len(&snapshot.id).to_be_bytes());
        bytes.extend(len(&snapshot.name).to_be_bytes());
        bytes.extend(snapshot.date.0.to_be_bytes());
        bytes.extend(snapshot.date.1.to_be_bytes());
        bytes.extend(snapshot.vm_clock.to_be_bytes());
        bytes.extend(u32::try_from(snapshot.vm_state_size).unwrap_or(0).to_be_bytes());
        bytes.extend(u32::try_from(24 + unknown.len()).unwrap_or(0).to_be_bytes());
        bytes.extend(snapshot.vm_state_size.to_be_bytes());
        bytes.extend(snapshot.disk_size.to_be_bytes());
        bytes.extend(snapshot.icount.unwrap_or(u64::MAX).to_be_bytes());
        bytes.extend(unknown);
        bytes.extend(snapshot.id.as_bytes());
        bytes.extend(snapshot.name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes
}
