// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Image locks as QEMU's file driver takes them, so that Doorless and a running QEMU exclude each other on one image.
//!
//! Two bytes of the file stand for each permission: a shared lock on `100 + i` says that the holder uses it, one on `200 + i`
//! that it bears nobody else using it. Whoever takes one looks whether others hold its counterpart. The locks belong to the open
//! file, so they say nothing between two users of one open file.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, PoisonError};

use sys::lock;

use crate::claims::Demand;
use crate::{Error, ErrorKind, Result};

/// Permissions by number, with QEMU's names; 2 is `write unchanged`, which nothing here asks for.
const PERMISSIONS: [(u64, &str); 3] = [(0, "consistent read"), (WRITE, "write"), (RESIZE, "resize")];
const WRITE: u64 = 1;
const RESIZE: u64 = 3;
/// First byte for what the holder uses.
const USED: u64 = 100;
/// First byte for what the holder bears from nobody else.
const UNSHARED: u64 = 200;

/// The locks that one node holds.
#[derive(Default)]
pub struct ImageLocks(Mutex<Vec<u64>>);

impl ImageLocks {
    /// Takes what `demand` needs and is not held, then gives back what it does not need. On an error nothing has changed.
    ///
    /// # Errors
    /// `InUse` in QEMU's words if another open file excludes it.
    pub fn change(&self, fd: BorrowedFd<'_>, demand: Demand) -> Result<()> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = bytes(demand);
        let new: Vec<u64> = wanted.iter().copied().filter(|byte| !held.contains(byte)).collect();
        let taken = new.iter().try_for_each(|&byte| take(fd, byte));
        // A file system without such locks cannot exclude anybody; QEMU goes on without, too.
        match taken {
            Err(Refused::Unsupported) => return Ok(()),
            Err(Refused::Excluded(text)) => {
                for byte in new {
                    let _ = lock::unlock(fd, byte);
                }
                return Err(Error::new(ErrorKind::InUse, text));
            }
            Ok(()) => {}
        }
        for byte in held.iter().filter(|byte| !wanted.contains(byte)) {
            let _ = lock::unlock(fd, *byte);
        }
        *held = wanted;
        Ok(())
    }
}

/// The bytes that stand for a demand.
fn bytes(demand: Demand) -> Vec<u64> {
    let used = [(0, demand.reads), (WRITE, demand.writes), (RESIZE, demand.resizes)];
    let unshared = [(WRITE, demand.excludes_writers), (RESIZE, demand.excludes_writers)];
    let chosen = |first: u64, bits: &[(u64, bool)]| -> Vec<u64> {
        bits.iter().filter(|(_, wanted)| *wanted).map(|(bit, _)| first + bit).collect()
    };
    [chosen(USED, &used), chosen(UNSHARED, &unshared)].concat()
}

enum Refused {
    Unsupported,
    Excluded(String),
}

fn take(fd: BorrowedFd<'_>, byte: u64) -> std::result::Result<(), Refused> {
    let (bit, counterpart, shared) = if byte >= UNSHARED {
        (byte - UNSHARED, byte - UNSHARED + USED, "shared ")
    } else {
        (byte - USED, byte - USED + UNSHARED, "")
    };
    let name = PERMISSIONS.iter().find(|(number, _)| *number == bit).map_or("unknown", |(_, name)| name);
    let excluded = || Refused::Excluded(format!("Failed to get {shared}\"{name}\" lock"));
    let failed = |e: io::Error| match e.kind() {
        io::ErrorKind::WouldBlock => excluded(),
        _ => Refused::Unsupported,
    };
    lock::share(fd, byte).map_err(failed)?;
    if lock::is_held_by_another(fd, counterpart).map_err(failed)? { Err(excluded()) } else { Ok(()) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    const READER: Demand = Demand { reads: true, writes: false, resizes: false, excludes_writers: false };
    const WRITER: Demand = Demand { reads: true, writes: true, resizes: true, excludes_writers: true };

    #[test]
    fn a_writer_that_excludes_others_holds_qemus_five_bytes() {
        assert_eq!(bytes(WRITER), [100, 101, 103, 201, 203]);
    }

    #[test]
    fn writers_over_two_open_files_exclude_each_other_until_one_leaves() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        File::create(&path).unwrap();
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        let (one, two) = (open(), open());
        let (first, second) = (ImageLocks::default(), ImageLocks::default());
        first.change(one.as_fd(), WRITER).unwrap();
        second.change(two.as_fd(), READER).unwrap();
        let refused = second.change(two.as_fd(), WRITER).unwrap_err().to_string();
        assert_eq!(refused, "Failed to get \"write\" lock");
        first.change(one.as_fd(), Demand::default()).unwrap();
        second.change(two.as_fd(), WRITER).unwrap();
    }
}
