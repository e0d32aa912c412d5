// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `blockdev-snapshot-internal-sync`, `blockdev-snapshot-delete-internal-sync`.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use block::{BlockNode, Snapshot};
use qmp::{Call, Command, Definition, Error, Member, Type};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::block_error;
use super::transaction::Step;
use crate::state::Daemon;

pub fn types() -> Vec<Definition> {
    vec![
        Definition::structure(
            "BlockdevSnapshotInternal",
            [
                Member::required("device", Type::Str, "The node."),
                Member::required("name", Type::Str, "The snapshot to be."),
            ],
            "A snapshot to be.",
        ),
        Definition::structure(
            "SnapshotInfo",
            [
                Member::required("id", Type::Str, "Unique in the image."),
                Member::required("name", Type::Str, "Chosen by the user."),
                Member::required("vm-state-size", Type::Int, "Bytes of a machine's state."),
                Member::required("date-sec", Type::Int, "When it was made, seconds since 1970."),
                Member::required("date-nsec", Type::Int, "And nanoseconds."),
                Member::required("vm-clock-sec", Type::Int, "The guest's clock then, seconds."),
                Member::required("vm-clock-nsec", Type::Int, "And nanoseconds."),
                Member::optional("icount", Type::Int, "Instructions executed, if the guest counted."),
            ],
            "A snapshot in an image.",
        ),
    ]
}

pub fn commands() -> Vec<Command<Daemon>> {
    vec![
        Command::new(
            "blockdev-snapshot-internal-sync",
            "Keeps the present state of an image in the image itself. Requests wait meanwhile.",
            qmp::Arguments::Of("BlockdevSnapshotInternal"),
            |daemon, call| {
                create(daemon, call.into_arguments())?;
                Ok(Value::Null)
            },
        ),
        Command::new(
            "blockdev-snapshot-delete-internal-sync",
            "Deletes a snapshot in an image; what it was.",
            [
                Member::required("device", Type::Str, "The node."),
                Member::optional("id", Type::Str, "Its id."),
                Member::optional(
                    "name",
                    Type::Str,
                    "Its name. At least one of the two is needed, and what is given must fit.",
                ),
            ],
            delete,
        )
        .returning(Type::Named("SnapshotInfo")),
    ]
}

#[derive(Deserialize)]
struct Create {
    device: String,
    name: String,
}

/// Makes a snapshot, as a step that a transaction can take back.
pub fn create(daemon: &mut Daemon, arguments: Map<String, Value>) -> Result<Step, Error> {
    let parsed = serde_json::from_value(Value::Object(arguments));
    let Create { device, name } = parsed.map_err(|e| Error::generic(e.to_string()))?;
    let node = node(daemon, &device)?;
    let snapshots = node.snapshots().map_err(block_error)?;
    if name.is_empty() {
        return Err(Error::generic("Name is empty"));
    }
    if snapshots.list().map_err(block_error)?.iter().any(|snapshot| snapshot.name == name) {
        return Err(Error::generic(format!("Snapshot with name '{name}' already exists on device '{device}'")));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
    let made = snapshots.create(&name, (seconds, now.subsec_nanos())).map_err(block_error)?;
    Ok(Step::undone_by(move |_| {
        let undone = node.snapshots().and_then(|snapshots| snapshots.delete(Some(&made.id), Some(&made.name)));
        if let Err(e) = undone {
            tracing::warn!(node = node.name(), "snapshot '{}' of a transaction that failed stays: {e}", made.name);
        }
    }))
}

#[derive(Deserialize)]
struct Delete {
    device: String,
    id: Option<String>,
    name: Option<String>,
}

fn delete(daemon: &mut Daemon, mut call: Call<'_>) -> Result<Value, Error> {
    let Delete { device, id, name } = call.parse()?;
    let node = node(daemon, &device)?;
    if id.is_none() && name.is_none() {
        return Err(Error::generic("Name or id must be provided"));
    }
    let unable = |_| Error::generic("Failed to get a snapshot list: Operation not supported");
    let snapshots = node.snapshots().map_err(unable)?;
    let fits = |snapshot: &Snapshot| {
        id.as_ref().is_none_or(|id| snapshot.id == *id) && name.as_ref().is_none_or(|name| snapshot.name == *name)
    };
    if !snapshots.list().map_err(block_error)?.iter().any(fits) {
        let shown = |text: &Option<String>| text.clone().unwrap_or_else(|| "null".into());
        return Err(Error::generic(format!(
            "Snapshot with id '{}' and name '{}' does not exist on device '{device}'",
            shown(&id),
            shown(&name)
        )));
    }
    let gone = snapshots.delete(id.as_deref(), name.as_deref()).map_err(block_error)?;
    let mut info = json!({
        "id": gone.id,
        "name": gone.name,
        "vm-state-size": gone.vm_state_size,
        "date-sec": gone.date.0,
        "date-nsec": gone.date.1,
        "vm-clock-sec": gone.vm_clock / 1_000_000_000,
        "vm-clock-nsec": gone.vm_clock % 1_000_000_000,
    });
    if let Some(icount) = gone.icount {
        info["icount"] = json!(icount);
    }
    Ok(info)
}

fn node(daemon: &Daemon, name: &str) -> Result<Arc<BlockNode>, Error> {
    daemon
        .graph
        .get(name)
        .map(Arc::clone)
        .map_err(|_| Error::generic(format!("Cannot find device='{name}' nor node-name='{name}'")))
}
