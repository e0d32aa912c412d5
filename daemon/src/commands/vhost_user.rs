// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `block-export-add` with `type: vhost-user-blk`.

use std::sync::Arc;

use block::{BlockNode, Use, User};
use export::vhost_user_blk::{BLOCK_SIZES, Export, MOST_QUEUES, Settings};
use qmp::{Call, Command, Definition, Error, Member, Type};
use serde::Deserialize;
use serde_json::Value;

use super::block_error;
use crate::state::Daemon;

pub fn types() -> Vec<Definition> {
    vec![
        Definition::union(
            "SocketAddress",
            [Member::required("type", Type::Named("SocketAddressType"), "The kind.")],
            "type",
            [
                ("inet", Type::Named("InetSocketAddress")),
                ("unix", Type::Named("UnixSocketAddress")),
                ("vsock", Type::Named("VsockSocketAddress")),
                ("fd", Type::Named("FdSocketAddress")),
            ],
            "Where a server is.",
        ),
        Definition::structure(
            "BlockExportOptionsVhostUserBlk",
            [
                Member::required(
                    "addr",
                    Type::Named("SocketAddress"),
                    "The listening socket: `type` must be `fd`. On the command line it may be `unix`, too.",
                ),
                Member::optional(
                    "logical-block-size",
                    Type::Size,
                    "Bytes of a logical block, a power of two from 512 to 2097152; default 512, or what the node needs if that is \
                     more.",
                ),
                Member::optional("num-queues", Type::Uint16, "Virtqueues, 1 to 128; default 1."),
            ],
            "A virtio block device for a guest whose memory its VMM shares.",
        ),
    ]
}

pub fn commands() -> Vec<Command<Daemon>> {
    vec![
        Command::new(
            "vhost-user-move",
            "Removes a vhost-user-blk export as `block-export-del` does with `mode` `hard`, but its front end is not hung up on: it is \
             stopped between two requests, with nothing under way, and sent on a passed socket for `vhost-user-client-add` of another \
             daemon. It is hung up on if it has sent half a message, or if the socket has no room. Not in QEMU.",
            moving(),
            move_client,
        ),
        Command::new(
            "vhost-user-client-add",
            "Has the next vhost-user-blk export of that id go on with the front end that `vhost-user-move` of another daemon has sent \
             on a passed socket. Not in QEMU.",
            moving(),
            add_client,
        ),
    ]
}

fn moving() -> [Member; 2] {
    [
        Member::required("id", Type::Str, "The export's id."),
        Member::required("fd", Type::Str, "The name that `getfd` gave the connected stream socket."),
    ]
}

#[derive(Deserialize)]
struct Moving {
    id: String,
    fd: String,
}

fn move_client(daemon: &mut Daemon, mut call: Call<'_>) -> Result<Value, Error> {
    let Moving { id, fd } = call.parse()?;
    let to = daemon.named_fds().take(&fd)?;
    daemon.exports.move_client(&id, to)?;
    Ok(Value::Null)
}

fn add_client(daemon: &mut Daemon, mut call: Call<'_>) -> Result<Value, Error> {
    let Moving { id, fd } = call.parse()?;
    let from = daemon.named_fds().take(&fd)?;
    daemon.exports.await_client(id, from);
    Ok(Value::Null)
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Options {
    #[serde(default)]
    addr: Value,
    logical_block_size: Option<u64>,
    num_queues: Option<u16>,
}

/// What every export has.
pub struct Common {
    pub id: String,
    pub node: Arc<BlockNode>,
    pub writable: bool,
    pub writethrough: bool,
}

pub fn add(daemon: &mut Daemon, common: Common, options: Options) -> Result<Value, Error> {
    let Common { id, node, writable, writethrough } = common;
    let Options { addr, logical_block_size, num_queues } = options;
    let queues = num_queues.unwrap_or(1);
    if !(1..=MOST_QUEUES).contains(&queues) {
        return Err(Error::generic(format!("num-queues must be 1 to {MOST_QUEUES}, not {queues}")));
    }
    let needed = node.block_size().max(*BLOCK_SIZES.start());
    let block_size = match logical_block_size {
        None => needed,
        Some(bytes) => {
            let size = u32::try_from(bytes).ok().filter(|size| size.is_power_of_two() && BLOCK_SIZES.contains(size));
            size.ok_or_else(|| {
                Error::generic(format!(
                    "logical-block-size must be a power of two from {} to {} bytes, not {bytes}",
                    BLOCK_SIZES.start(),
                    BLOCK_SIZES.end()
                ))
            })?
        }
    };
    if block_size < needed {
        return Err(Error::generic(format!(
            "logical-block-size must be at least {needed} bytes for node '{}', not {block_size}",
            node.name()
        )));
    }
    let kind = addr["type"].as_str().unwrap_or_default();
    if kind != "fd" {
        return Err(Error::generic(format!(
            "Could not listen on a socket of type '{kind}': this daemon binds nothing; pass a listening unix socket with getfd and \
             give {{\"type\": \"fd\", \"str\": NAME}}"
        )));
    }
    let name = addr["str"].as_str().unwrap_or_default();
    let listener = daemon.named_fds().take(name)?;
    if !rustix::net::sockopt::socket_acceptconn(&listener).unwrap_or(false) {
        return Err(Error::generic(format!("The passed descriptor '{name}' is not a listening socket")));
    }
    let user = User::Export { id: id.clone() };
    let usage = Use { user, writes: writable, resizes: false, shares_writes: true };
    let claim = daemon.graph.claim(node.name(), usage).map_err(block_error)?;
    let settings = Settings {
        id: id.clone(),
        node,
        writable,
        writethrough,
        block_size,
        queues,
        inflight: daemon.exports.take_inflight(),
        moved: daemon.exports.take_awaited(&id),
    };
    match Export::start(listener, settings, daemon.exports.workers(), daemon.exports.changed()) {
        Ok(export) => daemon.exports.add(id, "vhost-user-blk", Arc::new(export), claim),
        Err(e) => {
            daemon.graph.release(claim);
            return Err(Error::generic(format!("Could not serve vhost-user-blk: {e}")));
        }
    }
    Ok(Value::Null)
}
