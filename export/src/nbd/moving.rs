// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Clients that move to another process: each stops at the boundary of a request, with nothing under way, and its socket goes on
//! elsewhere.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};

use super::reply::Style;

/// A client that has stopped, or is to go on.
#[derive(Debug)]
pub struct Moved {
    /// Its connected socket.
    pub socket: OwnedFd,
    /// The export that it has chosen.
    pub export: String,
    /// How its requests and replies look.
    pub style: Style,
    /// The metadata contexts that it has chosen, and the numbers they go by.
    pub contexts: Vec<(u32, String)>,
    /// The beginning of its next request, less than a header.
    pub received: Vec<u8>,
}

/// The sign that clients are to move. Readable once it has been given.
#[derive(Debug)]
pub struct Moving {
    begun: AtomicBool,
    sign: OwnedFd,
}

impl Moving {
    /// Nobody moves yet.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn new() -> std::io::Result<Moving> {
        let sign = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Moving { begun: AtomicBool::new(false), sign })
    }

    /// Gives the sign. It is not taken back.
    pub fn begin(&self) {
        self.begun.store(true, Ordering::Release);
        let _ = rustix::io::write(&self.sign, &1u64.to_ne_bytes());
    }

    /// Whether it was given.
    pub fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }
}

impl AsFd for Moving {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.sign.as_fd()
    }
}
