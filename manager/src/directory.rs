// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A directory that becomes a FAT disk: every file beneath it is opened here, and passed with its path for a name.
//!
//! Nothing outside is reached: each name is opened beneath the directory that it was found in and through no link (openat2).
//! What is no regular file is left out, and said.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, Dir, FileType, MemfdFlags, Mode, OFlags, ResolveFlags, SealFlags};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Map, Value, json};

use crate::chain::{Chain, Layer};
use crate::daemon::Daemon;
use crate::inspector::{Inspection, Program};
use crate::journal::Carried;
use crate::kept::Kept;
use crate::opening::{Opened, Rights};
use crate::written_back::{Known, Outcome, Target};
use crate::{Error, Result, disk, overlay};

/// Most files, and how deep they may lie.
const MOST_FILES: usize = 1 << 16;
const DEEPEST: usize = 64;
/// Descriptors for everything but a directory's files, here and in the daemon.
const OTHERS: u64 = 256;
/// Names of what was left out that a notice has room for.
const SHOWN: usize = 3;

/// The format of such a disk.
pub const FORMAT: &str = "vvfat";

/// What disk a directory becomes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Bits of the file allocation table: 12, 16 or 32.
    pub fat_type: Option<u8>,
    /// Whether it is a floppy disk.
    pub floppy: bool,
    /// The volume label.
    pub label: Option<String>,
    /// Whether a guest writes to it, and what it wrote is put into the directory at the end.
    pub rw: bool,
}

/// A directory's files.
#[derive(Debug)]
pub struct Directory {
    /// In the order of their names' bytes; paths are relative to the directory.
    files: Vec<(String, Opened)>,
    /// Directories in it, each with a `/` at its end.
    folders: Vec<String>,
    /// The files as they are now.
    known: BTreeMap<String, Known>,
    options: Options,
}

impl Directory {
    /// Makes the changes that a guest has made to the disk `node` over this directory, which was opened as `root`.
    pub(crate) fn write_back(&self, root: &File, daemon: &mut Daemon, node: &str) -> Result<Outcome> {
        let folders = self.folders.iter().map(|folder| folder.trim_end_matches('/').to_owned()).collect::<Vec<_>>();
        Target { root, files: &self.known, folders: &folders }.write_back(daemon, node, &below(node))
    }

    /// Whether what a guest writes is to be put into the directory.
    pub(crate) fn is_written(&self) -> bool {
        self.options.rw
    }
}

/// The name of a directory's node under the overlay `name`.
fn below(name: &str) -> String {
    format!("{name}-layer1")
}

/// Opens all files beneath `path` for reading.
///
/// # Errors
/// It is no directory, a file cannot be opened, or there are too many.
pub(crate) fn open(path: &Path, options: &Options) -> Result<Chain> {
    let failed = |path: &Path, errno: rustix::io::Errno| Error::Open {
        path: path.to_owned(),
        purpose: " as a directory",
        source: errno.into(),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| failed(path, errno))?;
    let path = path.canonicalize().map_err(|source| Error::Open { path: path.to_owned(), purpose: "", source })?;
    let limit = raise_limit();
    let mut walk = Walk {
        root: path.clone(),
        limit,
        files: Vec::new(),
        folders: Vec::new(),
        known: BTreeMap::new(),
        left_out: Vec::new(),
    };
    walk.enter(&root, "", 0)?;
    let Walk { files, folders, known, left_out, .. } = walk;
    if options.rw {
        let checked = rustix::fs::accessat(&root, ".", Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS);
        checked.map_err(|errno| Error::Open {
            path: path.clone(),
            purpose: " to write to it",
            source: errno.into(),
        })?;
    }
    let stat = rustix::fs::fstat(&root).map_err(|errno| failed(&path, errno))?;
    let inspection = Inspection {
        format: FORMAT.into(),
        virtual_size: 0,
        writable: false,
        backing: None,
        backing_format: None,
        data_file: None,
        extents: Vec::new(),
        cid: None,
    };
    let identity = (stat.st_dev, stat.st_ino);
    let image = Opened { file: root.into(), path, identity, rights: Rights::ReadOnly, device: false };
    let directory = Some(Directory { files, folders, known, options: options.clone() });
    let layer = Layer { image, inspection, data_file: None, extents: Vec::new(), directory };
    Ok(Chain { layers: vec![layer], notice: notice(&left_out) })
}

