// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Checking an image that nobody has open, and repairing it.
//!
//! [`walk`] follows everything from the header on and [counts] how often each host cluster is named. [`compare`] holds that
//! against the refcounts that are stored, [`copied`] against the flags that allow overwriting in place. A table that several L1
//! entries name is read once and counts as often as it is named, so snapshots cost nothing but their L1 tables, and an image whose
//! tables form loops ends like any other.
//!
//! Repair never makes an image worse at any moment that a crash may pick:
//!
//! ```text
//!  1  entries that name nothing become zeroes or lose a wrong flag
//!  2  refcounts become what was counted, in place or in a new structure that the header names when it is on disk
//!  3  copied flags become what the counts say
//!  4  the marks of a dirty or corrupt image go when nothing is left
//! ```
//!
//! A count is lowered only if every table could be followed to its end: what could not be read may name clusters, too.

mod compare;
mod copied;
mod counts;
mod rebuild;
mod tables;
mod walk;
mod zeroes;

use std::io;
use std::sync::Arc;

use super::entry::Rules;
use super::header::{self, Header};
use crate::formats::Say;
use crate::{BlockNode, CheckReport, Error, Repair, Result, Wait};
use counts::{Counts, Ones};

/// A check under way.
struct Check<'a> {
    file: &'a BlockNode,
    header: Header,
    rules: Rules,
    repair: Repair,
    report: CheckReport,
    say: Say<'a>,
    /// Bytes of the file.
    len: u64,
    /// Clusters of the file, the last one perhaps cut.
    clusters: u64,
    /// One past the last cluster whose count matters: what reaches past the end of the file by less than a cluster, too.
    end: u64,
    counts: Counts,
    /// The active L1 table, as stored.
    l1: Vec<u64>,
    /// L2 tables by offset.
    tables: tables::Tables,
    /// The refcount table, as stored but for reserved bits.
    blocks: Vec<u64>,
    /// Blocks that were counted.
    sound_blocks: Vec<u64>,
    /// Clusters whose stored count nobody can read.
    unknown: u64,
    /// Corruptions that new refcounts put right.
    wrong_counts: u64,
    /// The refcounts cannot be put right in place.
    rebuild: bool,
    /// Something that may name clusters could not be followed.
    incomplete: bool,
    /// Clusters whose stored refcount is one when all is done.
    ones: Ones,
}

/// See [`crate::check`].
pub fn check(file: &Arc<BlockNode>, repair: Repair, say: Say<'_>) -> Result<CheckReport> {
    let mut check = Check::new(file, repair, say)?;
    check.walk()?;
    check.compare()?;
    check.check_copied_flags()?;
    check.mark_clean()?;
    Ok(check.report)
}

/// Stores the refcounts of an image of version 3 with 2^`order` bits to a count. At any moment of a crash it has its old
/// refcounts or its new ones.
///
/// # Errors
/// The image is damaged, or a cluster has more users than such a count can say; then nothing has changed. `Io`.
pub fn change_refcount_width(file: &Arc<BlockNode>, order: u32) -> Result<()> {
    let mut ignored = |_: &str| {};
    let mut check = Check::sound(file, &mut ignored)?;
    let (bits, most) = (1u64 << order, u64::MAX >> (64 - (1u32 << order)));
    if let Some(cluster) = (0..check.counts.end()).find(|&cluster| check.counts.get(cluster) > most) {
        let (offset, count) = (cluster << check.rules.cluster_bits, check.counts.get(cluster));
        return Err(Error::invalid(format!(
            "Cannot decrease refcount entry width to {bits} bits: Cluster at offset {offset:#x} has a refcount of {count}"
        )));
    }
    check.rebuild_refcounts(order)
}

/// Stores zeroes in an image of version 3 as version 2 can: see [`zeroes`]. At any moment of a crash, it reads as before.
///
/// # Errors
/// The image is damaged, or its file has no room for them. `Io`.
pub fn spell_out_zeroes(file: &Arc<BlockNode>, is_backed: bool) -> Result<()> {
    let mut ignored = |_: &str| {};
    Check::sound(file, &mut ignored)?.spell_out_zeroes(is_backed)
}

