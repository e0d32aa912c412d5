// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an open of an fd set wanted and did not find, so that a manager can pass it and the command be tried again.

use std::sync::{Arc, Mutex, PoisonError};

use fdset::{Access, Mode};
use serde_json::{Value, json};

/// Rights that a set did not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The set, which may not be there at all.
    pub set: i64,
    /// The rights.
    pub access: Access,
    /// The node that would have used them.
    pub node: String,
}

impl Wanted {
    /// The data of `FDSET_WANTED`.
    pub fn event(&self, seconds: u64) -> Value {
        json!({
            "fdset-id": self.set,
            "access": match self.access.mode() {
                Mode::ReadOnly => "read-only",
                _ => "read-write",
            },
            "node-name": self.node,
            "seconds": seconds,
        })
    }
}

/// Where opens leave what they wanted: they run deep below the command that asked.
#[derive(Clone, Debug, Default)]
pub struct Wants(Arc<Mutex<Option<Wanted>>>);

impl Wants {
    /// Leaves a note. The first one counts: what comes after it failed because of it.
    pub fn note(&self, wanted: Wanted) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(wanted);
    }

    /// Takes the note.
    pub fn take(&self) -> Option<Wanted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
