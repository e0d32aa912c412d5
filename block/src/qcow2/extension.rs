// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The header extension for bitmaps, put in and taken out of a header in use. A crash at any moment leaves a header that is whole.
//!
//! A new extension is written behind the mark that ends the extensions; then its type takes the mark's place, in one sector.
//! A backing file's name that is in the way is written again further down first. Data that lies in two sectors changes only
//! while the autoclear bit says that it is of no use.

use std::io;

use rustix::io::Errno;

use super::Qcow2;
use super::header;
use super::rewrite::EXT_BITMAPS;
use crate::{Error, Result, Wait};

/// Bytes of its data.
const LEN: usize = 24;
/// Where the backing file's name is (8 bytes), and its length (4 bytes).
const AT_BACKING: u64 = 8;

/// Where things are in the first cluster.
struct Layout {
    /// Bytes of the extension, if there is one: from where on.
    found: Option<usize>,
    /// Whether no other extension follows.
    is_last: bool,
    /// Where the extensions end.
    end: usize,
    /// Where the backing file's name is, if there is one, and what it is.
    name: Option<(usize, Vec<u8>)>,
    first_cluster: Vec<u8>,
}

impl Qcow2 {
    /// The extension's data, if the image has it.
    ///
    /// # Errors
    /// Those of reading.
    pub fn bitmap_extension(&self) -> Result<Option<Vec<u8>>> {
        let layout = self.layout().map_err(|e| Error::io("read the header", e))?;
        Ok(layout.found.map(|at| {
            let field = |at: usize| layout.first_cluster.get(at..).and_then(|rest| rest.first_chunk()).copied();
            let len = field(at - 4).map_or(0, |len| u32::from_be_bytes(len) as usize);
            layout.first_cluster.get(at..at + len).unwrap_or_default().to_vec()
        }))
    }

    /// Makes `data` the extension's data, on disk on return.
    ///
    /// # Errors
    /// `ENOSPC` if the first cluster has no room for it; those of writing.
    pub fn put_bitmap_extension(&self, data: [u8; LEN]) -> io::Result<()> {
        let layout = self.layout()?;
        match layout.found {
            Some(at) => {
                if at / 512 != (at + LEN - 1) / 512 {
                    self.set_bitmaps_bit(false)?;
                }
                self.put(&data, at as u64)?;
            }
            None => self.add_extension(&layout, data)?,
        }
        self.set_bitmaps_bit(true)
    }

    /// Takes the extension out.
    ///
    /// # Errors
    /// Those of writing.
    pub fn remove_bitmap_extension(&self) -> io::Result<()> {
        self.set_bitmaps_bit(false)?;
        match self.layout()? {
            // The end comes earlier. Elsewhere, without its autoclear bit, it means nothing.
            Layout { found: Some(at), is_last: true, .. } => self.put(&[0; 8], at as u64 - 8),
            _ => Ok(()),
        }
    }

    fn add_extension(&self, layout: &Layout, data: [u8; LEN]) -> io::Result<()> {
        let size = layout.first_cluster.len();
        let end = layout.end;
        let after = end + 8 + LEN + 8;
        if !end.is_multiple_of(8) || after > size {
            return Err(Errno::NOSPC.into());
        }
        if let Some((at, name)) = layout.name.as_ref().filter(|(at, _)| *at < after) {
            // Not over the old one: until the header names the new one, that is the name.
            let moved = (at + name.len()).max(after).next_multiple_of(8);
            if moved + name.len() > size {
                return Err(Errno::NOSPC.into());
            }
            self.put(name, moved as u64)?;
            self.put(&(moved as u64).to_be_bytes(), AT_BACKING)?;
        }
        let mut behind = data.to_vec();
        behind.extend([0; 8]);
        self.put(&behind, end as u64 + 8)?;
        let mut head = EXT_BITMAPS.to_be_bytes().to_vec();
        head.extend(24u32.to_be_bytes());
        self.put(&head, end as u64)
    }

    /// Says whether the bitmaps are in step with the disk.
    fn set_bitmaps_bit(&self, set: bool) -> io::Result<()> {
        let mut meta = self.meta();
        let bits = meta.autoclear & !header::BITMAPS | if set { header::BITMAPS } else { 0 };
        if bits != meta.autoclear {
            self.put(&bits.to_be_bytes(), header::AT_AUTOCLEAR)?;
            meta.autoclear = bits;
        }
        Ok(())
    }

    fn put(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.file.write_growing(bytes, at, false).and_then(|()| self.file.flush())
    }

    fn layout(&self) -> io::Result<Layout> {
        let mut first_cluster = vec![0; usize::try_from(self.rules.cluster_size()).map_err(|_| Errno::FBIG)?];
        self.file.read_or_zero(&mut first_cluster, 0, Wait::Allowed)?;
        let word = |at: usize| {
            let field = first_cluster.get(at..).and_then(|rest| rest.first_chunk());
            field.map_or(0, |field| u32::from_be_bytes(*field) as usize)
        };
        let name_at = word(8).saturating_mul(1 << 32).saturating_add(word(12));
        let name = first_cluster.get(name_at..name_at.saturating_add(word(16))).filter(|_| name_at > 0);
        let name = name.map(|name| (name_at, name.to_vec()));
        let limit = name.as_ref().map_or(first_cluster.len(), |(at, _)| *at);
        let (mut at, mut found, mut is_last) = (if self.rules.version == 2 { 72 } else { word(100) }, None, false);
        while at + 8 <= limit && word(at) != 0 {
            let next = at + 8 + word(at + 4).next_multiple_of(8);
            if next > first_cluster.len() {
                break;
            }
            is_last = word(at) == EXT_BITMAPS as usize;
            if is_last && found.is_none() {
                found = Some(at + 8);
            }
            at = next;
        }
        Ok(Layout { found, is_last, end: at, name, first_cluster })
    }
}
