// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QEMU's fd sets as a library: named sets of passed file descriptors, opened again by access mode.
//!
//! A privileged manager opens files and passes the descriptors over a UNIX socket; a confined program uses them and can
//! open nothing itself. Fd sets are the meeting place. The manager says `add-fd` and gets a set's id; whoever needs the
//! file opens `/dev/fdset/N` with the access mode that it wants, and gets a duplicate of the descriptor that was opened
//! exactly so. One set may hold a file twice, read-only and read-write, so that a user can go from one to the other.
//!
//! ```
//! use std::fs::{File, OpenOptions};
//! use std::os::unix::fs::FileExt;
//! use fdset::{Access, FdPolicy, FdSets, Settings};
//!
//! # let path = std::env::temp_dir().join(format!("fdset-doc-{}", std::process::id()));
//! # std::fs::write(&path, b"boot sector")?;
//! // In the VMM, once. Strict refuses directories, sockets, unsealed memfds and the like.
//! let sets = FdSets::with(Settings { policy: FdPolicy::Strict, ..Settings::default() });
//!
//! // On `add-fd`: descriptors as they arrive with SCM_RIGHTS, here twice the same image.
//! let read_only = File::open(&path)?;
//! let read_write = OpenOptions::new().read(true).write(true).open(&path)?;
//! # std::fs::remove_file(&path)?;
//! let added = sets.add(read_only.into(), None, Some("disk0, read-only".into()))?;
//! sets.add(read_write.into(), Some(added.set_id), None)?;
//!
//! // Where the block layer would open a file. The duplicate keeps the set alive and goes back when it is dropped.
//! let disk = sets.open_path(&format!("/dev/fdset/{}", added.set_id), Access::READ_WRITE)?;
//! # use std::os::fd::AsFd;
//! let file = File::from(disk.as_fd().try_clone_to_owned()?);
//! file.write_all_at(b"B", 0)?;
//!
//! // On `remove-fd`. What is open stays open; with the last duplicate the set goes.
//! sets.remove(added.set_id, None)?;
//! assert_eq!(sets.list().map(|set| (set.id(), set.fds().len())).collect::<Vec<_>>(), [(0, 0)]);
//! drop(disk);
//! assert_eq!(sets.list().len(), 0);
//!
//! // What QMP clients are told is what QEMU tells them; `detail` tells people more.
//! let error = sets.open(0, Access::READ_ONLY).unwrap_err();
//! assert_eq!(error.to_string(), "Failed to find fdset /dev/fdset/0");
//! assert_eq!(error.detail(), "asked for set 0; there are no sets");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Contract
//! Ids, order of listing, choice of the descriptor, path rules and error texts are those of QEMU 10.0.2. Three things
//! differ on purpose: an open [never sets flags](FdSets::open) on the descriptor, sets with ids above `i32::MAX` can be
//! opened by [id](FdSets::open), and a [`FdPolicy`], [`Quotas`] or a [`Lifetime`] may be asked for.
//!
//! # System calls
//! For the author of a seccomp filter: `fcntl` with `F_GETFL`, `F_DUPFD_CLOEXEC` and `F_GET_SEALS`; `fstat`; `fstatfs`, only for
//! unlinked files in memory; `close`; `futex`. Descriptors are taken to be close-on-exec already (`MSG_CMSG_CLOEXEC`).
//!
//! # Layout
//! - [`FdSets`] in `sets`: the operations; `state`, `table`, `ids`: what is under them.
//! - [`Access`], [`Rights`]: what is asked for, what a descriptor has. [`Dup`]: what an open gives.
//! - `/dev/fdset/N`: [`path`].
//! - [`Identity`], [`Provenance`]: what a descriptor is, where it came from. [`SetInfo`], [`FdInfo`]: listings.
//! - [`FdPolicy`], [`Quotas`], [`Lifetime`]: what is taken, how much, for how long. [`audit`]: what to warn of.

mod access;
pub mod audit;
mod dup;
mod error;
mod identity;
mod ids;
mod lifetime;
mod listing;
pub mod path;
mod policy;
mod quota;
mod sets;
mod state;
mod table;

pub use access::{Access, Mode, Rights};
pub use dup::Dup;
pub use error::{Error, Held, Refused, SetsSeen};
pub use identity::{Device, Identity, Kind, Peer, Provenance, Seals};
pub use lifetime::{InUse, Keeper, Lifetime};
pub use listing::{DupInfo, FdInfo, SetInfo};
pub use path::PREFIX;
pub use policy::{FdPolicy, Refusal, Role, refusal};
pub use quota::{Limit, Quotas};
pub use sets::{Added, FdSets, Settings};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
