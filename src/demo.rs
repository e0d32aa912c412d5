// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `doorless demo`: the whole way of a disk, step by step, on a small image that this program carries.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::Args;
use manager::chain::{self, Policy};
use manager::daemon::Launch;
use manager::disk;
use manager::journal::Carried;
use manager::kept::{Kept, Restarts};
use manager::serve::uri;
use serde_json::{Value, json};

use crate::nbd_client::NbdClient;
use crate::{Confinement, PrivateSocket, table};

/// The disk: see fixtures/README.md.
const IMAGE: &[u8] = include_bytes!("../fixtures/demo.qcow2");
/// FNV-1a of the disk's 4 MiB as QEMU reads them.
const CONTENT: u64 = 0xb331_e331_d349_131c;
/// A sentence in a file of the disk.
const SENTENCE: &str = "This text lives in an ext4 file system";
/// The image that the demo writes out to be opened.
const IMAGE_NAME: &str = "demo.qcow2";

/// Options of `demo`.
#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    confinement: Confinement,
}

/// Runs the demo; the exit status says whether everything was as it should be.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let program = options.confinement.program();
    let private = PrivateSocket::new()?;
    let image = private.directory.join(IMAGE_NAME);
    let _remove = Remove(&image);
    fs::write(&image, IMAGE).with_context(|| format!("could not write '{}'", image.display()))?;
    say(1, &format!("A disk image with an ext4 file system was written: {} ({} bytes).", image.display(), IMAGE.len()));

    let chain = chain::open(&program, &image, &Policy { read_only: true, ..Policy::default() })?;
    let inspection = &chain.layers[0].inspection;
    say(
        2,
        &format!(
            "This process, the manager, opened it and looked at none of its bytes. A confined process did, and says:\n\
             format {}, {} bytes for a guest, built from no other file.",
            inspection.format, inspection.virtual_size
        ),
    );

    let mut daemon = Kept::start(&program, Launch::default(), Restarts { per_minute: 0 })?;
    say(
        3,
        &format!(
            "The daemon runs as process {}. Before it read a byte from anyone it gave up:",
            daemon.pid().unwrap_or_default()
        ),
    );
    let confinement = daemon.ask("query-confinement", json!({}))?;
    show(&layers(&confinement));

    let node = disk::attach(&mut daemon, &chain, "disk", true)?;
    let sets = daemon.ask("query-fdsets", json!({}))?;
    say(
        4,
        &format!(
            "The open descriptor was passed over a unix socket into fd set {}; the daemon knows the file as\n\
             /dev/fdset/{} and built the node '{node}' on it.",
            sets[0]["fdset-id"], sets[0]["fdset-id"]
        ),
    );

    let socket = private.path();
    let listener = UnixListener::bind(&socket)?;
    daemon.execute("getfd", json!({ "fdname": "nbd" }), &[Carried::other(listener.into())])?;
    daemon.execute("nbd-server-start", json!({ "addr": { "type": "fd", "data": { "str": "nbd" } } }), &[])?;
    daemon.execute("block-export-add", json!({ "type": "nbd", "id": "disk", "node-name": node, "name": "" }), &[])?;
    say(5, &format!("A listening socket was passed the same way, and the disk is served:\n{}", uri(&socket, "")));

    let content = read_all(&socket)?;
    let intact = fnv1a(&content) == CONTENT;
    ensure!(intact, "the disk was read back with other bytes than it holds: checksum {:#x}", fnv1a(&content));
    let start = find(&content, SENTENCE).context("the file on the disk was not found")?;
    let sentence: String = String::from_utf8_lossy(&content[start..]).lines().next().unwrap_or_default().to_owned();
    say(
        6,
        &format!(
            "A client read the disk back over NBD: {} bytes, checksum {CONTENT:#018x} as expected. hello.txt says:\n\"{sentence}\"",
            content.len()
        ),
    );

    say(7, "Now the daemon is asked to get out, by every way it knows:");
    let tried = daemon.ask("query-confinement", json!({ "try": true, "paths": ["/etc/passwd", image] }))?;
    let (rows, escaped) = attempts(&tried);
    show(&rows);
    daemon.stop()?;

    if escaped > 0 {
        println!("\n{escaped} attempts were NOT denied: this kernel or container lacks a layer of confinement.");
        return Ok(ExitCode::FAILURE);
    }
    println!(
        "\nEvery attempt was denied, and the disk was served all the same. Serve one of yours: doorless serve DISK"
    );
    Ok(ExitCode::SUCCESS)
}

fn layers(confinement: &Value) -> Vec<Vec<String>> {
    let heading = ["layer", "in force", "what it does"].map(str::to_owned).to_vec();
    let rows = confinement["layers"].as_array().into_iter().flatten().map(|layer| {
        let in_force = if layer["in-force"] == true { "yes" } else { "NO" };
        vec![plain(&layer["name"]), in_force.to_owned(), plain(&layer["detail"])]
    });
    std::iter::once(heading).chain(rows).collect()
}

/// The table of attempts, and how many were not denied.
fn attempts(confinement: &Value) -> (Vec<Vec<String>>, usize) {
    let heading = ["attempt", "outcome", "the kernel said"].map(str::to_owned).to_vec();
    let mut rows = vec![heading];
    let mut escaped = 0;
    for attempt in confinement["attempts"].as_array().into_iter().flatten() {
        let denied = attempt["denied"] == true;
        escaped += usize::from(!denied);
        let outcome = if denied { "denied" } else { "NOT DENIED" };
        rows.push(vec![plain(&attempt["what"]), outcome.to_owned(), plain(&attempt["errno"])]);
    }
    // No attempt is no proof.
    escaped += usize::from(rows.len() == 1);
    (rows, escaped)
}

fn read_all(socket: &Path) -> anyhow::Result<Vec<u8>> {
    let mut client = NbdClient::connect(socket, "")?;
    let mut content = vec![0; usize::try_from(client.size)?];
    for (index, piece) in content.chunks_mut(256 << 10).enumerate() {
        client.read(piece, (index as u64) * (256 << 10))?;
    }
    Ok(content)
}

/// FNV-1a, 64 bits: enough to tell a disk from another, and ten lines shorter than anything better.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

fn find(content: &[u8], sentence: &str) -> Option<usize> {
    content.windows(sentence.len()).position(|window| window == sentence.as_bytes())
}

fn plain(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn say(step: u32, text: &str) {
    println!("{}{step}. {}", if step == 1 { "" } else { "\n" }, text.replace('\n', "\n   "));
}

fn show(rows: &[Vec<String>]) {
    println!();
    for line in table::lines(rows) {
        println!("   {line}");
    }
}

/// Removes the image when the demo ends.
struct Remove<'a>(&'a Path);

impl Drop for Remove<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.0);
    }
}
