// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `doorless img`, and the same under the name `qemu-img`: image verbs with that program's options.
//!
//! This process opens what its arguments name, and what the images name as far as the policy of [`manager::chain`] goes; then it
//! confines itself, and only then looks into an image. What is not built yet is refused by name.

use std::ffi::OsString;
use std::fs::File;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ::img::convert::Target;
use ::img::disk::{Layer, Named};
use ::img::measure::Source;
use ::img::options::{create_line, known, parse, size};
use ::img::resize::Wanted;
use anyhow::{Context, bail, ensure};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use manager::chain::{Chain, Policy};
use manager::inspector::Inspection;
use manager::opening::{Opened, Rights, open_beneath, open_named};

use crate::Confinement;
use crate::publish::Unpublished;

/// Image verbs with qemu-img's options: every image is looked into by a process that can open nothing any more.
#[derive(Parser)]
#[command(args_override_self = true, arg_required_else_help = true)]
struct Options {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Change options of an image: compat, lazy_refcounts, backing_file, backing_fmt.
    Amend(Amend),
    /// Look for damage, and repair it.
    Check(Check),
    /// Tell whether two images show a guest the same.
    Compare(Compare),
    /// Copy an image, with what it is built from, into a new one.
    Convert(Convert),
    /// Make an image.
    Create(Create),
    /// Tell what an image says about itself.
    Info(Info),
    /// Tell where the bytes of an image are stored.
    Map(Map),
    /// Tell how large the file of a new image will be.
    Measure(Measure),
    /// Change the size of an image's disk.
    Resize(Resize),
    #[command(hide = true)]
    Bench(Rest),
    #[command(hide = true)]
    Bitmap(Rest),
    #[command(hide = true)]
    Commit(Rest),
    #[command(hide = true)]
    Dd(Rest),
    #[command(hide = true)]
    Rebase(Rest),
    #[command(hide = true)]
    Snapshot(Rest),
}

#[derive(Args)]
struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    _arguments: Vec<OsString>,
}

/// Options of every verb that opens an image.
#[derive(Args)]
struct Common {
    /// Say nothing but errors.
    #[arg(short, long)]
    quiet: bool,
    /// Open the image although another program may be writing to it.
    #[arg(short = 'U', long)]
    force_share: bool,
    /// A further directory beneath which files named by an image may be opened. May be repeated.
    #[arg(long, value_name = "DIR")]
    allow: Vec<PathBuf>,
    /// Format of backing files whose overlay does not say.
    #[arg(long, value_name = "FORMAT")]
    backing_format: Option<String>,
    #[command(flatten)]
    confinement: Confinement,
}

/// How a verb answers.
#[derive(Args)]
struct Output {
    /// `human` or `json`.
    #[arg(long, value_name = "KIND", default_value = "human", value_parser = ["human", "json"])]
    output: String,
}

