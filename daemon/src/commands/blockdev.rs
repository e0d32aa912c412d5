// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `blockdev-add`, `blockdev-del`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use block::{DriverEntry, Host, NodeAccess, NodeSpec, OptionKind, OptionValue, Writes, driver_named};
use fdset::{Access, FdPolicy, FdSets};
use qmp::{Arguments, Call, Command, Definition, Error, Member, Type};
use serde_json::{Map, Value};

use super::{block_error, options};
use crate::objects::Objects;
use crate::remotes::Booked;
use crate::state::Daemon;
use crate::wants::{Wanted, Wants};

pub fn types() -> Vec<Definition> {
    options::types()
}

pub fn commands() -> Vec<Command<Daemon>> {
    vec![
        Command::new(
            "blockdev-add",
            "Opens a node. Files are opened from fd sets only, other nodes are named or nested; a name in an image is never \
             followed.",
            Arguments::Of("BlockdevOptions"),
            blockdev_add,
        ),
        Command::new(
            "blockdev-del",
            "Closes a node that nobody uses.",
            [Member::required("node-name", Type::Str, "The node.")],
            blockdev_del,
        ),
    ]
}

fn blockdev_add(daemon: &mut Daemon, call: Call<'_>) -> Result<Value, Error> {
    let options = call.into_arguments();
    if !options.contains_key("node-name") {
        return Err(Error::generic("'node-name' must be specified for the root node"));
    }
    add_node(daemon, options, Inherited::default())?;
    Ok(Value::Null)
}

fn blockdev_del(daemon: &mut Daemon, call: Call<'_>) -> Result<Value, Error> {
    let name = call.arguments()["node-name"].as_str().unwrap_or_default();
    daemon.graph.remove(name).map_err(block_error)?;
    Ok(Value::Null)
}

/// What a nested node takes over from its parent, unless its own options say otherwise.
#[derive(Clone, Copy, Debug, Default)]
pub struct Inherited {
    pub read_only: bool,
    pub unmap: bool,
    /// `cache.direct`.
    pub direct: bool,
}

impl Inherited {
    /// What a child of a node takes over. Formats pass discards on with care, so what is below them may always unmap.
    pub fn by_child(writes: Writes, read_only: bool, direct: bool) -> Inherited {
        Inherited { read_only: read_only || writes == Writes::Never, unmap: true, direct }
    }
}

/// What requests may do to a node with these options.
pub fn access(options: &Map<String, Value>, inherited: Inherited) -> NodeAccess {
    let read_only = options.get("read-only").and_then(Value::as_bool).unwrap_or(inherited.read_only);
    let discard = options.get("discard").and_then(Value::as_str);
    NodeAccess { writable: !read_only, unmap: discard.map_or(inherited.unmap, |discard| discard == "unmap") }
}

/// Whether these options ask for a node past the host's cache.
pub fn direct(options: &Map<String, Value>, inherited: Inherited) -> bool {
    let cache = options.get("cache").and_then(|cache| cache.get("direct"));
    cache.and_then(Value::as_bool).unwrap_or(inherited.direct)
}

/// Makes a node and those nested in its checked options; on an error none of them stays. Returns its name.
///
/// # Errors
/// The first that cannot be made.
pub fn add_node(daemon: &mut Daemon, options: Map<String, Value>, inherited: Inherited) -> Result<String, Error> {
    refuse_unsupported(&options, daemon.exports.workers().rings().exist())?;
    let text = |key: &str| options.get(key).and_then(Value::as_str);
    let driver = driver_named(text("driver").unwrap_or_default())
        .ok_or_else(|| Error::generic("Parameter 'driver' is missing"))?;
    let mut spec = NodeSpec {
        name: text("node-name").map(str::to_owned),
        driver: driver.name,
        access: access(&options, inherited),
        host: None,
        filename: text("filename").unwrap_or_default().to_owned(),
        children: BTreeMap::new(),
        detached: BTreeSet::new(),
        options: driver_options(driver, &options, &daemon.objects)?,
    };
    let direct = direct(&options, inherited);
    if driver.takes_descriptor {
        let auto_read_only = options.get("auto-read-only") == Some(&Value::Bool(true));
        let locking = text("locking") != Some("off");
        spec.host = Some(host(daemon, &spec.filename, direct, auto_read_only, locking)?);
    }
    if let Some(option) = driver.socket() {
        let socket = passed_socket(daemon, &options[option.name], spec.name.as_deref().unwrap_or_default())?;
        spec.host = Some(Host::socket(socket, daemon.remotes.lost()));
    }
    if let Some(option) = driver.directory() {
        spec.host =
            Some(directory(daemon, text(option.name).unwrap_or_default(), spec.name.as_deref().unwrap_or_default())?);
    }
    let mut nested = Vec::new();
    match attach_children(daemon, driver, options, direct, &mut spec, &mut nested)
        .and_then(|()| daemon.graph.add(spec).map_err(block_error))
    {
        Ok(node) => {
            for name in nested {
                daemon.graph.set_owned(&name);
            }
            Ok(node.name().to_owned())
        }
        Err(e) => {
            for name in nested {
                // Made a moment ago for the parent that failed, so nobody else uses it.
                let _ = daemon.graph.remove(&name);
            }
            Err(e)
        }
    }
}

