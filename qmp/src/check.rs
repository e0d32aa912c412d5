// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Checks a value against its type, in the order and with the words of QEMU's visitors.
//!
//! Members are visited in the order of the schema, a struct's unknown members are told after its known ones, and the
//! first mistake ends the visit. Messages about the shape give the whole path (`file.driver`, `enable[0]`, on a command
//! line `addr.0`); messages about a value give the last key only, and elements of lists, which have none, are `null`.
//!
//! On a command line everything is text: there the checker also turns `on`, `0x10` and `64k` into what the type wants.

use serde_json::Value;

use crate::Error;
use crate::keyval;
use crate::schema::{Arguments, Kind, Member, Type};
use crate::table::Types;

/// A visit of one value.
pub(crate) struct Checker<'a> {
    types: &'a Types,
    /// Scalars are text to be converted.
    keyval: bool,
}

/// Where the visit is: the enclosing steps and the last one.
#[derive(Clone, Copy)]
enum Path<'a> {
    Root,
    Key(&'a Path<'a>, &'a str),
    Index(&'a Path<'a>, usize),
}

impl Path<'_> {
    fn full(self, keyval: bool) -> String {
        match self {
            Path::Root => "null".to_owned(),
            Path::Key(Path::Root, key) => key.to_owned(),
            Path::Key(outer, key) => format!("{}.{key}", outer.full(keyval)),
            Path::Index(outer, index) if keyval => format!("{}.{index}", outer.full(keyval)),
            Path::Index(outer, index) => format!("{}[{index}]", outer.full(keyval)),
        }
    }

    fn last(self) -> String {
        match self {
            Path::Key(_, key) => key.to_owned(),
            Path::Root | Path::Index(..) => "null".to_owned(),
        }
    }
}

