// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `blockdev-snapshot`: an overlay takes the place of a node, under the requests of those who use it.

use std::sync::Arc;
use std::time::Duration;

use block::Drained;
use qmp::{Arguments, Command, Definition, Error, Member, Type};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::block_error;
use super::transaction::Step;
use crate::state::Daemon;

/// How long requests under way may take to end. Commands wait meanwhile, so a host that hangs must not hold them for ever.
const PATIENCE: Duration = Duration::from_secs(30);

pub fn types() -> Vec<Definition> {
    vec![Definition::structure(
        "BlockdevSnapshot",
        [
            Member::required("node", Type::Str, "The node that is to be read-only and below."),
            Member::required(
                "overlay",
                Type::Str,
                "The node that takes its place: nobody uses it, it has no backing file, and was opened with `backing: null` if its \
                 image names one. The image's header stays as it is.",
            ),
        ],
        "An overlay and what is to be below it.",
    )]
}

pub fn commands() -> Vec<Command<Daemon>> {
    vec![Command::new(
        "blockdev-snapshot",
        "Puts an overlay in the place of a node, for all who use it; the node becomes its backing file and read-only. Requests \
         under way end first, those that come wait.",
        Arguments::Of("BlockdevSnapshot"),
        |daemon, call| {
            let step = snapshot(daemon, call.into_arguments())?;
            (step.commit)(daemon);
            Ok(Value::Null)
        },
    )]
}

#[derive(Deserialize)]
struct Snapshot {
    node: String,
    overlay: String,
}

/// Puts the overlay into the books, as a step that a transaction can take back; with the commit it is in use.
pub fn snapshot(daemon: &mut Daemon, arguments: Map<String, Value>) -> Result<Step, Error> {
    let parsed = serde_json::from_value(Value::Object(arguments));
    let Snapshot { node, overlay } = parsed.map_err(|e| Error::generic(e.to_string()))?;
    daemon.graph.check_base(&node).map_err(block_error)?;
    let drained = drain(daemon, &node)?;
    let below = Arc::clone(daemon.graph.get(&node).map_err(block_error)?);
    // What was acknowledged before is what the overlay's flush will not reach.
    below.flush().map_err(|e| {
        tracing::error!(node, "flush before a snapshot: {e}");
        Error::generic("An IO error has occurred")
    })?;
    let overlaid = daemon.graph.overlay(&node, &overlay).map_err(block_error)?;
    let taken_back = overlaid.clone();
    let commit = move |daemon: &mut Daemon| {
        daemon.graph.show(&overlaid);
        let Ok(above) = daemon.graph.get(&overlay).map(Arc::clone) else { return };
        for (_, drained) in drained.iter().filter(|(straight, _)| *straight) {
            drained.replace(&above);
        }
        drop(drained);
        if above.len() != below.len() {
            daemon.exports.size_changed(above.name());
        }
    };
    Ok(Step { undo: Box::new(move |daemon| daemon.graph.take_back(taken_back)), commit: Box::new(commit) })
}

/// Keeps requests to a node out; for each export whether it has the node itself, not one above it.
fn drain(daemon: &Daemon, node: &str) -> Result<Vec<(bool, Drained)>, Error> {
    let straight: Vec<String> = daemon.graph.exports_of(node);
    let mut drained = Vec::new();
    for id in daemon.graph.exports_above(node) {
        // One that is not there any more has no requests either.
        let Some(root) = daemon.exports.root(&id) else { continue };
        match root.drain(PATIENCE) {
            Some(root) => drained.push((straight.contains(&id), root)),
            None => {
                let seconds = PATIENCE.as_secs();
                return Err(Error::generic(format!(
                    "Requests of export '{id}' to node '{node}' did not end within {seconds} seconds; nothing has changed"
                )));
            }
        }
    }
    Ok(drained)
}
