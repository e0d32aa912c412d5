// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an NBD server exports (`NBD_OPT_LIST`, `NBD_OPT_INFO`, `NBD_OPT_LIST_META_CONTEXT`).

use std::io;
use std::time::Duration;

use super::handshake::{INFO, META_CONTEXT, Style, Talk, string};
use super::wire::{broken, field};
use crate::host::Descriptor;

const LIST: u32 = 3;
const INFO_OPTION: u32 = 6;
const LIST_META_CONTEXT: u32 = 9;
/// A reply with an export's name.
const SERVER: u32 = 2;

/// An export as its server tells of it. Texts are the server's: anything may be in them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Its description; empty for none.
    pub description: String,
    /// Bytes; `None` if the server tells nothing but names.
    pub size: Option<u64>,
    /// Transmission flags.
    pub flags: u16,
    /// Smallest, preferred and largest request, bytes.
    pub blocks: Option<[u32; 3]>,
    /// Whether requests may have lengths of 64 bits, if the server has structured replies at all.
    pub is_extended: Option<bool>,
    /// The meta contexts that can be asked for.
    pub contexts: Vec<String>,
}

/// Asks the server behind a fresh connection, within `limit`, which exports it has.
///
/// # Errors
/// The server hangs up, breaks the protocol, is too slow (`TimedOut`), or does not tell; a sentence says which.
pub fn exports(socket: &Descriptor, limit: Duration) -> io::Result<Vec<Listed>> {
    let mut talk = Talk::within(socket, limit);
    let (style, _) = talk.greet()?;
    let Some(replies) = talk.option(LIST, &[])? else {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "the server does not tell what it exports"));
    };
    let mut listed = Vec::new();
    for (_, payload) in replies.iter().filter(|(kind, _)| *kind == SERVER) {
        let Some((len, rest)) = payload.split_first_chunk() else { return Err(malformed()) };
        let len = usize::try_from(u32::from_be_bytes(*len)).unwrap_or(usize::MAX);
        let Some((name, description)) = rest.split_at_checked(len) else { return Err(malformed()) };
        let mut export = Listed { name: text(name), description: text(description), ..Listed::default() };
        export.is_extended = (style != Style::Simple).then_some(style == Style::Extended);
        // The name as it came: what is no UTF-8 is asked for all the same.
        export.ask(&mut talk, name)?;
        listed.push(export);
    }
    Ok(listed)
}

impl Listed {
    /// Learns what the server tells of the export called `name`; nothing, if it does not.
    fn ask(&mut self, talk: &mut Talk<'_>, name: &[u8]) -> io::Result<()> {
        // Three information requests: name, description, block sizes.
        let payload = [&string(name)[..], &[0, 3, 0, 1, 0, 2, 0, 3]].concat();
        for (_, info) in talk.option(INFO_OPTION, &payload)?.iter().flatten().filter(|(kind, _)| *kind == INFO) {
            let Some((kind, info)) = info.split_first_chunk() else { return Err(malformed()) };
            match (u16::from_be_bytes(*kind), info.len()) {
                (0, 10) => {
                    self.size = Some(u64::from_be_bytes(field(info, 0)));
                    self.flags = u16::from_be_bytes(field(info, 8));
                }
                (2, _) => self.description = text(info),
                (3, 12) => self.blocks = Some([0, 4, 8].map(|at| u32::from_be_bytes(field(info, at)))),
                (0 | 3, _) => return Err(malformed()),
                _ => {}
            }
        }
        // All contexts: no query.
        if self.is_extended.is_some() {
            let payload = [&string(name)[..], &[0; 4]].concat();
            let replies = talk.option(LIST_META_CONTEXT, &payload)?.unwrap_or_default();
            let contexts = replies.iter().filter(|(kind, payload)| *kind == META_CONTEXT && payload.len() >= 4);
            self.contexts = contexts.map(|(_, payload)| text(&payload[4..])).collect();
        }
        Ok(())
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn malformed() -> io::Error {
    broken("the server's answer to an option is malformed")
}

/// Names of [`Listed::flags`], by their number.
pub const FLAG_NAMES: [(u16, &str); 12] = [
    (1, "readonly"),
    (2, "flush"),
    (3, "fua"),
    (4, "rotational"),
    (5, "trim"),
    (6, "zeroes"),
    (7, "df"),
    (8, "multi"),
    (9, "resize"),
    (10, "cache"),
    (11, "fast-zero"),
    (12, "block-status-payload"),
];
