// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `nbd-server-start`, `nbd-server-stop`, and the old commands for its exports, `nbd-server-add` and `nbd-server-remove`.

use std::time::Duration;

use export::nbd::tls::Tls;
use export::nbd::{Admission, Limits};
use qmp::{Arguments, Call, Command, Definition, Error, Member, Type};
use serde::Deserialize;
use serde_json::Value;

use super::export::{add_by_name, delete_by_name};
use super::words;
use crate::objects::Object;
use crate::state::Daemon;

pub fn types() -> Vec<Definition> {
    let data = |name: &'static str, inner: &'static str| {
        Definition::structure(
            name,
            [Member::required("data", Type::Named(inner), "The address.")],
            "An address, wrapped.",
        )
    };
    vec![
        words("SocketAddressType", &["inet", "unix", "vsock", "fd"], "Kinds of socket addresses."),
        Definition::structure(
            "FdSocketAddress",
            [Member::required("str", Type::Str, "The name that `getfd` gave it.")],
            "A passed socket.",
        ),
        Definition::structure(
            "InetSocketAddress",
            [
                Member::required("host", Type::Str, "Host name or address."),
                Member::required("port", Type::Str, "Port."),
            ],
            "A TCP address: refused, because nothing is bound or connected here.",
        ),
        Definition::structure(
            "UnixSocketAddress",
            [Member::required("path", Type::Str, "Path.")],
            "A unix socket's path: refused, because nothing is bound or connected here.",
        ),
        Definition::structure(
            "VsockSocketAddress",
            [Member::required("cid", Type::Str, "Context id."), Member::required("port", Type::Str, "Port.")],
            "A vsock address: refused, because nothing is bound or connected here.",
        ),
        data("FdSocketAddressWrapper", "FdSocketAddress"),
        data("InetSocketAddressWrapper", "InetSocketAddress"),
        data("UnixSocketAddressWrapper", "UnixSocketAddress"),
        data("VsockSocketAddressWrapper", "VsockSocketAddress"),
        Definition::union(
            "SocketAddressLegacy",
            [Member::required("type", Type::Named("SocketAddressType"), "The kind.")],
            "type",
            [
                ("inet", Type::Named("InetSocketAddressWrapper")),
                ("unix", Type::Named("UnixSocketAddressWrapper")),
                ("vsock", Type::Named("VsockSocketAddressWrapper")),
                ("fd", Type::Named("FdSocketAddressWrapper")),
            ],
            "Where a server listens.",
        ),
    ]
}

