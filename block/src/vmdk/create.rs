// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Making a VMDK: the descriptor, and the header and tables of sparse extents. Every grain table is there from the beginning,
//! so that a write never has to make one.
//!
//! ```text
//!  header | descriptor, 20 sectors | redundant directory | its tables | directory | its tables | grains
//! ```

use super::descriptor::{self, Extent, NO_PARENT};
use super::header::{NEWLINES, REDUNDANT, SECTOR, ZERO_GRAINS};
use super::stream::Stream;
use crate::drivers::{OptionKind, OptionSpec, OptionValue, Options};
use crate::formats::{CreateRequest, random};
use crate::{BlockNode, Error, Preallocation, Result};

/// QEMU's options, with its names.
pub const OPTIONS: &[OptionSpec] = &[
    spec("adapter_type", OptionKind::Str, "ide (default), lsilogic, buslogic or legacyESX"),
    spec("backing_file", OptionKind::Str, "file name of a base image, as text"),
    spec("backing_fmt", OptionKind::Str, "format of the base image: vmdk"),
    spec("compat6", OptionKind::Bool, "virtual hardware version 6"),
    spec("hwversion", OptionKind::Str, "virtual hardware version, default 4"),
    spec(
        "subformat",
        OptionKind::Str,
        "monolithicSparse (default), monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat or streamOptimized",
    ),
    spec("toolsversion", OptionKind::Str, "version of the guest's tools"),
    spec("zeroed_grain", OptionKind::Bool, "grains can be zeroes without being stored"),
];

const fn spec(name: &'static str, kind: OptionKind, summary: &'static str) -> OptionSpec {
    OptionSpec { name, kind, summary }
}

/// Sectors of a grain, and entries of a table.
pub const GRAIN: u64 = 128;
pub const ENTRIES: u64 = 512;
/// Where the embedded descriptor stands, and its room, in sectors.
pub const DESCRIPTOR: (u64, u64) = (1, 20);
/// What VMware gives an extent at most, in bytes.
const SPLIT: u64 = 2 << 30;
const MAX_SIZE: u64 = 64 << 40;

/// How a disk is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subformat {
    Sparse,
    Flat,
    SplitSparse,
    SplitFlat,
    Stream,
}

