// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The table as `query-commands` and `query-qmp-schema` tell it.
//!
//! As in QEMU types are known by numbers, so that clients do not come to depend on names; words, members and commands
//! keep theirs. Commands and events stand first, then each type after its first use.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::Table;
use crate::schema::{Arguments, Definition, Kind, Member, Type};
use crate::table::Types;

/// The answer of `query-commands`.
pub(crate) fn commands<S>(table: &Table<S>) -> Value {
    // QEMU lists the command that was defined last first.
    table.commands.iter().rev().map(|command| json!({ "name": command.name })).collect()
}

/// The answer of `query-qmp-schema`.
pub(crate) fn schema<S>(table: &Table<S>) -> Value {
    let mut schema =
        Schema { types: &table.types, names: BTreeMap::new(), numbers: 0, used: Vec::new(), infos: Vec::new() };
    for command in &table.commands {
        let returns = command.returns.map_or(Used::Members(&[]), used);
        let mut info = json!({
            "name": command.name,
            "meta-type": "command",
            "arg-type": schema.arguments(&command.args),
            "ret-type": schema.name(returns),
        });
        if command.oob {
            info["allow-oob"] = json!(true);
        }
        schema.push(info, command.features);
    }
    for event in &table.events {
        let arg_type = schema.arguments(&event.data);
        schema.push(json!({ "name": event.name, "meta-type": "event", "arg-type": arg_type }), &[]);
    }
    // Describing a type may bring up others, which stand behind it.
    let mut next = 0;
    while let Some(&used) = schema.used.get(next) {
        schema.describe(used);
        next += 1;
    }
    Value::Array(schema.infos)
}

