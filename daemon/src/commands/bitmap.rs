// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `block-dirty-bitmap-add`, `-remove`, `-clear`, `-enable`, `-disable` and `-merge`. Each is a [step](Step) that a transaction can
//! take back.

use std::io;
use std::sync::Arc;

use block::BlockNode;
use block::bitmap::{Bitmap, BitmapUse};
use export::nbd::DirtyRuns;
use qmp::{Call, Command, Definition, Error, Member, Type};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::block_error;
use super::transaction::Step;
use crate::state::Daemon;

/// Granularity without a wish: the image's clusters, within these bounds.
const GRANULARITIES: (u64, u64) = (4096, 65536);
/// Longest name in bytes.
const MAX_NAME: usize = 1023;

pub fn types() -> Vec<Definition> {
    let which =
        || [Member::required("node", Type::Str, "The node."), Member::required("name", Type::Str, "The bitmap.")];
    vec![
        Definition::structure(
            "BlockDirtyBitmapAdd",
            [
                which().to_vec(),
                vec![
                    Member::optional(
                        "granularity",
                        Type::Uint32,
                        "Bytes to a bit, a power of two from 512 to 2 GiB; default the image's cluster size, 4 to 64 KiB.",
                    ),
                    Member::optional("persistent", Type::Bool, "Whether it is stored in the image at the end; qcow2 only."),
                    Member::optional("disabled", Type::Bool, "Whether it does not track writes for now."),
                ],
            ]
            .concat(),
            "A dirty bitmap to be.",
        ),
        Definition::structure(
            "BlockDirtyBitmapMerge",
            [
                Member::required("node", Type::Str, "The node of the target."),
                Member::required("target", Type::Str, "The bitmap that gets the marks."),
                Member::required(
                    "bitmaps",
                    Type::Array(&Type::Named("BlockDirtyBitmapOrStr")),
                    "Bitmaps whose marks it gets; a name alone means one of the target's node.",
                ),
            ],
            "Bitmaps to be merged.",
        ),
        Definition::structure(
            "BlockDirtyInfo",
            [
                Member::optional("name", Type::Str, "The bitmap."),
                Member::required("count", Type::Int, "Bytes that are marked."),
                Member::required("granularity", Type::Uint32, "Bytes to a bit."),
                Member::required("recording", Type::Bool, "Whether it tracks writes."),
                Member::required("busy", Type::Bool, "Whether an export uses it."),
                Member::required("persistent", Type::Bool, "Whether it is stored in the image at the end."),
                Member::optional("inconsistent", Type::Bool, "True if its content is lost: it can only be removed."),
            ],
            "A dirty bitmap.",
        ),
    ]
}

pub fn commands() -> Vec<Command<Daemon>> {
    use qmp::Arguments::Of;
    vec![
        Command::new(
            "block-dirty-bitmap-add",
            "Adds a dirty bitmap to a node.",
            Of("BlockDirtyBitmapAdd"),
            |daemon, call| at_once(daemon, call, add),
        ),
        Command::new(
            "block-dirty-bitmap-remove",
            "Removes a dirty bitmap, also from the image.",
            Of("BlockDirtyBitmap"),
            |daemon, call| at_once(daemon, call, remove),
        ),
        Command::new(
            "block-dirty-bitmap-clear",
            "Takes every mark out of a dirty bitmap.",
            Of("BlockDirtyBitmap"),
            |daemon, call| at_once(daemon, call, clear),
        ),
        Command::new(
            "block-dirty-bitmap-enable",
            "Lets a dirty bitmap track writes.",
            Of("BlockDirtyBitmap"),
            |daemon, call| at_once(daemon, call, enable),
        ),
        Command::new(
            "block-dirty-bitmap-disable",
            "Lets a dirty bitmap track writes no longer.",
            Of("BlockDirtyBitmap"),
            |daemon, call| at_once(daemon, call, disable),
        ),
        Command::new(
            "block-dirty-bitmap-merge",
            "Gives a dirty bitmap the marks of others.",
            Of("BlockDirtyBitmapMerge"),
            |daemon, call| at_once(daemon, call, merge),
        ),
    ]
}

fn at_once(
    daemon: &mut Daemon,
    call: Call<'_>,
    step: impl Fn(&mut Daemon, Map<String, Value>) -> Result<Step, Error>,
) -> Result<Value, Error> {
    let done = step(daemon, call.into_arguments())?;
    (done.commit)(daemon);
    Ok(Value::Null)
}

/// Bitmaps of a node as queries show them, the newest first; `None` if it has none.
pub fn describe(node: &BlockNode) -> Option<Value> {
    let shown = |bitmap: &Arc<Bitmap>| {
        let mut shown = json!({
            "name": bitmap.name(),
            "count": bitmap.count(),
            "granularity": bitmap.granularity(),
            "recording": bitmap.is_enabled(),
            "busy": bitmap.is_busy(),
            "persistent": bitmap.is_persistent(),
        });
        if bitmap.is_inconsistent() {
            shown["inconsistent"] = json!(true);
        }
        shown
    };
    let bitmaps = node.bitmaps().list();
    (!bitmaps.is_empty()).then(|| bitmaps.iter().rev().map(shown).collect())
}

