// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Errors of the control path: opening, attaching, removing. The data path speaks `io::Error` with the right errno.

use std::io;

/// The result of a control path call.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of cause an [`Error`] has: the caller's only question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The image's bytes break the rules of its format.
    Corrupt,
    /// Valid, but this version cannot do it.
    Unsupported,
    /// The caller's options are wrong, or name nothing.
    Invalid,
    /// The node is in use in a way that excludes the request.
    InUse,
    /// The host refused or failed an operation on a descriptor.
    Io,
}

/// A sentence for the user: what was asked, what was found, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct Error {
    /// The cause's kind.
    pub kind: ErrorKind,
    text: String,
    source: Option<io::Error>,
}

impl Error {
    /// An error of `kind` that says `text`.
    pub fn new(kind: ErrorKind, text: impl Into<String>) -> Error {
        Error { kind, text: text.into(), source: None }
    }

    /// Bytes of the image that break its format's rules.
    pub fn corrupt(text: impl Into<String>) -> Error {
        Error::new(ErrorKind::Corrupt, text)
    }

    /// Something valid that cannot be done.
    pub fn unsupported(text: impl Into<String>) -> Error {
        Error::new(ErrorKind::Unsupported, text)
    }

    /// Options that are wrong.
    pub fn invalid(text: impl Into<String>) -> Error {
        Error::new(ErrorKind::Invalid, text)
    }

    /// The error for the data path: the host's errno where there is one.
    pub fn into_io(self) -> io::Error {
        match self.source {
            Some(source) => source,
            None => io::Error::other(self.text),
        }
    }

    /// A failed operation on a descriptor; `doing` completes "could not …".
    pub fn io(doing: &str, source: io::Error) -> Error {
        Error { kind: ErrorKind::Io, text: format!("Could not {doing}: {source}"), source: Some(source) }
    }
}
