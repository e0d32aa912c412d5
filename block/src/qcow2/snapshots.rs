// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Internal snapshots: made, gone back to, and let go.
//!
//! A snapshot is a second L1 table over the same clusters, each of which then has one more user. The gate is closed meanwhile, so
//! the mapping stands still. The header changes in one sector, when all that it names is on disk:
//!
//! ```text
//! create   counts up  ►  copied flags off  ►  copies of L1 and of the table  ►  header
//! apply    counts up (of the snapshot's)  ►  a new active L1  ►  header (size and L1 together)  ►  counts down (of the old)  ►  flags
//! delete   the table without it  ►  header  ►  counts down  ►  copied flags on where one user is left
//! ```
//!
//! Between counts and flags a crash would leave flags that do not fit: harmless, but a fault to every checker. So the image is
//! marked dirty from the first count to the last flag (version 3), and whoever opens it next puts counts and flags in order.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::Qcow2;
use super::entry::{L1Entry, L2Entry};
use super::header;
use super::meta::{Meta, Unnamed};
use super::places::Structure;
use super::snapshot_table::{self, Entry};
use super::tables::read_words;
use crate::snapshot::{Snapshot, Snapshots};
use crate::{Error, Result, Wait};

/// Most snapshots, as in QEMU.
const MAX_SNAPSHOTS: usize = 65536;
/// Longest name in bytes.
const MAX_NAME: usize = 255;

/// Whether the users of clusters become more or fewer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Up,
    Down,
    /// Neither: whether all stands where it can.
    Look,
}

impl Snapshots for Qcow2 {
    fn list(&self) -> Result<Vec<Snapshot>> {
        Ok(self.read_table()?.into_iter().map(|entry| entry.snapshot).collect())
    }

    fn create(&self, name: &str, date: (u32, u32)) -> Result<Snapshot> {
        if name.len() > MAX_NAME {
            return Err(Error::invalid(format!("a snapshot's name has at most {MAX_NAME} bytes, not {}", name.len())));
        }
        self.check_can_change()?;
        let closed = self.gate.close();
        let entries = self.read_table()?;
        if entries.len() >= MAX_SNAPSHOTS {
            return Err(Error::unsupported(format!("the image has {MAX_SNAPSHOTS} snapshots already")));
        }
        let last = entries.iter().filter_map(|entry| entry.snapshot.id.parse::<u64>().ok()).max().unwrap_or(0);
        let snapshot = Snapshot {
            id: (last + 1).to_string(),
            name: name.to_owned(),
            vm_state_size: 0,
            date,
            vm_clock: 0,
            disk_size: self.size(),
            icount: None,
        };
        let made = self.keep(entries, &snapshot);
        drop(closed);
        made.map(|()| snapshot)
    }

    fn apply(&self, which: &str) -> Result<()> {
        self.check_can_change()?;
        let entries = self.read_table()?;
        let found = entries
            .iter()
            .find(|entry| entry.snapshot.id == which)
            .or_else(|| entries.iter().find(|entry| entry.snapshot.name == which))
            .ok_or_else(|| Error::invalid(format!("Can't find snapshot '{which}'")))?;
        let _closed = self.gate.close();
        let failed = |e| Error::io("apply the snapshot", e);
        self.write_back().map_err(failed)?;
        let l1 = self.l1_to_go_back_to(found).map_err(failed)?;
        self.count_up(&l1)?;
        self.go_back(&l1, found.snapshot.disk_size).map_err(failed)
    }

    fn show(&self, id: Option<&str>, name: Option<&str>) -> Result<()> {
        let entries = self.read_table()?;
        let found = &entries[position(&entries, id, name)?];
        let _closed = self.gate.close();
        let before = self.active_l1();
        let l1 = self.l1_to_go_back_to(found).map_err(|e| Error::io("read the snapshot's tables", e))?;
        let mut meta = self.meta();
        if meta.refcounts.is_some() {
            return Err(Error::invalid(format!("Block node is writable: '{}'", self.node_name)));
        }
        for index in 0..before.len().max(l1.len()) {
            self.l1.set(index, L1Entry(l1.get(index).copied().unwrap_or(0)));
        }
        meta.l1_room = l1.len() as u64;
        self.size.store(found.snapshot.disk_size, Ordering::Relaxed);
        self.slices.clear();
        Ok(())
    }

