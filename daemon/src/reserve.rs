// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is kept back: numbers, so that a monitor's client can be let in when everything else has used up the process's
//! descriptors; and memory files, because a confined process cannot make any.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::MemfdFlags;
use rustix::io::fcntl_dupfd_cloexec;

/// Spare descriptors, one for each client that may have to be let in at the limit.
#[derive(Debug)]
pub struct Reserve {
    spare: Vec<OwnedFd>,
    wanted: usize,
}

/// Descriptors that fd sets leave to everything else (dups, exports and their clients, monitors) unless the user sets a quota:
/// this many, or a quarter of what the process may have if that is less.
const LEFT_BY_SETS: u64 = 64;

/// Most memory files kept for vhost-user exports. Each is used up by one export: a front end that has once mapped it may do so
/// for ever.
const INFLIGHT: u64 = 64;

/// Makes memory files for what guests have under way, fewer in a process that may have only `limit` descriptors.
pub fn inflight(limit: u64) -> Vec<OwnedFd> {
    let make = |_| rustix::fs::memfd_create("doorless-inflight", MemfdFlags::CLOEXEC).ok();
    (0..INFLIGHT.min(limit / 64)).map_while(make).collect()
}

/// How many descriptors fd sets may hold in a process that may have `limit`.
pub fn sets_share(limit: u64) -> usize {
    let share = limit.saturating_sub(LEFT_BY_SETS.min(limit / 4));
    usize::try_from(share).unwrap_or(usize::MAX)
}

impl Reserve {
    /// Keeps `wanted` numbers back; `source` is duplicated for it.
    pub fn new(source: impl AsFd, wanted: usize) -> Reserve {
        let mut reserve = Reserve { spare: Vec::new(), wanted };
        reserve.refill(source);
        reserve
    }

    /// Gives a number up for something that matters more; `false` if none is left.
    pub fn give(&mut self) -> bool {
        self.spare.pop().is_some()
    }

    /// Takes back what was given, as far as there are numbers.
    pub fn refill(&mut self, source: impl AsFd) {
        while self.spare.len() < self.wanted {
            match fcntl_dupfd_cloexec(source.as_fd(), 0) {
                Ok(fd) => self.spare.push(fd),
                Err(_) => return,
            }
        }
    }

    /// The numbers.
    pub fn numbers(&self) -> impl Iterator<Item = i32> {
        self.spare.iter().map(AsRawFd::as_raw_fd)
    }
}

#[cfg(test)]
mod tests {
    use super::sets_share;

    #[test]
    fn fd_sets_leave_room_for_everything_else() {
        assert_eq!(sets_share(20_000), 19_936);
        assert_eq!(sets_share(64), 48);
        assert_eq!(sets_share(u64::MAX), usize::try_from(u64::MAX - 64).unwrap_or(usize::MAX));
    }
}
