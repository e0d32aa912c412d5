// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What can be done to an image that nobody has open: make it, check it, repair it.
//!
//! Like [opening](crate::DRIVERS), it takes nodes and opens nothing.

use std::sync::Arc;

use crate::drivers::{OptionKind, OptionSpec, OptionValue, Options};
use crate::vmdk::stream::Stream;
use crate::{BlockNode, Error, ErrorKind, Preallocation, Result, luks, qcow2, vdi, vmdk, vpc};

/// Every format of which an image can be more than opened, one line each.
pub const FORMATS: &[Format] = &[
    Format {
        name: "luks",
        create_options: luks::create::OPTIONS,
        create: luks::create::create,
        check: None,
        amend: None,
    },
    Format {
        name: "qcow2",
        create_options: qcow2::create::OPTIONS,
        create: qcow2::create::create,
        check: Some(qcow2::check::check),
        amend: Some(qcow2::amend::amend),
    },
    Format { name: "raw", create_options: RAW_OPTIONS, create: create_raw, check: None, amend: None },
    Format {
        name: "vdi",
        create_options: vdi::create::OPTIONS,
        create: vdi::create::create,
        check: Some(vdi::check::check),
        amend: None,
    },
    Format {
        name: "vmdk",
        create_options: vmdk::create::OPTIONS,
        create: vmdk::create::create,
        check: Some(vmdk::check::check),
        amend: None,
    },
    Format {
        name: "vpc",
        create_options: vpc::create::OPTIONS,
        create: vpc::create::create,
        check: Some(vpc::check::check),
        amend: None,
    },
];

const RAW_OPTIONS: &[OptionSpec] =
    &[OptionSpec { name: "preallocation", kind: OptionKind::Str, summary: "off, falloc or full" }];

/// The format called `name`, exactly.
pub fn format_named(name: &str) -> Option<&'static Format> {
    FORMATS.iter().find(|format| format.name == name)
}

/// Hears what a check finds, one sentence at a time.
pub type Say<'a> = &'a mut dyn FnMut(&str);

/// Looks for damage.
pub type Check = fn(&Arc<BlockNode>, Repair, Say<'_>) -> Result<CheckReport>;

/// Changes options of an image that is there.
pub type Amend = fn(&Arc<BlockNode>, &Options) -> Result<()>;

/// What a format can do.
#[derive(Debug)]
pub struct Format {
    /// The name of its driver.
    pub name: &'static str,
    /// What can be said about an image to be made, with the names of `qemu-img create -o`.
    pub create_options: &'static [OptionSpec],
    /// Makes an image.
    pub create: fn(&CreateRequest) -> Result<()>,
    /// Looks for damage in the image in a node, which is writable and nobody else's if something is to be repaired.
    pub check: Option<Check>,
    /// Changes what an image says of itself; options as in `create_options`.
    pub amend: Option<Amend>,
}

/// An image to be made.
pub struct CreateRequest {
    /// Where; what is there is lost. Writable, and nobody else's.
    pub file: Arc<BlockNode>,
    /// Where its data goes, if it is to have an external data file.
    pub data_file: Option<Arc<BlockNode>>,
    /// Where the extents go that are no part of `file`: as many as [`extent_names`] tells. Like `file` in all else.
    pub extents: Vec<NewExtent>,
    /// The content id that the backing file has now, for formats that note it (see [`Inspection`](crate::Inspection)).
    pub parent_cid: Option<u32>,
    /// Bytes of the guest's disk, a multiple of 512.
    pub size: u64,
    /// By the names of [`Format::create_options`], of the types that stand there.
    pub options: Options,
}

/// An extent to be made.
pub struct NewExtent {
    /// What the image calls it.
    pub name: String,
    /// Where it goes.
    pub node: Arc<BlockNode>,
}

/// What the files are called that an image `name` of format `format` and `size` bytes has besides its own, in order.
///
/// # Errors
/// Options or a size that the format does not know.
pub fn extent_names(format: &str, options: &Options, size: u64, name: &str) -> Result<Vec<String>> {
    if format == "vmdk" { vmdk::create::extent_names(options, size, name) } else { Ok(Vec::new()) }
}

/// Begins an image that can only be written from front to end; `None` if `request` is for one that [`create`] makes.
///
/// # Errors
/// As [`create`].
pub fn stream(format: &str, request: &CreateRequest) -> Result<Option<Stream>> {
    match format {
        "vmdk" if vmdk::create::is_stream(&request.options) => Stream::begin(request).map(Some),
        _ => Ok(None),
    }
}

/// Random bytes, for what must be like nothing else.
pub(crate) fn random<const LEN: usize>() -> Result<[u8; LEN]> {
    let mut bytes = [0; LEN];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| Error::io("get random bytes", e.into()))?;
    Ok(bytes)
}

