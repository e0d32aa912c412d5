// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line. Each verb is one module; this page is the list of them.
#![allow(clippy::print_stdout, reason = "a command line talks to people")]

mod attest;
mod demo;
mod fdsets;
mod img;
mod matrix;
mod nbd;
mod nbd_client;
mod policy;
mod publish;
mod serve;
mod service;
mod table;
mod top;
mod vvfat;

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use daemon::FdPolicy;
use manager::inspector::Program;

/// The storage daemon that opens nothing.
///
/// A manager opens disk images and passes them as descriptors; a daemon that can open nothing any more reads and serves them.
#[derive(Parser)]
#[command(name = "doorless", version, arg_required_else_help = true)]
struct CommandLine {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Serve a disk image over NBD on a unix socket, or as a file, read by a process that can open nothing.
    Serve(Box<serve::Options>),
    /// Show what a running daemon was passed, or look for descriptors that it has lost sight of.
    Fdsets(fdsets::Options),
    /// Watch what running daemons are asked: exports, clients, nodes, fd sets.
    Top(top::Options),
    /// A service that opens images by policy for many users, each with daemons and sockets of their own.
    Manager(service::Options),
    /// Have the service start a confined daemon, without a disk.
    Start(service::OfDaemon),
    /// Have the service end a daemon and all that it serves.
    Stop(service::OfDaemon),
    /// List the service's daemons and their disks.
    Ps(service::List),
    /// Have the service give a daemon a disk; prints where NBD clients find it.
    Attach(service::Attach),
    /// Have the service take a disk from a daemon.
    Detach(service::Detach),
    /// Have the service change a disk's size.
    Resize(service::Resize),
    /// Have the service replace a daemon by one of the program as it lies on disk now, without hanging up on NBD clients.
    Upgrade(service::OfDaemon),
    /// Have the service read its policy once more.
    Reload(service::Reload),
    /// Say what a manager's policy would allow.
    Policy(policy::Options),
    /// Show on a small disk how it works, and that the daemon cannot get out.
    Demo(demo::Options),
    /// Let a process that is confined like the daemon try every way out, and show what the kernel said.
    Attest(attest::Options),
    /// The confined daemon alone, driven over QMP (see `doorless daemon --help`).
    #[command(disable_help_flag = true)]
    Daemon(Rest),
    /// Serve a disk image over NBD with qemu-nbd's options (see `doorless nbd --help`).
    #[command(disable_help_flag = true)]
    Nbd(Rest),
    /// Image verbs with qemu-img's options, run confined (see `doorless img --help`).
    #[command(disable_help_flag = true)]
    Img(Rest),
    /// Give a file its final name once it is whole. For the manager's use.
    #[command(hide = true)]
    Publish { temporary: PathBuf, path: PathBuf },
    /// Unmount a file of `serve --fuse` when standard input ends. For the manager's use.
    #[command(hide = true)]
    Unmount(UnmountOptions),
    /// Remove a daemon's sockets and PID file when standard input ends. For the daemon's use.
    #[command(hide = true)]
    Sweep { files: Vec<OsString> },
    /// Confine itself and try to get out, as JSON on the command line says. For the manager's use.
    #[command(hide = true)]
    AttestInside { orders: String },
    /// Tell what the image on standard input is, confined. For the manager's use.
    #[command(hide = true)]
    Inspect(InspectOptions),
}

