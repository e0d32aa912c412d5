// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opening an image, and the way from reading to writing and back.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, OnceLock};

use super::Qcow2;
use super::entry::{L1Entry, Rules};
use super::header::{self, Header};
use super::inflate::Inflaters;
use super::l1::L1;
use super::meta::Meta;
use super::places::{Found, Places, Structure};
use super::refcounts::{MAX_OFFSET, Refcounts};
use super::slices::Slices;
use super::snapshot_table;
use super::tables::read_words;
use crate::coalesce::Coalesced;
use crate::driver::Driver;
use crate::drivers::{OpenRequest, OptionValue};
use crate::encryption::Encryption;
use crate::gate::Gate;
use crate::inflated::Inflated;
use crate::luks;
use crate::{BlockNode, Error, Result, Wait};

/// Most bytes of L2 tables in memory, unless the caller says otherwise: QEMU's default.
const L2_CACHE: u64 = 32 << 20;
/// Most L2 tables of snapshots that are guarded: 200 MiB of memory.
const MOST_GUARDED: u64 = 1 << 22;

pub fn open(request: OpenRequest) -> Result<Box<dyn Driver>> {
    let file = request.child("file")?;
    let mut header = Header::read(&file)?;
    if request.writable && header.dirty && !header.corrupt {
        header = super::check::make_clean(&file, &request.node_name)?;
    }
    let backing = request.children.get("backing").cloned();
    if let (Some(name), None, false) = (&header.backing_name, &backing, request.detached.contains("backing")) {
        return Err(Error::invalid(format!(
            "the image names '{}' as its backing file, and names in images are never followed: give 'backing' a node, or null \
             to read what only the backing file holds as zeroes",
            name.escape_debug()
        )));
    }
    let data = match (request.children.get("data-file").cloned(), header.external_data) {
        (None, false) => Arc::clone(&file),
        (Some(data), true) => data,
        (None, true) => {
            let name = header.data_file_name.as_deref().unwrap_or_default().escape_debug();
            return Err(Error::invalid(format!("'data-file' is required for this image (it names '{name}')")));
        }
        (Some(_), false) => {
            return Err(Error::invalid("'data-file' can only be set for images with an external data file"));
        }
    };
    let (luks, encryption) = match (&header.luks, request.secret("encrypt")) {
        (None, None) => (None, None),
        (Some(place), secret) => {
            let read_at = |offset: u64, buf: &mut [u8]| file.read_or_zero(buf, place.start + offset, Wait::Allowed);
            let room = place.end - place.start;
            match secret {
                Some(secret) => {
                    let volume = luks::open(&read_at, room, secret.bytes())?;
                    (Some(volume.header), Some(Encryption::new(volume.cipher, 0)))
                }
                None if request.facts_only => (Some(luks::read_header(&read_at, room)?), None),
                None => return Err(Error::invalid("Parameter 'encrypt.key-secret' is required for cipher")),
            }
        }
        (None, Some(_)) => {
            return Err(Error::invalid("No encryption in image header, but options specified format 'luks'"));
        }
    };
    let rules = Rules {
        cluster_bits: header.cluster_bits,
        version: header.version,
        extended: header.extended_l2,
        external_data: header.external_data,
    };
    let covered = rules.slice_entries() * rules.cluster_size();
    let words = usize::try_from(rules.slice_words()).unwrap_or(1);
    let budget = request.size("l2-cache-size").unwrap_or(L2_CACHE);
    let l1_room = u64::from(header.l1_room);
    let (snapshots, snapshots_offset) = (header.snapshots, header.snapshots_offset);
    let image = Qcow2 {
        node_name: request.node_name,
        rules,
        size: AtomicU64::new(header.size),
        l1: L1::new(read_l1(&file, &header)?),
        l1_offset: AtomicU64::new(header.l1_offset),
        slices: Slices::new(header.size.div_ceil(covered), words, budget),
        inflated: Inflated::in_parts(1 << header.cluster_bits),
        inflaters: Inflaters::default(),
        dirty: AtomicBool::new(header.dirty),
        header,
        file,
        data,
        backing: backing.map(OnceLock::from).unwrap_or_default(),
        luks,
        encryption,
        discard_no_unref: request.options.get("discard-no-unref") == Some(&OptionValue::Bool(true)),
        guards_snapshots: request.options.get("overlap-check") == Some(&OptionValue::Str("all".into())),
        alarm: request.alarm,
        writable: AtomicBool::new(false),
        damaged: AtomicBool::new(false),
        bitmaps: Arc::default(),
        gate: Gate::default(),
        meta: Mutex::new(Meta { l1_room, snapshots, snapshots_offset, ..Meta::default() }),
        landed: Condvar::new(),
        flushes: Coalesced::default(),
        writing_back: Mutex::new(()),
    };
    image.load_bitmaps(&image.header)?;
    if request.writable {
        image.begin_writing()?;
    }
    Ok(Box::new(image))
}

