// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Passing a chain to the daemon: every file into an fd set, every layer a node over it.

use serde_json::{Map, Value, json};

use crate::Result;
use crate::chain::{Chain, Layer};
use crate::journal::Carried;
use crate::kept::Kept;
use crate::opening::{Opened, Rights};

/// Passes the files of `chain` and builds its nodes, the lowest first; `discard` passes discards on. Returns the name of the top node.
///
/// # Errors
/// The daemon refuses one.
pub fn attach(daemon: &mut Kept, chain: &Chain, name: &str, discard: bool) -> Result<String> {
    let mut below: Option<String> = None;
    for (index, layer) in chain.layers.iter().enumerate().rev() {
        let node = if index == 0 { name.to_owned() } else { format!("{name}-layer{index}") };
        attach_layer(daemon, layer, &node, below.as_deref(), discard)?;
        below = Some(node);
    }
    Ok(name.to_owned())
}

/// Passes the files of one layer and makes it a node over the node `below`, if there is one.
///
/// # Errors
/// The daemon refuses one.
pub(crate) fn attach_layer(
    daemon: &mut Kept,
    layer: &Layer,
    node: &str,
    below: Option<&str>,
    discard: bool,
) -> Result<()> {
    let mut options = Map::from_iter([
        ("driver".to_owned(), json!(layer.inspection.format)),
        ("node-name".into(), json!(node)),
        ("read-only".into(), json!(layer.image.rights == Rights::ReadOnly)),
        ("discard".into(), json!(if discard { "unmap" } else { "ignore" })),
        ("file".into(), file(daemon, &layer.image)?),
    ]);
    if let Some(data_file) = &layer.data_file {
        options.insert("data-file".into(), file(daemon, data_file)?);
    }
    if !layer.extents.is_empty() {
        let extents: Result<Vec<Value>> = layer.extents.iter().map(|extent| file(daemon, extent)).collect();
        options.insert("extents".into(), Value::Array(extents?));
    }
    if let Some(below) = below {
        options.insert("backing".into(), json!(below));
    }
    daemon.execute("blockdev-add", Value::Object(options), &[])?;
    Ok(())
}

/// A new fd set with one descriptor, and the node options that open it.
fn file(daemon: &mut Kept, opened: &Opened) -> Result<Value> {
    let (device, inode) = opened.identity;
    let opaque = format!("doorless:{device}:{inode}:{}", opened.path.display());
    let set = daemon.next_set();
    daemon.execute("add-fd", json!({ "fdset-id": set, "opaque": opaque }), &[Carried::image(opened)?])?;
    Ok(json!({
        "driver": if opened.device { "host_device" } else { "file" },
        "filename": format!("/dev/fdset/{set}"),
        "read-only": opened.rights == Rights::ReadOnly,
        "discard": "unmap",
        "cache": { "direct": opened.bypasses_cache() },
    }))
}
