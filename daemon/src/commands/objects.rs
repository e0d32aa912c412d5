// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `object-add`, `object-del`.

use export::nbd::tls::{Credentials, Pem};
use fdset::{Access, FdSets};
use qmp::{Arguments, Call, Command, Definition, Error, Member, Type};
use serde::Deserialize;
use serde_json::Value;
use sys::file::{self, Wait};

use super::words;
use crate::authz::{Authz, Rule};
use crate::objects::Object;
use crate::state::Daemon;

/// Most bytes of a file of credentials.
const MOST: usize = 1 << 20;

/// Most bytes of a secret.
const MOST_SECRET: usize = 64 << 10;

pub fn types() -> Vec<Definition> {
    let unused = |name| Member::optional(name, Type::Int, "Accepted, and of no use here.");
    vec![
        words(
            "ObjectType",
            &["authz-list", "authz-simple", "iothread", "secret", "tls-creds-x509"],
            "The kinds of objects.",
        ),
        Definition::union(
            "ObjectOptions",
            [
                Member::required("qom-type", Type::Named("ObjectType"), "The kind."),
                Member::required("id", Type::Str, "The object's name."),
            ],
            "qom-type",
            [
                ("authz-list", Type::Named("AuthZListProperties")),
                ("authz-simple", Type::Named("AuthZSimpleProperties")),
                ("iothread", Type::Named("IothreadProperties")),
                ("secret", Type::Named("SecretProperties")),
                ("tls-creds-x509", Type::Named("TlsCredsX509Properties")),
            ],
            "An object to be made.",
        ),
        Definition::structure(
            "IothreadProperties",
            ["poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch", "thread-pool-min", "thread-pool-max"]
                .map(unused),
            "An iothread. It changes nothing: every client has a thread of its own.",
        ),
        words("QCryptoSecretFormat", &["raw", "base64"], "How a secret is written down."),
        Definition::structure(
            "SecretProperties",
            [
                Member::optional("data", Type::Str, "The secret. Exactly one of `data` and `file` must be given."),
                Member::optional(
                    "file",
                    Type::Str,
                    "`/dev/fdset/ID`: a set with a descriptor of a file that holds the secret and nothing else. It is read once; \
                     the set may go afterwards.",
                ),
                Member::optional("format", Type::Named("QCryptoSecretFormat"), "How it is written; default `raw`."),
            ],
            "A passphrase.",
        ),
        words("QAuthZListPolicy", &["deny", "allow"], "What becomes of an identity."),
        words("QAuthZListFormat", &["exact", "glob"], "Whether `*` and `?` stand for any text and any character."),
        Definition::structure(
            "QAuthZListRule",
            [
                Member::required("match", Type::Str, "The identity, or a pattern for it."),
                Member::required("policy", Type::Named("QAuthZListPolicy"), "What becomes of it."),
                Member::optional("format", Type::Named("QAuthZListFormat"), "How to match; default `exact`."),
            ],
            "A rule for identities.",
        ),
        Definition::structure(
            "AuthZListProperties",
            [
                Member::optional(
                    "policy",
                    Type::Named("QAuthZListPolicy"),
                    "For those whom no rule matches; default `deny`.",
                ),
                Member::optional(
                    "rules",
                    Type::Array(&Type::Named("QAuthZListRule")),
                    "The first that matches decides.",
                ),
            ],
            "Who may come in, by rules.",
        ),
        Definition::structure(
            "AuthZSimpleProperties",
            [Member::required(
                "identity",
                Type::Str,
                "The one identity: of a TLS client its certificate's distinguished name, in its own order, such as `C=GB,O=Example,CN=host`.",
            )],
            "The one who may come in.",
        ),
        words("QCryptoTLSCredsEndpoint", &["client", "server"], "The two ends of TLS."),
        Definition::structure(
            "TlsCredsX509Properties",
            [
                Member::optional("verify-peer", Type::Bool, "Whether clients must show a certificate; default true."),
                Member::optional(
                    "dir",
                    Type::Str,
                    "`/dev/fdset/ID`: a set whose descriptors have the files' names as opaque text: `server-cert.pem`, \
                     `server-key.pem`, with verify-peer `ca-cert.pem`, and `ca-crl.pem` if there is one. They are read once; \
                     the set may go afterwards.",
                ),
                Member::optional("endpoint", Type::Named("QCryptoTLSCredsEndpoint"), "Must be `server`."),
                Member::optional("priority", Type::Str, "Not supported: TLS 1.2 and 1.3 with their safe ciphers."),
                Member::optional("sanity-check", Type::Bool, "Accepted: what is loaded is always checked."),
                Member::optional("passwordid", Type::Str, "Not supported: the key must not be encrypted."),
            ],
            "X.509 credentials.",
        ),
    ]
}

