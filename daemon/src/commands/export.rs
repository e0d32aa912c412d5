// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `block-export-add`, `block-export-del`, `query-block-exports`.

use std::sync::Arc;

use block::{BlockNode, Use, User};
use export::fuse::{self, StartError};
use export::nbd::Settings;
use export::nbd::proto::MAX_STRING;
use qmp::{Arguments, Call, Command, Definition, Error, Event, Member, PendingFds, Type};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::vhost_user::{self, Common};
use super::{bitmap, block_error, words};
use crate::state::Daemon;

/// The kinds of exports there are, one line each.
const EXPORTS: &[&str] = &["nbd", "fuse", "vhost-user-blk"];

pub fn types() -> Vec<Definition> {
    vec![
        words("BlockExportType", EXPORTS, "The kinds of exports."),
        words("BlockExportRemoveMode", &["safe", "hard"], "Whether an export with clients may be removed."),
        Definition::union(
            "BlockExportOptions",
            [
                Member::required("type", Type::Named("BlockExportType"), "The kind."),
                Member::required("id", Type::Str, "The export's name in the monitor."),
                Member::optional("fixed-iothread", Type::Bool, "Accepted: a client's requests never change threads."),
                Member::optional(
                    "iothread",
                    Type::Str,
                    "An iothread object; nothing changes, because every client has a thread of its own.",
                ),
                Member::required("node-name", Type::Str, "The node."),
                Member::optional("writable", Type::Bool, "Whether clients may write; default false."),
                Member::optional(
                    "writethrough",
                    Type::Bool,
                    "Whether every change is on stable storage before it is answered; not over FUSE.",
                ),
            ],
            "type",
            [
                ("nbd", Type::Named("BlockExportOptionsNbd")),
                ("fuse", Type::Named("BlockExportOptionsFuse")),
                ("vhost-user-blk", Type::Named("BlockExportOptionsVhostUserBlk")),
            ],
            "An export to be made.",
        ),
        Definition::structure(
            "BlockExportOptionsNbd",
            [
                Member::optional(
                    "name",
                    Type::Str,
                    "What clients ask for, at most 4096 bytes; default the node's name.",
                ),
                Member::optional("description", Type::Str, "Free text for clients, at most 4096 bytes."),
                Member::optional(
                    "bitmaps",
                    Type::Array(&Type::Named("BlockDirtyBitmapOrStr")),
                    "Dirty bitmaps that clients may read, as `qemu:dirty-bitmap:NAME`.",
                ),
                Member::optional(
                    "allocation-depth",
                    Type::Bool,
                    "Whether clients may learn how many layers down data is stored, as `qemu:allocation-depth`; default false.",
                ),
            ],
            "An NBD export.",
        ),
        words("FuseExportAllowOther", &["off", "on", "auto"], "Whether others than its owner may use a mounted file."),
        Definition::structure(
            "BlockExportOptionsFuse",
            [
                Member::required(
                    "mountpoint",
                    Type::Str,
                    "Where it is mounted: text for people, because nothing is mounted here.",
                ),
                Member::optional(
                    "fd",
                    Type::Str,
                    "The name that `getfd` gave a `/dev/fuse`, opened with `O_NONBLOCK` and mounted with a regular file as its \
                     root; needed.",
                ),
                Member::optional(
                    "growable",
                    Type::Bool,
                    "Whether the size may change: by writes past the end, truncate(2) and fallocate(2), in whole sectors of 512 \
                     bytes; default false.",
                ),
                Member::optional(
                    "allow-other",
                    Type::Named("FuseExportAllowOther"),
                    "Whether it was mounted so; unless `off`, its owner may change owner and permissions. Default `auto`.",
                ),
                Member::optional(
                    "resumed",
                    Type::Bool,
                    "Whether another daemon of this version served the device and has died: what was under way is then asked \
                     again (Linux 6.9 or later); default false. Not in QEMU.",
                ),
                Member::optional("uid", Type::Uint32, "The file's owner; default 0."),
                Member::optional("gid", Type::Uint32, "The file's group; default 0."),
            ],
            "A file in the host's tree.",
        ),
        Definition::structure(
            "BlockDirtyBitmap",
            [Member::required("node", Type::Str, "The node."), Member::required("name", Type::Str, "The bitmap.")],
            "A dirty bitmap of a node.",
        ),
        Definition::alternate(
            "BlockDirtyBitmapOrStr",
            [Type::Str, Type::Named("BlockDirtyBitmap")],
            "A dirty bitmap: of the node itself or one below it, or of the node that is named.",
        ),
        Definition::structure(
            "BlockExportInfo",
            [
                Member::required("id", Type::Str, "The export."),
                Member::required("type", Type::Named("BlockExportType"), "Its kind."),
                Member::required("node-name", Type::Str, "Its node."),
                Member::required("shutting-down", Type::Bool, "Whether it is being removed."),
            ],
            "An export.",
        ),
    ]
}

