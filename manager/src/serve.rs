// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A disk image on an NBD socket, as a file, or as a virtual machine's disk: open, pass, export.

use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;
use sys::signal::{self, Signals};

use crate::chain::{self, Chain, Layer, Policy};
use crate::daemon::Launch;
use crate::directory;
use crate::fuse::{AllowOther, Attached, Mount};
use crate::inspector::Program;
use crate::journal::Carried;
use crate::kept::{Death, Kept, Restarts, Verdict};
use crate::listening::{Listening, SocketFile};
use crate::opening::Rights;
use crate::tls::Tls;
use crate::written_back::Outcome;
use crate::{Error, Result};

/// The node of the one disk, and its NBD export's id.
const DISK: &str = "disk";
/// The export id of the file.
const FILE: &str = "file";
/// The export id of the virtual machine's disk.
const DEVICE: &str = "device";

/// What to serve, and where.
#[derive(Debug)]
pub struct Request {
    /// The image.
    pub image: PathBuf,
    /// What may be opened, and how.
    pub policy: Policy,
    /// Where NBD clients come from.
    pub listen: Option<Listen>,
    /// As which file the disk appears.
    pub file: Option<FileOptions>,
    /// Where scrapers of OpenMetrics come from.
    pub metrics: Option<Listen>,
    /// Where a virtual machine's VMM finds it as its disk.
    pub device: Option<DeviceOptions>,
    /// Where others find a monitor of the daemon.
    pub monitor: Option<PathBuf>,
    /// How it is offered.
    pub export: ExportOptions,
    /// How often its daemon may die.
    pub restarts: Restarts,
}

/// Where clients come from.
#[derive(Debug)]
pub enum Listen {
    /// A unix socket at this path.
    Unix(PathBuf),
    /// A TCP port of this host's address.
    Tcp(String, u16),
    /// A socket that listens already: socket activation.
    Passed(OwnedFd),
}

/// How a disk is offered.
#[derive(Clone, Debug, Default)]
pub struct ExportOptions {
    /// What clients ask for; empty is the default export.
    pub name: String,
    /// Free text for clients.
    pub description: Option<String>,
    /// The TLS that clients must begin, if any.
    pub tls: Tls,
    /// Whether clients may learn how many layers down data is stored.
    pub allocation_depth: bool,
    /// A dirty bitmap of the image that clients may read.
    pub bitmap: Option<String>,
    /// Byte of the image at which the export begins.
    pub offset: u64,
    /// Whether discards of clients are passed on.
    pub discard: bool,
    /// Most clients at once; 0 is no limit, `None` the daemon's default.
    pub max_connections: Option<u32>,
    /// How long a client may negotiate, seconds; 0 is no limit, `None` the daemon's default.
    pub handshake_seconds: Option<u32>,
    /// Who waits for reads (`doorless daemon --aio`); `None` is the daemon's default.
    pub aio: Option<String>,
    /// Whether it is over when the last client has left.
    pub until_unused: bool,
    /// Whether the daemon lets go of standard error once it is ready.
    pub background: bool,
}

/// How a disk becomes a file in the host's tree.
#[derive(Clone, Debug)]
pub struct FileOptions {
    /// A regular file, in whose place it appears.
    pub mountpoint: PathBuf,
    /// Whether it may be made longer or shorter.
    pub growable: bool,
    /// Whether others than this user may use it.
    pub allow_other: AllowOther,
}

/// How a disk becomes a virtual machine's, over vhost-user-blk.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// The socket's path.
    pub socket: PathBuf,
    /// Virtqueues, 1 to 128.
    pub queues: u16,
}

/// A disk that is being served.
#[derive(Debug)]
pub struct Served {
    /// The daemon, and what it takes to have another.
    kept: Kept,
    /// What it serves.
    pub chain: Chain,
    /// The file as which it appears, unless it does not.
    pub file: Option<Attached>,
    sockets: Vec<SocketFile>,
}

