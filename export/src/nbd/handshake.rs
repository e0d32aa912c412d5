// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The fixed newstyle negotiation (proto.md, "Fixed newstyle negotiation"): from a fresh connection to an export and what
//! was agreed about it, or to nothing.

use std::io;
use std::sync::{Arc, Weak};
use std::time::Instant;

use super::channel::Channel;
use super::context::{Chosen, Context};
use super::export::Export;
use super::proto::{self, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, MAX_STRING, info, opt, rep};
use super::reply::Style;
use super::tls::Tls;

/// Longest option whose payload is looked at, bytes; `SET_META_CONTEXT` with many queries is the largest in honest use.
const MAX_OPTION: u32 = 64 << 10;
/// Longest option that is skipped to give an answer, bytes; beyond it the client is hung up on.
const MAX_SKIPPED: u32 = 32 << 20;
/// Most queries in one metadata context option.
const MAX_QUERIES: u32 = 1024;

/// What client and server agreed on.
pub struct Agreed {
    /// The export that was chosen.
    pub export: Arc<Export>,
    /// How requests and replies look.
    pub style: Style,
    /// What the client may ask about ranges.
    pub contexts: Arc<[Chosen]>,
}

/// What a server has for its clients to choose from.
pub trait Exports {
    /// The export called `name`, exactly.
    fn named(&self, name: &str) -> Option<Arc<Export>>;
    /// All of them, in order of name.
    fn all(&self) -> Vec<Arc<Export>>;
    /// The TLS that clients must begin before anything else.
    fn tls(&self) -> Option<&Tls>;
}

struct Negotiation<'a> {
    channel: &'a mut Channel,
    exports: &'a dyn Exports,
    deadline: Option<Instant>,
    no_zeroes: bool,
    said: Said,
}

/// What the client has said so far. All of it is forgotten when TLS begins: anybody on the way could have said it.
struct Said {
    style: Style,
    /// The export that contexts were set for, and the contexts: they hold only for that one.
    contexts: Option<(Weak<Export>, Arc<[Chosen]>)>,
}

impl Said {
    const NOTHING: Said = Said { style: Style::Simple, contexts: None };
}

/// Negotiates until `deadline`. `None` if the client ended it properly.
///
/// # Errors
/// A client that breaks the protocol, hangs up or is too slow.
pub fn negotiate(
    channel: &mut Channel,
    exports: &dyn Exports,
    deadline: Option<Instant>,
) -> io::Result<Option<Agreed>> {
    let mut greeting = [0; 18];
    greeting[0..8].copy_from_slice(&proto::INIT_MAGIC.to_be_bytes());
    greeting[8..16].copy_from_slice(&proto::OPTION_MAGIC.to_be_bytes());
    greeting[16..18].copy_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    channel.write_all(&greeting, deadline)?;
    let mut flags = [0; 4];
    channel.read_exact(&mut flags, deadline)?;
    let flags = u32::from_be_bytes(flags);
    if flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
        return Err(broken("unknown client flags"));
    }
    let no_zeroes = flags & u32::from(FLAG_NO_ZEROES) != 0;
    Negotiation { channel, exports, deadline, no_zeroes, said: Said::NOTHING }.run()
}

