// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `transaction`: several actions, all or none. Each does its work at once and says how that is taken back; what cannot be taken
//! back waits until all have succeeded.

use qmp::{Call, Command, Definition, Error, Member, Type};
use serde_json::{Map, Value};

use super::{bitmap, overlay, snapshot, words};
use crate::state::Daemon;

/// An action that is done.
pub struct Step {
    /// Takes it back.
    pub undo: Box<dyn FnOnce(&mut Daemon)>,
    /// Does what is left to do, and cannot fail.
    pub commit: Box<dyn FnOnce(&mut Daemon)>,
}

impl Step {
    /// One with nothing left to do.
    pub fn undone_by(undo: impl FnOnce(&mut Daemon) + 'static) -> Step {
        Step { undo: Box::new(undo), commit: Box::new(|_| ()) }
    }
}

type Act = fn(&mut Daemon, Map<String, Value>) -> Result<Step, Error>;

/// The actions, one line each: QAPI's word, the type of its arguments, what it does.
const ACTIONS: &[(&str, &str, Act)] = &[
    ("abort", "Abort", abort),
    ("block-dirty-bitmap-add", "BlockDirtyBitmapAdd", bitmap::add),
    ("block-dirty-bitmap-remove", "BlockDirtyBitmap", bitmap::remove),
    ("block-dirty-bitmap-clear", "BlockDirtyBitmap", bitmap::clear),
    ("block-dirty-bitmap-enable", "BlockDirtyBitmap", bitmap::enable),
    ("block-dirty-bitmap-disable", "BlockDirtyBitmap", bitmap::disable),
    ("block-dirty-bitmap-merge", "BlockDirtyBitmapMerge", bitmap::merge),
    ("blockdev-snapshot", "BlockdevSnapshot", overlay::snapshot),
    ("blockdev-snapshot-internal-sync", "BlockdevSnapshotInternal", snapshot::create),
];

/// QAPI's names for objects with a member `data`, by the type of that.
const WRAPPERS: &[(&str, &str, Type)] = &[
    ("AbortWrapper", "Abort", Type::Named("Abort")),
    ("BlockDirtyBitmapAddWrapper", "BlockDirtyBitmapAdd", Type::Named("BlockDirtyBitmapAdd")),
    ("BlockDirtyBitmapWrapper", "BlockDirtyBitmap", Type::Named("BlockDirtyBitmap")),
    ("BlockDirtyBitmapMergeWrapper", "BlockDirtyBitmapMerge", Type::Named("BlockDirtyBitmapMerge")),
    ("BlockdevSnapshotWrapper", "BlockdevSnapshot", Type::Named("BlockdevSnapshot")),
    ("BlockdevSnapshotInternalWrapper", "BlockdevSnapshotInternal", Type::Named("BlockdevSnapshotInternal")),
];

pub fn types() -> Vec<Definition> {
    let kinds: Vec<&str> = ACTIONS.iter().map(|(word, ..)| *word).collect();
    let variants: Vec<(&str, Type)> = ACTIONS
        .iter()
        .filter_map(|(word, data, _)| {
            WRAPPERS.iter().find(|(_, of, _)| of == data).map(|(wrapper, ..)| (*word, Type::Named(wrapper)))
        })
        .collect();
    let mut types = vec![
        Definition::structure("Abort", [], "Nothing."),
        words("ActionCompletionMode", &["individual", "grouped"], "Whether jobs of a transaction end together."),
        Definition::structure(
            "TransactionProperties",
            [Member::optional(
                "completion-mode",
                Type::Named("ActionCompletionMode"),
                "Default `individual`; no action here is a job that could be `grouped`.",
            )],
            "How a transaction is done.",
        ),
        Definition::enumeration("TransactionActionKind", kinds, "The kinds of actions."),
        Definition::union(
            "TransactionAction",
            [Member::required("type", Type::Named("TransactionActionKind"), "The kind.")],
            "type",
            variants,
            "An action.",
        ),
    ];
    types.extend(WRAPPERS.iter().map(|&(wrapper, _, ty)| {
        Definition::structure(wrapper, [Member::required("data", ty, "Its arguments.")], "Arguments of an action.")
    }));
    types
}

pub fn commands() -> Vec<Command<Daemon>> {
    vec![Command::new(
        "transaction",
        "Does several actions in order; if one fails, those before it are taken back.",
        [
            Member::required("actions", Type::Array(&Type::Named("TransactionAction")), "The actions."),
            Member::optional("properties", Type::Named("TransactionProperties"), "How they are done."),
        ],
        transaction,
    )]
}

fn transaction(daemon: &mut Daemon, call: Call<'_>) -> Result<Value, Error> {
    let mut arguments = call.into_arguments();
    let grouped = arguments.get("properties").is_some_and(|properties| properties["completion-mode"] == "grouped");
    let Some(Value::Array(mut actions)) = arguments.remove("actions") else { return Ok(Value::Null) };
    let kind = |action: &Value| action["type"].as_str().unwrap_or_default().to_owned();
    if let Some(first) = actions.first().filter(|_| grouped) {
        return Err(Error::generic(format!(
            "Action '{}' does not support transaction property completion-mode = grouped",
            kind(first)
        )));
    }
    // Guests write meanwhile: what a snapshot does not have must be marked in a bitmap that is added or cleared along with it.
    // An overlay needs no such care: requests wait from its action on.
    actions.sort_by_key(|action| kind(action) == "blockdev-snapshot-internal-sync");
    let mut done = Vec::new();
    for mut action in actions {
        let kind = kind(&action);
        let data = action["data"].as_object_mut().map(std::mem::take).unwrap_or_default();
        let acted = match ACTIONS.iter().find(|(word, ..)| *word == kind) {
            Some((_, _, act)) => act(daemon, data),
            None => Err(Error::generic(format!("Parameter 'type' does not accept value '{kind}'"))),
        };
        match acted {
            Ok(step) => done.push(step),
            Err(e) => {
                for Step { undo, commit } in done.into_iter().rev() {
                    // It may hold what must be free again.
                    drop(commit);
                    undo(daemon);
                }
                return Err(e);
            }
        }
    }
    for step in done {
        (step.commit)(daemon);
    }
    Ok(Value::Null)
}

fn abort(_: &mut Daemon, _: Map<String, Value>) -> Result<Step, Error> {
    Err(Error::generic("Transaction aborted using Abort action"))
}
