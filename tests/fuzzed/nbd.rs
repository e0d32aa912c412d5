// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Clients of NBD: in negotiation, in transmission, and around TLS.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use block::Graph;
use export::Workers;
use export::nbd::tls::{Credentials, Pem, Tls};
use export::nbd::{Bitmap, DirtyRuns, Limits, Server, Settings};

use super::{memory, node};

/// A server and where it listens.
type Target = OnceLock<Mutex<(Server, PathBuf)>>;

static CLEAR: Target = OnceLock::new();
static ENCRYPTED: Target = OnceLock::new();

/// An NBD client from its first byte.
pub fn nbd_handshake(data: &[u8]) {
    talk(&CLEAR, None, &[data]);
}

/// The same, of a server that wants TLS.
pub fn nbd_tls(data: &[u8]) {
    let pem = Pem {
        ca_cert: include_bytes!("../../fixtures/tls/ca-cert.pem").to_vec(),
        ca_crl: Vec::new(),
        server_cert: include_bytes!("../../fixtures/tls/server-cert.pem").to_vec(),
        server_key: include_bytes!("../../fixtures/tls/server-key.pem").to_vec(),
    };
    let tls = || Tls { credentials: Credentials::x509(&pem, true).unwrap(), authorization: None };
    talk(&ENCRYPTED, Some(&tls), &[data]);
}

/// An NBD client that has chosen the export with every context; `data` are its requests, and the first byte says whether they
/// have extended headers.
pub fn nbd_requests(data: &[u8]) {
    transmit(data);
}

/// The same; how many bytes the server said.
pub fn transmit(data: &[u8]) -> usize {
    const FLAGS: &[u8] = b"\0\0\0\x03";
    const STRUCTURED: &[u8] = b"IHAVEOPT\0\0\0\x08\0\0\0\0";
    const EXTENDED: &[u8] = b"IHAVEOPT\0\0\0\x0b\0\0\0\0";
    // NBD_OPT_SET_META_CONTEXT and NBD_OPT_GO for the export "".
    const CONTEXTS: &[u8] = b"IHAVEOPT\0\0\0\x0a\0\0\0\x4b\0\0\0\0\0\0\0\x03\
        \0\0\0\x0fbase:allocation\0\0\0\x15qemu:allocation-depth\0\0\0\x13qemu:dirty-bitmap:b";
    const GO: &[u8] = b"IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0";
    let style = if data.first() == Some(&0x21) { EXTENDED } else { STRUCTURED };
    talk(&CLEAR, None, &[FLAGS, style, CONTEXTS, GO, data])
}

/// Every other KiB is dirty.
struct Stripes;

impl DirtyRuns for Stripes {
    fn run(&self, offset: u64, len: u64) -> io::Result<(u64, bool)> {
        Ok((len.min(1024 - offset % 1024), (offset / 1024).is_multiple_of(2)))
    }
}

/// Says all of `pieces` to a server with one writable export, and hears what it has to say: how many bytes.
fn talk(target: &Target, tls: Option<&dyn Fn() -> Tls>, pieces: &[&[u8]]) -> usize {
    let server = target.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap().keep();
        let path = directory.join("nbd");
        let listener = UnixListener::bind(&path).unwrap();
        let limits = Limits { connections: 4, ..Limits::default() };
        let server = Server::start(listener.into(), limits, tls.map(|tls| tls()), Workers::new(), || ()).unwrap();
        let node = node(&mut Graph::new(), "file", Some(memory(&[7; 1 << 20])), &[], true).unwrap();
        let bitmaps = vec![Bitmap { name: "b".into(), runs: Arc::new(Stripes) }];
        server.add(Settings { writable: true, allocation_depth: true, bitmaps, ..Settings::new("", node) }).unwrap();
        Mutex::new((server, path))
    });
    let server = server.lock().unwrap_or_else(PoisonError::into_inner);
    let socket = UnixStream::connect(&server.1).unwrap();
    let mut answers = socket.try_clone().unwrap();
    let reader = std::thread::spawn(move || {
        let mut sink = [0; 65536];
        let mut heard = 0;
        while let Ok(read @ 1..) = answers.read(&mut sink) {
            heard += read;
        }
        heard
    });
    let mut writer = &socket;
    for piece in pieces {
        if writer.write_all(piece).is_err() {
            break;
        }
    }
    let _ = socket.shutdown(Shutdown::Write);
    reader.join().unwrap()
}
