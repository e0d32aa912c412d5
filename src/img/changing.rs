// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The verbs that change images: `amend` and `resize`.

use std::path::PathBuf;

use ::img::options::size;
use ::img::resize::Wanted;
use anyhow::Context;
use clap::Args;
use manager::opening::{Rights, open_named};

use super::images::{Common, named};

#[derive(Args)]
pub struct Amend {
    #[command(flatten)]
    common: Common,
    /// The image's format.
    #[arg(short, long)]
    format: Option<String>,
    /// `name=value,…`
    #[arg(short, value_name = "OPTIONS", required = true)]
    options: Vec<String>,
    image: PathBuf,
}

#[derive(Args)]
pub struct Resize {
    #[command(flatten)]
    common: Common,
    /// The image's format.
    #[arg(short, long)]
    format: Option<String>,
    /// How room for what is new is set aside: `off`, `metadata`, `falloc` or `full`.
    #[arg(long, value_name = "MODE", default_value = "off")]
    preallocation: String,
    /// Data beyond the new end may go.
    #[arg(long)]
    shrink: bool,
    image: PathBuf,
    /// Bytes; with + or - in front so many more or less.
    #[arg(allow_hyphen_values = true)]
    size: String,
}

pub fn amend(verb: Amend) -> anyhow::Result<u8> {
    let asked = verb.common.asked(&verb.image, verb.format.as_deref())?;
    Ok(::img::amend::run(::img::amend::Request {
        image: named(open_named(&asked.path, Rights::ReadWrite)?, Some(asked.path.display().to_string())),
        format: asked.format,
        options: verb.options,
        secrets: verb.common.secrets()?,
        confinement: verb.common.requirement(),
    })?)
}

pub fn resize(verb: Resize) -> anyhow::Result<u8> {
    let number = verb.size.trim_start_matches(['+', '-']);
    let number = size(number).with_context(|| format!("Invalid image size specified: '{}'", verb.size))?;
    let wanted = match verb.size.bytes().next() {
        Some(b'+') => Wanted::More(number),
        Some(b'-') => Wanted::Less(number),
        _ => Wanted::To(number),
    };
    Ok(::img::resize::run(::img::resize::Request {
        layers: verb.common.layers(&verb.image, verb.format.as_deref(), Rights::ReadWrite)?,
        wanted,
        shrink: verb.shrink,
        preallocation: ::img::resize::preallocation(&verb.preallocation)?,
        quiet: verb.common.quiet,
        confinement: verb.common.requirement(),
    })?)
}
