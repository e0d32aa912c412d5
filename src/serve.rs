// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `doorless serve`: an image on an NBD socket, as a file or as a virtual machine's disk until Ctrl-C.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use manager::chain::Policy;
use manager::directory;
use manager::fuse::AllowOther;
use manager::kept::Restarts;
use manager::serve::{DeviceOptions, End, ExportOptions, FileOptions, Happening, Listen, Request, Served, serve, uri};
use manager::tls::Tls;

use crate::{Confinement, PrivateSocket};

/// Options of `serve`.
#[derive(Args)]
pub struct Options {
    /// The disk image; or `fat:DIR` for a directory as a FAT disk, as in QEMU (`fat:[12:|16:|32:][floppy:][rw:]DIR`).
    image: PathBuf,
    /// Its format, for example `raw` or `qcow2`; without it a confined process looks for a magic number. Say `raw` for a disk
    /// whose first sector a guest can write.
    #[arg(long, short)]
    format: Option<String>,
    /// With --format vvfat, which makes a FAT disk of a directory: bits of its table, 12, 16 or 32.
    #[arg(long, value_name = "BITS", value_parser = clap::value_parser!(u8).range(12..=32))]
    fat_type: Option<u8>,
    /// With --format vvfat: a floppy disk.
    #[arg(long)]
    floppy: bool,
    /// With --format vvfat: the volume label.
    #[arg(long, value_name = "TEXT")]
    label: Option<String>,
    /// With --format vvfat: let guests write; at the end, what they wrote is put into the directory.
    #[arg(long, conflicts_with_all = ["read_only", "snapshot"])]
    rw: bool,
    /// Format of backing files whose overlay does not say.
    #[arg(long, value_name = "FORMAT")]
    backing_format: Option<String>,
    /// Never write to the image.
    #[arg(long, short)]
    read_only: bool,
    /// Leave the image as it is: what is written goes into a temporary file in TMPDIR, or /var/tmp, and is lost at the end.
    #[arg(long, short, conflicts_with = "read_only")]
    snapshot: bool,
    /// Read and write past the host's cache (`O_DIRECT`).
    #[arg(long)]
    direct: bool,
    /// Who waits for reads that the host's cache cannot answer: `threads`, `io_uring`, or `auto`: the latter if the
    /// kernel lets it.
    #[arg(long, value_name = "ENGINE", default_value = "auto", value_parser = ["auto", "io_uring", "threads"])]
    aio: String,
    /// Where to listen for NBD clients; by default, without --fuse and --vhost-user, in a directory that only this user can enter.
    #[arg(long, short = 'k', value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Let the disk appear as a plain file in place of this one, which is a regular file that exists (FUSE).
    #[arg(long, value_name = "FILE")]
    fuse: Option<PathBuf>,
    /// Let that file be made longer or shorter.
    #[arg(long, requires = "fuse")]
    growable: bool,
    /// Whether others than this user may use that file, as far as its permissions allow.
    #[arg(long, value_name = "WHETHER", default_value = "auto", value_parser = ["on", "off", "auto"], requires = "fuse")]
    allow_other: String,
    /// Where a VMM finds the disk of its virtual machine (vhost-user-blk).
    #[arg(long, value_name = "PATH")]
    vhost_user: Option<PathBuf>,
    /// Virtqueues of that disk, 1 to 128; best one for each processor of the virtual machine.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=128), requires = "vhost_user")]
    queues: u16,
    /// The export's name; by default the empty name, which clients ask for when they name none.
    #[arg(long, default_value = "")]
    name: String,
    /// Serve NBD over TLS alone, with the credentials in this directory: `server-cert.pem`, `server-key.pem`, and `ca-cert.pem`
    /// by which clients' certificates are checked.
    #[arg(long, value_name = "DIR")]
    tls_creds: Option<PathBuf>,
    /// Let in clients without a certificate, too.
    #[arg(long, requires = "tls_creds")]
    tls_any_client: bool,
    /// Let in only clients whose certificate has this distinguished name (`C=GB,CN=host`, `*` for any text). May be repeated.
    #[arg(long, value_name = "NAME", requires = "tls_creds", conflicts_with = "tls_any_client")]
    tls_client: Vec<String>,
    /// Answer scrapers of OpenMetrics (HTTP, GET /metrics) on this unix socket or this HOST:PORT.
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<String>,
    /// A QMP monitor for others, at this path: `doorless fdsets` and clients of your own.
    #[arg(long, value_name = "PATH")]
    monitor: Option<PathBuf>,
    /// A further directory beneath which files named by the image (backing, data file) may be opened. May be repeated.
    #[arg(long, value_name = "DIR")]
    allow: Vec<PathBuf>,
    /// Deaths of the daemon within a minute after which another is started, with all that the dead one was passed; 0 to end with
    /// it. Half of them are answered at once, the others after pauses.
    #[arg(long, value_name = "N", default_value_t = Restarts::default().per_minute)]
    restarts: u32,
    #[command(flatten)]
    confinement: Confinement,
}

