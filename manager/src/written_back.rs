// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a guest wrote to a directory that it had as a FAT disk, put into the directory.
//!
//! The daemon, which can make no file, tells what has changed, and copies content into files that are made here. It has read a
//! guest's file system and is not believed: every path is checked again and reached beneath the directory alone, through no
//! link; a file is replaced or removed only if it is still the one that was passed; whatever else stands at a path stays.
//! Files that are complete get their names one by one (rename), and what is removed is removed last: whenever this is cut
//! short, each name leads to the old file or to the new one, and at worst a hidden temporary file is left. Nothing is removed if
//! something could not be written: it may be what the guest has moved there.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::{Error, Result};

/// Files that are copied by one job.
const BATCH: usize = 128;
/// What a file is called whose place was taken meanwhile, after its name.
const ASIDE: &str = ".from-guest";

/// A file as it was when it was passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    identity: (u64, u64),
    size: i64,
    modified: (i64, i64),
}

impl Known {
    pub(crate) fn of(stat: &Stat) -> Known {
        let nanoseconds = i64::try_from(stat.st_mtime_nsec).unwrap_or(0);
        Known { identity: (stat.st_dev, stat.st_ino), size: stat.st_size, modified: (stat.st_mtime, nanoseconds) }
    }
}

/// What has become of a directory.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Files created or replaced.
    pub written: usize,
    /// Files and directories removed.
    pub removed: usize,
    /// What was not done, and why: sentences.
    pub refused: Vec<String>,
    /// Whether the guest had the file system in use.
    pub unclean: bool,
    /// Whether something that the guest has is nowhere in the directory.
    is_lossy: bool,
}

/// A directory and what was passed of it.
pub(crate) struct Target<'a> {
    pub root: &'a File,
    /// Files by path.
    pub files: &'a BTreeMap<String, Known>,
    /// Directories, without a `/` at their ends.
    pub folders: &'a [String],
}

/// A file that is ready for its content.
struct Fresh<'a> {
    path: &'a str,
    directory: OwnedFd,
    name: &'a str,
    temporary: String,
    file: File,
    size: u64,
    replaces: bool,
}

