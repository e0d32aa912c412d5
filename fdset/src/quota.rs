// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How many descriptors may be passed. Dups do not count: the embedding program makes them itself.

use std::fmt;

use crate::Peer;

/// Limits on the descriptors that the sets own; `None` is no limit, as in QEMU.
///
/// Keep `total` well below `RLIMIT_NOFILE`, so that dups, connections and the monitor itself still get theirs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quotas {
    /// In one set.
    pub per_set: Option<usize>,
    /// From one peer, that is from one user id. Descriptors without a peer (the command line's) are free.
    pub per_peer: Option<usize>,
    /// In all sets.
    pub total: Option<usize>,
}

/// A limit of [`Quotas`] that is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// [`Quotas::per_set`], with the set's id.
    Set(i64),
    /// [`Quotas::per_peer`], with the peer.
    Peer(Peer),
    /// [`Quotas::total`].
    Total,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Limit::Set(id) => write!(f, "set {id}"),
            Limit::Peer(peer) => write!(f, "user {} (process {})", peer.uid, peer.pid),
            Limit::Total => f.write_str("this process"),
        }
    }
}
