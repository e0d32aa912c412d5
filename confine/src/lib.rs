// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Lets a process lock itself out of every file, socket and program, before it reads its first foreign byte.
//!
//! [`confine`] applies a [`Plan`] layer by layer, each of which would do for most attacks alone: an unprivileged user without
//! capabilities ([`privileges`](Layer::Privileges)), Landlock without a single rule, and last a seccomp filter that allows only
//! what a storage daemon does with descriptors it already has. It returns [`Confined`], a value that nothing else makes, so
//! that a function can demand it as proof. What the kernel lacks is named, and is an error unless the plan says otherwise.
//!
//! [`attempts`] tries to get out.

pub mod attempts;
mod landlocked;
mod plan;
mod privileges;
mod seccomp;

pub use plan::{Confined, Error, Layer, LayerReport, Plan, Role, confine};
