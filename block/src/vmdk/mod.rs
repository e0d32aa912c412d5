// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver `vmdk`: VMware's disk image. One sparse extent with the descriptor inside is read and written
//! (`monolithicSparse`), a compressed stream (`streamOptimized`) is read. A descriptor in a file of its own puts a disk together
//! from extents, sparse and flat, in other nodes: `extents.0`, `extents.1` and so on, in the order of the lines that have a file.
//!
//! An overlay's descriptor has the CID of the content that its parent had when the overlay was made. The parent is a node that
//! the caller gives; if that is a `vmdk`, its CID must be the one; of another format nothing can be asked, and the caller who
//! named the node is believed.

pub mod check;
pub mod create;
mod descriptor;
mod header;
mod part;
mod sesparse;
mod sparse;
pub mod stream;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use descriptor::{Access, Descriptor, NO_PARENT};
use header::{COWD, Header, MAGIC};
use part::Part;
use rustix::io::Errno;
use sparse::Sparse;

use crate::claims::Writes;
use crate::driver::{Ask, Driver, Info, InfoValue, Mapping, Prepared, ZeroFlags};
use crate::drivers::{ChildSpec, DriverEntry, OpenRequest};
use crate::{BlockNode, Error, Inspection, Result, Wait};

pub(crate) const ENTRY: DriverEntry = DriverEntry {
    name: "vmdk",
    summary: "VMware's disk image: sparse, flat, or a compressed stream (read only)",
    children: &[
        ChildSpec { name: "file", required: true, writes: Writes::Metadata },
        ChildSpec { name: "backing", required: false, writes: Writes::Never },
        ChildSpec { name: "extents.*", required: false, writes: Writes::Metadata },
    ],
    options: &[],
    takes_descriptor: false,
    writes: true,
    probe: |start| start.starts_with(MAGIC) || start.starts_with(COWD) || start.starts_with(TEXT),
    open,
};

/// The first line of descriptor files.
const TEXT: &[u8] = b"# Disk DescriptorFile";
/// Types of disks whose descriptor is inside their one file, and is a file of its own.
const INSIDE: &[&str] = &["monolithicSparse", "streamOptimized"];
const OUTSIDE: &[&str] =
    &["monolithicFlat", "twoGbMaxExtentFlat", "twoGbMaxExtentSparse", "vmfs", "vmfsSparse", "seSparse"];

/// Kinds of extents that are written.
const WRITTEN: &[&str] = &["FLAT", "VMFS", "SPARSE"];

struct Vmdk {
    file: Arc<BlockNode>,
    parts: Vec<Part>,
    descriptor: Descriptor,
    /// Where the descriptor stands in the file, and the room for it.
    descriptor_at: (u64, u64),
    /// The CID as it stands in the image.
    cid: AtomicU32,
    /// Whether the image got a new CID since it was opened for writing.
    marked: AtomicBool,
    marking: Mutex<()>,
}

fn open(request: OpenRequest) -> Result<Box<dyn Driver>> {
    let file = request.child("file")?;
    let Read { header, descriptor, descriptor_at } = read(&file)?;
    let backing = backing(&request, &descriptor)?;
    let parts = match header {
        Some(header) => vec![only_part(header, &file, &descriptor, &request, backing)?],
        None => Part::all(&descriptor.extents, &request.children, backing.as_ref())?,
    };
    let vmdk = Vmdk {
        file,
        parts,
        cid: AtomicU32::new(descriptor.cid),
        descriptor,
        descriptor_at,
        marked: AtomicBool::new(false),
        marking: Mutex::new(()),
    };
    if request.writable {
        vmdk.reopen(true)?;
    }
    Ok(Box::new(vmdk))
}

/// What is told of the image in `file` without its extents; the rest is as in `raw`.
pub fn inspect(file: &Arc<BlockNode>, raw: Inspection) -> Result<Inspection> {
    let Read { header, descriptor, .. } = read(file)?;
    let sectors = descriptor.extents.iter().try_fold(0u64, |sum, extent| sum.checked_add(extent.sectors));
    let sizes = || Error::corrupt("the VMDK's extents are too large together");
    let (virtual_size, writable) = match &header {
        Some(header) => (header.capacity, !header.compressed && header.version != 3),
        None => (sectors.and_then(|sectors| sectors.checked_mul(header::SECTOR)).ok_or_else(sizes)?, true),
    };
    let may_be_written = descriptor
        .extents
        .iter()
        .any(|extent| extent.access == Access::ReadWrite && WRITTEN.contains(&extent.kind.as_str()));
    let extents = descriptor.extents.into_iter().filter(|extent| header.is_none() && extent.kind != "ZERO");
    let extents = extents.map(|extent| extent.name).collect();
    let backing_name = descriptor.parent_hint.filter(|_| descriptor.parent_cid != NO_PARENT);
    Ok(Inspection {
        virtual_size,
        writable: writable && may_be_written,
        backing_format: backing_name.is_some().then(|| "vmdk".to_owned()),
        backing_name,
        extents,
        cid: Some(descriptor.cid),
        ..raw
    })
}

