// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `map`: where the bytes of an image are stored, through its whole chain.

use block::Place;

use confine::Requirement;

use crate::disk::{Disk, Layer, Usage};
use crate::tool::{Error, Result, confine, say};

/// What is asked.
pub struct Request {
    /// The chain.
    pub layers: Vec<Layer>,
    /// First byte.
    pub start: u64,
    /// Bytes, to the end at most.
    pub len: Option<u64>,
    /// Answer in JSON.
    pub json: bool,
    /// Others may write at the same time.
    pub force_share: bool,
    /// Which layers of confinement must be had.
    pub confinement: Requirement,
}

/// Tells; the exit status.
///
/// # Errors
/// The image cannot be opened or followed.
pub fn run(request: Request) -> Result<u8> {
    let Request { layers, start, len, json, force_share, confinement } = request;
    confine(confinement)?;
    let disk = Disk::open(layers, Usage { writable: false, force_share, unflushed: false })?;
    let end = len.map_or(disk.node.len(), |len| start.saturating_add(len).min(disk.node.len()));
    let heading = format!("{:<16}{:<16}{:<16}File\n", "Offset", "Length", "Mapped to");
    let mut out = Rows { json, is_first: true, text: if json { String::new() } else { heading } };
    let mut pending: Option<(u64, Place)> = None;
    let mut at = start;
    while at < end {
        let place = disk
            .node
            .place(at, end - at)
            .map_err(|e| Error::Text(format!("error while reading block status at offset {at}: {e}")))?;
        let next = at + place.len;
        pending = Some(match pending.take() {
            Some((from, before)) if continues(&before, &place) => {
                (from, Place { len: before.len + place.len, ..before })
            }
            Some((from, before)) => {
                out.row(from, &before)?;
                (at, place)
            }
            None => (at, place),
        });
        at = next;
    }
    out.end(pending)?;
    Ok(0)
}

fn continues(before: &Place, next: &Place) -> bool {
    let kind = |place: &Place| (place.depth, place.is_present, place.is_zero, place.is_compressed);
    kind(before) == kind(next)
        && before.file == next.file
        && match (before.offset, next.offset) {
            (Some(before_at), Some(at)) => before_at + before.len == at,
            (None, None) => true,
            _ => false,
        }
}

struct Rows {
    json: bool,
    is_first: bool,
    text: String,
}

impl Rows {
    fn row(&mut self, start: u64, place: &Place) -> Result<()> {
        let Place { len, depth, is_present, is_zero, is_compressed, .. } = *place;
        if self.json {
            self.text += if self.is_first { "[" } else { ",\n" };
            let data = !is_zero;
            self.text += &format!(
                "{{ \"start\": {start}, \"length\": {len}, \"depth\": {depth}, \"present\": {is_present}, \"zero\": {is_zero}, \
                 \"data\": {data}, \"compressed\": {is_compressed}"
            );
            if let Some(offset) = place.offset {
                self.text += &format!(", \"offset\": {offset}");
            }
            self.text += "}";
        } else {
            if !is_zero {
                let Some(offset) = place.offset else {
                    say(&std::mem::take(&mut self.text))?;
                    return Err(Error::Text("File contains external, encrypted or compressed clusters.".into()));
                };
                let hex = |number: u64| if number == 0 { "0".to_owned() } else { format!("{number:#x}") };
                self.text += &format!("{:<16}{:<16}{:<16}{}\n", hex(start), hex(len), hex(offset), place.file);
            }
        }
        self.is_first = false;
        if self.text.len() > 1 << 16 { say(&std::mem::take(&mut self.text)) } else { Ok(()) }
    }

    fn end(mut self, last: Option<(u64, Place)>) -> Result<()> {
        if let Some((start, place)) = last {
            self.row(start, &place)?;
        }
        if self.json {
            self.text += if self.is_first { "[]\n" } else { "]\n" };
        }
        say(&self.text)
    }
}
