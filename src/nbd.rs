// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `doorless nbd`, and the same under the name `qemu-nbd`: a disk image over NBD, with that program's options.
//!
//! What is not built yet, and what needs the kernel's nbd device, is refused by name; nothing is accepted and then not done.

use std::ffi::OsString;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use ::img::secrets::Secrets;
use anyhow::{Context, bail, ensure};
use clap::{CommandFactory, FromArgMatches, Parser};
use manager::chain::Policy;
use manager::directory;
use manager::inspector::Program;
use manager::kept::Restarts;
use manager::serve::{End, ExportOptions, Listen, Request, serve};
use manager::tls::Tls;
use sys::background::Ready;

use crate::img::Asked;

/// Where NBD is served over TCP unless a port is given (IANA).
const PORT: u16 = 10809;

/// Serve a disk image over NBD with qemu-nbd's options: a manager opens the image, a confined process reads it.
#[derive(Parser)]
#[command(disable_version_flag = true, args_override_self = true)]
struct Options {
    /// The disk image; or `fat:[12:|16:|32:][floppy:][rw:]DIR` for a directory as a FAT disk.
    image: Option<PathBuf>,
    /// Print the version.
    #[arg(short = 'V', long)]
    version: bool,
    /// TCP port to listen on (default 10809).
    #[arg(short, long)]
    port: Option<u16>,
    /// Address to bind to (default 0.0.0.0).
    #[arg(short, long, value_name = "IFACE")]
    bind: Option<String>,
    /// Unix socket to listen on.
    #[arg(short = 'k', long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Most clients at once, 0 for any number; further ones wait.
    #[arg(short = 'e', long, value_name = "NUM", default_value_t = 1)]
    shared: u32,
    /// Go on when the last client has left.
    #[arg(short = 't', long)]
    persistent: bool,
    /// Accepted; what there is to say is said anyway.
    #[arg(short, long)]
    verbose: bool,
    /// The export's name (default: the empty name).
    #[arg(short = 'x', long, value_name = "NAME", default_value = "")]
    export_name: String,
    /// Text for clients that list exports.
    #[arg(short = 'D', long, value_name = "TEXT")]
    description: Option<String>,
    /// Seconds that a client may negotiate, 0 for any time (default 10).
    #[arg(long, value_name = "N")]
    handshake_limit: Option<u32>,
    /// Byte of the image at which the export begins; k, M, G, T for units of 1024.
    #[arg(short, long, value_parser = size, default_value = "0")]
    offset: u64,
    /// The image's format; without it a confined process looks for a magic number.
    #[arg(short, long)]
    format: Option<String>,
    /// Never write to the image.
    #[arg(short, long)]
    read_only: bool,
    /// Leave the image as it is: what clients write goes into a temporary file in TMPDIR, or /var/tmp, and is lost at the end.
    #[arg(short, long)]
    snapshot: bool,
    /// How the host caches: `writeback` (the default), or `none`, which reads and writes past its cache (`O_DIRECT`).
    #[arg(long, value_name = "MODE")]
    cache: Option<String>,
    /// The same as --cache=none.
    #[arg(short, long, conflicts_with = "cache")]
    nocache: bool,
    /// Who waits for reads that the host's cache cannot answer: `threads` or `io_uring`; by default the latter if the
    /// kernel lets it.
    #[arg(long, value_name = "MODE")]
    aio: Option<String>,
    /// Whether clients' discards reach the file: `ignore` (`off`, the default) or `unmap` (`on`).
    #[arg(long, value_name = "MODE", value_parser = ["ignore", "off", "unmap", "on"], default_value = "ignore")]
    discard: String,
    /// Whether written zeroes are looked for: `off` is the only one so far.
    #[arg(long, value_name = "MODE")]
    detect_zeroes: Option<String>,
    /// Let clients learn how many layers down data is stored (`qemu:allocation-depth`).
    #[arg(short = 'A', long)]
    allocation_depth: bool,
    /// Let clients read this dirty bitmap of the image, or of one that it is built on (`qemu:dirty-bitmap:NAME`).
    #[arg(short = 'B', long, value_name = "NAME")]
    bitmap: Option<String>,
    /// An object for the options below: `tls-creds-x509,id=ID,endpoint=server,dir=DIR[,verify-peer=off]`, `authz-simple`,
    /// `authz-list`. May be repeated.
    #[arg(long, value_name = "SPEC")]
    object: Vec<String>,
    /// Serve over TLS alone, with these credentials.
    #[arg(long, value_name = "ID")]
    tls_creds: Option<String>,
    /// Let in only clients whose certificate has a name that this object allows.
    #[arg(long, value_name = "ID")]
    tls_authz: Option<String>,
    /// Return when clients can connect, and go on in the background.
    #[arg(long)]
    fork: bool,
    /// Write the process id there once clients can connect.
    #[arg(long, value_name = "PATH")]
    pid_file: Option<PathBuf>,
    /// Accepted, and of no effect.
    #[arg(short = 'T', long, value_name = "SPEC", num_args = 0..=1)]
    trace: Option<Option<String>>,

