// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What every verb does before it is confined: opening what it was told to, and what the images name as far as the policy of
//! [`manager::chain`] goes.

use std::path::{Path, PathBuf};

use ::img::disk::{Layer, Named};
use ::img::options::size;
use ::img::secrets::Secrets;
use anyhow::{bail, ensure};
use clap::Args;
use manager::chain::{Chain, Policy};
use manager::directory::FORMAT;
use manager::opening::{Opened, Rights, open_beneath, open_named};

use super::asked::Asked;
use crate::Confinement;

/// Options of every verb that opens an image.
#[derive(Args)]
pub struct Common {
    /// Say nothing but errors.
    #[arg(short, long)]
    pub quiet: bool,
    /// Open the image although another program may be writing to it.
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// A passphrase, which options name by its id. May be repeated.
    #[arg(long, value_name = "secret,id=ID,file=FILE")]
    object: Vec<String>,
    /// Images are given as options: `driver=…,file.filename=…,key-secret=…`.
    #[arg(long)]
    pub image_opts: bool,
    /// A further directory beneath which files named by an image may be opened. May be repeated.
    #[arg(long, value_name = "DIR")]
    pub allow: Vec<PathBuf>,
    /// Format of backing files whose overlay does not say.
    #[arg(long, value_name = "FORMAT")]
    pub backing_format: Option<String>,
    #[command(flatten)]
    pub confinement: Confinement,
}

/// How the host caches an image.
#[derive(Args)]
pub struct Cache {
    /// `writeback`, `writethrough`, `none`, `directsync` or `unsafe`; everything is on disk at the end, unless `convert` is
    /// told `unsafe`.
    #[arg(short = 't', long = "cache", value_name = "MODE", value_parser = CACHE_MODES, default_value = "writeback")]
    cache: String,
}

/// Names of cache modes.
pub const CACHE_MODES: [&str; 6] = ["writeback", "writethrough", "none", "off", "directsync", "unsafe"];

/// Whether a cache mode passes by the host's cache.
pub fn is_direct(mode: &str) -> bool {
    matches!(mode, "none" | "off" | "directsync")
}

impl Cache {
    /// Whether nothing is brought to disk.
    pub fn is_unsafe(&self) -> bool {
        self.cache == "unsafe"
    }

    pub fn is_direct(&self) -> bool {
        is_direct(&self.cache)
    }
}

/// How a verb answers.
#[derive(Args)]
pub struct Output {
    /// `human` or `json`.
    #[arg(long, value_name = "KIND", default_value = "human", value_parser = ["human", "json"])]
    output: String,
}

impl Common {
    pub fn requirement(&self) -> ::img::Requirement {
        self.confinement.confine
    }

    /// The passphrases that `--object` names.
    pub fn secrets(&self) -> anyhow::Result<Secrets> {
        Secrets::read(&self.object).map_err(anyhow::Error::msg)
    }

    /// The image that an argument means.
    pub fn asked(&self, argument: &Path, format: Option<&str>) -> anyhow::Result<Asked> {
        if !self.image_opts {
            return Ok(Asked::named(argument, format));
        }
        ensure!(format.is_none(), "--image-opts and --format are mutually exclusive");
        Asked::parse(&argument.to_string_lossy(), &self.secrets()?).map_err(anyhow::Error::msg)
    }

    /// Whether `-U` goes with what is to be done.
    pub fn check_share(&self, asked: &Asked, rights: Rights) -> anyhow::Result<()> {
        let shares_writes = self.force_share && rights == Rights::ReadWrite;
        let image = asked.path.display();
        ensure!(!shares_writes, "Could not open '{image}': force-share=on can only be used with read-only images");
        Ok(())
    }