/// What stands in the image's own file.
struct Read {
    /// Of a sparse extent; there is none in a descriptor file.
    header: Option<Header>,
    descriptor: Descriptor,
    descriptor_at: (u64, u64),
}

fn read(file: &Arc<BlockNode>) -> Result<Read> {
    let mut start = [0; 512];
    file.read_or_zero(&mut start, 0, Wait::Allowed).map_err(|e| Error::io("read the VMDK header", e))?;
    for (magic, what) in
        [(COWD, "an ESX sparse extent (COWD)"), (sesparse::MAGIC, "a space-efficient extent (seSparse)")]
    {
        if start.starts_with(magic) {
            return Err(Error::unsupported(format!(
                "this VMDK is {what} without a descriptor: open the file that has the descriptor"
            )));
        }
    }
    let header = if start.starts_with(TEXT) { None } else { Some(Header::read(file)?) };
    let descriptor_at = header.as_ref().map_or((0, file.len()), |header| header.descriptor);
    if descriptor_at.1 == 0 {
        return Err(Error::unsupported(
            "this is one extent of a VMDK, without a descriptor: open the file that has the descriptor",
        ));
    }
    if descriptor_at.1 > descriptor::MAX_LEN {
        return Err(Error::corrupt(format!("a VMDK descriptor of {} bytes is too long", descriptor_at.1)));
    }
    let mut text = vec![0; usize::try_from(descriptor_at.1).unwrap_or(0)];
    file.read(&mut text, descriptor_at.0, Wait::Allowed).map_err(|e| Error::io("read the VMDK descriptor", e))?;
    let descriptor = Descriptor::parse(&text)?;
    let known = if header.is_some() { INSIDE } else { OUTSIDE };
    if !known.contains(&descriptor.create_type.as_str()) {
        let shown: String = descriptor.create_type.chars().take(40).flat_map(char::escape_debug).collect();
        return Err(Error::unsupported(format!(
            "Unsupported image type '{shown}' of a VMDK that begins like this: there are {}",
            known.join(", ")
        )));
    }
    Ok(Read { header, descriptor, descriptor_at })
}

/// The part of a disk in one file. What its line says besides the access is not looked at: the header knows it better.
fn only_part(
    header: Header,
    file: &Arc<BlockNode>,
    descriptor: &Descriptor,
    request: &OpenRequest,
    backing: Option<Arc<BlockNode>>,
) -> Result<Part> {
    if request.children.keys().any(|edge| edge.starts_with("extents.")) {
        return Err(Error::invalid("'extents' can only be set for a VMDK whose descriptor is a file of its own"));
    }
    match descriptor.extents.as_slice() {
        [line] if line.kind != "SPARSE" => {
            Err(Error::corrupt("the VMDK is a sparse extent, and its descriptor says that it is none"))
        }
        [line] => {
            let capacity = header.capacity;
            Ok(Part::whole(Sparse::new(header, Arc::clone(file), backing, 0, capacity), line.access))
        }
        lines => {
            Err(Error::corrupt(format!("a VMDK in one file has one extent, the descriptor names {}", lines.len())))
        }
    }
}

/// The parent, if its content is the one that the image was made over.
fn backing(request: &OpenRequest, descriptor: &Descriptor) -> Result<Option<Arc<BlockNode>>> {
    let node = request.children.get("backing").cloned();
    let has_parent = descriptor.parent_cid != NO_PARENT;
    match &node {
        None if has_parent && !request.detached.contains("backing") => {
            let name = descriptor.parent_hint.as_deref().unwrap_or_default();
            let name: String = name.chars().take(200).flat_map(char::escape_debug).collect();
            Err(Error::invalid(format!(
                "the VMDK has the parent '{name}': give 'backing' a node, or null to read what only the parent holds as zeroes"
            )))
        }
        Some(_) if !has_parent => Err(Error::invalid("'backing' can only be set for a VMDK that has a parent")),
        Some(parent) => {
            let cid =
                parent.info().specifics.into_iter().find(|(name, _)| parent.driver_name() == "vmdk" && *name == "cid");
            match cid {
                Some((_, InfoValue::Int(cid))) if cid != u64::from(descriptor.parent_cid) => {
                    Err(Error::invalid(format!(
                        "the parent was changed since the VMDK was made over it: it has the CID {cid:08x}, not {:08x}",
                        descriptor.parent_cid
                    )))
                }
                _ => Ok(node),
            }
        }
        None => Ok(None),
    }
}