pub fn commands() -> Vec<Command<Daemon>> {
    vec![
        Command::new(
            "nbd-server-start",
            "Serves NBD on a listening socket that was passed with `getfd`.",
            [
                Member::required("addr", Type::Named("SocketAddressLegacy"), "The socket: `type` must be `fd`."),
                Member::optional(
                    "handshake-max-seconds",
                    Type::Uint32,
                    "How long a client may negotiate, seconds; default 10, 0 is no limit.",
                ),
                Member::optional(
                    "tls-creds",
                    Type::Str,
                    "A `tls-creds-x509` object: clients must begin TLS before anything else.",
                ),
                Member::optional(
                    "tls-authz",
                    Type::Str,
                    "An `authz-...` object, looked up whenever a client comes: it must allow the distinguished name of the \
                     client's certificate.",
                ),
                Member::optional("max-connections", Type::Uint32, "Most clients at once; default 100, 0 is no limit."),
                Member::optional(
                    "await-export",
                    Type::Bool,
                    "Whether clients that come before the first export wait for it, instead of being told that there is none; \
                     default false. Not in QEMU.",
                ),
            ],
            start,
        ),
        Command::new(
            "nbd-server-stop",
            "Closes the listening socket, hangs up on every client, and removes every NBD export.",
            Arguments::NONE,
            stop,
        ),
        Command {
            features: &["deprecated"],
            ..Command::new(
                "nbd-server-add",
                "Exports a node over NBD; `block-export-add` does more.",
                [
                    Member::required("device", Type::Str, "The node."),
                    Member::optional(
                        "name",
                        Type::Str,
                        "What clients ask for, and the export's id; default the node's name.",
                    ),
                    Member::optional("description", Type::Str, "Free text for clients, at most 4096 bytes."),
                    Member::optional(
                        "writable",
                        Type::Bool,
                        "Whether clients may write, if the node can be written; default false.",
                    ),
                    Member::optional("bitmap", Type::Str, "A dirty bitmap that clients may read."),
                ],
                add_by_name,
            )
        },
        Command {
            features: &["deprecated"],
            ..Command::new(
                "nbd-server-remove",
                "Removes an export that `nbd-server-add` made.",
                [
                    Member::required("name", Type::Str, "The export."),
                    Member::optional(
                        "mode",
                        Type::Named("BlockExportRemoveMode"),
                        "`safe`, the default, refuses while clients are connected.",
                    ),
                ],
                delete_by_name,
            )
        },
    ]
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Start {
    addr: Value,
    handshake_max_seconds: Option<u32>,
    tls_creds: Option<String>,
    tls_authz: Option<String>,
    max_connections: Option<u32>,
    #[serde(default)]
    await_export: bool,
}

fn start(daemon: &mut Daemon, mut call: Call<'_>) -> Result<Value, Error> {
    let Start { addr, handshake_max_seconds, tls_creds, tls_authz, max_connections, await_export } = call.parse()?;
    if daemon.exports.nbd_is_running() {
        return Err(Error::generic("NBD server already running"));
    }
    let tls = tls(daemon, tls_creds.as_deref(), tls_authz.as_deref())?;
    let kind = addr["type"].as_str().unwrap_or_default();
    if kind != "fd" {
        return Err(Error::generic(format!(
            "Could not listen on a socket of type '{kind}': this daemon binds nothing; pass a listening socket with getfd \
             and give {{\"type\": \"fd\", \"data\": {{\"str\": NAME}}}}"
        )));
    }
    let listener = daemon.named_fds().take(addr["data"]["str"].as_str().unwrap_or_default())?;
    let defaults = Limits::default();
    let limits = Limits {
        connections: max_connections.map_or(defaults.connections, |most| most as usize),
        handshake: handshake_max_seconds.map_or(defaults.handshake, |seconds| Duration::from_secs(seconds.into())),
        admission: if await_export { Admission::FirstExport } else { Admission::AtOnce },
    };
    daemon.exports.start_nbd(listener, limits, tls)?;
    daemon.graph.hand_over(false);
    Ok(Value::Null)
}

/// What TLS the arguments ask for.
fn tls(daemon: &Daemon, creds: Option<&str>, authz: Option<&str>) -> Result<Option<Tls>, Error> {
    let Some(id) = creds else {
        return match authz {
            Some(_) => Err(Error::generic("'tls-authz' is of no use without 'tls-creds'")),
            None => Ok(None),
        };
    };
    let credentials = match daemon.objects.get(id) {
        Some(Object::TlsCreds(credentials)) => credentials,
        Some(_) => return Err(Error::generic(format!("Object with id '{id}' is not TLS credentials"))),
        None => return Err(Error::generic(format!("No TLS credentials with id '{id}'"))),
    };
    if authz.is_some() && !credentials.verifies_peer() {
        return Err(Error::generic(format!(
            "'tls-authz' goes by clients' certificates, and with verify-peer off '{id}' asks for none"
        )));
    }
    let authorization = authz.map(|authz| daemon.objects.authorization(authz));
    Ok(Some(Tls { credentials, authorization }))
}

fn stop(daemon: &mut Daemon, _: Call<'_>) -> Result<Value, Error> {
    daemon.exports.stop_nbd()?;
    daemon.reap_exports();
    Ok(Value::Null)
}
