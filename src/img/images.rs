// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What every verb does before it is confined: opening what it was told to, and what the images name as far as the policy of
//! [`manager::chain`] goes.

use std::path::{Path, PathBuf};

use ::img::disk::{Layer, Named};
use ::img::options::size;
use anyhow::bail;
use clap::Args;
use manager::chain::{Chain, Policy};
use manager::opening::{Opened, Rights, open_beneath, open_named};

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
    /// A further directory beneath which files named by an image may be opened. May be repeated.
    #[arg(long, value_name = "DIR")]
    pub allow: Vec<PathBuf>,
    /// Format of backing files whose overlay does not say.
    #[arg(long, value_name = "FORMAT")]
    pub backing_format: Option<String>,
    #[command(flatten)]
    pub confinement: Confinement,
}

/// How a verb answers.
#[derive(Args)]
pub struct Output {
    /// `human` or `json`.
    #[arg(long, value_name = "KIND", default_value = "human", value_parser = ["human", "json"])]
    output: String,
}

impl Common {
    pub fn best_effort(&self) -> bool {
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

    /// Opens an image without those below it: what is asked is not in them.
    pub fn alone(&self, path: &Path, format: Option<&str>, rights: Rights) -> anyhow::Result<Layer> {
        if rights == Rights::ReadWrite && self.force_share {
            bail!("Could not open '{}': force-share=on can only be used with read-only images", path.display());
        }
        let opened = open_named(path, rights)?;
        let found = self.confinement.program().inspect(&opened.file, &opened.path, format)?;
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
            extents: found.extents.iter().map(open).collect::<anyhow::Result<_>>()?,
        })
    }

    pub fn layers(&self, path: &Path, format: Option<&str>, rights: Rights) -> anyhow::Result<Vec<Layer>> {
        Ok(layers(self.chain(path, format, rights)?, path))
    }
}

impl Output {
    pub fn is_json(&self) -> bool {
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

fn beside(above: &str, name: &str) -> String {
    if name.starts_with('/') { name.to_owned() } else { format!("{}{name}", directory(above)) }
}
