// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Objects that other commands refer to by id (QEMU's `object-add`).

use std::collections::BTreeMap;

use qmp::Error;

/// An object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Object {
    /// An iothread. Clients that want one get what they want: every connection has a thread of its own.
    IoThread,
}

/// All objects by id.
#[derive(Debug, Default)]
pub struct Objects(BTreeMap<String, Object>);

impl Objects {
    /// Adds one.
    ///
    /// # Errors
    /// The id is taken or malformed: QEMU's words.
    pub fn add(&mut self, id: &str, object: Object) -> Result<(), Error> {
        if !block::id_is_well_formed(id) {
            return Err(Error::invalid_value("id", "an identifier"));
        }
        if self.0.contains_key(id) {
            return Err(Error::generic(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        self.0.insert(id.to_owned(), object);
        Ok(())
    }

    /// Removes one.
    ///
    /// # Errors
    /// There is none of that id.
    pub fn remove(&mut self, id: &str) -> Result<(), Error> {
        self.0.remove(id).map(drop).ok_or_else(|| Error::generic(format!("object '{id}' not found")))
    }

    /// The object called `id`.
    pub fn get(&self, id: &str) -> Option<Object> {
        self.0.get(id).copied()
    }
}
