// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vvfat-changes`, `vvfat-copy`: what a guest has written to a directory that it has as a FAT disk, for whoever can put it there.

use std::sync::Arc;

use block::{BlockNode, ChangeKind, Claim, Use, User};
use fdset::Access;
use qmp::{Call, Command, Definition, Error, Member, Type};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{block_error, words};
use crate::state::Daemon;

pub fn types() -> Vec<Definition> {
    vec![
        words(
            "VvfatAction",
            &["make-directory", "create", "replace", "delete", "remove-directory"],
            "What has become of a path. A directory that is to be removed is empty by then.",
        ),
        Definition::structure(
            "VvfatChange",
            [
                Member::required("path", Type::Str, "Relative to the directory; a guest's text, held to FAT's rules."),
                Member::required("action", Type::Named("VvfatAction"), "What is to be done to it."),
                Member::optional("size", Type::Int, "Bytes of a file that is created or replaced."),
            ],
            "A change to a directory.",
        ),
        Definition::structure(
            "VvfatChanges",
            [
                Member::required(
                    "changes",
                    Type::Array(&Type::Named("VvfatChange")),
                    "In an order in which they can be made.",
                ),
                Member::required(
                    "unclean",
                    Type::Bool,
                    "Whether the guest had the file system in use: what it had not written yet is missing.",
                ),
            ],
            "What a guest has changed in a directory.",
        ),
    ]
}

pub fn commands() -> Vec<Command<Daemon>> {
    vec![
        Command::new(
            "vvfat-changes",
            "Tells what a guest has changed in a directory that it has as a FAT disk. Nothing is changed by this.",
            [
                Member::required(
                    "node",
                    Type::Str,
                    "The overlay that the guest wrote to. Nobody writes to it any more.",
                ),
                Member::required("base", Type::Str, "The node with the driver `vvfat` below it."),
            ],
            changes,
        )
        .returning(Type::Named("VvfatChanges")),
        Command::new(
            "vvfat-copy",
            "Copies files from a guest's FAT disk into passed files, as a job.",
            [
                Member::required("job-id", Type::Str, "The job to be."),
                Member::required("node", Type::Str, "As in `vvfat-changes`."),
                Member::required("base", Type::Str, "As in `vvfat-changes`."),
                Member::required(
                    "dir",
                    Type::Str,
                    "`/dev/fdset/ID`: a set of empty files that can be read and written, each with the path of its content as \
                     opaque text.",
                ),
            ],
            copy,
        ),
    ]
}

#[derive(Deserialize)]
struct Changes {
    node: String,
    base: String,
}

fn changes(daemon: &mut Daemon, mut call: Call<'_>) -> Result<Value, Error> {
    let Changes { node, base } = call.parse()?;
    let (base, top, claim) = nodes(daemon, &node, &base, "vvfat-changes")?;
    let found = base.directory().map(|directory| directory.changes(&base, &top)).transpose();
    daemon.graph.release(claim);
    let found = found.map_err(block_error)?.unwrap_or_default();
    let changes: Vec<Value> = found
        .list
        .iter()
        .map(|change| {
            let (action, size) = match change.kind {
                ChangeKind::MakeDirectory => ("make-directory", None),
                ChangeKind::Create(size) => ("create", Some(size)),
                ChangeKind::Replace(size) => ("replace", Some(size)),
                ChangeKind::Delete => ("delete", None),
                ChangeKind::RemoveDirectory => ("remove-directory", None),
            };
            match size {
                Some(size) => json!({ "path": change.path, "action": action, "size": size }),
                None => json!({ "path": change.path, "action": action }),
            }
        })
        .collect();
    Ok(json!({ "changes": changes, "unclean": found.unclean }))
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Copy {
    job_id: String,
    node: String,
    base: String,
    dir: String,
}

fn copy(daemon: &mut Daemon, mut call: Call<'_>) -> Result<Value, Error> {
    let Copy { job_id, node, base, dir } = call.parse()?;
    daemon.jobs.check_id(&job_id)?;
    let user = format!("job {job_id}");
    let all = fdset::path::set_id(&dir).and_then(|set| daemon.fdsets.open_all(set, Access::READ_WRITE, &user));
    let all = all.map_err(|e| {
        tracing::info!(dir, "{}", e.detail());
        Error::generic(e.to_string())
    })?;
    let files: Vec<_> = all.into_iter().map(|(path, file)| (path.unwrap_or_default(), file)).collect();
    let (base, top, claim) = nodes(daemon, &node, &base, &job_id)?;
    daemon.jobs.start(job_id, "vvfat-copy", vec![claim], move || {
        base.directory().map_or(Ok(()), |directory| directory.copy(&top, &files)).map_err(|e| e.to_string())
    })?;
    Ok(Value::Null)
}

/// The directory's node and the guest's disk, with a claim that keeps writers from it.
fn nodes(
    daemon: &mut Daemon,
    node: &str,
    base: &str,
    user: &str,
) -> Result<(Arc<BlockNode>, Arc<BlockNode>, Claim), Error> {
    let base = Arc::clone(daemon.graph.get(base).map_err(block_error)?);
    if base.directory().is_none() {
        return Err(Error::generic(format!("'{}' is no node with the driver vvfat", base.name())));
    }
    let usage = Use { user: User::Job { id: user.to_owned() }, writes: false, resizes: false, shares_writes: false };
    let claim = daemon.graph.claim(node, usage).map_err(block_error)?;
    match daemon.graph.get(node).map(Arc::clone) {
        Ok(top) => Ok((base, top, claim)),
        Err(e) => {
            daemon.graph.release(claim);
            Err(block_error(e))
        }
    }
}
