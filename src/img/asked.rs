// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An image as the command line names it: by its file's name, or by options (`--image-opts`).

use std::path::{Path, PathBuf};

use ::img::options::split;
use ::img::secrets::{Secret, Secrets};

/// An image that is to be opened.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// Its file.
    pub path: PathBuf,
    /// Its format, if it was said.
    pub format: Option<String>,
    /// Passphrases, of the image itself and of those below it, in order.
    pub secrets: Vec<Option<Secret>>,
    /// Whether the host's cache is passed by.
    pub direct: bool,
}

impl Asked {
    /// An image by its file's name.
    pub fn named(path: &Path, format: Option<&str>) -> Asked {
        Asked { path: path.to_owned(), format: format.map(str::to_owned), ..Asked::default() }
    }

    /// The same image, past the host's cache or not.
    #[must_use]
    pub fn direct(self, direct: bool) -> Asked {
        Asked { direct, ..self }
    }

    /// An image by options. Those of the images below it have `backing.` in front, as often as it takes.
    ///
    /// # Errors
    /// An option that there is not, or none that says which file it is: QEMU's words.
    pub fn parse(text: &str, secrets: &Secrets) -> Result<Asked, String> {
        let (mut asked, mut path, mut plain) = (Asked::default(), None, None);
        for word in split(text) {
            let (name, value) = word.split_once('=').unwrap_or(("file", &word));
            let mut inner = name;
            let mut depth = 0;
            while let Some(below) = inner.strip_prefix("backing.") {
                (inner, depth) = (below, depth + 1);
            }
            match (inner, depth) {
                ("driver", 0) => asked.format = Some(value.to_owned()),
                ("file.filename", 0) => path = Some(PathBuf::from(value)),
                ("filename", 0) => plain = Some(PathBuf::from(value)),
                ("file", 0) => {
                    return Err(format!(
                        "Could not open '{text}': Cannot find device='{value}' nor node-name='{value}'"
                    ));
                }
                ("file.driver", 0) if matches!(value, "file" | "host_device") => {}
                ("encrypt.format", _) if value == "luks" => {}
                ("key-secret" | "encrypt.key-secret", _) => {
                    if asked.secrets.len() <= depth {
                        asked.secrets.resize(depth + 1, None);
                    }
                    asked.secrets[depth] = Some(secrets.get(value)?);
                }
                _ => {
                    let format = asked.format.as_deref().unwrap_or("raw");
                    return Err(format!(
                        "Could not open '{text}': Block format '{format}' does not support the option '{name}'"
                    ));
                }
            }
        }
        // A file without a format above it.
        if let (Some(protocol), Some(_)) = (asked.format.as_deref(), &plain)
            && matches!(protocol, "file" | "host_device")
        {
            asked.format = Some("raw".into());
            path = plain;
        }
        asked.path = path.ok_or_else(|| format!("Could not open '{text}': Must specify either driver or file"))?;
        Ok(asked)
    }
}