pub fn commands() -> Vec<Command<Daemon>> {
    vec![
        Command::new("block-export-add", "Exports a node.", Arguments::Of("BlockExportOptions"), add),
        Command::new(
            "block-export-del",
            "Removes an export; `BLOCK_EXPORT_DELETED` says when it is gone.",
            [
                Member::required("id", Type::Str, "The export."),
                Member::optional(
                    "mode",
                    Type::Named("BlockExportRemoveMode"),
                    "`safe`, the default, refuses while clients are connected.",
                ),
            ],
            delete,
        ),
        Command::new("query-block-exports", "Lists the exports.", Arguments::NONE, query)
            .returning(Type::Array(&Type::Named("BlockExportInfo"))),
    ]
}

/// The event of an export's end.
pub fn deleted_event() -> Event {
    Event::new(
        "BLOCK_EXPORT_DELETED",
        [Member::required("id", Type::Str, "The export.")],
        "An export is gone and its node free.",
    )
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Add {
    r#type: String,
    id: String,
    node_name: String,
    iothread: Option<String>,
    writable: Option<bool>,
    writethrough: Option<bool>,
    name: Option<String>,
    description: Option<String>,
    #[serde(default)]
    bitmaps: Vec<Value>,
    allocation_depth: Option<bool>,
    #[serde(flatten)]
    fuse: Fuse,
    #[serde(flatten)]
    vhost_user: vhost_user::Options,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Fuse {
    #[serde(default)]
    mountpoint: String,
    fd: Option<String>,
    #[serde(default)]
    growable: bool,
    allow_other: Option<String>,
    #[serde(default)]
    resumed: bool,
    #[serde(default)]
    uid: u32,
    #[serde(default)]
    gid: u32,
}

fn add(daemon: &mut Daemon, mut call: Call<'_>) -> Result<Value, Error> {
    let Add {
        r#type,
        id,
        node_name,
        iothread,
        writable,
        writethrough,
        name,
        description,
        bitmaps,
        allocation_depth,
        fuse,
        vhost_user,
    } = call.parse()?;
    let writable = writable.unwrap_or(false);
    if !block::id_is_well_formed(&id) {
        return Err(Error::generic("Invalid block export id"));
    }
    if daemon.exports.contains(&id) {
        return Err(Error::generic(format!("Block export id '{id}' is already in use")));
    }
    if let Some(name) = iothread.filter(|name| daemon.objects.get(name).is_none()) {
        return Err(Error::generic(format!("iothread \"{name}\" not found")));
    }
    let node = daemon
        .graph
        .get(&node_name)
        .map_err(|_| Error::generic(format!("Cannot find device='' nor node-name='{node_name}'")))?;
    let node = Arc::clone(node);
    if writable && !node.writable() {
        return Err(Error::generic("Cannot export read-only node as writable"));
    }
    if r#type == "fuse" {
        if writethrough == Some(true) {
            return Err(Error::generic("'writethrough' is not supported for FUSE by this version; leave it out"));
        }
        return add_fuse(daemon, id, node, writable, fuse);
    }
    if r#type == "vhost-user-blk" {
        let common = Common { id, node, writable, writethrough: writethrough.unwrap_or(false) };
        return vhost_user::add(daemon, common, vhost_user);
    }
    let name = name.unwrap_or_else(|| node_name.clone());
    for (what, text) in [("name", Some(&name)), ("description", description.as_ref())] {
        if text.is_some_and(|text| text.len() > MAX_STRING) {
            return Err(Error::generic(format!("export {what} '{}...' too long", shown(text))));
        }
    }
    let user = User::Export { id: id.clone() };
    let usage = Use { user, writes: writable, resizes: false, shares_writes: true };
    if !daemon.exports.nbd_is_running() {
        return Err(Error::generic("NBD server not running"));
    }
    let bitmaps = bitmaps.iter().map(|wanted| bitmap::for_export(daemon, &node, writable, wanted));
    let bitmaps = bitmaps.collect::<Result<_, _>>()?;
    let claim = daemon.graph.claim(&node_name, usage).map_err(block_error)?;
    let settings = Settings {
        description,
        writable,
        writethrough: writethrough.unwrap_or(false),
        allocation_depth: allocation_depth.unwrap_or(false),
        bitmaps,
        ..Settings::new(name, node)
    };
    if let Err((error, claim)) = daemon.exports.add_nbd(id, settings, claim) {
        daemon.graph.release(claim);
        return Err(error);
    }
    Ok(Value::Null)
}