    fn delete(&self, id: Option<&str>, name: Option<&str>) -> Result<Snapshot> {
        self.check_can_change()?;
        let mut entries = self.read_table()?;
        let at = position(&entries, id, name)?;
        let gone = entries.remove(at);
        let _closed = self.gate.close();
        self.let_go(&entries, &gone).map_err(|e| Error::io("delete the snapshot", e))?;
        Ok(gone.snapshot)
    }
}

/// Where the snapshot stands that has this id and this name, as far as they are given.
fn position(entries: &[Entry], id: Option<&str>, name: Option<&str>) -> Result<usize> {
    let fits =
        |snapshot: &Snapshot| id.is_none_or(|id| snapshot.id == id) && name.is_none_or(|name| snapshot.name == name);
    entries.iter().position(|entry| fits(&entry.snapshot)).ok_or_else(|| {
        let words = [id.map(|id| format!("id '{id}'")), name.map(|name| format!("name '{name}'"))];
        Error::invalid(format!(
            "Snapshot with {} not found",
            words.into_iter().flatten().collect::<Vec<_>>().join(" and ")
        ))
    })
}

impl Qcow2 {
    fn check_can_change(&self) -> Result<()> {
        if self.rules.external_data {
            return Err(Error::unsupported(
                "an image with an external data file keeps no snapshots: its data has one place only",
            ));
        }
        if self.meta().refcounts.is_none() {
            return Err(Error::invalid(format!("Block node is read-only: '{}'", self.node_name)));
        }
        Ok(())
    }

    fn read_table(&self) -> Result<Vec<Entry>> {
        let (count, offset) = {
            let meta = self.meta();
            (meta.snapshots, meta.snapshots_offset)
        };
        snapshot_table::read(&self.file, offset, count, self.size())
    }

    /// Makes a snapshot of the present state. The gate is closed.
    fn keep(&self, mut entries: Vec<Entry>, snapshot: &Snapshot) -> Result<()> {
        let failed = |e: io::Error| Error::io("make a snapshot", e);
        self.write_back().map_err(failed)?;
        let l1 = self.active_l1();
        self.count_up(&l1)?;
        let kept = (|| {
            self.write_back()?;
            self.fit_flags(&l1)?;
            let plain: Vec<u64> = l1.iter().map(|&entry| L1Entry(entry).offset()).collect();
            let bytes: Vec<u8> = plain.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            let l1_offset = self.put_table(&bytes, Structure::SnapshotL1Table)?;
            entries.push(Entry {
                l1_offset,
                l1_entries: u32::try_from(plain.len()).unwrap_or(u32::MAX),
                snapshot: snapshot.clone(),
                unknown: Vec::new(),
            });
            self.switch_table(&entries)?;
            self.set_dirty(false)
        })();
        kept.map_err(failed)
    }

    /// Makes every cluster of the guest's one that only the backing file has.
    ///
    /// # Errors
    /// The image is read-only or has an external data file; `Io`.
    pub fn let_everything_go(&self) -> Result<()> {
        self.check_can_change()?;
        let _closed = self.gate.close();
        let failed = |e| Error::io("empty the image", e);
        self.write_back().map_err(failed)?;
        let entries = self.size().div_ceil(self.rules.l2_entries() << self.rules.cluster_bits);
        let l1 = vec![0; usize::try_from(entries).unwrap_or(usize::MAX)];
        self.set_dirty(true).map_err(failed)?;
        self.go_back(&l1, self.size()).map_err(failed)
    }