/// What to say about what is not on the disk.
fn notice(left_out: &[String]) -> Option<String> {
    let (shown, rest) = left_out.split_at(left_out.len().min(SHOWN));
    let more = if rest.is_empty() { String::new() } else { format!(", and {} more", rest.len()) };
    (!shown.is_empty()).then(|| format!("left out: {}{more}", shown.join(", ")))
}

/// Lets this process, and those that it starts, have as many descriptors as it may.
fn raise_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if setrlimit(Resource::Nofile, raised).is_ok() { limit.maximum } else { limit.current }.unwrap_or(u64::MAX)
}

struct Walk {
    root: PathBuf,
    /// Descriptors that this process may have, and its daemon too.
    limit: u64,
    files: Vec<(String, Opened)>,
    folders: Vec<String>,
    known: BTreeMap<String, Known>,
    /// Names, and why.
    left_out: Vec<String>,
}

impl Walk {
    /// Opens what is in `directory`, whose path is `prefix`.
    fn enter(&mut self, directory: &OwnedFd, prefix: &str, depth: usize) -> Result<()> {
        let failed = |path: &str, errno: rustix::io::Errno| Error::Open {
            path: self.root.join(path),
            purpose: " for a FAT disk",
            source: errno.into(),
        };
        if depth == DEEPEST {
            let path = self.root.join(prefix);
            return Err(Error::Refused(format!("'{}' lies more than {DEEPEST} directories down", path.display())));
        }
        let listing = Dir::read_from(directory).map_err(|errno| failed(prefix, errno))?;
        let mut names = Vec::new();
        for entry in listing {
            names.push(entry.map_err(|errno| failed(prefix, errno))?.file_name().to_bytes().to_owned());
        }
        names.sort();
        for name in names {
            if name == b"." || name == b".." {
                continue;
            }
            let Ok(text) = std::str::from_utf8(&name) else {
                let shown = Path::new(prefix).join(OsStr::from_bytes(&name));
                self.leave_out(&shown.to_string_lossy(), "its name is not UTF-8");
                continue;
            };
            let path = format!("{prefix}{text}");
            // Looked at before it is opened: a device may notice being opened.
            let kind = match rustix::fs::statat(directory, text, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => FileType::from_raw_mode(stat.st_mode),
                Err(errno) => return Err(self.failed(&path, errno)),
            };
            let opened = match kind {
                FileType::Directory => OFlags::DIRECTORY,
                FileType::RegularFile => OFlags::NONBLOCK | OFlags::NOCTTY,
                other => {
                    self.leave_out(&path, kind_name(other));
                    continue;
                }
            };
            self.make_room(&path)?;
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
            let flags = opened | OFlags::RDONLY | OFlags::CLOEXEC;
            let fd = rustix::fs::openat2(directory, text, flags, Mode::empty(), resolve);
            let fd = fd.map_err(|errno| self.failed(&path, errno))?;
            if kind == FileType::Directory {
                let path = path + "/";
                self.enter(&fd, &path, depth + 1)?;
                self.folders.push(path);
                continue;
            }
            let stat = rustix::fs::fstat(&fd).map_err(|errno| self.failed(&path, errno))?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                return Err(Error::Refused(format!(
                    "'{}' was replaced while it was opened",
                    self.root.join(path).display()
                )));
            }
            let place = self.root.join(&path);
            let identity = (stat.st_dev, stat.st_ino);
            let opened = Opened { file: fd.into(), path: place, identity, rights: Rights::ReadOnly, device: false };
            self.known.insert(path.clone(), Known::of(&stat));
            self.files.push((path, opened));
        }
        Ok(())
    }

    fn failed(&self, path: &str, errno: rustix::io::Errno) -> Error {
        Error::Open { path: self.root.join(path), purpose: " for a FAT disk", source: errno.into() }
    }

    fn leave_out(&mut self, path: &str, why: &str) {
        self.left_out.push(format!("'{}' ({why})", path.escape_debug()));
    }

    /// The daemon has each descriptor twice: in the set, and in the node.
    fn make_room(&self, path: &str) -> Result<()> {
        let files = self.files.len() + self.folders.len() + 1;
        let needed = 2 * files as u64 + OTHERS;
        if files > MOST_FILES {
            return Err(Error::Refused(format!(
                "'{}' has more than {MOST_FILES} files and directories in it (up to '{}')",
                self.root.display(),
                path.escape_debug()
            )));
        }
        if needed > self.limit {
            return Err(Error::Refused(format!(
                "'{}' has {files} files and directories up to '{}', and a process may have only {} descriptors, which is enough \
                 for {}: raise the hard limit (ulimit -Hn)",
                self.root.display(),
                path.escape_debug(),
                self.limit,
                self.limit.saturating_sub(OTHERS) / 2
            )));
        }
        Ok(())
    }
}

