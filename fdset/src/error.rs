// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Errors with three faces: [`Display`](fmt::Display) is QEMU's text where QEMU has one, [`Error::detail`] says what was
//! asked and what there was, [`Error::errno`] is for callers that speak `open(2)`.

use std::fmt;
use std::io;

use rustix::io::Errno;

use crate::{Access, Identity, Limit, Peer, Refusal, Rights};

/// Why a call on the sets failed. Nothing has changed then, except that a descriptor given to
/// [`FdSets::add`](crate::FdSets::add) is closed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A descriptor was to be added to a set with a negative id.
    #[error("Parameter 'fdset-id' expects a non-negative value")]
    NegativeId {
        /// The id.
        id: i64,
    },
    /// A set was to be removed that is not there.
    #[error("File descriptor named 'fdset-id:{id}' not found")]
    SetNotFound {
        /// The id.
        id: i64,
        /// The sets that are.
        sets: SetsSeen,
    },
    /// A descriptor was to be removed that the set does not own.
    #[error("File descriptor named 'fdset-id:{id}, fd:{fd}' not found")]
    FdNotFound {
        /// The set.
        id: i64,
        /// The descriptor's number.
        fd: i64,
        /// What the set holds; `None` if there is no such set.
        held: Option<Held>,
    },
    /// A path of an fd set without a number from 0 to `i32::MAX`.
    #[error("Could not parse fdset {path}")]
    BadPath {
        /// The path.
        path: String,
    },
    /// A path of something else. QEMU would open it.
    #[error("Could not open '{path}': only /dev/fdset/N can be opened")]
    NotAnFdset {
        /// The path.
        path: String,
    },
    /// A set was to be opened that is not there.
    #[error("Failed to find fdset /dev/fdset/{id}")]
    NoSuchSet {
        /// The id.
        id: i64,
        /// The sets that are.
        sets: SetsSeen,
    },
    /// No descriptor of the set has the access mode and `O_DIRECT` that were asked for.
    #[error("Failed to find file descriptor with matching flags={:#x}", access.open_flags())]
    NoMatch {
        /// The set.
        id: i64,
        /// What was asked for.
        access: Access,
        /// What the set holds.
        held: Held,
    },
    /// A descriptor matched but could not serve: no number is free, or `O_SYNC` differs.
    #[error("Failed to dup() given file descriptor fd={fd}")]
    Dup {
        /// The set.
        id: i64,
        /// The descriptor that matched.
        fd: i32,
        /// What was asked for.
        access: Access,
        /// What the descriptor has.
        rights: Rights,
        /// The cause.
        source: io::Error,
    },
    /// [`FdPolicy::Strict`](crate::FdPolicy::Strict) does not take such a descriptor.
    #[error("Refused to add fd={}: it {}", .0.fd, .0.reason)]
    Refused(Box<Refused>),
    /// A limit of [`Quotas`](crate::Quotas) is reached.
    #[error("Too many file descriptors: {limit} may hold {allowed}")]
    Quota {
        /// Which limit.
        limit: Limit,
        /// How many it allows.
        allowed: usize,
    },
    /// A descriptor was to be removed by a user who did not pass it.
    #[error("File descriptor named 'fdset-id:{id}, fd:{fd}' was passed by another user")]
    NotYours {
        /// The set.
        id: i64,
        /// The descriptor's number.
        fd: i32,
        /// Who passed it; `None` for the command line.
        owner: Option<Peer>,
        /// Who asked.
        peer: Peer,
    },
    /// The kernel would not say what a descriptor is, which [`FdPolicy::Strict`](crate::FdPolicy::Strict) must know.
    #[error("Could not look at fd={fd}: {source}")]
    Unknown {
        /// The descriptor.
        fd: i32,
        /// The cause.
        source: io::Error,
    },
}

