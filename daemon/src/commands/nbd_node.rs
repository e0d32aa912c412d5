// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `blockdev-nbd-reconnect`, the answer to `BLOCK_NBD_DISCONNECTED`: another socket for a node with the driver `nbd`.

use qmp::{Call, Command, Error, Event, Member, Type};
use serde_json::Value;

use super::block_error;
use super::blockdev::passed_socket;
use crate::state::Daemon;

pub fn commands() -> Vec<Command<Daemon>> {
    vec![Command::new(
        "blockdev-nbd-reconnect",
        "Gives a node with the driver `nbd` another socket to its server's export. Requests that wait go on; the size and all that \
         was agreed must be as before.",
        [
            Member::required("node-name", Type::Str, "The node."),
            Member::required("server", Type::Named("SocketAddress"), "The socket, as for `blockdev-add`."),
        ],
        reconnect,
    )]
}

/// The event of a lost connection.
pub fn event() -> Event {
    Event::new(
        "BLOCK_NBD_DISCONNECTED",
        [Member::required("node-name", Type::Str, "The node.")],
        "The connection of a node with the driver `nbd` is lost; its requests wait for `blockdev-nbd-reconnect` as long as its \
         `reconnect-delay` says.",
    )
}

fn reconnect(daemon: &mut Daemon, call: Call<'_>) -> Result<Value, Error> {
    let name = call.arguments()["node-name"].as_str().unwrap_or_default();
    daemon.graph.get(name).map_err(block_error)?;
    let socket = passed_socket(daemon, &call.arguments()["server"], name)?;
    daemon.graph.reconnect(name, Box::new(socket)).map_err(block_error)?;
    Ok(Value::Null)
}
