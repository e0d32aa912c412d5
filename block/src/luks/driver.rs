// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver `luks`: a payload encrypted as a whole, behind its header or with the header in another node.

use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use super::cipher::SECTOR;
use super::facts::facts;
use super::header;
use super::volume::{self, Volume};
use crate::child::Child;
use crate::claims::Writes;
use crate::driver::{Ask, Driver, Info, Mapping, Prepared, Target, ZeroFlags};
use crate::drivers::{ChildSpec, DriverEntry, OpenRequest, OptionKind, OptionSpec};
use crate::encryption::Encryption;
use crate::{BlockNode, Error, Preallocation, Result, Wait};

pub(crate) const ENTRY: DriverEntry = DriverEntry {
    name: "luks",
    summary: "a volume encrypted with LUKS version 1, as QEMU and cryptsetup make them",
    children: &[
        ChildSpec { name: "file", required: true, writes: Writes::AsUsers },
        ChildSpec { name: "header", required: false, writes: Writes::Never },
    ],
    options: &[OptionSpec {
        name: "key-secret",
        kind: OptionKind::Secret,
        summary: "the id of a `secret` object that holds the passphrase; required",
    }],
    takes_descriptor: false,
    writes: true,
    probe: |start| start.starts_with(&header::MAGIC) && start[6..8] == [0, 1],
    open,
};

struct Luks {
    file: Child,
    /// `None` if only facts are asked for.
    encryption: Option<Encryption>,
    header: header::Header,
    detached: bool,
}

fn open(request: OpenRequest) -> Result<Box<dyn Driver>> {
    let file = request.child("file")?;
    let detached = request.children.get("header");
    let place = detached.unwrap_or(&file);
    let read_at = |offset: u64, buf: &mut [u8]| place.read_or_zero(buf, offset, Wait::Allowed);
    let (header, cipher) = match request.secret("key-secret") {
        Some(secret) => {
            let Volume { cipher, header } = volume::open(&read_at, place.len(), secret.bytes())?;
            (header, Some(cipher))
        }
        None if request.facts_only => (volume::read_header(&read_at, place.len())?, None),
        None => return Err(Error::invalid("Parameter 'key-secret' is required for cipher")),
    };
    let payload = header.payload;
    if payload == 0 && detached.is_none() {
        return Err(Error::invalid("the LUKS header is detached from its payload: give 'header' a node, too"));
    }
    if payload > file.len() {
        return Err(Error::corrupt(format!(
            "the LUKS payload begins at {payload}, and the file has only {} bytes",
            file.len()
        )));
    }
    let encryption = cipher.map(|cipher| Encryption::new(cipher, payload));
    Ok(Box::new(Luks { file: Child::new(file), encryption, detached: detached.is_some(), header }))
}

impl Luks {
    fn target(&self, offset: u64) -> io::Result<Target<'_>> {
        let encryption = self.encryption.as_ref().ok_or(Errno::NOKEY)?;
        Ok(Target::Encrypted { node: &self.file, offset: self.header.payload + offset, encryption })
    }
}

impl Driver for Luks {
    fn len(&self) -> u64 {
        self.file.len().saturating_sub(self.header.payload).next_multiple_of(SECTOR as u64)
    }

    fn map(&self, offset: u64, len: u64, _: Ask) -> io::Result<Mapping<'_>> {
        Ok(Mapping::fixed(self.target(offset)?, len))
    }

    fn prepare_write(&self, offset: u64, len: u64) -> io::Result<Prepared<'_>> {
        Ok(Prepared::in_place(self.target(offset)?, len))
    }

    fn zero_unit(&self) -> u64 {
        SECTOR as u64
    }

    /// Zeroes below are noise here: they must be written as data.
    fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> io::Result<()> {
        Err(Errno::OPNOTSUPP.into())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let start = self.header.payload + offset;
        let there = self.file.len().saturating_sub(start).min(len);
        if there == 0 { Ok(()) } else { self.file.discard(start, there) }
    }

    fn bypasses_cache(&self) -> bool {
        self.file.bypasses_cache()
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    fn resize(&self, len: u64, preallocation: Preallocation) -> Result<()> {
        if len > self.len() {
            return Err(Error::unsupported(
                "a luks volume cannot be made longer by this version: what is new would read as noise, not as zeroes",
            ));
        }
        if !len.is_multiple_of(SECTOR as u64) {
            return Err(Error::invalid(format!("The new size must be a multiple of 512, not {len}")));
        }
        self.file.resize(self.header.payload + len, preallocation)
    }

    fn attaches(&self, edge: &str) -> bool {
        edge == "file"
    }

    fn attach(&self, _: &str, node: Arc<BlockNode>) {
        self.file.put(node);
    }

    fn block_size(&self) -> u32 {
        self.file.block_size().max(512)
    }

    fn info(&self) -> Info {
        let specifics = facts(&self.header, self.detached, false);
        Info { allocated_size: self.file.info().allocated_size, encrypted: true, specifics, ..Info::default() }
    }
}
