// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The table as a reference for people, in Markdown.

use std::fmt::Write;

use crate::Table;
use crate::schema::{Arguments, Definition, Kind, Member, Type};

/// Commands, events and types, each in the order of the alphabet.
pub(crate) fn markdown<S>(table: &Table<S>) -> String {
    let mut out = String::from("# Commands\n");
    let mut commands: Vec<_> = table.commands.iter().collect();
    commands.sort_by_key(|command| command.name);
    for command in commands {
        section(&mut out, command.name, command.summary, command.features);
        arguments(&mut out, "Arguments", &command.args);
        if let Some(ty) = command.returns {
            line(&mut out, &format!("\nReturns: {}", spelled(ty)));
        }
        if command.oob {
            line(&mut out, "\nMay run out of band.");
        }
    }
    out.push_str("\n# Events\n");
    let mut events: Vec<_> = table.events.iter().collect();
    events.sort_by_key(|event| event.name);
    for event in events {
        section(&mut out, event.name, event.doc, &[]);
        arguments(&mut out, "Data", &event.data);
    }
    out.push_str("\n# Types\n");
    for definition in table.types.values() {
        section(&mut out, definition.name, definition.doc, &definition.features);
        shape(&mut out, definition);
    }
    out
}

fn section(out: &mut String, name: &str, doc: &str, features: &[&str]) {
    line(out, &format!("\n## {name}\n\n{doc}"));
    if !features.is_empty() {
        line(out, &format!("\nFeatures: {}", words(features)));
    }
}

fn arguments(out: &mut String, what: &str, arguments: &Arguments) {
    match arguments {
        Arguments::Members(members) => table_of(out, what, members),
        Arguments::Of(name) => line(out, &format!("\n{what}: {}", spelled(Type::Named(name)))),
    }
}

fn shape(out: &mut String, definition: &Definition) {
    match &definition.kind {
        Kind::Enum(values) => line(out, &format!("\nOne of {}", words(values))),
        Kind::Struct(members) => table_of(out, "Members", members),
        Kind::Alternate(types) => {
            let types: Vec<_> = types.iter().map(|&ty| spelled(ty)).collect();
            line(out, &format!("\nOne of {}", types.join(", ")));
        }
        Kind::Union { base, tag, variants } => {
            table_of(out, "Members", base);
            line(out, &format!("\n| `{tag}` | further members |\n|---|---|"));
            for &(word, ty) in variants {
                line(out, &format!("| `{word}` | {} |", spelled(ty)));
            }
        }
    }
}

fn table_of(out: &mut String, what: &str, members: &[Member]) {
    if members.is_empty() {
        return;
    }
    line(out, &format!("\n| {what} | Type | |\n|---|---|---|"));
    for member in members {
        let optional = if member.optional { " (optional)" } else { "" };
        line(out, &format!("| `{}`{optional} | {} | {} |", member.name, spelled(member.ty), member.doc));
    }
}

fn spelled(ty: Type) -> String {
    match ty {
        Type::Int | Type::Int32 => "integer".to_owned(),
        Type::Uint8 | Type::Uint16 | Type::Uint32 | Type::Uint64 => "unsigned integer".to_owned(),
        Type::Size => "size in bytes".to_owned(),
        Type::Number => "number".to_owned(),
        Type::Bool => "boolean".to_owned(),
        Type::Str => "string".to_owned(),
        Type::Null => "null".to_owned(),
        Type::Any => "any value".to_owned(),
        Type::Array(element) => format!("list of {}", spelled(*element)),
        Type::Named(name) => format!("[{name}](#{})", name.to_ascii_lowercase()),
    }
}

fn words(words: &[&str]) -> String {
    words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ")
}

fn line(out: &mut String, text: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "{text}");
}
