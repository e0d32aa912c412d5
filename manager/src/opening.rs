// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opening images: by the user's own word, or beneath a directory that policy allows.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};

use crate::{Error, Result};

/// Rights of an opened image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// It can only be read.
    ReadOnly,
    /// It can be read and written.
    ReadWrite,
}

/// An opened image and who it is.
#[derive(Debug)]
pub struct Opened {
    /// The descriptor, close-on-exec.
    pub file: File,
    /// Where it was found.
    pub path: PathBuf,
    /// Device and inode: the image's identity, whatever it is called.
    pub identity: (u64, u64),
    /// Its rights.
    pub rights: Rights,
    /// Whether it is a block device.
    pub device: bool,
}

impl Opened {
    /// Lets reads and writes pass by the host's cache from now on, for everybody who shares the descriptor's open file.
    ///
    /// # Errors
    /// The file system has no such thing.
    pub fn bypass_cache(&self) -> Result<()> {
        bypass_cache(&self.file, &self.path)
    }

    /// Whether they do.
    pub fn bypasses_cache(&self) -> bool {
        rustix::fs::fcntl_getfl(&self.file).is_ok_and(|flags| flags.contains(OFlags::DIRECT))
    }
}

/// As [`Opened::bypass_cache`], for a file at `path` that was just made.
///
/// # Errors
/// The file system has no such thing.
pub fn bypass_cache(file: &File, path: &Path) -> Result<()> {
    let flags = rustix::fs::fcntl_getfl(file);
    let set = flags.and_then(|flags| rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT));
    set.map_err(|errno| Error::Open {
        path: path.to_owned(),
        purpose: " past the host's cache (O_DIRECT)",
        source: errno.into(),
    })
}

/// Opens the file that the user named. Links are followed: it is the user's own word.
///
/// # Errors
/// It cannot be opened, or is neither a regular file nor a block device.
pub fn open_named(path: &Path, rights: Rights) -> Result<Opened> {
    let fd = rustix::fs::open(path, flags(rights), Mode::empty()).map_err(|e| failed(path, e))?;
    checked(fd, path.to_owned(), rights, true)
}

/// Opens `name`, which an image names: beneath one of `roots`, through no link of any kind.
///
/// `base` is the directory of the image that names it, for a relative name.
///
/// # Errors
/// The name is no plain path, is no regular file, leads out of every root or through a link, or cannot be opened.
pub fn open_beneath(roots: &[PathBuf], base: &Path, name: &str, rights: Rights) -> Result<Opened> {
    let shown = || name.escape_debug().to_string();
    if let Some((protocol, _)) = name.split_once(':').filter(|(protocol, _)| !protocol.contains('/')) {
        return Err(Error::Refused(format!(
            "the image names '{}', a '{}:' address; only plain files are opened",
            shown(),
            protocol.escape_debug()
        )));
    }
    let path = lexically_normal(&base.join(name));
    let Some((root, inside)) = roots.iter().find_map(|root| Some((root, path.strip_prefix(root).ok()?))) else {
        let roots: Vec<String> = roots.iter().map(|root| format!("'{}'", root.display())).collect();
        return Err(Error::Refused(format!(
            "the image names '{}', which is not beneath {}; if it may be opened, allow its directory with --allow",
            shown(),
            roots.join(" or ")
        )));
    };
    let directory = rustix::fs::open(root, OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::PATH, Mode::empty())
        .map_err(|e| failed(root, e))?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let fd =
        rustix::fs::openat2(&directory, inside, flags(rights), Mode::empty(), resolve).map_err(|e| failed(&path, e))?;
    checked(fd, path, rights, false)
}

/// O_NONBLOCK keeps a FIFO from holding us up; on regular files it means nothing.
fn flags(rights: Rights) -> OFlags {
    let access = match rights {
        Rights::ReadOnly => OFlags::RDONLY,
        Rights::ReadWrite => OFlags::RDWR,
    };
    access | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK
}

/// Device and inode of an open image; of a block device, which device it is.
///
/// # Errors
/// The errno of fstat(2).
pub fn identity(image: impl AsFd) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::fstat(image)?;
    let device = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
    // The device, not the name it has: two names are one disk.
    Ok(if device { (0, stat.st_rdev) } else { (stat.st_dev, stat.st_ino) })
}

