// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `block_resize`.

use block::{Preallocation, Use, User};
use qmp::{Call, Command, Error, Member, Type};
use serde::Deserialize;
use serde_json::Value;

use super::block_error;
use crate::state::Daemon;

pub fn commands() -> Vec<Command<Daemon>> {
    vec![Command::new(
        "block_resize",
        "Changes the size of a node's image. Clients that connect later see the new size, and those that can be told are told.",
        [
            Member::optional("device", Type::Str, "There are no devices here: give `node-name`."),
            Member::optional("node-name", Type::Str, "The node."),
            Member::required("size", Type::Int, "The new size in bytes."),
        ],
        resize,
    )]
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Resize {
    device: Option<String>,
    node_name: Option<String>,
    size: i64,
}

fn resize(daemon: &mut Daemon, mut call: Call<'_>) -> Result<Value, Error> {
    let Resize { device, node_name, size } = call.parse()?;
    let (device, name) = (device.unwrap_or_default(), node_name.unwrap_or_default());
    let node = daemon.graph.get(&name).map(std::sync::Arc::clone);
    let node = node.map_err(|_| Error::generic(format!("Cannot find device='{device}' nor node-name='{name}'")))?;
    let size = u64::try_from(size).map_err(|_| Error::generic("Parameter 'size' expects a >0 size"))?;
    // As a writer for a moment: nobody who keeps an image in the node bears that.
    let user = User::Export { id: "block_resize".into() };
    let usage = Use { user, writes: true, resizes: true, shares_writes: true };
    let claim = daemon.graph.claim(&name, usage).map_err(block_error)?;
    let resized = node.resize(size, Preallocation::Off);
    daemon.graph.release(claim);
    resized.map_err(block_error)?;
    daemon.exports.size_changed(&name);
    Ok(Value::Null)
}
