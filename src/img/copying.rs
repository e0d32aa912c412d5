// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The verbs that copy images into new ones: `convert` and `dd`.

use std::io::IsTerminal;
use std::path::PathBuf;

use ::img::convert::Target;
use ::img::options::{size, split};
use ::img::source::{Manner, SnapshotWanted};
use anyhow::{Context, bail, ensure};
use clap::Args;
use manager::opening::Rights;

use super::asked::Asked;
use super::images::{CACHE_MODES, Cache, Common, bytes, is_direct, layers};
use super::new_image::{NewImage, Wanted};

#[derive(Args)]
pub struct Convert {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    cache: Cache,
    /// Cache mode of the sources.
    #[arg(short = 'T', long = "source-cache", value_name = "MODE", value_parser = CACHE_MODES, default_value = "writeback")]
    source_cache: String,
    /// Format of the sources.
    #[arg(short, long, alias = "source-format")]
    format: Option<String>,
    /// As --image-opts.
    #[arg(long)]
    source_image_opts: bool,
    /// The state of a snapshot: its id or name, or `snapshot.id=…,snapshot.name=…`.
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    source_snapshot: Option<String>,
    /// Format of the new image.
    #[arg(short = 'O', long = "target-format", value_name = "FORMAT", default_value = "raw")]
    output_format: String,
    /// The target is given as options; with -n.
    #[arg(long)]
    target_image_opts: bool,
    /// Options of the new image: `name=value,…`
    #[arg(short, long = "target-options", value_name = "OPTIONS")]
    options: Vec<String>,
    /// The new image's backing file: what only it has of the source is not copied.
    #[arg(short = 'B', long, value_name = "FILE")]
    backing: Option<String>,
    /// The backing file's format.
    #[arg(short = 'F', long = "backing-file-format", value_name = "FORMAT")]
    target_backing_format: Option<String>,
    /// Store every cluster compressed, on all processors.
    #[arg(short, long)]
    compress: bool,
    /// Show how far it is; on a terminal that is so by default.
    #[arg(short, long)]
    progress: bool,
    /// The new image is there already: write over it.
    #[arg(short = 'n', long)]
    no_create: bool,
    /// With -n: it reads as zeroes everywhere.
    #[arg(long)]
    target_is_zero: bool,
    /// Runs of zeroes of so many bytes are not written (default 4k); 0 writes everything.
    #[arg(short = 'S', long = "sparse-size", value_name = "SIZE", value_parser = bytes, default_value = "4k")]
    sparse: u64,
    /// Copy the persistent bitmaps of the source, too.
    #[arg(long)]
    bitmaps: bool,
    /// With --bitmaps: leave out those whose content is lost.
    #[arg(long)]
    skip_broken_bitmaps: bool,
    /// What cannot be read becomes zeroes.
    #[arg(long)]
    salvage: bool,
    /// Accepted: pieces are always written as they become ready.
    #[arg(short = 'W', long = "oob-writes")]
    out_of_order: bool,
    /// Threads, 1 to 16; by default one to a processor.
    #[arg(short = 'm', long = "parallel", value_name = "NUMBER", value_parser = clap::value_parser!(u8).range(1..=16))]
    threads: Option<u8>,
    /// Most bytes a second.
    #[arg(short = 'r', long, value_name = "RATE", value_parser = bytes, default_value = "0")]
    rate: u64,
    /// Not supported.
    #[arg(short = 'C', long)]
    copy_range_offloading: bool,
    /// The sources, one behind the other, and the target.
    #[arg(required = true, num_args = 1.., value_name = "SOURCE... TARGET")]
    images: Vec<PathBuf>,
}

#[derive(Args)]
pub struct Dd {
    #[command(flatten)]
    common: Common,
    /// Format of the source.
    #[arg(short, long)]
    format: Option<String>,
    /// Format of the new image.
    #[arg(short = 'O', long, value_name = "FORMAT", default_value = "raw")]
    output_format: String,
    /// `if=SOURCE`, `of=TARGET`, `bs=BYTES`, `count=BLOCKS` and `skip=BLOCKS`, counted from the start of the source.
    operands: Vec<String>,
}

