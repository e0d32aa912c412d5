// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Another size for the guest's disk. The header names it last, when everything that it needs is on disk.

use std::io;
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::Qcow2;
use super::entry::L2Entry;
use super::header::{self, MAX_L1_BYTES};
use super::meta::Unnamed;
use crate::driver::ZeroFlags;
use crate::{Error, Preallocation, Result};

/// Zeroes are written as data in pieces of this many bytes.
const ZERO_PIECE: usize = 64 << 10;

impl Qcow2 {
    /// See [`crate::Driver::resize`].
    pub fn change_size(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        let failed = |e: io::Error| Error::io("resize the image", e);
        if !len.is_multiple_of(512) {
            return Err(Error::invalid(format!("The new size must be a multiple of 512, not {len}")));
        }
        if preallocation != Preallocation::Off {
            return Err(Error::unsupported("a qcow2 image can be resized with preallocation 'off' only"));
        }
        if self.header.snapshots > 0 && self.rules.version == 2 {
            return Err(Error::unsupported("Can't resize a version 2 image which has snapshots"));
        }
        let before = self.size();
        let per_table = self.rules.l2_entries() << self.rules.cluster_bits;
        let tables = len.div_ceil(per_table);
        if tables * 8 > MAX_L1_BYTES {
            return Err(Error::invalid(format!(
                "Image size too large for a qcow2 image of this cluster size: {len} bytes"
            )));
        }
        if len < before {
            // What is cut off must not come back when the image grows again.
            self.zero_bytes(len, before.min(len.next_multiple_of(self.rules.cluster_size()))).map_err(failed)?;
            self.cut_off(len).map_err(failed)?;
        } else {
            self.grow_l1(tables).map_err(failed)?;
            if self.header.data_file_raw && self.data.len() < len {
                self.data.resize(len, Preallocation::Off)?;
            }
        }
        self.write_back().map_err(failed)?;
        let written = self.file.write(&len.to_be_bytes(), header::AT_SIZE, false).and_then(|()| self.file.flush());
        written.map_err(failed)?;
        let _closed = (len < before).then(|| self.gate.close());
        self.size.store(len, Ordering::Relaxed);
        drop(_closed);
        if len > before {
            // What the layers below have there is not the guest's, nor is what lies behind the old end of its last cluster.
            let below = self.backing.as_ref().map_or(0, |backing| backing.len());
            let end = len.min(below.max(before.next_multiple_of(self.rules.cluster_size())));
            self.zero_bytes(before, end).map_err(failed)?;
        }
        Ok(())
    }

    /// Makes a range zeroes, by entries where whole units are and the version can say it.
    fn zero_bytes(&self, start: u64, end: u64) -> io::Result<()> {
        let unit = 1 << self.rules.unit_bits();
        let whole = start.next_multiple_of(unit).min(end);
        let last = if end == self.size() { end } else { (end / unit * unit).max(whole) };
        self.store_zeroes(start, whole)?;
        if whole < last {
            match self.zero(whole, last - whole, ZeroFlags { may_unmap: true, fast_only: false }) {
                Err(e) if e.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error()) => {
                    self.store_zeroes(whole, last)?;
                }
                other => other?,
            }
        }
        self.store_zeroes(last, end)
    }

    fn store_zeroes(&self, start: u64, end: u64) -> io::Result<()> {
        let zeroes = [0; ZERO_PIECE];
        let mut at = start;
        while at < end {
            let piece = usize::try_from(end - at).unwrap_or(ZERO_PIECE).min(ZERO_PIECE);
            self.store(&zeroes[..piece], at)?;
            at += piece as u64;
        }
        Ok(())
    }

    /// Takes the clusters from `len` on out of the mapping.
    fn cut_off(&self, len: u64) -> io::Result<()> {
        let rules = self.rules;
        let mut cluster = len.div_ceil(rules.cluster_size());
        let end = self.size().div_ceil(rules.cluster_size());
        let _hold = self.gate.enter();
        while cluster < end {
            let table = cluster / rules.l2_entries();
            if self.l1_entry(table).offset() == 0 {
                cluster = (table + 1) * rules.l2_entries();
                continue;
            }
            let crowded = self.with_room(|meta| {
                meta.check_flights(cluster)?;
                let old = self.entry(meta, cluster)?;
                if old != L2Entry::UNALLOCATED {
                    self.writable_table(meta, cluster)?;
                    self.set_entry(meta, cluster, L2Entry::UNALLOCATED)?;
                    meta.unnamed.extend(self.host_bytes(old, cluster));
                }
                Ok(meta.dirty.len() >= super::meta::MOST_DIRTY)
            })?;
            if crowded {
                self.write_back()?;
            }
            cluster += 1;
        }
        Ok(())
    }

    /// Makes room in the L1 table for `tables` entries: written whole in a new place, then named by the header.
    fn grow_l1(&self, tables: u64) -> io::Result<()> {
        let rules = self.rules;
        let room = self.meta().l1_room;
        if tables <= room {
            return Ok(());
        }
        // A quarter more, so that a disk that grows in small steps does not move its table each time.
        let entries = (tables + tables / 4).min(MAX_L1_BYTES / 8);
        let clusters = (entries * 8).div_ceil(rules.cluster_size());
        let place = self.with_room(|meta| {
            let counts = meta.refcounts.as_mut().ok_or(Errno::ROFS).map_err(io::Error::from)?;
            let place = counts.allocate_row(clusters)?;
            counts.metadata.extend(place.offset >> rules.cluster_bits..(place.offset >> rules.cluster_bits) + clusters);
            Ok(place.offset)
        })?;
        // Nobody changes the table while it moves, and what it says is on disk.
        let _closed = self.gate.close();
        self.write_back()?;
        let bytes: Vec<u8> = (0..clusters * rules.cluster_size() / 8)
            .flat_map(|index| if index < room { self.l1_entry(index).0.to_be_bytes() } else { [0; 8] })
            .collect();
        self.file.write_growing(&bytes, place, false)?;
        self.file.flush()?;
        let mut field = u32::try_from(entries).unwrap_or(u32::MAX).to_be_bytes().to_vec();
        field.extend(place.to_be_bytes());
        let mut meta = self.meta();
        let switched = self.file.write(&field, header::AT_L1, false).and_then(|()| self.file.flush());
        if let Err(e) = switched {
            // Nobody knows which table counts: what is written from now on could be lost.
            meta.corrupt = true;
            return Err(e);
        }
        let old = self.l1_offset.swap(place, Ordering::Relaxed);
        if room > 0 {
            let len = (room * 8).next_multiple_of(rules.cluster_size());
            meta.unnamed.push(Unnamed { offset: old, len, stays_of: None });
        }
        meta.l1_room = entries;
        Ok(())
    }
}