impl Target<'_> {
    /// Makes the changes that the guest has made to the disk `node` over `base`. Nobody writes to it any more.
    ///
    /// # Errors
    /// The guest's file system is broken, and then nothing has changed; or the daemon has gone.
    pub(crate) fn write_back(&self, daemon: &mut Daemon, node: &str, base: &str) -> Result<Outcome> {
        let found = daemon.execute("vvfat-changes", json!({ "node": node, "base": base }), &[])?;
        let mut outcome = Outcome { unclean: found["unclean"] == true, ..Outcome::default() };
        let mut batch: Vec<Fresh<'_>> = Vec::new();
        for change in found["changes"].as_array().into_iter().flatten() {
            let path = change["path"].as_str().unwrap_or_default();
            let action = change["action"].as_str().unwrap_or_default();
            let is_file = matches!(action, "create" | "replace");
            if !batch.is_empty() && (!is_file || batch.len() == BATCH) {
                self.fill(daemon, node, base, std::mem::take(&mut batch), &mut outcome)?;
            }
            let done = match (split(path), action) {
                (None, _) => Err("it is no path in the directory".to_owned()),
                (Some((parent, name)), "create" | "replace") => {
                    let size = change["size"].as_u64().unwrap_or(0);
                    match self.fresh(path, parent, name, size, action == "replace") {
                        Ok(fresh) => {
                            batch.push(fresh);
                            continue;
                        }
                        Err(e) => {
                            outcome.is_lossy = true;
                            Err(e)
                        }
                    }
                }
                (Some((parent, name)), "make-directory") => self.make_directory(parent, name),
                (_, "delete" | "remove-directory") if outcome.is_lossy => {
                    Err("it stays, because something else could not be written".to_owned())
                }
                (Some((parent, name)), "delete") => self.delete(path, parent, name).map(|()| outcome.removed += 1),
                (Some((parent, name)), "remove-directory") => {
                    self.remove_directory(path, parent, name).map(|()| outcome.removed += 1)
                }
                _ => Err("the daemon asks for what is not known".to_owned()),
            };
            if let Err(why) = done {
                outcome.refused.push(refusal(path, &why));
            }
        }
        if !batch.is_empty() {
            self.fill(daemon, node, base, batch, &mut outcome)?;
        }
        Ok(outcome)
    }

    /// The directory that a path lies in.
    fn parent(&self, parent: &str) -> std::result::Result<OwnedFd, String> {
        let parent = if parent.is_empty() { "." } else { parent };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat2(self.root, parent, flags, Mode::empty(), resolve)
            .map_err(|e| format!("its directory cannot be opened: {}", io::Error::from(e)))
    }

    /// Whether what stands at a name is the file that was passed as `path`.
    fn is_unchanged(&self, path: &str, directory: &OwnedFd, name: &str) -> std::result::Result<Stat, String> {
        let Some(known) = self.files.get(path) else { return Err("it was never passed".into()) };
        match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if Known::of(&stat) == *known => Ok(stat),
            Ok(_) => Err("it was changed on the host meanwhile".into()),
            Err(e) => Err(format!("it is not there any more: {}", io::Error::from(e))),
        }
    }

    /// A new file under a name that nobody looks for, beside the one that it will have.
    fn fresh<'a>(
        &self,
        path: &'a str,
        parent: &str,
        name: &'a str,
        size: u64,
        replaces: bool,
    ) -> std::result::Result<Fresh<'a>, String> {
        let failed = |e: Errno| format!("no file can be made beside it: {}", io::Error::from(e));
        let directory = self.parent(parent)?;
        let mut random = [0; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()).map_err(failed)?;
        let temporary = format!(".doorless-{:016x}", u64::from_ne_bytes(random));
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(if replaces { 0o600 } else { 0o666 });
        let file = File::from(rustix::fs::openat(&directory, &temporary, flags, mode).map_err(failed)?);
        Ok(Fresh { path, directory, name, temporary, file, size, replaces })
    }

    /// Has the daemon copy the content of files, and gives them their names.
    fn fill(
        &self,
        daemon: &mut Daemon,
        node: &str,
        base: &str,
        batch: Vec<Fresh<'_>>,
        outcome: &mut Outcome,
    ) -> Result<()> {
        let copied = copy(daemon, node, base, &batch);
        for fresh in batch {
            let done = match &copied {
                Ok(()) => self.name(&fresh),
                Err(e) => Err(e.chain()),
            };
            match done {
                Ok(None) => outcome.written += 1,
                Ok(Some(instead)) => outcome.refused.push(refusal(fresh.path, &instead)),
                Err(why) => {
                    outcome.is_lossy = true;
                    // It may have its name by now, and then it is not there under this one.
                    let _ = rustix::fs::unlinkat(&fresh.directory, &fresh.temporary, AtFlags::empty());
                    outcome.refused.push(refusal(fresh.path, &why));
                }
            }
        }
        Ok(())
    }

    /// Gives a file that is complete its name, or another, and then tells why and which.
    fn name(&self, fresh: &Fresh<'_>) -> std::result::Result<Option<String>, String> {
        let Fresh { path, directory, name, temporary, file, size, replaces } = fresh;
        let failed = |e: Errno| io::Error::from(e).to_string();
        let stat = rustix::fs::fstat(file).map_err(failed)?;
        if u64::try_from(stat.st_size) != Ok(*size) {
            return Err(format!("{} bytes of it were copied, and it has {size}", stat.st_size));
        }
        let replaced = if *replaces { Some(self.is_unchanged(path, directory, name)) } else { None };
        if let Some(Ok(old)) = &replaced {
            rustix::fs::fchmod(file, Mode::from_raw_mode(old.st_mode & 0o7777)).map_err(failed)?;
            if (old.st_uid, old.st_gid) != (stat.st_uid, stat.st_gid) {
                let owner = (rustix::fs::Uid::from_raw(old.st_uid), rustix::fs::Gid::from_raw(old.st_gid));
                // Only root can; for others it is their own file then.
                let _ = rustix::fs::fchown(file, Some(owner.0), Some(owner.1));
            }
        }
        rustix::fs::fsync(file).map_err(failed)?;
        let why = match replaced {
            Some(Ok(_)) => {
                return rustix::fs::renameat(directory, temporary, directory, *name).map(|()| None).map_err(failed);
            }
            Some(Err(why)) => why,
            None => match place(directory, temporary, name) {
                Ok(()) => return Ok(None),
                Err(Errno::EXIST) => "another is there".into(),
                Err(e) => return Err(failed(e)),
            },
        };
        let aside = format!("{name}{ASIDE}");
        place(directory, temporary, &aside)
            .map_err(|e| format!("{why}, and the guest's cannot be '{aside}': {}", failed(e)))?;
        Ok(Some(format!("{why}; the guest's is '{aside}' now")))
    }

    fn make_directory(&self, parent: &str, name: &str) -> std::result::Result<(), String> {
        let directory = self.parent(parent)?;
        match rustix::fs::mkdirat(&directory, name, Mode::from_raw_mode(0o777)) {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => match rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => Ok(()),
                _ => Err("another is there, which is no directory".into()),
            },
            Err(e) => Err(io::Error::from(e).to_string()),
        }
    }

    fn delete(&self, path: &str, parent: &str, name: &str) -> std::result::Result<(), String> {
        let directory = self.parent(parent)?;
        self.is_unchanged(path, &directory, name)?;
        rustix::fs::unlinkat(&directory, name, AtFlags::empty()).map_err(|e| io::Error::from(e).to_string())
    }

    fn remove_directory(&self, path: &str, parent: &str, name: &str) -> std::result::Result<(), String> {
        if !self.folders.iter().any(|folder| folder == path) {
            return Err("it was never passed".into());
        }
        let directory = self.parent(parent)?;
        rustix::fs::unlinkat(&directory, name, AtFlags::REMOVEDIR).map_err(|e| io::Error::from(e).to_string())
    }
}

