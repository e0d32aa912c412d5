// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which descriptors a set takes: all of them, as QEMU ([`FdPolicy::Compat`]), or those fit for their role
//! ([`FdPolicy::Strict`]).
//!
//! A descriptor can carry more power than its access mode says. A directory leads to all below it, a terminal takes typed
//! input, a read-only memfd can be opened again for writing by its owner. Strict refuses those when they arrive, with the
//! reason, rather than when they are used.

use std::fmt;

use crate::{Device, Identity, Kind, Mode, Rights};

/// What a set does with a descriptor that is passed to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FdPolicy {
    /// Takes everything, as QEMU does: for a program that stands in for QEMU.
    #[default]
    Compat,
    /// Refuses what does not fit its [`Role`]: for everyone else.
    Strict,
}

/// What a descriptor is passed for; [`FdPolicy::Strict`] holds it to that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// The bytes of an image: a regular file, a memfd or a block device.
    #[default]
    Disk,
    /// A socket.
    Socket,
    /// This character device and no other, such as `/dev/fuse` (10:229) or `/dev/kvm` (10:232).
    Device(Device),
}

/// Why [`FdPolicy::Strict`] refuses a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Refusal {
    /// `O_PATH`: neither readable nor writable, yet a way to the file.
    PathOnly,
    /// A directory, a way to everything below it.
    Directory,
    /// A pipe: no positioned reads, and it may block for ever.
    Fifo,
    /// A socket where a disk was meant.
    Socket,
    /// `/dev/mem`, `/dev/kmem`, `/dev/port` or `/dev/kmsg`.
    MemoryDevice,
    /// A terminal, which takes typed input from whoever holds it.
    Terminal,
    /// Another character device than the role names.
    CharDevice,
    /// No file at all: an eventfd, an epoll instance, …
    NotAFile,
    /// A writer with `O_APPEND`, whose writes all land at the end.
    AppendForWriting,
    /// A descriptor with `O_SYNC` or `O_DSYNC`, which no open would match.
    Sync,
    /// A memfd passed read-only that its owner can open again for writing.
    UnsealedMemfd,
    /// A memfd passed read-only that can be truncated under its readers.
    ShrinkableMemfd,
    /// A memfd passed for writing that no one can write.
    SealedMemfd,
    /// Something other than the socket or device that the role names.
    NotTheRole,
}

impl Refusal {
    /// Short name, for a metric's label.
    pub fn name(self) -> &'static str {
        self.texts().0
    }

    /// Name, and the end of a sentence that begins with "it".
    fn texts(self) -> (&'static str, &'static str) {
        match self {
            Refusal::PathOnly => ("path-only", "was opened with O_PATH, which gives neither reading nor writing"),
            Refusal::Directory => ("directory", "is a directory"),
            Refusal::Fifo => ("fifo", "is a pipe"),
            Refusal::Socket => ("socket", "is a socket"),
            Refusal::MemoryDevice => ("memory-device", "is a device of the kernel's memory, ports or log"),
            Refusal::Terminal => ("terminal", "is a terminal"),
            Refusal::CharDevice => ("char-device", "is a character device"),
            Refusal::NotAFile => ("not-a-file", "is not a file"),
            Refusal::AppendForWriting => {
                ("append", "was opened for writing with O_APPEND: every write would go to the end")
            }
            Refusal::Sync => ("sync", "was opened with O_SYNC or O_DSYNC: no open would match; flush instead"),
            Refusal::UnsealedMemfd => (
                "unsealed-memfd",
                "is a memfd given read-only without F_SEAL_WRITE: it can be opened again for writing",
            ),
            Refusal::ShrinkableMemfd => {
                ("shrinkable-memfd", "is a memfd given read-only without F_SEAL_SHRINK: it can be cut short")
            }
            Refusal::SealedMemfd => ("sealed-memfd", "is a memfd given for writing that is sealed against writing"),
            Refusal::NotTheRole => ("not-the-role", "is not what it was passed as"),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.texts().1)
    }
}

