// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Many daemons for many users: each has its own NBD socket and its own disks, opened by policy for whoever asks.
//!
//! [`Service::handle`] does what a [`Request`] says; [`run`] takes requests from a socket, starts daemons anew when they die, and
//! rereads the policy on SIGHUP. What every daemon has is written down (`record`), so that the manager may die: the
//! daemons serve on, and the next manager adopts them.
//!
//! Without the socket, from Rust:
//!
//! ```no_run
//! use manager::inspector::Program;
//! use manager::policy::Asker;
//! use manager::service::{Place, Request, Service};
//!
//! let program = Program { executable: "/usr/bin/doorless".into(), confinement: vec!["--confine=require".into()] };
//! let place = Place { directory: "/run/vms".into(), policy: "/etc/doorless/policy.toml".into(), audit: None };
//! let mut service = Service::open(program, place)?;
//! service.handle(Asker::this(), Request::Start { name: "vm1".into() })?;
//! let (image, format) = ("/var/lib/doorless/disks/a.qcow2".into(), Some("qcow2".into()));
//! let (name, disk) = ("vm1".into(), "root".into());
//! let attach = Request::Attach { name, disk, image, format, backing_format: None, read_only: false };
//! println!("{:?}", service.handle(Asker::this(), attach)?);
//! # Ok::<(), manager::Error>(())
//! ```

pub mod api;
mod notify;
mod record;
mod run;
mod running;

use std::collections::BTreeMap;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use api::{Answer, Request, Shown, ask};
pub use run::run;

use crate::chain::Policy as Wanted;
use crate::inspector::Program;
use crate::policy::{Asker, Audit, Door, Grant, Policy};
use crate::{Error, Result};
use notify::Stored;
use running::Running;

/// How long a daemon may take to answer a command before it is killed, and another takes its place.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Where a service has its files.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its directory, for sockets and records; made if it is not there.
    pub directory: PathBuf,
    /// The policy.
    pub policy: PathBuf,
    /// The audit log, unless nothing is to be written down.
    pub audit: Option<PathBuf>,
}

/// The service's state.
#[derive(Debug)]
pub struct Service {
    program: Program,
    /// What an upgrade starts.
    successor: Program,
    place: Place,
    door: Door,
    daemons: BTreeMap<String, Running>,
    /// What happened that somebody should read.
    news: Vec<String>,
    stored: Stored,
}

impl Service {
    /// Reads the policy, and adopts the daemons that an earlier service in the same directory has left.
    ///
    /// # Errors
    /// The policy is wrong, or the files cannot be used. A daemon that cannot be adopted is left alone, and is in the
    /// [news](Service::news).
    pub fn open(program: Program, place: Place) -> Result<Service> {
        let directory = place.directory.clone();
        let failed = |source| Error::Open { path: directory.clone(), purpose: " for sockets", source };
        let audit = place.audit.as_deref().map_or_else(|| Ok(Audit::none()), Audit::append)?;
        let door = Door::new(Policy::load(&place.policy)?, audit);
        std::fs::DirBuilder::new().recursive(true).mode(0o711).create(&place.directory).map_err(failed)?;
        let (daemons, news, stored) = (BTreeMap::new(), Vec::new(), Stored::inherited());
        let successor = program.successor();
        let mut service = Service { program, successor, place, door, daemons, news, stored };
        let entries = std::fs::read_dir(&service.place.directory).map_err(failed)?;
        let records = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let mut records: Vec<PathBuf> =
            records.filter(|path| path.extension().is_some_and(|of| of == "json")).collect();
        records.sort();
        for path in records {
            if let Err(error) = service.adopt(&path) {
                service.news.push(format!("'{}': {}", path.display(), error.chain()));
            }
        }
        Ok(service)
    }

    fn adopt(&mut self, path: &Path) -> Result<()> {
        let running = Running::adopt(&self.program, &self.place.directory, path, &mut self.stored)?;
        running.grants().for_each(|grant| self.door.take_over(grant));
        self.news.push(format!("adopted the daemon '{}'", running.name()));
        self.daemons.insert(running.name().to_owned(), running);
        Ok(())
    }

    /// What happened since the last call that somebody should read.
    pub fn news(&mut self) -> Vec<String> {
        std::mem::take(&mut self.news)
    }

    /// Does what `asker` asks.
    ///
    /// # Errors
    /// It is refused or fails; then nothing has changed.
    pub fn handle(&mut self, asker: Asker, request: Request) -> Result<Answer> {
        match request {
            Request::Start { name } => self.start(asker, name),
            Request::Stop { name } => self.stop(asker, &name),
            Request::List => Ok(Answer::Daemons(self.list(asker))),
            Request::Attach { name, disk, image, format, backing_format, read_only } => {
                let wanted = Wanted { format, backing_format, read_only, ..Wanted::default() };
                self.attach(asker, &name, disk, &image, &wanted)
            }
            Request::Detach { name, disk } => self.detach(asker, &name, &disk),
            Request::Resize { name, disk, size } => {
                let running = self.of(asker, &name)?;
                running.resize(&disk, size)?;
                running.write_down()?;
                self.door.note(asker, "resize", &format!("{name}/{disk} to {size}"))?;
                Ok(Answer::Done)
            }
            Request::Upgrade { name } => {
                let successor = self.successor.clone();
                let pause = self.of(asker, &name)?.upgrade(&successor)?;
                self.door.note(asker, "upgrade", &name)?;
                Ok(Answer::Upgraded { pause: pause.as_secs_f64() * 1000.0 })
            }
            Request::Reload if is_master(asker) => {
                self.door.note(asker, "reload", &self.place.policy.to_string_lossy())?;
                Ok(Answer::Reloaded { withdrawn: self.reload()? })
            }
            Request::Reload => Err(Error::Refused("only root and the service's own user may reload the policy".into())),
        }
    }

