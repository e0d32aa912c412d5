// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an image format answers, and the table of the formats that exist.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use sys::file::Wait;

use crate::claims::{Demand, Writes};
use crate::host::Descriptor;
use crate::{BlockNode, Error, Result, file, qcow2, raw};

/// Every format, one line each: `blockdev-add`'s schema, its options and the reference docs follow from it.
pub const DRIVERS: &[DriverEntry] = &[file::ENTRY, file::DEVICE_ENTRY, qcow2::ENTRY, raw::ENTRY];

/// The driver called `name`, exactly.
pub fn driver_named(name: &str) -> Option<&'static DriverEntry> {
    DRIVERS.iter().find(|entry| entry.name == name)
}

/// A format: its name, what it is built from, and how it is opened.
#[derive(Debug)]
pub struct DriverEntry {
    /// QAPI's `BlockdevDriver` name.
    pub name: &'static str,
    /// One sentence for the reference.
    pub summary: &'static str,
    /// Nodes it is built from.
    pub children: &'static [ChildSpec],
    /// Options besides those of every node, with QAPI's names.
    pub options: &'static [OptionSpec],
    /// Whether it takes a descriptor (QAPI's `filename`) instead of a node.
    pub takes_descriptor: bool,
    /// Whether an image that starts with these 512 bytes looks like one of this format. Only the inspector asks.
    pub probe: fn(&[u8; 512]) -> bool,
    /// Reads and checks what is needed before the first request. Called confined, with every child in place.
    pub open: fn(OpenRequest) -> Result<Box<dyn Driver>>,
}

/// A node that a driver is built from.
#[derive(Debug)]
pub struct ChildSpec {
    /// The edge's name as in QAPI: `file`, `backing`, `data-file`.
    pub name: &'static str,
    /// Whether opening without it is an error of the caller.
    pub required: bool,
    /// How a node uses it.
    pub writes: Writes,
}

/// An option that a driver takes.
#[derive(Debug)]
pub struct OptionSpec {
    /// QAPI's name.
    pub name: &'static str,
    /// Type of its value.
    pub kind: OptionKind,
    /// One sentence for the reference, with unit and range.
    pub summary: &'static str,
}

/// Type of an option's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionKind {
    /// `true` or `false`.
    Bool,
    /// A number of bytes, 0 to 2^63-1.
    Size,
    /// Text.
    Str,
}

/// An option's value, already of the type that its [`OptionSpec`] names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionValue {
    /// For [`OptionKind::Bool`].
    Bool(bool),
    /// For [`OptionKind::Size`], bytes.
    Size(u64),
    /// For [`OptionKind::Str`].
    Str(String),
}

/// Options given, by name. The caller has checked names and types against the driver's [`OptionSpec`]s.
pub type Options = BTreeMap<&'static str, OptionValue>;

/// Nodes given, by edge name. A required child is always there; an optional one only if the caller gave a node.
pub type Children = BTreeMap<&'static str, Arc<BlockNode>>;

/// Everything a driver gets to open an image.
pub struct OpenRequest {
    /// The descriptor, for drivers with [`DriverEntry::takes_descriptor`]; its access mode already fits `writable`.
    pub descriptor: Option<Descriptor>,
    /// What the user called the descriptor (QAPI's `filename`): for messages and queries, never opened.
    pub filename: String,
    /// The nodes it is built from.
    pub children: Children,
    /// Edges that the caller says there are none of, whatever the image names.
    pub detached: BTreeSet<&'static str>,
    /// The options given.
    pub options: Options,
    /// Whether requests may change the image. Without it the driver writes nothing, not even a header.
    pub writable: bool,
}

impl OpenRequest {
    /// A child that the table says is required.
    ///
    /// # Errors
    /// `Invalid` if the caller of the driver left it out all the same.
    pub fn child(&self, name: &str) -> Result<Arc<BlockNode>> {
        self.children.get(name).cloned().ok_or_else(|| Error::invalid(format!("Parameter '{name}' is missing")))
    }

    /// A size option in bytes, if given.
    pub fn size(&self, name: &str) -> Option<u64> {
        match self.options.get(name) {
            Some(OptionValue::Size(bytes)) => Some(*bytes),
            _ => None,
        }
    }
}

/// How exactly [`Driver::map`] should answer, and whether it may sleep to find out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// How exact.
    pub detail: Detail,
    /// Whether metadata that is not in memory may be read from a device that makes the caller wait.
    pub wait: Wait,
}

/// How exactly [`Driver::map`] should answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// For reading: any place from which the right bytes can be read. Holes of host files need not be found.
    Place,
    /// For block status: holes are looked for (`lseek(SEEK_DATA)`), data of a layer is told from data below it.
    Allocation,
}

/// Where the bytes at an offset live, and for how many bytes that holds.
#[derive(Debug)]
pub struct Mapping<'a> {
    /// Where.
    pub target: Target<'a>,
    /// For how many bytes from the asked offset: at least 1, at most what was asked.
    pub len: u64,
}

