// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Internal snapshots, as callers see them.

use crate::Result;

/// A state of the disk that its image keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Chosen by the format, unique in the image.
    pub id: String,
    /// Chosen by the user; not always unique.
    pub name: String,
    /// Bytes of a virtual machine's state that is kept with it.
    pub vm_state_size: u64,
    /// When it was made: seconds since 1970 and nanoseconds.
    pub date: (u32, u32),
    /// The guest's clock then, nanoseconds.
    pub vm_clock: u64,
    /// Bytes that the disk had.
    pub disk_size: u64,
    /// Instructions that the guest had executed, if it counted.
    pub icount: Option<u64>,
}

/// A format that keeps snapshots in the image. Calls come one at a time; requests of guests wait meanwhile.
pub trait Snapshots {
    /// Every snapshot, the oldest first.
    ///
    /// # Errors
    /// The image's table cannot be read or breaks the rules.
    fn list(&self) -> Result<Vec<Snapshot>>;

    /// Keeps the present state under `name`; `date` as in [`Snapshot::date`].
    ///
    /// # Errors
    /// `Invalid` for a name that is too long; `Unsupported` where refcounts are too narrow for one more user; `Io`. Then nothing has
    /// changed.
    fn create(&self, name: &str, date: (u32, u32)) -> Result<Snapshot>;

    /// Makes the state of the snapshot with this id, or else of this name, the present one.
    ///
    /// # Errors
    /// There is none, or as [`Snapshots::create`].
    fn apply(&self, which: &str) -> Result<()>;

    /// Makes a node that nobody writes show the state of the snapshot that has this id and this name, as far as they are given.
    /// The image stays as it is.
    ///
    /// # Errors
    /// There is none, the node is written, or the table cannot be read.
    fn show(&self, id: Option<&str>, name: Option<&str>) -> Result<()>;

    /// Lets the snapshot go that has this id and this name, as far as they are given; what it was.
    ///
    /// # Errors
    /// There is none; `Io`.
    fn delete(&self, id: Option<&str>, name: Option<&str>) -> Result<Snapshot>;
}
