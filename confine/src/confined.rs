// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The act of confining, and the proof of it.

use std::io;

use crate::{Layer, LayerReport, Plan, Report, landlocked, namespaces, privileges, seccomp};

/// Proof that this process has confined itself. Only [`confine`] makes it, and nothing copies it.
#[derive(Debug)]
pub struct Confined {
    report: Report,
}

impl Confined {
    /// What is in force.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Layer by layer, what is in force.
    pub fn reports(&self) -> &[LayerReport] {
        self.report.layers()
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
        "the layer '{layer}' of confinement cannot be had here: {detail}; {}, or say what must be had with --confine",
        layer.remedy()
    )]
    Missing {
        /// Which.
        layer: Layer,
        /// Why.
        detail: String,
    },
    /// Looking at the process failed: no /proc, or it is confined already.
    #[error("could not count this process's threads in /proc/self/task before confining it: {0}")]
    Look(#[source] io::Error),
}

/// Confines this process for ever. Call it once, while the process has one thread and before it reads anything foreign.
///
/// # Errors
/// It has several threads already, or a required layer cannot be had. What was given up until then is not given back.
pub fn confine(plan: &Plan) -> Result<Confined, Error> {
    let threads = std::fs::read_dir("/proc/self/task").map_err(Error::Look)?.count();
    // A plan with no layer in it has nothing that could miss a thread.
    if threads != 1 && Layer::ALL.iter().any(|&layer| plan.wants(layer)) {
        return Err(Error::Threads(threads));
    }
    warm_up();
    let mut layers = Vec::new();
    let mut record = |layer: Layer, applied: Result<String, String>| {
        let (in_force, detail) = match applied {
            Ok(detail) => (true, detail),
            Err(detail) if plan.requires(layer) => return Err(Error::Missing { layer, detail }),
            Err(detail) => (false, detail),
        };
        layers.push(LayerReport { layer, in_force, detail });
        Ok(())
    };
    let unless_left_out = |layer: Layer, apply: &dyn Fn() -> Result<String, String>| {
        if plan.wants(layer) { apply() } else { Err("the plan leaves it out".to_owned()) }
    };

    record(Layer::Limits, unless_left_out(Layer::Limits, &privileges::limit))?;
    // A user cannot be changed without capabilities, nor the bounding set emptied without root's: what is needed of one
    // layer for the other is done first.
    let namespaces = plan.wants(Layer::Namespaces).then(namespaces::leave_as_root).flatten();
    let empty_bounding_set = || {
        if plan.wants(Layer::Capabilities) {
            privileges::empty_bounding_set();
        }
    };
    empty_bounding_set();
    record(Layer::User, unless_left_out(Layer::User, &|| privileges::change_user(plan.run_as)))?;
    let namespaces = namespaces.unwrap_or_else(|| unless_left_out(Layer::Namespaces, &namespaces::leave_as_user));
    record(Layer::Namespaces, namespaces)?;
    record(Layer::PidNamespace, unless_left_out(Layer::PidNamespace, &namespaces::first_process))?;
    // A new user namespace fills it again, and gives everybody the right to empty it.
    empty_bounding_set();
    record(Layer::Capabilities, unless_left_out(Layer::Capabilities, &privileges::drop_capabilities))?;
    record(Layer::NoNewPrivs, unless_left_out(Layer::NoNewPrivs, &privileges::set_no_new_privs))?;
    // After the change of user, with which the kernel decides anew whether a process is dumpable.
    record(Layer::NotDumpable, unless_left_out(Layer::NotDumpable, &privileges::set_not_dumpable))?;
    record(Layer::Landlock, unless_left_out(Layer::Landlock, &|| landlocked::apply(plan.landlock_abi)))?;
    // Last: it allows none of the calls above.
    record(Layer::Seccomp, unless_left_out(Layer::Seccomp, &|| seccomp::apply(plan)))?;
    Ok(Confined { report: Report::new(layers) })
}

/// Lets std and libc open now what they would open at first use: afterwards they could not.
///
/// The rest needs no warmth: std takes the hash seed and the time from system calls that are allowed, never reads the time
/// zone, and the unwinder is linked, not loaded.
fn warm_up() {
    sys::process::id();
    sys::process::parent();
    // glibc's own default is eight arenas to a processor. std reads the control group's limits for the number.
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    sys::memory::limit_arenas(8 * processors);
    // Whoever asks for backtraces gets them after confining, too: the symbols of what is loaded are read here and kept.
    if std::env::var_os("RUST_BACKTRACE").is_some_and(|wanted| wanted != "0") {
        drop(std::backtrace::Backtrace::force_capture().to_string());
    }
}
