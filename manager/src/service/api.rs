// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What clients of the service ask, and what they are answered: one line of JSON each, and then the connection ends.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Longest request and longest answer, bytes.
pub const MOST_BYTES: u64 = 1 << 20;

/// A request.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(tag = "do", rename_all = "kebab-case", rename_all_fields = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// A confined daemon without a disk, and its NBD socket.
    Start {
        /// Its name: 1 to 64 letters, digits, `-`, `_` and `.`, of which the first is a letter or digit.
        name: String,
    },
    /// Ends a daemon and everything that it serves.
    Stop {
        /// The daemon.
        name: String,
    },
    /// The asker's daemons; all of them for root and the service's own user.
    List,
    /// Gives a daemon a disk, which NBD clients find under its name.
    Attach {
        /// The daemon.
        name: String,
        /// The disk's name, as a daemon's.
        disk: String,
        /// The image, an absolute path.
        image: PathBuf,
        /// Its format.
        format: Option<String>,
        /// Format of backing files whose overlay does not say.
        backing_format: Option<String>,
        /// Whether it is only read.
        #[serde(default)]
        read_only: bool,
    },
    /// Takes a disk from a daemon; its clients are hung up on.
    Detach {
        /// The daemon.
        name: String,
        /// The disk.
        disk: String,
    },
    /// Changes a disk's size.
    Resize {
        /// The daemon.
        name: String,
        /// The disk.
        disk: String,
        /// Bytes.
        size: u64,
    },
    /// Has a daemon of the program as it lies on disk now take over, with the clients.
    Upgrade {
        /// The daemon.
        name: String,
    },
    /// Reads the policy once more; disks that it would not give are detached. For root and the service's own user.
    Reload,
}

/// A daemon as [`Request::List`] shows it.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Shown {
    /// Its name.
    pub name: String,
    /// Whose it is.
    pub uid: u32,
    /// Its process; `None` between two.
    pub pid: Option<u32>,
    /// How often another had to take its predecessor's place.
    pub restarts: u32,
    /// Where NBD clients connect.
    pub socket: PathBuf,
    /// What it serves.
    pub disks: Vec<ShownDisk>,
}

/// A disk as [`Request::List`] shows it.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ShownDisk {
    /// Its name.
    pub name: String,
    /// The image.
    pub image: PathBuf,
    /// Whether it can be written.
    pub writable: bool,
}

/// An answer.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "kebab-case")]
pub enum Answer {
    /// It was done.
    Done,
    /// The daemons.
    Daemons(Vec<Shown>),
    /// Where the disk is found.
    Attached {
        /// For NBD clients.
        uri: String,
    },
    /// Another daemon has taken over.
    Upgraded {
        /// For how long nobody was served, milliseconds.
        pause: f64,
    },
    /// What a new policy has withdrawn, as `daemon/disk`.
    Reloaded {
        /// Disks that were detached.
        withdrawn: Vec<String>,
    },
    /// It was not done.
    Error(String),
}

/// Asks the service at `socket`.
///
/// # Errors
/// Nobody listens there, the answer makes no sense, or is an error: then that is the text.
pub fn ask(socket: &Path, request: &Request) -> Result<Answer> {
    let failed = |source| Error::Open { path: socket.to_owned(), purpose: " as the manager's service", source };
    let mut stream = UnixStream::connect(socket).map_err(failed)?;
    let line = serde_json::to_string(request).map_err(|e| failed(e.into()))?;
    stream.write_all(format!("{line}\n").as_bytes()).map_err(failed)?;
    let mut answer = String::new();
    BufReader::new(stream.take(MOST_BYTES)).read_line(&mut answer).map_err(failed)?;
    match serde_json::from_str(&answer).map_err(|e| failed(e.into()))? {
        Answer::Error(text) => Err(Error::Refused(text)),
        answer => Ok(answer),
    }
}

/// Whether `name` is one that daemons and disks may have.
pub fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric();
    (1..=64).contains(&name.len())
        && name.bytes().all(|byte| plain(byte) || b"-_.".contains(&byte))
        && name.bytes().next().is_some_and(plain)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_request_with_a_word_too_many_is_none() {
        let start: Request = serde_json::from_str(r#"{"do":"start","name":"a"}"#).unwrap();
        assert_eq!(start, Request::Start { name: "a".into() });
        assert!(serde_json::from_str::<Request>(r#"{"do":"start","name":"a","as":"root"}"#).is_err());
        assert!(serde_json::from_str::<Request>(r#"{"do":"open","name":"a"}"#).is_err());
    }

    #[test]
    fn a_name_is_a_file_name_without_surprises() {
        assert!(is_name("vm-1.disk_a") && is_name(&"x".repeat(64)));
        for wrong in ["", ".", "..", "-x", "a/b", "a b", "a\n", "ä", &"x".repeat(65)] {
            assert!(!is_name(wrong), "{wrong:?}");
        }
    }
}
