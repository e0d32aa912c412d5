// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a header tells without a passphrase, with QAPI's names (`QCryptoBlockInfoLUKS`) in the order in which QEMU prints them.

use super::cipher::{IvGenerator, Mode};
use super::header::{Header, STRIPES, slot_offset};
use crate::InfoValue;

/// With the format's name where QEMU gives it: inside another format.
pub(crate) fn facts(header: &Header, detached: bool, format: bool) -> Vec<(&'static str, InfoValue)> {
    let spec = header.cipher;
    let ivgen = match spec.iv {
        IvGenerator::Plain => "plain",
        IvGenerator::Plain64 => "plain64",
        IvGenerator::EssivSha256 => "essiv",
    };
    let slots = header.slots.iter().enumerate().map(|(index, slot)| {
        InfoValue::Map(match slot {
            Some(slot) => vec![
                ("active", InfoValue::Bool(true)),
                ("iters", InfoValue::Int(slot.iterations.into())),
                ("key-offset", InfoValue::Int(slot.offset)),
                ("stripes", InfoValue::Int(STRIPES.into())),
            ],
            None => vec![("active", InfoValue::Bool(false)), ("key-offset", InfoValue::Int(slot_offset(spec, index)))],
        })
    });
    let mut facts = vec![
        ("ivgen-alg", InfoValue::text(ivgen)),
        ("detached-header", InfoValue::Bool(detached)),
        ("hash-alg", InfoValue::text(header.hash.name())),
        ("cipher-alg", InfoValue::Str(format!("aes-{}", spec.aes_bytes * 8))),
        ("uuid", InfoValue::text(&header.uuid)),
    ];
    if spec.iv == IvGenerator::EssivSha256 {
        facts.push(("ivgen-hash-alg", InfoValue::text("sha256")));
    }
    if format {
        facts.push(("format", InfoValue::text("luks")));
    }
    facts.extend([
        ("cipher-mode", InfoValue::text(if spec.mode == Mode::Xts { "xts" } else { "cbc" })),
        ("slots", InfoValue::List(slots.collect())),
        ("payload-offset", InfoValue::Int(header.payload)),
        ("master-key-iters", InfoValue::Int(header.iterations.into())),
    ]);
    facts
}