/// Makes an image of format `format`. The options of [`CreateRequest`] were checked against the format's.
///
/// # Errors
/// The format cannot be made; options that contradict each other or are out of range, in QEMU's words; those of the host.
pub fn create(format: &str, request: &CreateRequest) -> Result<()> {
    let Some(found) = format_named(format) else {
        return Err(Error::unsupported(format!("Format driver '{format}' does not support image creation")));
    };
    (found.create)(request)
}

/// Changes options of the image of format `format` in `file`, which is writable and nobody else's.
///
/// # Errors
/// The format or this image cannot change them; QEMU's words where it has some.
pub fn amend(file: &Arc<BlockNode>, format: &str, options: &Options) -> Result<()> {
    let Some(amend) = format_named(format).and_then(|format| format.amend) else {
        return Err(Error::unsupported(format!("Format driver '{format}' does not support option amendment")));
    };
    amend(file, options)
}

fn create_raw(request: &CreateRequest) -> Result<()> {
    let preallocation = match request.options.get("preallocation") {
        Some(OptionValue::Str(mode)) => preallocation_named(mode)?,
        _ => Preallocation::Off,
    };
    if preallocation == Preallocation::Metadata {
        return Err(Error::unsupported("Unsupported preallocation mode: metadata"));
    }
    request.file.resize(0, Preallocation::Off)?;
    request.file.resize(request.size, preallocation)?;
    request.file.flush().map_err(|e| Error::io("write the image", e))
}

/// The mode of QAPI's `PreallocMode`.
///
/// # Errors
/// QEMU's words for a mode that does not exist.
pub fn preallocation_named(mode: &str) -> Result<Preallocation> {
    match mode {
        "off" => Ok(Preallocation::Off),
        "metadata" => Ok(Preallocation::Metadata),
        "falloc" => Ok(Preallocation::Allocate),
        "full" => Ok(Preallocation::Full),
        _ => Err(Error::invalid(format!("Parameter 'preallocation' does not accept value '{}'", mode.escape_debug()))),
    }
}

/// What a check puts right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing: the image is only read.
    #[default]
    Nothing,
    /// Clusters that are counted as used and that nothing names.
    Leaks,
    /// Everything that can be.
    All,
}

/// What a check found. What was repaired counts under `…_fixed` alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Things that could not be looked at.
    pub check_errors: u64,
    /// Damage: writing to the image may destroy data.
    pub corruptions: u64,
    /// Clusters that take room and hold nothing.
    pub leaks: u64,
    /// Damage that was repaired.
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// Where the image ends in its file, in bytes.
    pub image_end_offset: u64,
    /// Clusters of the guest's disk.
    pub total_clusters: u64,
    /// Of these, clusters that are stored.
    pub allocated_clusters: u64,
    /// Of these, clusters that do not follow the one before.
    pub fragmented_clusters: u64,
    /// Of these, clusters that are stored compressed.
    pub compressed_clusters: u64,
}

/// Checks the image of format `format` in `file`, and repairs what `repair` says; `say` hears of every single thing.
///
/// # Errors
/// `Unsupported` in QEMU's words if the format cannot be checked; the image cannot be opened at all, is too large or too damaged
/// to be counted, or cannot be written.
pub fn check(file: &Arc<BlockNode>, format: &str, repair: Repair, say: Say<'_>) -> Result<CheckReport> {
    let Some(check) = format_named(format).and_then(|format| format.check) else {
        return Err(Error::new(ErrorKind::Unsupported, "This image format does not support checks"));
    };
    if repair != Repair::Nothing && !file.writable() {
        return Err(Error::invalid(format!("Block node is read-only: '{}' cannot be repaired", file.name())));
    }
    check(file, repair, say)
}