/// Names the children in `spec`; those that the options describe are made, and listed in `nested`.
fn attach_children(
    daemon: &mut Daemon,
    driver: &'static DriverEntry,
    mut options: Map<String, Value>,
    direct: bool,
    spec: &mut NodeSpec,
    nested: &mut Vec<String>,
) -> Result<(), Error> {
    for child in driver.children {
        let given = match options.remove(child.member()) {
            None => continue,
            Some(Value::Null) => {
                spec.detached.insert(child.name);
                continue;
            }
            Some(Value::Array(list)) if child.is_list() => list,
            Some(one) => vec![one],
        };
        if given.len() > child.edges().len() {
            let most = child.edges().len();
            return Err(Error::generic(format!(
                "'{}' takes at most {most} nodes, not {}",
                child.member(),
                given.len()
            )));
        }
        for (&edge, value) in child.edges().iter().zip(given) {
            let name = match value {
                Value::String(name) => {
                    let Ok(node) = daemon.graph.get(&name) else {
                        return Err(Error::generic(format!("Cannot find device='{name}' nor node-name='{name}'")));
                    };
                    if direct && ["file", "data-file"].contains(&edge) && !node.bypasses_cache() {
                        return Err(Error::generic(format!(
                            "'cache.direct' is a matter of the file node, and '{name}' was made without it"
                        )));
                    }
                    name
                }
                Value::Object(options) => {
                    let inherited = Inherited::by_child(child.writes, !spec.access.writable, direct);
                    let name = add_node(daemon, options, inherited)?;
                    nested.push(name.clone());
                    name
                }
                _ => return Err(Error::invalid_type(edge, "BlockdevRef")),
            };
            spec.children.insert(edge, name);
        }
    }
    Ok(())
}

/// Where a file node's descriptors come from: the set that `filename` names. Every other name is refused, because there is
/// nothing that could open it.
fn host(daemon: &Daemon, filename: &str, direct: bool, auto_read_only: bool, locking: bool) -> Result<Host, Error> {
    if !filename.starts_with(fdset::PREFIX) {
        let shown: String = filename.chars().take(200).flat_map(char::escape_debug).collect();
        return Err(Error::generic(format!(
            "Could not open '{shown}': this daemon opens no files; open it yourself, pass the descriptor with add-fd, \
             and give the filename /dev/fdset/ID"
        )));
    }
    let (sets, wants) = (Arc::clone(&daemon.fdsets), daemon.wants.clone());
    let exclusive = daemon.policy == FdPolicy::Strict;
    let filename = filename.to_owned();
    let open = move |writable: bool, node: &str| {
        let access = if writable { Access::READ_WRITE } else { Access::READ_ONLY };
        let access = if direct { access.direct() } else { access };
        open_fdset(&sets, &wants, &filename, node, access, writable && exclusive)
    };
    Ok(Host::new(Box::new(open), auto_read_only, locking))
}

/// The files of the set that `dir` names, for `node`.
fn directory(daemon: &Daemon, dir: &str, node: &str) -> Result<Host, Error> {
    if !dir.starts_with(fdset::PREFIX) {
        let shown: String = dir.chars().take(200).flat_map(char::escape_debug).collect();
        return Err(Error::generic(format!(
            "Could not open '{shown}': this daemon opens no files; open those of the directory yourself, pass the descriptors \
             with add-fd, each with its path in the directory as opaque text, and give the dir /dev/fdset/ID"
        )));
    }
    let set = fdset::path::set_id(dir);
    let all = set.and_then(|set| daemon.fdsets.open_all(set, Access::READ_ONLY, node));
    let all = all.map_err(|e| {
        tracing::info!(dir, "{}", e.detail());
        Error::generic(e.to_string())
    })?;
    let named = all.into_iter().map(|(opaque, dup)| {
        let number = dup.opened_from();
        let path = opaque.ok_or_else(|| {
            Error::generic(format!(
                "Descriptor {number} of {dir} has no opaque text, which is its path in the directory"
            ))
        })?;
        Ok((path, Box::new(dup) as block::Descriptor))
    });
    Ok(Host::directory(named.collect::<Result<_, Error>>()?))
}

/// The socket that an address names, which must be a passed one, for `node`.
///
/// # Errors
/// It would have to be made, or there is none of that name.
pub fn passed_socket(daemon: &mut Daemon, address: &Value, node: &str) -> Result<Booked, Error> {
    let kind = address["type"].as_str().unwrap_or_default();
    if kind != "fd" {
        return Err(Error::generic(format!(
            "Could not connect to a server of type '{kind}': this daemon connects nowhere; connect yourself, pass the socket \
             with getfd and give {{\"type\": \"fd\", \"str\": NAME}}"
        )));
    }
    let socket = daemon.named_fds().take(address["str"].as_str().unwrap_or_default())?;
    Ok(daemon.remotes.book(socket, node))
}

