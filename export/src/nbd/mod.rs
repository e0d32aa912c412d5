// SPDX-License-Identifier: Apache-2.0 OR MIT
//! NBD, the network block device protocol (proto.md of the NBD project).
//!
//! A connection's way: [`server`] accepts it, [`handshake`] negotiates an export, [`transmission`] serves its requests until
//! it ends. [`proto`] has the numbers and headers, [`reply`] makes replies, [`buffers`] and [`stream`] move bytes, and
//! [`completions`] brings back what workers finished.

mod buffers;
mod completions;
mod export;
mod handshake;
pub mod proto;
mod reply;
mod server;
mod stream;
mod transmission;

pub use export::{Export, Settings};
pub use server::{Limits, Server};