/// Why [`FdPolicy::Strict`] refuses such a descriptor in `role`; `None` if it does not.
pub fn refusal(role: Role, rights: Rights, identity: &Identity) -> Option<Refusal> {
    if rights.path_only() {
        return Some(Refusal::PathOnly);
    }
    match (role, identity.kind) {
        (_, Kind::Char(device)) if MEMORY_DEVICES.contains(&device) => Some(Refusal::MemoryDevice),
        (Role::Disk, Kind::Regular | Kind::Block(_)) => unfit_disk(rights, identity),
        (Role::Disk, kind) => Some(match kind {
            Kind::Directory => Refusal::Directory,
            Kind::Fifo => Refusal::Fifo,
            Kind::Socket => Refusal::Socket,
            Kind::Char(device) if is_terminal(device) => Refusal::Terminal,
            Kind::Char(_) => Refusal::CharDevice,
            _ => Refusal::NotAFile,
        }),
        (Role::Socket, Kind::Socket) => None,
        (Role::Device(named), Kind::Char(device)) if named == device => None,
        _ => Some(Refusal::NotTheRole),
    }
}

fn unfit_disk(rights: Rights, identity: &Identity) -> Option<Refusal> {
    let writes = rights.mode().writes();
    if writes && rights.append() {
        return Some(Refusal::AppendForWriting);
    }
    if rights.sync() {
        return Some(Refusal::Sync);
    }
    match (rights.mode(), identity.seals) {
        (Mode::Neither, _) => Some(Refusal::PathOnly),
        (Mode::ReadOnly, Some(seals)) if !seals.against_writing() => Some(Refusal::UnsealedMemfd),
        // A memfd sealed against writing alone can still be opened for writing and truncated.
        (Mode::ReadOnly, Some(seals)) if !seals.against_shrinking() => Some(Refusal::ShrinkableMemfd),
        (_, Some(seals)) if writes && seals.against_writing() => Some(Refusal::SealedMemfd),
        _ => None,
    }
}

/// Linux `admin-guide/devices.txt`, 1 char: `/dev/mem`, `/dev/kmem`, `/dev/port`, `/dev/kmsg`.
const MEMORY_DEVICES: [Device; 4] = [
    Device { major: 1, minor: 1 },
    Device { major: 1, minor: 2 },
    Device { major: 1, minor: 4 },
    Device { major: 1, minor: 11 },
];

/// Whether `device` is a terminal by its major number: virtual and serial consoles, `/dev/tty`, pseudo-terminals, and the
/// usual USB, ACM, virtio and ARM serial lines. Asking it (`isatty`) would take an `ioctl`, which a confined process may
/// not have; the answer only chooses between two refusals.
fn is_terminal(device: Device) -> bool {
    matches!(device.major, 4 | 5 | 136..=143 | 166 | 188 | 204 | 229)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn char_device(major: u32, minor: u32) -> (Rights, Identity) {
        let null = std::fs::File::open("/dev/null").unwrap();
        let identity = Identity::of(&null).unwrap();
        (Rights::of(&null).unwrap(), Identity { kind: Kind::Char(Device { major, minor }), ..identity })
    }

    #[test]
    fn memory_devices_are_refused_even_when_the_role_names_them() {
        for device in MEMORY_DEVICES {
            let (rights, identity) = char_device(device.major, device.minor);
            assert_eq!(refusal(Role::Disk, rights, &identity), Some(Refusal::MemoryDevice));
            assert_eq!(refusal(Role::Device(device), rights, &identity), Some(Refusal::MemoryDevice));
        }
    }

    #[test]
    fn terminals_are_told_from_other_character_devices() {
        for (major, expected) in [(4, Refusal::Terminal), (136, Refusal::Terminal), (10, Refusal::CharDevice)] {
            let (rights, identity) = char_device(major, 64);
            assert_eq!(refusal(Role::Disk, rights, &identity), Some(expected));
        }
    }

    #[test]
    fn fuse_kvm_and_vfio_pass_in_their_own_role_only() {
        for minor in [229, 232, 196] {
            let (rights, identity) = char_device(10, minor);
            let role = Role::Device(Device { major: 10, minor });
            assert_eq!(refusal(role, rights, &identity), None);
            assert_eq!(refusal(Role::Disk, rights, &identity), Some(Refusal::CharDevice));
            assert_eq!(refusal(Role::Socket, rights, &identity), Some(Refusal::NotTheRole));
        }
    }
}
