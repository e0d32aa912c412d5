// SPDX-License-Identifier: Apache-2.0 OR MIT
//! NBD over TLS, judged by GnuTLS's clients (libnbd and QEMU), with certificates that OpenSSL made.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use harness::{Scratch, Serve, TestDaemon, judges, noise, run, run_in};
use serde_json::{Value, json};

const SIZE: usize = 4 << 20;

/// Authorities, a server and clients: `pki/` is a directory of everything as QEMU names it, with the client `alice`.
struct Pki(Scratch);

impl Pki {
    fn new() -> Pki {
        let pki = Pki(Scratch::new());
        for dir in ["pki", "bob", "stranger"] {
            std::fs::create_dir(pki.0.path(dir)).unwrap();
        }
        pki.authority("pki");
        pki.authority("stranger");
        std::fs::copy(pki.0.path("pki/ca-cert.pem"), pki.0.path("bob/ca-cert.pem")).unwrap();
        let server = "subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n";
        pki.certificate("pki", "pki", "server", "/CN=localhost", server);
        let client = "extendedKeyUsage=clientAuth\n";
        pki.certificate("pki", "pki", "client", "/C=GB/O=Example, Inc/CN=alice", client);
        pki.certificate("pki", "bob", "client", "/C=GB/O=Example, Inc/CN=bob", client);
        pki.certificate("stranger", "stranger", "client", "/C=GB/O=Example, Inc/CN=alice", client);
        // Clients trust the server, not their own authority.
        std::fs::copy(pki.0.path("pki/ca-cert.pem"), pki.0.path("stranger/ca-cert.pem")).unwrap();
        pki
    }

    fn dir(&self, name: &str) -> String {
        self.0.name(name)
    }

    fn file(&self, name: &str) -> File {
        File::open(self.0.path("pki").join(name)).unwrap()
    }

    fn openssl(&self, arguments: &[&str]) {
        run_in(&self.0.path("."), "openssl", arguments);
    }

    fn authority(&self, dir: &str) {
        let (key, certificate) = (format!("{dir}/ca-key.pem"), format!("{dir}/ca-cert.pem"));
        let subject = format!("/CN=the {dir} authority");
        let new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30"];
        self.openssl(&[&new[..], &["-subj", &subject, "-keyout", &key, "-out", &certificate]].concat());
    }

    fn certificate(&self, authority: &str, dir: &str, role: &str, subject: &str, extensions: &str) {
        std::fs::write(self.0.path("extensions"), format!("basicConstraints=CA:FALSE\n{extensions}")).unwrap();
        let (key, certificate) = (format!("{dir}/{role}-key.pem"), format!("{dir}/{role}-cert.pem"));
        let new = ["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-out", "request"];
        self.openssl(&[&new[..], &["-subj", subject, "-keyout", &key]].concat());
        let (ca, ca_key) = (format!("{authority}/ca-cert.pem"), format!("{authority}/ca-key.pem"));
        let sign = ["x509", "-req", "-in", "request", "-CAcreateserial", "-days", "30", "-extfile", "extensions"];
        self.openssl(&[&sign[..], &["-CA", &ca, "-CAkey", &ca_key, "-out", &certificate]].concat());
    }
}

const TOOLS: [&str; 5] = ["openssl", "nbdinfo", "nbdcopy", "qemu-img", "qemu-io"];

/// Whether a client whose credentials are in `dir` gets the size.
fn gets_in(uri: &str, dir: &str) -> bool {
    let uri = format!("{uri}{}tls-certificates={dir}", if uri.contains('?') { '&' } else { '?' });
    let output = Command::new("nbdinfo").args(["--size", &uri]).stdin(Stdio::null()).output().unwrap();
    let size = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert_eq!(output.status.success(), size == SIZE.to_string(), "{size}");
    output.status.success()
}

/// Credentials as a set that stands for the directory.
fn add_credentials(daemon: &mut TestDaemon, pki: &Pki, files: &[&str], more: Value) -> Result<(), String> {
    let set = 7;
    let _ = daemon.daemon.execute("remove-fd", json!({ "fdset-id": set }), &[]);
    for name in files {
        daemon.ok_with("add-fd", json!({ "fdset-id": set, "opaque": name }), pki.file(name));
    }
    let mut object = json!({ "qom-type": "tls-creds-x509", "id": "tls", "endpoint": "server", "dir": "/dev/fdset/7" });
    for (key, value) in more.as_object().unwrap() {
        object[key] = value.clone();
    }
    match daemon.daemon.execute("object-add", object, &[]) {
        Ok(_) => Ok(()),
        Err(manager::Error::Daemon { source, .. }) => Err(source.to_string()),
        Err(other) => panic!("{other}"),
    }
}

