// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `query-descriptors`: the books of every descriptor, to be compared with `/proc/PID/fd` from outside.

use qmp::{Arguments, Call, Command, Definition, Error, Member, Type};
use serde_json::{Value, json};

use super::words;
use crate::ledger::{self, Owner};
use crate::state::Daemon;

pub fn types() -> Vec<Definition> {
    vec![
        words("DescriptorOwner", &Owner::WORDS, "Whom a descriptor belongs to."),
        Definition::structure(
            "DescriptorInfo",
            [
                Member::required("fd", Type::Int, "Its number."),
                Member::required("owner", Type::Named("DescriptorOwner"), "Whom it belongs to."),
                Member::required("what", Type::Str, "Which of the owner's it is, for people."),
            ],
            "A descriptor in the books.",
        ),
        Definition::structure(
            "DescriptorLedger",
            [
                Member::required("pid", Type::Int, "The daemon's process id, as /proc shows it."),
                Member::required("descriptors", Type::Array(&Type::Named("DescriptorInfo")), "All of them, by number."),
            ],
            "The books.",
        ),
    ]
}

pub fn commands() -> Vec<Command<Daemon>> {
    vec![
        Command::new(
            "query-descriptors",
            "Lists every descriptor of the process and whom it belongs to. What is open beyond that is a leak.",
            Arguments::NONE,
            query,
        )
        .returning(Type::Named("DescriptorLedger")),
    ]
}

fn query(daemon: &mut Daemon, call: Call<'_>) -> Result<Value, Error> {
    let held = ledger::all(daemon, call.unclaimed());
    let descriptors: Vec<Value> =
        held.into_iter().map(|held| json!({ "fd": held.fd, "owner": held.owner.word(), "what": held.what })).collect();
    Ok(json!({ "pid": sys::process::id(), "descriptors": descriptors }))
}
