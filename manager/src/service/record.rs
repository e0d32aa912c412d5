// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A daemon's journal on disk, for the manager after this one: what it takes to know the daemon again, and to have its
//! descriptors.
//!
//! Descriptors are got back from the daemon itself (pidfd_getfd(2)), which needs the right to trace it: then they are the very
//! same open files. Where that is not had, images are opened again by their paths and compared, and a lost listening socket
//! means that the daemon serves on, but no other can take its place.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use rustix::fs::{Mode, OFlags};
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::notify::Stored;
use crate::chain::Policy as Wanted;
use crate::daemon::Daemon;
use crate::journal::{Carried, Image, Journal, Step};
use crate::kept::Kept;
use crate::opening::{Rights, identity};
use crate::policy::{Asker, Grant};
use crate::{Error, Result};

/// What is written down.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Record {
    /// Of this format: 1.
    version: u32,
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    pub pid: u32,
    pub began: u64,
    next_set: i64,
    steps: Vec<WrittenStep>,
    pub disks: BTreeMap<String, WrittenDisk>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
struct WrittenStep {
    part: String,
    command: String,
    arguments: Value,
    again: Value,
    carried: Vec<Option<WrittenImage>>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
struct WrittenImage {
    path: PathBuf,
    identity: (u64, u64),
    size: u64,
    writable: bool,
}

/// A disk, and by what request it was had.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct WrittenDisk {
    path: PathBuf,
    format: Option<String>,
    backing_format: Option<String>,
    read_only: bool,
    files: Vec<(u64, u64)>,
    pub writable: bool,
    pub node: String,
}

impl WrittenDisk {
    pub fn new(grant: &Grant, writable: bool, node: &str) -> WrittenDisk {
        let Grant { path, wanted, files, .. } = grant.clone();
        let Wanted { format, backing_format, read_only, .. } = wanted;
        WrittenDisk { path, format, backing_format, read_only, files, writable, node: node.to_owned() }
    }

    pub fn grant(&self, asker: Asker) -> Grant {
        let WrittenDisk { path, format, backing_format, read_only, files, .. } = self;
        let (format, backing_format) = (format.clone(), backing_format.clone());
        let wanted = Wanted { format, backing_format, read_only: *read_only, ..Wanted::default() };
        Grant { asker, path: path.clone(), wanted, files: files.clone() }
    }
}

impl Record {
    /// What is to be written down of a daemon that runs; `None` of one that has just died.
    pub fn of(name: &str, asker: Asker, kept: &mut Kept, disks: BTreeMap<String, WrittenDisk>) -> Option<Record> {
        let daemon = kept.daemon().ok()?;
        let (pid, began) = (daemon.pid(), daemon.began()?);
        let steps = kept.journal().steps().iter().map(|step| WrittenStep {
            part: step.part.clone(),
            command: step.command.clone(),
            arguments: step.arguments.clone(),
            again: step.again.clone(),
            carried: step.carried.iter().map(|carried| carried.as_image().map(written)).collect(),
        });
        let (steps, next_set) = (steps.collect(), kept.journal().sets());
        let Asker { uid, gid, .. } = asker;
        Some(Record { version: 1, name: name.to_owned(), uid, gid, pid, began, next_set, steps, disks })
    }

    /// Writes it to `path`, whole or not at all.
    ///
    /// # Errors
    /// Those of the host.
    pub fn write(&self, path: &Path) -> Result<()> {
        let failed =
            |source| Error::Open { path: path.to_owned(), purpose: " to write down what a daemon has", source };
        let text = serde_json::to_vec(self).map_err(|e| failed(e.into()))?;
        let whole = path.with_added_extension("new");
        let file = std::fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(&whole);
        let mut file = file.map_err(failed)?;
        file.write_all(&text).map_err(failed)?;
        std::fs::rename(&whole, path).map_err(failed)
    }

    /// Reads one.
    ///
    /// # Errors
    /// It cannot be read or is of another version.
    pub fn read(path: &Path) -> Result<Record> {
        let failed = |source| Error::Open { path: path.to_owned(), purpose: " to know a daemon again", source };
        let text = std::fs::read(path).map_err(failed)?;
        let record: Record = serde_json::from_slice(&text).map_err(|e| failed(e.into()))?;
        if record.version == 1 {
            return Ok(record);
        }
        Err(Error::Refused(format!("'{}' was written by another version", path.display())))
    }

