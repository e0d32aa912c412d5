// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver `qcow2`: QEMU's copy-on-write format, versions 2 and 3, read-only.
//!
//! A guest offset is split into an L1 index, an L2 index and an offset in a cluster. The L1 table is in memory from the start,
//! L2 tables come [slice](slices) by slice. [`Qcow2::map`] turns entries into runs as long as they are contiguous, so that a
//! large read of a well-laid image is one `preadv2` on the host.
//!
//! [`header`] has every rule by which an image is refused, [`entry`] the bits of the tables, [`inflate`] compressed clusters.
//! Names that the image holds are never followed.

mod entry;
pub(crate) mod header;
mod inflate;
mod slices;

use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use crate::claims::Writes;
use crate::driver::{
    Ask, ChildSpec, Driver, DriverEntry, Info, InfoValue, Mapping, OpenRequest, OptionKind, OptionSpec, Prepared,
    Target, ZeroFlags,
};
use crate::{BlockNode, Error, Result, Wait};
use entry::{Kind, L1Entry, L2Entry, Rules, SUBCLUSTERS};
use header::{Compression, Header};
use inflate::Inflated;
use slices::{SLICE_BYTES, Slices};

pub(crate) const ENTRY: DriverEntry = DriverEntry {
    name: "qcow2",
    summary: "QEMU's copy-on-write format, versions 2 and 3; read-only in this version",
    children: &[
        ChildSpec { name: "file", required: true, writes: Writes::Metadata },
        ChildSpec { name: "backing", required: false, writes: Writes::Never },
        ChildSpec { name: "data-file", required: false, writes: Writes::Metadata },
    ],
    options: &[OptionSpec {
        name: "l2-cache-size",
        kind: OptionKind::Size,
        summary: "most bytes of L2 tables in memory, default 32 MiB",
    }],
    takes_descriptor: false,
    probe: |start| start.starts_with(&header::MAGIC),
    open,
};

/// Most bytes of L2 tables in memory, unless the caller says otherwise: QEMU's default.
const L2_CACHE: u64 = 32 << 20;

struct Qcow2 {
    header: Header,
    rules: Rules,
    file: Arc<BlockNode>,
    /// Where plain clusters are: the external data file, or `file`.
    data: Arc<BlockNode>,
    backing: Option<Arc<BlockNode>>,
    l1: Box<[L1Entry]>,
    slices: Slices,
    inflated: Inflated,
}

fn open(request: OpenRequest) -> Result<Box<dyn Driver>> {
    let file = request.child("file")?;
    let header = Header::read(&file)?;
    if request.writable {
        return Err(cannot_write(&header));
    }
    let backing = request.children.get("backing").cloned();
    if let (Some(name), None, false) = (&header.backing_name, &backing, request.detached.contains("backing")) {
        return Err(Error::invalid(format!(
            "the image names '{}' as its backing file, and names in images are never followed: give 'backing' a node, or null \
             to read what only the backing file holds as zeroes",
            name.escape_debug()
        )));
    }
    let data = match (request.children.get("data-file").cloned(), header.external_data) {
        (None, false) => Arc::clone(&file),
        (Some(data), true) => data,
        (None, true) => {
            let name = header.data_file_name.as_deref().unwrap_or_default().escape_debug();
            return Err(Error::invalid(format!("'data-file' is required for this image (it names '{name}')")));
        }
        (Some(_), false) => {
            return Err(Error::invalid("'data-file' can only be set for images with an external data file"));
        }
    };
    let l1 = read_l1(&file, &header)?;
    let words = usize::try_from((SLICE_BYTES as u64).min(header.cluster_size()) / 8).unwrap_or(1);
    let covered = words as u64 * 8 / header.l2_entry_size() * header.cluster_size();
    let budget = request.size("l2-cache-size").unwrap_or(L2_CACHE);
    let rules = Rules {
        cluster_bits: header.cluster_bits,
        version: header.version,
        extended: header.extended_l2,
        external_data: header.external_data,
    };
    Ok(Box::new(Qcow2 {
        slices: Slices::new(header.size.div_ceil(covered), words, budget),
        inflated: Inflated::new(1 << header.cluster_bits),
        header,
        rules,
        file,
        data,
        backing,
        l1,
    }))
}