fn add_fuse(
    daemon: &mut Daemon,
    id: String,
    node: Arc<BlockNode>,
    writable: bool,
    options: Fuse,
) -> Result<Value, Error> {
    let Fuse { mountpoint, fd, growable, allow_other, resumed, uid, gid } = options;
    let Some(fd) = fd else {
        return Err(Error::generic(format!(
            "Could not mount '{mountpoint}': this daemon mounts nothing; mount a /dev/fuse that is open with O_NONBLOCK, pass it \
             with getfd and give its name as 'fd'"
        )));
    };
    if growable && !writable {
        return Err(Error::generic("'growable' needs 'writable'"));
    }
    let device = daemon.named_fds().take(&fd)?;
    let user = User::Export { id: id.clone() };
    let usage = Use { user, writes: writable, resizes: growable, shares_writes: true };
    let claim = daemon.graph.claim(node.name(), usage).map_err(block_error)?;
    let shared = allow_other.as_deref() != Some("off");
    let settings = fuse::Settings { node, writable, growable, shared, uid, gid };
    let session = if resumed { fuse::Session::Resumed } else { fuse::Session::New };
    match fuse::Export::start(device, settings, session, daemon.exports.changed()) {
        Ok(export) => daemon.exports.add(id, "fuse", Arc::new(export), claim),
        Err(error) => {
            daemon.graph.release(claim);
            return Err(Error::generic(match error {
                StartError::Descriptor(what) => format!("The descriptor '{fd}' {what}"),
                StartError::Io(e) => format!("Could not serve '{mountpoint}': {e}"),
            }));
        }
    }
    Ok(Value::Null)
}

/// `nbd-server-add`: as QEMU does, what cannot be written is exported read-only.
pub fn add_by_name(daemon: &mut Daemon, call: Call<'_>) -> Result<Value, Error> {
    let given = call.into_arguments();
    let device = given.get("device").cloned().unwrap_or_default();
    let name = given.get("name").cloned().unwrap_or_else(|| device.clone());
    let can_be_written = daemon.graph.get(device.as_str().unwrap_or_default()).is_ok_and(|node| node.writable());
    let mut arguments = Map::from_iter([
        ("type".to_owned(), "nbd".into()),
        ("id".to_owned(), name.clone()),
        ("node-name".to_owned(), device),
        ("name".to_owned(), name),
        ("writable".to_owned(), (can_be_written && given.get("writable") == Some(&Value::Bool(true))).into()),
    ]);
    if let Some(description) = given.get("description") {
        arguments.insert("description".to_owned(), description.clone());
    }
    if let Some(bitmap) = given.get("bitmap") {
        arguments.insert("bitmaps".to_owned(), json!([bitmap]));
    }
    add(daemon, Call::new(arguments, &mut PendingFds::default()))
}

/// `nbd-server-remove`.
pub fn delete_by_name(daemon: &mut Daemon, call: Call<'_>) -> Result<Value, Error> {
    let text = |key: &str| call.arguments().get(key).and_then(Value::as_str);
    daemon.exports.remove(text("name").unwrap_or_default(), text("mode") == Some("hard"))?;
    daemon.reap_exports();
    Ok(Value::Null)
}

#[derive(Deserialize)]
struct Delete {
    id: String,
    mode: Option<String>,
}

fn delete(daemon: &mut Daemon, mut call: Call<'_>) -> Result<Value, Error> {
    let Delete { id, mode } = call.parse()?;
    daemon.exports.remove(&id, mode.as_deref() == Some("hard"))?;
    daemon.reap_exports();
    Ok(Value::Null)
}

fn query(daemon: &mut Daemon, _: Call<'_>) -> Result<Value, Error> {
    Ok(daemon
        .exports
        .list()
        .map(|export| {
            json!({
                "id": export.id,
                "type": export.kind,
                "node-name": export.node_name,
                "shutting-down": export.shutting_down,
            })
        })
        .collect())
}

fn shown(text: Option<&String>) -> String {
    text.map(|text| text.chars().take(20).flat_map(char::escape_debug).collect()).unwrap_or_default()
}
