// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A temporary overlay: what clients write goes into a file that has no name, and the image below stays as it is.
//!
//! The file lies in the directory that `TMPDIR` names, or in `/var/tmp`, which is meant for what may become large and, unlike
//! `/tmp`, is rarely memory. Where there is no such directory to write to, as in a container with a read-only root, memory
//! takes its place, and the chain's notice says so; but not where `TMPDIR` names one: then the user's word is an error.
//! No name leads to the file at any time, so that nobody else can open it and nothing is left behind, however this ends.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, MemfdFlags, Mode, OFlags};
use rustix::io::Errno;
use serde_json::json;

use crate::chain::Layer;
use crate::daemon::Daemon;
use crate::inspector::{Inspection, Program};
use crate::opening::{Opened, Rights};
use crate::{Error, Result};

/// Where overlays lie unless `TMPDIR` says otherwise.
const DIRECTORY: &str = "/var/tmp";

/// A qcow2 layer for an image of `size` bytes, and what the user should know about where it lies. A confined process of its own
/// writes what is in it.
///
/// # Errors
/// There is no room for it, or the process cannot be started.
pub fn make(program: &Program, size: u64) -> Result<(Layer, Option<String>)> {
    let chosen = std::env::var_os("TMPDIR").filter(|directory| !directory.is_empty()).map(PathBuf::from);
    let directory = chosen.clone().unwrap_or_else(|| DIRECTORY.into());
    let (file, place, notice) = match unnamed(&directory) {
        Ok(file) => (file, directory, None),
        Err(source) if chosen.is_some() => {
            return Err(Error::Open { path: directory, purpose: " to make a temporary file there", source });
        }
        Err(e) => {
            let failed = Error::process("could not set memory aside for a temporary overlay");
            let file =
                rustix::fs::memfd_create("doorless-overlay", MemfdFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
            let notice = format!("no file can be made in {DIRECTORY} ({e}): what is written is kept in memory");
            (file, "memory".into(), Some(notice))
        }
    };
    let path = PathBuf::from(format!("temporary overlay in {}", place.display()));
    let stat =
        rustix::fs::fstat(&file).map_err(|e| Error::Open { path: path.clone(), purpose: "", source: e.into() })?;
    let file = File::from(file);
    // As QEMU does: a disk ends with a whole sector.
    let size = size.checked_next_multiple_of(512).unwrap_or(size);
    format(program, &file, size)?;
    let image = Opened { file, path, identity: (stat.st_dev, stat.st_ino), rights: Rights::ReadWrite, device: false };
    let inspection = Inspection {
        format: "qcow2".into(),
        virtual_size: size,
        writable: true,
        backing: None,
        backing_format: None,
        data_file: None,
        extents: Vec::new(),
        cid: None,
    };
    Ok((Layer { image, inspection, data_file: None, extents: Vec::new(), directory: None }, notice))
}

/// A new file in `directory`, which has no name there.
fn unnamed(directory: &Path) -> io::Result<OwnedFd> {
    let access = OFlags::RDWR | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    match rustix::fs::open(directory, access | OFlags::TMPFILE, mode) {
        // A file system that makes no file without a name, NFS for one: then the name goes at once.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {}
        other => return Ok(other?),
    }
    let within = rustix::fs::open(directory, OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let name = format!(".doorless-{:016x}", u64::from_ne_bytes(random));
    let file = rustix::fs::openat(&within, &name, access | OFlags::CREATE | OFlags::EXCL, mode)?;
    rustix::fs::unlinkat(&within, &name, AtFlags::empty())?;
    Ok(file)
}

/// Makes an empty image of `size` bytes in `file`.
fn format(program: &Program, file: &File, size: u64) -> Result<()> {
    let mut daemon = Daemon::start(program)?;
    let added = daemon.execute("add-fd", json!({}), &[std::os::fd::AsFd::as_fd(file)])?;
    let filename = format!("/dev/fdset/{}", added["fdset-id"]);
    let file = json!({ "driver": "file", "node-name": "file", "filename": filename });
    daemon.execute("blockdev-add", file, &[])?;
    let image = json!({ "driver": "qcow2", "file": "file", "size": size });
    daemon.execute("blockdev-create", json!({ "job-id": "create", "options": image }), &[])?;
    while daemon.next_event()? != ("JOB_STATUS_CHANGE".into(), json!({ "id": "create", "status": "concluded" })) {}
    let jobs = daemon.execute("query-jobs", json!({}), &[])?;
    daemon.stop().map_err(Error::process("could not wait for the daemon"))?;
    match jobs[0]["error"].as_str() {
        None => Ok(()),
        Some(text) => Err(Error::Refused(format!("could not make a temporary overlay: {text}"))),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn its_file_never_has_a_name() {
        let directory = tempfile::tempdir().unwrap();
        let file = File::from(unnamed(directory.path()).unwrap());
        assert_eq!(file.metadata().unwrap().nlink(), 0);
        assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        assert!(unnamed(&directory.path().join("missing")).is_err());
    }
}
