// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Changing what an image that nobody has open says of itself, without moving a guest's data.

use std::sync::Arc;

use super::check::{change_refcount_width, check, spell_out_zeroes};
use super::header::{self, DATA_FILE_RAW, Header, LAZY_REFCOUNTS};
use super::rewrite::{EXT_BACKING_FORMAT, EXT_BITMAPS, EXT_DATA_FILE, Parts};
use super::snapshot_table::{self, Entry};
use crate::drivers::{OptionValue, Options};
use crate::{BlockNode, Error, Repair, Result};

/// Bytes of the header where compatible and autoclear features and the refcount order stand.
const AT_COMPATIBLE: usize = 80;
const AT_AUTOCLEAR: usize = 88;
const AT_REFCOUNT_ORDER: usize = 96;

/// See [`crate::amend`].
pub fn amend(file: &Arc<BlockNode>, options: &Options) -> Result<()> {
    let header = Header::read(file)?;
    if header.incompatible & (header::DIRTY | header::CORRUPT) != 0 {
        return Err(Error::invalid("the image was not closed properly or is damaged; repair it first (check -r all)"));
    }
    if let Some(&OptionValue::Size(bits)) = options.get("refcount_bits")
        && bits != u64::from(header.refcount_bits())
    {
        return change_width(file, &header, bits, options);
    }
    let header = if becomes(2, options) && header.version > 2 { fit_version_2(file, &header)? } else { header };
    let mut parts = Parts::read(file, header.cluster_bits)?;
    let mut version = header.version;
    for (&name, value) in options {
        match (name, value) {
            ("compat", OptionValue::Str(compat)) => match (compat.as_str(), header.version) {
                ("1.1" | "v3", 3) | ("0.10" | "v2", 2) => {}
                ("1.1" | "v3", _) => {
                    version = 3;
                    parts.set_version(3);
                    // Version 2 has counts of 16 bits.
                    parts.put(AT_REFCOUNT_ORDER, &4u32.to_be_bytes());
                }
                ("0.10" | "v2", _) => {
                    version = 2;
                    parts.set_version(2);
                }
                (other, _) => {
                    return Err(Error::invalid(format!("Unknown compatibility level {}", other.escape_debug())));
                }
            },
            ("refcount_bits", OptionValue::Size(bits)) if *bits == u64::from(header.refcount_bits()) => {}
            ("data_file", OptionValue::Str(name)) => {
                if !header.external_data {
                    return Err(Error::invalid("data-file can only be set for images that use an external data file"));
                }
                parts.set_extension(EXT_DATA_FILE, Some(name.as_bytes()).filter(|name| !name.is_empty()));
            }
            ("data_file_raw", OptionValue::Bool(raw)) if *raw == header.data_file_raw => {}
            ("data_file_raw", OptionValue::Bool(true)) => {
                return Err(Error::invalid("data-file-raw cannot be set on existing images"));
            }
            ("data_file_raw", OptionValue::Bool(false)) => {
                parts.put(AT_AUTOCLEAR, &(parts.u64_at(AT_AUTOCLEAR) & !DATA_FILE_RAW).to_be_bytes());
            }
            ("lazy_refcounts" | "backing_file" | "backing_fmt", _) => {}
            (other, _) => return Err(Error::invalid(format!("Option '{other}' cannot be amended"))),
        }
    }
    if let Some(&OptionValue::Bool(lazy)) = options.get("lazy_refcounts") {
        if lazy && version == 2 {
            return Err(Error::invalid(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)",
            ));
        }
        let bits = parts.u64_at(AT_COMPATIBLE) & !LAZY_REFCOUNTS | if lazy { LAZY_REFCOUNTS } else { 0 };
        parts.put(AT_COMPATIBLE, &bits.to_be_bytes());
    }
    let text = |name: &str| match options.get(name) {
        Some(OptionValue::Str(text)) => Some(text.as_str()),
        _ => None,
    };
    if let Some(name) = text("backing_file") {
        if name.len() > 1023 {
            return Err(Error::invalid("Backing file name too long"));
        }
        if header.data_file_raw && !name.is_empty() {
            return Err(Error::invalid(
                "Cannot set a backing file, as that would require an external data file to not be raw",
            ));
        }
        parts.set_backing_name(name);
        if name.is_empty() {
            parts.set_extension(EXT_BACKING_FORMAT, None);
        }
    }
    if let Some(format) = text("backing_fmt") {
        if format.len() > 15 {
            return Err(Error::invalid("Backing format name too long"));
        }
        parts.set_extension(EXT_BACKING_FORMAT, Some(format.as_bytes()));
    }
    let bytes = parts.encode()?;
    let written = file.write_growing(&bytes, 0, false).and_then(|()| file.flush());
    written.map_err(|e| Error::io("write the qcow2 header", e))
}

/// Whether `options` ask for `version`.
fn becomes(version: u32, options: &Options) -> bool {
    match options.get("compat") {
        Some(OptionValue::Str(compat)) if version == 2 => compat == "0.10" || compat == "v2",
        Some(OptionValue::Str(compat)) => compat == "1.1" || compat == "v3",
        _ => false,
    }
}

/// Makes everything but the header what version 2 knows; the header after that.
fn fit_version_2(file: &Arc<BlockNode>, header: &Header) -> Result<Header> {
    let bitmaps = Parts::read(file, header.cluster_bits)?.has_extension(EXT_BITMAPS);
    let in_the_way = [
        (header.external_data, "Cannot downgrade an image with a data file"),
        (header.refcount_order != 4, "compat=0.10 requires refcount_bits=16"),
        (header.extended_l2, "Extended L2 entries are only supported with compatibility level 1.1 and above"),
        (
            header.incompatible != 0,
            "Cannot downgrade an image with incompatible features; convert it with -o compat=0.10",
        ),
        (bitmaps, "Cannot downgrade an image with bitmaps; remove them first (bitmap --remove)"),
        (header.luks.is_some(), "Cannot downgrade an encrypted image; convert it with -o compat=0.10"),
    ];
    if let Some((_, why)) = in_the_way.iter().find(|(is_there, _)| *is_there) {
        return Err(Error::unsupported(*why));
    }
    let snapshots = snapshot_table::read(file, header.snapshots_offset, header.snapshots, header.size)?;
    let fits =
        |entry: &Entry| entry.snapshot.disk_size == header.size && u32::try_from(entry.snapshot.vm_state_size).is_ok();
    if !snapshots.iter().all(fits) {
        return Err(Error::unsupported("Internal snapshots prevent downgrade of image"));
    }
    spell_out_zeroes(file, header.backing_name.is_some())?;
    // What shared a cluster of zeroes does so no more.
    check(file, Repair::Leaks, &mut |_| {})?;
    Header::read(file)
}

/// Another refcount width, and everything else that is asked.
fn change_width(file: &Arc<BlockNode>, header: &Header, bits: u64, options: &Options) -> Result<()> {
    let order = (bits.is_power_of_two() && bits <= 64).then(|| bits.ilog2());
    let order =
        order.ok_or_else(|| Error::invalid("Refcount width must be a power of two and may not exceed 64 bits"))?;
    if bits != 16 && (becomes(2, options) || header.version == 2 && !becomes(3, options)) {
        return Err(Error::invalid(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)",
        ));
    }
    let mut others = options.clone();
    others.remove("refcount_bits");
    // Version 3 knows both widths.
    if header.version == 3 {
        change_refcount_width(file, order)?;
    }
    if !others.is_empty() {
        amend(file, &others)?;
    }
    if header.version == 3 { Ok(()) } else { change_refcount_width(file, order) }
}
