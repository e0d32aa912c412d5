// SPDX-License-Identifier: Apache-2.0 OR MIT
//! TLS for NBD clients: the manager opens the files of a directory of credentials, the daemon gets a set that stands for it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::journal::Carried;
use crate::kept::Kept;
use crate::{Error, Result};

/// The files of a server's credentials, named as QEMU names them.
const FILES: [&str; 4] = ["ca-cert.pem", "ca-crl.pem", "server-cert.pem", "server-key.pem"];
/// The kinds of objects that are about TLS.
const KINDS: [&str; 3] = ["authz-list", "authz-simple", "tls-creds-x509"];

/// What an NBD server's TLS is made of.
#[derive(Clone, Debug, Default)]
pub struct Tls {
    objects: Vec<Map<String, Value>>,
    /// The id of its credentials; without one there is no TLS.
    creds: Option<String>,
    /// The id of the rule for clients.
    authz: Option<String>,
}

impl Tls {
    /// Credentials from a directory. Clients must show a certificate unless `any_client`; if `clients` are given, one with a
    /// distinguished name among them, in which `*` stands for any text.
    pub fn directory(dir: &Path, any_client: bool, clients: &[String]) -> Tls {
        let creds = json!({
            "qom-type": "tls-creds-x509", "id": "tls", "endpoint": "server", "dir": dir.to_string_lossy(),
            "verify-peer": !any_client,
        });
        let rules: Vec<Value> =
            clients.iter().map(|name| json!({ "match": name, "policy": "allow", "format": "glob" })).collect();
        let list = json!({ "qom-type": "authz-list", "id": "clients", "policy": "deny", "rules": rules });
        let authz = (!clients.is_empty()).then(|| "clients".to_owned());
        let objects = [Some(creds), authz.is_some().then_some(list)];
        let objects = objects.into_iter().flatten().filter_map(|object| object.as_object().cloned()).collect();
        Tls { objects, creds: Some("tls".into()), authz }
    }

    /// What the options `--object`, `--tls-creds` and `--tls-authz` of qemu-nbd say.
    ///
    /// # Errors
    /// An object is malformed, or of a kind that is not about TLS.
    pub fn options(objects: &[String], creds: Option<String>, authz: Option<String>) -> Result<Tls> {
        let mut parsed = Vec::new();
        for text in objects {
            let refused = |why: String| Error::Refused(format!("--object {text}: {why}"));
            let Value::Object(mut object) = qmp::keyval::parse(text, Some("qom-type")).map_err(|e| refused(e.desc))?
            else {
                return Err(refused("not key=value,...".into()));
            };
            let kind = object.get("qom-type").and_then(Value::as_str).unwrap_or_default();
            if !KINDS.contains(&kind) {
                return Err(refused(format!("an object of type '{kind}' is not supported by this version")));
            }
            for switch in ["verify-peer", "sanity-check"] {
                if let Some(value) = object.get_mut(switch) {
                    *value = match value.as_str() {
                        Some("on" | "yes" | "true" | "y") => true.into(),
                        Some("off" | "no" | "false" | "n") => false.into(),
                        _ => return Err(refused(format!("'{switch}' is 'on' or 'off'"))),
                    };
                }
            }
            parsed.push(object);
        }
        Ok(Tls { objects: parsed, creds, authz })
    }

    /// Makes the objects in the daemon, and adds what names them to the arguments of `nbd-server-start`.
    pub(crate) fn pass(&self, daemon: &mut Kept, start: &mut Value) -> Result<()> {
        for object in &self.objects {
            let mut object = object.clone();
            let dir = object.get("dir").and_then(Value::as_str).map(PathBuf::from);
            let set = dir.map(|dir| pass_directory(daemon, &dir)).transpose()?;
            if let Some(set) = &set {
                object.insert("dir".into(), format!("/dev/fdset/{set}").into());
            }
            daemon.execute("object-add", Value::Object(object), &[])?;
            if let Some(set) = set {
                // The daemon has read what it needs.
                daemon.execute("remove-fd", json!({ "fdset-id": set }), &[])?;
            }
        }
        for (member, id) in [("tls-creds", &self.creds), ("tls-authz", &self.authz)] {
            if let Some(id) = id {
                start[member] = json!(id);
            }
        }
        Ok(())
    }

    /// Whether clients must begin TLS.
    pub fn is_on(&self) -> bool {
        self.creds.is_some()
    }
}

/// Opens the files of a directory that are there into a new set, under their names; the set.
fn pass_directory(daemon: &mut Kept, dir: &Path) -> Result<i64> {
    let set = daemon.next_set();
    let mut found = false;
    for name in FILES {
        let path = dir.join(name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(Error::Open { path, purpose: "", source }),
        };
        daemon.execute("add-fd", json!({ "fdset-id": set, "opaque": name }), &[Carried::other(file.into())])?;
        found = true;
    }
    if found {
        return Ok(set);
    }
    Err(Error::Refused(format!("'{}' has no credentials: {}", dir.display(), FILES.join(", "))))
}
