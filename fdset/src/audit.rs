// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is lawful and still worth a warning: rights that reach further than the access mode says.

use std::collections::BTreeMap;

use crate::{Mode, SetInfo};

/// A descriptor by its set's id and its number.
pub type Place = (i64, i32);

/// Something that [`findings`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// A read-only descriptor of a file that the worker's user may write: in a process that can reach `/proc`, it can be
    /// opened again for writing. Run the worker as a user that owns nothing.
    Reopenable(Place),
    /// One file, in several sets, read-only in some and writable in others: what the one set's users take for constant,
    /// the other's change.
    Conflicting {
        /// Where it is read-only.
        readers: Vec<Place>,
        /// Where it can be written.
        writers: Vec<Place>,
    },
}

/// Looks through `sets` for the process that will use them, which runs as `uid` and `gid`.
pub fn findings<'a>(sets: impl IntoIterator<Item = &'a SetInfo>, uid: u32, gid: u32) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut files: BTreeMap<_, (Vec<Place>, Vec<Place>)> = BTreeMap::new();
    for set in sets {
        for fd in set.fds() {
            let Some(identity) = fd.identity() else { continue };
            let place = (set.id(), fd.number());
            let sealed = identity.seals.is_some_and(crate::Seals::against_writing);
            let mode = fd.rights().mode();
            if mode == Mode::ReadOnly && identity.writable_by(uid, gid) && !sealed {
                found.push(Finding::Reopenable(place));
            }
            let (readers, writers) = files.entry(identity.key()).or_default();
            (if mode.writes() { writers } else { readers }).push(place);
        }
    }
    for (readers, writers) in files.into_values() {
        let conflict = writers.iter().any(|(set, _)| readers.iter().any(|(other, _)| other != set));
        if conflict {
            found.push(Finding::Conflicting { readers, writers });
        }
    }
    found
}