const ALL: [&str; 3] = ["ca-cert.pem", "server-cert.pem", "server-key.pem"];

#[test]
fn a_disk_served_over_tls_reads_as_it_is_and_wants_a_certificate() {
    if !judges("a_disk_served_over_tls_reads_as_it_is_and_wants_a_certificate", &TOOLS) {
        return;
    }
    let (pki, scratch) = (Pki::new(), Scratch::new());
    let (disk, copy) = (scratch.name("disk"), scratch.name("copy"));
    std::fs::write(&disk, noise(SIZE, 3)).unwrap();
    let alice = pki.dir("pki");
    let server = Serve::start(&["--format", "raw", "--tls-creds", &alice, &disk]);
    assert!(server.uri.starts_with("nbds+unix:"), "{}", server.uri);
    assert!(gets_in(&server.uri, &alice) && gets_in(&server.uri, &pki.dir("bob")));
    assert!(!gets_in(&server.uri, &pki.dir("stranger")), "a certificate of another authority");
    run("nbdcopy", &[&format!("{}&tls-certificates={alice}", server.uri), &copy]);
    assert!(std::fs::read(&copy).unwrap() == noise(SIZE, 3));
    // Writes, and QEMU's client with its extended headers.
    let socket = server.uri.split("socket=").nth(1).unwrap();
    let creds = format!("tls-creds-x509,id=t,endpoint=client,dir={alice}");
    let node = format!("driver=nbd,server.type=unix,server.path={socket},export=,tls-creds=t,tls-hostname=localhost");
    let io = ["--object", &creds, "-c", "write -P 0x5a 64k 1M", "-c", "flush", "-c", "write -zu 2M 1M"];
    run("qemu-io", &[&io[..], &["-c", "read -P 0x5a 64k 1M", "-c", "read -P 0 2M 1M", "--image-opts", &node]].concat());
    let here = std::fs::read(&disk).unwrap();
    assert!(here[64 << 10..][..1 << 20].iter().all(|&byte| byte == 0x5a));
    assert!(here[2 << 20..][..1 << 20].iter().all(|&byte| byte == 0));
    let mapped = run("qemu-img", &["map", "--output=json", "--object", &creds, "--image-opts", &node]);
    assert!(mapped.contains("\"zero\": true"), "{mapped}");
    // In clear there is nothing but the hint.
    let clear = Command::new("nbdinfo").arg(server.uri.replacen("nbds", "nbd", 1)).output().unwrap();
    assert!(!clear.status.success());
}

#[test]
fn only_named_clients_come_in_and_the_name_is_as_qemus_server_has_it() {
    let name = "only_named_clients_come_in_and_the_name_is_as_qemus_server_has_it";
    if !judges(name, &TOOLS) || !judges(name, &["qemu-nbd"]) {
        return;
    }
    let (pki, scratch) = (Pki::new(), Scratch::new());
    std::fs::write(scratch.path("disk"), vec![0; SIZE]).unwrap();
    let (disk, socket, alice, bob) = (scratch.name("disk"), scratch.name("socket"), pki.dir("pki"), pki.dir("bob"));
    let named = "C=GB,O=Example\\, Inc,CN=alice";
    let doubled = named.replace(',', ",,");
    let creds = format!("tls-creds-x509,id=t,endpoint=server,verify-peer=yes,dir={alice}");
    let rule = format!("authz-simple,id=a,identity={doubled}");
    for program in [&["qemu-nbd"][..], &[harness::DOORLESS, "nbd"]] {
        let options = ["-t", "-f", "raw", "-k", &socket, "--object", &creds, "--object", &rule, "--tls-creds=t"];
        let mut command = Command::new(program[0]);
        let mut child = command.args(&program[1..]).args(options).args(["--tls-authz=a", &disk]).spawn().unwrap();
        while UnixStream::connect(&socket).is_err() {
            assert_eq!(child.try_wait().unwrap(), None, "{program:?}");
            std::thread::yield_now();
        }
        let uri = format!("nbds+unix:///?socket={socket}");
        let came = [gets_in(&uri, &alice), gets_in(&uri, &bob)];
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        child.wait().unwrap();
        let _ = std::fs::remove_file(&socket);
        assert_eq!(came, [true, false], "{program:?}");
    }
    let server = Serve::start(&["--tls-creds", &alice, "--tls-client", "*,CN=b*", "--format", "raw", &disk]);
    assert!(!gets_in(&server.uri, &alice) && gets_in(&server.uri, &bob));
}