    /// Opens an image and all that it is built from.
    pub fn chain(&self, asked: &Asked, rights: Rights) -> anyhow::Result<Chain> {
        let policy = Policy {
            format: asked.format.clone(),
            backing_format: self.backing_format.clone(),
            read_only: rights == Rights::ReadOnly,
            snapshot: false,
            allowed: self.allow.clone(),
            direct: asked.direct,
            ..Policy::default()
        };
        ensure!(
            asked.format.as_deref() != Some(FORMAT),
            "a directory is no image: doorless serve makes a FAT disk of it"
        );
        let chain = manager::chain::open(&self.confinement.program(), &asked.path, &policy)?;
        if rights == Rights::ReadWrite && chain.layers[0].image.rights == Rights::ReadOnly {
            bail!("{} images can only be read", chain.layers[0].inspection.format);
        }
        Ok(chain)
    }

    /// Opens an image without those below it: what is asked is not in them.
    pub fn alone(&self, argument: &Path, format: Option<&str>, rights: Rights) -> anyhow::Result<Layer> {
        let asked = self.asked(argument, format)?;
        let path = &asked.path;
        self.check_share(&asked, rights)?;
        let opened = open_named(path, rights)?;
        let found = self.confinement.program().inspect(&opened.file, &opened.path, asked.format.as_deref())?;
        let whole = path.canonicalize()?;
        let base = whole.parent().map(PathBuf::from).unwrap_or_default();
        let mut roots = vec![base.clone()];
        roots.extend(self.allow.iter().filter_map(|root| root.canonicalize().ok()));
        let open =
            |name: &String| -> anyhow::Result<Named> { Ok(named(open_beneath(&roots, &base, name, rights)?, None)) };
        Ok(Layer {
            image: named(opened, Some(path.display().to_string())),
            format: found.format,
            data_file: found.data_file.as_ref().map(open).transpose()?,
            secret: asked.secrets.first().cloned().flatten(),
            extents: found.extents.iter().map(open).collect::<anyhow::Result<_>>()?,
        })
    }

    /// Opens an image and all that it is built from, as layers.
    pub fn layers(&self, argument: &Path, format: Option<&str>, rights: Rights) -> anyhow::Result<Vec<Layer>> {
        let asked = self.asked(argument, format)?;
        self.check_share(&asked, rights)?;
        self.layers_of(&asked, rights)
    }

    /// As [`Common::layers`], for an image that was read from the command line before.
    pub fn layers_of(&self, asked: &Asked, rights: Rights) -> anyhow::Result<Vec<Layer>> {
        Ok(layers(self.chain(asked, rights)?, asked))
    }
}

impl Output {
    pub fn is_json(&self) -> bool {
        self.output == "json"
    }
}

/// The layers of a chain under the names that they would have on a command line.
pub fn layers(chain: Chain, asked: &Asked) -> Vec<Layer> {
    let mut next = asked.path.display().to_string();
    let mut secrets = asked.secrets.iter().cloned();
    let layer = |layer: manager::chain::Layer| {
        let name = next.clone();
        if let Some(backing) = &layer.inspection.backing {
            next = beside(&name, backing);
        }
        let data_name = layer.inspection.data_file.as_deref().map(|data| beside(&name, data));
        let data_file = layer.data_file.map(|data| named(data, data_name));
        let extents = layer.extents.into_iter().map(|extent| named(extent, None)).collect();
        let secret = secrets.next().flatten();
        Layer { image: named(layer.image, Some(name)), format: layer.inspection.format, data_file, extents, secret }
    };
    chain.layers.into_iter().map(layer).collect()
}

pub fn named(opened: Opened, name: Option<String>) -> Named {
    Named { name: name.unwrap_or_else(|| opened.path.display().to_string()), file: opened.file }
}

pub fn bytes(text: &str) -> Result<u64, String> {
    size(text).ok_or_else(|| format!("'{text}' is not a number of bytes; k, M, G, T, P and E stand for units of 1024"))
}

/// The directory of a name, with its slash.
pub fn directory(name: &str) -> &str {
    name.rfind('/').map_or("", |slash| &name[..=slash])
}

/// A name that the image called `above` gives, as it would be on a command line.
pub fn beside(above: &str, name: &str) -> String {
    if name.starts_with('/') { name.to_owned() } else { format!("{}{name}", directory(above)) }
}
