// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A node as a plain file: FUSE's kernel protocol (`linux/fuse.h`, version 7) on a `/dev/fuse` that somebody else mounted.
//!
//! The mounted root is a regular file, so of the protocol only what concerns one file is left: no names, no directories,
//! no links. [`export`] takes the descriptor and runs the threads, [`request`] reads what the kernel asks, [`file`] does it,
//! [`reply`] says what came of it.
//!
//! **No page cache of the file.** Other exports may write the same node, and the kernel would go on showing the old bytes:
//! files open for direct I/O. Reads and writes of any alignment and size come through as they are; shared mappings work
//! where the kernel allows them beside direct I/O (Linux 6.6), and are then as fresh as the moment a page was first touched.

mod export;
mod file;
mod reply;
mod request;

pub use export::{Export, Session, StartError};
pub use file::{File, Settings};
pub use reply::REPLY_ROOM;
pub use request::{MAX_WRITE, Request};
