// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an image is built from: the chain of backing files, and the external data file or the extents of each layer.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::inspector::{Inspection, Program};
use crate::opening::{Opened, Rights, open_beneath, open_named};
use crate::{Error, Result, directory, overlay};

/// Most layers in a chain.
const MAX_LAYERS: usize = 64;

/// What the user allows.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// The format of the image; `None` lets the confined inspector look for a magic number.
    pub format: Option<String>,
    /// The format of a backing file whose image does not say; guessing it would let a guest choose.
    pub backing_format: Option<String>,
    /// Whether the top may only be read.
    pub read_only: bool,
    /// Whether what is written goes into a temporary [overlay]; without effect on what is only read anyway.
    pub snapshot: bool,
    /// Whether the host's cache is bypassed (`O_DIRECT`).
    pub direct: bool,
    /// Directories, besides the image's own, beneath which named files may be opened.
    pub allowed: Vec<PathBuf>,
    /// Which disk a directory becomes, for the format `vvfat`.
    pub vvfat: directory::Options,
}

/// A layer: an image, and where its data is if not in itself.
#[derive(Debug)]
pub struct Layer {
    /// The image.
    pub image: Opened,
    /// What it says.
    pub inspection: Inspection,
    /// Its external data file.
    pub data_file: Option<Opened>,
    /// Its extents that are files of their own, in order.
    pub extents: Vec<Opened>,
    /// What is in it, if it is a directory.
    pub directory: Option<directory::Directory>,
}

/// A chain of layers, the top first.
#[derive(Debug)]
pub struct Chain {
    /// At least one.
    pub layers: Vec<Layer>,
    /// What the user should know: why the top is read-only unasked, or that what is written is kept in memory.
    pub notice: Option<String>,
}

/// Who opens the files of a chain.
pub trait Opener {
    /// The image that was asked for.
    ///
    /// # Errors
    /// It may not be opened, or cannot be.
    fn top(&mut self, path: &Path, rights: Rights) -> Result<Opened>;

    /// What an image names. `base` is the directory of that image, for a relative name, which is untrusted text.
    ///
    /// # Errors
    /// It may not be opened, or cannot be.
    fn named(&mut self, base: &Path, name: &str, rights: Rights) -> Result<Opened>;

    /// Hears what the image opened last turned out to be; `layers` are above it.
    ///
    /// # Errors
    /// Such an image may not be part of a chain there.
    fn accept(&mut self, image: &Opened, inspection: &Inspection, layers: usize) -> Result<()>;
}

/// By the user's own word: what he named, and beneath directories that he allowed, what images name.
struct ByWord {
    roots: Vec<PathBuf>,
}

impl Opener for ByWord {
    fn top(&mut self, path: &Path, rights: Rights) -> Result<Opened> {
        open_named(path, rights)
    }

    fn named(&mut self, base: &Path, name: &str, rights: Rights) -> Result<Opened> {
        open_beneath(&self.roots, base, name, rights)
    }

    fn accept(&mut self, _: &Opened, _: &Inspection, _: usize) -> Result<()> {
        Ok(())
    }
}

/// Opens `path` and everything it is built from, by the user's own word.
///
/// # Errors
/// A file cannot be opened or may not be, an image is broken, the chain is too long or bites its tail.
pub fn open(program: &Program, path: &Path, policy: &Policy) -> Result<Chain> {
    if policy.format.as_deref() == Some(directory::FORMAT) {
        if policy.direct {
            let text = "the files of a directory are read through the host's cache: serve it without O_DIRECT";
            return Err(Error::Refused(text.into()));
        }
        return directory::open(path, &policy.vvfat);
    }
    // What it is comes before where its neighbours may be.
    open_named(path, Rights::ReadOnly)?;
    let path = path.canonicalize().map_err(|source| Error::Open { path: path.to_owned(), purpose: "", source })?;
    let mut roots = vec![path.parent().map(PathBuf::from).unwrap_or_default()];
    for root in &policy.allowed {
        let canonical = root.canonicalize().map_err(|source| Error::Open {
            path: root.clone(),
            purpose: " for --allow",
            source,
        })?;
        roots.push(canonical);
    }
    open_with(program, &path, policy, &mut ByWord { roots })
}

/// Opens `path`, which is absolute, and everything it is built from, by `opener`'s leave.
///
/// # Errors
/// A file cannot be opened or may not be, an image is broken, the chain is too long or bites its tail.
pub fn open_with(program: &Program, path: &Path, policy: &Policy, opener: &mut dyn Opener) -> Result<Chain> {
    let mut seen = BTreeSet::new();
    let mut notice = None;
    let mut image = opener.top(path, Rights::ReadOnly)?;
    let mut format = policy.format.clone();
    let mut layers: Vec<Layer> = Vec::new();
    let mut base = path.parent().map(PathBuf::from).unwrap_or_default();
    let overlaid = policy.snapshot && !policy.read_only;
    loop {
        if layers.len() == MAX_LAYERS {
            return Err(Error::Refused(format!("the chain has more than {MAX_LAYERS} layers")));
        }
        if !seen.insert(image.identity) {
            let text = "is part of its own backing chain".into();
            return Err(Error::Image { path: image.path, text });
        }
        let inspection = program.inspect(&image.file, &image.path, format.as_deref())?;
        opener.accept(&image, &inspection, layers.len())?;
        let mut rights = Rights::ReadOnly;
        if layers.is_empty() && !policy.read_only && !overlaid {
            if inspection.writable {
                let writable = opener.top(path, Rights::ReadWrite)?;
                if writable.identity != image.identity {
                    return Err(Error::Refused(format!("'{}' was replaced while it was opened", path.display())));
                }
                image = writable;
                rights = Rights::ReadWrite;
            } else {
                notice = Some(format!("{} images can only be read; serving read-only", inspection.format));
            }
        }
        let data_file = match &inspection.data_file {
            Some(name) => Some(opener.named(&base, name, rights)?),
            None => None,
        };
        let extents = inspection.extents.iter().map(|name| opener.named(&base, name, rights));
        let extents = extents.collect::<Result<Vec<Opened>>>()?;
        let next = match &inspection.backing {
            None => None,
            Some(name) => {
                let next = opener.named(&base, name, Rights::ReadOnly)?;
                format = inspection.backing_format.clone().or_else(|| policy.backing_format.clone());
                if format.is_none() {
                    return Err(Error::Refused(format!(
                        "'{}' does not say which format its backing file '{}' has; say it with --backing-format",
                        image.path.display(),
                        name.escape_debug()
                    )));
                }
                Some(next)
            }
        };
        if policy.direct {
            for opened in [Some(&image), data_file.as_ref()].into_iter().flatten().chain(&extents) {
                opened.bypass_cache()?;
            }
        }
        layers.push(Layer { image, inspection, data_file, extents, directory: None });
        match next {
            None if overlaid => {
                let (overlay, notice) = overlay::make(program, layers[0].inspection.virtual_size)?;
                layers.insert(0, overlay);
                return Ok(Chain { layers, notice });
            }
            None => return Ok(Chain { layers, notice }),
            Some(next) => {
                base = next.path.parent().map(PathBuf::from).unwrap_or_default();
                image = next;
            }
        }
    }
}
