// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `create`: a new image. Nothing foreign is read for it.

use block::{CreateRequest, NewExtent, OptionValue, Options};

use crate::disk::{Disk, Named, Usage};
use crate::tool::Result;

/// What is asked.
pub struct Request {
    /// The file, writable; what is in it is lost.
    pub image: Named,
    /// Where its data goes, if it is to have an external data file.
    pub data_file: Option<Named>,
    /// Where its extents go that are files of their own, with what the image calls them.
    pub extents: Vec<(String, Named)>,
    /// The content id of its backing file.
    pub parent_cid: Option<u32>,
    /// The format.
    pub format: String,
    /// Bytes of the disk.
    pub size: u64,
    /// The format's options.
    pub options: Options,
}

/// Makes it.
///
/// # Errors
/// Options that contradict each other, another program that uses the file, or those of the host.
pub fn run(request: Request) -> Result<()> {
    let usage = Usage { writable: true, force_share: false, unflushed: false };
    let file = Disk::file(request.image, usage)?;
    let data = request.data_file.map(|data| Disk::file(data, usage)).transpose()?;
    let extents = request.extents.into_iter().map(|(name, file)| Ok((name, Disk::file(file, usage)?)));
    let extents = extents.collect::<block::Result<Vec<(String, Disk)>>>()?;
    let created = CreateRequest {
        file: file.node.clone(),
        data_file: data.as_ref().map(|data| data.node.clone()),
        extents: extents.iter().map(|(name, disk)| NewExtent { name: name.clone(), node: disk.node.clone() }).collect(),
        parent_cid: request.parent_cid,
        // QEMU, too, rounds up for its user.
        size: request.size.checked_next_multiple_of(512).unwrap_or(request.size),
        options: request.options,
    };
    block::create(&request.format, &created)?;
    Ok(())
}

/// Puts `-b` and `-F` among the options.
///
/// # Errors
/// An option says it, too.
pub fn name_backing(
    options: &mut Options,
    name: Option<&str>,
    format: Option<&str>,
) -> std::result::Result<(), String> {
    for (option, value, what) in
        [("backing_file", name, "backing file"), ("backing_fmt", format, "backing file format")]
    {
        let Some(value) = value else { continue };
        if options.insert(option, OptionValue::Str(value.to_owned())).is_some() {
            return Err(format!("Backing {} specified more than once", what.trim_start_matches("backing ")));
        }
    }
    Ok(())
}

/// The backing file and its format.
pub fn backing(options: &Options) -> Option<(&str, Option<&str>)> {
    Some((text(options, "backing_file")?, text(options, "backing_fmt")))
}

/// What the files are called that an image has besides its own.
///
/// # Errors
/// Options or a size that the format does not know.
pub fn extent_names(format: &str, options: &Options, size: u64, name: &str) -> Result<Vec<String>> {
    Ok(block::extent_names(format, options, size, name)?)
}

/// The external data file.
pub fn data_file(options: &Options) -> Option<&str> {
    text(options, "data_file")
}

fn text<'a>(options: &'a Options, name: &str) -> Option<&'a str> {
    match options.get(name) {
        Some(OptionValue::Str(text)) if !text.is_empty() => Some(text),
        _ => None,
    }
}
