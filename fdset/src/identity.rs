// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a descriptor refers to ([`Identity`], asked of the kernel) and where it came from ([`Provenance`], told by the caller).

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::time::SystemTime;

use rustix::fs::{FileType, SealFlags, fcntl_get_seals, fstat, fstatvfs, major, minor};
use rustix::io::Errno;

use crate::{Keeper, Role};

/// A device number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Device {
    /// Which driver.
    pub major: u32,
    /// Which of the driver's devices.
    pub minor: u32,
}

impl Device {
    fn of(dev: rustix::fs::Dev) -> Device {
        Device { major: major(dev), minor: minor(dev) }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// The type of a file; for a device, which one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A regular file, a memfd too.
    Regular,
    /// A directory.
    Directory,
    /// A pipe, named or not.
    Fifo,
    /// A socket, listening or not.
    Socket,
    /// A symbolic link, which only `O_PATH` can hold.
    Symlink,
    /// A block device.
    Block(Device),
    /// A character device.
    Char(Device),
    /// None of these: an eventfd, an epoll instance, a pidfd, …
    Other,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Regular => f.write_str("regular file"),
            Kind::Directory => f.write_str("directory"),
            Kind::Fifo => f.write_str("pipe"),
            Kind::Socket => f.write_str("socket"),
            Kind::Symlink => f.write_str("symbolic link"),
            Kind::Block(device) => write!(f, "block device {device}"),
            Kind::Char(device) => write!(f, "character device {device}"),
            Kind::Other => f.write_str("descriptor without a file"),
        }
    }
}

/// The seals of a memfd (`F_GET_SEALS`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seals(SealFlags);

impl Seals {
    /// Every seal with its name; the word order of [`Display`](fmt::Display).
    const NAMES: [(SealFlags, &str); 5] = [
        (SealFlags::SEAL, "seal"),
        (SealFlags::SHRINK, "shrink"),
        (SealFlags::GROW, "grow"),
        (SealFlags::WRITE, "write"),
        (SealFlags::FUTURE_WRITE, "future-write"),
    ];

    /// The bits of `F_GET_SEALS`.
    pub fn from_bits(bits: u32) -> Seals {
        Seals(SealFlags::from_bits_retain(bits))
    }

    /// The bits of `F_GET_SEALS`.
    pub fn bits(self) -> u32 {
        self.0.bits()
    }

    /// Whether no new write can happen, through any descriptor (`F_SEAL_WRITE` or `F_SEAL_FUTURE_WRITE`).
    pub fn against_writing(self) -> bool {
        self.0.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE)
    }

    /// Whether the file keeps at least its size (`F_SEAL_SHRINK`).
    pub fn against_shrinking(self) -> bool {
        self.0.contains(SealFlags::SHRINK)
    }
}

impl fmt::Display for Seals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> =
            Seals::NAMES.iter().filter(|(seal, _)| self.0.contains(*seal)).map(|&(_, name)| name).collect();
        f.write_str(if names.is_empty() { "none" } else { "" })?;
        f.write_str(&names.join(","))
    }
}

/// The file behind a descriptor, as the kernel tells it without opening or reading anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The file system that holds the file.
    pub device: Device,
    /// The file's number there.
    pub inode: u64,
    /// Its type.
    pub kind: Kind,
    /// Bytes of a regular file; `None` for others (a block device must be asked by an `ioctl`).
    pub size: Option<u64>,
    /// Present for a memfd, and only there.
    pub seals: Option<Seals>,
    /// No name leads to the file: unlinked, `O_TMPFILE`, memfd.
    pub deleted: bool,
    /// The owner's user id.
    pub uid: u32,
    /// The owning group's id.
    pub gid: u32,
    /// Permission bits (`st_mode & 0o7777`).
    pub permissions: u32,
}

