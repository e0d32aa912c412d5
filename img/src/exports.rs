// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an NBD server exports, as `qemu-nbd --list` tells it.

use std::os::fd::OwnedFd;
use std::time::Duration;

use block::nbd_list::{FLAG_NAMES, Listed, exports};
use confine::{Plan, Requirement, Role};

use crate::tool::{Error, Result, printable, say};

/// How long a server may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Confines this process, asks the server behind a fresh connection, and prints.
///
/// # Errors
/// The server does not answer as one should, or this process cannot be confined.
pub fn run(socket: OwnedFd) -> Result<()> {
    confine::confine(&Plan::new(Role::Client).requiring(Requirement::default()))?;
    let socket: block::Descriptor = Box::new(socket);
    let listed = exports(&socket, PATIENCE);
    say(&describe(&listed.map_err(|e| Error::Text(format!("could not learn what the server exports: {e}")))?))
}

/// As qemu-nbd says it.
fn describe(listed: &[Listed]) -> String {
    let mut said = format!("exports available: {}\n", listed.len());
    let mut line = |line: std::fmt::Arguments<'_>| {
        said.push_str(&line.to_string());
        said.push('\n');
    };
    for export in listed {
        line(format_args!(" export: '{}'", printable(&export.name)));
        if !export.description.is_empty() {
            line(format_args!("  description: {}", printable(&export.description)));
        }
        if let Some(size) = export.size {
            line(format_args!("  size:  {size}"));
            let names = FLAG_NAMES.iter().filter(|(bit, _)| export.flags >> bit & 1 == 1).map(|(_, name)| *name);
            let names: Vec<&str> = names.collect();
            line(format_args!("  flags: {:#x} ( {} )", export.flags, names.join(" ")));
        }
        if let Some([min, opt, max]) = export.blocks {
            line(format_args!("  min block: {min}"));
            line(format_args!("  opt block: {opt}"));
            line(format_args!("  max block: {max}"));
        }
        if let Some(is_extended) = export.is_extended {
            line(format_args!("  transaction size: {}-bit", if is_extended { 64 } else { 32 }));
        }
        if !export.contexts.is_empty() {
            line(format_args!("  available meta contexts: {}", export.contexts.len()));
            for context in &export.contexts {
                line(format_args!("   {}", printable(context)));
            }
        }
    }
    said
}