/// Renames to a name that is not taken.
fn place(directory: &OwnedFd, from: &str, to: &str) -> rustix::io::Result<()> {
    match rustix::fs::renameat_with(directory, from, directory, to, RenameFlags::NOREPLACE) {
        // A file system that has no such thing: then by a second name, which cannot replace either.
        Err(Errno::INVAL | Errno::NOSYS) => {
            rustix::fs::linkat(directory, from, directory, to, AtFlags::empty())?;
            rustix::fs::unlinkat(directory, from, AtFlags::empty())
        }
        other => other,
    }
}

/// Has the daemon copy the content of files, by their paths.
fn copy(daemon: &mut Daemon, node: &str, base: &str, batch: &[Fresh<'_>]) -> Result<()> {
    let mut set = Value::Null;
    for fresh in batch {
        let mut arguments = json!({ "opaque": fresh.path });
        if !set.is_null() {
            arguments["fdset-id"] = set.clone();
        }
        set = daemon.execute("add-fd", arguments, &[std::os::fd::AsFd::as_fd(&fresh.file)])?["fdset-id"].clone();
    }
    let job = "vvfat-copy";
    let arguments = json!({ "job-id": job, "node": node, "base": base, "dir": format!("/dev/fdset/{set}") });
    let started = daemon.execute("vvfat-copy", arguments, &[]);
    let concluded = json!({ "id": job, "status": "concluded" });
    let waited = started.and_then(|_| {
        while daemon.next_event()? != ("JOB_STATUS_CHANGE".into(), concluded.clone()) {}
        let jobs = daemon.execute("query-jobs", json!({}), &[])?;
        daemon.execute("job-dismiss", json!({ "id": job }), &[])?;
        let jobs = jobs.as_array().into_iter().flatten();
        let error = jobs.filter(|other| other["id"] == job).find_map(|job| job["error"].as_str().map(str::to_owned));
        error.map_or(Ok(()), |text| Err(Error::Refused(text)))
    });
    daemon.execute("remove-fd", json!({ "fdset-id": set }), &[])?;
    waited
}

/// The parent's path and the name, if every part of it is a plain name.
fn split(path: &str) -> Option<(&str, &str)> {
    let plain = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
    if path.len() > 4096 || !path.split('/').all(plain) {
        return None;
    }
    Some(path.rsplit_once('/').unwrap_or(("", path)))
}

fn refusal(path: &str, why: &str) -> String {
    format!("'{}' was not written back: {why}", Path::new(OsStr::new(path)).display().to_string().escape_debug())
}