    /// The journal with its descriptors, and the second monitor's listener, as far as they can be had.
    ///
    /// # Errors
    /// The daemon's fd sets are not what the record says, an image is not to be had or not what it was, or a listening socket
    /// cannot be had.
    pub fn recover(self, daemon: &mut Daemon, stored: &mut Stored) -> Result<(Journal, OwnedFd)> {
        let numbers = Numbers::of(daemon)?;
        let pidfd = daemon.pidfd().map_err(Error::process("could not look at the daemon"))?;
        let lost = |what: &str| {
            Error::Refused(format!(
                "the daemon '{}' cannot be asked for its {what}: that takes the right to trace it",
                self.name
            ))
        };
        let get =
            |number: Option<i32>| number.and_then(|number| pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).ok());
        let monitor = stored
            .take(&self.name, "monitor")
            .or_else(|| get(numbers.monitor))
            .ok_or_else(|| lost("monitor's socket"))?;
        // The only other descriptor: one server for all disks.
        let listener = stored.take(&self.name, "nbd").or_else(|| get(numbers.listener));
        let listener = Carried::other(listener.ok_or_else(|| lost("listening socket"))?);
        let mut steps = Vec::new();
        for step in self.steps {
            let WrittenStep { part, command, arguments, again, carried } = step;
            let set = arguments.get("fdset-id").and_then(Value::as_i64);
            let mut descriptors = Vec::new();
            for written in carried {
                descriptors.push(match written {
                    Some(image) => {
                        let known = set.and_then(|set| numbers.sets.get(&set));
                        let Some((number, opaque)) = known else {
                            return Err(Error::Refused(format!(
                                "the daemon '{}' has no fd set {set:?} any more",
                                self.name
                            )));
                        };
                        let (device, inode) = image.identity;
                        if *opaque != format!("doorless:{device}:{inode}:{}", image.path.display()) {
                            return Err(Error::Refused(format!(
                                "the fd set {set:?} of the daemon '{}' is another's",
                                self.name
                            )));
                        }
                        image.recover(get(Some(*number)))?
                    }
                    None => Arc::clone(&listener),
                });
            }
            steps.push(Step { part, command, arguments, again, carried: descriptors });
        }
        Ok((Journal::resume(steps, self.next_set), monitor))
    }
}

fn written(image: &Image) -> WrittenImage {
    let Image { path, identity, size, rights } = image;
    let (size, writable) = (size.load(Relaxed), *rights == Rights::ReadWrite);
    WrittenImage { path: path.clone(), identity: *identity, size, writable }
}

impl WrittenImage {
    /// The image by a descriptor of the daemon's, or by its path.
    fn recover(self, got: Option<OwnedFd>) -> Result<Arc<Carried>> {
        let WrittenImage { path, identity: before, size, writable } = self;
        let rights = if writable { Rights::ReadWrite } else { Rights::ReadOnly };
        let failed = |source| Error::Open { path: path.clone(), purpose: " once more", source };
        let descriptor = match got {
            Some(descriptor) => descriptor,
            None => reopen(&path, before, rights).map_err(failed)?,
        };
        if identity(&descriptor).map_err(failed)? != before {
            return Err(Error::Image { path, text: "is not the file that was passed".into() });
        }
        Ok(Carried::known(descriptor, Image { path, identity: before, size: size.into(), rights }))
    }
}

/// Opens the very file that was known by that path; nothing else is opened.
fn reopen(path: &Path, before: (u64, u64), rights: Rights) -> std::io::Result<OwnedFd> {
    let handle = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    if identity(&handle)? != before {
        return Err(std::io::Error::other("it is not the file that was passed"));
    }
    let access = if rights == Rights::ReadOnly { OFlags::RDONLY } else { OFlags::RDWR };
    let flags = access | OFlags::CLOEXEC | OFlags::NONBLOCK;
    Ok(rustix::fs::open(format!("/proc/self/fd/{}", handle.as_fd().as_raw_fd()), flags, Mode::empty())?)
}

/// The daemon's numbers for its descriptors.
struct Numbers {
    /// By set: the number and the opaque text.
    sets: BTreeMap<i64, (i32, String)>,
    listener: Option<i32>,
    monitor: Option<i32>,
}

impl Numbers {
    fn of(daemon: &mut Daemon) -> Result<Numbers> {
        let mut sets = BTreeMap::new();
        let answer = daemon.execute("query-fdsets", json!({}), &[])?;
        for set in answer.as_array().into_iter().flatten() {
            for fd in set["fds"].as_array().into_iter().flatten() {
                let number = fd["fd"].as_i64().and_then(|number| i32::try_from(number).ok());
                if let (Some(id), Some(number), Some(opaque)) =
                    (set["fdset-id"].as_i64(), number, fd["opaque"].as_str())
                {
                    sets.insert(id, (number, opaque.to_owned()));
                }
            }
        }
        let books = daemon.execute("query-descriptors", json!({}), &[])?;
        let find = |matches: &dyn Fn(&str) -> bool| {
            let mut entries = books["descriptors"].as_array().into_iter().flatten();
            let found = entries.find(|entry| entry["what"].as_str().is_some_and(matches));
            found.and_then(|entry| entry["fd"].as_i64()).and_then(|number| i32::try_from(number).ok())
        };
        let listener = find(&|what| what == "the NBD server's listener");
        let monitor = find(&|what| what.contains("listener") && what.contains("monitor"));
        Ok(Numbers { sets, listener, monitor })
    }
}
