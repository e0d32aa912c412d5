// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `add-fd`, `remove-fd`, `query-fdsets`, `getfd`, `closefd`.

use qmp::{Call, Command, Definition, Error, Member, Type};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::state::Daemon;

pub fn types() -> Vec<Definition> {
    vec![
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
        Command::new("query-fdsets", "Lists sets and descriptors, the highest set first.", [], query_fdsets)
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
    Ok(Value::Null)
}

fn query_fdsets(daemon: &mut Daemon, _: Call<'_>) -> Result<Value, Error> {
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
