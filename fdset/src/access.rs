// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Access modes: what an open asks for ([`Access`]) and what a descriptor has ([`Rights`]). They must agree exactly.
//!
//! A read-write descriptor does not serve a read-only open: whoever passed it may count on read-only users staying so.
//! `O_DIRECT` must agree as well, both ways. No other flag takes part in the match.

use std::fmt;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{OFlags, fcntl_getfl};

/// The access mode of `open(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// `O_RDONLY`.
    ReadOnly,
    /// `O_WRONLY`.
    WriteOnly,
    /// `O_RDWR`.
    ReadWrite,
    /// Linux's mode 3: device requests only, neither reading nor writing.
    Neither,
}

impl Mode {
    fn of(flags: OFlags) -> Mode {
        let mode = flags & OFlags::ACCMODE;
        if mode == OFlags::RDONLY {
            Mode::ReadOnly
        } else if mode == OFlags::WRONLY {
            Mode::WriteOnly
        } else if mode == OFlags::RDWR {
            Mode::ReadWrite
        } else {
            Mode::Neither
        }
    }

    /// Whether the descriptor can change the file's bytes.
    pub fn writes(self) -> bool {
        matches!(self, Mode::WriteOnly | Mode::ReadWrite)
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mode::ReadOnly => "read-only",
            Mode::WriteOnly => "write-only",
            Mode::ReadWrite => "read-write",
            Mode::Neither => "without reading or writing",
        })
    }
}

/// What an open asks for.
///
/// ```
/// use fdset::Access;
/// assert_eq!(Access::READ_WRITE.direct().to_string(), "read-write direct");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access(OFlags);

impl Access {
    /// `O_RDONLY`.
    pub const READ_ONLY: Access = Access(OFlags::RDONLY);
    /// `O_WRONLY`: a stream written once, such as an outgoing migration.
    pub const WRITE_ONLY: Access = Access(OFlags::WRONLY);
    /// `O_RDWR`.
    pub const READ_WRITE: Access = Access(OFlags::RDWR);
    /// `O_RDWR | O_CREAT`, as for `blockdev-create`. Nothing is created or truncated: the caller does that with the dup.
    pub const CREATE: Access = Access(OFlags::RDWR.union(OFlags::CREATE));

    /// The same with `O_DIRECT`.
    #[must_use]
    pub fn direct(self) -> Access {
        Access(self.0 | OFlags::DIRECT)
    }

    /// The flag word of an `open(2)` call. `O_CLOEXEC` is dropped, as every dup has it; `O_TRUNC` is the caller's to act on.
    pub fn from_open_flags(flags: u32) -> Access {
        Access(OFlags::from_bits_retain(flags).difference(OFlags::CLOEXEC))
    }

    /// The whole flag word, as QEMU's error text shows it.
    pub fn open_flags(self) -> u32 {
        self.0.bits()
    }

    /// The access mode alone.
    pub fn mode(self) -> Mode {
        Mode::of(self.0)
    }

    /// Whether a descriptor with `rights` serves this.
    pub fn matches(self, rights: Rights) -> bool {
        let compared = OFlags::ACCMODE | OFlags::DIRECT;
        (self.0 ^ rights.0) & compared == OFlags::empty()
    }

    /// Whether asked and actual agree on `O_SYNC` and `O_DSYNC`, which no dup can change without changing it for all.
    pub(crate) fn agrees_on_sync(self, rights: Rights) -> bool {
        (self.0 ^ rights.0) & OFlags::SYNC == OFlags::empty()
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        words(f, self.0, &[(OFlags::DIRECT, "direct"), (OFlags::CREATE, "create"), (OFlags::SYNC, "sync")])
    }
}

/// What a descriptor has: the flags of its open file description (`F_GETFL`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights(OFlags);

impl Rights {
    /// Asks the kernel. The access mode never changes; whoever shares the description may change the other flags.
    ///
    /// # Errors
    /// The errno of `fcntl(2)`, which only a seccomp filter can bring about.
    pub fn of(fd: impl AsFd) -> io::Result<Rights> {
        Ok(Rights(fcntl_getfl(fd)?))
    }

    /// The access mode alone.
    pub fn mode(self) -> Mode {
        Mode::of(self.0)
    }

    /// `O_DIRECT`.
    pub fn direct(self) -> bool {
        self.0.contains(OFlags::DIRECT)
    }

    /// `O_APPEND`: writes go to the end, whatever offset they name.
    pub fn append(self) -> bool {
        self.0.contains(OFlags::APPEND)
    }

    /// `O_SYNC` or `O_DSYNC`.
    pub fn sync(self) -> bool {
        self.0.intersects(OFlags::SYNC)
    }

    /// `O_PATH`: names a file without the right to read or write it.
    pub fn path_only(self) -> bool {
        self.0.contains(OFlags::PATH)
    }
}

impl fmt::Display for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path_only() {
            return f.write_str("path-only");
        }
        words(f, self.0, &[(OFlags::DIRECT, "direct"), (OFlags::APPEND, "append"), (OFlags::SYNC, "sync")])
    }
}

/// The mode, then a word for each flag that has any of its bits set.
fn words(f: &mut fmt::Formatter<'_>, flags: OFlags, names: &[(OFlags, &str)]) -> fmt::Result {
    write!(f, "{}", Mode::of(flags))?;
    names.iter().filter(|(flag, _)| flags.intersects(*flag)).try_for_each(|(_, name)| write!(f, " {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mode_and_direct_take_part_in_the_match() {
        let rights = |flags: OFlags| Rights(flags);
        assert!(Access::READ_ONLY.matches(rights(OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOATIME)));
        assert!(Access::CREATE.matches(rights(OFlags::RDWR | OFlags::APPEND)));
        assert!(!Access::READ_ONLY.matches(rights(OFlags::RDWR)));
        assert!(!Access::READ_WRITE.matches(rights(OFlags::RDONLY)));
        assert!(!Access::READ_WRITE.matches(rights(OFlags::WRONLY)));
        assert!(!Access::READ_ONLY.matches(rights(OFlags::RDONLY | OFlags::DIRECT)));
        assert!(!Access::READ_ONLY.direct().matches(rights(OFlags::RDONLY)));
        assert!(Access::READ_ONLY.direct().matches(rights(OFlags::RDONLY | OFlags::DIRECT)));
    }

    #[test]
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64"))]
    fn dsync_alone_disagrees_with_no_sync_and_with_full_sync() {
        // Linux's generic number, asm-generic/fcntl.h. rustix 1.1 gives `DSYNC` the value of `SYNC`.
        const O_DSYNC: OFlags = OFlags::from_bits_retain(0o10000);
        let dsync = Rights(OFlags::RDWR | O_DSYNC);
        assert!(!Access::READ_WRITE.agrees_on_sync(dsync));
        assert!(!Access(OFlags::RDWR | OFlags::SYNC).agrees_on_sync(dsync));
        assert!(Access(OFlags::RDWR | O_DSYNC).agrees_on_sync(dsync));
    }

    #[test]
    fn flag_words_are_those_of_open() {
        assert_eq!(Access::READ_ONLY.open_flags(), 0);
        assert_eq!(Access::READ_WRITE.open_flags(), 2);
        assert_eq!(Access::CREATE.open_flags(), 0x42);
        #[cfg(target_arch = "x86_64")]
        assert_eq!(Access::READ_WRITE.direct().open_flags(), 0x4002);
        assert_eq!(Access::from_open_flags(OFlags::CLOEXEC.bits() | 2), Access::READ_WRITE);
    }
}
