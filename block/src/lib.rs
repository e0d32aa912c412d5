// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Block nodes: disk images in any format, fed by descriptors alone.
//!
//! A [`BlockNode`] is an open image with a name. Its [`Driver`] knows the format and answers one question above all,
//! [`Driver::map`]: *where do these bytes live?* One loop in [`BlockNode::read`] asks it and does the I/O; the same answer
//! serves block status, `lseek` on an export and the holes that a copy skips. The [`Graph`] holds the nodes and the edges
//! between them and refuses what would corrupt an image. Formats stand in one table, [`DRIVERS`].
//!
//! Nothing here opens a file: the `file` driver takes a descriptor, every other driver takes nodes.

mod alarm;
pub mod bitmap;
mod block_check;
mod blocks;
mod child;
mod claims;
mod coalesce;
mod direct;
mod driver;
mod drivers;
mod encryption;
mod error;
mod file;
mod formats;
mod gate;
mod graph;
mod host;
mod image_locks;
mod inflated;
mod inspect;
mod located;
pub mod luks;
mod nbd;
mod node;
mod overlay;
mod place;
mod qcow2;
mod raw;
mod read_only;
mod root;
mod scatter;
mod secret;
mod snapshot;
pub mod stats;
mod vdi;
mod vmdk;
mod vpc;
mod vvfat;

pub use alarm::{Alarm, Corruption};
pub use claims::{Claim, Demand, Use, User, Writes};
pub use driver::{Ask, Detail, Driver, Info, InfoValue, Mapping, Pending, Prepared, Target, ZeroFlags};
pub use drivers::{
    ChildSpec, Children, DRIVERS, DriverEntry, OpenRequest, OptionKind, OptionSpec, OptionValue, Options, driver_named,
};
pub use encryption::Encryption;
pub use error::{Error, ErrorKind, Result};
pub use file::{Preallocation, create as create_file, host_driver};
pub use formats::{
    Amend, Check, CheckReport, CreateRequest, FORMATS, Format, NewExtent, Repair, Say, amend, check, create,
    extent_names, format_named, preallocation_named, stream,
};
pub use gate::{Closed, Gate, Hold};
pub use graph::{Edge, Graph, NodeSpec, id_is_well_formed};
pub use host::{Descriptor, Host, Lost, Opener};
pub use inspect::{Facts, Inspection, facts, inspect};
pub use located::{HostFile, Located};
pub use nbd::list as nbd_list;
pub use node::{BlockNode, Extent, ExtentKind, NodeAccess};
pub use overlay::Overlaid;
pub use place::Place;
pub use root::{Drained, Entered, Root};
pub use secret::Secret;
pub use snapshot::{Snapshot, Snapshots};
pub use sys::file::Wait;
pub use vmdk::stream::Stream;
pub use vvfat::{Change, ChangeKind, Changes, Vvfat};
