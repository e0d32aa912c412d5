// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `--object secret,…`: passphrases that options name by id. They come from files, never from the command line itself.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;

pub use block::Secret;

use crate::options::split;

/// Longest passphrase in bytes.
const MOST: u64 = 1 << 20;

/// Secrets by id.
#[derive(Debug, Default)]
pub struct Secrets(BTreeMap<String, Secret>);

impl Secrets {
    /// Reads the files that `objects` name, each as in `--object secret,id=ID,file=FILE,format=raw|base64`. Before the process is
    /// confined.
    ///
    /// # Errors
    /// Another kind of object, a passphrase on the command line, or a file that cannot be read.
    pub fn read(objects: &[String]) -> Result<Secrets, String> {
        let mut secrets = Secrets::default();
        for object in objects {
            let (id, secret) = read_one(object)?;
            if secrets.0.insert(id.clone(), secret).is_some() {
                return Err(format!("attempt to add duplicate property '{id}' to object (type 'container')"));
            }
        }
        Ok(secrets)
    }

    /// The secret called `id`.
    ///
    /// # Errors
    /// There is none: QEMU's words.
    pub fn get(&self, id: &str) -> Result<Secret, String> {
        self.0.get(id).cloned().ok_or_else(|| format!("No secret with id '{id}'"))
    }
}

fn read_one(object: &str) -> Result<(String, Secret), String> {
    let words = split(object);
    let mut words = words.iter().map(|word| word.split_once('=').unwrap_or(("qom-type", word)));
    let mut given = BTreeMap::new();
    for (name, value) in &mut words {
        match name {
            "qom-type" | "id" | "file" | "format" => given.insert(name, value),
            "data" => {
                return Err(
                    "every user of the machine can read a secret on a command line: put it into a file and say \
                            file=FILE, or file=/dev/fd/N for a descriptor"
                        .into(),
                );
            }
            "keyid" | "iv" => return Err(format!("'{name}' of a secret is not supported by this version")),
            other => return Err(format!("Invalid parameter '{}'", other.escape_debug())),
        };
    }
    match given.get("qom-type") {
        Some(&"secret") => {}
        Some(other) => return Err(format!("Parameter 'qom-type' does not accept value '{}'", other.escape_debug())),
        None => return Err("Parameter 'qom-type' is missing".into()),
    }
    let id = *given.get("id").ok_or("Parameter 'id' is missing")?;
    let file = *given.get("file").ok_or("Parameter 'file' is missing")?;
    let failed = |e: std::io::Error| format!("Unable to read {file}: {e}");
    let mut bytes = Vec::new();
    File::open(file).and_then(|file| file.take(MOST + 1).read_to_end(&mut bytes)).map_err(failed)?;
    if bytes.len() as u64 > MOST {
        return Err(format!("Unable to read {file}: it is longer than {MOST} bytes"));
    }
    let read = Secret::new(bytes);
    let secret = match given.get("format") {
        None | Some(&"raw") => read,
        Some(&"base64") => Secret::from_base64(read.bytes()).ok_or("The secret is not valid base64 data")?,
        Some(other) => return Err(format!("Parameter 'format' does not accept value '{}'", other.escape_debug())),
    };
    Ok((id.to_owned(), secret))
}