impl Identity {
    /// Asks the kernel about `fd`. On a network or FUSE file system this may wait for the server.
    ///
    /// # Errors
    /// The errno of `fstat(2)` (such as `ESTALE`) or of `F_GET_SEALS`.
    pub fn of(fd: impl AsFd) -> io::Result<Identity> {
        let fd = fd.as_fd();
        let stat = fstat(fd)?;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Kind::Regular,
            FileType::Directory => Kind::Directory,
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
            FileType::Symlink => Kind::Symlink,
            FileType::BlockDevice => Kind::Block(Device::of(stat.st_rdev)),
            FileType::CharacterDevice => Kind::Char(Device::of(stat.st_rdev)),
            FileType::Unknown => Kind::Other,
        };
        let deleted = stat.st_nlink == 0;
        // A memfd never has a name, so the usual image file costs no further call.
        let seals = if kind == Kind::Regular && deleted { memfd_seals(fd)? } else { None };
        Ok(Identity {
            device: Device::of(stat.st_dev),
            inode: stat.st_ino,
            kind,
            size: if kind == Kind::Regular { u64::try_from(stat.st_size).ok() } else { None },
            seals,
            deleted,
            uid: stat.st_uid,
            gid: stat.st_gid,
            permissions: stat.st_mode & 0o7777,
        })
    }

    /// Whether both name the same bytes: one inode, or one block device under any of its names.
    pub fn same_file(&self, other: &Identity) -> bool {
        self.key() == other.key()
    }

    pub(crate) fn key(&self) -> (Kind, Device, u64) {
        match self.kind {
            Kind::Block(device) | Kind::Char(device) => (self.kind, device, 0),
            _ => (self.kind, self.device, self.inode),
        }
    }

    /// Whether the permission bits let a process of `uid` and `gid`, without capabilities, open the file for writing:
    /// such a process can turn a read-only descriptor into a writable one through `/proc/self/fd`.
    pub fn writable_by(&self, uid: u32, gid: u32) -> bool {
        let class = if self.uid == uid {
            0o200
        } else if self.gid == gid {
            0o020
        } else {
            0o002
        };
        self.permissions & class != 0
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, device {}, inode {}", self.kind, self.device, self.inode)?;
        if let Some(seals) = self.seals {
            write!(f, ", seals {seals}")?;
        }
        f.write_str(if self.deleted { ", deleted" } else { "" })
    }
}

/// The seals, if `fd` (a regular file without a name) is a memfd.
fn memfd_seals(fd: impl AsFd) -> io::Result<Option<Seals>> {
    let fd = fd.as_fd();
    let seals = match fcntl_get_seals(fd) {
        Ok(seals) => seals,
        // Not a file in memory.
        Err(Errno::INVAL) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    // An unlinked file of a mounted tmpfs answers F_SEAL_SEAL, and so does a memfd that takes no seals. The kernel's own
    // mount, where memfds live, has no size; when in doubt it is a memfd, which is the stricter reading.
    let mounted = seals == SealFlags::SEAL && fstatvfs(fd).is_ok_and(|fs| fs.f_blocks > 0);
    Ok(if mounted { None } else { Some(Seals(seals)) })
}

/// The process at the other end, as `SO_PEERCRED` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    /// Process id when it connected; it may be another process by now.
    pub pid: i32,
    /// User id: what quotas and ownership go by, since a new pid costs nothing.
    pub uid: u32,
}

/// Where a descriptor came from. The default says nothing: a disk, from nobody in particular.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Provenance {
    /// Who passed it; `None` for the command line.
    pub peer: Option<Peer>,
    /// When.
    pub at: Option<SystemTime>,
    /// What it is meant to be.
    pub role: Role,
    /// Whose leaving ends its life.
    pub keeper: Keeper,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn owner_class_alone_decides_for_the_owner() {
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        let mut identity = Identity::of(&file).unwrap();
        (identity.uid, identity.gid, identity.permissions) = (1000, 100, 0o422);
        assert!(!identity.writable_by(1000, 100), "the owner's class has no write bit, the others' do not count");
        assert!(identity.writable_by(1001, 100));
        assert!(identity.writable_by(1001, 101));
        identity.permissions = 0o200;
        assert!(identity.writable_by(1000, 0));
        assert!(!identity.writable_by(1001, 100));
    }

    #[test]
    fn seals_are_listed_by_name() {
        assert_eq!(Seals::from_bits(0).to_string(), "none");
        assert_eq!(Seals(SealFlags::SHRINK | SealFlags::WRITE).to_string(), "shrink,write");
    }
}
