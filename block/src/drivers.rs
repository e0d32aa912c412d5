// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The table of the formats that exist: what each is built from, which options it takes, and how it is opened.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, LazyLock};

use crate::alarm::Alarm;
use crate::claims::Writes;
use crate::driver::Driver;
use crate::host::Descriptor;
use crate::{BlockNode, Error, Result, Secret, file, luks, nbd, qcow2, raw, read_only, vdi, vmdk, vpc, vvfat};

/// Every format, one line each: `blockdev-add`'s schema, its options and the reference docs follow from it.
pub const DRIVERS: &[DriverEntry] = &[
    read_only::BOCHS,
    read_only::CLOOP,
    read_only::DMG,
    file::ENTRY,
    file::DEVICE_ENTRY,
    luks::ENTRY,
    nbd::ENTRY,
    read_only::PARALLELS,
    read_only::QCOW,
    qcow2::ENTRY,
    read_only::QED,
    raw::ENTRY,
    vdi::ENTRY,
    read_only::VHDX,
    vmdk::ENTRY,
    vpc::ENTRY,
    vvfat::ENTRY,
];

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
    /// Whether images of this format can be written.
    pub writes: bool,
    /// Whether an image that starts with these 512 bytes looks like one of this format. Only the inspector asks.
    pub probe: fn(&[u8; 512]) -> bool,
    /// Reads and checks what is needed before the first request. Called confined, with every child in place.
    pub open: fn(OpenRequest) -> Result<Box<dyn Driver>>,
}

impl DriverEntry {
    /// Whether it is a format of what another node holds.
    pub fn is_format(&self) -> bool {
        !self.takes_descriptor && self.socket().is_none() && self.directory().is_none()
    }

    /// The option that takes a socket, if there is one.
    pub fn socket(&self) -> Option<&OptionSpec> {
        self.options.iter().find(|option| option.kind == OptionKind::Socket)
    }

    /// The option that takes a set of descriptors for a directory, if there is one.
    pub fn directory(&self) -> Option<&OptionSpec> {
        self.options.iter().find(|option| option.kind == OptionKind::Directory)
    }
}

/// A node that a driver is built from.
#[derive(Debug)]
pub struct ChildSpec {
    /// The edge's name as in QAPI: `file`, `backing`, `data-file`. A name that ends in `.*` is a list of edges, `extents.0`,
    /// `extents.1` and so on without a gap, and a member `extents` in QAPI.
    pub name: &'static str,
    /// Whether opening without it is an error of the caller.
    pub required: bool,
    /// How a node uses it.
    pub writes: Writes,
}

/// Nodes that a list of edges takes at most.
const MOST_EDGES: usize = 1024;

/// Names of the edges in lists, by the names of their specs: made once, kept for ever.
static LISTS: LazyLock<BTreeMap<&'static str, Vec<&'static str>>> = LazyLock::new(|| {
    let leak = |name: String| -> &'static str { Box::leak(name.into_boxed_str()) };
    let names = |list: &str| (0..MOST_EDGES).map(|number| leak(format!("{list}.{number}"))).collect();
    let lists = DRIVERS.iter().flat_map(|driver| driver.children).filter(|child| child.is_list());
    lists.map(|child| (child.name, names(child.member()))).collect()
});

impl ChildSpec {
    /// Whether it stands for a list of edges.
    pub fn is_list(&self) -> bool {
        self.name.ends_with(".*")
    }

    /// The member of `blockdev-add`'s schema that names the node or nodes.
    pub fn member(&self) -> &'static str {
        self.name.strip_suffix(".*").unwrap_or(self.name)
    }

    /// Names of the edges that it can have, in order.
    pub fn edges(&'static self) -> &'static [&'static str] {
        match LISTS.get(self.name) {
            Some(names) => names,
            None => std::slice::from_ref(&self.name),
        }
    }
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
    /// A number of seconds, 0 to 2^32-1.
    Seconds,
    /// A passed socket, by its name.
    Socket,
    /// A set of passed descriptors that stands for a directory; the caller opens all of it.
    Directory,
    /// How the host is asked (QAPI's `BlockdevAioOptions`), as text.
    Aio,
    /// Text.
    Str,
    /// The id of an object that holds a secret; the caller looks it up.
    Secret,
    /// QAPI's `BlockdevQcow2Encryption` for LUKS: the id of an object that holds the passphrase, in its `key-secret`.
    LuksSecret,
    /// QAPI's `Qcow2OverlapChecks`; the caller makes `all` of it, or `cached`.
    OverlapCheck,
}

/// An option's value, already of the type that its [`OptionSpec`] names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionValue {
    /// For [`OptionKind::Bool`].
    Bool(bool),
    /// For [`OptionKind::Size`] and [`OptionKind::Seconds`].
    Size(u64),
    /// For [`OptionKind::Str`], [`OptionKind::Aio`], [`OptionKind::Socket`], [`OptionKind::Directory`] and
    /// [`OptionKind::OverlapCheck`].
    Str(String),
    /// For [`OptionKind::Secret`] and [`OptionKind::LuksSecret`].
    Secret(Secret),
}

/// Options given, by name. The caller has checked names and types against the driver's [`OptionSpec`]s.
pub type Options = BTreeMap<&'static str, OptionValue>;

/// Nodes given, by edge name. A required child is always there; an optional one only if the caller gave a node.
pub type Children = BTreeMap<&'static str, Arc<BlockNode>>;

/// Everything a driver gets to open an image.
pub struct OpenRequest {
    /// The descriptor, for drivers with [`DriverEntry::takes_descriptor`]; its access mode already fits `writable`.
    pub descriptor: Option<Descriptor>,
    /// The descriptors with their paths, for drivers with a [`DriverEntry::directory`]; they can be read.
    pub files: Vec<(String, Descriptor)>,
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
    /// Whether only [`Driver::info`] and the like will be asked, and no byte of the guest's: then no key is needed.
    pub facts_only: bool,
    /// The node's name, for messages.
    pub node_name: String,
    /// Where the driver says that it found its image damaged, or lost its connection.
    pub alarm: Alarm,
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

    /// A secret, if given.
    pub fn secret(&self, name: &str) -> Option<&Secret> {
        match self.options.get(name) {
            Some(OptionValue::Secret(secret)) => Some(secret),
            _ => None,
        }
    }
}