    /// A snapshot's L1 table, long enough for the disk that it was.
    fn l1_to_go_back_to(&self, to: &Entry) -> io::Result<Vec<u64>> {
        let needed = to.snapshot.disk_size.div_ceil(self.rules.l2_entries() << self.rules.cluster_bits);
        if needed > header::MAX_L1_BYTES / 8 {
            return Err(Errno::FBIG.into());
        }
        let mut l1 = self.read_l1_at(to.l1_offset, to.l1_entries)?;
        l1.resize(l1.len().max(usize::try_from(needed).unwrap_or(usize::MAX)), 0);
        Ok(l1)
    }

    /// One more user for everything below an L1 table, with the image marked dirty; on an error nothing has changed.
    fn count_up(&self, l1: &[u64]) -> Result<()> {
        let failed = |e| Error::io("count the clusters of a snapshot", e);
        self.set_dirty(true).map_err(failed)?;
        let Err(e) = self.count_tree(l1, Step::Up) else { return Ok(()) };
        self.set_dirty(false).map_err(failed)?;
        Err(if e.raw_os_error() == Some(Errno::INVAL.raw_os_error()) {
            Error::unsupported(format!(
                "a cluster of the image has as many users as {} bits of refcount can say; nothing has changed",
                self.header.refcount_bits()
            ))
        } else {
            failed(e)
        })
    }

    /// Makes a counted L1 table the active one, for a disk of `size` bytes.
    fn go_back(&self, l1: &[u64], size: u64) -> io::Result<()> {
        let before = self.active_l1();
        let bytes: Vec<u8> = l1.iter().flat_map(|&entry| L1Entry(entry).offset().to_be_bytes()).collect();
        let place = self.put_table(&bytes, Structure::L1Table)?;
        self.write_back()?;
        // Size and L1 table stand in one sector: a crash leaves the old state or the new one.
        let (old_place, old_room) = (self.l1_offset.load(Ordering::Relaxed), self.meta().l1_room);
        // The crypt method stands between them.
        let mut crypt = [0; 4];
        self.file.read(&mut crypt, header::AT_SIZE + 8, Wait::Allowed)?;
        let field = |size: u64, room: u64, place: u64| {
            let room = u32::try_from(room).unwrap_or(u32::MAX).to_be_bytes();
            [&size.to_be_bytes()[..], &crypt, &room, &place.to_be_bytes()].concat()
        };
        let room = l1.len() as u64;
        let old = field(self.size(), old_room, old_place);
        self.switch(&mut self.meta(), header::AT_SIZE, &field(size, room, place), &old)?;
        self.l1_offset.store(place, Ordering::Relaxed);
        for index in 0..before.len().max(l1.len()) {
            self.l1.set(index, L1Entry(l1.get(index).copied().unwrap_or(0)));
        }
        self.size.store(size, Ordering::Relaxed);
        // All of the disk may be another than it was.
        self.bitmaps.resize(size);
        self.bitmaps.mark(0, size);
        self.slices.clear();
        {
            let mut meta = self.meta();
            meta.l1_room = room;
            if old_room > 0 {
                let len = (old_room * 8).next_multiple_of(self.rules.cluster_size());
                meta.unnamed.push(Unnamed::structure(old_place, len, Structure::L1Table));
            }
        }
        self.guard_l2_tables(l1);
        self.count_tree(&before, Step::Down)?;
        self.write_back()?;
        self.fit_flags(l1)?;
        self.set_dirty(false)
    }

    fn let_go(&self, rest: &[Entry], gone: &Entry) -> io::Result<()> {
        self.write_back()?;
        let l1 = self.read_l1_at(gone.l1_offset, gone.l1_entries)?;
        self.count_tree(&l1, Step::Look)?;
        self.set_dirty(true)?;
        self.switch_table(rest)?;
        self.count_tree(&l1, Step::Down)?;
        if gone.l1_entries > 0 {
            let len = (u64::from(gone.l1_entries) * 8).next_multiple_of(self.rules.cluster_size());
            self.meta().unnamed.push(Unnamed::structure(gone.l1_offset, len, Structure::SnapshotL1Table));
        }
        self.write_back()?;
        self.fit_flags(&self.active_l1())?;
        self.set_dirty(false)
    }

