// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The parts that a disk is put together from, one for each extent line of its descriptor.

use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use super::descriptor::{Access, ExtentLine};
use super::header::{Header, SECTOR};
use super::sesparse::SeSparse;
use super::sparse::Sparse;
use crate::driver::{Ask, Mapping, Prepared, Target, ZeroFlags};
use crate::drivers::Children;
use crate::{BlockNode, Error, Result};

pub struct Part {
    /// Its first byte, as a guest sees it.
    pub start: u64,
    pub len: u64,
    access: Access,
    content: Content,
}

enum Content {
    Sparse(Box<Sparse>),
    SeSparse(Box<SeSparse>),
    Flat { node: Arc<BlockNode>, offset: u64 },
    Zero,
}

impl Part {
    /// The one part of a disk in one file.
    pub fn whole(sparse: Sparse, access: Access) -> Part {
        Part { start: 0, len: sparse.header.capacity, access, content: Content::Sparse(Box::new(sparse)) }
    }

    /// The parts that `lines` describe. The names in the lines open nothing: the nodes are `children`'s `extents.0`,
    /// `extents.1` and so on, in the order of the lines that have a file.
    pub fn all(lines: &[ExtentLine], children: &Children, backing: Option<&Arc<BlockNode>>) -> Result<Vec<Part>> {
        let mut parts = Vec::new();
        let (mut start, mut files) = (0, 0);
        for line in lines {
            let len = line.sectors.checked_mul(SECTOR).filter(|len| i64::try_from(start + len).is_ok());
            let len = len.ok_or_else(|| Error::corrupt("the VMDK's extents are too large together"))?;
            let content = match line.kind.as_str() {
                "ZERO" => Content::Zero,
                "FLAT" | "VMFS" | "SPARSE" | "VMFSSPARSE" | "SESPARSE" => {
                    let node = node(line, files, children)?;
                    files += 1;
                    Content::open(line, node, backing, start, len)?
                }
                other => {
                    let shown: String = other.chars().take(40).flat_map(char::escape_debug).collect();
                    return Err(Error::unsupported(format!("Unsupported extent type '{shown}'")));
                }
            };
            parts.extend((len > 0).then_some(Part { start, len, access: line.access, content }));
            start += len;
        }
        if parts.is_empty() {
            return Err(Error::corrupt("the VMDK descriptor names no extents"));
        }
        let given = children.keys().filter(|edge| edge.starts_with("extents.")).count();
        if given != files {
            return Err(Error::invalid(format!(
                "'extents' has {given} nodes, the VMDK has {files} extents with a file"
            )));
        }
        Ok(parts)
    }

    /// Whether it can be written at all.
    pub fn is_writable(&self) -> bool {
        self.access == Access::ReadWrite && !matches!(self.content, Content::Zero | Content::SeSparse(_))
    }

    /// Looks at what must be sound before a write.
    pub fn check_writable(&self) -> Result<()> {
        match &self.content {
            Content::Sparse(sparse) if self.is_writable() => sparse.check_writable(),
            _ => Ok(()),
        }
    }

    pub fn sparse(&self) -> Option<&Sparse> {
        match &self.content {
            Content::Sparse(sparse) => Some(sparse),
            Content::Flat { .. } | Content::SeSparse(_) | Content::Zero => None,
        }
    }

    /// Bytes of its file on the host.
    pub fn allocated_size(&self) -> u64 {
        let file = match &self.content {
            Content::Sparse(sparse) => &sparse.blocks.file,
            Content::SeSparse(sparse) => &sparse.file,
            Content::Flat { node, .. } => node,
            Content::Zero => return 0,
        };
        file.info().allocated_size.unwrap_or(0)
    }