pub fn commands() -> Vec<Command<Daemon>> {
    vec![
        Command::new("object-add", "Makes an object that others refer to.", Arguments::Of("ObjectOptions"), add),
        Command::new("object-del", "Removes an object.", [Member::required("id", Type::Str, "The object.")], delete),
    ]
}

fn add(daemon: &mut Daemon, mut call: Call<'_>) -> Result<Value, Error> {
    let id = call.arguments()["id"].as_str().unwrap_or_default().to_owned();
    let object = match call.arguments()["qom-type"].as_str() {
        Some("authz-list") => Object::Authz(list(call.parse()?)),
        Some("authz-simple") => {
            Object::Authz(Authz::Simple(call.arguments()["identity"].as_str().unwrap_or_default().to_owned()))
        }
        Some("secret") => Object::Secret(secret(&daemon.fdsets, &id, call.parse()?)?),
        Some("tls-creds-x509") => Object::TlsCreds(tls_creds(&daemon.fdsets, &id, call.parse()?)?),
        _ => Object::IoThread,
    };
    daemon.objects.add(&id, object)?;
    Ok(Value::Null)
}

fn delete(daemon: &mut Daemon, call: Call<'_>) -> Result<Value, Error> {
    daemon.objects.remove(call.arguments()["id"].as_str().unwrap_or_default())?;
    Ok(Value::Null)
}

#[derive(Deserialize)]
struct List {
    policy: Option<String>,
    #[serde(default)]
    rules: Vec<ListRule>,
}

#[derive(Deserialize)]
struct ListRule {
    r#match: String,
    policy: String,
    format: Option<String>,
}

