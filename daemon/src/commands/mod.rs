// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Every command, by subject. A command is a function over the [`Daemon`](crate::state::Daemon) and a line in its module's
//! list; dispatch, `query-commands`, `query-qmp-schema` and the reference all read the one table made here.

mod bitmap;
mod blockdev;
mod confinement;
mod create;
mod export;
mod fdset;
mod fdset_detail;
mod jobs;
mod ledger;
mod metrics;
mod nbd_moving;
mod nbd_node;
mod nbd_server;
mod node_query;
mod objects;
mod options;
mod overlay;
mod reopen;
mod resize;
mod snapshot;
mod statistics;
mod transaction;
mod vhost_user;
mod vvfat;

use qmp::{Arguments, Command, Definition, Event, Member, Table, Type, Version};
use serde_json::Value;

use crate::state::Daemon;

/// QEMU's protocol version that is spoken: clients decide by it what they may send.
const QEMU: (u32, u32, u32) = (10, 0, 2);

/// The table of everything the monitor understands.
///
/// # Panics
/// Never: a table that contradicts itself fails the first test.
pub fn table() -> Table<Daemon> {
    let version = Version { qemu: QEMU, package: format!("doorless {}", env!("CARGO_PKG_VERSION")) };
    let types = [
        bitmap::types(),
        blockdev::types(),
        confinement::types(),
        create::types(),
        export::types(),
        fdset::types(),
        fdset_detail::types(),
        jobs::types(),
        ledger::types(),
        objects::types(),
        nbd_moving::types(),
        nbd_server::types(),
        node_query::types(),
        overlay::types(),
        snapshot::types(),
        statistics::types(),
        transaction::types(),
        vhost_user::types(),
        vvfat::types(),
    ]
    .concat();
    let mut commands = vec![Command::new("quit", "Ends the daemon.", Arguments::NONE, quit)];
    commands.extend(fdset::commands());
    commands.extend(blockdev::commands());
    commands.extend(reopen::commands());
    commands.extend(node_query::commands());
    commands.extend(nbd_node::commands());
    commands.extend(nbd_server::commands());
    commands.extend(nbd_moving::commands());
    commands.extend(vhost_user::commands());
    commands.extend(export::commands());
    commands.extend(confinement::commands());
    commands.extend(create::commands());
    commands.extend(jobs::commands());
    commands.extend(ledger::commands());
    commands.extend(objects::commands());
    commands.extend(resize::commands());
    commands.extend(overlay::commands());
    commands.extend(snapshot::commands());
    commands.extend(bitmap::commands());
    commands.extend(transaction::commands());
    commands.extend(statistics::commands());
    commands.extend(metrics::commands());
    commands.extend(vvfat::commands());
    Table::new(version, types, commands, events()).expect("the table is consistent: a test builds it")
}

fn events() -> Vec<Event> {
    [vec![export::deleted_event(), jobs::status_event(), nbd_node::event(), corrupted_event()], fdset::events()]
        .concat()
}

fn corrupted_event() -> Event {
    Event::new(
        "BLOCK_IMAGE_CORRUPTED",
        [
            Member::required("device", Type::Str, "Always empty: there are no devices here."),
            Member::optional("node-name", Type::Str, "The node."),
            Member::required("msg", Type::Str, "What is wrong, for people."),
            Member::optional("offset", Type::Int, "Byte of the host's file where it is wrong."),
            Member::optional("size", Type::Int, "For how many bytes."),
            Member::required("fatal", Type::Bool, "Whether the image cannot be written any more."),
        ],
        "An image was found damaged.",
    )
}

fn quit(daemon: &mut Daemon, _: qmp::Call<'_>) -> Result<Value, qmp::Error> {
    daemon.quit = true;
    Ok(Value::Null)
}

/// The error of the block layer as the monitor tells it.
fn block_error(error: block::Error) -> qmp::Error {
    qmp::Error::generic(error.to_string())
}

/// `words` as an enumeration, for the lists of types below.
fn words(name: &'static str, words: &[&'static str], doc: &'static str) -> Definition {
    Definition::enumeration(name, words, doc)
}
