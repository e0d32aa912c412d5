// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How other threads get the control thread's attention.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

/// A descriptor that is readable once somebody has called [`Wake::up`].
#[derive(Debug)]
pub struct Wake(OwnedFd);

impl Wake {
    /// A sleeping one.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn new() -> io::Result<Wake> {
        Ok(Wake(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Makes it readable.
    pub fn up(&self) {
        // Cannot fail: the counter would have to reach 2^64.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Makes it unreadable again; call it before looking at what changed.
    pub fn clear(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
