// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compressed clusters: what is stored becomes a cluster, or the first bytes of one, or an error.

use std::io::{self, Read};
use std::sync::{Mutex, PoisonError};

use flate2::{Decompress, FlushDecompress, Status};
use rustix::io::Errno;

use super::header::Compression;
use crate::{BlockNode, Wait};

/// Most inflaters that are kept for the next cluster: 50 KiB each, and what a cluster has stored.
const SPARE: usize = 8;
/// An inflater with more room than this for what is stored is not kept.
const MOST_STORED: usize = 256 << 10;

/// What it takes to inflate a cluster, used again and again.
pub struct Inflater {
    /// Room for what is stored.
    stored: Vec<u8>,
    zlib: Decompress,
}

/// Inflaters, as many as are used at once.
#[derive(Default)]
pub struct Inflaters(Mutex<Vec<Inflater>>);

impl Inflaters {
    /// Lends one.
    pub fn lend<T>(&self, work: impl FnOnce(&mut Inflater) -> T) -> T {
        let spare = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut inflater = spare.unwrap_or_default();
        let done = work(&mut inflater);
        let mut spare = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < SPARE && inflater.stored.capacity() <= MOST_STORED {
            spare.push(inflater);
        }
        done
    }
}

impl Default for Inflater {
    fn default() -> Inflater {
        Inflater { stored: Vec::new(), zlib: Decompress::new(false) }
    }
}

impl Inflater {
    /// Fills `cluster` with the first bytes of what `len` bytes at `offset` of `file` inflate to; what lies past the end of the
    /// file counts as zeroes.
    ///
    /// # Errors
    /// The file's; `EIO` if the data up to there is broken or too short. What follows is ignored, be it padding or more of the
    /// cluster.
    pub fn inflate(
        &mut self,
        file: &BlockNode,
        offset: u64,
        len: u64,
        compression: Compression,
        cluster: &mut [u8],
    ) -> io::Result<()> {
        self.stored.resize(usize::try_from(len).map_err(|_| Errno::IO)?, 0);
        file.read_or_zero(&mut self.stored, offset, Wait::Allowed)?;
        let filled = match compression {
            Compression::Zlib => {
                self.zlib.reset(false);
                let status = self.zlib.decompress(&self.stored, cluster, FlushDecompress::Finish);
                matches!(status, Ok(Status::StreamEnd | Status::BufError | Status::Ok))
                    && self.zlib.total_out() == cluster.len() as u64
            }
            Compression::Zstd => match ruzstd::decoding::StreamingDecoder::new(&mut self.stored.as_slice()) {
                Ok(mut frames) => frames.read_exact(cluster).is_ok(),
                Err(_) => false,
            },
        };
        if filled { Ok(()) } else { Err(Errno::IO.into()) }
    }
}
