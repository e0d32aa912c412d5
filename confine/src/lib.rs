// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Lets a process lock itself out of every file, socket and program, before it reads its first foreign byte.
//!
//! A [`Plan`] says what the process will do ([`Role`]) and which [`Layer`]s must be had. [`confine`] applies them one by one:
//! limits, namespaces with an empty root directory, another user than root, no capabilities, no_new_privs, not dumpable, Landlock without a single rule, and last a
//! seccomp filter that allows only what a storage daemon does with the descriptors that it already has. It returns
//! [`Confined`], a value that nothing else makes, so that a function can demand it as proof. What the kernel lacks is named,
//! and is an error unless the plan is content without.
//!
//! No layer stands for all: Landlock does not see a memfd, a `fchmod` or a UDP packet; the filter would have a hole if a
//! call were allowed by mistake; the user keeps root's files out when both are missing. [`attempts`] tries to get out, from
//! inside, and tells what the kernel answered.
//!
//! ```
//! # fn main() -> Result<(), confine::Error> {
//! # let serve = |_: confine::Confined| ();
//! # if std::env::var_os("NEVER").is_some() {
//! let confined = confine::confine(&confine::Plan::new(confine::Role::Daemon))?;
//! eprint!("{}", confined.report());
//! serve(confined);
//! # }
//! # Ok(())
//! # }
//! ```

pub mod attempts;
mod confined;
mod landlocked;
mod namespaces;
mod plan;
mod privileges;
mod profile;
mod report;
mod rules;
mod seccomp;

pub use confined::{Confined, Error, confine};
pub use plan::{Denial, Layer, Level, Plan, Requirement, Role};
pub use profile::container_profile;
pub use report::{LayerReport, Report};
