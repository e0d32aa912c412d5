// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compressed clusters, written: packed one behind the other, several to a host cluster where refcounts can say so.

use std::io;

use flate2::{Compress, FlushCompress, Status};
use rustix::io::Errno;

use super::Qcow2;
use super::entry::L2Entry;
use super::header::Compression;
use super::meta::Meta;
use super::refcounts::Refused;
use crate::driver::Target;

/// QEMU inflates with a window of 4 KiB: nothing may refer further back.
const WINDOW_BITS: u8 = 12;

impl Qcow2 {
    /// Stores a whole cluster compressed, or as it is if that takes no less room: see [`crate::Driver::write_compressed`].
    pub fn store_compressed(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let rules = self.rules;
        let size = rules.cluster_size();
        let is_whole =
            buf.len() as u64 == size || (buf.len() as u64) < size && offset + buf.len() as u64 == self.size();
        if rules.external_data || self.encryption.is_some() || !offset.is_multiple_of(size) || !is_whole {
            return Err(Errno::OPNOTSUPP.into());
        }
        let mut cluster = buf.to_vec();
        cluster.resize(usize::try_from(size).unwrap_or(buf.len()), 0);
        let Some(packed) = compress(self.header.compression, &cluster) else { return self.store(buf, offset) };
        let _hold = self.gate.enter();
        let number = offset >> rules.cluster_bits;
        let reserved = self.with_room(|meta| {
            meta.check_flights(number)?;
            self.writable_table(meta, number)?;
            let place = self.place_for(meta, packed.len() as u64)?;
            meta.flights.push(number..number + 1);
            Ok(place)
        })?;
        let entry = L2Entry::compressed(reserved, packed.len() as u64, rules.cluster_bits);
        let written = match entry {
            Some(_) => self.file.write_growing(&packed, reserved, false),
            None => Err(Errno::FBIG.into()),
        };
        // What stood there before may be in memory, inflated.
        self.inflated.forget(reserved);
        let mut meta = self.meta();
        meta.land(&(number..number + 1));
        self.landed.notify_all();
        let named = written.and_then(|()| {
            let old = self.entry(&mut meta, number)?;
            self.set_entry(&mut meta, number, entry.ok_or(Errno::FBIG)?)?;
            let unnamed = self.host_bytes(old, number);
            meta.unnamed.extend(unnamed);
            Ok(())
        });
        if named.is_err() {
            meta.compressed_end = None;
            if let Some(counts) = &mut meta.refcounts {
                let last = (reserved + packed.len() as u64 - 1) >> rules.cluster_bits;
                for cluster in reserved >> rules.cluster_bits..=last {
                    // Failing costs a leaked cluster.
                    let _ = counts.drop_user(cluster);
                }
            }
        }
        named
    }

    /// Stores bytes as they are.
    pub fn store(&self, mut buf: &[u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            let prepared = self.prepare(offset, buf.len() as u64)?;
            let len = usize::try_from(prepared.len).unwrap_or(buf.len());
            match prepared.target {
                Target::Data { offset: at, .. } | Target::Encrypted { offset: at, .. } => {
                    self.write_place(&buf[..len], at)?;
                }
                _ => return Err(Errno::IO.into()),
            }
            prepared.commit()?;
            buf = &buf[len..];
            offset += len as u64;
        }
        Ok(())
    }

    /// Room for `len` bytes, at most a cluster: behind the last compressed cluster if they fit there.
    fn place_for(&self, meta: &mut Meta, len: u64) -> Result<u64, Refused> {
        let bits = self.rules.cluster_bits;
        let size = self.rules.cluster_size();
        let end = meta.compressed_end.take();
        let counts = meta.refcounts.as_mut().ok_or(Errno::ROFS).map_err(io::Error::from)?;
        let mut place = None;
        if let Some(end) = end {
            let fits = len <= size - end % size;
            let next = if fits { None } else { counts.allocate_at((end >> bits) + 1)? };
            if fits || next.is_some() {
                match counts.add_user(end >> bits) {
                    Ok(()) => place = Some(end),
                    // The count cannot be larger: a narrow refcount.
                    Err(Refused::Io(_)) => {
                        if let Some(room) = next {
                            counts.drop_user(room.offset >> bits)?;
                        }
                    }
                    Err(other) => return Err(other),
                }
            }
        }
        let place = match place {
            Some(place) => place,
            None => counts.allocate(1)?.offset,
        };
        meta.compressed_end = Some(place + len).filter(|end| !end.is_multiple_of(size));
        Ok(place)
    }
}

/// A cluster compressed; `None` if that makes it no smaller.
pub fn compress(compression: Compression, cluster: &[u8]) -> Option<Vec<u8>> {
    let packed = match compression {
        Compression::Zlib => {
            let mut packed = vec![0; cluster.len()];
            let mut deflater = Compress::new_with_window_bits(flate2::Compression::default(), false, WINDOW_BITS);
            let status = deflater.compress(cluster, &mut packed, FlushCompress::Finish).ok()?;
            packed.truncate(usize::try_from(deflater.total_out()).ok()?);
            (status == Status::StreamEnd).then_some(packed)?
        }
        Compression::Zstd => ruzstd::encoding::compress_to_vec(cluster, ruzstd::encoding::CompressionLevel::Fastest),
    };
    (packed.len() < cluster.len()).then_some(packed)
}
