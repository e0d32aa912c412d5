// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The header as bytes, taken apart and put together again: for making an image and for changing what it says of itself.

use super::header::MAGIC;
use crate::{BlockNode, Error, Result, Wait};

/// Bytes of the header that is written for version 2, and at least for version 3.
const LENGTH_2: usize = 72;
const LENGTH_3: usize = 112;

/// Header extension types.
pub const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
pub const EXT_DATA_FILE: u32 = 0x4441_5441;
pub const EXT_BITMAPS: u32 = 0x2385_2875;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;

/// Type (0 incompatible, 1 compatible, 2 autoclear), bit and name of every feature.
const FEATURES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// A header in parts.
pub struct Parts {
    /// The fields, as many as the version has.
    fields: Vec<u8>,
    /// Type and data, in order.
    extensions: Vec<(u32, Vec<u8>)>,
    backing_name: Vec<u8>,
    cluster_size: usize,
}

impl Parts {
    /// An empty header of an image with clusters of `cluster_size` bytes, which names its features if there is room.
    pub fn new(version: u32, cluster_bits: u32) -> Parts {
        let length = if version == 2 { LENGTH_2 } else { LENGTH_3 };
        let mut parts = Parts {
            fields: vec![0; length],
            extensions: Vec::new(),
            backing_name: Vec::new(),
            cluster_size: 1 << cluster_bits,
        };
        parts.put(0, &MAGIC);
        parts.put(4, &version.to_be_bytes());
        parts.put(20, &cluster_bits.to_be_bytes());
        if version > 2 {
            parts.put(100, &u32::try_from(length).unwrap_or(0).to_be_bytes());
        }
        parts
    }

    /// The header of the image in `file`, which was [checked](super::header::Header::read) before.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read(file: &BlockNode, cluster_bits: u32) -> Result<Parts> {
        let mut first = vec![0; 1 << cluster_bits];
        file.read_or_zero(&mut first, 0, Wait::Allowed).map_err(|e| Error::io("read the qcow2 header", e))?;
        let u32_at =
            |at: usize| first.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |field| u32::from_be_bytes(*field));
        let number = |at: usize| usize::try_from(u32_at(at)).unwrap_or(0);
        let length = if u32_at(4) == 2 { LENGTH_2 } else { number(100).min(first.len()) };
        let (name_at, name_len) = (if u32_at(8) == 0 { number(12) } else { 0 }, number(16));
        let mut parts = Parts {
            fields: first[..length].to_vec(),
            extensions: Vec::new(),
            backing_name: first.get(name_at..name_at + name_len).filter(|_| name_at > 0).unwrap_or_default().to_vec(),
            cluster_size: first.len(),
        };
        let end = if name_at == 0 { first.len() } else { name_at.min(first.len()) };
        let mut rest = first.get(length..end).unwrap_or_default();
        while let Some((head, after)) = rest.split_first_chunk::<8>() {
            let kind = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
            let len = usize::try_from(u32::from_be_bytes([head[4], head[5], head[6], head[7]])).unwrap_or(usize::MAX);
            let Some(data) = after.get(..len).filter(|_| kind != 0) else { break };
            parts.extensions.push((kind, data.to_vec()));
            rest = after.get(len.next_multiple_of(8)..).unwrap_or_default();
        }
        Ok(parts)
    }

    /// Puts a field in its place; one that the version does not have is left out.
    pub fn put(&mut self, at: usize, field: &[u8]) {
        if let Some(place) = self.fields.get_mut(at..at + field.len()) {
            place.copy_from_slice(field);
        }
    }

    /// The 64-bit field at `at`; 0 if the version does not have it.
    pub fn u64_at(&self, at: usize) -> u64 {
        self.fields.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |field| u64::from_be_bytes(*field))
    }

    /// Makes the header one of `version`: fields that are new are zeroes.
    pub fn set_version(&mut self, version: u32) {
        let length = if version == 2 { LENGTH_2 } else { self.fields.len().max(LENGTH_3) };
        self.fields.resize(length, 0);
        self.put(4, &version.to_be_bytes());
        if version > 2 {
            self.put(100, &u32::try_from(length).unwrap_or(0).to_be_bytes());
        } else {
            self.extensions.retain(|(kind, _)| *kind != EXT_FEATURE_NAMES);
        }
    }

    /// Whether there is an extension of that type.
    pub fn has_extension(&self, kind: u32) -> bool {
        self.extensions.iter().any(|(other, _)| *other == kind)
    }

    /// Puts an extension in the place of the one of its type, or takes it out.
    pub fn set_extension(&mut self, kind: u32, data: Option<&[u8]>) {
        self.extensions.retain(|(other, _)| *other != kind);
        if let Some(data) = data {
            self.extensions.insert(0, (kind, data.to_vec()));
        }
    }

    /// The backing file's name; empty for none.
    pub fn set_backing_name(&mut self, name: &str) {
        self.backing_name = name.as_bytes().to_vec();
    }

    /// The first cluster.
    ///
    /// # Errors
    /// It does not hold all of it.
    pub fn encode(mut self) -> Result<Vec<u8>> {
        if self.fields.len() > LENGTH_2 && !self.extensions.iter().any(|(kind, _)| *kind == EXT_FEATURE_NAMES) {
            let names = FEATURES.map(|(kind, bit, name)| {
                let mut entry = vec![kind, bit];
                entry.extend(name.as_bytes());
                entry.resize(48, 0);
                entry
            });
            self.extensions.push((EXT_FEATURE_NAMES, names.concat()));
        }
        if self.len() > self.cluster_size {
            self.extensions.retain(|(kind, _)| *kind != EXT_FEATURE_NAMES);
        }
        let len = self.len();
        if len > self.cluster_size {
            return Err(Error::invalid(format!(
                "The names in the header are too long: it takes {len} bytes, and a cluster has {}",
                self.cluster_size
            )));
        }
        let name_at = len - self.backing_name.len();
        let (place, name_len) = if self.backing_name.is_empty() { (0, 0) } else { (name_at, self.backing_name.len()) };
        self.put(8, &(place as u64).to_be_bytes());
        self.put(16, &u32::try_from(name_len).unwrap_or(0).to_be_bytes());
        let mut bytes = self.fields;
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        for (kind, data) in &self.extensions {
            bytes.extend(kind.to_be_bytes());
            bytes.extend(u32::try_from(data.len()).unwrap_or(0).to_be_bytes());
            bytes.extend(data);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes.extend([0; 8]);
        bytes.extend(&self.backing_name);
        bytes.resize(self.cluster_size, 0);
        Ok(bytes)
    }

    fn len(&self) -> usize {
        let extensions = self.extensions.iter().map(|(_, data)| 8 + data.len().next_multiple_of(8));
        self.fields.len().next_multiple_of(8) + extensions.sum::<usize>() + 8 + self.backing_name.len()
    }
}