    /// The active L1 table, as far as the header counts it.
    fn active_l1(&self) -> Vec<u64> {
        let room = self.meta().l1_room;
        (0..room).map(|index| self.l1_entry(index).0).collect()
    }

    fn read_l1_at(&self, offset: u64, entries: u32) -> io::Result<Vec<u64>> {
        if !offset.is_multiple_of(self.rules.cluster_size()) {
            return Err(Errno::IO.into());
        }
        read_words(&self.file, offset, u64::from(entries), Wait::Allowed)
    }

    /// The entries of an L2 table.
    fn l2_entries_at(&self, table: u64) -> io::Result<Vec<L2Entry>> {
        if !table.is_multiple_of(self.rules.cluster_size()) {
            return Err(Errno::IO.into());
        }
        let words = read_words(&self.file, table, self.rules.cluster_size() / 8, Wait::Allowed)?;
        let step = if self.rules.extended { 2 } else { 1 };
        let entry = |words: &[u64]| L2Entry { word: words[0], bitmap: words.get(1).copied().unwrap_or(0) };
        Ok(words.chunks_exact(step).map(entry).collect())
    }

    /// Counts every user that an L1 table is, of L2 tables and of what those name. Going up, an error takes all of it back.
    fn count_tree(&self, l1: &[u64], step: Step) -> io::Result<()> {
        let mut freed = Vec::new();
        let mut counted = 0;
        let result = self.count_some(l1, step, u64::MAX, &mut counted, &mut freed);
        if result.is_err() && step == Step::Up {
            self.count_some(l1, Step::Down, counted, &mut 0, &mut Vec::new())?;
        }
        result?;
        if !freed.is_empty() {
            // On disk first: until then a crash could name them again.
            self.write_back()?;
            for run in freed {
                self.discard_host(&self.file, run.start, run.end - run.start);
            }
        }
        Ok(())
    }

