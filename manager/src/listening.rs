// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Unix sockets whose file appears when there is something to be had behind it, and goes with whoever made it.

use std::fs::symlink_metadata;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{CWD, Mode, OFlags, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::{Error, Result};

/// How many sockets this process has hidden: no two have one name.
static HIDDEN: AtomicU32 = AtomicU32::new(0);

/// A unix socket that listens.
#[derive(Debug)]
pub struct Listening {
    listener: OwnedFd,
    /// Where it waits for [`publish`](Listening::publish).
    hidden: SocketFile,
    /// Where it is to be found then.
    path: PathBuf,
}

/// The file of a socket, which goes when this value goes.
#[derive(Debug)]
pub struct SocketFile(PathBuf);

impl Listening {
    /// Listens, but not at `path` yet: a client that waits for the file must find what it came for.
    ///
    /// # Errors
    /// Somebody listens there, or the path is taken by something else, too long, or in no directory to write to.
    pub fn bind(path: PathBuf) -> Result<Listening> {
        match hide(&path) {
            Ok((listener, hidden)) => Ok(Listening { listener: listener.into(), hidden, path }),
            Err(source) => Err(failed(&path, source)),
        }
    }

    /// Lets clients find it, and lets go of the listener, which has been passed on. The socket of a listener that has gone is
    /// replaced; nothing else is.
    ///
    /// # Errors
    /// Those of [`bind`](Listening::bind): somebody else may have come since.
    pub fn publish(mut self) -> Result<SocketFile> {
        let renamed = match rename(&self.hidden.0, &self.path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => refuse_unless_dead(&self.path)
                .and_then(|()| std::fs::remove_file(&self.path))
                .and_then(|()| rename(&self.hidden.0, &self.path)),
            other => other,
        };
        renamed.map_err(|source| failed(&self.path, source))?;
        self.hidden.0 = self.path;
        Ok(self.hidden)
    }
}

impl SocketFile {
    /// Leaves the file where it is.
    pub fn keep(mut self) -> PathBuf {
        std::mem::take(&mut self.0)
    }
}

impl AsFd for Listening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty() {
            let _ = std::fs::remove_file(&self.0);
        }
    }
}

fn failed(path: &Path, source: io::Error) -> Error {
    Error::Open { path: path.to_owned(), purpose: " to listen there", source }
}

/// A listener under a name beside `path`, and that name.
fn hide(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    // What no client could name is refused; the name beside it is reached through its directory, however long that is.
    SocketAddr::from_pathname(path)?;
    refuse_unless_dead(path)?;
    let beside = format!(".doorless-{}-{}", std::process::id(), HIDDEN.fetch_add(1, Ordering::Relaxed));
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let directory = rustix::fs::open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let hidden = parent.join(&beside);
    // Left by a process of this number that was killed.
    if symlink_metadata(&hidden).is_ok_and(|metadata| metadata.file_type().is_socket()) {
        std::fs::remove_file(&hidden)?;
    }
    let listener = UnixListener::bind(format!("/proc/self/fd/{}/{beside}", directory.as_raw_fd()))?;
    Ok((listener, SocketFile(hidden)))
}

/// An error if `path` is anything but free, or the socket of a listener that has gone.
fn refuse_unless_dead(path: &Path) -> io::Result<()> {
    let Ok(metadata) = symlink_metadata(path) else { return Ok(()) };
    // Connecting to a file that is no socket is refused in the same way, and a file is not ours to remove.
    let dead = metadata.file_type().is_socket()
        && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
    if dead { Ok(()) } else { Err(Errno::ADDRINUSE.into()) }
}

/// Renames, and replaces nothing.
fn rename(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // A file system without the flag: a hard link replaces nothing either.
        Err(Errno::INVAL | Errno::NOSYS) => {
            std::fs::hard_link(from, to)?;
            std::fs::remove_file(from)
        }
        other => Ok(other?),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn cause<T: std::fmt::Debug>(refused: Result<T>) -> io::ErrorKind {
        match refused {
            Err(Error::Open { source, .. }) => source.kind(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn clients_find_it_when_it_is_published_and_it_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let entries = || std::fs::read_dir(directory.path()).unwrap().count();
        let path = directory.path().join("x".repeat(100 - directory.path().as_os_str().len()));
        let listening = Listening::bind(path.clone()).unwrap();
        let listener = listening.as_fd().try_clone_to_owned().unwrap();
        assert!(!path.exists());
        let file = listening.publish().unwrap();
        UnixStream::connect(&path).unwrap();
        drop(listener);
        assert!(UnixStream::connect(&path).is_err(), "only whom it was passed to listens");
        assert_eq!(entries(), 1);
        drop(file);
        assert_eq!(entries(), 0);
        drop(Listening::bind(path).unwrap());
        assert_eq!(entries(), 0);
    }

    #[test]
    fn a_dead_socket_is_replaced_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        drop(Listening::bind(path.clone()).unwrap().publish().unwrap());
        assert!(!path.exists());
        drop(UnixListener::bind(&path).unwrap());
        let second = Listening::bind(path.clone()).unwrap();
        // Somebody is quicker: theirs stays.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "theirs").unwrap();
        assert_eq!(cause(second.publish()), io::ErrorKind::AddrInUse);
        assert_eq!(cause(Listening::bind(path.clone())), io::ErrorKind::AddrInUse);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "theirs");
        std::fs::remove_file(&path).unwrap();
        let _living = UnixListener::bind(&path).unwrap();
        assert_eq!(cause(Listening::bind(path)), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn a_path_that_no_client_could_name_is_refused() {
        let path = PathBuf::from(format!("/tmp/{}", "x".repeat(120)));
        assert_eq!(cause(Listening::bind(path)), io::ErrorKind::InvalidInput);
    }
}
