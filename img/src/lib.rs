// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Image verbs. Every parse of an image happens in a process that has confined itself first: a verb takes files that were opened
//! before, gives up every way to open more, and only then looks into them.

pub mod amend;
pub mod bench;
pub mod bitmap;
pub mod check;
pub mod commit;
pub mod compare;
pub mod convert;
pub mod create;
pub mod disk;
pub mod exports;
pub mod info;
pub mod inspect;
pub mod map;
pub mod measure;
pub mod options;
mod pace;
mod progress;
pub mod rebase;
pub mod resize;
pub mod secrets;
pub mod snapshot;
pub mod source;
mod stream;
pub mod tool;

pub use confine::Requirement;
