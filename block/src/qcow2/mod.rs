// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver `qcow2`: QEMU's copy-on-write format, versions 2 and 3.
//!
//! A guest offset is split into an L1 index, an L2 index and an offset in a cluster. The [L1 table](l1) is in memory from the
//! start, L2 tables come [slice](slices) by slice. [`Driver::map`] turns entries into runs as long as they are contiguous, so that
//! a large read of a well-laid image is one `preadv2` on the host.
//!
//! [`write`] gives out room and names it, [`zero`] says zeroes without data, and both change [memory](meta) alone;
//! [`flush`] brings that to disk in the order that a crash cannot hurt. [`refcounts`] knows which host clusters are free.
//! [`header`] has every rule by which an image is refused, [`entry`] the bits of the tables, [`inflate`] compressed clusters.
//! Names that the image holds are never followed.

pub(crate) mod amend;
mod bitmap_directory;
mod bitmaps;
pub(crate) mod check;
mod compress;
pub(crate) mod create;
mod entry;
mod extension;
mod facts;
mod flush;
pub(crate) mod header;
pub(crate) mod inflate;
mod l1;
mod meta;
mod opening;
mod places;
mod refcounts;
mod resize;
mod rewrite;
mod slices;
mod snapshot_table;
mod snapshots;
mod tables;
mod write;
mod zero;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::io::Errno;

use crate::alarm::{Alarm, Corruption};
use crate::bitmap::Bitmaps;
use crate::claims::Writes;
use crate::coalesce::Coalesced;
use crate::driver::{Ask, Driver, Info, Mapping, Prepared, Target, ZeroFlags};
use crate::drivers::{ChildSpec, DriverEntry, OptionKind, OptionSpec};
use crate::encryption::Encryption;
use crate::gate::{Gate, Hold};
use crate::inflated::{Content, Inflated};
use crate::snapshot::Snapshots;
use crate::{BlockNode, Preallocation, Result, Wait, luks};
use entry::{Kind, L2Entry, Rules};
use header::Header;
use inflate::Inflaters;
use l1::L1;
use meta::Meta;
use slices::Slices;
use tables::Purpose;

pub(crate) const ENTRY: DriverEntry = DriverEntry {
    name: "qcow2",
    summary: "QEMU's copy-on-write format, versions 2 and 3",
    children: &[
        ChildSpec { name: "file", required: true, writes: Writes::Metadata },
        ChildSpec { name: "backing", required: false, writes: Writes::Never },
        ChildSpec { name: "data-file", required: false, writes: Writes::Metadata },
    ],
    options: &[
        OptionSpec {
            name: "l2-cache-size",
            kind: OptionKind::Size,
            summary: "most bytes of L2 tables in memory, default 32 MiB",
        },
        OptionSpec {
            name: "encrypt",
            kind: OptionKind::LuksSecret,
            summary: "how an encrypted image is decrypted: its format, luks, and the secret with its passphrase",
        },
        OptionSpec {
            name: "discard-no-unref",
            kind: OptionKind::Bool,
            summary: "discarded clusters keep their place in the file, so that it does not fragment",
        },
        OptionSpec {
            name: "overlap-check",
            kind: OptionKind::OverlapCheck,
            summary: "which of the image's own structures nothing may be written over: `all`, or all but the L2 tables of \
                      snapshots, which are guarded whatever else is said; default `cached`",
        },
    ],
    takes_descriptor: false,
    writes: true,
    probe: |start| start.starts_with(&header::MAGIC),
    open: opening::open,
};

