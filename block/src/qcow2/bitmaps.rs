// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Persistent dirty bitmaps: read when the image is opened, stored when it is closed.
//!
//! As long as the image is open for writing, what stands on disk is marked as in use, before the first write: after a crash it is
//! known to be out of date, and can only be removed. At the end everything is written in new room, and the header changes last.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use rustix::io::Errno;

use super::Qcow2;
use super::bitmap_directory::{
    self as directory, AT_FLAGS, AUTO, Directory, Entry, IN_USE, MAX_BITMAPS, MAX_CONTENT, MAX_DIRECTORY, MAX_NAME,
};
use super::header::Header;
use super::meta::Unnamed;
use super::places::Structure;
use super::tables::read_words;
use crate::bitmap::Bitmap;
use crate::{Error, Result, Wait};

/// Offset of a bitmap's cluster in its table's entries: bits 9 to 55. Bit 0, without an offset: all ones.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const ALL_ONES: u64 = 1 << 0;
/// Most bytes of memory for the bitmaps of an image.
const MOST_MEMORY: u64 = 512 << 20;

/// Most clusters of all bitmaps together: as many of 512 bytes as that memory holds.
const MOST_CLUSTERS: u64 = MOST_MEMORY / 512;

/// What of the bitmaps stands on disk.
#[derive(Debug, Default)]
pub struct Stored {
    pub directory: Option<Directory>,
    pub entries: Vec<Entry>,
    /// Entries are marked as in use: memory has what counts.
    pub in_use: bool,
}

impl Qcow2 {
    /// Reads the bitmaps that the image keeps.
    ///
    /// # Errors
    /// `Corrupt` for what breaks the rules, `Unsupported` for more than the memory that there is for them; `Io`.
    pub fn load_bitmaps(&self, header: &Header) -> Result<()> {
        let stored = self.read_directory(header)?;
        let mut memory = 0;
        let mut found = Vec::new();
        for entry in &stored.entries {
            let bitmap = if entry.flags & IN_USE != 0 {
                Bitmap::lost(&entry.name, entry.granularity_bits)
            } else {
                self.load_bitmap(entry, &mut memory)?
            };
            bitmap.set_enabled(entry.flags & (AUTO | IN_USE) == AUTO);
            found.push(Arc::new(bitmap));
        }
        // All at once: there may be many.
        self.bitmaps.add_all(found);
        self.meta().bitmaps = stored;
        Ok(())
    }

    fn read_directory(&self, header: &Header) -> Result<Stored> {
        if header.autoclear & super::header::BITMAPS == 0 {
            // None, or somebody wrote who knows nothing of bitmaps.
            return Ok(Stored::default());
        }
        let Some(data) = self.bitmap_extension()? else { return Ok(Stored::default()) };
        let found = Directory::parse(&data, self.rules)?;
        let there = self.file.len().checked_sub(found.len).is_some_and(|most| found.offset <= most);
        if !there {
            return Err(Error::corrupt(format!(
                "the bitmap directory at {:#x} passes the end of the file",
                found.offset
            )));
        }
        let mut bytes = vec![0; usize::try_from(found.len).unwrap_or(0)];
        let read = self.file.read(&mut bytes, found.offset, Wait::Allowed);
        read.map_err(|e| Error::io("read the bitmap directory", e))?;
        let entries = directory::parse(&bytes, found.bitmaps, self.rules, header.size)?;
        // Tables may share their place, so the length of the file says nothing.
        if entries.iter().map(|entry| u64::from(entry.entries)).sum::<u64>() > MOST_CLUSTERS {
            return Err(Error::unsupported(format!("the image's bitmaps take more than {MOST_CLUSTERS} clusters")));
        }
        Ok(Stored { directory: Some(found), entries, in_use: false })
    }

