// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is to be given up.

/// What the process will do once it is confined: decides which system calls are left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// Serve: threads, sockets that were passed, disks that were passed.
    Daemon,
    /// Read an image from a descriptor and answer on another.
    Inspector,
    /// Read and write images that were opened before, on several threads, and answer on standard output.
    Tool,
    /// Talk to a server over a socket that was connected before, and answer on standard output.
    Client,
}

/// A layer of confinement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layer {
    /// No core dumps; as many descriptors and as long files as the hard limits grant. There is no limit on processes: it
    /// would count every thread of the user, in other processes too, and the filter lets none start anyway.
    Limits,
    /// Not root: root owns root's files even without a capability.
    User,
    /// Mounts with an empty root, network, IPC, host name and control groups of its own.
    Namespaces,
    /// The first process of a pid namespace of its own, made by whoever started it: it sees no other process.
    PidNamespace,
    /// No capability in any set.
    Capabilities,
    /// no_new_privs: running a program cannot give rights.
    NoNewPrivs,
    /// Not dumpable: other processes of the user cannot trace this one.
    NotDumpable,
    /// Landlock: no file, no TCP port, no abstract socket and no process outside, as far as the kernel knows how.
    Landlock,
    /// seccomp: no system call that is not needed.
    Seccomp,
}

impl Layer {
    /// Every layer, in the order in which they are applied.
    pub const ALL: [Layer; 9] = [
        Layer::Limits,
        Layer::User,
        Layer::Namespaces,
        Layer::PidNamespace,
        Layer::Capabilities,
        Layer::NoNewPrivs,
        Layer::NotDumpable,
        Layer::Landlock,
        Layer::Seccomp,
    ];

    /// Its name in messages and options.
    pub fn name(self) -> &'static str {
        match self {
            Layer::Limits => "limits",
            Layer::User => "user",
            Layer::Namespaces => "namespaces",
            Layer::PidNamespace => "pid-namespace",
            Layer::Capabilities => "capabilities",
            Layer::NoNewPrivs => "no-new-privs",
            Layer::NotDumpable => "not-dumpable",
            Layer::Landlock => "landlock",
            Layer::Seccomp => "seccomp",
        }
    }

    /// What an administrator can do to have it.
    pub(crate) fn remedy(self) -> &'static str {
        match self {
            Layer::Limits => "raise the limits of whoever starts this process",
            Layer::User => {
                "start it as an ordinary user, or let it change its user: CAP_SETUID and CAP_SETGID, and in a container a \
                 user id that is mapped"
            }
            Layer::Namespaces => {
                "start it as root with CAP_SYS_ADMIN, or let users make namespaces: user.max_user_namespaces, AppArmor's \
                 restriction of them, and the container's own filter decide that"
            }
            Layer::PidNamespace => {
                "let doorless serve start it, or unshare --pid --fork, and see that users may make namespaces"
            }
            Layer::Capabilities => "start it as an ordinary user, or as root with CAP_SETPCAP",
            Layer::NoNewPrivs | Layer::NotDumpable => "look for a filter around this process that denies prctl(2)",
            Layer::Landlock => {
                "boot a kernel of 5.13 or newer that has 'landlock' in lsm=, and let the container allow it"
            }
            Layer::Seccomp => "use a kernel with CONFIG_SECCOMP_FILTER, and let the container allow seccomp(2)",
        }
    }
}

impl std::fmt::Display for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether a layer must be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// The process is not confined without it.
    Require,
    /// It is applied where it can be had, and reported where not.
    BestEffort,
}

/// Which layers must be had: what `--confine` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Requirement([Level; Layer::ALL.len()]);

impl Requirement {
    /// What options take.
    pub const SYNTAX: &str = "require, standard, best-effort, or names of layers with commas between them";

    /// What this process must have of it, if it does `role`: no tool of a moment is worth a pid namespace.
    fn levels(self, role: Role) -> [Level; Layer::ALL.len()] {
        let Requirement(mut levels) = self;
        if matches!(role, Role::Tool | Role::Client) {
            levels[Layer::PidNamespace as usize] = Level::BestEffort;
        }
        levels
    }
}

impl Default for Requirement {
    /// Every layer that any kernel of today and any container grants: all but the two of namespaces.
    fn default() -> Requirement {
        let namespaces = [Layer::Namespaces, Layer::PidNamespace];
        let level = |layer| if namespaces.contains(&layer) { Level::BestEffort } else { Level::Require };
        Requirement(Layer::ALL.map(level))
    }
}

impl std::str::FromStr for Requirement {
    type Err = String;