#[derive(Args)]
struct Rest {
    /// Options as QEMU's program has them.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

#[derive(Args)]
struct UnmountOptions {
    /// The file.
    mountpoint: PathBuf,
    /// The inherited descriptor of its mount.
    #[arg(long)]
    tree: Option<i32>,
}

#[derive(Args)]
struct InspectOptions {
    /// The image's format; without it, its magic number decides.
    #[arg(long)]
    format: Option<String>,
    #[command(flatten)]
    confinement: Confinement,
}

/// How the confined processes confine themselves.
#[derive(Args, Clone)]
struct Confinement {
    /// Which layers of confinement must be had: `require` for all, `standard` for all but `namespaces` and `pid-namespace`,
    /// `best-effort` for none, or their names with commas between them.
    #[arg(long, value_name = "LEVEL", default_value = "standard")]
    confine: ::img::Requirement,
}

impl Confinement {
    fn program(&self) -> Program {
        Program { executable: Program::THIS.into(), confinement: vec![format!("--confine={}", self.confine)] }
    }
}

/// `doorless daemon`.
const DAEMON: daemon::Style = daemon::Style { fd_policy: FdPolicy::Strict, name: "doorless daemon" };
/// The same under the name of the program that it stands in for: takes every descriptor, as that one's clients expect.
const STORAGE_DAEMON: daemon::Style =
    daemon::Style { fd_policy: FdPolicy::Compat, name: "qemu-storage-daemon (doorless)" };

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .without_time()
        .with_target(false)
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .init();
    let mut arguments = std::env::args_os();
    let called = arguments.next().map(PathBuf::from).unwrap_or_default();
    let (name, result) = match called.file_name().and_then(OsStr::to_str) {
        Some(name @ "qemu-storage-daemon") => {
            (name, daemon::run(STORAGE_DAEMON, arguments).map(|()| ExitCode::SUCCESS).map_err(Into::into))
        }
        Some(name @ "qemu-img") => (name, img::run("qemu-img", arguments.collect())),
        Some(name @ "qemu-nbd") => (name, nbd::run("qemu-nbd", arguments.collect())),
        _ => ("doorless", run(CommandLine::parse().verb)),
    };
    result.unwrap_or_else(|e| {
        eprintln!("{name}: {e:#}");
        ExitCode::FAILURE
    })
}

fn run(verb: Verb) -> anyhow::Result<ExitCode> {
    match verb {
        Verb::Serve(options) => serve::run(&options)?,
        Verb::Fdsets(options) => return fdsets::run(&options),
        Verb::Top(options) => top::run(&options)?,
        Verb::Manager(options) => service::run(&options)?,
        Verb::Start(options) => service::start(&options)?,
        Verb::Stop(options) => service::stop(&options)?,
        Verb::Ps(options) => service::list(&options)?,
        Verb::Attach(options) => service::attach(&options)?,
        Verb::Detach(options) => service::detach(&options)?,
        Verb::Resize(options) => service::resize(&options)?,
        Verb::Upgrade(options) => service::upgrade(&options)?,
        Verb::Reload(options) => service::reload(&options)?,
        Verb::Policy(options) => return policy::run(&options),
        Verb::Attest(options) => return attest::run(&options),
        Verb::AttestInside { orders } => daemon::attest::inside(&orders)?,
        Verb::Demo(options) => return demo::run(&options),
        Verb::Daemon(Rest { arguments }) => daemon::run(DAEMON, arguments)?,
        Verb::Img(Rest { arguments }) => return img::run("doorless img", arguments),
        Verb::Publish { temporary, path } => publish::finish(&temporary, &path)?,
        Verb::Nbd(Rest { arguments }) => return nbd::run("doorless nbd", arguments),
        Verb::Unmount(UnmountOptions { mountpoint, tree }) => manager::fuse::unmount_when_abandoned(&mountpoint, tree)?,
        Verb::Sweep { files } => daemon::sweeper::run(&files)?,
        Verb::Inspect(InspectOptions { format, confinement }) => {
            ::img::inspect::run(format.as_deref(), confinement.confine)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A path for a socket that nobody else can reach: in a directory of its own, which goes when this value goes.
struct PrivateSocket {
    directory: PathBuf,
}

impl PrivateSocket {
    fn new() -> anyhow::Result<PrivateSocket> {
        use std::os::unix::fs::DirBuilderExt;
        let parent = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_dir());
        let parent = parent.unwrap_or_else(std::env::temp_dir);
        // A directory that is there is no meeting place: somebody else's, or left by a process of this number that was killed.
        let names = (0..100).map(|number| match number {
            0 => format!("doorless-{}", std::process::id()),
            _ => format!("doorless-{}-{number}", std::process::id()),
        });
        let mut refused = std::io::ErrorKind::AlreadyExists.into();
        for directory in names.map(|name| parent.join(name)) {
            match std::fs::DirBuilder::new().mode(0o700).create(&directory) {
                Ok(()) => return Ok(PrivateSocket { directory }),
                Err(error) => refused = error,
            }
            if refused.kind() != std::io::ErrorKind::AlreadyExists {
                break;
            }
        }
        Err(anyhow::anyhow!("could not make a directory for the socket in '{}': {refused}", parent.display()))
    }

    fn path(&self) -> PathBuf {
        self.directory.join("nbd.sock")
    }
}

impl Drop for PrivateSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.path());
        let _ = std::fs::remove_dir(&self.directory);
    }
}
