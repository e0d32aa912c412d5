// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Everything a server can do, in one value: types, commands and events, looked up by name.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::check::Checker;
use crate::schema::{Arguments, Command, Definition, Event, Kind, Member, Type};
use crate::{Call, Error, PendingFds, introspect, keyval, reference};

/// What the greeting and `query-version` tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// The version of QEMU's protocol that is spoken.
    pub qemu: (u32, u32, u32),
    /// Free text: the program and its own version.
    pub package: String,
}

impl Version {
    /// The object of `query-version`.
    pub fn to_value(&self) -> Value {
        let (major, minor, micro) = self.qemu;
        json!({ "qemu": { "major": major, "minor": minor, "micro": micro }, "package": self.package })
    }
}

/// A table that contradicts itself: found when it is built, never while serving.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TableError(String);

/// The commands over a state `S`, the types they speak in, and the events.
///
/// `qmp_capabilities`, `query-version`, `query-commands` and `query-qmp-schema` are in every table.
#[derive(Debug)]
pub struct Table<S> {
    pub(crate) version: Version,
    pub(crate) types: Types,
    pub(crate) commands: Vec<Command<S>>,
    pub(crate) events: Vec<Event>,
    by_name: BTreeMap<&'static str, usize>,
}

/// The definitions of a table by name.
pub(crate) type Types = BTreeMap<&'static str, Definition>;

impl<S> Table<S> {
    /// Builds the table.
    ///
    /// # Errors
    /// A name is defined twice or not at all, or a union's tag is no mandatory or optional enumeration of its base.
    pub fn new(
        version: Version,
        types: Vec<Definition>,
        commands: Vec<Command<S>>,
        events: Vec<Event>,
    ) -> Result<Table<S>, TableError> {
        let mut all = own_commands();
        all.extend(commands);
        let mut defined = Types::new();
        for definition in own_types().into_iter().chain(introspect::definitions()).chain(types) {
            let name = definition.name;
            if defined.insert(name, definition).is_some() {
                return Err(TableError(format!("type {name} is defined twice")));
            }
        }
        let mut by_name = BTreeMap::new();
        for (index, command) in all.iter().enumerate() {
            if by_name.insert(command.name, index).is_some() {
                return Err(TableError(format!("command {} is defined twice", command.name)));
            }
            well_formed_arguments(&defined, command.name, &command.args)?;
            if let Some(ty) = command.returns {
                well_formed(&defined, command.name, ty)?;
            }
        }
        for event in &events {
            well_formed_arguments(&defined, event.name, &event.data)?;
        }
        for definition in defined.values() {
            well_formed_definition(&defined, definition)?;
        }
        Ok(Table { version, types: defined, commands: all, events, by_name })
    }

    /// The command of that name.
    pub fn command(&self, name: &str) -> Option<&Command<S>> {
        self.by_name.get(name).map(|&index| &self.commands[index])
    }

    /// All commands: the table's own four, then those it was built from, in order.
    pub fn commands(&self) -> &[Command<S>] {
        &self.commands
    }

    /// All events, in order.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// Checks `arguments` for `command` and runs it: what a session does once it has read a command, and what a command
    /// line does for its options.
    ///
    /// # Errors
    /// The first wrong argument in QEMU's order and words, or what the command answers.
    pub fn run(
        &self,
        state: &mut S,
        fds: &mut PendingFds,
        command: &Command<S>,
        arguments: Map<String, Value>,
    ) -> Result<Value, Error> {
        let arguments = self.checked(command, arguments)?;
        match command.name {
            "query-version" => Ok(self.version.to_value()),
            "query-commands" => Ok(introspect::commands(self)),
            "query-qmp-schema" => Ok(introspect::schema(self)),
            _ => (command.run)(state, Call::new(arguments, fds)),
        }
    }

    /// Arguments of one of the table's commands, checked.
    pub(crate) fn checked(
        &self,
        command: &Command<S>,
        arguments: Map<String, Value>,
    ) -> Result<Map<String, Value>, Error> {
        let mut arguments = Value::Object(arguments);
        Checker::json(&self.types).arguments(&command.args, &mut arguments)?;
        match arguments {
            Value::Object(arguments) => Ok(arguments),
            _ => Err(Error::invalid_type("null", "object")),
        }
    }

    /// Reads a command line option as a value of type `ty`: JSON if it starts with a brace, else `key=value,…`, in
    /// which `on` is a bool and `64k` a size wherever the type says so. `implied` is the key of a first value that has none.
    ///
    /// # Errors
    /// QEMU's text for what is wrong.
    pub fn option(&self, ty: Type, text: &str, implied: Option<&str>) -> Result<Value, Error> {
        let mut value;
        let checker = if text.starts_with('{') {
            value = keyval::json(text)?;
            Checker::json(&self.types)
        } else {
            value = keyval::parse(text, implied)?;
            Checker::keyval(&self.types)
        };
        checker.root(ty, &mut value)?;
        Ok(value)
    }

