// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Clients of NBD that are not ours, each at what it does that others do not.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::fs::File;
use std::process::{Command, Stdio};

use harness::{DOORLESS, Running, Scratch, Serve, TestDaemon, judges, noise, python_with, run, run_in, text};
use rustix::process::Signal;
use serde_json::json;

const SIZE: usize = 8 << 20;

/// A raw disk of noise with a hole in it, served for writing.
fn served(scratch: &Scratch) -> Serve {
    let mut bytes = noise(SIZE, 11);
    bytes[2 << 20..3 << 20].fill(0);
    std::fs::write(scratch.path("disk"), bytes).unwrap();
    Serve::start(&["--format", "raw", &scratch.name("disk")])
}

/// What an nbdsh script of libnbd's does, and what it must see.
const SCRIPT: &str = r#"
import nbd, sys
uri = sys.argv[1]
h = nbd.NBD()
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri(uri)
assert h.can_multi_conn() and h.can_flush() and h.can_fua() and h.can_zero() and h.can_trim() and h.can_df()
assert h.can_fast_zero() and h.can_cache() and not h.is_read_only()
assert h.get_structured_replies_negotiated()
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
buf = h.pread(65536, 0)
h.pwrite(b'\x5a' * 65536, 4096, nbd.CMD_FLAG_FUA)
pieces = []
data = h.pread_structured(65536, 4096, lambda part, offset, kind, error: pieces.append((offset, len(part), kind)) and 0,
    nbd.CMD_FLAG_DF)
assert data == b'\x5a' * 65536 and pieces == [(4096, 65536, nbd.READ_DATA)], pieces
h.zero(65536, 1 << 20, nbd.CMD_FLAG_FUA)
assert h.pread(65536, 1 << 20) == bytearray(65536)
h.trim(1 << 20, 4 << 20)
h.cache(1 << 20, 0)
h.flush()
entries = []
h.block_status(h.get_size(), 0, lambda context, offset, extents, error: entries.append((context, offset, extents)) and 0)
assert entries[0][0] == 'base:allocation' and sum(entries[0][2][::2]) == h.get_size(), entries
one = []
h.block_status(h.get_size(), 0, lambda c, o, e, err: one.append(e) and 0, nbd.CMD_FLAG_REQ_ONE)
assert len(one[0]) == 2
# Errors come back with their number, and the session goes on.
h.set_strict_mode(0)
for call, wanted in [
    (lambda: h.pread(512, h.get_size()), 'EINVAL'),
    (lambda: h.pwrite(b'x', h.get_size()), 'ENOSPC'),
    (lambda: h.zero(1 << 30, 0), 'ENOSPC'),
    (lambda: h.trim(1 << 30, 0), 'EINVAL'),
]:
    try:
        call()
        raise AssertionError(wanted)
    except nbd.Error as e:
        assert e.errno == wanted, (e.errno, wanted)
# Sixteen reads under way at once, of which each gets its own bytes.
buffers = [nbd.Buffer(4096) for _ in range(16)]
cookies = [h.aio_pread(b, i * 131072) for i, b in enumerate(buffers)]
while cookies:
    h.poll(-1)
    cookies = [c for c in cookies if not h.aio_command_completed(c)]
for i, b in enumerate(buffers):
    assert b.to_bytearray() == h.pread(4096, i * 131072)
h.shutdown()
# Option by option.
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
names = []
h.opt_list(lambda name, description: names.append(name) and 0)
assert names == [''], names
contexts = []
h.opt_list_meta_context(lambda name: contexts.append(name) and 0)
assert contexts == ['base:allocation'], contexts
h.set_export_name('none')
try:
    h.opt_info()
    raise AssertionError('an export that is not there')
except nbd.Error:
    pass
h.set_export_name('')
h.opt_info()
assert h.get_size() == 8 << 20
h.opt_go()
h.shutdown()
"#;

#[test]
fn libnbds_scripts_see_every_command_and_option() {
    let Some(python) = python_with("libnbds_scripts_see_every_command_and_option", "nbd") else { return };
    let scratch = Scratch::new();
    let server = served(&scratch);
    run(python, &["-c", SCRIPT, &server.uri]);
}

#[test]
fn fio_verifies_what_it_wrote_over_four_connections() {
    if !judges("fio_verifies_what_it_wrote_over_four_connections", &["fio"]) {
        return;
    }
    if !run("fio", &["--enghelp"]).contains("\tnbd") {
        assert!(std::env::var_os("CI").is_none(), "CI must have a fio with the engine nbd");
        return eprintln!("skipped: fio_verifies_what_it_wrote_over_four_connections: this fio has no engine nbd");
    }
    let scratch = Scratch::new();
    let server = served(&scratch);
    let uri = format!("--uri={}", server.uri);
    let job = ["--name=v", "--ioengine=nbd", &uri, "--rw=randwrite", "--bs=4k", "--iodepth=16", "--numjobs=4"];
    let parts = ["--size=2m", "--offset_increment=2m", "--verify=crc32c", "--verify_fatal=1", "--randseed=7"];
    let said = run_in(&scratch.path("."), "fio", &[&job[..], &parts, &["--output-format=json"]].concat());
    let report: serde_json::Value = serde_json::from_str(&said[said.find('{').unwrap()..]).unwrap();
    for job in report["jobs"].as_array().unwrap() {
        assert_eq!(job["error"], 0, "{said}");
        assert_eq!(job["write"]["io_bytes"], 2 << 20);
    }
}

