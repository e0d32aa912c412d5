// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a command is given: its arguments, already checked, and the way to the descriptors of its session.

use std::os::fd::OwnedFd;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{Error, PendingFds};

/// One call of a command.
#[derive(Debug)]
pub struct Call<'a> {
    arguments: Map<String, Value>,
    fds: &'a mut PendingFds,
}

impl<'a> Call<'a> {
    /// A call with `arguments` that the table has checked. Tests and command lines make these; for clients a
    /// [`Session`](crate::Session) does.
    pub fn new(arguments: Map<String, Value>, fds: &'a mut PendingFds) -> Call<'a> {
        Call { arguments, fds }
    }

    /// The arguments: every mandatory one is there, none is unknown, all have their types.
    pub fn arguments(&self) -> &Map<String, Value> {
        &self.arguments
    }

    /// The arguments, to keep.
    pub fn into_arguments(self) -> Map<String, Value> {
        self.arguments
    }

    /// The arguments as a struct (with `#[serde(rename_all = "kebab-case")]`, as a rule). The descriptors stay claimable.
    ///
    /// # Errors
    /// The struct wants something that the schema does not promise.
    pub fn parse<T: DeserializeOwned>(&mut self) -> Result<T, Error> {
        let arguments = std::mem::take(&mut self.arguments);
        serde_json::from_value(Value::Object(arguments)).map_err(|e| Error::generic(e.to_string()))
    }

    /// Numbers of the descriptors that this command could claim.
    pub fn unclaimed(&self) -> Vec<i32> {
        self.fds.numbers()
    }

    /// The first descriptor that came with this command or waited in its session; any others are closed.
    ///
    /// # Errors
    /// `No file descriptor supplied via SCM_RIGHTS`, or why it was lost.
    pub fn claim_fd(&mut self) -> Result<OwnedFd, Error> {
        self.fds.claim()
    }
}