/// Serves until a signal, the daemon's own end, or one death too many.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let waiting = manager::serve::Waiting::new().context("could not prepare for signals")?;
    let private = match (&options.socket, &options.fuse, &options.vhost_user) {
        (None, None, None) => Some(PrivateSocket::new()?),
        _ => None,
    };
    let socket = match &options.socket {
        Some(path) => Some(std::path::absolute(path)?),
        None => private.as_ref().map(PrivateSocket::path),
    };
    let allow_other = match options.allow_other.as_str() {
        "on" => AllowOther::On,
        "off" => AllowOther::Off,
        _ => AllowOther::Auto,
    };
    let file = options.fuse.clone();
    let vhost_user = options.vhost_user.as_deref().map(std::path::absolute).transpose()?;
    let device = vhost_user.clone().map(|socket| DeviceOptions { socket, queues: options.queues });
    let tls = options.tls_creds.as_deref();
    let tls = tls.map_or_else(Tls::default, |dir| Tls::directory(dir, options.tls_any_client, &options.tls_client));
    let scheme = if tls.is_on() { "nbds" } else { "nbd" };
    let (fat_type, floppy, label, rw) = (options.fat_type, options.floppy, options.label.clone(), options.rw);
    let fat = directory::Options { fat_type, floppy, label, rw };
    let (image, format, vvfat) = crate::vvfat::spelled(&options.image, options.format.clone(), fat.clone())?;
    if vvfat.rw && (options.read_only || options.snapshot) {
        bail!("'rw:' asks for a directory that is written to, and --read-only and --snapshot for one that is not");
    }
    if fat != directory::Options::default() && format.as_deref() != Some(directory::FORMAT) {
        bail!("--fat-type, --floppy, --label and --rw are for directories: say --format vvfat");
    }
    let request = Request {
        image,
        policy: Policy {
            format,
            vvfat,
            backing_format: options.backing_format.clone(),
            read_only: options.read_only,
            snapshot: options.snapshot,
            direct: options.direct,
            allowed: options.allow.clone(),
        },
        listen: socket.clone().map(Listen::Unix),
        file: file.map(|mountpoint| FileOptions { mountpoint, growable: options.growable, allow_other }),
        metrics: options.metrics.as_deref().map(scraped).transpose()?,
        device,
        monitor: options.monitor.as_deref().map(std::path::absolute).transpose()?,
        export: ExportOptions {
            name: options.name.clone(),
            tls,
            discard: true,
            aio: Some(options.aio.clone()),
            ..ExportOptions::default()
        },
        restarts: Restarts { per_minute: options.restarts },
    };
    let successor = options.confinement.program().successor();
    let mut served = serve(&options.confinement.program(), request)?;
    // Whoever started this may have closed the pipe already; the disk is served all the same.
    let uri = socket.map(|socket| uri(&socket, &options.name).replacen("nbd", scheme, 1));
    let missing = served.missing_layers()?;
    let _ = announce(&served, &missing, uri.as_deref(), vhost_user.as_deref());
    let end = served.keep(&waiting, &successor, tell)?;
    let written = crate::vvfat::write_back(&mut served);
    match end {
        End::Signal => served.stop()?,
        End::Daemon => bail!("the daemon has ended; its own message says why"),
        End::GivenUp => bail!("the daemon has died too often (--restarts {})", options.restarts),
    }
    written
}