    fn load_bitmap(&self, entry: &Entry, memory: &mut u64) -> Result<Bitmap> {
        let name = entry.name.escape_debug();
        let failed = |e| Error::io(&format!("read bitmap '{name}'"), e);
        let unsound = || Error::corrupt(format!("Bitmap '{name}' doesn't satisfy the constraints"));
        let bitmap = Bitmap::new(&entry.name, entry.granularity_bits, self.size()).ok_or_else(unsound)?;
        let (len, size) = (bitmap.stored_len(), self.rules.cluster_size());
        if u64::from(entry.entries) != len.div_ceil(size) {
            return Err(unsound());
        }
        for (index, place) in self.bitmap_table(entry).map_err(failed)?.into_iter().enumerate() {
            let at = index as u64 * size;
            if place & !(OFFSET | ALL_ONES) != 0 || !(place & OFFSET).is_multiple_of(size) {
                return Err(unsound());
            }
            let mut bytes = vec![0xff; usize::try_from(size.min(len - at)).unwrap_or(0)];
            match (place & OFFSET, place & ALL_ONES) {
                (0, 0) => continue,
                (0, _) => {}
                (_, 1) => return Err(unsound()),
                (place, _) => self.file.read_or_zero(&mut bytes, place, Wait::Allowed).map_err(failed)?,
            }
            bitmap.load(at, &bytes);
        }
        *memory += bitmap.memory();
        if *memory > MOST_MEMORY {
            return Err(Error::unsupported(format!(
                "the image's bitmaps take more than {MOST_MEMORY} bytes of memory"
            )));
        }
        bitmap.set_persistent(true);
        Ok(bitmap)
    }

    /// At most 8 MiB: the directory's check has made sure of that.
    fn bitmap_table(&self, entry: &Entry) -> io::Result<Vec<u64>> {
        read_words(&self.file, entry.table, entry.entries.into(), Wait::Allowed)
    }

    /// Host bytes of one bitmap: its table and what that names.
    fn bitmap_places(&self, entry: &Entry) -> io::Result<Vec<Range<u64>>> {
        let size = self.rules.cluster_size();
        let table = entry.table..entry.table + u64::from(entry.entries) * 8;
        let places = self.bitmap_table(entry)?.into_iter().map(|place| place & OFFSET);
        let places = places.filter(|&place| place != 0 && place.is_multiple_of(size)).map(|place| place..place + size);
        Ok([table].into_iter().chain(places).collect())
    }

    /// Host bytes of all that stands on disk of bitmaps, by the header that was just read.
    ///
    /// # Errors
    /// The image has other bitmaps than when it was opened, or they cannot be read.
    pub fn bitmaps_on_disk(&self, header: &Header) -> Result<(Stored, Vec<Range<u64>>)> {
        let stored = self.read_directory(header)?;
        let names = |stored: &Stored| stored.entries.iter().map(|entry| entry.name.clone()).collect::<Vec<_>>();
        if names(&stored) != names(&self.meta().bitmaps) {
            return Err(Error::invalid(
                "the image's bitmaps have changed since it was opened; close it and open it again",
            ));
        }
        let mut places: Vec<_> =
            stored.directory.iter().map(|directory| directory.offset..directory.offset + directory.len).collect();
        for entry in &stored.entries {
            places.extend(self.bitmap_places(entry).map_err(|e| Error::io("read a bitmap's table", e))?);
        }
        Ok((stored, places))
    }

    /// Marks what stands on disk as in use; on disk on return.
    pub fn use_bitmaps(&self, stored: &mut Stored) -> io::Result<()> {
        if let Some(directory) = stored.directory {
            let mut at = directory.offset;
            let mut changed = false;
            for entry in &mut stored.entries {
                if entry.flags & IN_USE == 0 {
                    entry.flags |= IN_USE;
                    self.file.write(&entry.flags.to_be_bytes(), at + AT_FLAGS, false)?;
                    changed = true;
                }
                at += entry.len();
            }
            if changed {
                self.file.flush()?;
            }
        }
        stored.in_use = true;
        Ok(())
    }

    /// Stores every persistent bitmap. Nothing is written to the disk any more.
    pub fn store_bitmaps(&self) -> io::Result<()> {
        let before = {
            let mut meta = self.meta();
            if !meta.bitmaps.in_use || meta.corrupt {
                return Ok(());
            }
            meta.bitmaps.in_use = false;
            meta.bitmaps.entries.clone()
        };
        let bitmaps: Vec<_> = self.bitmaps.list().into_iter().filter(|bitmap| bitmap.is_persistent()).collect();
        if bitmaps.is_empty() && before.is_empty() {
            return Ok(());
        }
        let mut entries = Vec::new();
        let mut kept = Vec::new();
        for bitmap in bitmaps {
            if !bitmap.is_inconsistent() {
                entries.push(self.store_bitmap(&bitmap)?);
            } else if let Some(entry) = before.iter().find(|entry| entry.name == bitmap.name()) {
                kept.push(entry.name.clone());
                entries.push(entry.clone());
            }
        }
        let gone: Vec<_> = before.into_iter().filter(|entry| !kept.contains(&entry.name)).collect();
        self.switch_directory(entries, &gone)
    }