/// A type of the list.
#[derive(Clone, Copy)]
enum Used<'a> {
    Scalar(&'static str),
    Array(Type),
    Definition(&'static str),
    /// What a command or event takes that has no type of its own.
    Members(&'a [Member]),
}

/// How a type stands in the list: all integers are one.
fn used<'a>(ty: Type) -> Used<'a> {
    match ty {
        Type::Int | Type::Int32 | Type::Uint8 | Type::Uint16 | Type::Uint32 | Type::Uint64 | Type::Size => {
            Used::Scalar("int")
        }
        Type::Number => Used::Scalar("number"),
        Type::Bool => Used::Scalar("bool"),
        Type::Str => Used::Scalar("str"),
        Type::Null => Used::Scalar("null"),
        Type::Any => Used::Scalar("any"),
        Type::Array(element) => Used::Array(*element),
        Type::Named(name) => Used::Definition(name),
    }
}

struct Schema<'a> {
    types: &'a Types,
    /// What a type is called, by what it is: `int`, `[7]`, `7`.
    names: BTreeMap<String, String>,
    numbers: u32,
    /// In the order of first use.
    used: Vec<Used<'a>>,
    infos: Vec<Value>,
}

impl<'a> Schema<'a> {
    fn push(&mut self, mut info: Value, features: &[&str]) {
        if !features.is_empty() {
            info["features"] = json!(features);
        }
        self.infos.push(info);
    }

    fn arguments(&mut self, arguments: &'a Arguments) -> String {
        match arguments {
            Arguments::Members(members) => self.name(Used::Members(members)),
            Arguments::Of(name) => self.name(Used::Definition(name)),
        }
    }

    fn type_name(&mut self, ty: Type) -> String {
        self.name(used(ty))
    }

    /// The name of a type, given at its first use.
    fn name(&mut self, used: Used<'a>) -> String {
        let key = match used {
            Used::Scalar(name) => return self.enter(name.to_owned(), name.to_owned(), used),
            Used::Array(element) => {
                // The list stands before what it is a list of, but cannot be named before that is.
                let at = self.used.len();
                let name = format!("[{}]", self.type_name(element));
                if !self.names.contains_key(&name) {
                    self.names.insert(name.clone(), name.clone());
                    self.used.insert(at, used);
                }
                return name;
            }
            Used::Definition(name) => format!("type {name}"),
            // Two commands with no arguments share the empty object; other members belong to one command.
            Used::Members([]) => "nothing".to_owned(),
            Used::Members(members) => format!("members {:p}", members.as_ptr()),
        };
        let number = self.numbers.to_string();
        self.enter(key, number, used)
    }

    fn enter(&mut self, key: String, name: String, used: Used<'a>) -> String {
        if let Some(name) = self.names.get(&key) {
            return name.clone();
        }
        if !matches!(used, Used::Scalar(_)) {
            self.numbers += 1;
        }
        self.names.insert(key, name.clone());
        self.used.push(used);
        name
    }

    fn describe(&mut self, used: Used<'a>) {
        let name = self.name(used);
        match used {
            Used::Scalar(scalar) => {
                let json_type = match scalar {
                    "str" => "string",
                    "bool" => "boolean",
                    "any" => "value",
                    same => same,
                };
                self.push(json!({ "name": name, "meta-type": "builtin", "json-type": json_type }), &[]);
            }
            Used::Array(element) => {
                let element = self.type_name(element);
                self.push(json!({ "name": name, "meta-type": "array", "element-type": element }), &[]);
            }
            Used::Members(members) => {
                let members = self.members(members, &[]);
                self.push(json!({ "name": name, "meta-type": "object", "members": members }), &[]);
            }
            Used::Definition(definition) => {
                if let Some(definition) = self.types.get(definition) {
                    self.definition(&name, definition);
                }
            }
        }
    }

    fn definition(&mut self, name: &str, definition: &'a Definition) {
        let features = &definition.member_features;
        let info = match &definition.kind {
            Kind::Enum(words) => {
                let members: Vec<_> = words.iter().map(|word| json!({ "name": word })).collect();
                json!({ "name": name, "meta-type": "enum", "members": members, "values": words })
            }
            Kind::Struct(members) => {
                json!({ "name": name, "meta-type": "object", "members": self.members(members, features) })
            }
            Kind::Alternate(types) => {
                let members: Vec<_> = types.iter().map(|&ty| json!({ "type": self.type_name(ty) })).collect();
                json!({ "name": name, "meta-type": "alternate", "members": members })
            }
            Kind::Union { base, tag, variants } => {
                let members = self.members(base, features);
                let cases: Vec<_> = self
                    .words(base, tag)
                    .iter()
                    .map(|word| {
                        let variant = variants.iter().find(|(case, _)| case == word);
                        let ty = variant.map_or(Used::Members(&[]), |&(_, ty)| used(ty));
                        json!({ "case": word, "type": self.name(ty) })
                    })
                    .collect();
                json!({ "name": name, "meta-type": "object", "members": members, "tag": tag, "variants": cases })
            }
        };
        self.push(info, &definition.features);
    }

    fn members(&mut self, members: &[Member], features: &[(&str, &str)]) -> Value {
        let described = members.iter().map(|member| {
            let mut info = Map::new();
            info.insert("name".to_owned(), json!(member.name));
            info.insert("type".to_owned(), json!(self.type_name(member.ty)));
            if member.optional {
                info.insert("default".to_owned(), Value::Null);
            }
            let of_member = features.iter().filter(|(name, _)| *name == member.name);
            let of_member: Vec<_> = of_member.map(|(_, feature)| *feature).collect();
            if !of_member.is_empty() {
                info.insert("features".to_owned(), json!(of_member));
            }
            Value::Object(info)
        });
        described.collect()
    }

    /// The words of a union's tag: every one is a case, also without members.
    fn words(&self, base: &[Member], tag: &str) -> &'a [&'static str] {
        let ty = base.iter().find(|member| member.name == tag).map(|member| member.ty);
        let Some(Type::Named(name)) = ty else { return &[] };
        match self.types.get(name).map(|definition| &definition.kind) {
            Some(Kind::Enum(words)) => words,
            _ => &[],
        }
    }
}