    /// Tell what another server exports: the one at -k, or at -b and -p (default localhost).
    #[arg(short = 'L', long)]
    list: bool,
    /// IMAGE is options, as `driver=qcow2,file.filename=PATH`, in place of a path.
    #[arg(long)]
    image_opts: bool,

    // Known, and refused.
    #[arg(short, long, hide = true)]
    load_snapshot: Option<String>,
    #[arg(long, hide = true)]
    tls_hostname: Option<String>,
    #[arg(long, hide = true)]
    selinux_label: Option<String>,
    #[arg(short, long, hide = true)]
    connect: Option<String>,
    #[arg(short, long, hide = true)]
    disconnect: bool,

    /// The pipe of the process that waits; not for users.
    #[arg(long, hide = true)]
    ready_fd: Option<i32>,
}

/// Serves until a signal, or until the last client has left. `name` is what the program was called by.
///
/// # Errors
/// A sentence for the user; the exit status is then 1, as qemu-nbd's.
pub fn run(name: &'static str, arguments: Vec<OsString>) -> anyhow::Result<ExitCode> {
    let words = [vec![OsString::from(name)], arguments.clone()].concat();
    let parsed = Options::command().bin_name(name).try_get_matches_from(words);
    let options = match parsed.and_then(|matches| Options::from_arg_matches(&matches)) {
        Ok(options) => options,
        Err(e) => {
            let help = !e.use_stderr();
            e.print()?;
            return Ok(if help { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
    };
    if options.version {
        println!("{name} (doorless) {}", env!("CARGO_PKG_VERSION"));
        return Ok(ExitCode::SUCCESS);
    }
    options.refuse_unbuilt()?;
    if options.list {
        options.list()?;
        return Ok(ExitCode::SUCCESS);
    }
    if options.fork {
        let mut command = Command::new(Program::THIS);
        command.arg("nbd").args(arguments.into_iter().filter(|argument| argument != "--fork"));
        sys::background::start(command, "--ready-fd").context("could not go into the background")?;
        return Ok(ExitCode::SUCCESS);
    }
    options.serve()?;
    Ok(ExitCode::SUCCESS)
}

impl Options {
    fn list(&self) -> anyhow::Result<()> {
        ensure!(self.image.is_none(), "List mode is incompatible with a file name");
        ensure!(self.tls_creds.is_none(), "--list with --tls-creds is not supported by this version");
        let socket: OwnedFd = match self.listen(None)? {
            Listen::Tcp(_, port) => {
                let host = self.bind.as_deref().unwrap_or("localhost");
                let socket = TcpStream::connect((host, port));
                socket.with_context(|| format!("Failed to connect to '{host}:{port}'"))?.into()
            }
            Listen::Unix(path) => {
                let socket = UnixStream::connect(&path);
                socket.with_context(|| format!("Failed to connect to '{}'", path.display()))?.into()
            }
            Listen::Passed(_) => bail!("List mode is incompatible with socket activation"),
        };
        Ok(::img::exports::run(socket)?)
    }

    fn serve(self) -> anyhow::Result<()> {
        // Descriptors that were passed on purpose are taken before anything else is opened.
        let activated = activation()?;
        let ready = self.ready_fd.map(Ready::take).transpose().context("could not go into the background")?;
        let waiting = manager::serve::Waiting::new().context("could not prepare for signals")?;
        let listen = self.listen(activated)?;
        let Some(mut image) = self.image else { bail!("cannot serve without an image; name one") };
        let mut format = self.format;
        if self.image_opts {
            ensure!(format.is_none(), "--image-opts and -f are mutually exclusive");
            let asked = Asked::parse(&image.to_string_lossy(), &Secrets::default()).map_err(anyhow::Error::msg)?;
            (image, format) = (asked.path, asked.format);
        }
        let direct = self.nocache || self.cache.as_deref() == Some("none");
        let (read_only, snapshot) = (self.read_only, self.snapshot);
        let (image, format, vvfat) = crate::vvfat::spelled(&image, format, directory::Options::default())?;
        ensure!(!(vvfat.rw && (read_only || snapshot)), "'rw:' does not go with --read-only or --snapshot");
        let policy = Policy { format, vvfat, direct, read_only, snapshot, ..Policy::default() };
        let export = ExportOptions {
            name: self.export_name,
            description: self.description,
            tls: Tls::options(&self.object, self.tls_creds, self.tls_authz)?,
            allocation_depth: self.allocation_depth,
            bitmap: self.bitmap,
            offset: self.offset,
            discard: matches!(self.discard.as_str(), "unmap" | "on"),
            max_connections: Some(self.shared),
            handshake_seconds: self.handshake_limit,
            until_unused: !self.persistent,
            background: ready.is_some(),
            aio: self.aio,
        };
        let program = Program { executable: Program::THIS.into(), confinement: Vec::new() };
        let successor = program.successor();
        let listen = Some(listen);
        let restarts = Restarts::default();
        let request =
            Request { image, policy, listen, file: None, device: None, metrics: None, monitor: None, export, restarts };
        // Who can connect can read the PID file, too.
        let pid_file = self.pid_file.map(PidFile::write).transpose()?;
        let mut served = serve(&program, request)?;
        if let Some(notice) = &served.chain.notice {
            eprintln!("note: {notice}");
        }
        if let Some(ready) = ready {
            ready.tell().context("could not go into the background")?;
        }
        let end = served.keep(&waiting, &successor, crate::serve::tell)?;
        let written = crate::vvfat::write_back(&mut served);
        let stopped = served.stop();
        drop(pid_file);
        stopped?;
        written?;
        ensure!(end != End::GivenUp, "the confined daemon has died too often; its own message says why");
        Ok(())
    }

    /// The socket that the options ask for.
    fn listen(&self, activated: Option<OwnedFd>) -> anyhow::Result<Listen> {
        if let Some(listener) = activated {
            ensure!(self.socket.is_none(), "Unix socket can't be set when using socket activation");
            ensure!(self.bind.is_none(), "The interface can't be set when using socket activation");
            ensure!(self.port.is_none(), "TCP port number can't be set when using socket activation");
            return Ok(Listen::Passed(listener));
        }
        if let Some(path) = &self.socket {
            ensure!(
                self.bind.is_none() && self.port.is_none(),
                "a unix socket has no address or port: use -k or -b and -p"
            );
            return Ok(Listen::Unix(std::path::absolute(path)?));
        }
        Ok(Listen::Tcp(self.bind.clone().unwrap_or_else(|| "0.0.0.0".into()), self.port.unwrap_or(PORT)))
    }

    /// An error for the first option that is known and does nothing here.
    fn refuse_unbuilt(&self) -> anyhow::Result<()> {
        let other = |given: &Option<String>, only: &str| given.as_ref().is_some_and(|given| given != only);
        let kernel = "needs the kernel's nbd device, which no process of ours may open; use nbd-client on the socket";
        let later = "is not supported by this version";
        let other_cache = other(&self.cache, "writeback") && other(&self.cache, "none");
        let other_aio = other(&self.aio, "threads") && other(&self.aio, "io_uring");
        let refused = [
            (self.load_snapshot.is_some(), "--load-snapshot", later),
            (other_cache, "--cache other than 'writeback' and 'none'", later),
            (other_aio, "--aio other than 'threads' and 'io_uring'", later),
            (other(&self.detect_zeroes, "off"), "--detect-zeroes other than 'off'", later),
            (self.tls_hostname.is_some(), "--tls-hostname", later),
            (self.selinux_label.is_some(), "--selinux-label", later),
            (self.connect.is_some(), "--connect", kernel),
            (self.disconnect, "--disconnect", kernel),
        ];
        match refused.iter().find(|(given, ..)| *given) {
            Some((_, option, why)) => bail!("{option} {why}"),
            None => Ok(()),
        }
    }
}

/// The listening socket that a service manager has passed (`sd_listen_fds(3)`), if there is one for this process.
fn activation() -> anyhow::Result<Option<OwnedFd>> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Ok(None);
    }
    match number("LISTEN_FDS") {
        None | Some(0) => Ok(None),
        Some(1) => Ok(Some(sys::fd::inherited(3).context("the socket of the service manager is not there")?)),
        Some(count) => bail!("socket activation with {count} file descriptors is not supported: pass one"),
    }
}

/// A file with the process id, which goes when this value goes.
struct PidFile(PathBuf);

impl PidFile {
    /// Whoever finds the file finds the whole number in it.
    fn write(path: PathBuf) -> anyhow::Result<PidFile> {
        let path = std::path::absolute(path)?;
        let failed = || format!("could not write the PID file '{}'", path.display());
        let id = format!("{}\n", std::process::id());
        // What is no regular file (/dev/stderr, a FIFO) is written to, not replaced.
        if path.metadata().is_ok_and(|metadata| !metadata.is_file()) {
            std::fs::write(&path, id).with_context(failed)?;
        } else {
            let whole = path.with_added_extension(std::process::id().to_string());
            std::fs::write(&whole, id).with_context(failed)?;
            std::fs::rename(&whole, &path).with_context(failed)?;
        }
        Ok(PidFile(path))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if self.0.symlink_metadata().is_ok_and(|metadata| metadata.is_file()) {
            let _ = std::fs::remove_file(&self.0);
        }
    }
}

/// A number of bytes, with a unit if it has one.
fn size(text: &str) -> Result<u64, String> {
    let units = [("k", 10), ("K", 10), ("M", 20), ("G", 30), ("T", 40)];
    let unit = units.iter().find_map(|&(unit, shift)| Some((text.strip_suffix(unit)?, shift)));
    let (digits, shift) = unit.unwrap_or((text, 0));
    let bytes = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes.ok_or_else(|| "a number of bytes, with k, M, G or T behind it for units of 1024".into())
}
