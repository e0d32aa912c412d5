// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Another size for the guest's disk. The header names it last, when everything that it needs is on disk.

use std::io;
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::Qcow2;
use super::entry::L2Entry;
use super::header::{self, MAX_L1_BYTES};
use super::meta::Unnamed;
use super::places::Structure;
use crate::driver::{Target, ZeroFlags};
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
        if preallocation != Preallocation::Off && len < self.size() {
            return Err(Error::invalid("Preallocation can't be used for shrinking an image"));
        }
        if self.meta().snapshots > 0 && self.rules.version == 2 {
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
        let cluster_end = |at: u64| at.next_multiple_of(self.rules.cluster_size());
        if len < before {
            // What is cut off must not come back when the image grows again.
            self.zero_bytes(len, before.min(cluster_end(len))).map_err(failed)?;
            self.cut_off(len, before).map_err(failed)?;
        } else {
            self.grow_l1(tables).map_err(failed)?;
            if self.header.data_file_raw && self.data.len() < len {
                self.data.resize(len, Preallocation::Off)?;
            }
            // Neither what the layers below have there is the guest's, nor what lies behind the old end: a crash must not show it.
            self.cut_off(before, len).map_err(failed)?;
            let below = self.backing.get().map_or(0, |backing| backing.len());
            self.zero_bytes(before, len.min(below.max(cluster_end(before)))).map_err(failed)?;
        }
        self.write_back().map_err(failed)?;
        let written = self.file.write(&len.to_be_bytes(), header::AT_SIZE, false).and_then(|()| self.file.flush());
        written.map_err(failed)?;
        let _closed = (len < before).then(|| self.gate.close());
        self.size.store(len, Ordering::Relaxed);
        drop(_closed);
        if preallocation == Preallocation::Off { Ok(()) } else { self.set_aside(before, len, preallocation) }
    }

    /// Gives every cluster of a range room of its own, which holds zeroes.
    fn set_aside(&self, start: u64, end: u64, preallocation: Preallocation) -> Result<()> {
        let failed = |e: io::Error| Error::io("set room for the image aside", e);
        let flags = ZeroFlags { may_unmap: preallocation == Preallocation::Metadata, fast_only: false };
        let mut at = start;
        while at < end {
            let prepared = self.prepare(at, end - at).map_err(failed)?;
            let len = prepared.len;
            if prepared.pending.is_some() {
                let Target::Data { node, offset } = prepared.target else {
                    // Zeroes of an encrypted disk are noise in the file.
                    return Err(Error::unsupported("encrypted images can be resized with preallocation 'off' only"));
                };
                if node.len() < offset + len {
                    node.resize(offset + len, Preallocation::Off)?;
                }
                if preallocation == Preallocation::Full {
                    let zeroes = vec![0; ZERO_PIECE];
                    for piece in (0..len).step_by(ZERO_PIECE) {
                        let bytes = usize::try_from(len - piece).unwrap_or(ZERO_PIECE).min(ZERO_PIECE);
                        node.write_growing(&zeroes[..bytes], offset + piece, false).map_err(failed)?;
                    }
                } else {
                    node.write_zeroes(offset, len, flags, false).map_err(failed)?;
                }
            }
            prepared.commit().map_err(failed)?;
            at += len;
        }
        self.write_back().map_err(failed)
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

    /// Takes the clusters that begin between two sizes of the disk out of the mapping.
    fn cut_off(&self, from: u64, to: u64) -> io::Result<()> {
        let rules = self.rules;
        let mut cluster = from.div_ceil(rules.cluster_size());
        let end = to.div_ceil(rules.cluster_size());
        // A crash before the header names the new size must not show what the layer below has there.
        let hides = self.backing.get().is_some() && rules.version > 2;
        let gone = if hides { L2Entry::zero(None, rules) } else { L2Entry::UNALLOCATED };
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
                if old != gone && old != L2Entry::UNALLOCATED {
                    self.writable_table(meta, cluster)?;
                    self.set_entry(meta, cluster, gone)?;
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
        let place = self.table_room(clusters, Structure::L1Table)?;
        let moved = self.move_l1(room, entries, place, clusters);
        let mut meta = self.meta();
        if moved.is_err()
            && let Some(counts) = &mut meta.refcounts
        {
            for cluster in place >> rules.cluster_bits..(place >> rules.cluster_bits) + clusters {
                // Failing costs a leaked cluster.
                let _ = counts.drop_user(cluster);
            }
        }
        moved
    }

    fn move_l1(&self, room: u64, entries: u64, place: u64, clusters: u64) -> io::Result<()> {
        let rules = self.rules;
        // Nobody changes the table while it moves, and what it says is on disk.
        let _closed = self.gate.close();
        self.write_back()?;
        let bytes: Vec<u8> = (0..clusters * rules.cluster_size() / 8)
            .flat_map(|index| if index < room { self.l1_entry(index).0.to_be_bytes() } else { [0; 8] })
            .collect();
        self.file.write_growing(&bytes, place, false)?;
        self.file.flush()?;
        let field = |entries: u64, offset: u64| {
            let entries = u32::try_from(entries).unwrap_or(u32::MAX).to_be_bytes();
            [&entries[..], &offset.to_be_bytes()].concat()
        };
        let mut meta = self.meta();
        let before = field(room, self.l1_offset.load(Ordering::Relaxed));
        self.switch(&mut meta, header::AT_L1, &field(entries, place), &before)?;
        let old = self.l1_offset.swap(place, Ordering::Relaxed);
        if room > 0 {
            let len = (room * 8).next_multiple_of(rules.cluster_size());
            meta.unnamed.push(Unnamed::structure(old, len, Structure::L1Table));
        }
        meta.l1_room = entries;
        Ok(())
    }
}
