// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What can be done to an image that nobody has open: check it and repair it.
//!
//! Like [opening](crate::DRIVERS), it takes nodes and opens nothing.

use std::sync::Arc;

use crate::{BlockNode, Error, ErrorKind, Result, qcow2};

/// Every format of which an image can be more than opened, one line each.
pub const FORMATS: &[Format] = &[Format { name: "qcow2", check: Some(qcow2::check::check) }];

/// The format called `name`, exactly.
pub fn format_named(name: &str) -> Option<&'static Format> {
    FORMATS.iter().find(|format| format.name == name)
}

/// Hears what a check finds, one sentence at a time.
pub type Say<'a> = &'a mut dyn FnMut(&str);

/// Looks for damage.
pub type Check = fn(&Arc<BlockNode>, Repair, Say<'_>) -> Result<CheckReport>;

/// What a format can do.
#[derive(Debug)]
pub struct Format {
    /// The name of its driver.
    pub name: &'static str,
    /// Looks for damage in the image in a node, which is writable and nobody else's if something is to be repaired.
    pub check: Option<Check>,
}

/// What a check puts right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing: the image is only read.
    #[default]
    Nothing,
    /// Clusters that are counted as used and that nothing names.
    Leaks,
    /// Everything that can be.
    All,
}

/// What a check found. What was repaired counts under `…_fixed` alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Things that could not be looked at.
    pub check_errors: u64,
    /// Damage: writing to the image may destroy data.
    pub corruptions: u64,
    /// Clusters that take room and hold nothing.
    pub leaks: u64,
    /// Damage that was repaired.
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// Where the image ends in its file, in bytes.
    pub image_end_offset: u64,
    /// Clusters of the guest's disk.
    pub total_clusters: u64,
    /// Of these, clusters that are stored.
    pub allocated_clusters: u64,
    /// Of these, clusters that do not follow the one before.
    pub fragmented_clusters: u64,
    /// Of these, clusters that are stored compressed.
    pub compressed_clusters: u64,
}

/// Checks the image of format `format` in `file`, and repairs what `repair` says; `say` hears of every single thing.
///
/// # Errors
/// `Unsupported` in QEMU's words if the format cannot be checked; the image cannot be opened at all, is too large or too damaged
/// to be counted, or cannot be written.
pub fn check(file: &Arc<BlockNode>, format: &str, repair: Repair, say: Say<'_>) -> Result<CheckReport> {
    let Some(check) = format_named(format).and_then(|format| format.check) else {
        return Err(Error::new(ErrorKind::Unsupported, "This image format does not support checks"));
    };
    if repair != Repair::Nothing && !file.writable() {
        return Err(Error::invalid(format!("Block node is read-only: '{}' cannot be repaired", file.name())));
    }
    check(file, repair, say)
}