#[test]
fn credentials_come_as_a_set_and_rules_are_looked_up_when_clients_come() {
    if !judges("credentials_come_as_a_set_and_rules_are_looked_up_when_clients_come", &TOOLS) {
        return;
    }
    let pki = Pki::new();
    let mut daemon = TestDaemon::start();
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(SIZE as u64).unwrap();
    daemon.add_node("disk", "raw", File::open(image.path()).unwrap(), true);
    add_credentials(&mut daemon, &pki, &ALL, json!({})).unwrap();
    daemon.ok("remove-fd", json!({ "fdset-id": 7 }));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("nbds://localhost:{}/disk", listener.local_addr().unwrap().port());
    daemon.ok_with("getfd", json!({ "fdname": "nbd" }), &listener);
    let start = json!({ "addr": { "type": "fd", "data": { "str": "nbd" } }, "tls-creds": "tls", "tls-authz": "rule" });
    daemon.ok("nbd-server-start", start);
    daemon.export("disk", false);
    let (alice, bob) = (pki.dir("pki"), pki.dir("bob"));
    assert!(!gets_in(&uri, &alice), "no rule is no entry");
    let rules = json!([{ "match": "*CN=bob*", "policy": "deny", "format": "glob" }]);
    daemon.ok("object-add", json!({ "qom-type": "authz-list", "id": "rule", "policy": "allow", "rules": rules }));
    assert!(gets_in(&uri, &alice) && !gets_in(&uri, &bob));
    daemon.ok("object-del", json!({ "id": "rule" }));
    daemon.ok("object-add", json!({ "qom-type": "authz-list", "id": "rule", "policy": "allow" }));
    assert!(gets_in(&uri, &bob));
    daemon.ok("object-del", json!({ "id": "tls" }));
    assert!(gets_in(&uri, &alice), "a server that runs keeps its credentials");
}

#[test]
fn credentials_that_cannot_serve_are_refused_with_the_cause() {
    if !judges("credentials_that_cannot_serve_are_refused_with_the_cause", &["openssl"]) {
        return;
    }
    let pki = Pki::new();
    let mut daemon = TestDaemon::start();
    let mut refused = |files: &[&str], more: Value| add_credentials(&mut daemon, &pki, files, more).unwrap_err();
    assert!(refused(&ALL[1..], json!({})).contains("ca-cert.pem"));
    assert!(refused(&ALL[..2], json!({})).contains("server-key.pem"));
    assert!(refused(&ALL, json!({ "endpoint": "client" })).contains("'endpoint' must be 'server'"));
    assert!(refused(&ALL, json!({ "priority": "NORMAL" })).contains("'priority' is not supported"));
    assert!(refused(&ALL, json!({ "dir": "/etc/pki" })).contains("this daemon opens no files"));
    assert!(refused(&ALL, json!({ "dir": "/dev/fdset/99" })).contains("99"));
    // A client's key does not fit the server's certificate.
    let set = json!({ "fdset-id": 8, "opaque": "server-cert.pem" });
    daemon.ok_with("add-fd", set, pki.file("server-cert.pem"));
    daemon.ok_with("add-fd", json!({ "fdset-id": 8, "opaque": "server-key.pem" }), pki.file("client-key.pem"));
    let object = json!({
        "qom-type": "tls-creds-x509", "id": "x", "endpoint": "server", "verify-peer": false, "dir": "/dev/fdset/8",
    });
    let said = daemon.error("object-add", object.clone());
    assert!(said.contains("the server certificate and its key cannot be used"), "{said}");
    daemon.ok("remove-fd", json!({ "fdset-id": 8 }));
    let mut noise = tempfile::NamedTempFile::new().unwrap();
    noise.write_all(&[0xff; 100]).unwrap();
    for name in ["server-cert.pem", "server-key.pem"] {
        daemon.ok_with("add-fd", json!({ "fdset-id": 8, "opaque": name }), File::open(noise.path()).unwrap());
    }
    assert!(daemon.error("object-add", object).contains("server certificate"));
    // Without verification the authority is not needed, and no rule can go by a certificate.
    add_credentials(&mut daemon, &pki, &ALL[1..], json!({ "verify-peer": false })).unwrap();
    let start = |more: Value| {
        let mut start = json!({ "addr": { "type": "fd", "data": { "str": "nbd" } } });
        more.as_object().unwrap().iter().for_each(|(key, value)| start[key] = value.clone());
        start
    };
    let said = daemon.error("nbd-server-start", start(json!({ "tls-creds": "tls", "tls-authz": "a" })));
    assert!(said.contains("verify-peer"), "{said}");
    assert_eq!(
        daemon.error("nbd-server-start", start(json!({ "tls-creds": "none" }))),
        "No TLS credentials with id 'none'"
    );
    assert!(daemon.error("nbd-server-start", start(json!({ "tls-authz": "a" }))).contains("without 'tls-creds'"));
}