impl Error {
    /// A sentence with what was asked and what there was, for the log and for people.
    pub fn detail(&self) -> String {
        match self {
            Error::NegativeId { id } => format!("asked for set {id}; ids go from 0 to 2^63-1"),
            Error::SetNotFound { id, sets } | Error::NoSuchSet { id, sets } => format!("asked for set {id}; {sets}"),
            Error::FdNotFound { id, fd, held: Some(held) } => {
                format!("asked for fd {fd} of set {id}; set {id} holds {held}")
            }
            Error::FdNotFound { id, fd, held: None } => format!("asked for fd {fd} of set {id}; there is no such set"),
            Error::BadPath { path } => {
                format!("asked for '{}'; after {} stands a number from 0 to {}", Shown(path), crate::PREFIX, i32::MAX)
            }
            Error::NotAnFdset { path } => {
                format!("asked for '{}'; only passed descriptors can be opened, as {}N", Shown(path), crate::PREFIX)
            }
            Error::NoMatch { id, access, held } => format!("asked for {access}; set {id} holds {held}"),
            Error::Dup { id, fd, access, rights, source } => {
                format!(
                    "asked for {access}; set {id} holds fd {fd} {rights}, which cannot be duplicated for that: {source}"
                )
            }
            Error::Refused(refused) => refused.to_string(),
            Error::Quota { limit, allowed } => {
                format!("asked for one more descriptor; {limit} holds the {allowed} allowed")
            }
            Error::NotYours { id, fd, owner, peer } => {
                let owner = owner.map_or("without a peer".to_owned(), |owner| format!("by user {}", owner.uid));
                format!("user {} asked to remove from set {id}, where fd {fd} was passed {owner}", peer.uid)
            }
            Error::Unknown { fd, source } => format!("asked what fd {fd} is; the kernel answered: {source}"),
        }
    }

    /// The error number that `open(2)` or `close(2)` would set.
    pub fn errno(&self) -> i32 {
        match self {
            Error::NegativeId { .. } | Error::BadPath { .. } => Errno::INVAL.raw_os_error(),
            Error::SetNotFound { .. } | Error::FdNotFound { .. } | Error::NoSuchSet { .. } => {
                Errno::NOENT.raw_os_error()
            }
            Error::NoMatch { .. } => Errno::ACCESS.raw_os_error(),
            Error::NotAnFdset { .. } | Error::Refused(_) | Error::NotYours { .. } => Errno::PERM.raw_os_error(),
            Error::Quota { .. } => Errno::DQUOT.raw_os_error(),
            Error::Dup { source, .. } | Error::Unknown { source, .. } => {
                source.raw_os_error().unwrap_or(Errno::IO.raw_os_error())
            }
        }
    }
}

/// A descriptor that was refused: the reason, and what it is.
#[derive(Clone, Copy, Debug)]
pub struct Refused {
    /// Its number while it was open.
    pub fd: i32,
    /// Why.
    pub reason: Refusal,
    /// What it had.
    pub rights: Rights,
    /// What it referred to.
    pub identity: Identity,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Refused { fd, reason, rights, identity } = self;
        write!(f, "refused fd {fd} ({rights}, {identity}): it {reason}")
    }
}

/// At most this many items are named in a sentence.
const SHOWN: usize = 8;

/// The ids of the sets at the time of an error, the lowest named and the rest counted.
#[derive(Clone, Debug)]
pub struct SetsSeen {
    shown: Vec<i64>,
    total: usize,
}

impl SetsSeen {
    /// `ids` is in ascending order.
    pub(crate) fn new(ids: impl Iterator<Item = i64>, total: usize) -> SetsSeen {
        SetsSeen { shown: ids.take(SHOWN).collect(), total }
    }
}

impl fmt::Display for SetsSeen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.total == 0 {
            return f.write_str("there are no sets");
        }
        f.write_str("there are the sets ")?;
        enumerate(f, self.shown.iter(), self.total)
    }
}

/// What a set held at the time of an error, the oldest descriptors named and the rest counted.
#[derive(Clone, Debug)]
pub struct Held {
    shown: Vec<(i32, Rights)>,
    total: usize,
    dups: usize,
}

impl Held {
    pub(crate) fn new(fds: impl Iterator<Item = (i32, Rights)>, total: usize, dups: usize) -> Held {
        Held { shown: fds.take(SHOWN).collect(), total, dups }
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Held { total: 0, dups, .. } => write!(f, "no descriptor, only {dups} duplicates in use"),
            Held { shown, total, .. } => {
                enumerate(f, shown.iter().map(|(fd, rights)| format!("fd {fd} {rights}")), *total)
            }
        }
    }
}

/// `a, b, c`, and how many more of `total`.
fn enumerate(f: &mut fmt::Formatter<'_>, shown: impl Iterator<Item: fmt::Display>, total: usize) -> fmt::Result {
    let mut named = 0;
    for item in shown {
        f.write_str(if named == 0 { "" } else { ", " })?;
        write!(f, "{item}")?;
        named += 1;
    }
    if total > named { write!(f, " and {} more", total - named) } else { Ok(()) }
}

/// Foreign text in a log line: escaped, and cut to a readable length.
struct Shown<'a>(&'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.chars();
        for c in rest.by_ref().take(200) {
            write!(f, "{}", c.escape_debug())?;
        }
        f.write_str(if rest.as_str().is_empty() { "" } else { "…" })
    }
}