    /// As [`crate::Driver::map`], from byte `at` of the part.
    pub fn map(&self, at: u64, len: u64, ask: Ask) -> io::Result<Mapping<'_>> {
        let len = len.min(self.len - at);
        match &self.content {
            _ if self.access == Access::None => Err(Errno::ACCESS.into()),
            Content::Sparse(sparse) => sparse.map(at, len, ask),
            Content::SeSparse(sparse) => sparse.map(at, len, ask),
            Content::Flat { node, offset } => Ok(Mapping::fixed(Target::Child { node, offset: offset + at }, len)),
            Content::Zero => Ok(Mapping::fixed(Target::Zero, len)),
        }
    }

    pub fn read_computed(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        self.sparse().ok_or(Errno::IO)?.read_computed(buf, at)
    }

    pub fn prepare_write(&self, at: u64, len: u64) -> io::Result<Prepared<'_>> {
        let len = len.min(self.len - at);
        match &self.content {
            _ if !self.is_writable() => Err(Errno::ROFS.into()),
            Content::Sparse(sparse) if sparse.header.compressed => Err(Errno::ROFS.into()),
            Content::Sparse(sparse) => sparse.blocks.prepare_write(at, len),
            Content::Flat { node, offset } => Ok(Prepared::in_place(Target::Data { node, offset: offset + at }, len)),
            Content::SeSparse(_) | Content::Zero => Err(Errno::ROFS.into()),
        }
    }

    pub fn write_zeroes(&self, at: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        match &self.content {
            _ if !self.is_writable() => Err(Errno::ROFS.into()),
            Content::Sparse(sparse) => sparse.blocks.write_zeroes(at, len, flags),
            Content::Flat { node, offset } => node.write_zeroes(offset + at, len, flags, false),
            Content::SeSparse(_) | Content::Zero => Err(Errno::ROFS.into()),
        }
    }

    pub fn discard(&self, at: u64, len: u64) -> io::Result<()> {
        match &self.content {
            _ if !self.is_writable() => Ok(()),
            Content::Sparse(sparse) => sparse.blocks.discard(at, len),
            Content::Flat { node, offset } => node.discard(offset + at, len),
            Content::SeSparse(_) | Content::Zero => Ok(()),
        }
    }

    pub fn flush(&self) -> io::Result<()> {
        match &self.content {
            _ if !self.is_writable() => Ok(()),
            Content::Sparse(sparse) => sparse.blocks.flush(),
            Content::Flat { node, .. } => node.flush(),
            Content::SeSparse(_) | Content::Zero => Ok(()),
        }
    }
}

impl Content {
    fn open(
        line: &ExtentLine,
        node: Arc<BlockNode>,
        backing: Option<&Arc<BlockNode>>,
        start: u64,
        len: u64,
    ) -> Result<Content> {
        let shorter = |has: u64| {
            Error::corrupt(format!("the extent {} has {has} bytes, the VMDK descriptor says {len}", shown(&line.name)))
        };
        if line.kind == "SESPARSE" {
            let sparse = SeSparse::open(node, backing.cloned(), start, len)?;
            return if sparse.capacity < len {
                Err(shorter(sparse.capacity))
            } else {
                Ok(Content::SeSparse(Box::new(sparse)))
            };
        }
        if line.kind == "SPARSE" || line.kind == "VMFSSPARSE" {
            let header = Header::read(&node)?;
            if header.cowd != (line.kind == "VMFSSPARSE") {
                return Err(Error::corrupt(format!(
                    "the VMDK descriptor says that the extent {} is of the kind {}, and it does not begin like one",
                    shown(&line.name),
                    line.kind
                )));
            }
            if header.capacity < len {
                return Err(shorter(header.capacity));
            }
            return Ok(Content::Sparse(Box::new(Sparse::new(header, node, backing.cloned(), start, len))));
        }
        let offset = match (line.offset, line.kind.as_str()) {
            (Some(sector), _) => sector.checked_mul(SECTOR),
            (None, "VMFS") => Some(0),
            (None, _) => None,
        };
        let offset = offset.ok_or_else(|| {
            Error::corrupt(format!("the flat extent {} begins nowhere in its file", shown(&line.name)))
        })?;
        match offset.checked_add(len) {
            Some(end) if end <= node.len() => Ok(Content::Flat { node, offset }),
            _ => Err(shorter(node.len().saturating_sub(offset))),
        }
    }
}

/// The node that the caller gave for the extent that `line` describes, the one numbered `number` of those with a file.
fn node(line: &ExtentLine, number: usize, children: &Children) -> Result<Arc<BlockNode>> {
    let given = children.get(format!("extents.{number}").as_str());
    given.cloned().ok_or_else(|| {
        Error::invalid(format!("'extents.{number}' is missing: a node with what the VMDK calls {}", shown(&line.name)))
    })
}

fn shown(name: &str) -> String {
    format!("'{}'", name.chars().take(200).flat_map(char::escape_debug).collect::<String>())
}