impl Vmdk {
    /// Gives the image a new CID, once for each time that it is opened: overlays notice that the content is another.
    fn mark(&self) -> io::Result<()> {
        if self.marked.load(Ordering::Acquire) {
            return Ok(());
        }
        let _one = self.marking.lock().unwrap_or_else(PoisonError::into_inner);
        if self.marked.load(Ordering::Acquire) {
            return Ok(());
        }
        let old = self.cid.load(Ordering::Relaxed);
        let mut random = [0; 4];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let new = match u32::from_le_bytes(random) {
            number if number == old || number == NO_PARENT => old.wrapping_add(1) & 0x7fff_ffff,
            number => number,
        };
        self.file.write(&self.descriptor.with_cid(new), self.descriptor_at.0, false)?;
        self.cid.store(new, Ordering::Relaxed);
        self.marked.store(true, Ordering::Release);
        Ok(())
    }
}

impl Vmdk {
    /// The part that has the byte at `offset`, and where in it.
    fn part(&self, offset: u64) -> io::Result<(&Part, u64)> {
        let number = self.parts.partition_point(|part| part.start + part.len <= offset);
        let part = self.parts.get(number).ok_or(Errno::IO)?;
        Ok((part, offset - part.start))
    }

    /// Calls `act` for what each part has of a range: the part, where in it, and for how many bytes.
    fn each(&self, mut offset: u64, len: u64, act: impl Fn(&Part, u64, u64) -> io::Result<()>) -> io::Result<()> {
        let end = offset + len;
        while offset < end {
            let (part, at) = self.part(offset)?;
            let len = (end - offset).min(part.len - at);
            act(part, at, len)?;
            offset += len;
        }
        Ok(())
    }
}

impl Driver for Vmdk {
    fn len(&self) -> u64 {
        self.parts.last().map_or(0, |part| part.start + part.len)
    }

    fn map(&self, offset: u64, len: u64, ask: Ask) -> io::Result<Mapping<'_>> {
        let (part, at) = self.part(offset)?;
        part.map(at, len, ask)
    }

    fn read_computed(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let (part, at) = self.part(offset)?;
        part.read_computed(buf, at)
    }

    fn prepare_write(&self, offset: u64, len: u64) -> io::Result<Prepared<'_>> {
        let (part, at) = self.part(offset)?;
        if part.is_writable() {
            self.mark()?;
        }
        part.prepare_write(at, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.mark()?;
        self.each(offset, len, |part, at, len| part.write_zeroes(at, len, flags))
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.mark()?;
        self.each(offset, len, Part::discard)
    }

    fn bypasses_cache(&self) -> bool {
        self.file.bypasses_cache()
    }

    fn flush(&self) -> io::Result<()> {
        self.parts.iter().try_for_each(Part::flush)?;
        // A descriptor inside the one extent went with that.
        if self.descriptor_at.0 == 0 { self.file.flush() } else { Ok(()) }
    }

    fn reopen(&self, writable: bool) -> Result<()> {
        if !writable {
            return self.flush().map_err(|e| Error::io("flush the image", e));
        }
        if !self.parts.iter().any(Part::is_writable) {
            return Err(Error::invalid("the VMDK descriptor lets nobody write to any extent (RDONLY, NOACCESS, ZERO)"));
        }
        self.parts.iter().try_for_each(Part::check_writable)?;
        let room = self.descriptor_at.1;
        if self.descriptor.with_cid(0).len() as u64 > room {
            return Err(Error::unsupported(format!(
                "the VMDK descriptor has no room for a new CID in its {room} bytes"
            )));
        }
        self.marked.store(false, Ordering::Release);
        Ok(())
    }

    fn info(&self) -> Info {
        let descriptor = &self.descriptor;
        let sparse = || self.parts.iter().filter_map(Part::sparse);
        let backing_name = descriptor.parent_hint.clone().filter(|_| descriptor.parent_cid != NO_PARENT);
        Info {
            dirty: sparse().any(|sparse| sparse.header.unclean),
            allocated_size: Some(self.parts.iter().map(Part::allocated_size).sum()),
            cluster_size: sparse().next().map(|sparse| sparse.header.grain),
            backing_format: backing_name.is_some().then(|| "vmdk".to_owned()),
            backing_name,
            specifics: vec![
                ("create-type", InfoValue::Str(descriptor.create_type.clone())),
                ("cid", InfoValue::Int(self.cid.load(Ordering::Relaxed).into())),
                ("parent-cid", InfoValue::Int(descriptor.parent_cid.into())),
            ],
            ..Info::default()
        }
    }
}