/// Opens the image, starts a confined daemon, passes it everything, and exports the disk. Sockets appear at their paths when
/// that is done, so that whoever waits for one finds the disk behind it.
///
/// # Errors
/// Any step's; nothing is left behind.
pub fn serve(program: &Program, request: Request) -> Result<Served> {
    let Request { image, policy, listen, file, device, metrics, monitor, export, restarts } = request;
    let mut chain = chain::open(program, &image, &policy)?;
    let mut sockets = Sockets::default();
    let monitor = monitor.map(|path| sockets.listen(Listen::Unix(path))).transpose()?;
    let launch = Launch {
        monitor,
        aio: export.aio.clone(),
        ends_with_clients: export.until_unused,
        background: export.background,
        attest: true,
        deaf_to_terminal: file.is_some() || policy.vvfat.rw,
        ..Launch::default()
    };
    let mut kept = Kept::start(program, launch, restarts)?;
    kept.begin(DISK);
    let overlaid = (policy.snapshot || policy.vvfat.rw) && !policy.read_only;
    let node = directory::attach(program, &mut kept, &mut chain, DISK, export.discard, overlaid)?;
    let mut served = Served { kept, chain, file: None, sockets: Vec::new() };
    let node = served.part(node, &export)?;
    if let Some(place) = listen {
        served.export(sockets.listen(place)?, &node, &export)?;
    }
    if let Some(place) = metrics {
        let listener = Carried::other(sockets.listen(place)?);
        served.kept.execute("getfd", json!({ "fdname": "metrics" }), &[listener])?;
        let start = json!({ "addr": { "type": "fd", "data": { "str": "metrics" } } });
        served.kept.execute("metrics-server-start", start, &[])?;
    }
    if let Some(file) = file {
        served.mount(program, &node, &file)?;
    }
    if let Some(device) = device {
        let listener = sockets.listen(Listen::Unix(device.socket))?;
        served.device(listener, &node, device.queues)?;
    }
    served.sockets = sockets.publish()?;
    Ok(served)
}

/// Sockets at which nobody can be found yet.
#[derive(Default)]
struct Sockets(Vec<Listening>);

impl Sockets {
    /// A descriptor to pass on.
    fn listen(&mut self, place: Listen) -> Result<OwnedFd> {
        match place {
            Listen::Unix(path) => {
                let failed = |source| Error::Open { path: path.clone(), purpose: " to listen there", source };
                let listening = Listening::bind(path.clone())?;
                let listener = listening.as_fd().try_clone_to_owned().map_err(failed)?;
                self.0.push(listening);
                Ok(listener)
            }
            Listen::Tcp(host, port) => {
                let failed = |source| Error::Listen { address: format!("{host}:{port}"), source };
                Ok(TcpListener::bind((host.as_str(), port)).map_err(failed)?.into())
            }
            Listen::Passed(listener) => Ok(listener),
        }
    }

    fn publish(self) -> Result<Vec<SocketFile>> {
        self.0.into_iter().map(Listening::publish).collect()
    }
}

impl Served {
    fn is_writable(&self) -> bool {
        self.chain.layers[0].image.rights == Rights::ReadWrite
    }

    /// A node over the part of the disk that is offered.
    fn part(&mut self, node: String, options: &ExportOptions) -> Result<String> {
        if options.offset == 0 {
            return Ok(node);
        }
        let part = json!({
            "driver": "raw", "node-name": "part", "file": node, "offset": options.offset,
            "read-only": !self.is_writable(), "discard": if options.discard { "unmap" } else { "ignore" },
        });
        self.kept.execute("blockdev-add", part, &[])?;
        Ok("part".into())
    }

    fn export(&mut self, listener: OwnedFd, node: &str, options: &ExportOptions) -> Result<()> {
        self.kept.execute("getfd", json!({ "fdname": "nbd" }), &[Carried::other(listener)])?;
        // A client of a passed socket or a port may be there already, and must not hear that there is no such export.
        let mut start = json!({ "addr": { "type": "fd", "data": { "str": "nbd" } }, "await-export": true });
        if let Some(most) = options.max_connections {
            start["max-connections"] = json!(most);
        }
        if let Some(seconds) = options.handshake_seconds {
            start["handshake-max-seconds"] = json!(seconds);
        }
        options.tls.pass(&mut self.kept, &mut start)?;
        self.kept.execute("nbd-server-start", start, &[])?;
        let writable = self.is_writable();
        let mut export =
            json!({ "type": "nbd", "id": DISK, "node-name": node, "name": options.name, "writable": writable });
        if let Some(description) = &options.description {
            export["description"] = json!(description);
        }
        if options.allocation_depth {
            export["allocation-depth"] = json!(true);
        }
        if let Some(bitmap) = &options.bitmap {
            export["bitmaps"] = json!([bitmap]);
        }
        self.kept.execute("block-export-add", export, &[])?;
        Ok(())
    }

