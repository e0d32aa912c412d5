// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `blockdev-reopen`: the same node with other rights.

use block::{DriverEntry, driver_named};
use qmp::{Call, Command, Error, Member, Type};
use serde_json::{Map, Value};

use super::block_error;
use super::blockdev::{Inherited, access, direct, driver_options};
use crate::state::Daemon;

pub fn commands() -> Vec<Command<Daemon>> {
    vec![Command::new(
        "blockdev-reopen",
        "Makes nodes writable or read-only, through the descriptors of their sets. Every option is given again; `read-only`, \
         `auto-read-only` and `discard` may change. All nodes change or none.",
        [Member::required("options", Type::Array(&Type::Named("BlockdevOptions")), "The nodes.")],
        reopen,
    )]
}

/// A node as it was, to go back to.
struct Change {
    name: String,
    was_writable: bool,
}

fn reopen(daemon: &mut Daemon, call: Call<'_>) -> Result<Value, Error> {
    let mut arguments = call.into_arguments();
    let Some(Value::Array(nodes)) = arguments.remove("options") else { return Ok(Value::Null) };
    let mut done = Vec::new();
    for node in nodes {
        let Value::Object(options) = node else { continue };
        let Some(name) = options.get("node-name").and_then(Value::as_str).map(str::to_owned) else {
            undo(daemon, done);
            return Err(Error::generic("node-name not specified"));
        };
        if let Err(e) = reopen_node(daemon, &name, options, Inherited::default(), &mut done) {
            undo(daemon, done);
            return Err(e);
        }
    }
    Ok(Value::Null)
}

fn undo(daemon: &mut Daemon, done: Vec<Change>) {
    for Change { name, was_writable } in done.into_iter().rev() {
        if let Err(e) = daemon.graph.set_writable(&name, was_writable) {
            tracing::warn!(node = name, "going back to what was before: {e}");
        }
    }
}

/// A node becomes writable after the nodes below it, and read-only before them.
fn reopen_node(
    daemon: &mut Daemon,
    name: &str,
    options: Map<String, Value>,
    inherited: Inherited,
    done: &mut Vec<Change>,
) -> Result<(), Error> {
    let driver = check_unchanged(daemon, name, &options)?;
    let (access, direct) = (access(&options, inherited), direct(&options, inherited));
    if driver.takes_descriptor && direct != daemon.graph.get(name).map_err(block_error)?.bypasses_cache() {
        return Err(cannot_change("cache.direct"));
    }
    let was_writable = daemon.graph.get(name).map_err(block_error)?.writable();
    if !access.writable {
        set_writable(daemon, name, was_writable, false, done)?;
    }
    for child in driver.children {
        if let Some(Value::Object(below)) = options.get(child.name) {
            let edge = daemon.graph.edges(name).find(|edge| edge.name == child.name).map(|edge| edge.child.clone());
            let below_name = edge.ok_or_else(|| cannot_change(child.name))?;
            if below.get("node-name").and_then(Value::as_str).is_some_and(|given| given != below_name) {
                return Err(cannot_change(child.name));
            }
            let inherited = Inherited::by_child(child.writes, !access.writable, direct);
            reopen_node(daemon, &below_name, below.clone(), inherited, done)?;
        }
    }
    if access.writable {
        set_writable(daemon, name, was_writable, true, done)?;
    }
    daemon.graph.get(name).map_err(block_error)?.set_unmap(access.unmap);
    Ok(())
}

fn set_writable(
    daemon: &mut Daemon,
    name: &str,
    was_writable: bool,
    writable: bool,
    done: &mut Vec<Change>,
) -> Result<(), Error> {
    if was_writable != writable {
        daemon.graph.set_writable(name, writable).map_err(block_error)?;
        done.push(Change { name: name.to_owned(), was_writable });
    }
    Ok(())
}

/// Everything but rights must be as it was: a node cannot move to another set or another child.
fn check_unchanged(daemon: &Daemon, name: &str, options: &Map<String, Value>) -> Result<&'static DriverEntry, Error> {
    let node = daemon.graph.get(name).map_err(block_error)?;
    let text = |key: &str| options.get(key).and_then(Value::as_str);
    let driver = driver_named(node.driver_name()).ok_or_else(|| cannot_change("driver"))?;
    if text("driver") != Some(driver.name) {
        return Err(cannot_change("driver"));
    }
    if driver.takes_descriptor && text("filename") != Some(node.filename()) {
        return Err(cannot_change("filename"));
    }
    for child in driver.children {
        if child.is_list() {
            let edges = daemon.graph.edges(name).filter(|edge| child.edges().contains(&edge.name));
            let present: Vec<&str> = edges.map(|edge| edge.child.as_str()).collect();
            let given = options.get(child.member()).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            if !given.iter().map(Value::as_str).eq(present.into_iter().map(Some)) {
                return Err(cannot_change(child.member()));
            }
            continue;
        }
        let present = daemon.graph.edges(name).find(|edge| edge.name == child.name);
        let same = match (options.get(child.name), present) {
            (Some(Value::String(given)), Some(edge)) => *given == edge.child,
            (None | Some(Value::Null), None) | (Some(Value::Object(_)), Some(_)) => true,
            _ => false,
        };
        if !same {
            return Err(cannot_change(child.name));
        }
    }
    let (given, present) =
        (driver_options(driver, options, &daemon.objects)?, daemon.graph.options(name).map_err(block_error)?);
    match driver.options.iter().find(|option| given.get(option.name) != present.get(option.name)) {
        Some(option) => Err(cannot_change(option.name)),
        None => Ok(driver),
    }
}

fn cannot_change(option: &str) -> Error {
    Error::generic(format!("Cannot change the option '{option}'"))
}
