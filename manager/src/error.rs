// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What can go wrong in the manager, in sentences for its user.

use std::io;
use std::path::PathBuf;

/// The manager's result.
pub type Result<T> = std::result::Result<T, Error>;

/// Why something was not done. What lies behind it is its `source`, so print the whole chain.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened or looked at.
    #[error("could not open '{}'{}", path.display(), purpose)]
    Open {
        /// The file.
        path: PathBuf,
        /// For what or why in vain, with a leading blank; may be empty.
        purpose: &'static str,
        /// Why.
        source: io::Error,
    },
    /// An address could not be listened on.
    #[error("could not listen on {address}")]
    Listen {
        /// The address.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// Policy forbids it; the text says what and how it could be allowed.
    #[error("{0}")]
    Refused(String),
    /// The inspector or the daemon could not be started or died.
    #[error("{doing}")]
    Process {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The image is not what it should be; the confined inspector's words.
    #[error("'{}': {text}", path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        text: String,
    },
    /// The daemon refused a command.
    #[error("the daemon refused {command}")]
    Daemon {
        /// The command.
        command: String,
        /// Its answer.
        source: qmp::ClientError,
    },
}

impl Error {
    /// It and what lies behind it, in one line.
    pub fn chain(&self) -> String {
        let causes = std::iter::successors(Some(self as &dyn std::error::Error), |error| error.source());
        causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
    }

    /// For `map_err` on the result of starting or talking to a process.
    pub(crate) fn process(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Process { doing, source }
    }
}
