// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What serves block nodes to clients.
//!
//! An export is a node under a name. Its clients' bytes are foreign, so everything here treats them as hostile; its sockets
//! arrive as descriptors, so nothing here opens, binds or connects. [`nbd`], [`fuse`] and [`vhost_user_blk`] are
//! protocols, [`Workers`] are the
//! threads that sleep in NBD's stead; [`Running`] is what all have in common.

mod attention;
pub mod fuse;
mod meter;
pub mod nbd;
mod rings;
mod running;
pub mod vhost_user_blk;
mod workers;

pub use attention::Attention;
pub use meter::Meter;
pub use rings::{Borrowed, Rings};
pub use running::{ClientShown, Running};
pub use workers::Workers;