/// An open image.
pub(crate) struct Qcow2 {
    node_name: String,
    header: Header,
    rules: Rules,
    file: Arc<BlockNode>,
    /// Where plain clusters are: the external data file, or `file`.
    data: Arc<BlockNode>,
    backing: OnceLock<Arc<BlockNode>>,
    /// Of what stands in plain clusters. The place in the file makes the sector's number.
    /// What the LUKS header of an encrypted image says.
    luks: Option<luks::Header>,
    /// `None` also for an encrypted image of which only facts are asked.
    encryption: Option<Encryption>,
    discard_no_unref: bool,
    /// Whether the L2 tables of snapshots are guarded, too.
    guards_snapshots: bool,
    alarm: Alarm,
    /// Bytes that a guest sees.
    size: AtomicU64,
    l1: L1,
    l1_offset: AtomicU64,
    slices: Slices,
    inflated: Inflated,
    inflaters: Inflaters,
    /// Whether the image was not closed properly, and was not repaired since.
    dirty: AtomicBool,
    /// Whether requests must be counted: places change hands.
    writable: AtomicBool,
    /// Whether the image was found damaged while it was written: no more writing.
    damaged: AtomicBool,
    /// Those of the node; the persistent ones are stored at the end.
    bitmaps: Arc<Bitmaps>,
    /// Requests that look at the mapping or use what they saw.
    gate: Gate,
    meta: Mutex<Meta>,
    /// A flight has landed.
    landed: Condvar,
    flushes: Coalesced,
    /// Held while memory goes to disk. Taken before `meta`.
    writing_back: Mutex<()>,
}

impl Qcow2 {
    fn meta(&self) -> MutexGuard<'_, Meta> {
        self.meta.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn check_writable(&self, meta: &Meta) -> io::Result<()> {
        match (&meta.refcounts, meta.corrupt) {
            (Some(_), false) => Ok(()),
            (Some(_), true) => Err(Errno::IO.into()),
            (None, _) => Err(Errno::ROFS.into()),
        }
    }

    /// Guest bytes that stand at byte `offset` of the data file.
    fn place(&self, offset: u64) -> Target<'_> {
        match &self.encryption {
            Some(encryption) => Target::Encrypted { node: &self.data, offset, encryption },
            None => Target::Data { node: &self.data, offset },
        }
    }

    fn read_place(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match &self.encryption {
            Some(encryption) => encryption.read(&self.data, buf, offset, Wait::Allowed),
            None => self.data.read_or_zero(buf, offset, Wait::Allowed),
        }
    }

    fn write_place(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        match &self.encryption {
            Some(encryption) => encryption.write(&self.data, buf, offset, false),
            None => self.data.write_growing(buf, offset, false),
        }
    }

    /// The image breaks the rules: it is marked, said, and not written any more. The error of the request.
    fn corrupt(&self, meta: &mut Meta, text: String, offset: Option<u64>) -> io::Error {
        if meta.refcounts.is_some() && !meta.corrupt {
            self.give_up(meta);
            if self.rules.version > 2 {
                let field = (self.header.incompatible & !header::DIRTY | header::CORRUPT).to_be_bytes();
                let marked = self.file.write(&field, header::AT_INCOMPATIBLE, false).and_then(|()| self.file.flush());
                if let Err(e) = marked {
                    tracing::warn!(node = self.node_name, "the image could not be marked as corrupt: {e}");
                }
            }
            let size = offset.map(|_| self.rules.cluster_size());
            let node_name = self.node_name.clone();
            self.alarm.raise(Corruption { node_name, text, offset, size, fatal: true });
        }
        Errno::IO.into()
    }

    /// Nothing is written any more.
    fn give_up(&self, meta: &mut Meta) {
        meta.corrupt = true;
        self.damaged.store(true, Ordering::SeqCst);
        self.landed.notify_all();
    }

    /// The content of a compressed cluster up to byte `end` at least.
    fn inflate(&self, entry: L2Entry, end: usize) -> io::Result<Content> {
        let (at, len) = entry.compressed_range(self.rules.cluster_bits);
        self.inflated.cluster(at, end, |content, needed| {
            self.inflaters.lend(|inflater| {
                // As large as the room of any other, so that any other can take its place.
                content.reserve_exact((1usize << self.rules.cluster_bits).saturating_sub(content.len()));
                content.resize(needed, 0);
                // A compressed cluster is never longer than twice a cluster: the width of its length field sees to that.
                inflater.inflate(&self.file, at, len, self.header.compression, content)
            })
        })
    }
}

impl Driver for Qcow2 {
    fn len(&self) -> u64 {
        self.size()
    }

