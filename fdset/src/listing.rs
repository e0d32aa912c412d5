// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the sets hold, as a copy that stays true to the moment it was taken.

use crate::{Identity, Provenance, Rights};

/// A set.
#[derive(Clone, Debug)]
pub struct SetInfo {
    pub(crate) id: i64,
    pub(crate) fds: Vec<FdInfo>,
    pub(crate) dups: Vec<DupInfo>,
}

impl SetInfo {
    /// The set's id.
    pub fn id(&self) -> i64 {
        self.id
    }

    /// The set's descriptors, the oldest first. None for a set that lives on for its dups alone.
    pub fn fds(&self) -> impl ExactSizeIterator<Item = &FdInfo> {
        self.fds.iter()
    }

    /// The live dups made from the set, the oldest first. QEMU does not list them.
    pub fn dups(&self) -> impl ExactSizeIterator<Item = &DupInfo> {
        self.dups.iter()
    }
}

/// A descriptor of a set.
#[derive(Clone, Debug)]
pub struct FdInfo {
    pub(crate) number: i32,
    pub(crate) opaque: Option<String>,
    pub(crate) rights: Rights,
    pub(crate) identity: Option<Identity>,
    pub(crate) provenance: Provenance,
    pub(crate) dups: usize,
}

impl FdInfo {
    /// Its number in this process.
    pub fn number(&self) -> i32 {
        self.number
    }

    /// The text given with it, byte for byte.
    pub fn opaque(&self) -> Option<&str> {
        self.opaque.as_deref()
    }

    /// Its access mode and flags when it was added or [refreshed](crate::FdSets::refresh).
    pub fn rights(&self) -> Rights {
        self.rights
    }

    /// What it refers to, as of when it was added or [refreshed](crate::FdSets::refresh); `None` if the kernel would not
    /// say (a stale handle of a network file system).
    pub fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    /// Where it came from.
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    /// How many of its dups live.
    pub fn dups(&self) -> usize {
        self.dups
    }
}

/// A live dup of a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DupInfo {
    pub(crate) number: i32,
    pub(crate) opened_from: i32,
    pub(crate) user: Option<Box<str>>,
}

impl DupInfo {
    /// Its number in this process.
    pub fn number(&self) -> i32 {
        self.number
    }

    /// The number that the set's descriptor had when the dup was made; it may have been removed since.
    pub fn opened_from(&self) -> i32 {
        self.opened_from
    }

    /// Who opened it, as told to [`open_for`](crate::FdSets::open_for).
    pub fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }
}
