// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The image that a copy goes into: made beside its final name, which it gets when it is whole.

use std::path::{Path, PathBuf};

use ::img::convert::Target;
use ::img::create::{backing, data_file, extent_names, name_backing};
use ::img::disk::{Layer, Named};
use ::img::options::{known, parse};
use anyhow::{Context, bail, ensure};
use manager::opening::{Rights, open_named};

use super::asked::Asked;
use super::images::{Common, layers};
use crate::publish::Unpublished;

/// What is to be made.
pub struct Wanted<'a> {
    pub path: &'a Path,
    pub format: &'a str,
    /// `-o`, as it was written.
    pub options: &'a [String],
    pub backing: Option<&'a str>,
    pub backing_format: Option<&'a str>,
    /// Whether it is written past the host's cache.
    pub is_direct: bool,
    /// Bytes of the guest's disk, if that is known before the source is read: an image of several files must know.
    pub size: Option<u64>,
}

/// Files that wait for their names, those first that the last one names.
pub struct NewImage(Vec<Unpublished>);

impl NewImage {
    /// Makes the files and opens what the image will be made over.
    pub fn make(common: &Common, wanted: &Wanted<'_>) -> anyhow::Result<(NewImage, Target)> {
        let known = known(wanted.format).map_err(anyhow::Error::msg)?;
        let parsed = parse(wanted.options, known, &common.secrets()?).map_err(anyhow::Error::msg)?;
        ensure!(parsed.size.is_none(), "the new image is as large as the source; 'size' cannot be given");
        let mut options = parsed.options;
        name_backing(&mut options, wanted.backing, wanted.backing_format).map_err(anyhow::Error::msg)?;
        let name = wanted.path.file_name().unwrap_or_default().to_string_lossy();
        let extents = match wanted.size.map(|size| size.checked_next_multiple_of(512).unwrap_or(size)) {
            Some(size) => extent_names(wanted.format, &options, size, &name)?,
            None if extent_names(wanted.format, &options, 512, &name)?.is_empty() => Vec::new(),
            None => bail!(
                "this kind of image has several files, which cannot be made before the size is known: make it with create, \
                 then convert with -n"
            ),
        };
        let directory = wanted.path.parent().map(PathBuf::from).unwrap_or_default();
        let (mut parent_cid, mut below): (_, Vec<Layer>) = (None, Vec::new());
        if let Some((file, format)) = backing(&options) {
            let format = format.context("Backing file specified without backing format; say it with -F")?;
            let asked = Asked::named(&directory.join(file), Some(format));
            let chain = common.chain(&asked, Rights::ReadOnly).context("Could not open backing image.")?;
            parent_cid = chain.layers[0].inspection.cid;
            below = layers(chain, &asked);
        }
        let mut image = NewImage(Vec::new());
        let data_file = data_file(&options).map(|name| image.open(&directory.join(name), wanted.is_direct));
        let data_file = data_file.transpose()?.map(|(data, _)| data);
        let extents = extents.into_iter().map(|name| {
            let (file, _) = image.open(&directory.join(&name), wanted.is_direct)?;
            Ok((name, file))
        });
        let extents = extents.collect::<anyhow::Result<Vec<_>>>()?;
        let (file, is_zero) = image.open(wanted.path, wanted.is_direct)?;
        let format = wanted.format.to_owned();
        Ok((image, Target::New { file, format, options, data_file, extents, backing: below, parent_cid, is_zero }))
    }

    /// A file for `path`, and whether it reads as zeroes where nothing was written.
    fn open(&mut self, path: &Path, direct: bool) -> anyhow::Result<(Named, bool)> {
        let name = path.display().to_string();
        if path.metadata().is_ok_and(|target| !target.is_file()) {
            let opened = open_named(path, Rights::ReadWrite)?;
            if direct {
                opened.bypass_cache()?;
            }
            return Ok((Named { file: opened.file, name }, false));
        }
        let (waiting, file) = Unpublished::create(path)?;
        self.0.push(waiting);
        if direct {
            manager::opening::bypass_cache(&file, path)?;
        }
        Ok((Named { file, name }, true))
    }

    /// All is whole: the files get their names.
    pub fn publish(self) -> anyhow::Result<()> {
        self.0.into_iter().try_for_each(Unpublished::publish)
    }
}
