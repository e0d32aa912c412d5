// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver `raw`: the node below, or a window on it.

use std::io;
use std::sync::Arc;

use crate::child::Child;
use crate::claims::Writes;
use crate::driver::{Ask, Driver, Info, Mapping, Prepared, Target, ZeroFlags};
use crate::drivers::{ChildSpec, DriverEntry, OpenRequest, OptionKind, OptionSpec};
use crate::{BlockNode, Error, Preallocation, Result};

pub(crate) const ENTRY: DriverEntry = DriverEntry {
    name: "raw",
    summary: "the bytes of the node below, or a window on them",
    children: &[ChildSpec { name: "file", required: true, writes: Writes::AsUsers }],
    options: &[
        OptionSpec { name: "offset", kind: OptionKind::Size, summary: "first byte of the window, default 0" },
        OptionSpec { name: "size", kind: OptionKind::Size, summary: "bytes in the window, a multiple of 512" },
    ],
    takes_descriptor: false,
    writes: true,
    probe: |_| false,
    open,
};

/// A window on another node.
struct Raw {
    file: Child,
    offset: u64,
    /// `None`: to the end of the node below, wherever that is.
    size: Option<u64>,
}

fn open(request: OpenRequest) -> Result<Box<dyn Driver>> {
    let file = request.child("file")?;
    let there = file.len();
    let offset = request.size("offset").unwrap_or(0);
    let Some(after) = there.checked_sub(offset) else {
        return Err(Error::invalid(format!(
            "Offset ({offset}) cannot be greater than size of the containing file ({there})"
        )));
    };
    let size = request.size("size");
    match size {
        Some(size) if size % 512 != 0 => {
            return Err(Error::invalid(format!("Specified size is not multiple of 512: {size} bytes")));
        }
        Some(size) if size > after => {
            return Err(Error::invalid(format!(
                "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the actual size of the \
                 containing file ({there})"
            )));
        }
        _ => {}
    }
    Ok(Box::new(Raw { file: Child::new(file), offset, size }))
}

impl Driver for Raw {
    fn len(&self) -> u64 {
        self.size.unwrap_or_else(|| self.file.len().saturating_sub(self.offset))
    }

    fn map(&self, offset: u64, len: u64, _: Ask) -> io::Result<Mapping<'_>> {
        Ok(Mapping::fixed(Target::Child { node: &self.file, offset: self.offset + offset }, len))
    }

    fn prepare_write(&self, offset: u64, len: u64) -> io::Result<Prepared<'_>> {
        Ok(Prepared::in_place(Target::Data { node: &self.file, offset: self.offset + offset }, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.file.write_zeroes(self.offset + offset, len, flags, false)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.discard(self.offset + offset, len)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    fn hand_over(&self) -> io::Result<()> {
        Ok(())
    }

    fn grows(&self) -> bool {
        self.size.is_none() && self.file.grows()
    }

    fn resize(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        if self.size.is_some() {
            return Err(Error::unsupported("Cannot resize fixed-size raw disks"));
        }
        let end =
            len.checked_add(self.offset).ok_or_else(|| Error::invalid("Disk size too large for the chosen offset"))?;
        self.file.resize(end, preallocation)
    }

    fn block_size(&self) -> u32 {
        self.file.block_size()
    }

    fn bypasses_cache(&self) -> bool {
        self.file.bypasses_cache()
    }

    fn attaches(&self, edge: &str) -> bool {
        edge == "file"
    }

    fn attach(&self, _: &str, node: Arc<BlockNode>) {
        self.file.put(node);
    }

    fn passes_on(&self) -> bool {
        true
    }

    fn info(&self) -> Info {
        Info { allocated_size: self.file.info().allocated_size, ..Info::default() }
    }
}
