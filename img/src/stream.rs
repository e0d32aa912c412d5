// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `convert` into an image that can only be written from front to end. Threads take pieces in turn, read and pack them all at
//! once, and append them in the order in which they were taken.

use std::sync::{Condvar, Mutex, PoisonError};

use block::Stream;

use crate::convert::is_zero;
use crate::pace::Pace;
use crate::progress::Progress;
use crate::source::{Kind, Source, failed};
use crate::tool::{Error, Result};

/// Grains that a thread takes at a time.
const GRAINS: u64 = 16;

/// Copies `source` into `stream` and ends it.
///
/// # Errors
/// The source cannot be read, or the file not written.
pub fn fill(source: &Source, stream: Stream, threads: usize, pace: &Pace, progress: &Progress) -> Result<()> {
    let copy = Copy {
        source,
        len: source.len(),
        next: Mutex::new(0),
        appended: Mutex::new(Appended { stream, to: 0, failed: false }),
        turn: Condvar::new(),
        pace,
        progress,
    };
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (1..threads.max(1)).map(|_| scope.spawn(|| copy.work())).collect();
        let mut results = vec![copy.work()];
        let broken = || Err(Error::Text("a thread broke down".into()));
        results.extend(workers.into_iter().map(|worker| worker.join().unwrap_or_else(|_| broken())));
        results
    });
    results.into_iter().collect::<Result<Vec<()>>>()?;
    let appended = copy.appended.into_inner().unwrap_or_else(PoisonError::into_inner);
    appended.stream.finish()?;
    progress.end();
    Ok(())
}

struct Copy<'a> {
    source: &'a Source,
    len: u64,
    /// Where the next piece begins.
    next: Mutex<u64>,
    appended: Mutex<Appended>,
    /// Somebody's piece was appended, or failed.
    turn: Condvar,
    pace: &'a Pace,
    progress: &'a Progress,
}

struct Appended {
    stream: Stream,
    /// Up to here the source is in the stream.
    to: u64,
    failed: bool,
}

impl Copy<'_> {
    fn work(&self) -> Result<()> {
        let worked = (|| {
            while let Some((at, len)) = self.take() {
                let packed = self.pack(at, len)?;
                if !self.append(at, len, &packed)? {
                    break;
                }
            }
            Ok(())
        })();
        if worked.is_err() {
            self.appended.lock().unwrap_or_else(PoisonError::into_inner).failed = true;
            self.turn.notify_all();
        }
        worked
    }

    fn take(&self) -> Option<(u64, u64)> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let at = *next;
        let len = (self.len - at).min(GRAINS * Stream::GRAIN);
        *next += len;
        (len > 0).then_some((at, len))
    }

    /// The grains of a piece that hold something, each with its place.
    fn pack(&self, at: u64, len: u64) -> Result<Vec<(u64, Vec<u8>)>> {
        let mut packed = Vec::new();
        let mut grain = Vec::new();
        for start in (at..at + len).step_by(usize::try_from(Stream::GRAIN).unwrap_or(usize::MAX)) {
            let len = Stream::GRAIN.min(at + len - start);
            if self.source.status(start, len)? == (Kind::Zero, len) {
                continue;
            }
            self.pace.wait(len);
            grain.resize(usize::try_from(len).unwrap_or(0), 0);
            self.source.read(&mut grain, start)?;
            if !is_zero(&grain) {
                packed.push((start, Stream::pack(&grain).map_err(|e| failed("compressing", start, &e))?));
            }
        }
        Ok(packed)
    }

    /// Appends a piece when everything in front of it is; whether there is still a use in going on.
    fn append(&self, at: u64, len: u64, packed: &[(u64, Vec<u8>)]) -> Result<bool> {
        let mut appended = self.appended.lock().unwrap_or_else(PoisonError::into_inner);
        while appended.to != at && !appended.failed {
            appended = self.turn.wait(appended).unwrap_or_else(PoisonError::into_inner);
        }
        if appended.failed {
            return Ok(false);
        }
        for (offset, grain) in packed {
            appended.stream.put(*offset, grain).map_err(|e| failed("writing", *offset, &e))?;
        }
        appended.to = at + len;
        self.turn.notify_all();
        self.progress.reached(appended.to);
        Ok(true)
    }
}