    fn device(&mut self, listener: OwnedFd, node: &str, queues: u16) -> Result<()> {
        self.kept.execute("getfd", json!({ "fdname": "vhost-user" }), &[Carried::other(listener)])?;
        let export = json!({
            "type": "vhost-user-blk", "id": DEVICE, "node-name": node, "writable": self.is_writable(),
            "addr": { "type": "fd", "str": "vhost-user" }, "num-queues": queues,
        });
        self.kept.execute("block-export-add", export, &[])?;
        Ok(())
    }

    fn mount(&mut self, program: &Program, node: &str, options: &FileOptions) -> Result<()> {
        let FileOptions { mountpoint, growable, allow_other } = options;
        let writable = self.is_writable();
        let mount = Mount::make(program, mountpoint, !writable, *allow_other)?;
        let device = mount.device().try_clone_to_owned().map_err(Error::process("could not keep the FUSE device"))?;
        self.kept.execute("getfd", json!({ "fdname": "fuse" }), &[Carried::other(device)])?;
        let others = if mount.is_shared() { AllowOther::On } else { AllowOther::Off };
        let export = json!({
            "type": "fuse", "id": FILE, "node-name": node, "fd": "fuse", "writable": writable, "growable": growable,
            "mountpoint": mount.mountpoint().to_string_lossy(), "allow-other": others.word(),
            "uid": rustix::process::geteuid().as_raw(), "gid": rustix::process::getegid().as_raw(),
        });
        // The kernel has greeted the first daemon, and greets nobody twice.
        self.kept.execute_resumable("block-export-add", export, json!({ "resumed": true }), &[])?;
        self.file = Some(mount.attach()?);
        Ok(())
    }

    /// The layers of confinement that its daemon lacks: names, and why.
    ///
    /// # Errors
    /// The daemon has gone.
    pub fn missing_layers(&mut self) -> Result<Vec<String>> {
        self.kept.daemon()?.missing_layers()
    }

    /// The process id of the daemon that serves it now; `None` between two.
    pub fn pid(&self) -> Option<u32> {
        self.kept.pid()
    }

    /// Keeps it served, at SIGUSR1 by a daemon of what lies at `successor` then, until another signal, the daemon's own end, or one death too many. `tell` hears what happens meanwhile.
    ///
    /// # Errors
    /// A daemon may not have the image any more, or processes cannot be waited for.
    pub fn keep(&mut self, waiting: &Waiting, successor: &Program, mut tell: impl FnMut(Happening<'_>)) -> Result<End> {
        loop {
            let failed = Error::process("could not wait for the daemon");
            let pidfd = self.kept.daemon()?.pidfd().map_err(failed)?;
            let since;
            let mut verdict;
            match waiting.until(Some(&pidfd), None)? {
                Some(signal::USR1) => {
                    match self.kept.upgrade(successor) {
                        Ok(pause) => {
                            tell(Happening::Upgraded { pid: self.kept.pid().unwrap_or_default(), pause });
                            continue;
                        }
                        Err(error) => tell(Happening::NotUpgraded(&error)),
                    }
                    if self.kept.pid().is_some() {
                        continue;
                    }
                    // Neither is left: another of the old kind.
                    since = Instant::now();
                    verdict = Verdict::Again(Duration::ZERO);
                }
                Some(_) => return Ok(End::Signal),
                None => {
                    since = Instant::now();
                    let (death, next) = self.kept.bury()?;
                    verdict = next;
                    if !matches!(verdict, Verdict::Ended) {
                        tell(Happening::Died(&death));
                    }
                }
            }
            drop(pidfd);
            loop {
                let pause = match verdict {
                    Verdict::Ended => return Ok(End::Daemon),
                    Verdict::GivenUp => return Ok(End::GivenUp),
                    Verdict::Again(pause) => pause,
                };
                let deadline = Instant::now() + pause;
                while let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
                    // Who is about to be started needs no upgrade.
                    if waiting.until(None, Some(left))?.is_some_and(|signal| signal != signal::USR1) {
                        return Ok(End::Signal);
                    }
                }
                match self.kept.revive()? {
                    Ok(pid) => break tell(Happening::Revived { pid, after: since.elapsed() }),
                    Err((error, next)) => {
                        tell(Happening::Failed(&error));
                        verdict = next;
                    }
                }
            }
        }
    }

