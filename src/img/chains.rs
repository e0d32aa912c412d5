// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The verbs that work on a chain of images: `commit` and `rebase`.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use ::img::rebase::Compared;
use anyhow::{Context, bail, ensure};
use clap::Args;
use manager::chain::{Chain, Layer};
use manager::opening::{Rights, open_named};

use super::asked::Asked;
use super::images::{CACHE_MODES, Cache, Common, bytes, directory, is_direct, layers, named};

#[derive(Args)]
pub struct Commit {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    cache: Cache,
    /// The image's format.
    #[arg(short, long)]
    format: Option<String>,
    /// The image of the chain that gets the content; by default the first below. The image is left as it is.
    #[arg(short, long, value_name = "FILE")]
    base: Option<PathBuf>,
    /// Leave the image as it is, in place of emptying it.
    #[arg(short, long)]
    drop: bool,
    /// Show how far it is; on a terminal that is so by default.
    #[arg(short, long)]
    progress: bool,
    /// Most bytes a second.
    #[arg(short, long, value_name = "RATE", value_parser = bytes, default_value = "0")]
    rate: u64,
    image: PathBuf,
}

#[derive(Args)]
pub struct Rebase {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    cache: Cache,
    /// Cache mode of the backing files.
    #[arg(short = 'T', long, value_name = "MODE", value_parser = CACHE_MODES, default_value = "writeback")]
    backing_cache: String,
    /// The image's format.
    #[arg(short, long)]
    format: Option<String>,
    /// The new backing file; empty for none.
    #[arg(short, long, value_name = "FILE")]
    backing: Option<String>,
    /// Its format.
    #[arg(short = 'F', long = "backing-file-format", value_name = "FORMAT")]
    new_format: Option<String>,
    /// Change the name alone, whatever the guest sees then.
    #[arg(short = 'u', long = "backing-unsafe")]
    unsafely: bool,
    /// Store compressed what the image gets.
    #[arg(short, long)]
    compress: bool,
    /// Show how far it is; on a terminal that is so by default.
    #[arg(short, long)]
    progress: bool,
    image: PathBuf,
}

fn shows_progress(wanted: bool, common: &Common) -> bool {
    !common.quiet && (wanted || std::io::stdout().is_terminal())
}

pub fn commit(verb: Commit) -> anyhow::Result<u8> {
    let common = &verb.common;
    let asked = common.asked(&verb.image, verb.format.as_deref())?.direct(verb.cache.is_direct());
    let empties = !verb.drop && verb.base.is_none();
    common.check_share(&asked, Rights::ReadWrite)?;
    let mut chain = common.chain(&asked, if empties { Rights::ReadWrite } else { Rights::ReadOnly })?;
    ensure!(chain.layers.len() > 1, "Image does not have a backing file");
    let at = match &verb.base {
        None => 1,
        Some(base) => position(&chain, base).with_context(|| {
            format!("Did not find '{}' in the backing chain of '{}'", base.display(), asked.path.display())
        })?,
    };
    make_writable(&mut chain.layers[at])?;
    let mut upper = layers(chain, &asked);
    let lower = upper.split_off(at);
    Ok(::img::commit::run(::img::commit::Request {
        upper,
        lower,
        empties,
        rate: verb.rate,
        progress: shows_progress(verb.progress, common),
        quiet: common.quiet,
        confinement: common.requirement(),
    })?)
}

/// Where the image called `base` is in a chain, below the top.
fn position(chain: &Chain, base: &Path) -> Option<usize> {
    let names = chain.layers.iter().map(|layer| layer.inspection.backing.as_deref());
    let by_name = names.take(chain.layers.len() - 1).position(|name| name.map(Path::new) == Some(base));
    let identity = open_named(base, Rights::ReadOnly).map(|opened| opened.identity).ok();
    let by_file = || {
        let found = chain.layers.iter().position(|layer| Some(layer.image.identity) == identity);
        found.filter(|&at| at > 0)
    };
    by_name.map(|above| above + 1).or_else(by_file)
}

/// Opens an image of a chain for writing: the one that was found there, and no other.
fn make_writable(layer: &mut Layer) -> anyhow::Result<()> {
    ensure!(layer.inspection.writable, "{} images can only be read", layer.inspection.format);
    let files = std::iter::once(&mut layer.image).chain(&mut layer.data_file).chain(&mut layer.extents);
    for file in files {
        let writable = open_named(&file.path, Rights::ReadWrite)?;
        if writable.identity != file.identity {
            bail!("'{}' was replaced while it was opened", file.path.display());
        }
        if file.bypasses_cache() {
            writable.bypass_cache()?;
        }
        *file = writable;
    }
    Ok(())
}

pub fn rebase(verb: Rebase) -> anyhow::Result<u8> {
    let common = &verb.common;
    ensure!(verb.backing.is_some() || verb.unsafely, "Must specify backing file (-b) or use unsafe mode (-u)");
    let backing = verb.backing.clone().unwrap_or_default();
    if !backing.is_empty() && verb.new_format.is_none() {
        bail!("Could not change the backing file to '{backing}': backing format must be specified");
    }
    let asked = common.asked(&verb.image, verb.format.as_deref())?.direct(verb.cache.is_direct());
    common.check_share(&asked, Rights::ReadWrite)?;
    let opened = open_named(&asked.path, Rights::ReadWrite)?;
    let program = common.confinement.program();
    let format = program.inspect(&opened.file, &opened.path, asked.format.as_deref())?.format;
    let identity = opened.identity;
    let name = asked.path.display().to_string();
    let compared = match verb.unsafely {
        true => None,
        false => {
            let now = common.layers_of(&Asked { format: Some(format.clone()), ..asked.clone() }, Rights::ReadWrite)?;
            let then = match backing.as_str() {
                "" => Vec::new(),
                // As an image's name: beside the image that will name it.
                new => {
                    let path = Path::new(directory(&name)).join(new);
                    let wanted = Asked::named(&path, verb.new_format.as_deref()).direct(is_direct(&verb.backing_cache));
                    let chain = common.chain(&wanted, Rights::ReadOnly);
                    let chain = chain.with_context(|| format!("Could not open new backing file '{new}'"))?;
                    ensure!(
                        chain.layers.iter().all(|layer| layer.image.identity != identity),
                        "'{name}' would be its own backing file"
                    );
                    layers(chain, &wanted)
                }
            };
            let progress = shows_progress(verb.progress, common);
            Some(Compared { now, then, compress: verb.compress, progress })
        }
    };
    Ok(::img::rebase::run(::img::rebase::Request {
        image: named(opened, Some(name)),
        format,
        backing,
        backing_format: verb.new_format,
        compared,
        confinement: common.requirement(),
    })?)
}
