// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a command answers when it fails: one of QEMU's five classes and a sentence.
//!
//! Clients key on the class (libvirt on `CommandNotFound`); the sentence is for people, but tests compare it, so the
//! constructors here keep QEMU's wording.

use serde_json::{Value, json};

/// The classes of QMP errors (`qapi/error.json`, `QapiErrorClass`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// Everything that has no class of its own.
    GenericError,
    /// The command does not exist, or not in this state of the session.
    CommandNotFound,
    /// A device failed to become active.
    DeviceNotActive,
    /// No device (node, job, bitmap) of that name.
    DeviceNotFound,
    /// The host lacks a capability.
    KVMMissingCap,
}

impl ErrorClass {
    /// The name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            ErrorClass::GenericError => "GenericError",
            ErrorClass::CommandNotFound => "CommandNotFound",
            ErrorClass::DeviceNotActive => "DeviceNotActive",
            ErrorClass::DeviceNotFound => "DeviceNotFound",
            ErrorClass::KVMMissingCap => "KVMMissingCap",
        }
    }
}

/// A command's failure as the client sees it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{desc}")]
pub struct Error {
    /// What programs look at.
    pub class: ErrorClass,
    /// What people read.
    pub desc: String,
}

impl Error {
    /// An error of `class` that says `desc`.
    pub fn new(class: ErrorClass, desc: impl Into<String>) -> Error {
        Error { class, desc: desc.into() }
    }

    /// The common kind.
    pub fn generic(desc: impl Into<String>) -> Error {
        Error::new(ErrorClass::GenericError, desc)
    }

    /// Class `CommandNotFound` with a text of the caller's.
    pub fn command_not_found(desc: impl Into<String>) -> Error {
        Error::new(ErrorClass::CommandNotFound, desc)
    }

    /// Class `DeviceNotFound` with a text of the caller's.
    pub fn device_not_found(desc: impl Into<String>) -> Error {
        Error::new(ErrorClass::DeviceNotFound, desc)
    }

    /// Class `DeviceNotActive` with a text of the caller's.
    pub fn device_not_active(desc: impl Into<String>) -> Error {
        Error::new(ErrorClass::DeviceNotActive, desc)
    }

    /// No descriptor, or set of them, goes by `name` (`closefd`, `remove-fd`).
    pub fn fd_not_found(name: &str) -> Error {
        Error::generic(format!("File descriptor named '{name}' not found"))
    }

    /// A mandatory argument is absent.
    pub fn missing_parameter(name: &str) -> Error {
        Error::generic(format!("Parameter '{name}' is missing"))
    }

    /// An argument that the command does not have.
    pub fn unexpected_parameter(name: &str) -> Error {
        Error::generic(format!("Parameter '{name}' is unexpected"))
    }

    /// A parameter that no option of the command line has.
    pub fn invalid_parameter(name: &str) -> Error {
        Error::generic(format!("Invalid parameter '{name}'"))
    }

    /// An argument of the wrong JSON type.
    pub fn invalid_type(name: &str, expected: &str) -> Error {
        Error::generic(format!("Invalid parameter type for '{name}', expected: {expected}"))
    }

    /// An argument of the right type with a wrong value: "Parameter 'fdset-id' expects a non-negative value".
    pub fn invalid_value(name: &str, expects: &str) -> Error {
        Error::generic(format!("Parameter '{name}' expects {expects}"))
    }

    /// A word that is not in an enumeration.
    pub fn not_accepted(name: &str, value: &str) -> Error {
        Error::generic(format!("Parameter '{name}' does not accept value '{value}'"))
    }

    /// The object that stands under `error` in an answer.
    pub fn to_value(&self) -> Value {
        json!({ "class": self.class.name(), "desc": self.desc })
    }
}