#[derive(Deserialize)]
struct Add {
    node: String,
    name: String,
    granularity: Option<u32>,
    #[serde(default)]
    persistent: bool,
    #[serde(default)]
    disabled: bool,
}

pub fn add(daemon: &mut Daemon, arguments: Map<String, Value>) -> Result<Step, Error> {
    let Add { node: node_name, name, granularity, persistent, disabled } = parse(arguments)?;
    let lost = || Error::generic(format!("Cannot find device='{node_name}' nor node-name='{node_name}'"));
    let node = daemon.graph.get(&node_name).map(Arc::clone).map_err(|_| lost())?;
    if name.is_empty() {
        return Err(Error::generic("Bitmap name cannot be empty"));
    }
    let granularity = match granularity {
        Some(bytes) if bytes < 512 || !bytes.is_power_of_two() => {
            return Err(Error::generic("Granularity must be power of 2 and at least 512"));
        }
        Some(bytes) => u64::from(bytes),
        None => node.info().cluster_size.map_or(GRANULARITIES.1, |size| size.clamp(GRANULARITIES.0, GRANULARITIES.1)),
    };
    if persistent {
        node.check_new_bitmap(&name, granularity.ilog2()).map_err(block_error)?;
    }
    if node.bitmaps().get(&name).is_some() {
        return Err(Error::generic(format!("Bitmap already exists: {name}")));
    }
    if name.len() > MAX_NAME {
        return Err(Error::generic(format!("Bitmap name too long: {name}")));
    }
    let bitmap = Bitmap::new(&name, granularity.ilog2(), node.len()).ok_or_else(|| {
        Error::generic(format!("a bitmap of {} bytes at a granularity of {granularity} is too large", node.len()))
    })?;
    bitmap.set_persistent(persistent);
    let bitmap = Arc::new(bitmap);
    node.bitmaps().add(Arc::clone(&bitmap));
    node.bitmaps().set_enabled(&bitmap, !disabled);
    Ok(Step::undone_by(move |_| drop(node.bitmaps().remove(&name))))
}

pub fn remove(daemon: &mut Daemon, arguments: Map<String, Value>) -> Result<Step, Error> {
    let (node, bitmap) = find(daemon, arguments)?;
    check_idle(&bitmap)?;
    check_writable(&node, &bitmap)?;
    if bitmap.is_persistent() {
        node.remove_stored_bitmap(bitmap.name()).map_err(block_error)?;
    }
    // Nobody else uses it until it is known whether it goes. If it stays, it is stored again at the end.
    let use_of_it = bitmap.reader();
    let commit = move |_: &mut Daemon| {
        drop(use_of_it);
        node.bitmaps().remove(bitmap.name());
    };
    Ok(Step { undo: Box::new(|_| ()), commit: Box::new(commit) })
}

pub fn clear(daemon: &mut Daemon, arguments: Map<String, Value>) -> Result<Step, Error> {
    let (node, bitmap) = find(daemon, arguments)?;
    check(&node, &bitmap)?;
    let before = bitmap.copy();
    bitmap.clear();
    Ok(Step::undone_by(move |_| bitmap.merge(&before)))
}

pub fn enable(daemon: &mut Daemon, arguments: Map<String, Value>) -> Result<Step, Error> {
    set_enabled(daemon, arguments, true)
}

pub fn disable(daemon: &mut Daemon, arguments: Map<String, Value>) -> Result<Step, Error> {
    set_enabled(daemon, arguments, false)
}

fn set_enabled(daemon: &mut Daemon, arguments: Map<String, Value>, enabled: bool) -> Result<Step, Error> {
    let (node, bitmap) = find(daemon, arguments)?;
    check_idle(&bitmap)?;
    check_consistent(&bitmap)?;
    let before = bitmap.is_enabled();
    // One that stops tracking for a moment has missed nothing only if nobody writes meanwhile: so it stops at the end.
    if enabled {
        node.bitmaps().set_enabled(&bitmap, true);
        return Ok(Step::undone_by(move |_| node.bitmaps().set_enabled(&bitmap, before)));
    }
    Ok(Step { undo: Box::new(|_| ()), commit: Box::new(move |_| node.bitmaps().set_enabled(&bitmap, false)) })
}

#[derive(Deserialize)]
struct Merge {
    node: String,
    target: String,
    bitmaps: Vec<Value>,
}