/// A connection to a TLS server's socket, with greeting and flags exchanged.
fn greeted(path: PathBuf) -> UnixStream {
    let mut socket = UnixStream::connect(path).unwrap();
    let mut greeting = [0; 18];
    socket.read_exact(&mut greeting).unwrap();
    socket.write_all(&[0, 0, 0, 3]).unwrap();
    socket
}

fn option(number: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap();
    [b"IHAVEOPT", &number.to_be_bytes()[..], &len.to_be_bytes(), payload].concat()
}

/// The kind of the next option reply.
fn reply(socket: &mut UnixStream) -> u32 {
    let mut header = [0; 20];
    socket.read_exact(&mut header).unwrap();
    let len = u32::from_be_bytes(header[16..].try_into().unwrap());
    socket.read_exact(&mut vec![0; len as usize]).unwrap();
    u32::from_be_bytes(header[12..16].try_into().unwrap())
}

/// bad-inputs 68.
#[test]
fn what_is_said_in_clear_around_starttls_counts_for_nothing() {
    const TLS_REQUIRED: u32 = 0x8000_0005;
    const INVALID: u32 = 0x8000_0003;
    if !judges("what_is_said_in_clear_around_starttls_counts_for_nothing", &["openssl"]) {
        return;
    }
    let (pki, scratch) = (Pki::new(), Scratch::new());
    std::fs::write(scratch.path("disk"), vec![0; SIZE]).unwrap();
    let socket = scratch.name("socket");
    let arguments = ["--format", "raw", "--socket", &socket, "--tls-creds", &pki.dir("pki"), &scratch.name("disk")];
    let _server = Serve::start(&arguments);
    let (go, starttls) = (option(7, &[0, 0, 0, 0, 0, 0]), option(5, &[]));
    // Everything but ABORT and STARTTLS, known or not, is told to begin TLS.
    let mut client = greeted(scratch.path("socket"));
    for number in [3, 4, 6, 7, 8, 9, 10, 11, 12345] {
        client.write_all(&option(number, &[0; 6])).unwrap();
        assert_eq!(reply(&mut client), TLS_REQUIRED, "option {number}");
    }
    client.write_all(&option(5, &[1])).unwrap();
    assert_eq!(reply(&mut client), INVALID, "STARTTLS takes no data");
    client.write_all(&option(2, &[])).unwrap();
    assert_eq!(reply(&mut client), 1, "ABORT");
    let mut client = greeted(scratch.path("socket"));
    client.write_all(&option(1, b"")).unwrap();
    assert!(ends_without_a_word_of_nbd(&mut client), "EXPORT_NAME has no other answer");
    // Options behind STARTTLS in the same write: taken for TLS, never obeyed.
    let mut client = greeted(scratch.path("socket"));
    client.write_all(&[starttls.clone(), go.clone(), option(3, &[])].concat()).unwrap();
    assert_eq!(reply(&mut client), 1);
    assert!(ends_without_a_word_of_nbd(&mut client));
    // And after the acknowledgement.
    let mut client = greeted(scratch.path("socket"));
    client.write_all(&starttls).unwrap();
    assert_eq!(reply(&mut client), 1);
    client.write_all(&go).unwrap();
    assert!(ends_without_a_word_of_nbd(&mut client));
}

/// Whether the server hangs up, perhaps after an alert of TLS, without anything of NBD.
fn ends_without_a_word_of_nbd(socket: &mut UnixStream) -> bool {
    let mut said = Vec::new();
    // What is unread when a socket is closed resets the connection.
    let _ = socket.read_to_end(&mut said);
    !said.windows(4).any(|bytes| bytes == [0x00, 0x03, 0xe8, 0x89]) && said.len() < 64
}