/// Repairs an image that was not closed properly, so that it can be written; its header now.
///
/// # Errors
/// As [`check`], or not everything could be repaired.
pub fn make_clean(file: &Arc<BlockNode>, node_name: &str) -> Result<Header> {
    let report = check(file, Repair::All, &mut |text| tracing::debug!(node = node_name, "{text}"))?;
    tracing::info!(
        node = node_name,
        "the image was not closed properly: {} corruptions and {} leaks repaired",
        report.corruptions_fixed,
        report.leaks_fixed
    );
    let header = Header::read(file)?;
    if header.dirty {
        return Err(Error::unsupported(format!(
            "qcow2: Could not repair dirty image: {} errors on check and {} corruptions are left",
            report.check_errors, report.corruptions
        )));
    }
    Ok(header)
}

impl<'a> Check<'a> {
    /// One that has looked at everything and found no damage.
    fn sound(file: &'a BlockNode, say: Say<'a>) -> Result<Check<'a>> {
        let mut check = Check::new(file, Repair::Nothing, say)?;
        check.walk()?;
        check.compare()?;
        check.check_copied_flags()?;
        if check.report.corruptions + check.report.check_errors > 0 {
            return Err(Error::invalid("the image is damaged; repair it first (check -r all)"));
        }
        Ok(check)
    }

    fn new(file: &'a BlockNode, repair: Repair, say: Say<'a>) -> Result<Check<'a>> {
        let header = Header::read(file)?;
        let rules = Rules {
            cluster_bits: header.cluster_bits,
            version: header.version,
            extended: header.extended_l2,
            external_data: header.external_data,
        };
        let len = file.len();
        let clusters = len.div_ceil(rules.cluster_size());
        Ok(Check {
            file,
            rules,
            repair,
            report: CheckReport {
                total_clusters: header.size.div_ceil(rules.cluster_size()),
                image_end_offset: rules.cluster_size(),
                ..CheckReport::default()
            },
            say,
            len,
            clusters,
            end: clusters,
            counts: Counts::new(clusters, u64::MAX >> (64 - header.refcount_bits()))?,
            l1: Vec::new(),
            tables: tables::Tables::default(),
            blocks: Vec::new(),
            sound_blocks: Vec::new(),
            unknown: 0,
            wrong_counts: 0,
            rebuild: false,
            incomplete: false,
            ones: Ones::default(),
            header,
        })
    }
}

impl Check<'_> {
    fn say(&mut self, text: &str) {
        (self.say)(text);
    }

    /// Damage that stays unless somebody counts it as fixed.
    fn corruption(&mut self, text: &str) {
        self.report.corruptions += 1;
        self.say(text);
    }

    /// Something that could not be read.
    fn unreadable(&mut self, what: &str, error: &io::Error) {
        self.report.check_errors += 1;
        self.incomplete = true;
        self.say(&format!("ERROR: could not read {what}: {error}"));
    }

    fn bytes(&self, offset: u64, len: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?];
        self.file.read_or_zero(&mut bytes, offset, Wait::Allowed)?;
        Ok(bytes)
    }

    fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.file.write_growing(bytes, offset, false).map_err(|e| Error::io("repair the image", e))
    }

    fn flush(&self) -> Result<()> {
        self.file.flush().map_err(|e| Error::io("repair the image", e))
    }

    /// Takes the marks away that keep others from writing, if nothing is left to repair.
    fn mark_clean(&mut self) -> Result<()> {
        let marks = self.header.incompatible & (header::DIRTY | header::CORRUPT);
        let is_clean = self.report.check_errors == 0 && self.report.corruptions == 0;
        if self.repair == Repair::Nothing || marks == 0 || !is_clean {
            return Ok(());
        }
        self.write(&(self.header.incompatible & !marks).to_be_bytes(), header::AT_INCOMPATIBLE)?;
        self.flush()
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word))
}
