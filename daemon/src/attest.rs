// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A confined process that tries to get out: the daemon when it starts (`--attest`), and one that does nothing else
//! (`doorless attest`).

use std::cell::RefCell;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use confine::attempts::{self, Bait, Outcome};
use confine::{Layer, Plan, Report, Requirement, Role};
use export::Rings;
use rustix::fs::MemfdFlags;
use serde::Deserialize;
use serde_json::{Value, json};
use sys::ring::Ring;

use crate::command_line::UsageError;

/// An outcome as commands answer it.
pub fn as_json(outcome: &Outcome, report: &Report) -> Value {
    let Outcome { name, what, on, denied, answer, .. } = outcome;
    let mut value = json!({ "name": name, "what": what, "on": on, "denied": denied, "errno": answer });
    if let Some(layer) = outcome.denied_by(report) {
        value["layer"] = json!(layer.name());
    }
    value
}

/// What a daemon opens before it is confined, to try and get more of it afterwards; closed before it reads anything foreign.
#[derive(Debug)]
pub struct Probe {
    program: CString,
    descriptors: Vec<(&'static str, OwnedFd)>,
}

impl Probe {
    /// Opens the running program, a memory file and the root directory, each to read, but for what it may not even open now
    /// (a policy of SELinux forbids it).
    ///
    /// # Errors
    /// One of them cannot be opened for another reason, for example without /proc.
    pub fn prepare() -> io::Result<Probe> {
        let program = std::fs::read_link("/proc/self/exe")?;
        let memory = rustix::fs::memfd_create("doorless-attest", MemfdFlags::CLOEXEC)?;
        let memory = format!("/proc/self/fd/{}", memory.as_raw_fd());
        let mut descriptors = Vec::new();
        for (called, path) in [("its own program", "/proc/self/exe"), ("a memfd", &memory), ("a directory", "/")] {
            match File::open(path) {
                Ok(file) => descriptors.push((called, file.into())),
                Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {}
                Err(e) => return Err(e),
            }
        }
        Ok(Probe { program: CString::new(program.into_os_string().into_encoded_bytes())?, descriptors })
    }

