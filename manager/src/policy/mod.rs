// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an administrator allows: which files, for whom, to do what with.
//!
//! [`rules`] are read from TOML, [`opening`] opens by them, [`quota`] counts who has what, and [`audit`] writes down every
//! decision; the [`Door`] has all of them. A request is refused unless a rule allows it, and every refusal says which check it failed.

pub mod audit;
mod door;
pub mod opening;
pub mod quota;
pub mod rules;
mod users;

use std::fmt;

pub use audit::Audit;
pub use door::{Door, Grant};
pub use opening::ByPolicy;
pub use quota::Quotas;
pub use rules::Policy;

/// Who asks, as the kernel says (`SO_PEERCRED`, unix(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asker {
    /// Process.
    pub pid: i32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl Asker {
    /// This process itself.
    pub fn this() -> Asker {
        Asker {
            pid: rustix::process::getpid().as_raw_pid(),
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
        }
    }
}

/// The check that a request failed. The word is for the audit log, the text for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Which check.
    pub check: Check,
    /// What was found and what would be allowed.
    pub text: String,
}

/// The checks, in the order in which they are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// The client may ask for nothing, or has too much already.
    Quota,
    /// No client of the policy is meant.
    Client,
    /// The name is no plain path.
    Name,
    /// No rule's root is above it.
    Root,
    /// The rule does not give such rights.
    Rights,
    /// It is not there, or cannot be reached without a link.
    Reach,
    /// It is no regular file, and no device that the rule allows.
    Type,
    /// It belongs to somebody else.
    Owner,
    /// Its mode does not let its owner do that.
    Mode,
    /// It has more names than one.
    HardLinks,
    /// It is not what it was a moment before.
    Replaced,
    /// The format, or the guessing of it.
    Format,
    /// Too many layers.
    Depth,
    /// The image itself: broken, or a chain that cannot be.
    Image,
}

impl Check {
    /// The word in the audit log.
    pub fn word(self) -> &'static str {
        match self {
            Check::Quota => "quota",
            Check::Client => "client",
            Check::Name => "name",
            Check::Root => "root",
            Check::Rights => "rights",
            Check::Reach => "reach",
            Check::Type => "type",
            Check::Owner => "owner",
            Check::Mode => "mode",
            Check::HardLinks => "hard-links",
            Check::Replaced => "replaced",
            Check::Format => "format",
            Check::Depth => "depth",
            Check::Image => "image",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (policy: {})", self.text, self.check.word())
    }
}
