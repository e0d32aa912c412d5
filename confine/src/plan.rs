// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is given up, in which order, and the proof.

use std::io;

use crate::{landlocked, privileges, seccomp};

/// What the process will do once it is confined: decides what the filter allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Serve: threads, sockets that were passed, disks that were passed.
    Daemon,
    /// Read an image from a descriptor and answer on another.
    Inspector,
}

/// A layer of confinement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// No way to more rights: another user, no capabilities, no_new_privs, not dumpable, limits.
    Privileges,
    /// Landlock: no file, no TCP, no process outside.
    Landlock,
    /// seccomp: no system call that is not needed.
    Seccomp,
}

impl Layer {
    /// Every layer, in the order in which they are applied.
    pub const ALL: [Layer; 3] = [Layer::Privileges, Layer::Landlock, Layer::Seccomp];

    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Layer::Privileges => "privileges",
            Layer::Landlock => "landlock",
            Layer::Seccomp => "seccomp",
        }
    }
}

/// What to give up.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What the process will do.
    pub role: Role,
    /// The layers to apply.
    pub layers: Vec<Layer>,
    /// Whether a layer that the kernel lacks is an error.
    pub required: bool,
}

impl Plan {
    /// Every layer, all of them required.
    pub fn new(role: Role) -> Plan {
        Plan { role, layers: Layer::ALL.to_vec(), required: true }
    }

    /// The same plan, content with what the kernel has.
    #[must_use]
    pub fn best_effort(mut self) -> Plan {
        self.required = false;
        self
    }
}

/// What became of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerReport {
    /// Which.
    pub layer: Layer,
    /// Whether all of it is in force.
    pub in_force: bool,
    /// What it does, or what is missing and why.
    pub detail: String,
}

/// Proof that this process has confined itself. Only [`confine`] makes it.
#[derive(Debug)]
pub struct Confined {
    reports: Vec<LayerReport>,
}

impl Confined {
    /// Layer by layer, what is in force.
    pub fn reports(&self) -> &[LayerReport] {
        &self.reports
    }
}

/// Why the process is not confined. It may be partly confined: end it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Confinement would not cover threads that exist already.
    #[error("this process has {0} threads; it can be confined only while it has one")]
    Threads(usize),
    /// A required layer cannot be had.
    #[error(
        "the layer '{layer}' of confinement cannot be had here: {detail}; give the process a kernel or container that has it, \
         or say --confine=best-effort to go on without"
    )]
    Missing {
        /// Which.
        layer: &'static str,
        /// Why.
        detail: String,
    },
    /// Looking at the process failed.
    #[error("could not look at this process before confining it: {0}")]
    Look(#[source] io::Error),
}

/// Confines this process for ever.
///
/// # Errors
/// It has several threads already, or a required layer cannot be had.
pub fn confine(plan: &Plan) -> Result<Confined, Error> {
    let threads = std::fs::read_dir("/proc/self/task").map_err(Error::Look)?.count();
    if threads != 1 {
        return Err(Error::Threads(threads));
    }
    warm_up();
    let mut reports = Vec::new();
    for &layer in &plan.layers {
        let applied = match layer {
            Layer::Privileges => privileges::apply(),
            Layer::Landlock => landlocked::apply(),
            Layer::Seccomp => seccomp::apply(plan.role),
        };
        let (in_force, detail) = match applied {
            Ok(detail) => (true, detail),
            Err(detail) if plan.required => return Err(Error::Missing { layer: layer.name(), detail }),
            Err(detail) => (false, detail),
        };
        reports.push(LayerReport { layer, in_force, detail });
    }
    Ok(Confined { reports })
}

/// Lets std and libc open now what they would open lazily: afterwards they could not.
fn warm_up() {
    // The allocator counts processors when it makes a thread's first arena; std reads the control group's limits.
    let _ = std::thread::available_parallelism();
    // The hash map's seed, and the clock's page.
    let _ = std::collections::hash_map::RandomState::new();
    let _ = std::time::Instant::now();
    // A thread's first start loads the unwinder's cancellation library in some builds of glibc.
    let _ = std::thread::spawn(|| ()).join();
}