impl<'a> Checker<'a> {
    /// A checker of JSON.
    pub(crate) fn json(types: &'a Types) -> Checker<'a> {
        Checker { types, keyval: false }
    }

    /// A checker of what [`keyval::parse`] made.
    pub(crate) fn keyval(types: &'a Types) -> Checker<'a> {
        Checker { types, keyval: true }
    }

    /// Checks the arguments of a command.
    pub(crate) fn arguments(&self, arguments: &Arguments, value: &mut Value) -> Result<(), Error> {
        match arguments {
            Arguments::Members(members) => self
                .object(Path::Root, value, |known, checker, value| checker.members(Path::Root, members, value, known)),
            Arguments::Of(name) => self.visit(Path::Root, Type::Named(name), value),
        }
    }

    /// Checks a value that stands for itself.
    pub(crate) fn root(&self, ty: Type, value: &mut Value) -> Result<(), Error> {
        self.visit(Path::Root, ty, value)
    }

    fn visit(&self, at: Path<'_>, ty: Type, value: &mut Value) -> Result<(), Error> {
        match ty {
            Type::Any => Ok(()),
            Type::Array(element) => self.list(at, *element, value),
            Type::Named(name) => self.named(at, name, value),
            scalar if self.keyval => self.text(at, scalar, value),
            scalar => self.scalar(at, scalar, value),
        }
    }

    fn scalar(&self, at: Path<'_>, ty: Type, value: &Value) -> Result<(), Error> {
        let right = |is: bool, expected: &str| if is { Ok(()) } else { Err(self.wrong(at, expected)) };
        match ty {
            Type::Int => right(value.is_i64(), "integer"),
            Type::Int32 => {
                right(value.is_i64(), "integer")?;
                within(at, value.as_i64().and_then(|n| i32::try_from(n).ok()), "int32_t")
            }
            Type::Uint8 => within(at, u8::try_from(self.unsigned(at, value)?).ok(), "uint8_t"),
            Type::Uint16 => within(at, u16::try_from(self.unsigned(at, value)?).ok(), "uint16_t"),
            Type::Uint32 => within(at, u32::try_from(self.unsigned(at, value)?).ok(), "uint32_t"),
            Type::Uint64 | Type::Size => self.unsigned(at, value).map(drop),
            Type::Number => right(value.is_number(), "number"),
            Type::Bool => right(value.is_boolean(), "boolean"),
            Type::Str => right(value.is_string(), "string"),
            Type::Null => right(value.is_null(), "null"),
            Type::Any | Type::Array(_) | Type::Named(_) => Ok(()),
        }
    }

    fn unsigned(&self, at: Path<'_>, value: &Value) -> Result<u64, Error> {
        let number = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
        number.ok_or_else(|| Error::invalid_value(&at.full(self.keyval), "uint64"))
    }

    /// A scalar of a command line: converts the text in place.
    fn text(&self, at: Path<'_>, ty: Type, value: &mut Value) -> Result<(), Error> {
        let text = self.written(at, value)?;
        let converted = match ty {
            Type::Str => return Ok(()),
            Type::Bool => keyval::boolean(text).map(Value::Bool),
            Type::Size => keyval::size(text).map(Value::from),
            Type::Uint8 | Type::Uint16 | Type::Uint32 | Type::Uint64 => keyval::unsigned(text).map(Value::from),
            Type::Number => keyval::number(text).map(Value::from),
            Type::Null => text.is_empty().then_some(Value::Null),
            _ => keyval::signed(text).map(Value::from),
        };
        *value = converted.ok_or_else(|| Error::invalid_value(&at.full(true), expectation(ty)))?;
        self.scalar(at, ty, value)
    }

    /// The text of a string, or of any scalar of a command line.
    fn written<'v>(&self, at: Path<'_>, value: &'v Value) -> Result<&'v str, Error> {
        match value {
            Value::String(text) => Ok(text),
            Value::Array(_) | Value::Object(_) if self.keyval => {
                Err(Error::generic(format!("Parameters '{}.*' are unexpected", at.full(true))))
            }
            _ => Err(self.wrong(at, "string")),
        }
    }

    fn list(&self, at: Path<'_>, element: Type, value: &mut Value) -> Result<(), Error> {
        let Value::Array(list) = value else { return Err(self.wrong(at, "array")) };
        for (index, value) in list.iter_mut().enumerate() {
            self.visit(Path::Index(&at, index), element, value)?;
        }
        Ok(())
    }

    fn named(&self, at: Path<'_>, name: &'static str, value: &mut Value) -> Result<(), Error> {
        // Every name was looked up when the table was built.
        let Some(definition) = self.types.get(name) else { return Ok(()) };
        match &definition.kind {
            Kind::Enum(words) => self.word(at, words, value),
            Kind::Alternate(types) => self.alternate(at, name, types, value),
            Kind::Struct(_) | Kind::Union { .. } => {
                self.object(at, value, |known, checker, value| checker.shape(at, name, value, known))
            }
        }
    }

    fn word(&self, at: Path<'_>, words: &[&'static str], value: &Value) -> Result<(), Error> {
        let word = self.written(at, value)?;
        if words.contains(&word) { Ok(()) } else { Err(Error::not_accepted(&at.last(), word)) }
    }

    fn alternate(&self, at: Path<'_>, name: &str, types: &[Type], value: &mut Value) -> Result<(), Error> {
        match types.iter().find(|&&ty| self.looks_like(ty, value)) {
            Some(&ty) => self.visit(at, ty, value),
            None => Err(Error::invalid_type(&at.last(), name)),
        }
    }

    /// Whether an alternate takes `value` for a `ty`, judged by its JSON type alone.
    fn looks_like(&self, ty: Type, value: &Value) -> bool {
        match ty {
            Type::Named(name) => match self.types.get(name).map(|definition| &definition.kind) {
                Some(Kind::Enum(_)) => value.is_string(),
                Some(Kind::Struct(_) | Kind::Union { .. }) => value.is_object(),
                Some(Kind::Alternate(_)) | None => false,
            },
            Type::Array(_) => value.is_array(),
            Type::Str => value.is_string(),
            Type::Null => value.is_null(),
            Type::Bool => value.is_boolean(),
            Type::Any => true,
            _ => value.is_number(),
        }
    }

    /// Visits an object's members by `visit`, which notes the keys it knows, and then tells an unknown one.
    fn object(
        &self,
        at: Path<'_>,
        value: &mut Value,
        visit: impl FnOnce(&mut Vec<&'static str>, &Self, &mut Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if !value.is_object() {
            return Err(self.wrong(at, "object"));
        }
        let mut known = Vec::new();
        visit(&mut known, self, value)?;
        match value.as_object().and_then(|map| map.keys().find(|key| !known.contains(&key.as_str()))) {
            Some(key) => Err(Error::unexpected_parameter(&Path::Key(&at, key).full(self.keyval))),
            None => Ok(()),
        }
    }

    /// The members of a struct, or of a union with its variant.
    fn shape(&self, at: Path<'_>, name: &str, value: &mut Value, known: &mut Vec<&'static str>) -> Result<(), Error> {
        match self.types.get(name).map(|definition| &definition.kind) {
            Some(Kind::Struct(members)) => self.members(at, members, value, known),
            Some(Kind::Union { base, tag, variants }) => {
                self.members(at, base, value, known)?;
                let chosen = value.get(tag).and_then(Value::as_str);
                match variants.iter().find(|(word, _)| Some(*word) == chosen) {
                    Some((_, Type::Named(variant))) => self.shape(at, variant, value, known),
                    _ => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    fn members(
        &self,
        at: Path<'_>,
        members: &[Member],
        value: &mut Value,
        known: &mut Vec<&'static str>,
    ) -> Result<(), Error> {
        for member in members {
            known.push(member.name);
            let path = Path::Key(&at, member.name);
            match value.get_mut(member.name) {
                Some(value) => self.visit(path, member.ty, value)?,
                None if member.optional => {}
                None => return Err(Error::missing_parameter(&path.full(self.keyval))),
            }
        }
        Ok(())
    }

    fn wrong(&self, at: Path<'_>, expected: &str) -> Error {
        Error::invalid_type(&at.full(self.keyval), expected)
    }
}

/// Whether a number was small enough for a type that C calls `name`.
fn within<T>(at: Path<'_>, number: Option<T>, name: &str) -> Result<(), Error> {
    number.map(drop).ok_or_else(|| Error::invalid_value(&at.last(), name))
}

/// What the text of an option should have been.
fn expectation(ty: Type) -> &'static str {
    match ty {
        Type::Bool => "'on' or 'off'",
        Type::Size => "size",
        Type::Number => "number",
        Type::Null => "null",
        _ => "integer",
    }
}
