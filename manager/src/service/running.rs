// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One daemon of the service: its sockets, its disks, its record.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use super::PATIENCE;
use super::api::{Shown, ShownDisk};
use super::notify::Stored;
use super::record::{Record, WrittenDisk};
use crate::chain::Chain;
use crate::daemon::{Daemon, Launch};
use crate::disk;
use crate::inspector::Program;
use crate::journal::Carried;
use crate::kept::{Kept, Restarts, Verdict};
use crate::listening::Listening;
use crate::opening::Rights;
use crate::policy::{Asker, Grant};
use crate::serve::uri;
use crate::{Error, Result};

/// The part of the journal that is no disk's.
const SERVER: &str = "server";

/// A daemon that runs, or is about to again.
#[derive(Debug)]
pub struct Running {
    name: String,
    asker: Asker,
    kept: Kept,
    files: Files,
    disks: BTreeMap<String, Disk>,
    /// When another is to be started.
    due: Option<Instant>,
    over: bool,
}

#[derive(Debug)]
struct Disk {
    grant: Grant,
    node: String,
    writable: bool,
}

/// The names that a daemon has in the service's directory.
#[derive(Debug)]
struct Files {
    socket: PathBuf,
    monitor: PathBuf,
    record: PathBuf,
}

impl Files {
    fn of(directory: &Path, name: &str) -> Files {
        let file = |kind: &str| directory.join(format!("{name}.{kind}"));
        Files { socket: file("sock"), monitor: file("monitor"), record: file("json") }
    }

