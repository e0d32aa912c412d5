// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an image is, before anything is opened for it: for the confined inspector, and for nobody else.

use std::sync::Arc;

use crate::alarm::Alarm;
use crate::driver::Driver;
use crate::drivers::{DriverEntry, OpenRequest};
use crate::qcow2::header::Header;
use crate::{BlockNode, Children, DRIVERS, Error, Info, Result, Snapshot, Snapshots, Wait, driver_named, vmdk};

/// What an image says about itself. Names are untrusted text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// The driver that reads it.
    pub format: &'static str,
    /// Bytes that a guest sees.
    pub virtual_size: u64,
    /// Whether it can be written.
    pub writable: bool,
    /// The backing file's name.
    pub backing_name: Option<String>,
    /// The backing file's format.
    pub backing_format: Option<String>,
    /// The external data file's name.
    pub data_file_name: Option<String>,
    /// The names of the extents that are files of their own, in the order of the edges `extents.0`, `extents.1` and so on.
    pub extents: Vec<String>,
    /// Which content this is, for formats that say it: what is made over the image notes it.
    pub cid: Option<u32>,
}

/// What can be told of an image without a key, and without what is below it.
#[derive(Debug)]
pub struct Facts {
    /// Bytes that a guest sees.
    pub len: u64,
    /// Facts.
    pub info: Info,
    /// The snapshots that it keeps, the oldest first.
    pub snapshots: Vec<Snapshot>,
}

/// What the image of format `format` says about itself. `children` are the nodes that it is built from, without what is below it.
///
/// # Errors
/// `Invalid` for a format that does not exist, and whatever is wrong with the image.
pub fn facts(format: &str, children: Children) -> Result<Facts> {
    let unknown = || Error::invalid(format!("Unknown driver '{}'", format.escape_debug()));
    let entry = driver_named(format).filter(|entry| entry.is_format()).ok_or_else(unknown)?;
    let opened = open(entry, children)?;
    let snapshots = opened.snapshots().map_or(Ok(Vec::new()), Snapshots::list)?;
    Ok(Facts { len: opened.len(), info: opened.info(), snapshots })
}

fn open(entry: &DriverEntry, children: Children) -> Result<Box<dyn Driver>> {
    let file = children.get("file").ok_or_else(|| Error::invalid("Parameter 'file' is missing"))?;
    let (filename, node_name) = (file.filename().to_owned(), file.name().to_owned());
    (entry.open)(OpenRequest {
        descriptor: None,
        files: Vec::new(),
        filename,
        children,
        detached: ["backing"].into(),
        options: [].into(),
        writable: false,
        facts_only: true,
        node_name,
        alarm: Alarm::default(),
    })
}

/// Looks at the image in `file`. `format` keeps it from guessing; a guest that can write the first sector of a raw disk could
/// make it look like anything.
///
/// # Errors
/// `Unsupported` for a format that does not exist here, and whatever is wrong with the header.
pub fn inspect(file: &Arc<BlockNode>, format: Option<&str>) -> Result<Inspection> {
    let entry = match format {
        Some(name) => driver_named(name).filter(|entry| entry.is_format()),
        None => {
            let mut start = [0; 512];
            file.read_or_zero(&mut start, 0, Wait::Allowed).map_err(|e| Error::io("read the first sector", e))?;
            DRIVERS.iter().find(|entry| (entry.probe)(&start)).or_else(|| driver_named("raw"))
        }
    };
    let Some(entry) = entry else {
        let known: Vec<&str> = DRIVERS.iter().filter(|entry| entry.is_format()).map(|entry| entry.name).collect();
        let asked = format.unwrap_or_default().escape_debug();
        return Err(Error::unsupported(format!("unknown format '{asked}'; there are {}", known.join(", "))));
    };
    let (format, writable) = (entry.name, entry.writes);
    let raw = Inspection {
        format,
        virtual_size: file.len(),
        writable,
        backing_name: None,
        backing_format: None,
        data_file_name: None,
        extents: Vec::new(),
        cid: None,
    };
    if format == "raw" {
        return Ok(raw);
    }
    if format == "vmdk" {
        return vmdk::inspect(file, raw);
    }
    if format != "qcow2" {
        let opened = open(entry, [("file", Arc::clone(file))].into())?;
        let Info { backing_name, backing_format, .. } = opened.info();
        // Some images of a format that can be written cannot be: this looks, and changes nothing.
        let writable = writable && opened.reopen(true).is_ok();
        return Ok(Inspection { virtual_size: opened.len(), writable, backing_name, backing_format, ..raw });
    }
    let header = Header::read(file)?;
    Ok(Inspection {
        virtual_size: header.size,
        backing_name: header.backing_name,
        backing_format: header.backing_format,
        data_file_name: header.data_file_name.filter(|_| header.external_data),
        ..raw
    })
}
