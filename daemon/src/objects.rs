// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Objects that other commands refer to by id (QEMU's `object-add`).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use export::nbd::tls::{Authorization, Credentials};
use qmp::Error;

use crate::authz::Authz;

/// An object.
#[derive(Clone, Debug)]
pub enum Object {
    /// Who may come in.
    Authz(Authz),
    /// An iothread. Clients that want one get what they want: every connection has a thread of its own.
    IoThread,
    /// A passphrase.
    Secret(block::Secret),
    /// What a TLS server proves itself with.
    TlsCreds(Credentials),
}

/// All objects by id. Servers look rules up at the time of use, on threads of their own.
#[derive(Debug, Default)]
pub struct Objects(Arc<Mutex<BTreeMap<String, Object>>>);

impl Objects {
    /// Adds one.
    ///
    /// # Errors
    /// The id is taken or malformed: QEMU's words.
    pub fn add(&mut self, id: &str, object: Object) -> Result<(), Error> {
        if !block::id_is_well_formed(id) {
            return Err(Error::invalid_value("id", "an identifier"));
        }
        let mut objects = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if objects.contains_key(id) {
            return Err(Error::generic(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        objects.insert(id.to_owned(), object);
        Ok(())
    }

    /// Removes one. Servers that were started with it go on.
    ///
    /// # Errors
    /// There is none of that id.
    pub fn remove(&mut self, id: &str) -> Result<(), Error> {
        let removed = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        removed.map(drop).ok_or_else(|| Error::generic(format!("object '{id}' not found")))
    }

    /// The object called `id`.
    pub fn get(&self, id: &str) -> Option<Object> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// The bytes of the secret called `id`.
    ///
    /// # Errors
    /// There is none: QEMU's words.
    pub fn secret(&self, id: &str) -> Result<block::Secret, Error> {
        match self.get(id) {
            Some(Object::Secret(secret)) => Ok(secret),
            Some(_) => Err(Error::generic(format!("Object with id '{id}' is not a secret"))),
            None => Err(Error::generic(format!("No secret with id '{id}'"))),
        }
    }

    /// What the rule called `id` says whenever it is asked; while there is none of that id, nobody may come in.
    pub fn authorization(&self, id: &str) -> Authorization {
        let (objects, id) = (Arc::clone(&self.0), id.to_owned());
        Arc::new(move |identity| match objects.lock().unwrap_or_else(PoisonError::into_inner).get(&id) {
            Some(Object::Authz(authz)) => authz.allows(identity),
            _ => false,
        })
    }
}