#[derive(Args)]
struct Amend {
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
struct Check {
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
struct Compare {
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
struct Convert {
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
struct Create {
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

#[derive(Args)]
struct Info {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    output: Output,
    /// The image's format.
    #[arg(short, long)]
    format: Option<String>,
    /// Tell of the backing files, too.
    #[arg(long)]
    backing_chain: bool,
    image: PathBuf,
}

#[derive(Args)]
struct Map {
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
struct Measure {
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

#[derive(Args)]
struct Resize {
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

/// Runs `arguments` under the name `name`; the exit status is qemu-img's.
pub fn run(name: &'static str, arguments: Vec<OsString>) -> anyhow::Result<ExitCode> {
    let words = std::iter::once(OsString::from(name)).chain(arguments);
    let parsed = Options::command().bin_name(name).try_get_matches_from(words);
    let options = match parsed.and_then(|matches| Options::from_arg_matches(&matches)) {
        Ok(options) => options,
        Err(e) => {
            let help = !e.use_stderr();
            e.print()?;
            return Ok(if help { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
    };
    let refused = |verb: &str| bail!("the verb '{verb}' is not supported by this version");
    let status = match options.verb {
        Verb::Amend(verb) => amend(verb)?,
        Verb::Check(verb) => check(verb)?,
        // 1 says that the images differ.
        Verb::Compare(verb) => match compare(verb) {
            Ok(status) => status,
            Err(e) => {
                eprintln!("{name}: {e:#}");
                2
            }
        },
        Verb::Convert(verb) => convert(verb)?,
        Verb::Create(verb) => create(verb)?,
        Verb::Info(verb) => info(verb)?,
        Verb::Map(verb) => map(verb)?,
        Verb::Measure(verb) => measure(verb)?,
        Verb::Resize(verb) => resize(verb)?,
        Verb::Bench(_) => return refused("bench"),
        Verb::Bitmap(_) => return refused("bitmap"),
        Verb::Commit(_) => return refused("commit"),
        Verb::Dd(_) => return refused("dd"),
        Verb::Rebase(_) => return refused("rebase"),
        Verb::Snapshot(_) => return refused("snapshot"),
    };
    Ok(ExitCode::from(status))
}

impl Common {
    fn best_effort(&self) -> bool {
        self.confinement.confine == "best-effort"
    }

    /// Opens an image and all that it is built from.
    fn chain(&self, path: &Path, format: Option<&str>, rights: Rights) -> anyhow::Result<Chain> {
        let policy = Policy {
            format: format.map(str::to_owned),
            backing_format: self.backing_format.clone(),
            read_only: rights == Rights::ReadOnly,
            snapshot: false,
            allowed: self.allow.clone(),
            direct: false,
        };
        let chain = manager::chain::open(&self.confinement.program(), path, &policy)?;
        if rights == Rights::ReadWrite && chain.layers[0].image.rights == Rights::ReadOnly {
            bail!("{} images can only be read", chain.layers[0].inspection.format);
        }
        Ok(chain)
    }

    /// Opens the extents of the image at `path` that are files of their own, to be read.
    fn extents(&self, path: &Path, names: &[String]) -> anyhow::Result<Vec<Named>> {
        let path = path.canonicalize()?;
        let base = path.parent().map(PathBuf::from).unwrap_or_default();
        let mut roots = vec![base.clone()];
        roots.extend(self.allow.iter().filter_map(|root| root.canonicalize().ok()));
        let open = |name: &String| Ok(named(open_beneath(&roots, &base, name, Rights::ReadOnly)?, None));
        names.iter().map(open).collect()
    }

    fn layers(&self, path: &Path, format: Option<&str>, rights: Rights) -> anyhow::Result<Vec<Layer>> {
        Ok(layers(self.chain(path, format, rights)?, path))
    }
}

impl Output {
    fn is_json(&self) -> bool {
        self.output == "json"
    }
}

/// The layers of a chain under the names that they would have on a command line.
fn layers(chain: Chain, path: &Path) -> Vec<Layer> {
    let mut next = path.display().to_string();
    let layer = |layer: manager::chain::Layer| {
        let name = next.clone();
        if let Some(backing) = &layer.inspection.backing {
            next = beside(&name, backing);
        }
        let data_name = layer.inspection.data_file.as_deref().map(|data| beside(&name, data));
        let data_file = layer.data_file.map(|data| named(data, data_name));
        let extents = layer.extents.into_iter().map(|extent| named(extent, None)).collect();
        Layer { image: named(layer.image, Some(name)), format: layer.inspection.format, data_file, extents }
    };
    chain.layers.into_iter().map(layer).collect()
}

fn named(opened: Opened, name: Option<String>) -> Named {
    Named { name: name.unwrap_or_else(|| opened.path.display().to_string()), file: opened.file }
}

fn bytes(text: &str) -> Result<u64, String> {
    size(text).ok_or_else(|| format!("'{text}' is not a number of bytes; k, M, G, T, P and E stand for units of 1024"))
}

fn amend(verb: Amend) -> anyhow::Result<u8> {
    let image = named(open_named(&verb.image, Rights::ReadWrite)?, Some(verb.image.display().to_string()));
    let best_effort = verb.common.best_effort();
    Ok(::img::amend::run(::img::amend::Request { image, format: verb.format, options: verb.options, best_effort })?)
}

fn check(verb: Check) -> anyhow::Result<u8> {
    let repair = ::img::check::repair(verb.repair.as_deref());
    let rights = if verb.repair.is_some() { Rights::ReadWrite } else { Rights::ReadOnly };
    Ok(::img::check::run(::img::check::Request {
        image: named(open_named(&verb.image, rights)?, Some(verb.image.display().to_string())),
        format: verb.format,
        repair,
        json: verb.output.is_json(),
        quiet: verb.common.quiet,
        force_share: verb.common.force_share,
        best_effort: verb.common.best_effort(),
    })?)
}

fn compare(verb: Compare) -> anyhow::Result<u8> {
    let common = &verb.common;
    let first = common.layers(&verb.first, verb.f.as_deref(), Rights::ReadOnly)?;
    let second = common.layers(&verb.second, verb.second_format.as_deref(), Rights::ReadOnly)?;
    Ok(::img::compare::run(::img::compare::Request {
        images: [first, second],
        strict: verb.strict,
        quiet: common.quiet,
        force_share: common.force_share,
        best_effort: common.best_effort(),
    })?)
}

fn convert(verb: Convert) -> anyhow::Result<u8> {
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

fn create(verb: Create) -> anyhow::Result<u8> {
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

fn info(verb: Info) -> anyhow::Result<u8> {
    let common = &verb.common;
    let name = verb.image.display().to_string();
    let (layers, directories) = if verb.backing_chain {
        let layers = common.layers(&verb.image, verb.format.as_deref(), Rights::ReadOnly)?;
        let directories = layers.iter().map(|layer| directory(&layer.image.name).to_owned()).collect();
        (layers, directories)
    } else {
        let opened = open_named(&verb.image, Rights::ReadOnly)?;
        let found = common.confinement.program().inspect(&opened.file, &opened.path, verb.format.as_deref())?;
        let Inspection { format, data_file, extents, .. } = found;
        let data_file = data_file.map(|data| {
            let path = verb.image.canonicalize()?;
            let base = path.parent().map(PathBuf::from).unwrap_or_default();
            let mut roots = vec![base.clone()];
            roots.extend(common.allow.iter().filter_map(|root| root.canonicalize().ok()));
            Ok::<_, anyhow::Error>(named(open_beneath(&roots, &base, &data, Rights::ReadOnly)?, None))
        });
        let directory = directory(&name).to_owned();
        let image = named(opened, Some(name));
        let extents = common.extents(&verb.image, &extents)?;
        (vec![Layer { image, format, data_file: data_file.transpose()?, extents }], vec![directory])
    };
    Ok(::img::info::run(::img::info::Request {
        layers,
        directories,
        chain: verb.backing_chain,
        json: verb.output.is_json(),
        force_share: common.force_share,
        best_effort: common.best_effort(),
    })?)
}

/// The directory of a name, with its slash.
fn directory(name: &str) -> &str {
    name.rfind('/').map_or("", |slash| &name[..=slash])
}

fn beside(above: &str, name: &str) -> String {
    if name.starts_with('/') { name.to_owned() } else { format!("{}{name}", directory(above)) }
}

fn map(verb: Map) -> anyhow::Result<u8> {
    let common = &verb.common;
    Ok(::img::map::run(::img::map::Request {
        layers: common.layers(&verb.image, verb.format.as_deref(), Rights::ReadOnly)?,
        start: verb.start_offset,
        len: verb.max_length,
        json: verb.output.is_json(),
        force_share: common.force_share,
        best_effort: common.best_effort(),
    })?)
}

fn measure(verb: Measure) -> anyhow::Result<u8> {
    let common = &verb.common;
    let (options, _) =
        parse(&verb.options, known(&verb.output_format).map_err(anyhow::Error::msg)?).map_err(anyhow::Error::msg)?;
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
        best_effort: common.best_effort(),
    })?)
}

fn resize(verb: Resize) -> anyhow::Result<u8> {
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
        best_effort: verb.common.best_effort(),
    })?)
}
