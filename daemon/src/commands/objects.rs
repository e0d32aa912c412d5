// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `object-add`, `object-del`.

use qmp::{Arguments, Call, Command, Definition, Error, Member, Type};
use serde_json::Value;

use super::words;
use crate::objects::Object;
use crate::state::Daemon;

pub fn types() -> Vec<Definition> {
    vec![
        words("ObjectType", &["iothread"], "The kinds of objects."),
        Definition::structure(
            "ObjectOptions",
            [
                Member::required("qom-type", Type::Named("ObjectType"), "The kind."),
                Member::required("id", Type::Str, "The object's name."),
                Member::optional("poll-max-ns", Type::Int, "Accepted for an iothread, and of no use here."),
                Member::optional("poll-grow", Type::Int, "Accepted for an iothread, and of no use here."),
                Member::optional("poll-shrink", Type::Int, "Accepted for an iothread, and of no use here."),
                Member::optional("aio-max-batch", Type::Int, "Accepted for an iothread, and of no use here."),
                Member::optional("thread-pool-min", Type::Int, "Accepted for an iothread, and of no use here."),
                Member::optional("thread-pool-max", Type::Int, "Accepted for an iothread, and of no use here."),
            ],
            "An object to be made. An iothread changes nothing: every client has a thread of its own.",
        ),
    ]
}

pub fn commands() -> Vec<Command<Daemon>> {
    vec![
        Command::new("object-add", "Makes an object that exports refer to.", Arguments::Of("ObjectOptions"), add),
        Command::new("object-del", "Removes an object.", [Member::required("id", Type::Str, "The object.")], delete),
    ]
}

fn add(daemon: &mut Daemon, call: Call<'_>) -> Result<Value, Error> {
    let id = call.arguments()["id"].as_str().unwrap_or_default();
    daemon.objects.add(id, Object::IoThread)?;
    Ok(Value::Null)
}

fn delete(daemon: &mut Daemon, call: Call<'_>) -> Result<Value, Error> {
    daemon.objects.remove(call.arguments()["id"].as_str().unwrap_or_default())?;
    Ok(Value::Null)
}