    fn start(&mut self, asker: Asker, name: String) -> Result<Answer> {
        named(&name)?;
        if self.daemons.contains_key(&name) {
            return Err(Error::Refused(format!("a daemon '{name}' is there already")));
        }
        let theirs = self.daemons.values().filter(|running| running.asker().uid == asker.uid).count();
        self.door.admit(asker, &name, theirs)?;
        let running = Running::start(&self.program, &self.place.directory, &name, asker)?;
        running.store(&self.stored);
        self.daemons.insert(name, running);
        Ok(Answer::Done)
    }

    fn stop(&mut self, asker: Asker, name: &str) -> Result<Answer> {
        self.of(asker, name)?;
        self.door.note(asker, "stop", name)?;
        if let Some(running) = self.remove(name) {
            running.stop()?;
        }
        Ok(Answer::Done)
    }

    /// Takes a daemon off the books.
    fn remove(&mut self, name: &str) -> Option<Running> {
        let running = self.daemons.remove(name)?;
        running.grants().for_each(|grant| self.door.give_back(grant));
        self.stored.forget(name);
        Some(running)
    }

    fn list(&self, asker: Asker) -> Vec<Shown> {
        let may_see = |running: &&Running| is_master(asker) || running.asker().uid == asker.uid;
        self.daemons.values().filter(may_see).map(Running::show).collect()
    }

    fn attach(&mut self, asker: Asker, name: &str, disk: String, image: &Path, wanted: &Wanted) -> Result<Answer> {
        named(&disk)?;
        self.of(asker, name)?.refuse_twice(&disk)?;
        let (chain, grant) = self.door.open(&self.program, asker, image, wanted)?;
        let running = self.of(asker, name)?;
        match running.attach(&disk, &chain, grant.clone()) {
            Ok(uri) => Ok(Answer::Attached { uri }),
            Err(e) => {
                self.door.give_back(&grant);
                Err(e)
            }
        }
    }

    fn detach(&mut self, asker: Asker, name: &str, disk: &str) -> Result<Answer> {
        let grant = self.of(asker, name)?.detach(disk)?;
        self.door.give_back(&grant);
        self.door.note(asker, "detach", &format!("{name}/{disk}"))?;
        Ok(Answer::Done)
    }

    /// Reads the policy once more. What it would not give is detached, and named; everything else is left alone.
    ///
    /// # Errors
    /// The policy is wrong: then the old one holds.
    pub fn reload(&mut self) -> Result<Vec<String>> {
        let policy = Policy::load(&self.place.policy)?;
        let held: Vec<(String, String, Grant)> = self
            .daemons
            .iter()
            .flat_map(|(name, running)| running.held().map(|(disk, grant)| (name.clone(), disk, grant)))
            .collect();
        let grants: Vec<&Grant> = held.iter().map(|(_, _, grant)| grant).collect();
        let withdrawn = self.door.replace(&self.program, policy, &grants)?;
        let mut named = Vec::new();
        for index in withdrawn {
            let (name, disk, grant) = &held[index];
            if let Some(running) = self.daemons.get_mut(name) {
                let detached = running.detach(disk);
                self.door.give_back(grant);
                self.door.note(grant.asker, "withdrawn", &format!("{name}/{disk}"))?;
                detached?;
            }
            named.push(format!("{name}/{disk}"));
        }
        Ok(named)
    }

    /// The daemon of that name, if it is the asker's to command.
    fn of(&mut self, asker: Asker, name: &str) -> Result<&mut Running> {
        // Somebody else's is as good as not there: names tell nothing to others.
        let theirs = self.daemons.get_mut(name).filter(|running| is_master(asker) || running.asker().uid == asker.uid);
        theirs.ok_or_else(|| Error::Refused(format!("there is no daemon '{}'", name.escape_debug())))
    }

    /// Buries daemons that have died and starts others when that is due. When to call it next, unless a daemon dies before.
    pub fn look_after(&mut self) -> Option<Instant> {
        let names: Vec<String> = self.daemons.keys().cloned().collect();
        let mut next = None;
        for name in names {
            let Some(running) = self.daemons.get_mut(&name) else { continue };
            let (due, news) = running.look_after();
            self.news.extend(news.into_iter().map(|text| format!("'{name}': {text}")));
            if running.is_over() {
                self.remove(&name).into_iter().for_each(Running::abandon);
            } else {
                next = next.into_iter().chain(due).min();
            }
        }
        next
    }
}

/// Whether somebody may do everything.
fn is_master(asker: Asker) -> bool {
    asker.uid == 0 || asker.uid == rustix::process::geteuid().as_raw()
}

fn named(name: &str) -> Result<()> {
    if api::is_name(name) {
        return Ok(());
    }
    let shown: String = name.chars().take(80).flat_map(char::escape_debug).collect();
    Err(Error::Refused(format!(
        "'{shown}' is no name: 1 to 64 letters, digits, '-', '_' and '.', the first a letter or digit"
    )))
}