    fn from_str(text: &str) -> Result<Requirement, String> {
        match text {
            "require" => return Ok(Requirement([Level::Require; Layer::ALL.len()])),
            "standard" => return Ok(Requirement::default()),
            "best-effort" => return Ok(Requirement([Level::BestEffort; Layer::ALL.len()])),
            _ => {}
        }
        let mut levels = [Level::BestEffort; Layer::ALL.len()];
        for name in text.split(',') {
            let layer = Layer::ALL.into_iter().find(|layer| layer.name() == name);
            let layer = layer.ok_or_else(|| {
                let names = Layer::ALL.map(Layer::name).join(", ");
                format!("'{name}' is no layer of confinement; {} ({names})", Requirement::SYNTAX)
            })?;
            levels[layer as usize] = Level::Require;
        }
        Ok(Requirement(levels))
    }
}

impl std::fmt::Display for Requirement {
    /// As [`FromStr`](std::str::FromStr) reads it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let required: Vec<&str> =
            Layer::ALL.into_iter().filter(|&layer| self.0[layer as usize] == Level::Require).map(Layer::name).collect();
        match required.len() {
            0 => f.write_str("best-effort"),
            n if n == Layer::ALL.len() => f.write_str("require"),
            _ => f.write_str(&required.join(",")),
        }
    }
}

/// What becomes of a system call that the filter does not allow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Denial {
    /// It answers `EPERM` and the process goes on: its other clients are served, and [`crate::attempts`] can report. What it
    /// was refused stays refused, however often it is tried.
    #[default]
    Refuse,
    /// The kernel kills the process, which says louder that something is wrong. The first attempt to get out ends it.
    Kill,
}

/// What to give up, and what must be had of it.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) role: Role,
    pub(crate) run_as: Option<(u32, u32)>,
    pub(crate) denial: Denial,
    pub(crate) landlock_abi: i32,
    pub(crate) hole: Option<i64>,
    pub(crate) rings: bool,
    levels: [Level; Layer::ALL.len()],
    left_out: [bool; Layer::ALL.len()],
}

impl Plan {
    /// Every layer, all of them required.
    pub fn new(role: Role) -> Plan {
        Plan {
            role,
            run_as: None,
            denial: Denial::Refuse,
            landlock_abi: 1,
            hole: None,
            rings: false,
            levels: [Level::Require; Layer::ALL.len()],
            left_out: [false; Layer::ALL.len()],
        }
    }

    /// The same plan, content with what can be had.
    #[must_use]
    pub fn best_effort(mut self) -> Plan {
        self.levels = [Level::BestEffort; Layer::ALL.len()];
        self
    }

    /// The same plan with what must be had of it.
    #[must_use]
    pub fn requiring(mut self, requirement: Requirement) -> Plan {
        self.levels = requirement.levels(self.role);
        self
    }

    /// Says whether `layer` must be had.
    #[must_use]
    pub fn level(mut self, layer: Layer, level: Level) -> Plan {
        self.levels[layer as usize] = level;
        self
    }

    /// Lets the process ask io_urings that it has made before; every one must be restricted for good (`sys::ring`).
    #[must_use]
    pub fn with_rings(mut self) -> Plan {
        self.rings = true;
        self
    }

    /// Leaves `layer` out, as on a machine that lacks it: an error if it is required, else reported as missing.
    #[must_use]
    pub fn without(mut self, layer: Layer) -> Plan {
        self.left_out[layer as usize] = true;
        self
    }

    /// Leaves out every layer but these.
    #[must_use]
    pub fn only(mut self, layers: &[Layer]) -> Plan {
        self.left_out = Layer::ALL.map(|layer| !layers.contains(&layer));
        self
    }

    /// The user and group to become, which must own nothing; only a privileged process can. Without this an ordinary user
    /// stays who it is, and root becomes a user of its own (1,900,000,000 and the process id), or 65534 where a container
    /// maps no such id.
    #[must_use]
    pub fn run_as(mut self, uid: u32, gid: u32) -> Plan {
        self.run_as = Some((uid, gid));
        self
    }

    /// What becomes of a system call that is not allowed; [`Denial::Refuse`] by default.
    #[must_use]
    pub fn on_denial(mut self, denial: Denial) -> Plan {
        self.denial = denial;
        self
    }

    /// The oldest Landlock interface that counts as the layer; 1 by default (3 adds truncate, 4 TCP, 6 sockets and signals).
    #[must_use]
    pub fn landlock_abi(mut self, oldest: i32) -> Plan {
        self.landlock_abi = oldest;
        self
    }

    /// The same plan with a system call, by its number, that the filter lets through whatever its arguments are. It is there to
    /// show that [`crate::attempts`] find the hole.
    #[must_use]
    pub fn with_hole(mut self, call: i64) -> Plan {
        self.hole = Some(call);
        self
    }

    pub(crate) fn wants(&self, layer: Layer) -> bool {
        !self.left_out[layer as usize]
    }

    /// Whether `layer` must be had.
    pub fn requires(&self, layer: Layer) -> bool {
        self.levels[layer as usize] == Level::Require
    }
}