/// Says on standard error what happened to the daemon.
pub fn tell(happening: Happening<'_>) {
    match happening {
        Happening::Died(death) => eprintln!("doorless: {death}"),
        Happening::Revived { pid, after } => {
            eprintln!("doorless: process {pid} serves in its place, after {:.1} ms", after.as_secs_f64() * 1000.0);
        }
        Happening::Upgraded { pid, pause } => {
            eprintln!("doorless: process {pid} has taken over, in {:.1} ms", pause.as_secs_f64() * 1000.0);
        }
        Happening::NotUpgraded(error) => eprintln!("doorless: no daemon could take over: {}", error.chain()),
        Happening::Failed(error) => eprintln!("doorless: no daemon could take its place: {}", error.chain()),
    }
}

/// A path if it has a slash, else a host and a port.
fn scraped(address: &str) -> anyhow::Result<Listen> {
    match address.rsplit_once(':') {
        _ if address.contains('/') => Ok(Listen::Unix(std::path::absolute(address)?)),
        Some((host, port)) => {
            let port = port.parse().with_context(|| format!("'{port}' is not the number of a port"))?;
            Ok(Listen::Tcp(host.trim_matches(['[', ']']).to_owned(), port))
        }
        None => bail!("--metrics takes the path of a socket, with a slash in it, or HOST:PORT, not '{address}'"),
    }
}

/// Tells what is served, and lines to try it with.
fn announce(served: &Served, missing: &[String], uri: Option<&str>, device: Option<&Path>) -> std::io::Result<()> {
    let chain = &served.chain;
    let mut out = std::io::stdout().lock();
    for (index, layer) in chain.layers.iter().enumerate() {
        let place = if index == 0 { "image" } else { "backed by" };
        let inspection = &layer.inspection;
        let rights = match layer.image.rights {
            manager::opening::Rights::ReadOnly => "read-only",
            manager::opening::Rights::ReadWrite => "read-write",
        };
        let path = layer.image.path.display();
        writeln!(out, "{place}: {path} ({}, {} bytes, {rights})", inspection.format, inspection.virtual_size)?;
        if let Some(data_file) = &layer.data_file {
            writeln!(out, "  data in: {} ({rights})", data_file.path.display())?;
        }
        for extent in &layer.extents {
            writeln!(out, "  extent: {} ({rights})", extent.path.display())?;
        }
    }
    if let Some(notice) = &chain.notice {
        writeln!(out, "note: {notice}")?;
    }
    let read_only = chain.layers[0].image.rights == manager::opening::Rights::ReadOnly;
    let snapshot = if read_only { ",snapshot=on" } else { "" };
    writeln!(out, "daemon: process {}, confined: it can open nothing any more", served.pid().unwrap_or_default())?;
    for layer in missing {
        writeln!(out, "  without the layer {layer}")?;
    }
    let file = served.file.as_ref().map(|file| file.mountpoint().display());
    if let (Some(file), Some(_)) = (&file, uri) {
        writeln!(out, "file: {file}")?;
    }
    if let (Some(device), true) = (device, uri.is_some() || file.is_some()) {
        writeln!(out, "vhost-user: {}", device.display())?;
    }
    match (uri, &file) {
        (Some(uri), _) => {
            writeln!(out, "ready: {uri}")?;
            writeln!(out)?;
            writeln!(out, "  nbdinfo '{uri}'")?;
            writeln!(out, "  nbdcopy '{uri}' copy.raw")?;
            writeln!(out, "  qemu-system-x86_64 -drive 'format=raw,if=virtio{snapshot},file={uri}'")?;
        }
        (None, Some(file)) => {
            let read_only = if read_only { " -r" } else { "" };
            writeln!(out, "ready: {file}")?;
            writeln!(out)?;
            writeln!(out, "  cp '{file}' copy.raw")?;
            writeln!(out, "  losetup --find --show{read_only} '{file}'")?;
        }
        (None, None) => {}
    }
    if let Some(device) = device.map(Path::display) {
        if uri.is_none() && file.is_none() {
            writeln!(out, "ready: {device}")?;
            writeln!(out)?;
        }
        writeln!(
            out,
            "  qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=ram,size=1G,share=on -machine memory-backend=ram \\"
        )?;
        writeln!(
            out,
            "    -chardev socket,id=disk,path='{device}',reconnect=1 -device vhost-user-blk-pci,chardev=disk"
        )?;
    }
    writeln!(out)?;
    writeln!(out, "Ctrl-C ends it.")?;
    out.flush()
}