    /// Writes a bitmap in new room; nobody names it yet.
    fn store_bitmap(&self, bitmap: &Bitmap) -> io::Result<Entry> {
        let (len, size) = (bitmap.stored_len(), self.rules.cluster_size());
        let mut table = Vec::new();
        for index in 0..len.div_ceil(size) {
            let place = match bitmap.stored(index * size..len.min((index + 1) * size)) {
                Some(bytes) => self.put_table(&bytes, Structure::Bitmap)?,
                None => 0,
            };
            table.extend(place.to_be_bytes());
        }
        Ok(Entry {
            table: self.put_table(&table, Structure::Bitmap)?,
            entries: u32::try_from(table.len() / 8).map_err(|_| Errno::FBIG)?,
            flags: if bitmap.is_enabled() { AUTO } else { 0 },
            granularity_bits: bitmap.granularity_bits(),
            name: bitmap.name().to_owned(),
        })
    }

    /// Makes `entries` what the image keeps, and lets go of those that are gone.
    fn switch_directory(&self, entries: Vec<Entry>, gone: &[Entry]) -> io::Result<()> {
        let bytes = directory::bytes(&entries);
        let old = self.meta().bitmaps.directory;
        let mut unnamed = Vec::new();
        for entry in gone {
            unnamed.extend(self.bitmap_places(entry)?);
        }
        unnamed.extend(old.map(|old| old.offset..old.offset + old.len));
        let new = if entries.is_empty() {
            self.write_back()?;
            self.remove_bitmap_extension()?;
            None
        } else {
            let offset = self.put_table(&bytes, Structure::Bitmap)?;
            let bitmaps = u32::try_from(entries.len()).map_err(|_| Errno::FBIG)?;
            let new = Directory { bitmaps, len: bytes.len() as u64, offset };
            // With it, whatever it names and the counts of all that.
            self.write_back()?;
            self.put_bitmap_extension(new.data())?;
            Some(new)
        };
        let size = self.rules.cluster_size();
        let mut meta = self.meta();
        meta.bitmaps.directory = new;
        meta.bitmaps.entries = entries;
        let whole = |place: Range<u64>| (place.end - place.start).next_multiple_of(size);
        let let_go = unnamed.into_iter().map(|place| Unnamed::structure(place.start, whole(place), Structure::Bitmap));
        meta.unnamed.extend(let_go);
        Ok(())
    }

    /// Takes a bitmap out of the image that stands there.
    ///
    /// # Errors
    /// The image is read-only; `Io`.
    pub fn remove_stored_bitmap(&self, name: &str) -> Result<()> {
        let (rest, gone): (Vec<_>, Vec<_>) = {
            let meta = self.meta();
            if meta.refcounts.is_none() {
                return Err(Error::invalid(format!("Block node is read-only: '{}'", self.node_name)));
            }
            meta.bitmaps.entries.iter().cloned().partition(|entry| entry.name != name)
        };
        if gone.is_empty() {
            return Ok(());
        }
        self.switch_directory(rest, &gone).map_err(|e| Error::io("change the bitmap directory", e))
    }

    /// Whether one more bitmap can be stored.
    ///
    /// # Errors
    /// It cannot, in QEMU's words.
    pub fn check_new_bitmap(&self, name: &str, granularity_bits: u32) -> Result<()> {
        let refused = |text: &str| {
            let node = &self.node_name;
            Err(Error::invalid(format!("Can't make bitmap '{name}' persistent in '{node}': {text}")))
        };
        if self.rules.version < 3 {
            // Without autoclear bits nobody who writes it would say so.
            return refused("Cannot store dirty bitmaps in qcow2 v2 files");
        }
        if self.bitmaps.get(name).is_some() {
            return refused(&format!("Bitmap already exists: {name}"));
        }
        if name.len() > MAX_NAME {
            return refused("Name is too long");
        }
        let persistent: Vec<_> = self.bitmaps.list().into_iter().filter(|bitmap| bitmap.is_persistent()).collect();
        if persistent.len() >= MAX_BITMAPS {
            return refused("Maximum number of persistent bitmaps is already reached");
        }
        let entry = |name: &str| (24 + name.len() as u64).next_multiple_of(8);
        if persistent.iter().map(|bitmap| entry(bitmap.name())).sum::<u64>() + entry(name) > MAX_DIRECTORY {
            return refused("Not enough space in the bitmap directory");
        }
        if self.size().div_ceil(1 << granularity_bits).div_ceil(8) > MAX_CONTENT {
            return refused("Too much space will be occupied by the bitmap. Use larger granularity");
        }
        Ok(())
    }
}
