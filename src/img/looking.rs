// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The verbs that look at images: `check`, `compare`, `info`, `map`, `measure`. Only `check -r` changes one.

use std::path::PathBuf;

use ::img::measure::Source;
use ::img::options::{known, parse};
use anyhow::bail;
use clap::Args;
use manager::opening::{Rights, open_named};

use super::images::{Common, Output, bytes, directory, named};

#[derive(Args)]
pub struct Check {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    output: Output,
    /// The image's format.
    #[arg(short, long)]
    format: Option<String>,
    /// What is repaired: `leaks` or `all`.
    #[arg(short, long, value_parser = ["leaks", "all"])]
    repair: Option<String>,
    image: PathBuf,
}

#[derive(Args)]
pub struct Compare {
    #[command(flatten)]
    common: Common,
    /// Format of the first image.
    #[arg(short)]
    f: Option<String>,
    /// Format of the second image.
    #[arg(short = 'F')]
    second_format: Option<String>,
    /// Show how far it is: there is nothing to show yet.
    #[arg(short)]
    progress: bool,
    /// Sizes must be the same, too.
    #[arg(short)]
    strict: bool,
    first: PathBuf,
    second: PathBuf,
}

#[derive(Args)]
pub struct Info {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    output: Output,
    /// The image's format.
    #[arg(short, long)]
    format: Option<String>,
    /// Tell of the backing files, too.
    #[arg(short, long)]
    backing_chain: bool,
    image: PathBuf,
}

#[derive(Args)]
pub struct Map {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    output: Output,
    /// The image's format.
    #[arg(short, long)]
    format: Option<String>,
    /// First byte.
    #[arg(short, long, value_parser = bytes, default_value = "0")]
    start_offset: u64,
    /// Bytes.
    #[arg(short = 'l', long, value_parser = bytes)]
    max_length: Option<u64>,
    image: PathBuf,
}

#[derive(Args)]
pub struct Measure {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    output: Output,
    /// Format of the source.
    #[arg(short, long)]
    format: Option<String>,
    /// Format of the new image.
    #[arg(short = 'O', value_name = "FORMAT", default_value = "raw")]
    output_format: String,
    /// Options of the new image.
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Instead of an image: bytes of an empty disk.
    #[arg(long, value_parser = bytes)]
    size: Option<u64>,
    image: Option<PathBuf>,
}

pub fn check(verb: Check) -> anyhow::Result<u8> {
    let asked = verb.common.asked(&verb.image, verb.format.as_deref())?;
    let repair = ::img::check::repair(verb.repair.as_deref());
    let rights = if verb.repair.is_some() { Rights::ReadWrite } else { Rights::ReadOnly };
    Ok(::img::check::run(::img::check::Request {
        image: named(open_named(&asked.path, rights)?, Some(asked.path.display().to_string())),
        format: asked.format,
        repair,
        json: verb.output.is_json(),
        quiet: verb.common.quiet,
        force_share: verb.common.force_share,
        confinement: verb.common.requirement(),
    })?)
}

pub fn compare(verb: Compare) -> anyhow::Result<u8> {
    let common = &verb.common;
    let first = common.layers(&verb.first, verb.f.as_deref(), Rights::ReadOnly)?;
    let second = common.layers(&verb.second, verb.second_format.as_deref(), Rights::ReadOnly)?;
    Ok(::img::compare::run(::img::compare::Request {
        images: [first, second],
        strict: verb.strict,
        quiet: common.quiet,
        force_share: common.force_share,
        confinement: common.requirement(),
    })?)
}

pub fn info(verb: Info) -> anyhow::Result<u8> {
    let common = &verb.common;
    let name = common.asked(&verb.image, verb.format.as_deref())?.path.display().to_string();
    let (layers, directories) = if verb.backing_chain {
        let layers = common.layers(&verb.image, verb.format.as_deref(), Rights::ReadOnly)?;
        let directories = layers.iter().map(|layer| directory(&layer.image.name).to_owned()).collect();
        (layers, directories)
    } else {
        let layer = common.alone(&verb.image, verb.format.as_deref(), Rights::ReadOnly)?;
        (vec![layer], vec![directory(&name).to_owned()])
    };
    Ok(::img::info::run(::img::info::Request {
        layers,
        directories,
        chain: verb.backing_chain,
        json: verb.output.is_json(),
        force_share: common.force_share,
        confinement: common.requirement(),
    })?)
}

pub fn map(verb: Map) -> anyhow::Result<u8> {
    let common = &verb.common;
    Ok(::img::map::run(::img::map::Request {
        layers: common.layers(&verb.image, verb.format.as_deref(), Rights::ReadOnly)?,
        start: verb.start_offset,
        len: verb.max_length,
        json: verb.output.is_json(),
        force_share: common.force_share,
        confinement: common.requirement(),
    })?)
}

pub fn measure(verb: Measure) -> anyhow::Result<u8> {
    let common = &verb.common;
    let known = known(&verb.output_format).map_err(anyhow::Error::msg)?;
    let options = parse(&verb.options, known, &common.secrets()?).map_err(anyhow::Error::msg)?.options;
    let source = match (verb.size, &verb.image) {
        (Some(size), None) => Source::Size(size),
        (None, Some(image)) => Source::Chain(common.layers(image, verb.format.as_deref(), Rights::ReadOnly)?),
        _ => bail!("Either --size N or one filename must be specified."),
    };
    Ok(::img::measure::run(::img::measure::Request {
        source,
        format: verb.output_format,
        options,
        json: verb.output.is_json(),
        force_share: common.force_share,
        confinement: common.requirement(),
    })?)
}