fn cannot_write(header: &Header) -> Error {
    Error::unsupported(if header.corrupt {
        "qcow2: Image is corrupt; cannot be opened read/write"
    } else {
        "writing qcow2 is not supported by this version; open it with read-only"
    })
}

/// At most 32 MiB, which the header's check has made sure of.
fn read_l1(file: &BlockNode, header: &Header) -> Result<Box<[L1Entry]>> {
    let mut bytes = vec![0; header.l1_entries as usize * 8];
    file.read_or_zero(&mut bytes, header.l1_offset, Wait::Allowed).map_err(|e| Error::io("read the L1 table", e))?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|word| L1Entry(u64::from_be_bytes(*word))).collect())
}

/// A run of units of one kind, from the first unit asked for.
struct Run {
    kind: Kind,
    /// The entry of the first cluster.
    entry: L2Entry,
    units: u64,
}

impl Qcow2 {
    /// Bytes in the smallest unit that has a kind of its own: a cluster, or a subcluster.
    fn unit_bits(&self) -> u32 {
        self.header.cluster_bits - if self.header.extended_l2 { SUBCLUSTERS.ilog2() } else { 0 }
    }

    /// The run of units from `first` on (numbered over the whole disk), at most `most`, all within the slice of `first`.
    fn run(&self, word: &dyn Fn(usize) -> u64, first: u64, most: u64) -> Run {
        let per_cluster = 1u64 << (self.header.cluster_bits - self.unit_bits());
        let words_per_entry = self.header.l2_entry_size() / 8;
        let in_slice = self.slice_words() / words_per_entry;
        let unit = |unit: u64| {
            let index = unit / per_cluster % in_slice * words_per_entry;
            let at = |index: u64| word(usize::try_from(index).unwrap_or(usize::MAX));
            let bitmap = if self.header.extended_l2 { at(index + 1) } else { 0 };
            let entry = L2Entry { word: at(index), bitmap };
            (entry, entry.kind(unit % per_cluster, self.rules))
        };
        let (entry, kind) = unit(first);
        let slice_end = (first / (per_cluster * in_slice) + 1) * per_cluster * in_slice;
        let end = slice_end.min(first.saturating_add(most));
        let start_cluster = first / per_cluster;
        let mut next = first + 1;
        while next < end {
            let continues = match (kind, unit(next).1) {
                (Kind::Stored(start), Kind::Stored(here)) => {
                    start.checked_add((next / per_cluster - start_cluster) << self.header.cluster_bits) == Some(here)
                }
                // A compressed cluster is inflated by itself.
                (Kind::Compressed, Kind::Compressed) => next / per_cluster == start_cluster,
                (Kind::Zero, Kind::Zero) | (Kind::Unallocated, Kind::Unallocated) => true,
                _ => false,
            };
            if !continues {
                break;
            }
            next += 1;
        }
        Run { kind, entry, units: next - first }
    }

    fn slice_words(&self) -> u64 {
        (SLICE_BYTES as u64).min(self.header.cluster_size()) / 8
    }

    /// The run at `offset`, from memory or from the file.
    fn look_up(&self, offset: u64, len: u64, wait: Wait) -> io::Result<Run> {
        let unit_bits = self.unit_bits();
        let first = offset >> unit_bits;
        let most = ((offset + len - 1) >> unit_bits) - first + 1;
        let cluster = offset >> self.header.cluster_bits;
        let entries = self.header.l2_entries();
        let (l1_index, l2_index) = (cluster / entries, cluster % entries);
        let table = usize::try_from(l1_index).ok().and_then(|index| self.l1.get(index)).ok_or(Errno::IO)?.offset();
        if table == 0 {
            let units_left = (l1_index + 1) * entries * (1 << (self.header.cluster_bits - unit_bits)) - first;
            let entry = L2Entry { word: 0, bitmap: 0 };
            return Ok(Run { kind: Kind::Unallocated, entry, units: most.min(units_left) });
        }
        if !table.is_multiple_of(self.header.cluster_size()) {
            return Err(Errno::IO.into());
        }
        let slice_words = self.slice_words();
        let entries_in_slice = slice_words * 8 / self.header.l2_entry_size();
        let number = cluster / entries_in_slice;
        if let Some(run) = self.slices.with(number, |word| self.run(word, first, most)) {
            return Ok(run);
        }
        let mut bytes = [0; SLICE_BYTES];
        let bytes = &mut bytes[..usize::try_from(slice_words * 8).unwrap_or(0)];
        let slice_offset = table + l2_index / entries_in_slice * slice_words * 8;
        self.file.read_or_zero(bytes, slice_offset, wait)?;
        let content: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word)).collect();
        self.slices.fill(number, &content);
        Ok(self.run(&|index| content.get(index).copied().unwrap_or(0), first, most))
    }
}

