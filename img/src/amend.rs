// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `amend`: other options for an image that is there.

use block::format_named;

use confine::Requirement;

use crate::disk::{Disk, Named, Usage, format_of};
use crate::options;
use crate::secrets::Secrets;
use crate::tool::{Error, Result, confine};

/// What is asked.
pub struct Request {
    /// The image, writable.
    pub image: Named,
    /// Its format, if its user says it.
    pub format: Option<String>,
    /// `-o`, as it was written.
    pub options: Vec<String>,
    /// Secrets that they name.
    pub secrets: Secrets,
    /// Which layers of confinement must be had.
    pub confinement: Requirement,
}

/// Amends; the exit status.
///
/// # Errors
/// The image cannot be opened or changed that way.
pub fn run(request: Request) -> Result<u8> {
    confine(request.confinement)?;
    let disk = Disk::file(request.image, Usage { writable: true, force_share: false, unflushed: false })?;
    let format = format_of(&disk.node, request.format.as_deref())?;
    let known = format_named(&format).map_or(&[][..], |format| format.create_options);
    let options::Parsed { options, size, .. } =
        options::parse(&request.options, known, &request.secrets).map_err(Error::Text)?;
    if size.is_some() {
        return Err(Error::Text("the size is changed by the verb 'resize'".into()));
    }
    block::amend(&disk.node, &format, &options)?;
    disk.close()?;
    Ok(0)
}
