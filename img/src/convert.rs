// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `convert`, and `dd`: the content of chains into one new image, or over one that is there.
//!
//! Threads take pieces in turn; each reads its piece, looks for zeroes, compresses, and writes, so that all of this overlaps. What
//! the source says is zero is never read, and what is zero is never written to a new image.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use block::{BlockNode, CreateRequest, NewExtent, OptionValue, Options, ZeroFlags};

use confine::Requirement;

use crate::disk::{Disk, Layer, Named, Usage};
use crate::pace::Pace;
use crate::progress::Progress;
use crate::source::{Kind, Manner, Source, failed};
use crate::tool::{Error, Result, confine, printable, warn};
use crate::{bitmap, stream};

/// Bytes that a thread takes at a time, unless a compressed cluster is larger.
const PIECE: u64 = 2 << 20;

/// Where the content goes.
pub enum Target {
    /// A file in which an image of this format is made.
    New {
        /// The file, writable; what is in it is lost.
        file: Named,
        /// The format.
        format: String,
        /// Its options.
        options: Options,
        /// Where its data goes, if it is to have an external data file.
        data_file: Option<Named>,
        /// The files of extents that the image will call so, as many as an image of the source's size has.
        extents: Vec<(String, Named)>,
        /// What it is made over.
        backing: Vec<Layer>,
        /// The content id of its backing file.
        parent_cid: Option<u32>,
        /// Whether the file reads as zeroes where nothing is written: a device does not.
        is_zero: bool,
    },
    /// An image that is there, and large enough.
    Existing {
        /// The chain; its top is writable.
        layers: Vec<Layer>,
        /// It reads as zeroes everywhere.
        is_zero: bool,
    },
}

/// What is asked.
pub struct Request {
    /// The chains that are read, one behind the other.
    pub sources: Vec<Vec<Layer>>,
    /// How they are read.
    pub manner: Manner,
    /// The part of them that is copied: bytes that are left out, and how many follow at most.
    pub part: Option<(u64, u64)>,
    /// Where it goes.
    pub target: Target,
    /// Store every cluster compressed.
    pub compress: bool,
    /// Runs of zeroes of at least so many bytes are not written; 0 writes them all.
    pub sparse: u64,
    /// Persistent bitmaps of the source are copied; `Some(true)` leaves out those whose content is lost.
    pub bitmaps: Option<bool>,
    /// Threads.
    pub threads: usize,
    /// Bring the target to disk (all but the cache mode `unsafe`).
    pub durable: bool,
    /// Most bytes a second; 0 is any number.
    pub rate: u64,
    /// Show how far it is.
    pub progress: bool,
    /// Which layers of confinement must be had.
    pub confinement: Requirement,
}

