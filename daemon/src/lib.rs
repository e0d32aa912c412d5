// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The confined storage daemon: it parses and never opens.
//!
//! [`run`] reads the command line, takes over every descriptor that was named there, confines the process, and serves. From
//! then on [`control`] is the one thread that owns the state ([`state::Daemon`]); its [`monitor`]s bring commands, which
//! stand in one table ([`commands`]); exports answer their clients on threads of their own.

mod command_line;
pub mod commands;
pub mod control;
mod exports;
pub mod monitor;
mod opening;
pub mod state;
mod wake;

pub use command_line::{UsageError, run};
pub use wake::Wake;