    fn map(&self, offset: u64, len: u64, ask: Ask) -> io::Result<Mapping<'_>> {
        let hold = if self.writable.load(Ordering::Relaxed) { self.gate.enter() } else { Hold::NONE };
        let run = self.look_up(offset, len, ask.wait, Purpose::Read)?;
        let unit_bits = self.rules.unit_bits();
        let end = ((offset >> unit_bits) + run.units) << unit_bits;
        let target = match run.kind {
            Kind::Unallocated => match self.backing.get() {
                Some(node) => Target::Child { node, offset },
                None => Target::Absent,
            },
            Kind::Zero => Target::Zero,
            Kind::Stored(cluster) => {
                let inside = offset & (self.rules.cluster_size() - 1);
                self.place(cluster + inside)
            }
            Kind::Compressed => Target::Computed,
            Kind::Invalid => {
                return Err(self.corrupt(&mut self.meta(), "an L2 entry breaks the rules".into(), None));
            }
        };
        Ok(Mapping { target, len: len.min(end - offset), hold })
    }

    fn read_computed(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            let run = self.look_up(offset, buf.len() as u64, Wait::Allowed, Purpose::Read)?;
            let unit_bits = self.rules.unit_bits();
            let there = (((offset >> unit_bits) + run.units) << unit_bits) - offset;
            let (piece, rest) = buf.split_at_mut(usize::try_from(there).unwrap_or(usize::MAX).min(buf.len()));
            // A write to another part of the cluster may have put all of it in a new place since it was mapped.
            if !self.read_old(run.entry, offset, piece)? {
                piece.fill(0);
            }
            offset += piece.len() as u64;
            buf = rest;
        }
        Ok(())
    }

    fn prepare_write(&self, offset: u64, len: u64) -> io::Result<Prepared<'_>> {
        self.prepare(offset, len)
    }

    fn zero_unit(&self) -> u64 {
        1 << self.rules.unit_bits()
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.zero(offset, len, flags)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.drop_units(offset, len)
    }

    fn bypasses_cache(&self) -> bool {
        self.data.bypasses_cache()
    }

    fn flush(&self) -> io::Result<()> {
        self.flush_all()
    }

    fn is_settled(&self) -> bool {
        let meta = self.meta();
        meta.is_clean() && meta.writing.is_empty() && !meta.round
    }

    fn write_compressed(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.store_compressed(buf, offset)
    }

    fn resize(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        self.change_size(len, preallocation)
    }

    fn empty(&self) -> Result<()> {
        self.let_everything_go()
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        Some(self)
    }

    fn bitmaps(&self) -> Option<&Arc<Bitmaps>> {
        Some(&self.bitmaps)
    }

    fn check_new_bitmap(&self, name: &str, granularity_bits: u32) -> Result<()> {
        Qcow2::check_new_bitmap(self, name, granularity_bits)
    }

    fn remove_stored_bitmap(&self, name: &str) -> Result<()> {
        Qcow2::remove_stored_bitmap(self, name)
    }

    fn close(&self) -> io::Result<()> {
        let settled = self.settle();
        // Once is enough, whatever came of it: there is nothing left to settle when the value goes.
        self.meta().refcounts = None;
        settled
    }

    fn reopen(&self, writable: bool) -> Result<()> {
        if writable { self.begin_writing() } else { self.end_writing() }
    }

    fn attaches(&self, edge: &str) -> bool {
        edge == "backing" && self.backing.get().is_none()
    }

    fn attach(&self, _: &str, node: Arc<BlockNode>) {
        // There was none.
        let _ = self.backing.set(node);
    }

    fn info(&self) -> Info {
        let header = &self.header;
        Info {
            uuid: None,
            dirty: self.dirty.load(Ordering::Relaxed),
            encrypted: self.luks.is_some(),
            allocated_size: self.file.info().allocated_size,
            cluster_size: Some(header.cluster_size()),
            backing_name: header.backing_name.clone(),
            backing_format: header.backing_format.clone(),
            data_file_name: header.data_file_name.clone(),
            specifics: self.specifics(),
        }
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        if let Err(e) = self.settle() {
            tracing::error!(node = self.node_name, "what was not flushed is lost: {e}");
        }
    }
}
