// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Changing what an image that nobody has open says of itself, without moving a guest's data.

use std::sync::Arc;

use super::check::change_refcount_width;
use super::header::{self, Header, LAZY_REFCOUNTS};
use super::rewrite::{EXT_BACKING_FORMAT, Parts};
use crate::driver::{OptionValue, Options};
use crate::{BlockNode, Error, Result};

/// Byte of the header where compatible features and the refcount order stand.
const AT_COMPATIBLE: usize = 80;
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
                    return Err(Error::unsupported(
                        "compat cannot be lowered in place; convert the image with -o compat=0.10",
                    ));
                }
                (other, _) => {
                    return Err(Error::invalid(format!("Unknown compatibility level {}", other.escape_debug())));
                }
            },
            ("refcount_bits", OptionValue::Size(bits)) if *bits == u64::from(header.refcount_bits()) => {}
            ("data_file_raw", OptionValue::Bool(raw)) if *raw == header.data_file_raw => {}
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

/// Another refcount width, after everything else that is asked.
fn change_width(file: &Arc<BlockNode>, header: &Header, bits: u64, options: &Options) -> Result<()> {
    let order = (bits.is_power_of_two() && bits <= 64).then(|| bits.ilog2());
    let order =
        order.ok_or_else(|| Error::invalid("Refcount width must be a power of two and may not exceed 64 bits"))?;
    let becomes_3 =
        matches!(options.get("compat"), Some(OptionValue::Str(compat)) if compat == "1.1" || compat == "v3");
    if header.version == 2 && !becomes_3 {
        return Err(Error::invalid(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)",
        ));
    }
    let mut others = options.clone();
    others.remove("refcount_bits");
    if !others.is_empty() {
        amend(file, &others)?;
    }
    change_refcount_width(file, order)
}