    fn remove(&self) {
        for path in [&self.record, &self.socket, &self.monitor] {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Running {
    /// Starts one without disks.
    ///
    /// # Errors
    /// Any step's; nothing is left behind.
    pub fn start(program: &Program, directory: &Path, name: &str, asker: Asker) -> Result<Running> {
        let files = Files::of(directory, name);
        let (socket, monitor) = (Listening::bind(files.socket.clone())?, Listening::bind(files.monitor.clone())?);
        let duplicate =
            |of: &Listening| of.as_fd().try_clone_to_owned().map_err(Error::process("could not keep a socket"));
        let mut kept = Kept::start(program, launch(duplicate(&monitor)?), Restarts::default())?;
        let listener = Carried::other(duplicate(&socket)?);
        let served = serve_nbd(&mut kept, listener);
        if let Err(e) = served {
            // A daemon of this kind would live on.
            kept.stop()?;
            return Err(e);
        }
        let (socket, monitor) = (socket.publish(), monitor.publish());
        let mut running =
            Running { name: name.to_owned(), asker, kept, files, disks: BTreeMap::new(), due: None, over: false };
        let (socket, monitor) = match (socket, monitor) {
            (Ok(socket), Ok(monitor)) => (socket.keep(), monitor.keep()),
            (Err(e), _) | (_, Err(e)) => {
                running.kept.stop()?;
                return Err(e);
            }
        };
        let private = own(&socket, asker.uid).and_then(|()| own(&monitor, rustix::process::geteuid().as_raw()));
        if let Err(e) = private.and_then(|()| running.write_down()) {
            running.stop()?;
            return Err(e);
        }
        Ok(running)
    }

    /// Takes over one that was left by an earlier service, by its record.
    ///
    /// # Errors
    /// It has gone, and then so have its files; or its descriptors cannot be had, and then it is left alone.
    pub fn adopt(program: &Program, directory: &Path, path: &Path, stored: &mut Stored) -> Result<Running> {
        let record = Record::read(path)?;
        let files = Files::of(directory, &record.name);
        let asker = Asker { pid: 0, uid: record.uid, gid: record.gid };
        let mut daemon = match Daemon::adopt(record.pid, record.began, &files.monitor, PATIENCE) {
            Ok(daemon) => daemon,
            Err(e) => {
                if matches!(&e, Error::Process { source, .. } if source.kind() == std::io::ErrorKind::NotFound) {
                    files.remove();
                }
                return Err(e);
            }
        };
        let name = record.name.clone();
        let written = record.disks.iter();
        let disk =
            |disk: &WrittenDisk| Disk { grant: disk.grant(asker), node: disk.node.clone(), writable: disk.writable };
        let disks = written.map(|(name, written)| (name.clone(), disk(written))).collect();
        let (journal, monitor) = record.recover(&mut daemon, stored)?;
        let kept = Kept::adopt(program, launch(monitor), Restarts::default(), journal, daemon);
        Ok(Running { name, asker, kept, files, disks, due: None, over: false })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whose it is.
    pub fn asker(&self) -> Asker {
        self.asker
    }

    /// What its disks were granted as.
    pub fn grants(&self) -> impl Iterator<Item = &Grant> {
        self.disks.values().map(|disk| &disk.grant)
    }

    /// The same by the disks' names.
    pub fn held(&self) -> impl Iterator<Item = (String, Grant)> {
        self.disks.iter().map(|(name, disk)| (name.clone(), disk.grant.clone()))
    }

    /// For people.
    pub fn show(&self) -> Shown {
        let disk = |(name, disk): (&String, &Disk)| ShownDisk {
            name: name.clone(),
            image: disk.grant.path.clone(),
            writable: disk.writable,
        };
        Shown {
            name: self.name.clone(),
            uid: self.asker.uid,
            pid: self.kept.pid(),
            restarts: self.kept.successors(),
            socket: self.files.socket.clone(),
            disks: self.disks.iter().map(disk).collect(),
        }
    }

    /// Refuses a second disk of a name.
    ///
    /// # Errors
    /// There is one.
    pub fn refuse_twice(&self, disk: &str) -> Result<()> {
        if self.disks.contains_key(disk) {
            return Err(Error::Refused(format!("the daemon '{}' has a disk '{disk}' already", self.name)));
        }
        Ok(())
    }

    /// Serves a disk; where.
    ///
    /// # Errors
    /// Any step's; then it is as before.
    pub fn attach(&mut self, name: &str, chain: &Chain, grant: Grant) -> Result<String> {
        let part = part(name);
        // By the number of a set that is not used yet: never the same twice.
        let node = format!("disk{}", self.kept.next_set());
        let writable = chain.layers[0].image.rights == Rights::ReadWrite;
        self.kept.begin(&part);
        let attached = disk::attach(&mut self.kept, chain, &node, true).and_then(|node| {
            let export = json!({ "type": "nbd", "id": node, "node-name": node, "name": name, "writable": writable });
            self.kept.execute("block-export-add", export, &[])
        });
        if let Err(e) = attached {
            self.distrust(&e);
            // What was done of it is undone; what cannot be any more goes with the daemon.
            if let Err(e) = self.kept.take_back(&part) {
                self.distrust(&e);
            }
            return Err(e);
        }
        self.disks.insert(name.to_owned(), Disk { grant, node, writable });
        self.write_down()?;
        Ok(uri(&self.files.socket, name))
    }

    /// Takes a disk away; what it was granted as.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn detach(&mut self, name: &str) -> Result<Grant> {
        let Some(disk) = self.disks.remove(name) else {
            return Err(Error::Refused(format!("the daemon '{}' has no disk '{}'", self.name, name.escape_debug())));
        };
        // A daemon that cannot do it is replaced by one that was never told of the disk.
        if let Err(e) = self.kept.take_back(&part(name)) {
            self.distrust(&e);
        }
        self.write_down()?;
        Ok(disk.grant)
    }

    /// Changes a disk's size.
    ///
    /// # Errors
    /// There is none of that name, or the daemon refuses.
    pub fn resize(&mut self, name: &str, size: u64) -> Result<()> {
        let Some(disk) = self.disks.get(name) else {
            return Err(Error::Refused(format!("the daemon '{}' has no disk '{}'", self.name, name.escape_debug())));
        };
        let resized = self.kept.ask("block_resize", json!({ "node-name": disk.node, "size": size }));
        self.kept.resized(&part(name));
        if let Err(e) = &resized {
            self.distrust(e);
        }
        resized.map(drop)
    }

    /// Has a daemon of `program` take over; for how long nobody was served.
    ///
    /// # Errors
    /// None could take over: the old one serves on, or another of its kind is about to.
    pub fn upgrade(&mut self, program: &Program) -> Result<Duration> {
        let upgraded = self.kept.upgrade(program);
        if self.kept.pid().is_none() && self.due.is_none() {
            self.due = Some(Instant::now());
        }
        let pause = upgraded?;
        self.write_down()?;
        Ok(pause)
    }

    /// Kills a daemon that does not answer any more: another takes its place.
    fn distrust(&mut self, error: &Error) {
        let hung = match error {
            Error::Daemon { source, .. } => !matches!(source, qmp::ClientError::Qmp { .. }),
            _ => false,
        };
        if let (true, Ok(daemon)) = (hung, self.kept.daemon()) {
            let _ = daemon.pidfd().and_then(|pidfd| sys::signal::send(pidfd, sys::signal::KILL));
        }
    }

    /// Writes the record. Of a daemon that has just died the next one's is written.
    ///
    /// # Errors
    /// Those of the host.
    pub fn write_down(&mut self) -> Result<()> {
        let written =
            |(name, disk): (&String, &Disk)| (name.clone(), WrittenDisk::new(&disk.grant, disk.writable, &disk.node));
        let disks = self.disks.iter().map(written).collect();
        match Record::of(&self.name, self.asker, &mut self.kept, disks) {
            Some(record) => record.write(&self.files.record),
            None => Ok(()),
        }
    }

    /// Leaves its sockets with the service manager, if there is one, for the next manager.
    pub fn store(&self, stored: &Stored) {
        if let Some(monitor) = self.kept.monitor() {
            stored.leave(&self.name, "monitor", monitor.as_fd());
        }
        let listener =
            self.kept.journal().steps().iter().find(|step| step.part == SERVER).and_then(|step| step.carried.first());
        if let Some(listener) = listener {
            stored.leave(&self.name, "nbd", listener.as_fd());
        }
    }

    /// A descriptor that is readable once it has died.
    pub fn pidfd(&mut self) -> Option<OwnedFd> {
        self.kept.daemon().ok()?.pidfd().ok()
    }

    /// Whether nothing will serve its disks any more.
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// Buries it if it has died, and starts another when that is due: when to look again, and what there is to tell.
    pub fn look_after(&mut self) -> (Option<Instant>, Vec<String>) {
        let mut news = Vec::new();
        if self.has_died() {
            match self.kept.bury() {
                Ok((death, verdict)) => {
                    news.push(death.to_string());
                    self.follow(verdict, &mut news);
                }
                Err(e) => self.give_up(&e.chain(), &mut news),
            }
        }
        while self.due.is_some_and(|due| due <= Instant::now()) {
            self.due = None;
            match self.kept.revive() {
                Ok(Ok(pid)) => {
                    news.push(format!("process {pid} serves in its place"));
                    if let Err(e) = self.write_down() {
                        news.push(e.chain());
                    }
                }
                Ok(Err((e, verdict))) => {
                    news.push(format!("no daemon could take its place: {}", e.chain()));
                    self.follow(verdict, &mut news);
                }
                Err(e) => self.give_up(&e.chain(), &mut news),
            }
        }
        (self.due, news)
    }

    fn has_died(&mut self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let dead = |pidfd: OwnedFd| poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&now)) == Ok(1);
        self.pidfd().is_some_and(dead)
    }

    fn follow(&mut self, verdict: Verdict, news: &mut Vec<String>) {
        match verdict {
            Verdict::Again(pause) => self.due = Some(Instant::now() + pause),
            Verdict::Ended => self.give_up("it has ended by itself", news),
            Verdict::GivenUp => self.give_up("it has died too often", news),
        }
    }

    fn give_up(&mut self, why: &str, news: &mut Vec<String>) {
        news.push(format!("given up: {why}"));
        self.over = true;
    }

    /// Ends it.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn stop(self) -> Result<()> {
        self.files.remove();
        self.kept.stop()
    }

    /// Lets go of one that is over.
    pub fn abandon(self) {
        self.files.remove();
    }
}

fn part(disk: &str) -> String {
    format!("disk:{disk}")
}

fn launch(monitor: OwnedFd) -> Launch {
    Launch {
        monitor: Some(monitor),
        deaf_to_terminal: true,
        survives: true,
        attest: true,
        patience: Some(PATIENCE),
        ..Launch::default()
    }
}

fn serve_nbd(kept: &mut Kept, listener: std::sync::Arc<Carried>) -> Result<()> {
    kept.begin(SERVER);
    kept.execute("getfd", json!({ "fdname": "nbd" }), &[listener])?;
    let start = json!({ "addr": { "type": "fd", "data": { "str": "nbd" } }, "max-connections": 0 });
    kept.execute("nbd-server-start", start, &[]).map(drop)
}

/// Lets `uid` alone connect.
fn own(socket: &Path, uid: u32) -> Result<()> {
    let failed = |source| Error::Open { path: socket.to_owned(), purpose: " to give it to who asked", source };
    if uid != rustix::process::geteuid().as_raw() {
        chown(socket, Some(uid), None).map_err(failed)?;
    }
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600)).map_err(failed)
}
