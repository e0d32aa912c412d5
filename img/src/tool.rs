// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What every verb does first and last: confine the process, and answer.

use std::io::{self, Write};

use confine::{Plan, Requirement, Role};

/// Why a verb was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A layer of confinement is missing.
    #[error(transparent)]
    Confine(#[from] confine::Error),
    /// The image, or what is to be done to it.
    #[error(transparent)]
    Block(#[from] block::Error),
    /// In words.
    #[error("{0}")]
    Text(String),
    /// Standard output is closed.
    #[error("could not answer: {0}")]
    Output(#[source] io::Error),
}

/// The result of a verb: its exit status.
pub type Result<T> = std::result::Result<T, Error>;

/// Confines the process: from here on it opens nothing. What it was told to work on is open already.
///
/// # Errors
/// A layer that `confinement` requires cannot be had.
pub fn confine(confinement: Requirement) -> Result<()> {
    // Its rules stand in a file, which is out of reach afterwards.
    sys::clock::learn_zone();
    let plan = Plan::new(Role::Tool);
    confine::confine(&plan.requiring(confinement))?;
    Ok(())
}

/// Says something on standard output.
///
/// # Errors
/// It is closed.
pub fn say(text: &str) -> Result<()> {
    io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()).map_err(Error::Output)
}

/// Says a line on standard error, where it can be said.
pub fn warn(text: &str) {
    let _ = io::stderr().write_all(format!("{text}\n").as_bytes());
}

/// JSON as qemu-img prints it: four blanks a level.
///
/// # Errors
/// As [`say`].
pub fn say_json(value: &serde_json::Value) -> Result<()> {
    let mut bytes = Vec::new();
    let style = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut out = serde_json::Serializer::with_formatter(&mut bytes, style);
    serde::Serialize::serialize(value, &mut out).map_err(|e| Error::Text(e.to_string()))?;
    bytes.push(b'\n');
    say(&String::from_utf8_lossy(&bytes))
}

/// Text from an image for a terminal: what could steer that is escaped.
pub fn printable(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}
