// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A message as it came: a JSON value, or why it is none, and the descriptors that its bytes carried.

use std::os::fd::{AsRawFd, OwnedFd};

use serde_json::Value;

use crate::Error;

/// Descriptors that one `sendmsg` brought.
#[derive(Debug)]
pub enum Receipt {
    /// They are here, close-on-exec, in the order of the sender. At least one.
    Fds(Vec<OwnedFd>),
    /// Some or all were lost on the way, for this reason; those that did come are closed.
    Lost(String),
}

impl Receipt {
    /// Numbers of the descriptors that are here.
    pub fn numbers(&self) -> Vec<i32> {
        match self {
            Receipt::Fds(fds) => fds.iter().map(AsRawFd::as_raw_fd).collect(),
            Receipt::Lost(_) => Vec::new(),
        }
    }
}

/// One top-level value of the stream with the last receipt that rode on its bytes or on the blanks before it.
#[derive(Debug)]
pub struct Message {
    /// The value, or the sentence of a parse error (`JSON parse error, expecting value`).
    pub content: Result<Value, String>,
    /// What came with it. Dropping it closes the descriptors.
    pub receipt: Option<Receipt>,
}

impl From<Value> for Message {
    fn from(value: Value) -> Message {
        Message { content: Ok(value), receipt: None }
    }
}

/// Descriptors that no command has claimed yet: one receipt at most, as in QEMU.
#[derive(Debug, Default)]
pub struct PendingFds {
    receipt: Option<Receipt>,
    strays: usize,
}

impl PendingFds {
    /// Takes over what came with a message; earlier descriptors are closed. A message without any changes nothing.
    pub fn replace(&mut self, receipt: Option<Receipt>) {
        if receipt.is_some() {
            self.strays += self.len();
            self.receipt = receipt;
        }
    }

    /// The first descriptor; the others are closed.
    ///
    /// # Errors
    /// There is none, or it was lost on the way: the text says why. A loss is told once.
    pub fn claim(&mut self) -> Result<OwnedFd, Error> {
        self.strays += self.len().saturating_sub(1);
        match self.receipt.take() {
            Some(Receipt::Fds(fds)) => fds.into_iter().next().ok_or_else(no_fd),
            Some(Receipt::Lost(why)) => Err(Error::generic(why)),
            None => Err(no_fd()),
        }
    }

    /// Closes whatever is pending.
    pub fn clear(&mut self) {
        self.strays += self.len();
        self.receipt = None;
    }

    /// How many descriptors were closed since the last call because nobody claimed them.
    pub fn take_strays(&mut self) -> usize {
        std::mem::take(&mut self.strays)
    }

    /// Numbers of the descriptors that wait to be claimed.
    pub fn numbers(&self) -> Vec<i32> {
        self.receipt.iter().flat_map(Receipt::numbers).collect()
    }

    /// How many descriptors wait to be claimed.
    pub fn len(&self) -> usize {
        match &self.receipt {
            Some(Receipt::Fds(fds)) => fds.len(),
            Some(Receipt::Lost(_)) | None => 0,
        }
    }

    /// Whether a claim would find no descriptor.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn no_fd() -> Error {
    Error::generic("No file descriptor supplied via SCM_RIGHTS")
}
