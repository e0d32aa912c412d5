// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compressed clusters: what is stored becomes exactly one cluster or an error, and a few stay in memory.

use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};

use flate2::{Decompress, FlushDecompress, Status};
use rustix::io::Errno;

use super::header::Compression;

/// Bytes of inflated clusters that are kept; one cluster at least.
const KEPT: usize = 16 << 20;
/// Most clusters that are kept: they are looked for one by one.
const MOST: usize = 1024;

/// Inflated clusters, the latest first.
pub struct Inflated {
    cluster_size: usize,
    kept: Mutex<Vec<(u64, Arc<[u8]>)>>,
}

impl Inflated {
    pub fn new(cluster_size: usize) -> Inflated {
        Inflated { cluster_size, kept: Mutex::default() }
    }

    /// Forgets what is kept of the cluster whose data stands at `offset`.
    pub fn forget(&self, offset: u64) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).retain(|(key, _)| *key != offset);
    }

    /// The content of the cluster whose data stands at `offset`, made by `load` if it is not kept.
    pub fn cluster(&self, offset: u64, load: impl FnOnce() -> io::Result<Vec<u8>>) -> io::Result<Arc<[u8]>> {
        {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(at) = kept.iter().position(|(key, _)| *key == offset) {
                let found = kept.remove(at);
                kept.insert(0, found.clone());
                return Ok(found.1);
            }
        }
        let cluster: Arc<[u8]> = load()?.into();
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.insert(0, (offset, Arc::clone(&cluster)));
        kept.truncate((KEPT / self.cluster_size).clamp(1, MOST));
        Ok(cluster)
    }
}

/// Inflates `stored` to exactly `len` bytes.
///
/// # Errors
/// `EIO` if the data is broken or too short; what follows the cluster's end is padding and ignored.
pub fn inflate(compression: Compression, stored: &[u8], len: usize) -> io::Result<Vec<u8>> {
    let mut cluster = vec![0; len];
    let whole = match compression {
        Compression::Zlib => {
            let mut inflater = Decompress::new(false);
            let status = inflater.decompress(stored, &mut cluster, FlushDecompress::Finish);
            matches!(status, Ok(Status::StreamEnd | Status::BufError | Status::Ok))
                && inflater.total_out() == len as u64
        }
        Compression::Zstd => {
            let mut stored = stored;
            match ruzstd::decoding::StreamingDecoder::new(&mut stored) {
                Ok(mut frames) => frames.read_exact(&mut cluster).is_ok(),
                Err(_) => false,
            }
        }
    };
    if whole { Ok(cluster) } else { Err(Errno::IO.into()) }
}