    /// As [`Qcow2::count_tree`], for the first `most` steps.
    fn count_some(
        &self,
        l1: &[u64],
        step: Step,
        most: u64,
        counted: &mut u64,
        freed: &mut Vec<Range<u64>>,
    ) -> io::Result<()> {
        let size = self.rules.cluster_size();
        for table in l1.iter().map(|&entry| L1Entry(entry).offset()).filter(|&table| table != 0) {
            let entries = self.l2_entries_at(table)?;
            let named =
                entries.iter().filter_map(|&entry| self.host_bytes(entry, 0)).filter(|named| named.stays_of.is_none());
            let own = Unnamed::structure(table, size, Structure::L2Table);
            for Unnamed { offset, len, of, .. } in named.chain([own]) {
                for cluster in offset / size..=(offset + len - 1) / size {
                    if *counted >= most {
                        return Ok(());
                    }
                    let mut meta = self.meta();
                    let left = self.count_one(&mut meta, cluster, of, step)?;
                    *counted += 1;
                    if left == 0 {
                        match freed.last_mut() {
                            Some(run) if run.end == cluster * size => run.end += size,
                            _ => freed.push(cluster * size..(cluster + 1) * size),
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn count_one(&self, meta: &mut Meta, cluster: u64, of: Option<Structure>, step: Step) -> io::Result<u64> {
        if step == Step::Down {
            return self.drop_user(meta, cluster, of);
        }
        self.check_place(meta, cluster, of)?;
        if step == Step::Look {
            return Ok(2);
        }
        let counts = meta.refcounts.as_mut().ok_or(Errno::ROFS)?;
        match counts.add_user(cluster) {
            Ok(()) => Ok(2),
            Err(refused) => Err(self.refusal(meta, refused)),
        }
    }

    /// Makes the copied flags of the active L1 table and its L2 tables what the counts say, on disk and in memory.
    fn fit_flags(&self, l1: &[u64]) -> io::Result<()> {
        let mut changed = false;
        for (index, &entry) in l1.iter().enumerate() {
            let table = L1Entry(entry).offset();
            if table == 0 {
                continue;
            }
            let mut words = Vec::new();
            let mut differs = false;
            for entry in self.l2_entries_at(table)? {
                let fitting = match entry.place(self.rules) {
                    Some(_) if self.rules.external_data => entry,
                    Some(place) => entry.with_exclusive(self.has_one_user(place)?),
                    None => entry,
                };
                differs |= fitting != entry;
                words.push(fitting.word);
                if self.rules.extended {
                    words.push(fitting.bitmap);
                }
            }
            if differs {
                self.check_place(&mut self.meta(), table / self.rules.cluster_size(), Some(Structure::L2Table))?;
                let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
                self.file.write(&bytes, table, false)?;
            }
            let fitting = if self.has_one_user(table)? { L1Entry::exclusive(table) } else { L1Entry(table) };
            if fitting != L1Entry(entry) {
                self.l1.set(index, fitting);
                self.meta().dirty_l1.insert(index, fitting);
            }
            changed |= differs;
        }
        if changed {
            self.slices.clear();
        }
        self.write_back()?;
        self.file.flush()
    }

    /// The tables of a snapshot that has become the active image.
    fn guard_l2_tables(&self, l1: &[u64]) {
        let bits = self.rules.cluster_bits;
        let mut meta = self.meta();
        let Some(counts) = &mut meta.refcounts else { return };
        for table in l1.iter().map(|&entry| L1Entry(entry).offset() >> bits).filter(|&table| table != 0) {
            // Counting has made sure that nothing but a table of this kind stands there.
            counts.metadata.remove(table);
            counts.metadata.add(table..table + 1, Structure::L2Table);
        }
    }

    fn has_one_user(&self, place: u64) -> io::Result<bool> {
        let mut meta = self.meta();
        let counts = meta.refcounts.as_mut().ok_or(Errno::ROFS)?;
        match counts.get(place >> self.rules.cluster_bits) {
            Ok(count) => Ok(count == 1),
            Err(refused) => Err(self.refusal(&mut meta, refused)),
        }
    }

    /// Makes `entries` the image's snapshots.
    fn switch_table(&self, entries: &[Entry]) -> io::Result<()> {
        let bytes = snapshot_table::bytes(entries);
        let place = if entries.is_empty() { 0 } else { self.put_table(&bytes, Structure::SnapshotTable)? };
        self.write_back()?;
        self.file.flush()?;
        let count = u32::try_from(entries.len()).map_err(|_| Errno::FBIG)?;
        let field = |count: u32, offset: u64| [&count.to_be_bytes()[..], &offset.to_be_bytes()].concat();
        let old_len = snapshot_table::bytes(&self.read_table().map_err(Error::into_io)?).len() as u64;
        let mut meta = self.meta();
        let (old_count, old_offset) = (meta.snapshots, meta.snapshots_offset);
        self.switch(&mut meta, header::AT_SNAPSHOTS, &field(count, place), &field(old_count, old_offset))?;
        (meta.snapshots, meta.snapshots_offset) = (count, place);
        if old_count > 0 {
            let len = old_len.next_multiple_of(self.rules.cluster_size());
            meta.unnamed.push(Unnamed::structure(old_offset, len, Structure::SnapshotTable));
        }
        Ok(())
    }

    /// Marks the image as one whose counts and flags must be put in order, or takes the mark away.
    fn set_dirty(&self, dirty: bool) -> io::Result<()> {
        if self.rules.version == 2 {
            return Ok(());
        }
        if !dirty {
            self.write_back()?;
        }
        if self.meta().corrupt {
            // The mark that says so stays as it is.
            return Err(Errno::IO.into());
        }
        let bits = self.header.incompatible & !header::DIRTY | if dirty { header::DIRTY } else { 0 };
        self.file.write(&bits.to_be_bytes(), header::AT_INCOMPATIBLE, false)?;
        self.file.flush()
    }
}
