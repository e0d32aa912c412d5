// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The words of the protocol: types, commands and events, in the shape of QEMU's QAPI.
//!
//! A [`Table`](crate::Table) of these is the only place where a command is described. Dispatch checks arguments by it,
//! `query-commands` and `query-qmp-schema` tell it, the reference is printed from it. Types that have members are
//! defined once under their QAPI name and referred to by [`Type::Named`], so that they may refer to themselves and may
//! be built at run time (the options of `blockdev-add` come from a table of drivers).

use std::fmt;

use serde_json::Value;

use crate::{Call, Error};

/// What a value may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// A signed number of 64 bits.
    Int,
    /// A signed number of 32 bits.
    Int32,
    /// An unsigned number of 8 bits.
    Uint8,
    /// An unsigned number of 16 bits.
    Uint16,
    /// An unsigned number of 32 bits.
    Uint32,
    /// An unsigned number of 64 bits. As in QEMU a negative number is taken too and stands for its two's complement.
    Uint64,
    /// Bytes: as [`Type::Uint64`], and on a command line also with a suffix (`64k`, `1.5G`).
    Size,
    /// A number with a fraction.
    Number,
    /// `true` or `false`; on a command line `on` or `off`.
    Bool,
    /// A text.
    Str,
    /// Nothing but `null`.
    Null,
    /// Any JSON value.
    Any,
    /// A list of values of one type.
    Array(&'static Type),
    /// A [`Definition`] of the table, by its name.
    Named(&'static str),
}

/// A member of a struct or an argument of a command.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// The key.
    pub name: &'static str,
    /// What may stand there.
    pub ty: Type,
    /// Whether it may be absent.
    pub optional: bool,
    /// One sentence for the reference.
    pub doc: &'static str,
}

impl Member {
    /// A member that must be there.
    pub const fn required(name: &'static str, ty: Type, doc: &'static str) -> Member {
        Member { name, ty, optional: false, doc }
    }

    /// A member that may be absent.
    pub const fn optional(name: &'static str, ty: Type, doc: &'static str) -> Member {
        Member { name, ty, optional: true, doc }
    }
}

/// A type with a name.
#[derive(Clone, Debug)]
pub struct Definition {
    /// The QAPI name, unique in the table.
    pub name: &'static str,
    /// One sentence for the reference.
    pub doc: &'static str,
    /// Its shape.
    pub kind: Kind,
    /// What clients look for in introspection (`dynamic-auto-read-only`).
    pub features: Vec<&'static str>,
    /// The same of its members: a name and a feature (`deprecated`).
    pub member_features: Vec<(&'static str, &'static str)>,
}

/// The shapes of a [`Definition`].
#[derive(Clone, Debug)]
pub enum Kind {
    /// One word of a list.
    Enum(Vec<&'static str>),
    /// An object with these members.
    Struct(Vec<Member>),
    /// An object whose further members depend on the word that stands in member `tag`.
    Union {
        /// Members of every variant. The tag is one of them, and its type is an enumeration.
        base: Vec<Member>,
        /// The member that chooses.
        tag: &'static str,
        /// The word and the members it brings: a struct or a union. A word without a variant brings none.
        variants: Vec<(&'static str, Type)>,
    },
    /// One of several types that differ in how they look in JSON.
    Alternate(Vec<Type>),
}

impl Definition {
    /// One word of `words`.
    pub fn enumeration(name: &'static str, words: impl Into<Vec<&'static str>>, doc: &'static str) -> Definition {
        Definition { name, doc, kind: Kind::Enum(words.into()), features: Vec::new(), member_features: Vec::new() }
    }

    /// An object.
    pub fn structure(name: &'static str, members: impl Into<Vec<Member>>, doc: &'static str) -> Definition {
        Definition { name, doc, kind: Kind::Struct(members.into()), features: Vec::new(), member_features: Vec::new() }
    }

    /// An object with variants, chosen by `tag`.
    pub fn union(
        name: &'static str,
        base: impl Into<Vec<Member>>,
        tag: &'static str,
        variants: impl Into<Vec<(&'static str, Type)>>,
        doc: &'static str,
    ) -> Definition {
        let kind = Kind::Union { base: base.into(), tag, variants: variants.into() };
        Definition { name, doc, kind, features: Vec::new(), member_features: Vec::new() }
    }

    /// One of several types.
    pub fn alternate(name: &'static str, types: impl Into<Vec<Type>>, doc: &'static str) -> Definition {
        Definition { name, doc, kind: Kind::Alternate(types.into()), features: Vec::new(), member_features: Vec::new() }
    }

    /// Adds a feature that introspection shows.
    #[must_use]
    pub fn feature(mut self, name: &'static str) -> Definition {
        self.features.push(name);
        self
    }

    /// Adds a feature to a member of a struct or union.
    #[must_use]
    pub fn member_feature(mut self, member: &'static str, name: &'static str) -> Definition {
        self.member_features.push((member, name));
        self
    }
}

/// What a command takes.
#[derive(Clone, Debug)]
pub enum Arguments {
    /// These, in the order in which they are checked.
    Members(Vec<Member>),
    /// The members of a struct or union of the table.
    Of(&'static str),
}

impl Arguments {
    /// No arguments.
    pub const NONE: Arguments = Arguments::Members(Vec::new());
}

impl<const N: usize> From<[Member; N]> for Arguments {
    fn from(members: [Member; N]) -> Arguments {
        Arguments::Members(members.into())
    }
}

/// What a command does, over the state `S`. An answer of `Value::Null` from a command that [returns](Command::returns)
/// nothing goes out as `{}`.
pub type Run<S> = fn(&mut S, Call<'_>) -> Result<Value, Error>;

/// A command: everything about it in one value.
pub struct Command<S> {
    /// Its name on the wire.
    pub name: &'static str,
    /// One sentence for the reference.
    pub summary: &'static str,
    /// What it takes.
    pub args: Arguments,
    /// What it answers; `None` is the empty object.
    pub returns: Option<Type>,
    /// Whether it may run out of band, ahead of queued commands.
    pub oob: bool,
    /// What clients look for in introspection (`deprecated`, `unstable`).
    pub features: &'static [&'static str],
    /// What it does.
    pub run: Run<S>,
}

impl<S> Command<S> {
    /// A command that is run in order and answers `{}`; set the other fields with struct update syntax or afterwards.
    pub fn new(name: &'static str, summary: &'static str, args: impl Into<Arguments>, run: Run<S>) -> Command<S> {
        Command { name, summary, args: args.into(), returns: None, oob: false, features: &[], run }
    }

    /// The same command, answering `ty`.
    #[must_use]
    pub fn returning(mut self, ty: Type) -> Command<S> {
        self.returns = Some(ty);
        self
    }
}

impl<S> fmt::Debug for Command<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Command").field("name", &self.name).field("args", &self.args).finish_non_exhaustive()
    }
}

/// An event: a message that answers nothing.
#[derive(Clone, Debug)]
pub struct Event {
    /// Its name on the wire, in capitals.
    pub name: &'static str,
    /// What stands under `data`.
    pub data: Arguments,
    /// One sentence for the reference.
    pub doc: &'static str,
}

impl Event {
    /// An event with `data`.
    pub fn new(name: &'static str, data: impl Into<Arguments>, doc: &'static str) -> Event {
        Event { name, data: data.into(), doc }
    }
}
