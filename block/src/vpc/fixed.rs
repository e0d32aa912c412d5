// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A fixed disk: the guest's bytes, then the footer.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{FOOTER, Footer, check_resize, create};
use crate::driver::{Ask, Driver, Info, InfoValue, Mapping, Prepared, Target, ZeroFlags};
use crate::{BlockNode, Error, Preallocation, Result};

pub struct Fixed {
    file: Arc<BlockNode>,
    size: AtomicU64,
    footer: Mutex<[u8; 512]>,
    uuid: [u8; 16],
}

impl Fixed {
    pub fn new(file: Arc<BlockNode>, footer: &Footer) -> Fixed {
        Fixed { file, size: AtomicU64::new(footer.size), footer: Mutex::new(footer.bytes), uuid: footer.uuid() }
    }

    /// The new footer first: until it is there the old one counts, and what was a footer is a guest's byte only after that.
    fn set_size(&self, len: u64) -> io::Result<()> {
        let mut footer = self.footer.lock().unwrap_or_else(PoisonError::into_inner);
        let (old, new) = (self.len(), create::resized(&footer, len));
        let resize = |len| self.file.resize(len, Preallocation::Off).map_err(Error::into_io);
        if len < old {
            self.file.write(&new, len, false)?;
            self.file.flush()?;
            self.size.store(len, Ordering::Release);
            resize(len + FOOTER)?;
        } else {
            let stood_at = self.file.len() - FOOTER;
            if self.file.len() < len + FOOTER {
                resize(len + FOOTER)?;
            }
            self.file.write_growing(&new, len, false)?;
            self.file.flush()?;
            if self.file.len() > len + FOOTER {
                resize(len + FOOTER)?;
            }
            let cleared = old..stood_at.saturating_add(FOOTER).min(len);
            if !cleared.is_empty() {
                let flags = ZeroFlags { may_unmap: true, fast_only: false };
                self.file.write_zeroes(cleared.start, cleared.end - cleared.start, flags, false)?;
            }
            self.size.store(len, Ordering::Release);
        }
        *footer = new;
        self.file.flush()
    }
}

impl Driver for Fixed {
    fn len(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn map(&self, offset: u64, len: u64, _: Ask) -> io::Result<Mapping<'_>> {
        Ok(Mapping::fixed(Target::Child { node: &self.file, offset }, len))
    }

    fn prepare_write(&self, offset: u64, len: u64) -> io::Result<Prepared<'_>> {
        Ok(Prepared::in_place(Target::Data { node: &self.file, offset }, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.file.write_zeroes(offset, len, flags, false)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.discard(offset, len)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    fn resize(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        check_resize(len, preallocation)?;
        if len == self.len() {
            return Ok(());
        }
        self.set_size(len).map_err(|e| Error::io("resize the VHD", e))
    }

    fn bypasses_cache(&self) -> bool {
        self.file.bypasses_cache()
    }

    fn info(&self) -> Info {
        Info {
            allocated_size: self.file.info().allocated_size,
            uuid: Some(self.uuid),
            specifics: vec![("subformat", InfoValue::Str("fixed".into()))],
            ..Info::default()
        }
    }
}