    /// Tries every way out, one of `rings` too. Where `plan` can do without the filter, ways that are open are a warning.
    ///
    /// # Errors
    /// Some are open: the sentence names them.
    pub fn attest(self, report: &Report, plan: &Plan, rings: &Rings) -> Result<Vec<Outcome>, UsageError> {
        let mut ring = rings.borrow();
        let bait = Bait {
            paths: vec![("its own program".into(), self.program)],
            read_only: self.descriptors.iter().map(|(called, fd)| ((*called).to_owned(), fd.as_fd())).collect(),
            process: sys::process::parent(),
            ring: ring.as_deref_mut().map(RefCell::new),
            ..Bait::default()
        };
        let outcomes = attempts::run(&bait);
        let open: Vec<&str> = outcomes.iter().filter(|it| !it.denied).map(|it| it.what.as_str()).collect();
        if open.is_empty() {
            return Ok(outcomes);
        }
        let missing: Vec<&str> = report.missing().map(|it| it.layer.name()).collect();
        let said = format!(
            "--attest: {} of {} ways out are open (layers that are missing: {}): {}",
            open.len(),
            outcomes.len(),
            missing.join(", "),
            open.join("; ")
        );
        if plan.requires(Layer::Seccomp) {
            return Err(UsageError(said));
        }
        tracing::warn!("{said}");
        Ok(outcomes)
    }
}

/// What [`inside`] is told, as JSON.
#[derive(Debug, Deserialize)]
struct Orders {
    confine: String,
    /// No layers but these.
    only: Option<Vec<String>>,
    /// Layers to leave out.
    without: Vec<String>,
    /// A system call that the filter is to let through.
    hole: Option<String>,
    path: String,
    descriptors: Vec<(String, i32)>,
    process: i32,
    socket: String,
    abstract_socket: String,
    port: u16,
}

/// Takes what was inherited, confines the process, tries to get out, and answers on standard output. Orders come as JSON from
/// the manager, which has laid out the bait.
///
/// # Errors
/// The orders make no sense, a layer that must be had cannot be, or standard output is closed.
pub fn inside(orders: &str) -> Result<(), UsageError> {
    let unusable = |e: &dyn std::fmt::Display| UsageError(format!("orders that make no sense: {e}"));
    let orders: Orders = serde_json::from_str(orders).map_err(|e| unusable(&e))?;
    let text = |text: &str| CString::new(text).map_err(|e| unusable(&e));
    let mut descriptors = Vec::new();
    for (called, number) in &orders.descriptors {
        descriptors.push((called.clone(), sys::fd::inherited(*number).map_err(|e| unusable(&e))?));
    }
    sys::fd::close_inherited().map_err(|e| unusable(&e))?;
    // As the daemon makes them; where the kernel gives none, there is nothing to try.
    let mut ring = Ring::new(1).ok();
    let plan = plan(&orders)?;
    let plan = if ring.is_some() { plan.with_rings() } else { plan };
    let bait = Bait {
        paths: vec![("an image by its path".into(), text(&orders.path)?)],
        read_only: descriptors.iter().map(|(called, fd)| (called.clone(), fd.as_fd())).collect(),
        process: Some(orders.process),
        socket: Some(text(&orders.socket)?),
        abstract_socket: Some(text(&orders.abstract_socket)?),
        port: Some(orders.port),
        ring: ring.as_mut().map(RefCell::new),
    };
    let confined = confine::confine(&plan).map_err(|e| UsageError(e.to_string()))?;
    let report = confined.report();
    let layers: Vec<Value> = confined
        .reports()
        .iter()
        .map(|it| json!({ "name": it.layer.name(), "in-force": it.in_force, "detail": it.detail }))
        .collect();
    let tried: Vec<Value> = attempts::run(&bait).iter().map(|outcome| as_json(outcome, report)).collect();
    let answer = json!({ "layers": layers, "attempts": tried });
    io::stdout().write_all(answer.to_string().as_bytes()).map_err(|e| UsageError(format!("could not answer: {e}")))
}

fn plan(orders: &Orders) -> Result<Plan, UsageError> {
    let layer = |name: &String| {
        let found = Layer::ALL.into_iter().find(|layer| layer.name() == name);
        found.ok_or_else(|| UsageError(format!("'{name}' is no layer of confinement; {}", Requirement::SYNTAX)))
    };
    let mut plan = Plan::new(Role::Daemon).requiring(orders.confine.parse().map_err(UsageError)?);
    if let Some(only) = &orders.only {
        plan = plan.only(&only.iter().map(layer).collect::<Result<Vec<_>, _>>()?).best_effort();
    }
    for name in &orders.without {
        plan = plan.without(layer(name)?);
    }
    if let Some(call) = &orders.hole {
        let number = attempts::call(call).ok_or_else(|| UsageError(format!("no attempt makes the call '{call}'")))?;
        plan = plan.with_hole(number);
    }
    Ok(plan)
}

/// Every layer's name, in the order in which they are applied.
pub fn layers() -> Vec<&'static str> {
    Layer::ALL.map(Layer::name).to_vec()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_daemon_that_can_get_out_does_not_serve_unless_it_can_do_without_the_filter() {
        // The plan leaves out every layer, so this process goes on as it was; every attempt is harmless when it succeeds.
        let confined = confine::confine(&Plan::new(Role::Daemon).only(&[]).best_effort()).unwrap();
        let strict = Plan::new(Role::Daemon);
        let refusal = Probe::prepare().unwrap().attest(confined.report(), &strict, &Rings::default()).unwrap_err().0;
        for part in ["ways out are open", "map memory to execute", "lock against others (flock) a memfd", "seccomp"] {
            assert!(refusal.contains(part), "no '{part}' in: {refusal}");
        }
        let content =
            Probe::prepare().unwrap().attest(confined.report(), &strict.best_effort(), &Rings::default()).unwrap();
        assert!(content.iter().any(|outcome| !outcome.denied));
    }
}
