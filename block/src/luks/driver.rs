// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver `luks`: a payload encrypted as a whole, behind its header or with the header in another node.

use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use super::cipher::{IvGenerator, Mode, SECTOR};
use super::{header, volume};
use crate::claims::Writes;
use crate::driver::{
    Ask, ChildSpec, Driver, DriverEntry, Info, InfoValue, Mapping, OpenRequest, OptionKind, OptionSpec, Prepared,
    Target, ZeroFlags,
};
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
    file: Arc<BlockNode>,
    encryption: Encryption,
    header: header::Header,
    detached: bool,
}

fn open(request: OpenRequest) -> Result<Box<dyn Driver>> {
    let file = request.child("file")?;
    let Some(secret) = request.secret("key-secret") else {
        return Err(Error::invalid("Parameter 'key-secret' is required for cipher"));
    };
    let detached = request.children.get("header");
    let place = detached.unwrap_or(&file);
    let read_at = |offset: u64, buf: &mut [u8]| place.read_or_zero(buf, offset, Wait::Allowed);
    let volume = volume::open(&read_at, place.len(), secret.bytes())?;
    let payload = volume.header.payload;
    if payload == 0 && detached.is_none() {
        return Err(Error::invalid("the LUKS header is detached from its payload: give 'header' a node, too"));
    }
    if payload > file.len() {
        return Err(Error::corrupt(format!(
            "the LUKS payload begins at {payload}, and the file has only {} bytes",
            file.len()
        )));
    }
    let encryption = Encryption::new(volume.cipher, payload);
    Ok(Box::new(Luks { file, encryption, detached: detached.is_some(), header: volume.header }))
}

impl Luks {
    fn target(&self, offset: u64) -> Target<'_> {
        Target::Encrypted { node: &self.file, offset: self.header.payload + offset, encryption: &self.encryption }
    }
}

impl Driver for Luks {
    fn len(&self) -> u64 {
        self.file.len().saturating_sub(self.header.payload).next_multiple_of(SECTOR as u64)
    }

    fn map(&self, offset: u64, len: u64, _: Ask) -> io::Result<Mapping<'_>> {
        Ok(Mapping::fixed(self.target(offset), len))
    }

    fn prepare_write(&self, offset: u64, len: u64) -> io::Result<Prepared<'_>> {
        Ok(Prepared::in_place(self.target(offset), len))
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

    fn block_size(&self) -> u32 {
        self.file.block_size().max(512)
    }

    fn info(&self) -> Info {
        let text = |text: &str| InfoValue::Str(text.to_owned());
        let spec = self.header.cipher;
        let mut specifics = vec![
            ("cipher-alg", InfoValue::Str(format!("aes-{}", spec.aes_bytes * 8))),
            ("cipher-mode", text(if spec.mode == Mode::Xts { "xts" } else { "cbc" })),
            (
                "ivgen-alg",
                text(match spec.iv {
                    IvGenerator::Plain => "plain",
                    IvGenerator::Plain64 => "plain64",
                    IvGenerator::EssivSha256 => "essiv",
                }),
            ),
        ];
        if spec.iv == IvGenerator::EssivSha256 {
            specifics.push(("ivgen-hash-alg", text("sha256")));
        }
        specifics.push(("hash-alg", text(self.header.hash.name())));
        specifics.push(("detached-header", InfoValue::Bool(self.detached)));
        specifics.push(("payload-offset", InfoValue::Int(self.header.payload)));
        specifics.push(("master-key-iters", InfoValue::Int(self.header.iterations.into())));
        specifics.push(("uuid", text(&self.header.uuid)));
        Info { allocated_size: self.file.info().allocated_size, encrypted: true, specifics, ..Info::default() }
    }
}
