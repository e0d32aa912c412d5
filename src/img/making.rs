// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The verb that makes images: `create`.

use std::fs::File;
use std::path::{Path, PathBuf};

use ::img::disk::Named;
use ::img::options::{create_line, known, parse, size};
use ::img::secrets::Secrets;
use anyhow::{Context, bail, ensure};
use clap::Args;
use manager::opening::{Rights, open_named};

use crate::Confinement;

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
    #[arg(short, long = "backing-unsafe")]
    unsafely: bool,
    /// A passphrase, which options name by its id. May be repeated.
    #[arg(long, value_name = "secret,id=ID,file=FILE")]
    object: Vec<String>,
    #[command(flatten)]
    confinement: Confinement,
    image: PathBuf,
    /// Bytes of the disk; k, M, G, T for units of 1024. Without it, as many as the backing file's.
    #[arg(allow_hyphen_values = true)]
    size: Option<String>,
}

pub fn create(verb: Create) -> anyhow::Result<u8> {
    if verb.options.iter().any(|options| matches!(options.as_str(), "help" | "?")) {
        let known = known(&verb.format).map_err(anyhow::Error::msg)?;
        ::img::tool::say(&::img::options::help(&verb.format, known))?;
        return Ok(0);
    }
    let secrets = Secrets::read(&verb.object).map_err(anyhow::Error::msg)?;
    let known = known(&verb.format).map_err(anyhow::Error::msg)?;
    let mut parsed =
        parse(&verb.options, known, &secrets).map_err(|e| anyhow::anyhow!("{}: {e}", verb.image.display()))?;
    let mut wanted = parsed.size;
    if let Some(text) = &verb.size {
        ensure!(wanted.is_none(), "The image size must be specified only once");
        wanted = Some(size(text).with_context(|| format!("Invalid image size specified: '{text}'."))?);
    }
    ::img::create::name_backing(&mut parsed.options, verb.backing.as_deref(), verb.backing_format.as_deref())
        .map_err(anyhow::Error::msg)?;
    let directory = verb.image.parent().map(PathBuf::from).unwrap_or_default();
    let mut parent_cid = None;
    if let (Some((backing, format)), false) = (::img::create::backing(&parsed.options), verb.unsafely) {
        let opened = open_named(&directory.join(backing), Rights::ReadOnly).context("Could not open backing image.")?;
        let Some(format) = format else { bail!("Backing file specified without backing format; say it with -F") };
        let found = verb.confinement.program().inspect(&opened.file, &opened.path, Some(format))?;
        wanted = wanted.or(Some(found.virtual_size));
        parent_cid = found.cid;
    }
    let Some(size) = wanted else { bail!("Image creation needs a size parameter") };
    ensure!(i64::try_from(size).is_ok(), "Invalid image size specified. Must be between 0 and {}.", i64::MAX);
    if !verb.quiet {
        ::img::tool::say(&create_line(&verb.image.display().to_string(), &verb.format, size, &parsed))?;
    }
    let make = |path: &Path| -> anyhow::Result<(Named, bool)> {
        let is_new = !path.exists();
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.with_context(|| format!("could not create '{}'", path.display()))?;
        Ok((Named { file, name: path.display().to_string() }, is_new))
    };
    let options = parsed.options;
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
