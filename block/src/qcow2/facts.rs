// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an image tells beside what every format tells, with QAPI's names (`ImageInfoSpecificQCow2`) in the order in which QEMU
//! prints them.

use super::Qcow2;
use super::bitmap_directory::{AUTO, IN_USE};
use super::header::Compression;
use crate::{InfoValue, luks};

impl Qcow2 {
    /// See [`crate::Info::specifics`].
    pub fn specifics(&self) -> Vec<(&'static str, InfoValue)> {
        let header = &self.header;
        let compression = match header.compression {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        };
        let mut facts = vec![
            ("compat", InfoValue::text(if header.version == 2 { "0.10" } else { "1.1" })),
            ("compression-type", InfoValue::text(compression)),
        ];
        if header.version == 3 {
            facts.push(("lazy-refcounts", InfoValue::Bool(header.lazy_refcounts)));
        }
        facts.extend(self.stored_bitmaps().map(|bitmaps| ("bitmaps", bitmaps)));
        facts.push(("refcount-bits", InfoValue::Int(header.refcount_bits().into())));
        if let Some(luks) = &self.luks {
            facts.push(("encrypt", InfoValue::Map(luks::facts(luks, false, true))));
        }
        if let Some(name) = &header.data_file_name {
            facts.push(("data-file", InfoValue::text(name)));
            facts.push(("data-file-raw", InfoValue::Bool(header.data_file_raw)));
        }
        if header.version == 3 {
            facts.push(("corrupt", InfoValue::Bool(header.corrupt || self.meta().corrupt)));
            facts.push(("extended-l2", InfoValue::Bool(header.extended_l2)));
        }
        facts
    }

    /// Bitmaps as they stand on disk, if there are any.
    fn stored_bitmaps(&self) -> Option<InfoValue> {
        let meta = self.meta();
        let bitmaps = meta.bitmaps.entries.iter().map(|entry| {
            let flags = [(IN_USE, "in-use"), (AUTO, "auto")].into_iter().filter(|(flag, _)| entry.flags & flag != 0);
            InfoValue::Map(vec![
                ("flags", InfoValue::List(flags.map(|(_, name)| InfoValue::text(name)).collect())),
                ("name", InfoValue::text(&entry.name)),
                ("granularity", InfoValue::Int(1 << entry.granularity_bits)),
            ])
        });
        let bitmaps: Vec<InfoValue> = bitmaps.collect();
        (!bitmaps.is_empty()).then_some(InfoValue::List(bitmaps))
    }
}