    /// Checks a JSON value against a type of the table.
    ///
    /// # Errors
    /// QEMU's text for the first thing that is wrong.
    pub fn check(&self, ty: Type, value: &mut Value) -> Result<(), Error> {
        Checker::json(&self.types).root(ty, value)
    }

    /// The answer of `query-qmp-schema`.
    pub fn introspection(&self) -> Value {
        introspect::schema(self)
    }

    /// The reference of all commands, types and events in Markdown.
    pub fn reference(&self) -> String {
        reference::markdown(self)
    }
}

/// The words of `qmp_capabilities`.
fn own_types() -> Vec<Definition> {
    vec![
        Definition::enumeration("QMPCapability", ["oob"], "What a client can ask for when it negotiates."),
        Definition::structure(
            "VersionTriple",
            [
                Member::required("major", Type::Int, "The major number."),
                Member::required("minor", Type::Int, "The minor number."),
                Member::required("micro", Type::Int, "The micro number."),
            ],
            "A version number of three parts.",
        ),
        Definition::structure(
            "VersionInfo",
            [
                Member::required(
                    "qemu",
                    Type::Named("VersionTriple"),
                    "The version of QEMU's protocol that is spoken.",
                ),
                Member::required("package", Type::Str, "The program and its own version."),
            ],
            "What `query-version` tells.",
        ),
        Definition::structure(
            "CommandInfo",
            [Member::required("name", Type::Str, "The command's name.")],
            "A command of this server.",
        ),
    ]
}

fn own_commands<S>() -> Vec<Command<S>> {
    // The table or the session answers these itself.
    fn unreached<S>(_: &mut S, _: Call<'_>) -> Result<Value, Error> {
        Ok(Value::Null)
    }
    let enable = Member::optional("enable", Type::Array(&Type::Named("QMPCapability")), "Capabilities to switch on.");
    vec![
        Command::new("qmp_capabilities", "Ends the negotiation that every session starts with.", [enable], unreached),
        Command::new("query-version", "Tells the version.", Arguments::NONE, unreached)
            .returning(Type::Named("VersionInfo")),
        Command::new("query-commands", "Lists the commands.", Arguments::NONE, unreached)
            .returning(Type::Array(&Type::Named("CommandInfo"))),
        Command::new(
            "query-qmp-schema",
            "Describes commands, events and types to programs.",
            Arguments::NONE,
            unreached,
        )
        .returning(Type::Array(&Type::Named("SchemaInfo"))),
    ]
}

fn well_formed_arguments(types: &Types, of: &str, arguments: &Arguments) -> Result<(), TableError> {
    match arguments {
        Arguments::Members(members) => members.iter().try_for_each(|member| well_formed(types, of, member.ty)),
        Arguments::Of(name) => match types.get(name).map(|definition| &definition.kind) {
            Some(Kind::Struct(_) | Kind::Union { .. }) => Ok(()),
            Some(_) => Err(TableError(format!("the arguments of {of} must be a struct or union, {name} is neither"))),
            None => Err(TableError(format!("{of} refers to type {name}, which is not defined"))),
        },
    }
}

fn well_formed(types: &Types, of: &str, ty: Type) -> Result<(), TableError> {
    match ty {
        Type::Array(element) => well_formed(types, of, *element),
        Type::Named(name) if !types.contains_key(name) => {
            Err(TableError(format!("{of} refers to type {name}, which is not defined")))
        }
        _ => Ok(()),
    }
}

fn well_formed_definition(types: &Types, definition: &Definition) -> Result<(), TableError> {
    let of = definition.name;
    match &definition.kind {
        Kind::Enum(_) => Ok(()),
        Kind::Struct(members) => members.iter().try_for_each(|member| well_formed(types, of, member.ty)),
        Kind::Alternate(alternatives) => alternatives.iter().try_for_each(|&ty| well_formed(types, of, ty)),
        Kind::Union { base, tag, variants } => {
            base.iter().try_for_each(|member| well_formed(types, of, member.ty))?;
            let tag = base.iter().find(|member| member.name == *tag).map(|member| member.ty);
            let Some(Type::Named(words)) = tag else {
                return Err(TableError(format!("the tag of union {of} must be an enumeration among its members")));
            };
            let Some(Kind::Enum(words)) = types.get(words).map(|definition| &definition.kind) else {
                return Err(TableError(format!("the tag of union {of} must be an enumeration")));
            };
            for (word, ty) in variants {
                if !words.contains(word) {
                    return Err(TableError(format!("variant {word} of union {of} is no word of its tag")));
                }
                let Type::Named(name) = ty else {
                    return Err(TableError(format!("variant {word} of union {of} must be a struct or union")));
                };
                well_formed_arguments(types, of, &Arguments::Of(name))?;
            }
            Ok(())
        }
    }
}