fn list(list: List) -> Authz {
    let rule = |rule: ListRule| Rule {
        pattern: rule.r#match,
        glob: rule.format.as_deref() == Some("glob"),
        allow: rule.policy == "allow",
    };
    Authz::List {
        rules: list.rules.into_iter().map(rule).collect(),
        otherwise: list.policy.as_deref() == Some("allow"),
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct TlsCreds {
    verify_peer: Option<bool>,
    dir: Option<String>,
    endpoint: Option<String>,
    priority: Option<String>,
    passwordid: Option<String>,
}

fn tls_creds(sets: &FdSets, id: &str, creds: TlsCreds) -> Result<Credentials, Error> {
    let TlsCreds { verify_peer, dir, endpoint, priority, passwordid } = creds;
    if endpoint.as_deref() != Some("server") {
        return Err(Error::generic("'endpoint' must be 'server': this daemon begins no TLS of its own"));
    }
    for (name, given) in [("priority", priority.is_some()), ("passwordid", passwordid.is_some())] {
        if given {
            return Err(Error::generic(format!("'{name}' is not supported by this version; leave it out")));
        }
    }
    let dir = dir.ok_or_else(|| Error::generic("Missing 'dir' property value"))?;
    if !dir.starts_with(fdset::PREFIX) {
        let shown: String = dir.chars().take(200).flat_map(char::escape_debug).collect();
        return Err(Error::generic(format!(
            "Could not open '{shown}': this daemon opens no files; open them yourself, pass the descriptors with add-fd, each \
             with the file's name (server-cert.pem, ...) as opaque text, and give the dir /dev/fdset/ID"
        )));
    }
    let set = fdset::path::set_id(&dir).map_err(|e| Error::generic(e.to_string()))?;
    let verify_peer = verify_peer.unwrap_or(true);
    let required = |name: &str| {
        content(sets, set, name, id)?
            .ok_or_else(|| Error::generic(format!("Unable to access credentials {dir}/{name}")))
    };
    let pem = Pem {
        ca_cert: if verify_peer { required("ca-cert.pem")? } else { Vec::new() },
        ca_crl: content(sets, set, "ca-crl.pem", id)?.unwrap_or_default(),
        server_cert: required("server-cert.pem")?,
        server_key: required("server-key.pem")?,
    };
    Credentials::x509(&pem, verify_peer)
        .map_err(|e| Error::generic(format!("Unable to use the credentials in {dir}: {e}")))
}

#[derive(Deserialize)]
struct SecretOptions {
    data: Option<String>,
    file: Option<String>,
    format: Option<String>,
}

fn secret(sets: &FdSets, id: &str, options: SecretOptions) -> Result<block::Secret, Error> {
    let bytes = match (options.data, options.file) {
        (Some(data), None) => data.into_bytes(),
        (None, Some(file)) => secret_file(sets, &file, id)?,
        (None, None) => return Err(Error::generic("Must provide 'file' or 'data' property")),
        (Some(_), Some(_)) => return Err(Error::generic("'file' and 'data' are mutually exclusive")),
    };
    let given = block::Secret::new(bytes);
    if options.format.as_deref() != Some("base64") {
        return Ok(given);
    }
    block::Secret::from_base64(given.bytes()).ok_or_else(|| Error::generic("The secret is not valid base64 data"))
}

/// What the file in the set that `path` names holds.
fn secret_file(sets: &FdSets, path: &str, user: &str) -> Result<Vec<u8>, Error> {
    if !path.starts_with(fdset::PREFIX) {
        let shown: String = path.chars().take(200).flat_map(char::escape_debug).collect();
        return Err(Error::generic(format!(
            "Unable to read {shown}: this daemon opens no files; open it yourself, pass the descriptor with add-fd, and give \
             the file /dev/fdset/ID"
        )));
    }
    let failed = |why: String| Error::generic(format!("Unable to read {path}: {why}"));
    let set = fdset::path::set_id(path).map_err(|e| failed(e.to_string()))?;
    let fd = sets.open_for(set, Access::READ_ONLY, user).map_err(|e| failed(e.detail()))?;
    let mut bytes = vec![0; MOST_SECRET + 1];
    let count = file::read_at(&fd, &mut bytes, 0, Wait::Allowed).map_err(|e| failed(e.to_string()))?;
    if count > MOST_SECRET {
        return Err(failed(format!("it is longer than {MOST_SECRET} bytes")));
    }
    bytes.truncate(count);
    Ok(bytes)
}

/// What the file of that name holds; `None` if the set has none of that name.
fn content(sets: &FdSets, set: i64, name: &str, user: &str) -> Result<Option<Vec<u8>>, Error> {
    let info = sets.set(set).ok_or_else(|| Error::generic(format!("fdset {set} is not there")))?;
    if !info.fds().any(|fd| fd.opaque() == Some(name)) {
        return Ok(None);
    }
    let failed = |why: String| Error::generic(format!("Could not read '{name}' of fdset {set}: {why}"));
    let fd = sets.open_named(set, name, Access::READ_ONLY, user).map_err(|e| failed(e.detail()))?;
    let mut bytes = vec![0; MOST + 1];
    let count = file::read_at(&fd, &mut bytes, 0, Wait::Allowed).map_err(|e| failed(e.to_string()))?;
    if count > MOST {
        return Err(failed(format!("it is longer than {MOST} bytes")));
    }
    bytes.truncate(count);
    Ok(Some(bytes))
}