/// Where bytes live.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// At `offset` of a host file or device. Past its end they are zeroes.
    Fd {
        /// The file.
        fd: BorrowedFd<'a>,
        /// Byte offset in it.
        offset: u64,
    },
    /// This layer's own data, stored at `offset` of another node. Past that node's end they are zeroes.
    Data {
        /// The node that stores them.
        node: &'a BlockNode,
        /// Byte offset in it.
        offset: u64,
    },
    /// Not this layer's business: whatever `node` says about `offset` (a backing file; a pass-through driver).
    /// Past that node's end they are zeroes.
    Child {
        /// The node to ask.
        node: &'a BlockNode,
        /// Byte offset in it.
        offset: u64,
    },
    /// They read as zeroes and take no room.
    Zero,
    /// They must be computed: [`Driver::read_computed`].
    Computed,
}

/// Room for new bytes. Bytes written to `target` become the image's content at once (an overwrite in place).
#[derive(Debug)]
pub struct Prepared<'a> {
    /// Where to write: only `Fd` or `Data`.
    pub target: Target<'a>,
    /// For how many bytes: at least 1, at most what was asked.
    pub len: u64,
}

/// How zeroes may be written (QEMU's `BDRV_REQ_MAY_UNMAP` and `BDRV_REQ_NO_FALLBACK`; NBD proto.md, "`NBD_CMD_WRITE_ZEROES`").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroFlags {
    /// The range may be deallocated.
    pub may_unmap: bool,
    /// Answer `EOPNOTSUPP` at once rather than write zeroes as data.
    pub fast_only: bool,
}

/// What a driver tells about its image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Info {
    /// Whether the image was not closed properly.
    pub dirty: bool,
    /// Bytes that the host file takes, where that is known.
    pub allocated_size: Option<u64>,
    /// Cluster size in bytes, if the format has clusters.
    pub cluster_size: Option<u64>,
    /// The backing file's name as it stands in the image: untrusted text, never opened.
    pub backing_name: Option<String>,
    /// The backing file's format as it stands in the image: untrusted text.
    pub backing_format: Option<String>,
    /// The external data file's name as it stands in the image: untrusted text, never opened.
    pub data_file_name: Option<String>,
    /// Further facts for people and QMP, in order: QEMU's member name and its value.
    pub specifics: Vec<(&'static str, InfoValue)>,
}

/// A fact about an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InfoValue {
    /// True or false.
    Bool(bool),
    /// A number.
    Int(u64),
    /// Text; untrusted if it came from the image.
    Str(String),
}

/// An open image. Offsets are bytes of the guest's view, below [`Driver::len`]; [`BlockNode`] has checked them.
/// Every method may be called from any thread at any time.
#[allow(clippy::len_without_is_empty, reason = "an empty disk is not a special case")]
pub trait Driver: Send + Sync {
    /// Size of the guest's view in bytes.
    fn len(&self) -> u64;

    /// Where the bytes from `offset` live. `len` is at least 1 and ends within [`Driver::len`].
    ///
    /// # Errors
    /// `WouldBlock` only if `ask.wait` forbids sleeping; `EIO` for metadata that breaks the format's rules.
    fn map(&self, offset: u64, len: u64, ask: Ask) -> io::Result<Mapping<'_>>;

    /// Fills `buf` from `offset`; the range was mapped [`Target::Computed`].
    ///
    /// # Errors
    /// `EIO` if the stored form cannot be turned into bytes.
    fn read_computed(&self, _buf: &mut [u8], _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Room for a write of `len` bytes at `offset`.
    ///
    /// # Errors
    /// `ENOSPC`, `EROFS`, or `EIO` for broken metadata.
    fn prepare_write(&self, offset: u64, len: u64) -> io::Result<Prepared<'_>>;

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if that would mean writing data: [`BlockNode`] then writes zeroes itself, unless `flags.fast_only`.
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()>;

    /// A hint that a range's content is of no further use. Success promises nothing.
    ///
    /// # Errors
    /// Those of the host file; a layer that cannot discard answers success.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Returns when everything acknowledged before is on stable storage.
    ///
    /// # Errors
    /// `EIO` and friends: then nothing is known about unflushed data.
    fn flush(&self) -> io::Result<()>;

    /// Whether the image may be written from now on. Called before the nodes below become writable, after they became
    /// read-only, and with no request under way that writes.
    ///
    /// # Errors
    /// The driver cannot write, or not this image.
    fn reopen(&self, _writable: bool) -> Result<()> {
        Ok(())
    }

    /// Takes another descriptor of the same file in use, for drivers with [`DriverEntry::takes_descriptor`]; requests under way
    /// end on the old one. Returns the old one.
    ///
    /// # Errors
    /// The driver takes no descriptor, or the process has no number left.
    fn replace(&self, _descriptor: Descriptor) -> Result<Descriptor> {
        Err(Error::invalid("this driver takes no descriptor"))
    }

    /// Takes the image locks that fit what the node's users do, and gives back the others.
    ///
    /// # Errors
    /// Another program holds the image in a way that excludes it: QEMU's words.
    fn lock(&self, _demand: Demand) -> Result<()> {
        Ok(())
    }

    /// Smallest unit of requests in bytes that the layer below takes without read-modify-write: a power of two.
    fn block_size(&self) -> u32 {
        1
    }

    /// Facts about the image.
    fn info(&self) -> Info {
        Info::default()
    }
}
