// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An opened descriptor of a set.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Weak;

use crate::sets::Shared;

/// A duplicate of a set's descriptor: what [`FdSets::open`](crate::FdSets::open) gives.
///
/// It is close-on-exec and shares the open file description, hence the file offset and the status flags, with the set's
/// descriptor and with whoever passed that: use positioned I/O only, and leave the flags alone. It outlives the set's
/// descriptor and even the [`FdSets`](crate::FdSets). While it lives, the set's id stays taken and the set listed; that
/// is why it does not turn into an `OwnedFd`. It may be dropped on any thread, and is closed before the set lets it go:
/// a set that is no longer listed has nothing open.
#[derive(Debug)]
pub struct Dup {
    // Closed first: fields drop in this order.
    fd: OwnedFd,
    ticket: Ticket,
    opened_from: i32,
}

impl Dup {
    pub(crate) fn new(fd: OwnedFd, ticket: Ticket, opened_from: i32) -> Dup {
        Dup { fd, ticket, opened_from }
    }

    /// The set that it was opened from.
    pub fn set_id(&self) -> i64 {
        self.ticket.set
    }

    /// The number that the set's descriptor had then.
    pub fn opened_from(&self) -> i32 {
        self.opened_from
    }
}

impl AsFd for Dup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Dup {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// A dup's place in its set's list, given up on drop.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub(crate) sets: Weak<Shared>,
    pub(crate) set: i64,
    /// Which of the set's dups.
    pub(crate) serial: u64,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(sets) = self.sets.upgrade() {
            sets.give_up(self.set, self.serial);
        }
    }
}