impl Negotiation<'_> {
    fn run(mut self) -> io::Result<Option<Agreed>> {
        loop {
            let mut header = [0; 16];
            self.channel.read_exact(&mut header, self.deadline)?;
            if u64::from_be_bytes(proto::field(&header, 0)) != proto::OPTION_MAGIC {
                return Err(broken("bad option magic"));
            }
            let option = u32::from_be_bytes(proto::field(&header, 8));
            let len = u32::from_be_bytes(proto::field(&header, 12));
            if len > MAX_OPTION {
                // EXPORT_NAME has no error reply: the specification leaves hanging up.
                if option == opt::EXPORT_NAME || len > MAX_SKIPPED {
                    return Err(broken("option too long"));
                }
                self.skip(len)?;
                self.refuse(option, rep::ERR_TOO_BIG, &format!("an option of {len} bytes is over {MAX_OPTION}"))?;
                continue;
            }
            let mut payload = vec![0; len as usize];
            self.channel.read_exact(&mut payload, self.deadline)?;
            if self.exports.tls().is_some() && !self.channel.is_encrypted() {
                match option {
                    opt::STARTTLS | opt::ABORT => {}
                    opt::EXPORT_NAME => return Err(broken("TLS was not begun")),
                    _ => {
                        self.refuse(
                            option,
                            rep::ERR_TLS_REQD,
                            "this server requires TLS: begin with NBD_OPT_STARTTLS",
                        )?;
                        continue;
                    }
                }
            }
            match option {
                opt::EXPORT_NAME => return self.export_name(&payload).map(Some),
                opt::ABORT => {
                    // The client may hang up without reading the answer.
                    let _ = self.reply(option, rep::ACK, &[]);
                    return Ok(None);
                }
                opt::LIST => self.list(&payload)?,
                opt::INFO | opt::GO => {
                    if let Some(agreed) = self.info_or_go(option, &payload)? {
                        return Ok(Some(agreed));
                    }
                }
                opt::STRUCTURED_REPLY | opt::EXTENDED_HEADERS => self.style(option, &payload)?,
                opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => self.meta_context(option, &payload)?,
                opt::STARTTLS => self.start_tls(&payload)?,
                _ => self.refuse(option, rep::ERR_UNSUP, "unknown option")?,
            }
        }
    }

    /// proto.md, "`NBD_OPT_EXPORT_NAME`": the old way in, which can only succeed or hang up.
    fn export_name(self, name: &[u8]) -> io::Result<Agreed> {
        if self.said.style == Style::Extended {
            return Err(broken("NBD_OPT_EXPORT_NAME after extended headers"));
        }
        let name = text(name).ok_or_else(|| broken("export name is too long or not UTF-8"))?;
        let export = self.exports.named(name).ok_or_else(|| broken("no such export"))?;
        let mut answer = Vec::with_capacity(134);
        answer.extend(export.size().to_be_bytes());
        answer.extend(export.flags(self.said.style).to_be_bytes());
        if !self.no_zeroes {
            answer.extend([0; 124]);
        }
        self.channel.write_all(&answer, self.deadline)?;
        Ok(self.agreed(export))
    }

    /// proto.md, "`NBD_OPT_STRUCTURED_REPLY`" and "`NBD_OPT_EXTENDED_HEADERS`", of which the latter includes the former.
    fn style(&mut self, option: u32, payload: &[u8]) -> io::Result<()> {
        if !payload.is_empty() {
            return self.refuse(option, rep::ERR_INVALID, "the option takes no data");
        }
        self.said.style = match (self.said.style, option) {
            (Style::Extended, opt::STRUCTURED_REPLY) => {
                return self.refuse(option, rep::ERR_EXT_HEADER_REQD, "extended headers already negotiated");
            }
            (_, opt::STRUCTURED_REPLY) => Style::Structured,
            _ => Style::Extended,
        };
        self.reply(option, rep::ACK, &[])
    }

    /// proto.md, "`NBD_OPT_STARTTLS`".
    fn start_tls(&mut self, payload: &[u8]) -> io::Result<()> {
        let Some(tls) = self.exports.tls() else {
            return self.refuse(opt::STARTTLS, rep::ERR_POLICY, "TLS is not configured on this server");
        };
        if self.channel.is_encrypted() {
            return self.refuse(opt::STARTTLS, rep::ERR_INVALID, "TLS has been started already");
        }
        if !payload.is_empty() {
            return self.refuse(opt::STARTTLS, rep::ERR_INVALID, "the option takes no data");
        }
        self.reply(opt::STARTTLS, rep::ACK, &[])?;
        let certificate = self.channel.start_tls(tls.credentials.config(), self.deadline)?;
        tls.authorize(certificate.as_deref())?;
        self.said = Said::NOTHING;
        Ok(())
    }

    fn list(&mut self, payload: &[u8]) -> io::Result<()> {
        if !payload.is_empty() {
            return self.refuse(opt::LIST, rep::ERR_INVALID, "the option takes no data");
        }
        for export in self.exports.all() {
            let mut entry = Vec::new();
            put_string(&mut entry, export.name());
            entry.extend(export.description().unwrap_or_default().bytes());
            self.reply(opt::LIST, rep::SERVER, &entry)?;
        }
        self.reply(opt::LIST, rep::ACK, &[])
    }

    /// proto.md, "`NBD_OPT_INFO` and `NBD_OPT_GO`".
    fn info_or_go(&mut self, option: u32, payload: &[u8]) -> io::Result<Option<Agreed>> {
        let Some((name, wanted)) = info_request(payload) else {
            self.refuse(option, rep::ERR_INVALID, "malformed name or information requests")?;
            return Ok(None);
        };
        let Some(export) = self.exports.named(name) else {
            self.refuse(option, rep::ERR_UNKNOWN, &format!("export '{}' not present", shown(name)))?;
            return Ok(None);
        };
        if wanted.contains(&info::NAME) {
            self.inform(option, info::NAME, export.name().as_bytes())?;
        }
        if let Some(description) = export.description().filter(|_| wanted.contains(&info::DESCRIPTION)) {
            self.inform(option, info::DESCRIPTION, description.as_bytes())?;
        }
        let block_size = export.block_size();
        let asked_block_size = wanted.contains(&info::BLOCK_SIZE);
        // A client that did not ask may send requests of any alignment: that must then be possible.
        if !asked_block_size && option == opt::GO && block_size > 1 {
            self.refuse(option, rep::ERR_BLOCK_SIZE_REQD, "request NBD_INFO_BLOCK_SIZE to use this export")?;
            return Ok(None);
        }
        let mut sizes = Vec::with_capacity(12);
        sizes.extend(block_size.to_be_bytes());
        sizes.extend(block_size.max(4096).to_be_bytes());
        sizes.extend(proto::MAX_PAYLOAD.to_be_bytes());
        self.inform(option, info::BLOCK_SIZE, &sizes)?;
        let mut details = Vec::with_capacity(10);
        details.extend(export.size().to_be_bytes());
        details.extend(export.flags(self.said.style).to_be_bytes());
        self.inform(option, info::EXPORT, &details)?;
        self.reply(option, rep::ACK, &[])?;
        Ok((option == opt::GO).then(|| self.agreed(export)))
    }

    /// proto.md, "Metadata querying": which contexts there are, and which the client wants.
    fn meta_context(&mut self, option: u32, payload: &[u8]) -> io::Result<()> {
        if self.said.style == Style::Simple {
            return self.refuse(option, rep::ERR_INVALID, "structured replies must be negotiated first");
        }
        let lists = option == opt::LIST_META_CONTEXT;
        if !lists {
            self.said.contexts = None;
        }
        let Some((name, queries)) = context_request(payload) else {
            return self.refuse(option, rep::ERR_INVALID, "malformed metadata context queries");
        };
        let Some(export) = self.exports.named(name) else {
            return self.refuse(option, rep::ERR_UNKNOWN, &format!("export '{}' not present", shown(name)));
        };
        let meant: Vec<Chosen> = (1..)
            .zip(Context::of(&export))
            .filter(|(_, context)| context.is_meant(&queries, lists))
            .map(|(id, context)| Chosen { id, context })
            .collect();
        for Chosen { id, context } in &meant {
            let mut answer = if lists { 0 } else { *id }.to_be_bytes().to_vec();
            answer.extend(context.name().bytes());
            self.reply(option, rep::META_CONTEXT, &answer)?;
        }
        if !lists {
            self.said.contexts = Some((Arc::downgrade(&export), meant.into()));
        }
        self.reply(option, rep::ACK, &[])
    }

    fn agreed(&self, export: Arc<Export>) -> Agreed {
        let contexts = match &self.said.contexts {
            Some((of, contexts)) if of.as_ptr() == Arc::as_ptr(&export) => Arc::clone(contexts),
            _ => Arc::default(),
        };
        Agreed { export, style: self.said.style, contexts }
    }

    fn inform(&mut self, option: u32, kind: u16, details: &[u8]) -> io::Result<()> {
        let mut payload = kind.to_be_bytes().to_vec();
        payload.extend(details);
        self.reply(option, rep::INFO, &payload)
    }

    fn refuse(&mut self, option: u32, error: u32, why: &str) -> io::Result<()> {
        self.reply(option, error, why.as_bytes())
    }

    fn reply(&mut self, option: u32, reply: u32, payload: &[u8]) -> io::Result<()> {
        self.channel.write_all(&proto::option_reply(option, reply, payload), self.deadline)
    }

    fn skip(&mut self, len: u32) -> io::Result<()> {
        let mut left = len as usize;
        let mut sink = [0; 4096];
        while left > 0 {
            let piece = left.min(sink.len());
            self.channel.read_exact(&mut sink[..piece], self.deadline)?;
            left -= piece;
        }
        Ok(())
    }
}

