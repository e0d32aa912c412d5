// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `query-confinement`: what the daemon gave up, and whether it can get out all the same.

use std::cell::RefCell;
use std::ffi::CString;
use std::os::fd::AsFd;

use confine::attempts::{self, Bait, Outcome};
use fdset::{Access, Dup};
use qmp::{Call, Command, Definition, Error, Member, Type};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::attest;
use crate::state::Daemon;

pub fn types() -> Vec<Definition> {
    vec![
        Definition::structure(
            "ConfinementLayer",
            [
                Member::required(
                    "name",
                    Type::Str,
                    "The layer: `limits`, `user`, `namespaces`, `pid-namespace`, `capabilities`, `no-new-privs`, `not-dumpable`, `landlock` or `seccomp`.",
                ),
                Member::required("in-force", Type::Bool, "Whether all of it is in force."),
                Member::required("detail", Type::Str, "What it does, or what is missing and why."),
            ],
            "A layer of confinement.",
        ),
        Definition::structure(
            "ConfinementAttempt",
            [
                Member::required("name", Type::Str, "A short name of the attempt that stays."),
                Member::required("what", Type::Str, "What was tried, on what."),
                Member::required("on", Type::Str, "On what; empty if on nothing in particular."),
                Member::required("denied", Type::Bool, "Whether the kernel denied it, or could not find what exists."),
                Member::required("errno", Type::Str, "What the kernel said."),
                Member::optional("layer", Type::Str, "The layer that must have denied it, by that answer."),
            ],
            "An attempt to get out.",
        ),
        Definition::structure(
            "ConfinementInfo",
            [
                Member::required(
                    "layers",
                    Type::Array(&Type::Named("ConfinementLayer")),
                    "Layers, as they were applied.",
                ),
                Member::required(
                    "attempts",
                    Type::Array(&Type::Named("ConfinementAttempt")),
                    "Attempts: those that were asked for, else those of `--attest` when the daemon started.",
                ),
                Member::required(
                    "rings",
                    Type::Str,
                    "The io_urings that reads go through, or why there are none (`--aio`). The kernel restricts each to reads.",
                ),
                Member::optional("held", Type::Bool, "Whether every attempt was denied; absent if none was made."),
            ],
            "How the daemon is confined.",
        ),
    ]
}

pub fn commands() -> Vec<Command<Daemon>> {
    vec![
        Command::new(
            "query-confinement",
            "Tells how the daemon is confined, and on request tries every way out that it knows. Every attempt is harmless if it \
             succeeds.",
            [
                Member::optional("try", Type::Bool, "Whether to try; default false."),
                Member::optional("paths", Type::Array(&Type::Str), "Files that exist, for the attempts to open; at most 16."),
            ],
            query,
        )
        .returning(Type::Named("ConfinementInfo")),
    ]
}

/// Most files that one call may name.
const MOST_PATHS: usize = 16;

#[derive(Deserialize)]
struct Query {
    r#try: Option<bool>,
    #[serde(default)]
    paths: Vec<String>,
}

fn query(daemon: &mut Daemon, mut call: Call<'_>) -> Result<Value, Error> {
    let Query { r#try, paths } = call.parse()?;
    let layers: Vec<Value> = daemon
        .confined
        .reports()
        .iter()
        .map(|report| json!({ "name": report.layer.name(), "in-force": report.in_force, "detail": report.detail }))
        .collect();
    let tried = if r#try == Some(true) { Some(attempt(daemon, &paths)?) } else { daemon.attested.clone() };
    let attempts: Vec<Value> =
        tried.iter().flatten().map(|outcome| attest::as_json(outcome, daemon.confined.report())).collect();
    let workers = daemon.exports.workers();
    let mut answer = json!({ "layers": layers, "attempts": attempts, "rings": workers.rings().detail() });
    if let Some(tried) = tried {
        answer["held"] = json!(tried.iter().all(|outcome| outcome.denied));
    }
    Ok(answer)
}

fn attempt(daemon: &Daemon, paths: &[String]) -> Result<Vec<Outcome>, Error> {
    if paths.len() > MOST_PATHS {
        return Err(Error::generic(format!("at most {MOST_PATHS} paths may be tried at once, not {}", paths.len())));
    }
    let paths = paths.iter().map(|path| {
        let called = path.clone();
        let path = CString::new(path.as_str());
        Ok((called, path.map_err(|_| Error::generic("Parameter 'paths' has a path with a NUL byte"))?))
    });
    let read_only = read_only_dup(daemon);
    let workers = daemon.exports.workers();
    let mut ring = workers.rings().borrow();
    let bait = Bait {
        paths: paths.collect::<Result<_, Error>>()?,
        read_only: read_only
            .iter()
            .map(|fd| ("a descriptor that was passed read-only".to_owned(), fd.as_fd()))
            .collect(),
        process: sys::process::parent(),
        ring: ring.as_deref_mut().map(RefCell::new),
        ..Bait::default()
    };
    Ok(attempts::run(&bait))
}

/// Something that was passed read-only, to try and get more of.
fn read_only_dup(daemon: &Daemon) -> Option<Dup> {
    daemon.fdsets.list().find_map(|set| daemon.fdsets.open(set.id(), Access::READ_ONLY).ok())
}