    /// For a directory that guests write to: closes the exports, and puts what was written into the directory. `None` for all
    /// other disks. A daemon that has ended is started once more for it.
    ///
    /// # Errors
    /// The guest's file system is broken, or there is no daemon: then the directory is as it was.
    pub fn write_back(&mut self) -> Result<Option<Outcome>> {
        let Some(Layer { image, directory: Some(directory), .. }) = self.chain.layers.last() else { return Ok(None) };
        if !directory.is_written() {
            return Ok(None);
        }
        self.sockets.clear();
        // While it is served: what programs have mapped is written back.
        self.file = None;
        if self.kept.pid().is_none() {
            self.kept.revive()?.map_err(|(error, _)| error)?;
        }
        let daemon = self.kept.daemon()?;
        daemon.end_exports()?;
        directory.write_back(&image.file, daemon, DISK).map(Some)
    }

    /// Ends the daemon, if there is one, properly, and removes the sockets.
    ///
    /// # Errors
    /// The daemon cannot be waited for.
    pub fn stop(mut self) -> Result<()> {
        self.sockets.clear();
        // While it is served: what programs have mapped is written back.
        self.file = None;
        self.kept.stop()
    }
}

/// What happens to a disk that is kept served.
#[derive(Debug)]
pub enum Happening<'a> {
    /// Its daemon has died.
    Died(&'a Death),
    /// Another daemon serves it.
    Revived {
        /// The process.
        pid: u32,
        /// The time since the death was seen.
        after: Duration,
    },
    /// Another daemon could not be brought to serve it.
    Failed(&'a Error),
    /// A daemon of the program as it is now has taken over, with its clients.
    Upgraded {
        /// The process.
        pid: u32,
        /// For how long nobody was served.
        pause: Duration,
    },
    /// None could take over.
    NotUpgraded(&'a Error),
}

/// What ended the serving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A signal: the daemon may still run.
    Signal,
    /// The daemon's own end, in order.
    Daemon,
    /// The daemon has died too often.
    GivenUp,
}

/// Waits for what ends a served disk. Made before anything is started, so that no signal is missed.
#[derive(Debug)]
pub struct Waiting(Signals);

impl Waiting {
    /// Collects SIGINT, SIGTERM, SIGHUP and SIGUSR1 from now on.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn new() -> std::io::Result<Waiting> {
        Ok(Waiting(Signals::block(&[signal::INT, signal::TERM, signal::HUP, signal::USR1])?))
    }

    /// Returns at a signal: its number; or when the process behind `pidfd` has ended or `most` is over: `None`.
    fn until(&self, pidfd: Option<&OwnedFd>, most: Option<Duration>) -> Result<Option<i32>> {
        let deadline = most.map(|most| Instant::now() + most);
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            let mut fds = vec![PollFd::new(&self.0, PollFlags::IN)];
            fds.extend(pidfd.map(|pidfd| PollFd::new(pidfd, PollFlags::IN)));
            let polled = poll(&mut fds, timeout.as_ref()).map_err(std::io::Error::from);
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            let count = polled.map_err(Error::process("could not wait for the daemon"))?;
            // A Ctrl-C reaches both: then the end of the daemon is no accident.
            if ready[0]
                && let Some(signal) = self.0.next().map_err(Error::process("could not read a signal"))?
            {
                return Ok(Some(signal));
            }
            if count == 0 || ready.get(1).is_some_and(|ended| *ended) {
                return Ok(None);
            }
        }
    }
}

/// The URI of an export on a unix socket (NBD uri.md), with what URIs do not allow escaped.
pub fn uri(socket: &Path, name: &str) -> String {
    let escape = |text: &str| {
        text.bytes().fold(String::new(), |mut out, byte| {
            if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
                out.push(byte.into());
            } else {
                out.push_str(&format!("%{byte:02X}"));
            }
            out
        })
    };
    format!("nbd+unix:///{}?socket={}", escape(name), escape(&socket.to_string_lossy()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_escapes_what_it_must() {
        assert_eq!(uri(Path::new("/tmp/a b&c"), "x?y"), "nbd+unix:///x%3Fy?socket=/tmp/a%20b%26c");
    }
}