impl Subformat {
    const NAMES: [(&'static str, Subformat); 5] = [
        ("monolithicSparse", Subformat::Sparse),
        ("monolithicFlat", Subformat::Flat),
        ("twoGbMaxExtentSparse", Subformat::SplitSparse),
        ("twoGbMaxExtentFlat", Subformat::SplitFlat),
        ("streamOptimized", Subformat::Stream),
    ];

    fn read(options: &Options) -> Result<(&'static str, Subformat)> {
        let name = text(options, "subformat").unwrap_or("monolithicSparse");
        Subformat::NAMES
            .into_iter()
            .find(|(known, _)| *known == name)
            .ok_or_else(|| Error::invalid(format!("Invalid subformat '{}'", name.escape_debug())))
    }

    fn is_flat(self) -> bool {
        matches!(self, Subformat::Flat | Subformat::SplitFlat)
    }

    /// Sizes in bytes of the extents that are files of their own.
    fn extents(self, size: u64) -> Vec<u64> {
        match self {
            Subformat::Sparse | Subformat::Stream => Vec::new(),
            Subformat::Flat => vec![size],
            Subformat::SplitSparse | Subformat::SplitFlat => {
                (0..size.div_ceil(SPLIT)).map(|number| SPLIT.min(size - number * SPLIT)).collect()
            }
        }
    }
}

/// Whether `options` ask for an image that can only be written from front to end.
pub fn is_stream(options: &Options) -> bool {
    matches!(Subformat::read(options), Ok((_, Subformat::Stream)))
}

/// Names of the files that an image called `name` has besides its own, in order, as QEMU gives them.
///
/// # Errors
/// There is no such subformat, or there would be too many.
pub fn extent_names(options: &Options, size: u64, name: &str) -> Result<Vec<String>> {
    let (_, subformat) = Subformat::read(options)?;
    check_size(size)?;
    let stem_len = name.rfind('.').filter(|&dot| dot > name.rfind('/').map_or(0, |slash| slash + 1));
    let (stem, extension) = name.split_at(stem_len.unwrap_or(name.len()));
    let names = (1..=subformat.extents(size).len()).map(|number| match subformat {
        Subformat::SplitSparse => format!("{stem}-s{number:03}{extension}"),
        Subformat::SplitFlat => format!("{stem}-f{number:03}{extension}"),
        _ => format!("{stem}-flat{extension}"),
    });
    Ok(names.collect())
}

/// See [`crate::create`].
pub fn create(request: &CreateRequest) -> Result<()> {
    let (_, subformat) = Subformat::read(&request.options)?;
    if subformat == Subformat::Stream {
        return Stream::begin(request)?.finish();
    }
    let zeroed = request.options.get("zeroed_grain") == Some(&OptionValue::Bool(true));
    let sizes = subformat.extents(request.size);
    let text = describe(request)?;
    if sizes.len() != request.extents.len() {
        return Err(Error::invalid(format!(
            "'extents' has {} nodes, a VMDK of {} bytes has {} extents with a file of their own",
            request.extents.len(),
            request.size,
            sizes.len()
        )));
    }
    let failed = |e| Error::io("write the VMDK", e);
    let file = &request.file;
    // Until the descriptor is there, there is no image.
    file.resize(0, Preallocation::Off)?;
    for (extent, size) in request.extents.iter().zip(sizes) {
        extent.node.resize(0, Preallocation::Off)?;
        if subformat.is_flat() {
            extent.node.resize(size, Preallocation::Off)?;
            extent.node.flush().map_err(failed)?;
        } else {
            make_sparse(&extent.node, size, zeroed, None)?;
        }
    }
    if subformat == Subformat::Sparse {
        return make_sparse(file, request.size, zeroed, Some(&text));
    }
    file.write_growing(text.as_bytes(), 0, false).map_err(failed)?;
    file.flush().map_err(failed)
}

fn check_size(size: u64) -> Result<()> {
    match size {
        0 => Err(Error::unsupported("a VMDK of 0 bytes cannot be made: QEMU and others refuse to open one")),
        1..=MAX_SIZE => Ok(()),
        _ => Err(Error::unsupported(format!("a VMDK has at most {MAX_SIZE} bytes, not {size}"))),
    }
}

/// The descriptor of the image that is asked for, free of contradictions.
pub fn describe(request: &CreateRequest) -> Result<String> {
    let options = &request.options;
    let (create_type, subformat) = Subformat::read(options)?;
    let is_on = |name: &str| options.get(name) == Some(&OptionValue::Bool(true));
    let refused = |text: &str| Err(Error::invalid(text));
    check_size(request.size)?;
    let adapter = text(options, "adapter_type").unwrap_or("ide");
    if !["ide", "lsilogic", "buslogic", "legacyESX"].contains(&adapter) {
        return Err(Error::invalid(format!("Unknown adapter type: {}", adapter.escape_debug())));
    }
    let backing = text(options, "backing_file").filter(|name| !name.is_empty());
    let hardware = match (is_on("compat6"), text(options, "hwversion")) {
        (true, Some(_)) => return refused("compat6 cannot be enabled with hwversion set"),
        (true, None) => "6",
        (false, version) => version.filter(|&version| version != "undefined").unwrap_or("4"),
    };
    let tools = text(options, "toolsversion").unwrap_or("2147483647");
    if text(options, "backing_fmt").is_some_and(|format| format != "vmdk") {
        return refused("backing_file must be a vmdk image");
    }
    if subformat.is_flat() && backing.is_some() {
        return refused("Flat image can't have backing file");
    }
    if subformat.is_flat() && is_on("zeroed_grain") {
        return refused("Flat image can't enable zeroed grain");
    }
    if subformat == Subformat::Stream && backing.is_some() {
        return refused("a streamOptimized image holds a whole disk: it can't have a backing file");
    }
    let parent_cid = match (backing, request.parent_cid) {
        (None, _) => NO_PARENT,
        (Some(_), Some(cid)) => cid,
        (Some(name), None) => {
            return Err(Error::invalid(format!(
                "the backing file '{}' is not known: its CID stands in the descriptor of what is made over it",
                name.escape_debug()
            )));
        }
    };
    for (what, value) in [("backing_file", backing), ("hwversion", Some(hardware)), ("toolsversion", Some(tools))] {
        check_text(what, value.unwrap_or_default())?;
    }
    let own_name = request.file.filename().rsplit('/').next().unwrap_or_default();
    let sizes = subformat.extents(request.size);
    let extents: Vec<Extent<'_>> = if sizes.is_empty() {
        vec![Extent { sectors: request.size.div_ceil(SECTOR), kind: "SPARSE", name: own_name, offset: None }]
    } else {
        let (kind, offset) = if subformat.is_flat() { ("FLAT", Some(0)) } else { ("SPARSE", None) };
        let each = request.extents.iter().zip(sizes);
        each.map(|(extent, size)| Extent { sectors: size.div_ceil(SECTOR), kind, name: &extent.name, offset }).collect()
    };
    extents.iter().try_for_each(|extent| check_text("extents", extent.name))?;
    let heads: u64 = if adapter == "ide" { 16 } else { 255 };
    let cylinders = request.size / SECTOR / (heads * 63);
    let mut text = descriptor::head(new_cid()?, parent_cid, create_type, backing, &extents);
    for (key, value) in [
        ("virtualHWVersion", hardware),
        ("geometry.cylinders", &cylinders.to_string()),
        ("geometry.heads", &heads.to_string()),
        ("geometry.sectors", "63"),
        ("adapterType", adapter),
        ("toolsVersion", tools),
    ] {
        text += &format!("ddb.{key} = \"{value}\"\n");
    }
    let most = if request.extents.is_empty() { DESCRIPTOR.1 * SECTOR } else { descriptor::MAX_LEN };
    if text.len() as u64 > most {
        return Err(Error::invalid(format!(
            "the VMDK descriptor has no room for names this long: {most} bytes at most"
        )));
    }
    Ok(text)
}