/// The dup of a set's descriptor that fits.
fn open_fdset(
    sets: &FdSets,
    wants: &Wants,
    filename: &str,
    node: &str,
    access: Access,
    exclusive: bool,
) -> block::Result<block::Descriptor> {
    let set = fdset::path::set_id(filename);
    let dup = set.and_then(|set| sets.open_for(set, access, node)).map_err(|e| {
        tracing::info!(filename, "{}", e.detail());
        if let fdset::Error::NoSuchSet { id: set, .. } | fdset::Error::NoMatch { id: set, .. } = e {
            wants.note(Wanted { set, access, node: node.to_owned() });
        }
        block::Error::invalid(e.to_string())
    })?;
    // Image locks say nothing between two users of one open file: so let there be only one that writes.
    let users = sets
        .set(dup.set_id())
        .map_or(0, |set| set.dups().filter(|other| other.opened_from() == dup.opened_from()).count());
    if exclusive && users > 1 {
        return Err(block::Error::new(
            block::ErrorKind::InUse,
            format!(
                "Descriptor {} of {filename} is open for writing by another node already; pass a second descriptor that was \
                 opened by itself",
                dup.opened_from()
            ),
        ));
    }
    Ok(Box::new(dup))
}

/// The driver's own options, as the block layer takes them.
///
/// # Errors
/// A number of bytes that is negative, or the id of no secret.
pub fn driver_options(
    driver: &DriverEntry,
    options: &Map<String, Value>,
    objects: &Objects,
) -> Result<block::Options, Error> {
    let mut checked = block::Options::new();
    for spec in driver.options {
        let Some(value) = options.get(spec.name) else { continue };
        let value = match (spec.kind, value) {
            (OptionKind::Bool, Value::Bool(value)) => OptionValue::Bool(*value),
            (OptionKind::Aio | OptionKind::Str | OptionKind::Directory, Value::String(value)) => {
                OptionValue::Str(value.clone())
            }
            (OptionKind::Size, value) => OptionValue::Size(value.as_u64().ok_or_else(|| {
                Error::generic(format!("Value '{value}' is out of range for parameter '{}'", spec.name))
            })?),
            (OptionKind::Seconds, value) => OptionValue::Size(value.as_u64().unwrap_or(0)),
            (OptionKind::Socket, value) => OptionValue::Str(value["str"].as_str().unwrap_or_default().to_owned()),
            (OptionKind::Secret, Value::String(id)) => OptionValue::Secret(objects.secret(id)?),
            (OptionKind::LuksSecret, value) => {
                let id = value.get("key-secret").and_then(Value::as_str);
                let id = id.ok_or_else(|| Error::generic("Parameter 'encrypt.key-secret' is required for cipher"))?;
                OptionValue::Secret(objects.secret(id)?)
            }
            (OptionKind::OverlapCheck, value) => {
                let template = value.get("template").unwrap_or(value);
                let all = match value.get("inactive-l2") {
                    Some(own) => *own == Value::Bool(true),
                    None => template.as_str() == Some("all"),
                };
                OptionValue::Str(if all { "all" } else { "cached" }.into())
            }
            (OptionKind::Bool, _) => return Err(Error::invalid_type(spec.name, "boolean")),
            (OptionKind::Aio | OptionKind::Str | OptionKind::Directory | OptionKind::Secret, _) => {
                return Err(Error::invalid_type(spec.name, "string"));
            }
        };
        checked.insert(spec.name, value);
    }
    Ok(checked)
}

/// Options that the schema knows so that clients may state the default, and that nothing implements yet.
fn refuse_unsupported(options: &Map<String, Value>, has_rings: bool) -> Result<(), Error> {
    let unsupported = |name: &str, value: &Value| {
        Err(Error::generic(format!("'{name}' = {value} is not supported by this version; leave it out")))
    };
    if let Some(value @ Value::Bool(true)) = options.get("force-share") {
        return unsupported("force-share", value);
    }
    if let Some(value) = options.get("detect-zeroes").filter(|value| value.as_str() != Some("off")) {
        return unsupported("detect-zeroes", value);
    }
    match options.get("aio").and_then(Value::as_str) {
        Some("io_uring") if !has_rings => {
            return Err(Error::generic(
                "'aio' = \"io_uring\" needs rings, which can only be made before the daemon is confined: start it with \
                 --aio=io_uring, or leave the option out",
            ));
        }
        Some("native") => {
            return Err(Error::generic(
                "'aio' = \"native\" (Linux AIO) is not supported; say \"io_uring\" or \"threads\", or leave it out",
            ));
        }
        _ => {}
    }
    if let Some(value @ Value::Bool(true)) = options.get("cache").and_then(|cache| cache.get("no-flush")) {
        return unsupported("cache.no-flush", value);
    }
    Ok(())
}