/// Converts. On success the target is on disk.
///
/// # Errors
/// An image cannot be opened, made, read or written.
pub fn run(request: Request) -> Result<()> {
    let Request { sources, manner, part, target, compress, sparse, bitmaps, threads, rate, .. } = request;
    let (pace, durable, progress) = (Pace::new(rate), request.durable, request.progress);
    confine(request.confinement)?;
    let mut source = Source::open(sources, manner)?;
    if let Some((skip, len)) = part {
        source = source.part(skip, len);
    }
    let len = source.len();
    // A new image is nobody's before it is whole: it goes to disk once, at the end, in no order.
    let is_new = matches!(target, Target::New { .. });
    let usage = Usage { writable: true, force_share: false, unflushed: is_new || !durable };
    let mut files = Vec::new();
    let (target, reads_zero) = match target {
        Target::New { file, format, options, data_file, extents, backing, parent_cid, is_zero } => {
            let again = |named: &Named| {
                let file = named.file.try_clone().map_err(output)?;
                Ok::<_, Error>(Named { file, name: named.name.clone() })
            };
            let image = again(&file)?;
            let data_again = data_file.as_ref().map(again).transpose()?;
            let extents_again = extents.iter().map(|(_, file)| again(file)).collect::<Result<Vec<_>>>()?;
            for named in std::iter::once(&image).chain(&data_again).chain(&extents_again) {
                files.push(again(named)?.file);
            }
            let secret = options.values().find_map(|value| match value {
                OptionValue::Secret(secret) => Some(secret.clone()),
                _ => None,
            });
            let made = Disk::file(file, usage)?;
            let data = data_file.map(|data| Disk::file(data, usage)).transpose()?;
            let extents = extents.into_iter().map(|(name, file)| Ok((name, Disk::file(file, usage)?)));
            let extents = extents.collect::<Result<Vec<_>>>()?;
            let request = CreateRequest {
                file: made.node.clone(),
                data_file: data.as_ref().map(|data| data.node.clone()),
                extents: extents
                    .iter()
                    .map(|(name, disk)| NewExtent { name: name.clone(), node: disk.node.clone() })
                    .collect(),
                parent_cid,
                size: len.checked_next_multiple_of(512).unwrap_or(len),
                options,
            };
            if let Some(stream) = block::stream(&format, &request)? {
                stream::fill(&source, stream, threads, &pace, &Progress::new(len, progress))?;
                made.close()?;
                return if durable { to_disk(&files) } else { Ok(()) };
            }
            block::create(&format, &request)?;
            drop(request);
            made.close()?;
            data.into_iter().chain(extents.into_iter().map(|(_, disk)| disk)).try_for_each(Disk::close)?;
            // What was never written to an encrypted volume reads as noise.
            let is_zero = is_zero && backing.is_empty() && format != "luks";
            let top = Layer { image, format, data_file: data_again, extents: extents_again, secret };
            (Disk::open(std::iter::once(top).chain(backing).collect(), usage)?, is_zero)
        }
        Target::Existing { layers, is_zero } => (Disk::open(layers, usage)?, is_zero),
    };
    if target.node.len() < len {
        return Err(Error::Text(format!(
            "Output file is smaller than input file: {} bytes, {len} are needed",
            target.node.len()
        )));
    }
    let cluster = match (compress, target.node.info().cluster_size) {
        (false, _) => None,
        (true, Some(size)) => Some(size),
        (true, None) => return Err(Error::Text("Compression not supported for this file format".into())),
    };
    let copy = Copy {
        source: &source,
        target: &target.node,
        len,
        piece: cluster.map_or(PIECE, |cluster| cluster.max(64 << 10)),
        cluster,
        sparse,
        reads_zero,
        cursor: Mutex::default(),
        done: AtomicU64::new(0),
        pace,
        progress: Progress::new(len, progress),
    };
    let failures = std::thread::scope(|scope| {
        let workers: Vec<_> = (1..threads.max(1)).map(|_| scope.spawn(|| copy.work())).collect();
        let mut failures = vec![copy.work()];
        failures.extend(
            workers
                .into_iter()
                .map(|worker| worker.join().unwrap_or_else(|_| Err(Error::Text("a thread broke down".into())))),
        );
        failures
    });
    failures.into_iter().collect::<Result<Vec<()>>>()?;
    // What lies past the source's end in an image that was there.
    if !copy.reads_zero && target.node.len() > len {
        let flags = ZeroFlags { may_unmap: true, fast_only: false };
        target.node.write_zeroes(len, target.node.len() - len, flags, false).map_err(|e| failed("writing", len, &e))?;
    }
    copy.progress.end();
    if let Some(skip_broken) = bitmaps {
        for disk in source.disks() {
            copy_bitmaps(&disk.node, &target.node, skip_broken)?;
        }
    }
    target.close()?;
    if durable { to_disk(&files) } else { Ok(()) }
}

/// Brings what was written to disk.
fn to_disk(files: &[File]) -> Result<()> {
    files.iter().try_for_each(|file| file.sync_data().map_err(output))
}

fn copy_bitmaps(source: &BlockNode, target: &BlockNode, skip_broken: bool) -> Result<()> {
    for bitmap in source.bitmaps().list().into_iter().filter(|bitmap| bitmap.is_persistent()) {
        let name = bitmap.name();
        if bitmap.is_inconsistent() {
            if skip_broken {
                warn(&format!("qemu-img: warning: Skipping inconsistent bitmap '{}'", printable(name)));
                continue;
            }
            return Err(Error::Text(format!(
                "Cannot copy inconsistent bitmap '{}'\nTry --skip-broken-bitmaps, or use 'qemu-img bitmap --remove'",
                printable(name)
            )));
        }
        let copied = bitmap::add(target, name, Some(bitmap.granularity()))
            .and_then(|()| bitmap::enable(target, name, bitmap.is_enabled()))
            .and_then(|()| bitmap::merge(target, name, source, name));
        copied.map_err(|why| Error::Text(format!("Failed to populate bitmap '{}': {why}", printable(name))))?;
    }
    Ok(())
}

fn output(e: std::io::Error) -> Error {
    Error::Text(format!("could not use the output file: {e}"))
}

