// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Descriptors under names, for `getfd` and `closefd`. They belong to a monitor and outlive its clients.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::Error;

/// The named descriptors of one monitor.
#[derive(Debug, Default)]
pub struct NamedFds(BTreeMap<String, OwnedFd>);

impl NamedFds {
    /// Names `fd`; what had the name before is closed. An empty name is as good as any.
    ///
    /// # Errors
    /// A name that starts with a digit could be mistaken for a descriptor's number; `fd` is closed.
    pub fn add(&mut self, name: &str, fd: OwnedFd) -> Result<(), Error> {
        if name.starts_with(|c: char| c.is_ascii_digit()) {
            return Err(Error::invalid_value("fdname", "a name not starting with a digit"));
        }
        self.0.insert(name.to_owned(), fd);
        Ok(())
    }

    /// Closes the descriptor of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn remove(&mut self, name: &str) -> Result<(), Error> {
        self.0.remove(name).map(drop).ok_or_else(|| Error::fd_not_found(name))
    }

    /// Hands the descriptor of that name to whoever uses it; the name is free again.
    ///
    /// # Errors
    /// There is none.
    pub fn take(&mut self, name: &str) -> Result<OwnedFd, Error> {
        self.0.remove(name).ok_or_else(|| Error::generic(format!("File descriptor named '{name}' has not been found")))
    }

    /// Every name and the number of its descriptor.
    pub fn numbers(&self) -> impl Iterator<Item = (&str, i32)> {
        self.0.iter().map(|(name, fd)| (name.as_str(), fd.as_raw_fd()))
    }

    /// How many names are in use.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether no name is in use.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
