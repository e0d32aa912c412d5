// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QEMU's spelling of a directory that becomes a FAT disk: `fat:[12:|16:|32:][floppy:][rw:]DIR`.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{bail, ensure};
use manager::directory::{FORMAT, Options};
use manager::serve::Served;
use manager::written_back::Outcome;

/// What is served: the path, its format if it is said, and which disk a directory becomes.
///
/// # Errors
/// It is said to have another format.
pub fn spelled(
    image: &Path,
    format: Option<String>,
    mut options: Options,
) -> anyhow::Result<(PathBuf, Option<String>, Options)> {
    let Some(mut rest) = image.as_os_str().as_bytes().strip_prefix(b"fat:") else {
        return Ok((image.to_owned(), format, options));
    };
    // A disk without a format over it is what it is, and QEMU's users say so to be spared its probing.
    if let Some(format) = format.filter(|format| ![FORMAT, "raw"].contains(&format.as_str())) {
        bail!("'{}' is a directory as a FAT disk, and cannot have the format {format}", image.display());
    }
    while let Some(colon) = rest.iter().position(|&byte| byte == b':') {
        match &rest[..colon] {
            b"12" => options.fat_type = Some(12),
            b"16" => options.fat_type = Some(16),
            b"32" => options.fat_type = Some(32),
            b"floppy" => options.floppy = true,
            b"rw" => options.rw = true,
            _ => break,
        }
        rest = &rest[colon + 1..];
    }
    Ok((OsStr::from_bytes(rest).into(), Some(FORMAT.into()), options))
}

/// Puts what guests wrote into the directory, if that was asked for, and says what came of it.
///
/// # Errors
/// Something of it, or all, is not there.
pub fn write_back(served: &mut Served) -> anyhow::Result<()> {
    let Some(outcome) = served.write_back()? else { return Ok(()) };
    let Outcome { written, removed, refused, unclean, .. } = outcome;
    eprintln!("doorless: written back: {written} files written, {removed} files and directories removed");
    if unclean {
        eprintln!("doorless: the guest had not unmounted the disk; what it had not written yet is missing");
    }
    for refusal in &refused {
        eprintln!("doorless: {refusal}");
    }
    ensure!(refused.is_empty(), "{} changes of the guest were not made in the directory", refused.len());
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_fat_disk_is_spelled_as_in_qemu() {
        let spelled = |text: &str| spelled(Path::new(text), None, Options::default());
        let (path, format, options) = spelled("fat:floppy:12:/tmp/a:b").unwrap();
        assert_eq!((path, format.as_deref()), (PathBuf::from("/tmp/a:b"), Some(FORMAT)));
        assert_eq!(options, Options { fat_type: Some(12), floppy: true, ..Options::default() });
        assert_eq!(spelled("fat:dir").unwrap().0, PathBuf::from("dir"));
        assert_eq!(spelled("fat.img").unwrap().1, None);
        let with = |format: &str| super::spelled(Path::new("fat:dir"), Some(format.into()), Options::default());
        assert_eq!(with("raw").unwrap().1.as_deref(), Some(FORMAT));
        assert!(with("qcow2").is_err());
    }
}
