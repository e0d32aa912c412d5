// SPDX-License-Identifier: Apache-2.0 OR MIT
//! NBD, the network block device protocol (proto.md of the NBD project).
//!
//! A connection's way: [`server`] accepts it, [`handshake`] negotiates an export, [`transmission`] serves its requests until
//! it ends. [`proto`] has the numbers and headers, [`reply`] and [`status`] make replies, [`context`] says what a client can
//! learn besides bytes. [`buffers`] gather bytes for a [`channel`], which is a [`stream`] in clear or [`tls`] over it, and
//! [`completions`] brings back what workers finished, [`reads`] what rings read; the [`way`] to a client lets nobody wait for him.
//! Between requests a client may be [`moving`] to another process.

mod buffers;
mod channel;
mod completions;
mod context;
mod export;
mod handshake;
mod moving;
mod name;
pub mod proto;
mod reads;
mod reply;
mod server;
mod status;
mod stream;
pub mod tls;
mod transmission;
mod way;

pub use context::{Bitmap, DirtyRuns};
pub use export::{Export, Settings};
pub use moving::Moved;
pub use reply::Style;
pub use server::{Admission, Limits, Server};