impl Driver for Qcow2 {
    fn len(&self) -> u64 {
        self.header.size
    }

    fn map(&self, offset: u64, len: u64, ask: Ask) -> io::Result<Mapping<'_>> {
        let Run { kind, units, .. } = self.look_up(offset, len, ask.wait)?;
        let unit_bits = self.unit_bits();
        let end = ((offset >> unit_bits) + units) << unit_bits;
        let len = len.min(end - offset);
        let target = match kind {
            Kind::Unallocated => match &self.backing {
                Some(node) => Target::Child { node, offset },
                None => Target::Absent,
            },
            Kind::Zero => Target::Zero,
            Kind::Stored(cluster) => {
                let inside = offset & (self.header.cluster_size() - 1);
                Target::Data { node: &self.data, offset: cluster + inside }
            }
            Kind::Compressed => Target::Computed,
            Kind::Invalid => return Err(Errno::IO.into()),
        };
        Ok(Mapping::fixed(target, len))
    }

    fn read_computed(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let run = self.look_up(offset, buf.len() as u64, Wait::Allowed)?;
        if run.kind != Kind::Compressed {
            return Err(Errno::IO.into());
        }
        let (at, len) = run.entry.compressed_range(self.header.cluster_bits);
        let cluster_size = 1usize << self.header.cluster_bits;
        let cluster = self.inflated.cluster(at, || {
            // A compressed cluster is never longer than twice a cluster: the width of its length field sees to that.
            let mut stored = vec![0; usize::try_from(len).map_err(|_| Errno::IO)?];
            self.file.read_or_zero(&mut stored, at, Wait::Allowed)?;
            inflate::inflate(self.header.compression, &stored, cluster_size)
        })?;
        let inside = usize::try_from(offset).unwrap_or(usize::MAX) & (cluster_size - 1);
        buf.copy_from_slice(cluster.get(inside..inside + buf.len()).ok_or(Errno::IO)?);
        Ok(())
    }

    fn prepare_write(&self, _: u64, _: u64) -> io::Result<Prepared<'_>> {
        Err(Errno::ROFS.into())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> io::Result<()> {
        Err(Errno::ROFS.into())
    }

    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Err(Errno::ROFS.into())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn reopen(&self, writable: bool) -> Result<()> {
        if writable { Err(cannot_write(&self.header)) } else { Ok(()) }
    }

    fn info(&self) -> Info {
        let header = &self.header;
        let compression = match header.compression {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        };
        let text = |text: &str| InfoValue::Str(text.to_owned());
        let mut specifics = vec![("compat", text(if header.version == 2 { "0.10" } else { "1.1" }))];
        specifics.push(("compression-type", text(compression)));
        if header.version == 3 {
            specifics.push(("lazy-refcounts", InfoValue::Bool(header.lazy_refcounts)));
            specifics.push(("corrupt", InfoValue::Bool(header.corrupt)));
            specifics.push(("extended-l2", InfoValue::Bool(header.extended_l2)));
        }
        specifics.push(("refcount-bits", InfoValue::Int(header.refcount_bits.into())));
        if let Some(name) = &header.data_file_name {
            specifics.push(("data-file", text(name)));
            specifics.push(("data-file-raw", InfoValue::Bool(header.data_file_raw)));
        }
        Info {
            dirty: header.dirty,
            allocated_size: self.file.info().allocated_size,
            cluster_size: Some(header.cluster_size()),
            backing_name: header.backing_name.clone(),
            backing_format: header.backing_format.clone(),
            data_file_name: header.data_file_name.clone(),
            specifics,
        }
    }
}
