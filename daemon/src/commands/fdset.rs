// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `add-fd`, `remove-fd`, `query-fdsets`, `getfd`, `closefd`.

use qmp::{Call, Command, Definition, Error, Event, Member, Type};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{fdset_detail, words};
use crate::state::Daemon;

pub fn types() -> Vec<Definition> {
    vec![
        words("FdsetChange", &["added", "removed", "expired"], "What happened to a set."),
        Definition::structure(
            "AddfdInfo",
            [
                Member::required("fdset-id", Type::Int, "The set that the descriptor is in now."),
                Member::required("fd", Type::Int, "The descriptor's number in the daemon."),
            ],
            "What `add-fd` did.",
        ),
        Definition::structure(
            "FdsetFdInfo",
            [
                Member::required("fd", Type::Int, "The descriptor's number in the daemon."),
                Member::optional("opaque", Type::Str, "The text that was given with it."),
                Member::optional("detail", Type::Named("FdsetFdDetail"), "More about it, if `detail` was asked for."),
            ],
            "A descriptor of a set.",
        ),
        Definition::structure(
            "FdsetInfo",
            [
                Member::required("fdset-id", Type::Int, "The set."),
                Member::required("fds", Type::Array(&Type::Named("FdsetFdInfo")), "Its descriptors, oldest first."),
            ],
            "A set of descriptors.",
        ),
    ]
}

pub fn events() -> Vec<Event> {
    vec![
        Event::new(
            "FDSET_CHANGED",
            [
                Member::required("fdset-id", Type::Int, "The set."),
                Member::required("change", Type::Named("FdsetChange"), "What happened."),
            ],
            "Descriptors came into a set or left it. Nodes that come and go say nothing.",
        ),
        Event::new(
            "FDSET_STRAY_FD",
            [
                Member::required("monitor", Type::Int, "The monitor, counted from 0 as on the command line."),
                Member::required("count", Type::Int, "How many."),
            ],
            "Descriptors came that no command claimed; they are closed.",
        ),
        Event::new(
            "FDSET_WANTED",
            [
                Member::required("fdset-id", Type::Int, "The set, which may not be there yet."),
                Member::required("access", Type::Named("DescriptorAccess"), "What the descriptor must be opened for."),
                Member::required("node-name", Type::Str, "The node that wants it."),
                Member::required("seconds", Type::Int, "How long the command waits for it."),
            ],
            "A command waits for a descriptor that a set does not have. Pass it with `add-fd` over another monitor. Off unless \
             asked for on the command line.",
        ),
    ]
}

pub fn commands() -> Vec<Command<Daemon>> {
    vec![
        Command::new(
            "add-fd",
            "Adds the descriptor that came with the command to a set; `/dev/fdset/ID` then opens it.",
            [
                Member::optional(
                    "fdset-id",
                    Type::Int,
                    "The set, 0 to 2^63-1; by default a new one with the lowest free id.",
                ),
                Member::optional("opaque", Type::Str, "Free text, for the client to know the descriptor by."),
            ],
            add_fd,
        )
        .returning(Type::Named("AddfdInfo")),
        Command::new(
            "remove-fd",
            "Closes a descriptor of a set, or all of them. Nodes that opened it keep their own duplicates.",
            [
                Member::required("fdset-id", Type::Int, "The set."),
                Member::optional("fd", Type::Int, "The descriptor; by default all of the set."),
            ],
            remove_fd,
        ),
        Command::new(
            "query-fdsets",
            "Lists sets and descriptors, the highest set first.",
            [Member::optional(
                "detail",
                Type::Bool,
                "Whether to tell what each descriptor is, where it came from and who uses it; default false, which is \
                 QEMU's answer.",
            )],
            query_fdsets,
        )
        .returning(Type::Array(&Type::Named("FdsetInfo"))),
        Command::new(
            "getfd",
            "Keeps the descriptor that came with the command under a name of this monitor.",
            [Member::required("fdname", Type::Str, "The name; it does not start with a digit.")],
            getfd,
        ),
        Command::new(
            "closefd",
            "Closes a descriptor kept by `getfd`.",
            [Member::required("fdname", Type::Str, "The name.")],
            closefd,
        ),
    ]
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct AddFd {
    fdset_id: Option<i64>,
    opaque: Option<String>,
}

fn add_fd(daemon: &mut Daemon, mut call: Call<'_>) -> Result<Value, Error> {
    let AddFd { fdset_id, opaque } = call.parse()?;
    let fd = call.claim_fd()?;
    let added = daemon.add_fd(fd, fdset_id, opaque)?;
    Ok(json!({ "fdset-id": added.set_id, "fd": added.fd }))
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct RemoveFd {
    fdset_id: i64,
    fd: Option<i64>,
}

fn remove_fd(daemon: &mut Daemon, mut call: Call<'_>) -> Result<Value, Error> {
    let RemoveFd { fdset_id, fd } = call.parse()?;
    daemon.fdsets.remove(fdset_id, fd).map_err(|e| Error::generic(e.to_string()))?;
    daemon.fdset_changed(fdset_id, "removed");
    Ok(Value::Null)
}

fn query_fdsets(daemon: &mut Daemon, call: Call<'_>) -> Result<Value, Error> {
    let detailed = call.arguments().get("detail") == Some(&Value::Bool(true));
    if detailed {
        daemon.fdsets.refresh();
    }
    Ok(daemon
        .fdsets
        .list()
        .map(|set| {
            let fds: Vec<Value> = set
                .fds()
                .map(|fd| {
                    let mut info = Map::from_iter([("fd".to_owned(), json!(fd.number()))]);
                    if let Some(opaque) = fd.opaque() {
                        info.insert("opaque".into(), json!(opaque));
                    }
                    if detailed {
                        info.insert("detail".into(), fdset_detail::detail(&set, fd));
                    }
                    Value::Object(info)
                })
                .collect();
            json!({ "fdset-id": set.id(), "fds": fds })
        })
        .collect())
}

#[derive(Deserialize)]
struct FdName {
    fdname: String,
}

fn getfd(daemon: &mut Daemon, mut call: Call<'_>) -> Result<Value, Error> {
    let FdName { fdname } = call.parse()?;
    let fd = call.claim_fd()?;
    daemon.named_fds().add(&fdname, fd)?;
    Ok(Value::Null)
}

fn closefd(daemon: &mut Daemon, mut call: Call<'_>) -> Result<Value, Error> {
    let FdName { fdname } = call.parse()?;
    daemon.named_fds().remove(&fdname)?;
    Ok(Value::Null)
}
