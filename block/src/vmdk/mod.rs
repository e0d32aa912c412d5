// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver `vmdk`: VMware's disk image. One sparse extent with the descriptor inside is read and written
//! (`monolithicSparse`), a compressed stream (`streamOptimized`) is read.
//!
//! An overlay's descriptor has the CID of the content that its parent had when the overlay was made. The parent is a node that
//! the caller gives; if that is a `vmdk`, its CID must be the one; of another format nothing can be asked, and the caller who
//! named the node is believed.

mod descriptor;
mod header;
mod sparse;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use descriptor::{Access, Descriptor, NO_PARENT};
use header::{Header, MAGIC};
use rustix::io::Errno;
use sparse::Sparse;

use crate::claims::Writes;
use crate::driver::{Ask, ChildSpec, Driver, DriverEntry, Info, InfoValue, Mapping, OpenRequest, Prepared, ZeroFlags};
use crate::{BlockNode, Error, Result, Wait};

pub(crate) const ENTRY: DriverEntry = DriverEntry {
    name: "vmdk",
    summary: "VMware's disk image: one sparse file, or a compressed stream (read only)",
    children: &[
        ChildSpec { name: "file", required: true, writes: Writes::Metadata },
        ChildSpec { name: "backing", required: false, writes: Writes::Never },
    ],
    options: &[],
    takes_descriptor: false,
    writes: true,
    probe: |start| start.starts_with(MAGIC) || start.starts_with(COWD) || start.starts_with(TEXT),
    open,
};

const COWD: &[u8] = b"COWD";
/// The first line of descriptor files.
const TEXT: &[u8] = b"# Disk DescriptorFile";
const SESPARSE: &[u8] = &0xcafe_babe_u64.to_le_bytes();

struct Vmdk {
    extent: Sparse,
    descriptor: Descriptor,
    /// The CID as it stands in the image.
    cid: AtomicU32,
    /// Whether the image got a new CID since it was opened for writing.
    marked: AtomicBool,
    marking: Mutex<()>,
}

fn open(request: OpenRequest) -> Result<Box<dyn Driver>> {
    let file = request.child("file")?;
    refuse_others(&file)?;
    let header = Header::read(&file)?;
    let (at, size) = header.descriptor;
    if size == 0 {
        return Err(Error::unsupported(
            "this is one extent of a VMDK, without a descriptor: the descriptor is in a file of its own",
        ));
    }
    let mut text = vec![0; usize::try_from(size).unwrap_or(0)];
    file.read(&mut text, at, Wait::Allowed).map_err(|e| Error::io("read the VMDK descriptor", e))?;
    let descriptor = Descriptor::parse(&text)?;
    if !matches!(descriptor.create_type.as_str(), "monolithicSparse" | "streamOptimized") {
        return Err(unsupported_type(&descriptor.create_type));
    }
    match descriptor.extents.as_slice() {
        [line] if line.kind != "SPARSE" => {
            return Err(Error::corrupt("the VMDK is a sparse extent, and its descriptor says that it is none"));
        }
        [line] if line.access == Access::None => {
            return Err(Error::invalid("the VMDK descriptor forbids all access to its extent (NOACCESS)"));
        }
        [_] => {}
        lines => {
            return Err(Error::corrupt(format!(
                "a VMDK in one file has one extent, the descriptor names {}",
                lines.len()
            )));
        }
    }
    let backing = backing(&request, &descriptor)?;
    let capacity = header.capacity;
    let vmdk = Vmdk {
        extent: Sparse::new(header, file, backing, 0, capacity),
        cid: AtomicU32::new(descriptor.cid),
        descriptor,
        marked: AtomicBool::new(false),
        marking: Mutex::new(()),
    };
    if request.writable {
        vmdk.reopen(true)?;
    }
    Ok(Box::new(vmdk))
}

/// Says of other things called VMDK what they are.
fn refuse_others(file: &BlockNode) -> Result<()> {
    let mut start = [0; 512];
    file.read_or_zero(&mut start, 0, Wait::Allowed).map_err(|e| Error::io("read the VMDK header", e))?;
    let what = match () {
        () if start.starts_with(COWD) => "an ESX sparse extent (COWD)",
        () if start.starts_with(SESPARSE) => "a space-efficient sparse extent (seSparse)",
        () if start.starts_with(TEXT) => "a descriptor file, whose extents are in other files",
        () => return Ok(()),
    };
    Err(Error::unsupported(format!("this VMDK is {what}, which this version does not read")))
}

fn unsupported_type(create_type: &str) -> Error {
    let shown: String = create_type.chars().take(40).flat_map(char::escape_debug).collect();
    Error::unsupported(format!(
        "Unsupported image type '{shown}' of a VMDK with its descriptor inside: there are monolithicSparse and streamOptimized"
    ))
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
        self.extent.blocks.file.write(&self.descriptor.with_cid(new), self.extent.header.descriptor.0, false)?;
        self.cid.store(new, Ordering::Relaxed);
        self.marked.store(true, Ordering::Release);
        Ok(())
    }
}

impl Driver for Vmdk {
    fn len(&self) -> u64 {
        self.extent.blocks.size
    }

    fn map(&self, offset: u64, len: u64, ask: Ask) -> io::Result<Mapping<'_>> {
        self.extent.map(offset, len, ask)
    }

    fn read_computed(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.extent.read_computed(buf, offset)
    }

    fn prepare_write(&self, offset: u64, len: u64) -> io::Result<Prepared<'_>> {
        if self.extent.header.compressed {
            return Err(Errno::ROFS.into());
        }
        self.mark()?;
        self.extent.blocks.prepare_write(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        self.mark()?;
        self.extent.blocks.write_zeroes(offset, len, flags)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.mark()?;
        self.extent.blocks.discard(offset, len)
    }

    fn flush(&self) -> io::Result<()> {
        self.extent.blocks.flush()
    }

    fn reopen(&self, writable: bool) -> Result<()> {
        if !writable {
            return self.flush().map_err(|e| Error::io("flush the image", e));
        }
        if self.descriptor.extents.iter().any(|line| line.access != Access::ReadWrite) {
            return Err(Error::invalid("the VMDK descriptor lets nobody write to its extent (RDONLY)"));
        }
        self.extent.check_writable()?;
        let room = self.extent.header.descriptor.1;
        if self.descriptor.with_cid(0).len() as u64 > room {
            return Err(Error::unsupported(format!(
                "the VMDK descriptor has no room for a new CID in its {room} bytes"
            )));
        }
        self.marked.store(false, Ordering::Release);
        Ok(())
    }

    fn info(&self) -> Info {
        let header = &self.extent.header;
        let descriptor = &self.descriptor;
        let backing_name = descriptor.parent_hint.clone().filter(|_| descriptor.parent_cid != NO_PARENT);
        Info {
            dirty: header.unclean,
            allocated_size: self.extent.blocks.file.info().allocated_size,
            cluster_size: Some(header.grain),
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
