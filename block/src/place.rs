// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where bytes are stored, through all layers: what `qemu-img map` tells.

use std::io;

use sys::file::Wait;

use crate::BlockNode;
use crate::driver::{Ask, Detail, Mapping, Target};

/// A run of bytes and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Bytes, at least 1.
    pub len: u64,
    /// Layers above the one that has it: 0 for the top.
    pub depth: u32,
    /// Whether that layer has something stored there, be it that there are zeroes.
    pub is_present: bool,
    /// Whether it reads as zeroes.
    pub is_zero: bool,
    /// Whether it is stored compressed.
    pub is_compressed: bool,
    /// Byte offset in the file that stores it.
    pub offset: Option<u64>,
    /// What that file was called when it was opened.
    pub file: String,
}

impl BlockNode {
    /// Where the bytes from `offset` are stored: the first run, at most `len` bytes, which end within the node.
    ///
    /// # Errors
    /// The errno of the layer that failed.
    pub fn place(&self, offset: u64, len: u64) -> io::Result<Place> {
        self.place_below(offset, len, 0)
    }

    fn place_below(&self, offset: u64, len: u64, depth: u32) -> io::Result<Place> {
        let ask = Ask { detail: Detail::Allocation, wait: Wait::Allowed };
        let Mapping { target, len, hold: _hold } = self.driver().map(offset, len, ask)?;
        let place = |is_present, is_zero, offset, file: &str| Place {
            len,
            depth,
            is_present,
            is_zero,
            is_compressed: false,
            offset,
            file: file.to_owned(),
        };
        Ok(match target {
            Target::Fd { offset, .. } => place(true, false, Some(offset), self.filename()),
            // Where it is tells nobody what it is.
            Target::Encrypted { .. } => place(true, false, None, self.filename()),
            Target::Data { node, offset } => place(true, false, Some(offset), node.filename()),
            Target::Computed => Place { is_compressed: true, ..place(true, false, None, self.filename()) },
            // A hole of a host file has its place all the same.
            Target::Zero if ["file", "host_device"].contains(&self.driver_name()) => {
                place(true, true, Some(offset), self.filename())
            }
            Target::Zero => place(true, true, None, self.filename()),
            Target::Absent => place(false, true, None, self.filename()),
            Target::Child { node, offset } => {
                let down = u32::from(!self.driver().passes_on());
                match node.len().saturating_sub(offset) {
                    0 => place(down == 0, true, None, self.filename()),
                    there => node.place_below(offset, len.min(there), depth + down)?,
                }
            }
        })
    }
}