/// The types in which `query-qmp-schema` itself answers (`qapi/introspect.json`).
pub(crate) fn definitions() -> Vec<Definition> {
    const STRINGS: Type = Type::Array(&Type::Str);
    const MEMBERS: Type = Type::Array(&Type::Named("SchemaInfoObjectMember"));
    let name = |doc| Member::required("name", Type::Str, doc);
    let info = |kind: &'static str, members: Vec<Member>, doc| Definition::structure(kind, members, doc);
    vec![
        Definition::enumeration(
            "SchemaMetaType",
            ["builtin", "enum", "array", "object", "alternate", "command", "event"],
            "What a part of the schema describes.",
        ),
        Definition::enumeration(
            "JSONType",
            ["string", "number", "int", "boolean", "null", "object", "array", "value"],
            "How a value looks in JSON.",
        ),
        Definition::union(
            "SchemaInfo",
            [
                name("Its name; numbers for all types but the built-in ones."),
                Member::required("meta-type", Type::Named("SchemaMetaType"), "What it describes."),
                Member::optional("features", STRINGS, "What was added to it."),
            ],
            "meta-type",
            [
                ("builtin", Type::Named("SchemaInfoBuiltin")),
                ("enum", Type::Named("SchemaInfoEnum")),
                ("array", Type::Named("SchemaInfoArray")),
                ("object", Type::Named("SchemaInfoObject")),
                ("alternate", Type::Named("SchemaInfoAlternate")),
                ("command", Type::Named("SchemaInfoCommand")),
                ("event", Type::Named("SchemaInfoEvent")),
            ],
            "A command, an event or a type.",
        ),
        info(
            "SchemaInfoBuiltin",
            vec![Member::required("json-type", Type::Named("JSONType"), "How it looks.")],
            "A type without parts.",
        ),
        info(
            "SchemaInfoEnum",
            vec![
                Member::required("members", Type::Array(&Type::Named("SchemaInfoEnumMember")), "Its words."),
                Member::required("values", STRINGS, "Its words, in the old form."),
            ],
            "One word of several.",
        )
        .member_feature("values", "deprecated"),
        info(
            "SchemaInfoEnumMember",
            vec![name("The word."), Member::optional("features", STRINGS, "What was added to it.")],
            "A word.",
        ),
        info(
            "SchemaInfoArray",
            vec![Member::required("element-type", Type::Str, "The type of its elements.")],
            "A list.",
        ),
        info(
            "SchemaInfoObject",
            vec![
                Member::required("members", MEMBERS, "The members of every variant."),
                Member::optional("tag", Type::Str, "The member that chooses the variant."),
                Member::optional("variants", Type::Array(&Type::Named("SchemaInfoObjectVariant")), "The variants."),
            ],
            "An object.",
        ),
        info(
            "SchemaInfoObjectMember",
            vec![
                name("Its key."),
                Member::required("type", Type::Str, "Its type."),
                Member::optional("default", Type::Any, "There if the member may be absent, and null."),
                Member::optional("features", STRINGS, "What was added to it."),
            ],
            "A member of an object.",
        ),
        info(
            "SchemaInfoObjectVariant",
            vec![
                Member::required("case", Type::Str, "The word that chooses it."),
                Member::required("type", Type::Str, "The object whose members it brings."),
            ],
            "A variant of an object.",
        ),
        info(
            "SchemaInfoAlternate",
            vec![Member::required(
                "members",
                Type::Array(&Type::Named("SchemaInfoAlternateMember")),
                "The types it may have.",
            )],
            "One of several types.",
        ),
        info(
            "SchemaInfoAlternateMember",
            vec![Member::required("type", Type::Str, "The type.")],
            "A type of an alternate.",
        ),
        info(
            "SchemaInfoCommand",
            vec![
                Member::required("arg-type", Type::Str, "What it takes."),
                Member::required("ret-type", Type::Str, "What it answers."),
                Member::optional("allow-oob", Type::Bool, "Whether it may run out of band; absent means no."),
            ],
            "A command.",
        ),
        info("SchemaInfoEvent", vec![Member::required("arg-type", Type::Str, "Its data.")], "An event."),
    ]
}