fn checked(fd: OwnedFd, path: PathBuf, rights: Rights, devices: bool) -> Result<Opened> {
    let stat = rustix::fs::fstat(&fd).map_err(|e| failed(&path, e))?;
    let who = identity(&fd);
    let identity = who.map_err(|source| Error::Open { path: path.clone(), purpose: "", source })?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            return Ok(Opened { file: fd.into(), path, identity, rights, device: false });
        }
        FileType::BlockDevice if devices => {
            return Ok(Opened { file: fd.into(), path, identity, rights, device: true });
        }
        FileType::BlockDevice => "block device, which an image may not name",
        FileType::Directory => "directory",
        FileType::CharacterDevice => "character device",
        FileType::Fifo => "FIFO",
        FileType::Socket => "socket",
        _ => "file of another kind",
    };
    let wanted = if devices { "a disk is a regular file or a block device" } else { "only regular files are opened" };
    Err(Error::Refused(format!("'{}' is a {kind}; {wanted}", path.display())))
}

/// Takes `.` and `..` out without asking the file system: no link is followed anyway when the result is opened.
pub(crate) fn lexically_normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                normal.pop();
            }
            Component::CurDir => {}
            other => normal.push(other),
        }
    }
    normal
}

fn failed(path: &Path, errno: rustix::io::Errno) -> Error {
    let purpose = match errno {
        rustix::io::Errno::LOOP | rustix::io::Errno::XDEV => " (a link leads there, and links are not followed)",
        _ => "",
    };
    Error::Open { path: path.to_owned(), purpose, source: io::Error::from(errno) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn refusal(result: Result<Opened>) -> String {
        let error = result.unwrap_err();
        std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source())
            .map(|error| format!("{error}: "))
            .collect()
    }

    #[test]
    fn a_named_backing_file_opens_only_beneath_its_roots() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap().join("images");
        std::fs::create_dir(&base).unwrap();
        std::fs::write(base.join("base.raw"), [0; 512]).unwrap();
        std::fs::write(base.join("../outside.raw"), [0; 512]).unwrap();
        let roots = [base.clone()];
        assert_eq!(open_beneath(&roots, &base, "base.raw", Rights::ReadOnly).unwrap().rights, Rights::ReadOnly);
        open_beneath(&roots, &base, base.join("base.raw").to_str().unwrap(), Rights::ReadOnly).unwrap();
        open_beneath(&roots, &base, "./x/../base.raw", Rights::ReadOnly).unwrap();
        for outside in ["../outside.raw", "/etc/passwd", "x/../../outside.raw"] {
            assert!(refusal(open_beneath(&roots, &base, outside, Rights::ReadOnly)).contains("--allow"), "{outside}");
        }
        let wider = [base.parent().unwrap().to_owned()];
        open_beneath(&wider, &base, "../outside.raw", Rights::ReadOnly).unwrap();
    }

    #[test]
    fn links_addresses_and_other_kinds_of_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        symlink("/etc/passwd", base.join("link")).unwrap();
        symlink("/etc", base.join("dirlink")).unwrap();
        std::fs::create_dir(base.join("directory")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, base.join("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        let roots = [base.clone()];
        for (name, why) in [
            ("link", "links are not followed"),
            ("dirlink/passwd", "links are not followed"),
            ("directory", "is a directory"),
            ("fifo", "is a FIFO"),
            ("json:{\"driver\":\"file\"}", "'json:' address"),
            ("nbd:localhost:10809", "'nbd:' address"),
            ("missing", "No such file"),
        ] {
            assert!(refusal(open_beneath(&roots, &base, name, Rights::ReadOnly)).contains(why), "{name}");
        }
    }

    #[test]
    fn a_name_with_control_characters_is_escaped_in_messages() {
        let text =
            refusal(open_beneath(&[PathBuf::from("/nowhere")], Path::new("/x"), "a\n\u{1b}[31m", Rights::ReadOnly));
        assert!(text.contains("a\\n\\u{1b}[31m"), "{text}");
    }
}
