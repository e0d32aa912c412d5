// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Metadata contexts: what a client can learn about a range besides its bytes (proto.md, "Metadata querying"; QEMU's
//! docs/interop/nbd.rst for the contexts in the namespace `qemu:`).

use std::io;
use std::sync::Arc;

use super::export::Export;

/// Prefix of a dirty bitmap's context.
const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";
/// The context of allocation depths.
const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
/// The context of the specification itself.
const BASE_ALLOCATION: &str = "base:allocation";

/// Which parts of a node have been written, as of the moment that the bitmap stands for.
pub trait DirtyRuns: Send + Sync {
    /// The first run of one kind at `offset`, for at most `len` bytes: its length, at least 1, and whether it is dirty.
    /// The range is not empty and ends within the export.
    ///
    /// # Errors
    /// `EIO` if the bitmap cannot be read.
    fn run(&self, offset: u64, len: u64) -> io::Result<(u64, bool)>;
}

/// A dirty bitmap that clients of an export may read.
#[derive(Clone)]
pub struct Bitmap {
    /// Its name, at most 1023 bytes.
    pub name: String,
    /// Its content.
    pub runs: Arc<dyn DirtyRuns>,
}

impl std::fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bitmap").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A context that an export has.
#[derive(Clone, Debug)]
pub enum Context {
    /// Holes and zeroes.
    BaseAllocation,
    /// How many layers down data is stored.
    AllocationDepth,
    /// What has been written.
    DirtyBitmap(Bitmap),
}

impl Context {
    /// All contexts of an export; the same ones in the same order for as long as it lives.
    pub fn of(export: &Export) -> Vec<Context> {
        let depth = export.tells_depth().then_some(Context::AllocationDepth);
        let bitmaps = export.bitmaps().iter().cloned().map(Context::DirtyBitmap);
        [Context::BaseAllocation].into_iter().chain(depth).chain(bitmaps).collect()
    }

    /// The name that clients ask for.
    pub fn name(&self) -> String {
        match self {
            Context::BaseAllocation => BASE_ALLOCATION.to_owned(),
            Context::AllocationDepth => ALLOCATION_DEPTH.to_owned(),
            Context::DirtyBitmap(bitmap) => format!("{DIRTY_BITMAP}{}", bitmap.name),
        }
    }

    /// Whether one of `queries` means it. Only a client that lists may ask for everything that begins alike.
    pub fn is_meant(&self, queries: &[&str], lists: bool) -> bool {
        if lists && queries.is_empty() {
            return true;
        }
        let name = self.name();
        queries.iter().any(|&query| query == name || lists && query.ends_with(':') && name.starts_with(query))
    }
}

/// A context that a client has chosen, and the number it goes by.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// The number, from 1.
    pub id: u32,
    /// The context.
    pub context: Context,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_means_its_contexts_for_listing_alone() {
        let depth = Context::AllocationDepth;
        assert!(depth.is_meant(&["qemu:"], true) && depth.is_meant(&[], true));
        assert!(!depth.is_meant(&["qemu:"], false) && !depth.is_meant(&[], false));
        assert!(!depth.is_meant(&["base:", "qemu:alloc", "qemu:dirty-bitmap:"], true));
        assert!(depth.is_meant(&["x", "qemu:allocation-depth"], false));
    }
}
