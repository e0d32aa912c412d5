// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The manager: it opens and never parses.
//!
//! [`opening`] opens images by the user's word, [`policy`] by an administrator's. [`chain`] learns what an image is built from: it asks the confined [`inspector`], a
//! process that gets one descriptor and answers in JSON, and resolves the names it hears about by policy. [`daemon`] starts
//! the confined daemon and talks QMP to it, and [`kept`] starts another when it dies, by the [`journal`] of what it was passed
//! and told; [`disk`] passes it the descriptors of a chain and says what to build of them. [`fuse`] mounts what the daemon
//! serves as a file. [`overlay`] keeps an image as it is,
//! and [`directory`] opens a directory that becomes one. [`serve`] puts these together for one
//! disk, [`service`] for many users. [`attest`] lays out bait for a confined process.

pub mod attest;
pub mod chain;
pub mod daemon;
pub mod directory;
pub mod disk;
mod error;
pub mod fuse;
pub mod inspector;
pub mod journal;
pub mod kept;
mod listening;
pub mod monitor;
pub mod opening;
pub mod overlay;
pub mod policy;
pub mod serve;
pub mod service;
pub mod tls;
mod upgrade;
pub mod written_back;

pub use error::{Error, Result};
