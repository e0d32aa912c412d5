// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The descriptor: lines of text that name the parent and the extents, in a file of its own or inside a sparse extent.
//!
//! ```text
//! CID=d8b2f1ac                          which content this is: a new one with the first write after each open
//! parentCID=ffffffff                    the parent's when this image was made; all ones without a parent
//! createType="monolithicSparse"
//! parentFileNameHint="base.vmdk"
//! RW 20480 SPARSE "disk.vmdk"           access, sectors, kind, name, and for flat extents the sector where it begins
//! ```
//!
//! Every name in it is untrusted text and opens nothing.

use std::ops::Range;

use crate::{Error, Result};

/// The CID that says that there is no parent.
pub const NO_PARENT: u32 = u32::MAX;
/// Bytes that a descriptor has at most.
pub const MAX_LEN: u64 = (1 << 20) - 1;
/// Extents that an image has at most: 2 TiB in the usual pieces of 2 GiB.
const MAX_EXTENTS: usize = 1024;

/// A descriptor, taken apart.
#[derive(Debug)]
pub struct Descriptor {
    /// As it is stored, up to the first NUL.
    text: Vec<u8>,
    /// Where the number of the CID stands in it.
    cid_at: Range<usize>,
    pub cid: u32,
    pub parent_cid: u32,
    pub create_type: String,
    /// The parent's name.
    pub parent_hint: Option<String>,
    pub extents: Vec<ExtentLine>,
}

/// What may be done to an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    ReadWrite,
    ReadOnly,
    None,
}

/// A line that describes an extent.
#[derive(Debug)]
pub struct ExtentLine {
    pub access: Access,
    pub sectors: u64,
    pub kind: String,
    pub name: String,
    /// Sector of its file where it begins; only some kinds have it.
    pub offset: Option<u64>,
}

impl Descriptor {
    /// Takes a text apart.
    ///
    /// # Errors
    /// `Corrupt` for text without CID or type, and for a line that should describe an extent and does not.
    pub fn parse(text: &[u8]) -> Result<Descriptor> {
        let text = text.split(|&byte| byte == 0).next().unwrap_or_default().to_vec();
        let (mut cid, mut parent_cid, mut create_type, mut parent_hint) = (None, None, None, None);
        let mut extents = Vec::new();
        let mut start = 0;
        for line in text.split_inclusive(|&byte| byte == b'\n') {
            let at = start;
            start += line.len();
            if let Some(extent) = ExtentLine::parse(line)? {
                if extents.len() == MAX_EXTENTS {
                    return Err(Error::unsupported(format!("the descriptor names more than {MAX_EXTENTS} extents")));
                }
                extents.push(extent);
                continue;
            }
            let Some(equals) = line.iter().position(|&byte| byte == b'=') else { continue };
            let value = line[equals + 1..].trim_ascii();
            let value_at = at + equals + 1 + (line[equals + 1..].len() - line[equals + 1..].trim_ascii_start().len());
            // Whole keys: `CID` is also the end of `parentCID`. The first of two is the one that counts.
            match line[..equals].trim_ascii() {
                b"CID" if cid.is_none() => cid = Some((parse_cid(value)?, value_at..value_at + value.len())),
                b"parentCID" if parent_cid.is_none() => parent_cid = Some(parse_cid(value)?),
                b"createType" if create_type.is_none() => create_type = Some(unquoted(value)),
                b"parentFileNameHint" if parent_hint.is_none() => parent_hint = Some(unquoted(value)),
                _ => {}
            }
        }
        let missing = |key| Error::corrupt(format!("the VMDK descriptor has no {key}"));
        let (cid, cid_at) = cid.ok_or_else(|| missing("CID"))?;
        let create_type = create_type.ok_or_else(|| missing("createType"))?;
        let parent_cid = parent_cid.unwrap_or(NO_PARENT);
        Ok(Descriptor { text, cid_at, cid, parent_cid, create_type, parent_hint, extents })
    }

    /// The text with another CID, and as many zero bytes behind it as cover the old one.
    pub fn with_cid(&self, cid: u32) -> Vec<u8> {
        let mut text = self.text.clone();
        text.splice(self.cid_at.clone(), format!("{cid:08x}").bytes());
        text.resize(text.len().max(self.text.len()), 0);
        text
    }
}

impl ExtentLine {
    /// `None` if the line describes something else.
    fn parse(line: &[u8]) -> Result<Option<ExtentLine>> {
        let line = String::from_utf8_lossy(line);
        let line = line.trim();
        let Some((access, rest)) = line.split_once([' ', '\t']) else { return Ok(None) };
        let access = match access {
            "RW" => Access::ReadWrite,
            "RDONLY" => Access::ReadOnly,
            "NOACCESS" => Access::None,
            _ => return Ok(None),
        };
        let broken = || Error::corrupt(format!("Invalid extent line: {}", line.chars().take(200).collect::<String>()));
        let (sectors, rest) = rest.trim_start().split_once([' ', '\t']).ok_or_else(broken)?;
        let sectors = sectors.parse().map_err(|_| broken())?;
        let rest = rest.trim_start();
        let (kind, rest) = rest.split_once([' ', '\t']).unwrap_or((rest, ""));
        let (name, offset) = match rest.trim_start().strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').ok_or_else(broken)?,
            None if kind == "ZERO" => ("", rest),
            None => return Err(broken()),
        };
        let offset = match offset.split_whitespace().next() {
            Some(number) => Some(number.parse().map_err(|_| broken())?),
            None => None,
        };
        Ok(Some(ExtentLine { access, sectors, kind: kind.to_owned(), name: name.to_owned(), offset }))
    }
}

/// An extent line to be written.
pub struct Extent<'a> {
    pub sectors: u64,
    pub kind: &'a str,
    pub name: &'a str,
    pub offset: Option<u64>,
}

/// A new descriptor up to the disk data base, to which lines `ddb.KEY = "VALUE"` are added. No text in it has quotes or control
/// characters.
pub fn head(cid: u32, parent_cid: u32, create_type: &str, hint: Option<&str>, extents: &[Extent<'_>]) -> String {
    let hint = hint.map_or(String::new(), |hint| format!("parentFileNameHint=\"{hint}\"\n"));
    let lines: String = extents
        .iter()
        .map(|Extent { sectors, kind, name, offset }| {
            let offset = offset.map_or(String::new(), |offset| format!(" {offset}"));
            format!("RW {sectors} {kind} \"{name}\"{offset}\n")
        })
        .collect();
    format!(
        "# Disk DescriptorFile\nversion=1\nCID={cid:08x}\nparentCID={parent_cid:08x}\ncreateType=\"{create_type}\"\n{hint}\n\
         # Extent description\n{lines}\n# The Disk Data Base\n#DDB\n\n"
    )
}

fn parse_cid(value: &[u8]) -> Result<u32> {
    let digits = std::str::from_utf8(value).ok().filter(|text| !text.starts_with('+'));
    digits.and_then(|text| u32::from_str_radix(text, 16).ok()).ok_or_else(|| {
        let shown: String = String::from_utf8_lossy(value).chars().take(40).flat_map(char::escape_debug).collect();
        Error::corrupt(format!("the VMDK descriptor has the CID '{shown}', which is no number"))
    })
}

fn unquoted(value: &[u8]) -> String {
    let value = value.strip_prefix(b"\"").unwrap_or(value);
    String::from_utf8_lossy(value.strip_suffix(b"\"").unwrap_or(value)).into_owned()
}