/// Where the next piece begins, and until where the run goes on that it lies in.
#[derive(Default)]
struct Cursor {
    at: u64,
    run_end: u64,
    kind: Option<Kind>,
    failed: bool,
}

struct Copy<'a> {
    source: &'a Source,
    target: &'a BlockNode,
    len: u64,
    piece: u64,
    cluster: Option<u64>,
    sparse: u64,
    reads_zero: bool,
    cursor: Mutex<Cursor>,
    done: AtomicU64,
    pace: Pace,
    progress: Progress,
}

impl Copy<'_> {
    fn work(&self) -> Result<()> {
        let mut buffer = Vec::new();
        let worked = (|| {
            while let Some((at, len, kind)) = self.next()? {
                match kind {
                    Kind::Data => self.copy(at, len, &mut buffer)?,
                    Kind::Zero => self.zero(at, len)?,
                    Kind::Below => {}
                }
                self.progress.reached(self.done.fetch_add(len, Ordering::Relaxed) + len);
            }
            Ok(())
        })();
        if worked.is_err() {
            self.cursor.lock().unwrap_or_else(PoisonError::into_inner).failed = true;
        }
        worked
    }

    /// The next piece: offset, length, and what is there. Pieces end at multiples of the piece size.
    fn next(&self) -> Result<Option<(u64, u64, Kind)>> {
        let mut cursor = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
        if cursor.failed || cursor.at >= self.len {
            return Ok(None);
        }
        let at = cursor.at;
        if at >= cursor.run_end {
            let mut end = at;
            let mut kind = None;
            while end < self.len && end - at < self.piece {
                let (found, len) = self.source.status(end, self.len - end)?;
                if *kind.get_or_insert(found) != found {
                    break;
                }
                end += len;
            }
            cursor.kind = kind;
            cursor.run_end = match (self.cluster, kind) {
                // Compressed clusters are written whole: a cluster that holds data in part is data.
                (Some(cluster), Some(Kind::Zero | Kind::Below)) if end < self.len && end / cluster * cluster > at => {
                    end / cluster * cluster
                }
                (Some(cluster), _) if end < self.len => {
                    cursor.kind = Some(Kind::Data);
                    end.next_multiple_of(cluster).min(self.len)
                }
                _ => end,
            };
        }
        let kind = cursor.kind.unwrap_or(Kind::Data);
        let is_data = kind == Kind::Data;
        let end = if is_data { cursor.run_end.min((at / self.piece + 1) * self.piece) } else { cursor.run_end };
        cursor.at = end;
        Ok(Some((at, end - at, kind)))
    }

    fn zero(&self, at: u64, len: u64) -> Result<()> {
        if self.reads_zero {
            return Ok(());
        }
        let flags = ZeroFlags { may_unmap: true, fast_only: false };
        self.target.write_zeroes(at, len, flags, false).map_err(|e| failed("writing", at, &e))
    }

    fn copy(&self, at: u64, len: u64, buffer: &mut Vec<u8>) -> Result<()> {
        self.pace.wait(len);
        buffer.resize(usize::try_from(len).unwrap_or(0), 0);
        self.source.read(buffer, at)?;
        if let Some(cluster) = self.cluster {
            for (index, piece) in buffer.chunks(usize::try_from(cluster).unwrap_or(1)).enumerate() {
                let at = at + index as u64 * cluster;
                if is_zero(piece) {
                    self.zero(at, piece.len() as u64)?;
                } else {
                    self.target.write_compressed(piece, at).map_err(|e| failed("writing", at, &e))?;
                }
            }
            return Ok(());
        }
        if self.sparse == 0 {
            return self.target.write(buffer, at, false).map_err(|e| failed("writing", at, &e));
        }
        let grain = usize::try_from(self.sparse).unwrap_or(4096).max(512);
        let mut grains = buffer.chunks(grain).peekable();
        let mut start = 0;
        while let Some(first) = grains.next() {
            let is_hole = is_zero(first);
            let mut run = first.len();
            while let Some(next) = grains.next_if(|next| is_zero(next) == is_hole) {
                run += next.len();
            }
            let from = at + start as u64;
            if is_hole {
                self.zero(from, run as u64)?;
            } else {
                self.target.write(&buffer[start..start + run], from, false).map_err(|e| failed("writing", from, &e))?;
            }
            start += run;
        }
        Ok(())
    }
}

/// Whether there are only zeroes, looked at in words.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<64>();
    blocks.iter().all(|block| block.iter().fold(0, |bits, byte| bits | byte) == 0) && rest.iter().all(|&byte| byte == 0)
}