#[test]
fn nbd_client_lists_the_exports() {
    if !judges("nbd_client_lists_the_exports", &["nbd-client"]) {
        return;
    }
    let mut daemon = TestDaemon::start();
    let image = tempfile::NamedTempFile::new().unwrap();
    daemon.start_nbd();
    for name in ["one", "two"] {
        daemon.add_node(name, "raw", File::open(image.path()).unwrap(), true);
        daemon.export(name, false);
    }
    let program = ["/usr/sbin/nbd-client", "/sbin/nbd-client"].into_iter().find(|path| File::open(path).is_ok());
    let listed = Command::new(program.unwrap_or("nbd-client"))
        .args(["-l", "-unix", text(&daemon.socket())])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(listed.lines().any(|line| line == "one") && listed.lines().any(|line| line == "two"), "{listed}");
}

#[test]
fn nbdkits_nbd_plugin_passes_on_what_it_gets_from_us() {
    if !judges("nbdkits_nbd_plugin_passes_on_what_it_gets_from_us", &["nbdkit", "nbdcopy", "nbdinfo"]) {
        return;
    }
    let scratch = Scratch::new();
    let server = served(&scratch);
    let relay = scratch.name("relay");
    let source = format!("uri={}", server.uri);
    let _nbdkit = Running::start("nbdkit", &["-f", "-U", &relay, "nbd", &source], &relay, Signal::TERM);
    let through = format!("nbd+unix:///?socket={relay}");
    let copy = scratch.name("copy");
    run("nbdcopy", &[&through, &copy]);
    assert!(std::fs::read(&copy).unwrap() == std::fs::read(scratch.path("disk")).unwrap());
    std::fs::write(&copy, noise(SIZE, 12)).unwrap();
    run("nbdcopy", &[&copy, &through]);
    assert!(std::fs::read(scratch.path("disk")).unwrap() == noise(SIZE, 12));
    let maps = [&through, &server.uri].map(|uri| run("nbdinfo", &["--map", uri]));
    assert_eq!(maps[0], maps[1]);
}

/// A chain of three layers, each with something of its own, and one shorter than what is above it.
fn chain(scratch: &Scratch) -> [String; 3] {
    let [base, middle, top] = ["base.qcow2", "middle.qcow2", "top.qcow2"].map(|name| scratch.name(name));
    run("qemu-img", &["create", "-q", "-f", "qcow2", &base, "2M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 1M", &base]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &middle, "4M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 2 512k 1M", "-c", "write -z 1536k 64k", &middle]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &middle, "-F", "qcow2", &top, "8M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 3 256k 64k", "-c", "write -z 5M 64k", &top]);
    [base, middle, top]
}

#[test]
fn allocation_depths_are_those_that_qemu_nbd_tells() {
    let name = "allocation_depths_are_those_that_qemu_nbd_tells";
    if !judges(name, &["qemu-img", "qemu-io", "qemu-nbd", "nbdinfo"]) {
        return;
    }
    let scratch = Scratch::new();
    let [.., top] = chain(&scratch);
    let raw = scratch.name("raw");
    std::fs::write(&raw, noise(1 << 20, 1)).unwrap();
    File::options().write(true).open(&raw).unwrap().set_len(4 << 20).unwrap();
    for (image, format) in [(&top, "qcow2"), (&raw, "raw")] {
        let maps = [&["qemu-nbd"][..], &[DOORLESS, "nbd"]].map(|program| {
            let socket = scratch.name("socket");
            let options = [&program[1..], &["-t", "-r", "-A", "-f", format, "-k", &socket, image]].concat();
            let _server = Running::start(program[0], &options, &socket, Signal::TERM);
            let uri = format!("nbd+unix:///?socket={socket}");
            let map = run("nbdinfo", &["--map=qemu:allocation-depth", &uri]);
            let _ = std::fs::remove_file(socket);
            map
        });
        assert_eq!(maps[0], maps[1], "{format}");
    }
}

#[test]
fn exports_come_and_go_by_the_old_commands_too() {
    let mut daemon = TestDaemon::start();
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    daemon.add_node("disk", "raw", File::open(image.path()).unwrap(), true);
    assert_eq!(daemon.error("nbd-server-add", json!({ "device": "disk" })), "NBD server not running");
    daemon.start_nbd();
    daemon.ok("nbd-server-add", json!({ "device": "disk", "name": "old", "writable": true, "description": "d" }));
    assert_eq!(daemon.ok("query-block-exports", json!({}))[0]["id"], "old");
    assert_eq!(
        daemon.error("nbd-server-add", json!({ "device": "disk", "name": "old" })),
        "Block export id 'old' is already in use"
    );
    let bitmap = json!({ "device": "disk", "name": "b", "bitmap": "b0" });
    assert_eq!(daemon.error("nbd-server-add", bitmap), "Bitmap 'b0' is not found");
    let bitmaps = json!({
        "type": "nbd", "id": "b", "node-name": "disk", "bitmaps": ["b1", { "node": "disk", "name": "b2" }],
    });
    assert_eq!(daemon.error("block-export-add", bitmaps), "Bitmap 'b1' is not found");
    if judges("exports_come_and_go_by_the_old_commands_too", &["nbdinfo"]) {
        let told = run("nbdinfo", &["--json", &daemon.uri("old")]);
        assert!(told.contains("\"is_read_only\": true") && told.contains("\"description\": \"d\""), "{told}");
    }
    daemon.ok("nbd-server-remove", json!({ "name": "old" }));
    assert_eq!(daemon.error("nbd-server-remove", json!({ "name": "old" })), "Export 'old' is not found");
}
