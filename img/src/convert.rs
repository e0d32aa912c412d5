// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `convert`: the content of a chain into one new image, or over one that is there.
//!
//! Threads take pieces in turn; each reads its piece, looks for zeroes, compresses, and writes, so that all of this overlaps. What
//! the source says is zero is never read, and what is zero is never written to a new image.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use block::{BlockNode, CreateRequest, ExtentKind, Options, Wait, ZeroFlags};

use crate::disk::{Disk, Layer, Named, Usage};
use crate::progress::Progress;
use crate::stream;
use crate::tool::{Error, Result, confine};

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
    /// The chain that is read.
    pub source: Vec<Layer>,
    /// Where it goes.
    pub target: Target,
    /// Store every cluster compressed.
    pub compress: bool,
    /// Runs of zeroes of at least so many bytes are not written; 0 writes them all.
    pub sparse: u64,
    /// Threads.
    pub threads: usize,
    /// Show how far it is.
    pub progress: bool,
    /// Others may write the source at the same time.
    pub force_share: bool,
    /// Go on without a layer of confinement that cannot be had.
    pub best_effort: bool,
}

/// Converts. On success the target is on disk.
///
/// # Errors
/// An image cannot be opened, made, read or written.
pub fn run(request: Request) -> Result<()> {
    let Request { source, target, compress, sparse, threads, progress, force_share, best_effort } = request;
    confine(best_effort)?;
    let source = Disk::open(source, Usage { writable: false, force_share })?;
    let len = source.node.len();
    let usage = Usage { writable: true, force_share: false };
    let (target, reads_zero) = match target {
        Target::New { file, format, options } => {
            let again = Named { file: file.file.try_clone().map_err(output)?, name: file.name.clone() };
            let made = Disk::file(file, usage)?;
            let request = CreateRequest {
                file: made.node.clone(),
                data_file: None,
                extents: Vec::new(),
                parent_cid: None,
                size: len,
                options,
            };
            if let Some(stream) = block::stream(&format, &request)? {
                stream::fill(&source.node, stream, threads, &Progress::new(len, progress))?;
                return Ok(made.close()?);
            }
            block::create(&format, &request)?;
            made.close()?;
            (Disk::open(vec![Layer { image: again, format, data_file: None, extents: Vec::new() }], usage)?, true)
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
        source: &source.node,
        target: &target.node,
        len,
        piece: cluster.map_or(PIECE, |cluster| cluster.max(64 << 10)),
        cluster,
        sparse,
        reads_zero,
        cursor: Mutex::default(),
        done: AtomicU64::new(0),
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
    target.close()?;
    Ok(())
}

fn output(e: std::io::Error) -> Error {
    Error::Text(format!("could not use the output file: {e}"))
}

pub(crate) fn failed(doing: &str, at: u64, e: &std::io::Error) -> Error {
    Error::Text(format!("error while {doing} at byte {at}: {e}"))
}

/// Where the next piece begins, and until where the run goes on that it lies in.
#[derive(Default)]
struct Cursor {
    at: u64,
    run_end: u64,
    is_zero: bool,
    failed: bool,
}

struct Copy<'a> {
    source: &'a BlockNode,
    target: &'a BlockNode,
    len: u64,
    piece: u64,
    cluster: Option<u64>,
    sparse: u64,
    reads_zero: bool,
    cursor: Mutex<Cursor>,
    done: AtomicU64,
    progress: Progress,
}

impl Copy<'_> {
    fn work(&self) -> Result<()> {
        let mut buffer = Vec::new();
        let worked = (|| {
            while let Some((at, len, is_zero)) = self.next()? {
                if is_zero {
                    self.zero(at, len)?;
                } else {
                    self.copy(at, len, &mut buffer)?;
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

    /// The next piece: offset, length, and whether it reads as zeroes. Pieces end at multiples of the piece size.
    fn next(&self) -> Result<Option<(u64, u64, bool)>> {
        let mut cursor = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
        if cursor.failed || cursor.at >= self.len {
            return Ok(None);
        }
        let at = cursor.at;
        if at >= cursor.run_end {
            let mut end = at;
            let mut kind = None;
            while end < self.len && end - at < self.piece {
                let extent =
                    self.source.status(end, self.len - end).map_err(|e| failed("reading block status", end, &e))?;
                if *kind.get_or_insert(extent.kind) != extent.kind {
                    break;
                }
                end += extent.len;
            }
            cursor.is_zero = kind == Some(ExtentKind::Zero);
            cursor.run_end = match (self.cluster, cursor.is_zero) {
                // Compressed clusters are written whole: a cluster that holds data in part is data.
                (Some(cluster), true) if end < self.len && end / cluster * cluster > at => end / cluster * cluster,
                (Some(cluster), _) if end < self.len => {
                    cursor.is_zero = false;
                    end.next_multiple_of(cluster).min(self.len)
                }
                _ => end,
            };
        }
        let end = if cursor.is_zero { cursor.run_end } else { cursor.run_end.min((at / self.piece + 1) * self.piece) };
        cursor.at = end;
        Ok(Some((at, end - at, cursor.is_zero)))
    }

    fn zero(&self, at: u64, len: u64) -> Result<()> {
        if self.reads_zero {
            return Ok(());
        }
        let flags = ZeroFlags { may_unmap: true, fast_only: false };
        self.target.write_zeroes(at, len, flags, false).map_err(|e| failed("writing", at, &e))
    }

    fn copy(&self, at: u64, len: u64, buffer: &mut Vec<u8>) -> Result<()> {
        buffer.resize(usize::try_from(len).unwrap_or(0), 0);
        self.source.read(buffer, at, Wait::Allowed).map_err(|e| failed("reading", at, &e))?;
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
