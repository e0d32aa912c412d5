// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Another look at a daemon that runs: what its fd sets hold, and whether its books agree with the kernel's.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use qmp::Client;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{Error, Result};

/// A client of a daemon's monitor.
#[derive(Debug)]
pub struct Monitor(Client);

/// A descriptor in the daemon's books.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Entry {
    /// Its number.
    pub fd: i32,
    /// Whom it belongs to.
    pub owner: String,
    /// Which of the owner's it is.
    pub what: String,
}

#[derive(Deserialize)]
struct Ledger {
    pid: u32,
    descriptors: Vec<Entry>,
}

/// The books held against `/proc/PID/fd`.
#[derive(Debug)]
pub struct Audit {
    /// The daemon's process.
    pub pid: u32,
    /// What is in the books.
    pub entries: Vec<Entry>,
    /// Numbers that are open and in nobody's books, with what the kernel says they are: leaks.
    pub unaccounted: Vec<(i32, String)>,
    /// Entries of the books that are not open.
    pub missing: Vec<Entry>,
    /// Entries that share a number.
    pub doubled: Vec<Entry>,
}

impl Audit {
    /// Whether every descriptor is in the books exactly once.
    pub fn is_clean(&self) -> bool {
        self.unaccounted.is_empty() && self.missing.is_empty() && self.doubled.is_empty()
    }
}

impl Monitor {
    /// Connects to the monitor's socket. Another client that is connected is waited for.
    ///
    /// # Errors
    /// Nobody listens there, or it is no QMP monitor.
    pub fn connect(path: &Path) -> Result<Monitor> {
        let failed = |source| Error::Open { path: path.to_owned(), purpose: " as a monitor", source };
        let socket = UnixStream::connect(path).map_err(failed)?;
        let client =
            Client::new(socket).map_err(|source| Error::Daemon { command: "the connection".into(), source })?;
        Ok(Monitor(client))
    }

    /// The answer of `query-fdsets` with detail.
    ///
    /// # Errors
    /// It is no daemon of ours, or has gone.
    pub fn fdsets(&mut self) -> Result<Value> {
        self.execute("query-fdsets", json!({ "detail": true }))
    }

    /// The answer of `query-statistics`.
    ///
    /// # Errors
    /// It is no daemon of ours, or has gone.
    pub fn statistics(&mut self) -> Result<Value> {
        self.execute("query-statistics", Value::Null)
    }

    /// Compares the daemon's books with the kernel's. What changes meanwhile is held against neither.
    ///
    /// # Errors
    /// The daemon has gone, or this user may not look at its descriptors.
    pub fn audit(&mut self) -> Result<Audit> {
        let before = self.ledger()?;
        let directory = PathBuf::from(format!("/proc/{}/fd", before.pid));
        let denied = |source| Error::Open {
            path: directory.clone(),
            purpose: " (only the administrator may look into a process that cannot be traced)",
            source,
        };
        let open = open_descriptors(&directory).map_err(denied)?;
        Ok(compare(before, &open, self.ledger()?))
    }

    fn ledger(&mut self) -> Result<Ledger> {
        let answer = self.execute("query-descriptors", Value::Null)?;
        serde_json::from_value(answer)
            .map_err(|e| Error::Refused(format!("the daemon's answer to query-descriptors makes no sense: {e}")))
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let arguments = match arguments {
            Value::Object(arguments) => arguments,
            _ => Map::new(),
        };
        self.0.execute(command, arguments, &[]).map_err(|source| Error::Daemon { command: command.to_owned(), source })
    }
}

/// Holds what is open against the books of before and after: a number that came or went meanwhile is in one of the two only.
fn compare(before: Ledger, open: &BTreeMap<i32, String>, after: Ledger) -> Audit {
    let numbers = |ledger: &Ledger| ledger.descriptors.iter().map(|entry| entry.fd).collect::<BTreeSet<i32>>();
    let (first, last) = (numbers(&before), numbers(&after));
    let unknown = open.iter().filter(|(fd, _)| !first.contains(fd) && !last.contains(fd));
    let gone = after.descriptors.iter().filter(|entry| first.contains(&entry.fd) && !open.contains_key(&entry.fd));
    let mut seen = BTreeSet::new();
    let twice = after.descriptors.iter().filter(|entry| !seen.insert(entry.fd));
    Audit {
        pid: before.pid,
        unaccounted: unknown.map(|(&fd, what)| (fd, what.clone())).collect(),
        missing: gone.cloned().collect(),
        doubled: twice.cloned().collect(),
        entries: after.descriptors,
    }
}

/// Every open number of a process, with what the kernel says it is.
fn open_descriptors(directory: &Path) -> io::Result<BTreeMap<i32, String>> {
    let mut open = BTreeMap::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // Closed meanwhile: then it is nobody's.
        let Ok(target) = std::fs::read_link(entry.path()) else { continue };
        open.insert(number, target.to_string_lossy().into_owned());
    }
    Ok(open)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn books(numbers: &[i32]) -> Ledger {
        let entry = |&fd: &i32| Entry { fd, owner: "fdset".into(), what: "set 0".into() };
        Ledger { pid: 1, descriptors: numbers.iter().map(entry).collect() }
    }

    #[test]
    fn leaks_and_wrong_books_are_found_and_what_changes_meanwhile_is_not() {
        let open = |numbers: &[i32]| numbers.iter().map(|&fd| (fd, "file".to_owned())).collect::<BTreeMap<_, _>>();
        assert!(compare(books(&[0, 1, 5]), &open(&[0, 1, 6]), books(&[0, 1, 6])).is_clean(), "5 went, 6 came");
        let leak = compare(books(&[0, 1]), &open(&[0, 1, 9]), books(&[0, 1]));
        assert_eq!(leak.unaccounted, [(9, "file".to_owned())]);
        let wrong = compare(books(&[0, 1, 2]), &open(&[0, 1]), books(&[0, 1, 1, 2]));
        assert_eq!((wrong.missing[0].fd, wrong.doubled[0].fd), (2, 1));
        assert!(!leak.is_clean() && !wrong.is_clean());
    }
}