/// At most 32 MiB, which the header's check has made sure of.
fn read_l1(file: &BlockNode, header: &Header) -> Result<Vec<L1Entry>> {
    let words = read_words(file, header.l1_offset, u64::from(header.l1_room), Wait::Allowed);
    let words = words.map_err(|e| Error::io("read the L1 table", e))?;
    Ok(words.into_iter().map(L1Entry).collect())
}

impl Qcow2 {
    /// Gets the image ready for writing.
    pub fn begin_writing(&self) -> Result<()> {
        // Tables may have moved since the image was opened.
        let mut header = Header::read(&self.file)?;
        if header.dirty && !header.corrupt && !self.meta().corrupt {
            header = super::check::make_clean(&self.file, &self.node_name)?;
            self.dirty.store(false, Ordering::Relaxed);
            self.reload_l1(&header)?;
        }
        let header = &header;
        let (mut bitmaps, bitmap_places) = self.bitmaps_on_disk(header)?;
        let mut meta = self.meta();
        if header.corrupt || meta.corrupt {
            return Err(Error::unsupported("qcow2: Image is corrupt; cannot be opened read/write"));
        }
        // At most 8 MiB, which the header's check has made sure of.
        let entries = u64::from(header.refcount_table_clusters) * self.rules.cluster_size() / 8;
        let table = read_words(&self.file, header.refcount_table_offset, entries, Wait::Allowed)
            .map_err(|e| Error::io("read the refcount table", e))?;
        // Bits 0 to 8 are reserved.
        let table = table.into_iter().map(|entry| entry & !0x1ff).collect();
        let (order, offset) = (header.refcount_order, header.refcount_table_offset);
        let mut counts = Refcounts::new(Arc::clone(&self.file), header.cluster_bits, order, table, offset);
        counts.metadata = self.metadata(header, &counts, &bitmap_places)?;
        // What others keep in step with the data is out of step as soon as we write.
        let kept =
            header.autoclear & (header::DATA_FILE_RAW | if bitmaps.directory.is_some() { header::BITMAPS } else { 0 });
        if kept != header.autoclear {
            let cleared = self.file.write(&kept.to_be_bytes(), header::AT_AUTOCLEAR, false);
            cleared.and_then(|()| self.file.flush()).map_err(|e| Error::io("write the qcow2 header", e))?;
        }
        meta.autoclear = kept;
        self.use_bitmaps(&mut bitmaps).map_err(|e| Error::io("mark the bitmaps as in use", e))?;
        meta.bitmaps = bitmaps;
        meta.refcounts = Some(counts);
        // Slices that are in memory were not looked at as closely as those to come.
        self.slices.clear();
        self.writable.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Takes the L1 table over from disk, where a repair may have changed marks in it.
    fn reload_l1(&self, header: &Header) -> Result<()> {
        let entries = read_l1(&self.file, header)?;
        let gone: Vec<usize> = self.l1.tables(usize::MAX).map(|(index, _)| index).collect();
        for index in gone.into_iter().filter(|&index| index >= entries.len()) {
            self.l1.set(index, L1Entry(0));
        }
        for (index, entry) in entries.into_iter().enumerate() {
            if self.l1.get(index) != entry {
                self.l1.set(index, entry);
            }
        }
        self.l1_offset.store(header.l1_offset, Ordering::SeqCst);
        self.meta().l1_room = u64::from(header.l1_room);
        Ok(())
    }

    /// Brings everything to disk and lets go of what only writing needs.
    pub fn end_writing(&self) -> Result<()> {
        self.settle().map_err(|e| Error::io("write the image's tables", e))?;
        self.writable.store(false, Ordering::SeqCst);
        self.meta().refcounts = None;
        Ok(())
    }

    /// Brings everything to disk, also that clusters without a name are free.
    pub fn settle(&self) -> io::Result<()> {
        if self.meta().refcounts.is_none() {
            return Ok(());
        }
        self.write_back()?;
        drop(self.gate.close());
        let bitmaps = self.meta().bitmaps.in_use;
        let stored = self.store_bitmaps();
        // Once for what became free, and once more if that was more than one round takes.
        for _ in 0..2 {
            if bitmaps { self.write_back()? } else { self.write_rest()? }
        }
        stored
    }

    /// Where metadata stands. Two structures in one place mean that the image is damaged.
    fn metadata(&self, header: &Header, counts: &Refcounts, bitmaps: &[Range<u64>]) -> Result<Places> {
        let size = self.rules.cluster_size();
        let bits = self.rules.cluster_bits;
        let tables = || self.l1.tables(usize::MAX).filter(|(_, entry)| entry.offset().is_multiple_of(size));
        let mut found = Found::with_room_for(tables().count() + counts.table.len());
        let mut take = |kind: Structure, offset: u64, bytes: u64| {
            found.add(offset >> bits..(offset + bytes).div_ceil(size), kind);
        };
        take(Structure::Header, 0, 1);
        let table_bytes = u64::from(header.refcount_table_clusters) * size;
        take(Structure::RefcountTable, header.refcount_table_offset, table_bytes);
        take(Structure::L1Table, header.l1_offset, u64::from(header.l1_room) * 8);
        if let Some(place) = &header.luks {
            take(Structure::LuksHeader, place.start, place.end - place.start);
        }
        for place in bitmaps {
            take(Structure::Bitmap, place.start, place.end - place.start);
        }
        let in_range = |&&block: &&u64| block != 0 && block < MAX_OFFSET && block.is_multiple_of(size);
        for &block in counts.table.iter().filter(in_range) {
            take(Structure::RefcountBlock, block, size);
        }
        for (_, entry) in tables() {
            take(Structure::L2Table, entry.offset(), size);
        }
        self.snapshot_tables(header, &mut take)?;
        Places::new(found).map_err(|(cluster, kind)| {
            let (what, offset) = (kind.name(), cluster << bits);
            Error::corrupt(format!(
                "the image is damaged: its {what} at offset {offset:#x} overlaps other metadata; it can be read only"
            ))
        })
    }

    /// What belongs to snapshots.
    fn snapshot_tables(&self, header: &Header, take: &mut impl FnMut(Structure, u64, u64)) -> Result<()> {
        if header.snapshots == 0 {
            return Ok(());
        }
        let size = self.rules.cluster_size();
        let entries = snapshot_table::read(&self.file, header.snapshots_offset, header.snapshots, header.size)?;
        take(Structure::SnapshotTable, header.snapshots_offset, snapshot_table::bytes(&entries).len() as u64);
        let mut tables = 0;
        for entry in &entries {
            let bytes = u64::from(entry.l1_entries) * 8;
            if !entry.l1_offset.is_multiple_of(size) || entry.l1_offset > MAX_OFFSET - bytes {
                return Err(Error::corrupt(format!("Snapshot L1 table offset invalid: {:#x}", entry.l1_offset)));
            }
            take(Structure::SnapshotL1Table, entry.l1_offset, bytes);
            if !self.guards_snapshots {
                continue;
            }
            let l1 = read_words(&self.file, entry.l1_offset, entry.l1_entries.into(), Wait::Allowed);
            for word in l1.map_err(|e| Error::io("read the L1 table of a snapshot", e))? {
                let offset = L1Entry(word).offset();
                if offset != 0 && offset.is_multiple_of(size) {
                    tables += 1;
                    take(Structure::SnapshotL2Table, offset, size);
                }
            }
            if tables > MOST_GUARDED {
                return Err(Error::unsupported(format!(
                    "the snapshots have more than {MOST_GUARDED} L2 tables, too many for overlap-check=all"
                )));
            }
        }
        Ok(())
    }
}
