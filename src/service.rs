// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `doorless manager` and the verbs that are its clients: `start`, `stop`, `ps`, `attach`, `detach`, `resize`, `upgrade`,
//! `reload`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use manager::service::{Answer, Place, Request, Service, ask};

use crate::{Confinement, table};

/// Where a service has its files unless somebody says otherwise.
const DIRECTORY: &str = "/run/doorless";

/// Options of `manager`.
#[derive(Args)]
pub struct Options {
    /// Who may have which images.
    #[arg(long, value_name = "FILE", default_value = crate::policy::PLACE)]
    policy: PathBuf,
    /// The audit log: a line of JSON for every decision.
    #[arg(long, value_name = "FILE")]
    audit: PathBuf,
    /// For the service's socket, the daemons' sockets, and what the next manager needs to know.
    #[arg(long, value_name = "DIR", default_value = DIRECTORY)]
    directory: PathBuf,
    #[command(flatten)]
    confinement: Confinement,
}

/// Serves requests until a signal. The daemons live on.
pub fn run(options: &Options) -> anyhow::Result<()> {
    use sys::signal::{HUP, INT, Signals, TERM};
    let signals = Signals::block(&[INT, TERM, HUP]).context("could not prepare for signals")?;
    let place = Place {
        directory: std::path::absolute(&options.directory)?,
        policy: std::path::absolute(&options.policy)?,
        audit: Some(std::path::absolute(&options.audit)?),
    };
    let mut service = Service::open(options.confinement.program(), place)?;
    manager::service::run(&mut service, &signals, |news| eprintln!("doorless manager: {news}"))?;
    Ok(())
}

/// Which service is asked.
#[derive(Args)]
struct Where {
    /// The service's socket.
    #[arg(long, value_name = "PATH", default_value = "/run/doorless/manager.sock")]
    manager: PathBuf,
}

impl Where {
    fn ask(&self, request: &Request) -> anyhow::Result<Answer> {
        Ok(ask(&self.manager, request)?)
    }
}

/// Options of `start`, `stop` and `upgrade`.
#[derive(Args)]
pub struct OfDaemon {
    /// The daemon.
    name: String,
    #[command(flatten)]
    place: Where,
}

/// Options of `attach`.
#[derive(Args)]
pub struct Attach {
    /// The daemon.
    name: String,
    /// What the disk is called: the name of the export.
    disk: String,
    /// The image.
    image: PathBuf,
    /// Its format.
    #[arg(long, short)]
    format: Option<String>,
    /// Format of backing files whose overlay does not say.
    #[arg(long, value_name = "FORMAT")]
    backing_format: Option<String>,
    /// Never write to the image.
    #[arg(long, short)]
    read_only: bool,
    #[command(flatten)]
    place: Where,
}

/// Options of `detach`.
#[derive(Args)]
pub struct Detach {
    /// The daemon.
    name: String,
    /// The disk.
    disk: String,
    #[command(flatten)]
    place: Where,
}

/// Options of `resize`.
#[derive(Args)]
pub struct Resize {
    /// The daemon.
    name: String,
    /// The disk.
    disk: String,
    /// Bytes.
    size: u64,
    #[command(flatten)]
    place: Where,
}

/// Options of `ps`.
#[derive(Args)]
pub struct List {
    /// For programs.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: Where,
}

/// Options of `reload`.
#[derive(Args)]
pub struct Reload {
    #[command(flatten)]
    place: Where,
}

/// Starts a daemon.
pub fn start(options: &OfDaemon) -> anyhow::Result<()> {
    options.place.ask(&Request::Start { name: options.name.clone() }).map(drop)
}

/// Ends a daemon.
pub fn stop(options: &OfDaemon) -> anyhow::Result<()> {
    options.place.ask(&Request::Stop { name: options.name.clone() }).map(drop)
}

/// Upgrades a daemon, and says how long that took.
pub fn upgrade(options: &OfDaemon) -> anyhow::Result<()> {
    if let Answer::Upgraded { pause } = options.place.ask(&Request::Upgrade { name: options.name.clone() })? {
        println!("{pause:.1} ms");
    }
    Ok(())
}

/// Attaches a disk, and says where it is.
pub fn attach(options: &Attach) -> anyhow::Result<()> {
    let image = absolute(&options.image)?;
    let Attach { name, disk, format, backing_format, read_only, .. } = options;
    let (name, disk, format, backing_format) = (name.clone(), disk.clone(), format.clone(), backing_format.clone());
    let attach = Request::Attach { name, disk, image, format, backing_format, read_only: *read_only };
    if let Answer::Attached { uri } = options.place.ask(&attach)? {
        println!("{uri}");
    }
    Ok(())
}

/// Detaches a disk.
pub fn detach(options: &Detach) -> anyhow::Result<()> {
    options.place.ask(&Request::Detach { name: options.name.clone(), disk: options.disk.clone() }).map(drop)
}

/// Changes a disk's size.
pub fn resize(options: &Resize) -> anyhow::Result<()> {
    let Resize { name, disk, size, place } = options;
    place.ask(&Request::Resize { name: name.clone(), disk: disk.clone(), size: *size }).map(drop)
}

/// Has the policy read once more.
pub fn reload(options: &Reload) -> anyhow::Result<()> {
    if let Answer::Reloaded { withdrawn } = options.place.ask(&Request::Reload)? {
        withdrawn.iter().for_each(|disk| println!("withdrawn: {disk}"));
    }
    Ok(())
}

/// Lists daemons and disks.
pub fn list(options: &List) -> anyhow::Result<()> {
    let Answer::Daemons(daemons) = options.place.ask(&Request::List)? else { return Ok(()) };
    if options.json {
        println!("{:#}", serde_json::to_value(&daemons)?);
        return Ok(());
    }
    let heading = ["daemon", "process", "user", "restarts", "disk", "access", "image"].map(str::to_owned).to_vec();
    let mut rows = vec![heading];
    for daemon in daemons {
        let process = daemon.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        let start = vec![daemon.name, process, daemon.uid.to_string(), daemon.restarts.to_string()];
        if daemon.disks.is_empty() {
            rows.push([start.clone(), vec!["-".into(), "-".into(), "-".into()]].concat());
        }
        for disk in daemon.disks {
            let access = if disk.writable { "read-write" } else { "read-only" };
            rows.push([start.clone(), vec![disk.name, access.into(), disk.image.display().to_string()]].concat());
        }
    }
    table::lines(&rows).iter().for_each(|line| println!("{line}"));
    Ok(())
}

/// The service has another working directory.
fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("'{}' is no path", path.display()))
}