pub fn convert(verb: Convert) -> anyhow::Result<u8> {
    let Some((target, sources)) = verb.images.split_last() else { bail!("Must specify image file name") };
    ensure!(!sources.is_empty(), "Must specify image file name");
    ensure!(!verb.copy_range_offloading, "copying inside the host (-C) is not supported by this version");
    ensure!(verb.no_create || !verb.target_image_opts, "--target-image-opts requires use of -n flag");
    ensure!(verb.no_create || !verb.target_is_zero, "--target-is-zero requires use of -n flag");
    ensure!(verb.bitmaps || !verb.skip_broken_bitmaps, "Use of --skip-broken-bitmaps requires --bitmaps");
    let is_one = sources.len() == 1;
    ensure!(
        is_one || verb.backing.is_none(),
        "Having a backing file for the target makes no sense when concatenating multiple input images"
    );
    ensure!(is_one || !verb.bitmaps, "--bitmaps takes a single source");
    ensure!(is_one || verb.source_snapshot.is_none(), "No support for concatenating multiple snapshot");
    ensure!(verb.source_snapshot.is_none() || !verb.bitmaps, "a snapshot has no bitmaps");
    let snapshot = verb.source_snapshot.as_deref().map(snapshot).transpose()?;
    let mut common = verb.common;
    common.image_opts |= verb.source_image_opts;
    let source_is_direct = is_direct(&verb.source_cache);
    let opened = sources.iter().map(|source| {
        let asked = common.asked(source, verb.format.as_deref())?.direct(source_is_direct);
        let chain = common.chain(&asked, Rights::ReadOnly)?;
        Ok((chain.layers[0].inspection.virtual_size, layers(chain, &asked)))
    });
    let (sizes, sources): (Vec<u64>, Vec<_>) = opened.collect::<anyhow::Result<Vec<_>>>()?.into_iter().unzip();
    // A snapshot may be of another size.
    let size = sizes.iter().try_fold(0u64, |sum, &size| sum.checked_add(size)).filter(|_| snapshot.is_none());
    let mut new = None;
    let mut has_backing = verb.backing.is_some();
    let target = if verb.no_create {
        ensure!(verb.options.is_empty(), "-o has no use when the target image exists (-n)");
        let asked = match verb.target_image_opts {
            true => Asked::parse(&target.to_string_lossy(), &common.secrets()?).map_err(anyhow::Error::msg)?,
            false => Asked::named(target, Some(&verb.output_format)),
        };
        let layers = common.layers_of(&asked.direct(verb.cache.is_direct()), Rights::ReadWrite)?;
        Target::Existing { layers, is_zero: verb.target_is_zero }
    } else {
        let wanted = Wanted {
            path: target,
            format: &verb.output_format,
            options: &verb.options,
            backing: verb.backing.as_deref(),
            backing_format: verb.target_backing_format.as_deref(),
            is_direct: verb.cache.is_direct(),
            size,
        };
        let (image, target) = NewImage::make(&common, &wanted)?;
        has_backing = matches!(&target, Target::New { backing, .. } if !backing.is_empty());
        new = Some(image);
        target
    };
    let processors = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    ::img::convert::run(::img::convert::Request {
        sources,
        manner: Manner {
            force_share: common.force_share,
            snapshot,
            top_only: has_backing,
            salvage: verb.salvage,
            quiet: common.quiet,
        },
        part: None,
        target,
        compress: verb.compress,
        sparse: verb.sparse,
        bitmaps: verb.bitmaps.then_some(verb.skip_broken_bitmaps),
        threads: verb.threads.map_or(processors.min(16), usize::from),
        durable: !verb.cache.is_unsafe(),
        rate: verb.rate,
        progress: !common.quiet && (verb.progress || std::io::stdout().is_terminal()),
        confinement: common.requirement(),
    })?;
    new.map_or(Ok(()), NewImage::publish)?;
    Ok(0)
}

/// The id and the name of a snapshot: `snapshot.id=…,snapshot.name=…`, or one word that is either.
fn snapshot(text: &str) -> anyhow::Result<SnapshotWanted> {
    if !text.starts_with("snapshot.") {
        return Ok(SnapshotWanted::Either(text.to_owned()));
    }
    let (mut id, mut name) = (None, None);
    for word in split(text) {
        match word.split_once('=') {
            Some(("snapshot.id", value)) => id = Some(value.to_owned()),
            Some(("snapshot.name", value)) => name = Some(value.to_owned()),
            _ => bail!("Failed in parsing snapshot param '{text}'"),
        }
    }
    Ok(SnapshotWanted::Both(id, name))
}

pub fn dd(verb: Dd) -> anyhow::Result<u8> {
    let (mut from, mut to, mut block, mut count, mut skip) = (None, None, 512u64, None, 0u64);
    for operand in &verb.operands {
        let Some((name, value)) = operand.split_once('=') else { bail!("unrecognized operand {operand}") };
        let number = |most: u64, least: u64| {
            let number = size(value).filter(|number| (least..=most).contains(number));
            number.with_context(|| format!("Invalid {name} specified. Must be between {least} and {most}."))
        };
        match name {
            "if" => from = Some(PathBuf::from(value)),
            "of" => to = Some(PathBuf::from(value)),
            "bs" => block = number(i32::MAX.unsigned_abs().into(), 1)?,
            "count" => count = Some(number(i64::MAX.unsigned_abs(), 0)?),
            "skip" => skip = number(i64::MAX.unsigned_abs(), 0)?,
            other => bail!("unrecognized operand {other}"),
        }
    }
    let (Some(from), Some(to)) = (from, to) else { bail!("Must specify both input and output files") };
    let common = &verb.common;
    let sources = vec![common.layers(&from, verb.format.as_deref(), Rights::ReadOnly)?];
    let wanted = Wanted {
        path: &to,
        format: &verb.output_format,
        options: &[],
        backing: None,
        backing_format: None,
        is_direct: false,
        size: None,
    };
    let (new, target) = NewImage::make(common, &wanted)?;
    let skipped = skip.saturating_mul(block);
    // Blocks are counted from the start of the source, those that are left out included.
    let len = count.map_or(u64::MAX, |count| count.saturating_mul(block)).saturating_sub(skipped);
    ::img::convert::run(::img::convert::Request {
        sources,
        manner: Manner { force_share: common.force_share, ..Manner::default() },
        part: Some((skipped, len)),
        target,
        compress: false,
        sparse: 4096,
        bitmaps: None,
        threads: 1,
        durable: true,
        rate: 0,
        progress: false,
        confinement: common.requirement(),
    })?;
    new.publish()?;
    Ok(0)
}
