// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The verbs that make images: `convert` and `create`.

use std::fs::File;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use ::img::convert::Target;
use ::img::disk::Named;
use ::img::options::{create_line, known, parse, size};
use anyhow::{Context, bail, ensure};
use clap::Args;
use manager::opening::{Rights, open_named};

use super::images::{Common, bytes};
use crate::Confinement;
use crate::publish::Unpublished;

#[derive(Args)]
pub struct Convert {
    #[command(flatten)]
    common: Common,
    /// Format of the source.
    #[arg(short, long)]
    format: Option<String>,
    /// Format of the new image.
    #[arg(short = 'O', value_name = "FORMAT", default_value = "raw")]
    output_format: String,
    /// Options of the new image: `name=value,…`
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Store every cluster compressed, on all processors.
    #[arg(short)]
    compress: bool,
    /// Show how far it is; on a terminal that is so by default.
    #[arg(short)]
    progress: bool,
    /// The new image is there already: write over it.
    #[arg(short = 'n')]
    no_create: bool,
    /// With -n: it reads as zeroes everywhere.
    #[arg(long, requires = "no_create")]
    target_is_zero: bool,
    /// Runs of zeroes of so many bytes are not written (default 4k); 0 writes everything.
    #[arg(short = 'S', value_name = "SIZE", value_parser = bytes, default_value = "4k")]
    sparse: u64,
    /// Accepted: pieces are always written as they become ready.
    #[arg(short = 'W')]
    out_of_order: bool,
    /// Threads, 1 to 16; by default one to a processor.
    #[arg(short = 'm', value_name = "NUMBER", value_parser = clap::value_parser!(u8).range(1..=16))]
    threads: Option<u8>,
    source: PathBuf,
    target: PathBuf,
}

#[derive(Args)]
pub struct Create {
    /// Say nothing but errors.
    #[arg(short, long)]
    quiet: bool,
    /// The image's format.
    #[arg(short, long, default_value = "raw")]
    format: String,
    /// `name=value,…`
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    /// The backing file.
    #[arg(short, value_name = "FILE")]
    backing: Option<String>,
    /// The backing file's format.
    #[arg(short = 'F', value_name = "FORMAT")]
    backing_format: Option<String>,
    /// Do not look at the backing file.
    #[arg(short)]
    unsafely: bool,
    #[command(flatten)]
    confinement: Confinement,
    image: PathBuf,
    /// Bytes of the disk; k, M, G, T for units of 1024. Without it, as many as the backing file's.
    #[arg(allow_hyphen_values = true)]
    size: Option<String>,
}

pub fn convert(verb: Convert) -> anyhow::Result<u8> {
    let common = &verb.common;
    let source = common.layers(&verb.source, verb.format.as_deref(), Rights::ReadOnly)?;
    let mut unpublished = None;
    let target = if verb.no_create {
        ensure!(verb.options.is_empty(), "-o has no use when the target image exists (-n)");
        let layers = common.layers(&verb.target, Some(&verb.output_format), Rights::ReadWrite)?;
        Target::Existing { layers, is_zero: verb.target_is_zero }
    } else {
        let (options, size) = parse(&verb.options, known(&verb.output_format).map_err(anyhow::Error::msg)?)
            .map_err(anyhow::Error::msg)?;
        ensure!(size.is_none(), "the new image is as large as the source; 'size' cannot be given");
        let name = verb.target.display().to_string();
        if !::img::create::extent_names(&verb.output_format, &options, 512, &name)?.is_empty() {
            bail!(
                "this kind of image has several files, and convert makes one: make it with create, then convert with -n"
            );
        }
        for name in ["backing_file", "data_file"] {
            ensure!(!options.contains_key(name), "'{name}' is not supported by convert in this version");
        }
        let file = if verb.target.metadata().is_ok_and(|target| !target.is_file()) {
            open_named(&verb.target, Rights::ReadWrite)?.file
        } else {
            let (waiting, file) = Unpublished::create(&verb.target)?;
            unpublished = Some(waiting);
            file
        };
        let file = Named { file, name: verb.target.display().to_string() };
        Target::New { file, format: verb.output_format, options }
    };
    let processors = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let threads = verb.threads.map_or(processors.min(16), usize::from);
    ::img::convert::run(::img::convert::Request {
        source,
        target,
        compress: verb.compress,
        sparse: verb.sparse,
        threads,
        progress: !common.quiet && (verb.progress || std::io::stdout().is_terminal()),
        force_share: common.force_share,
        best_effort: common.best_effort(),
    })?;
    unpublished.map_or(Ok(()), Unpublished::publish)?;
    Ok(0)
}

pub fn create(verb: Create) -> anyhow::Result<u8> {
    let (mut options, mut wanted) =
        parse(&verb.options, known(&verb.format).map_err(anyhow::Error::msg)?).map_err(anyhow::Error::msg)?;
    if let Some(text) = &verb.size {
        ensure!(wanted.is_none(), "The image size must be specified only once");
        wanted = Some(size(text).with_context(|| format!("Invalid image size specified: '{text}'."))?);
    }
    ::img::create::name_backing(&mut options, verb.backing.as_deref(), verb.backing_format.as_deref())
        .map_err(anyhow::Error::msg)?;
    let directory = verb.image.parent().map(PathBuf::from).unwrap_or_default();
    let mut parent_cid = None;
    if let (Some((backing, format)), false) = (::img::create::backing(&options), verb.unsafely) {
        let opened = open_named(&directory.join(backing), Rights::ReadOnly).context("Could not open backing image.")?;
        let Some(format) = format else { bail!("Backing file specified without backing format; say it with -F") };
        let found = verb.confinement.program().inspect(&opened.file, &opened.path, Some(format))?;
        wanted = wanted.or(Some(found.virtual_size));
        parent_cid = found.cid;
    }
    let Some(size) = wanted else { bail!("Image creation needs a size parameter") };
    ensure!(i64::try_from(size).is_ok(), "Invalid image size specified. Must be between 0 and {}.", i64::MAX);
    if !verb.quiet {
        ::img::tool::say(&create_line(&verb.image.display().to_string(), &verb.format, size, &options))?;
    }
    let make = |path: &Path| -> anyhow::Result<(Named, bool)> {
        let is_new = !path.exists();
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.with_context(|| format!("could not create '{}'", path.display()))?;
        Ok((Named { file, name: path.display().to_string() }, is_new))
    };
    // What was not there before is not there after a failure.
    let mut new = Vec::new();
    let mut make = |path: &Path| -> anyhow::Result<Named> {
        let (file, is_new) = make(path)?;
        new.extend(is_new.then(|| path.to_owned()));
        Ok(file)
    };
    let made: anyhow::Result<u8> = (|| {
        let image = make(&verb.image)?;
        let data_file = ::img::create::data_file(&options).map(|name| make(&directory.join(name))).transpose()?;
        let name = verb.image.file_name().unwrap_or_default().to_string_lossy();
        let names = ::img::create::extent_names(&verb.format, &options, size, &name)?.into_iter();
        let extents = names.map(|name| Ok((name.clone(), make(&directory.join(&name))?)));
        let extents = extents.collect::<anyhow::Result<Vec<(String, Named)>>>()?;
        let format = verb.format.clone();
        ::img::create::run(::img::create::Request { image, data_file, extents, parent_cid, format, size, options })?;
        Ok(0)
    })();
    if made.is_err() {
        for path in new {
            let _ = std::fs::remove_file(path);
        }
    }
    made.with_context(|| verb.image.display().to_string())
}