fn kind_name(kind: FileType) -> &'static str {
    match kind {
        FileType::Symlink => "a symbolic link",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        _ => "no regular file",
    }
}

/// Passes the files of a chain of one directory and makes a node of them, under an overlay if there shall be one. Returns the
/// name of the top node.
///
/// # Errors
/// The daemon refuses a file or the tree, or there is no room for an overlay.
pub(crate) fn attach(
    program: &Program,
    daemon: &mut Kept,
    chain: &mut Chain,
    name: &str,
    discard: bool,
    overlaid: bool,
) -> Result<String> {
    let Some(Layer { inspection, directory: Some(directory), .. }) = chain.layers.first_mut() else {
        return disk::attach(daemon, chain, name, discard);
    };
    let node = if overlaid { below(name) } else { name.to_owned() };
    let set = pass(daemon, directory)?;
    let Options { fat_type, floppy, label, rw: _ } = &directory.options;
    let mut options = Map::from_iter([
        ("driver".to_owned(), json!(FORMAT)),
        ("node-name".into(), json!(node)),
        ("read-only".into(), json!(true)),
        ("dir".into(), json!(format!("/dev/fdset/{set}"))),
        ("floppy".into(), json!(floppy)),
    ]);
    options.extend(fat_type.map(|bits| ("fat-type".to_owned(), json!(bits))));
    options.extend(label.as_ref().map(|label| ("label".to_owned(), json!(label))));
    daemon.execute("blockdev-add", Value::Object(options), &[])?;
    let nodes = daemon.ask("query-named-block-nodes", json!({ "flat": true }))?;
    let made = nodes.as_array().into_iter().flatten().find(|made| made["node-name"] == json!(node));
    let size = made.and_then(|made| made["image"]["virtual-size"].as_u64());
    inspection.virtual_size =
        size.ok_or_else(|| Error::Refused("the daemon does not tell the size of the disk".into()))?;
    if !overlaid {
        return Ok(node);
    }
    let (overlay, notice) = overlay::make(program, inspection.virtual_size)?;
    let texts: Vec<String> = chain.notice.take().into_iter().chain(notice).collect();
    chain.notice = (!texts.is_empty()).then(|| texts.join("; "));
    disk::attach_layer(daemon, &overlay, name, Some(&node), discard)?;
    chain.layers.insert(0, overlay);
    Ok(name.to_owned())
}

/// Passes a directory's descriptors into a new set.
fn pass(daemon: &mut Kept, directory: &Directory) -> Result<i64> {
    let set = daemon.next_set();
    for (path, opened) in &directory.files {
        let arguments = json!({ "fdset-id": set, "opaque": path });
        daemon.execute("add-fd", arguments, &[Carried::image(opened)?])?;
    }
    // Directories need no file; the descriptor that their names ride on is never read.
    let nothing = nothing().map_err(Error::process("could not make an empty file in memory"))?;
    for path in directory.folders.iter().map(String::as_str).chain(["/"]) {
        let another =
            nothing.as_fd().try_clone_to_owned().map_err(Error::process("could not duplicate a descriptor"))?;
        daemon.execute("add-fd", json!({ "fdset-id": set, "opaque": path }), &[Carried::other(another)])?;
    }
    Ok(set)
}

/// An empty file that stays empty, read-only as the files of the set are.
fn nothing() -> std::io::Result<OwnedFd> {
    let empty = rustix::fs::memfd_create("doorless-directory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::fcntl_add_seals(&empty, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    let again = format!("/proc/self/fd/{}", empty.as_raw_fd());
    Ok(rustix::fs::open(again, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}
