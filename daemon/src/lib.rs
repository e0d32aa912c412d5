// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The confined storage daemon: it parses and never opens.
//!
//! [`run`] reads the command line, takes over every descriptor that was named there, confines the process, and serves. From
//! then on [`control`] is the one thread that owns the state ([`state::Daemon`]); its [`monitor`]s bring commands, which
//! stand in one table ([`commands`]); exports answer their clients on threads of their own.

mod aio;
mod alarms;
pub mod attest;
mod authz;
mod background;
mod command_line;
pub mod commands;
pub mod control;
mod exports;
pub mod jobs;
pub mod ledger;
pub mod metrics;
pub mod monitor;
pub mod objects;
mod opening;
pub mod remotes;
pub mod reserve;
pub mod state;
pub mod sweeper;
mod wake;
pub mod wants;

pub use command_line::{Style, UsageError, run};
pub use fdset::FdPolicy;
pub use wake::Wake;