pub fn merge(daemon: &mut Daemon, arguments: Map<String, Value>) -> Result<Step, Error> {
    let Merge { node, target, bitmaps } = parse(arguments)?;
    let (node, target) = find_named(daemon, &node, &target)?;
    // Of all sources first: the target changes when all of them are found.
    let all = target.copy();
    all.clear();
    for bitmap in &bitmaps {
        let text = |key: &str| bitmap[key].as_str().unwrap_or_default();
        let (_, source) = match bitmap.as_str() {
            Some(name) => find_named(daemon, node.name(), name)?,
            None => find_named(daemon, text("node"), text("name"))?,
        };
        check_idle(&source)?;
        check_consistent(&source)?;
        if source.len() != target.len() {
            return Err(Error::generic(format!(
                "Bitmaps are of different sizes (destination size is {}, source size is {}) and can't be merged",
                target.len(),
                source.len()
            )));
        }
        all.merge(&source);
    }
    check(&node, &target)?;
    let before = target.copy();
    target.merge(&all);
    // Marks that writes made meanwhile must not go again: while it tracks, too many are better than too few.
    let undo = move |_: &mut Daemon| {
        if !target.is_enabled() {
            target.clear();
            target.merge(&before);
        }
    };
    Ok(Step::undone_by(undo))
}

#[derive(Deserialize)]
struct Which {
    node: String,
    name: String,
}

fn find(daemon: &Daemon, arguments: Map<String, Value>) -> Result<(Arc<BlockNode>, Arc<Bitmap>), Error> {
    let Which { node, name } = parse(arguments)?;
    find_named(daemon, &node, &name)
}

fn find_named(daemon: &Daemon, node: &str, name: &str) -> Result<(Arc<BlockNode>, Arc<Bitmap>), Error> {
    let node = daemon.graph.get(node).map_err(|_| Error::generic(format!("Node '{node}' not found")))?;
    let bitmap = node.bitmaps().get(name);
    let bitmap = bitmap.ok_or_else(|| Error::generic(format!("Dirty bitmap '{name}' not found")))?;
    Ok((Arc::clone(node), bitmap))
}

fn parse<T: serde::de::DeserializeOwned>(arguments: Map<String, Value>) -> Result<T, Error> {
    serde_json::from_value(Value::Object(arguments)).map_err(|e| Error::generic(e.to_string()))
}

/// Whether a bitmap may be changed.
fn check(node: &BlockNode, bitmap: &Bitmap) -> Result<(), Error> {
    check_idle(bitmap)?;
    check_writable(node, bitmap)?;
    check_consistent(bitmap)
}

fn check_idle(bitmap: &Bitmap) -> Result<(), Error> {
    let text = || format!("Bitmap '{}' is currently in use by another operation and cannot be used", bitmap.name());
    if bitmap.is_busy() { Err(Error::generic(text())) } else { Ok(()) }
}

fn check_writable(node: &BlockNode, bitmap: &Bitmap) -> Result<(), Error> {
    let text = || format!("Bitmap '{}' is readonly and cannot be modified", bitmap.name());
    if bitmap.is_persistent() && !node.writable() { Err(Error::generic(text())) } else { Ok(()) }
}

fn check_consistent(bitmap: &Bitmap) -> Result<(), Error> {
    let text = || format!("Bitmap '{}' is inconsistent and cannot be used", bitmap.name());
    if bitmap.is_inconsistent() { Err(Error::generic(text())) } else { Ok(()) }
}

/// A bitmap as NBD's clients read it.
struct Exported {
    bitmap: Arc<Bitmap>,
    _in_use: BitmapUse,
}

impl DirtyRuns for Exported {
    fn run(&self, offset: u64, len: u64) -> io::Result<(u64, bool)> {
        Ok(self.bitmap.run(offset, len))
    }
}

/// A bitmap for an export of `node`: `wanted` is its name, there or in a backing file, or names its node too.
///
/// # Errors
/// There is none, or it cannot be read: QEMU's words.
pub fn for_export(
    daemon: &Daemon,
    node: &BlockNode,
    writable: bool,
    wanted: &Value,
) -> Result<export::nbd::Bitmap, Error> {
    let text = |key: &str| wanted[key].as_str().unwrap_or_default();
    let (node, bitmap) = match wanted.as_str() {
        None => find_named(daemon, text("node"), text("name"))?,
        Some(name) => {
            let mut at = node.name().to_owned();
            loop {
                if let Ok(found) = find_named(daemon, &at, name) {
                    break found;
                }
                let below = daemon.graph.edges(&at).find(|edge| edge.name == "backing").map(|edge| edge.child.clone());
                at = below.ok_or_else(|| Error::generic(format!("Bitmap '{name}' is not found")))?;
            }
        }
    };
    check_idle(&bitmap)?;
    check_consistent(&bitmap)?;
    let name = bitmap.name().to_owned();
    if !writable && node.writable() && bitmap.is_enabled() {
        return Err(Error::generic(format!("Enabled bitmap '{name}' incompatible with readonly export")));
    }
    let in_use = bitmap.reader();
    Ok(export::nbd::Bitmap { name, runs: Arc::new(Exported { bitmap, _in_use: in_use }) })
}