/// Name and information types of `NBD_OPT_INFO` and `NBD_OPT_GO`; `None` if the lengths do not add up.
fn info_request(payload: &[u8]) -> Option<(&str, Vec<u16>)> {
    let (name, rest) = take_string(payload)?;
    let (count, rest) = rest.split_first_chunk::<2>()?;
    let (types, odd) = rest.as_chunks::<2>();
    if !odd.is_empty() || types.len() != usize::from(u16::from_be_bytes(*count)) {
        return None;
    }
    Some((name, types.iter().map(|kind| u16::from_be_bytes(*kind)).collect()))
}

/// Name and queries of the metadata context options; `None` if the lengths do not add up or there are too many.
fn context_request(payload: &[u8]) -> Option<(&str, Vec<&str>)> {
    let (name, rest) = take_string(payload)?;
    let (count, mut rest) = rest.split_first_chunk::<4>()?;
    let count = u32::from_be_bytes(*count);
    if count > MAX_QUERIES {
        return None;
    }
    let mut queries = Vec::new();
    for _ in 0..count {
        let query;
        (query, rest) = take_string(rest)?;
        queries.push(query);
    }
    rest.is_empty().then_some((name, queries))
}

/// A string behind its 32-bit length, and what follows it.
fn take_string(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let (len, rest) = bytes.split_first_chunk::<4>()?;
    let (string, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    Some((text(string)?, rest))
}

fn put_string(out: &mut Vec<u8>, string: &str) {
    out.extend(u32::try_from(string.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend(string.bytes());
}

fn text(bytes: &[u8]) -> Option<&str> {
    if bytes.len() > MAX_STRING { None } else { std::str::from_utf8(bytes).ok() }
}

/// A client's text inside an error message: short and printable.
fn shown(name: &str) -> String {
    name.chars().take(80).flat_map(char::escape_debug).collect()
}

fn broken(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_info_request_whose_count_lies_is_malformed() {
        assert_eq!(info_request(&[0, 0, 0, 1, b'x', 0, 2, 0, 3]), None);
        assert_eq!(info_request(&[0, 0, 0, 1, b'x', 0, 1, 0, 3]), Some(("x", vec![3])));
    }

    #[test]
    fn a_string_longer_than_its_option_is_malformed() {
        assert_eq!(info_request(&[0xff, 0xff, 0xff, 0xff, b'x', 0, 0]), None);
        assert_eq!(context_request(&[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 9, b'b']), None);
    }

    #[test]
    fn a_name_over_the_limit_is_malformed() {
        let mut payload = 4097u32.to_be_bytes().to_vec();
        payload.extend([b'a'; 4097]);
        payload.extend([0, 0]);
        assert_eq!(info_request(&payload), None);
    }
}