/// What stands between quotes in the descriptor cannot have any, nor begin a line of its own.
fn check_text(what: &str, text: &str) -> Result<()> {
    if text.chars().any(|c| c == '"' || c.is_control()) {
        return Err(Error::invalid(format!(
            "'{what}': '{}' cannot stand in a VMDK descriptor: no quotes, no control characters",
            text.escape_debug()
        )));
    }
    Ok(())
}

fn new_cid() -> Result<u32> {
    Ok(match u32::from_le_bytes(random()?) {
        NO_PARENT => 1,
        cid => cid,
    })
}

fn text<'a>(options: &'a Options, name: &str) -> Option<&'a str> {
    match options.get(name) {
        Some(OptionValue::Str(text)) => Some(text.as_str()),
        _ => None,
    }
}

/// An empty sparse extent of `size` bytes.
fn make_sparse(file: &BlockNode, size: u64, zeroed: bool, text: Option<&str>) -> Result<()> {
    let failed = |e| Error::io("write the VMDK", e);
    let capacity = size.div_ceil(SECTOR);
    let tables = capacity.div_ceil(GRAIN * ENTRIES);
    let directory_sectors = (tables * 4).div_ceil(SECTOR);
    let table_sectors = ENTRIES * 4 / SECTOR;
    let directories =
        [DESCRIPTOR.0 + DESCRIPTOR.1, DESCRIPTOR.0 + DESCRIPTOR.1 + directory_sectors + tables * table_sectors];
    let overhead = (directories[1] + directory_sectors + tables * table_sectors).next_multiple_of(GRAIN);
    file.resize(0, Preallocation::Off)?;
    file.resize(overhead * SECTOR, Preallocation::Off)?;
    for at in directories {
        let first = at + directory_sectors;
        let places = (0..tables).map(|number| u32::try_from(first + number * table_sectors));
        let bytes: std::result::Result<Vec<[u8; 4]>, _> = places.map(|place| place.map(u32::to_le_bytes)).collect();
        let bytes = bytes.map_err(|_| Error::unsupported("the VMDK's tables are too large"))?.concat();
        file.write_growing(&bytes, at * SECTOR, false).map_err(failed)?;
    }
    if let Some(text) = text {
        file.write_growing(text.as_bytes(), DESCRIPTOR.0 * SECTOR, false).map_err(failed)?;
    }
    file.flush().map_err(failed)?;
    let header = Raw {
        version: if zeroed { 2 } else { 1 },
        flags: NEWLINES | REDUNDANT | if zeroed { ZERO_GRAINS } else { 0 },
        capacity,
        descriptor: if text.is_some() { DESCRIPTOR } else { (0, 0) },
        directories,
        overhead,
        compression: 0,
    };
    file.write_growing(&header.bytes(), 0, false).map_err(failed)?;
    file.flush().map_err(failed)
}

/// A header as it is stored; places and sizes are sectors.
pub struct Raw {
    pub version: u32,
    pub flags: u32,
    pub capacity: u64,
    pub descriptor: (u64, u64),
    /// The redundant one, the other.
    pub directories: [u64; 2],
    pub overhead: u64,
    pub compression: u16,
}

impl Raw {
    pub fn bytes(&self) -> [u8; 512] {
        let mut bytes = [0; 512];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, super::MAGIC);
        put(4, &self.version.to_le_bytes());
        put(8, &self.flags.to_le_bytes());
        put(12, &self.capacity.to_le_bytes());
        put(20, &GRAIN.to_le_bytes());
        put(28, &self.descriptor.0.to_le_bytes());
        put(36, &self.descriptor.1.to_le_bytes());
        put(44, &512u32.to_le_bytes());
        put(48, &self.directories[0].to_le_bytes());
        put(56, &self.directories[1].to_le_bytes());
        put(64, &self.overhead.to_le_bytes());
        put(73, b"\n \r\n");
        put(77, &self.compression.to_le_bytes());
        bytes
    }
}
