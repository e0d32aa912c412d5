// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What was asked of a daemon, as it tells it: in QEMU's words, in its own, and to scrapers.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use harness::{Scratch, Serve, TestDaemon, judges, python_with, run, text};
use manager::monitor::Monitor;
use serde_json::{Value, json};

fn memory(len: u64) -> std::fs::File {
    let file = std::fs::File::from(rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

/// Every member's path and the type of its value.
fn shape(value: &Value, at: &str, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(members) => members.iter().for_each(|(key, value)| shape(value, &format!("{at}.{key}"), into)),
        Value::Array(items) => items.iter().for_each(|item| shape(item, &format!("{at}[]"), into)),
        Value::Bool(_) => drop(into.insert(format!("{at}: bool"))),
        Value::Number(_) => drop(into.insert(format!("{at}: number"))),
        _ => drop(into.insert(format!("{at}: text"))),
    }
}

#[test]
fn blockstats_have_the_shape_of_qemus_and_count_what_was_asked() {
    let test = "blockstats_have_the_shape_of_qemus_and_count_what_was_asked";
    if !judges(test, &["qemu-storage-daemon", "qemu-io"]) {
        return;
    }
    let scratch = Scratch::new();
    std::fs::write(scratch.path("image"), [0; 1 << 20]).unwrap();
    let listen = format!("socket,id=qmp,path={},server=on,wait=off", scratch.name("qmp"));
    let mut qemu = Command::new("qemu-storage-daemon")
        .args(["--blockdev", &format!("driver=file,filename={},node-name=f", scratch.name("image"))])
        .args(["--blockdev", "driver=raw,file=f,node-name=n", "--chardev", &listen, "--monitor", "chardev=qmp"])
        .args(["--pidfile", &scratch.name("pid")])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    while !scratch.path("pid").exists() {
        assert!(qemu.try_wait().unwrap().is_none(), "QEMU has ended");
    }
    let mut client = qmp::Client::new(UnixStream::connect(scratch.path("qmp")).unwrap()).unwrap();
    let mut theirs =
        |command: &str, arguments: Value| client.execute(command, arguments.as_object().unwrap().clone(), &[]).unwrap();
    let mut daemon = TestDaemon::start();
    daemon.add_node("n", "raw", memory(1 << 20), false);
    assert_eq!(daemon.ok("query-block", json!({})), theirs("query-block", json!({})));
    assert_eq!(daemon.ok("query-blockstats", json!({})), theirs("query-blockstats", json!({})));
    let nodes = json!({ "query-nodes": true });
    let (mut ours_has, mut theirs_has) = (BTreeSet::new(), BTreeSet::new());
    shape(&daemon.ok("query-blockstats", nodes.clone()), "", &mut ours_has);
    shape(&theirs("query-blockstats", nodes.clone()), "", &mut theirs_has);
    theirs("quit", json!({}));
    qemu.wait().unwrap();
    // What a driver did to its host is not counted.
    theirs_has.retain(|member| !member.contains("driver-specific"));
    assert_eq!(ours_has, theirs_has);

    daemon.start_nbd();
    daemon.export("n", true);
    let requests = ["write 0 64k", "read 4k 128k", "discard 0 64k", "write -z 64k 32k", "flush"];
    let arguments: Vec<&str> = requests.iter().flat_map(|request| ["-c", request]).collect();
    run("qemu-io", &[&["-f", "raw"], &*arguments, &[&*daemon.uri("n")]].concat());
    let all = daemon.ok("query-blockstats", nodes);
    let stats = |node: usize| all[node]["stats"].clone();
    assert_eq!(
        (&all[0]["node-name"], &all[1]["parent"]["node-name"]),
        (&all[1]["parent"]["node-name"], &all[0]["node-name"])
    );
    assert_eq!(all[1]["node-name"], "n");
    let n = stats(1);
    assert_eq!((&n["rd_operations"], &n["rd_bytes"]), (&json!(1), &json!(128 << 10)));
    assert_eq!((&n["wr_operations"], &n["wr_bytes"]), (&json!(2), &json!(96 << 10)));
    assert_eq!((&n["unmap_operations"], &n["unmap_bytes"]), (&json!(1), &json!(64 << 10)));
    assert!(n["flush_operations"].as_u64().unwrap() >= 1);
    assert!(n["rd_total_time_ns"].as_u64().unwrap() > 0);
    assert_eq!((&n["wr_highest_offset"], &stats(0)["wr_highest_offset"]), (&json!(96 << 10), &json!(96 << 10)));
}

#[test]
fn every_client_is_counted_for_itself_its_export_and_its_node() {
    let test = "every_client_is_counted_for_itself_its_export_and_its_node";
    if !judges(test, &["qemu-io"]) {
        return;
    }
    let mut daemon = TestDaemon::start();
    daemon.add_node("n", "raw", memory(1 << 20), false);
    daemon.start_nbd();
    daemon.export("n", false);
    let uri = daemon.uri("n");
    run("qemu-io", &["-r", "-f", "raw", "-c", "read 0 64k", "-c", "read 0 64k", &uri]);
    // A second client stays connected: qemu-io ends with its standard input.
    let mut staying = Command::new("qemu-io");
    staying.args(["-r", "-f", "raw", &uri]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut staying = staying.spawn().unwrap();
    let mut input = staying.stdin.take().unwrap();
    writeln!(input, "read 0 4k").unwrap();
    let mut said = [0; 64];
    while !String::from_utf8_lossy(&said).contains("read 4096/4096") {
        let len = staying.stdout.as_mut().unwrap().read(&mut said).unwrap();
        assert!(len > 0);
    }
    // A batch is counted once it has been answered: a moment after the client has heard it.
    let all = loop {
        let all = daemon.ok("query-statistics", json!({}));
        if all["exports"][0]["clients"][0]["requests"].to_string().contains("read") {
            break all;
        }
    };
    let count = |requests: &Value| {
        let read = requests.as_array().unwrap().iter().find(|count| count["kind"] == "read").unwrap().clone();
        let latencies: u64 = read["latencies"].as_array().unwrap().iter().map(|number| number.as_u64().unwrap()).sum();
        assert_eq!(json!(latencies), read["operations"]);
        (read["operations"].as_u64().unwrap(), read["bytes"].as_u64().unwrap())
    };
    let export = &all["exports"][0];
    assert_eq!((&export["id"], &export["type"], &export["node-name"]), (&json!("n"), &json!("nbd"), &json!("n")));
    let clients = export["clients"].as_array().unwrap();
    assert_eq!(clients.len(), 1, "one has left");
    let (mine, together) = (count(&clients[0]["requests"]), count(&export["requests"]));
    assert!(mine.1 < together.1 && together.1 >= (132 << 10), "{mine:?} of {together:?}");
    // A daemon in a process namespace of its own has no number for those outside.
    let user = format!("user {}", rustix::process::geteuid().as_raw());
    let peer = clients[0]["peer"].as_str().unwrap();
    assert!(peer == user || peer == format!("process {}, {user}", staying.id()), "{peer}");
    let node = all["nodes"].as_array().unwrap().iter().find(|node| node["node-name"] == "n").unwrap();
    assert_eq!(count(&node["requests"]), together);
    assert_eq!(all["latency-ends"].as_array().unwrap().len(), 47);
    drop(input);
    staying.wait().unwrap();
}

/// Says `request` to a scraper's socket and hears the answer.
fn http(socket: &Path, request: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(request).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn scrapers_read_openmetrics_on_a_passed_socket() {
    let test = "scrapers_read_openmetrics_on_a_passed_socket";
    let (true, Some(python)) = (judges(test, &["qemu-io"]), python_with(test, "prometheus_client.openmetrics.parser"))
    else {
        return;
    };
    let scratch = Scratch::new();
    let socket = scratch.path("metrics");
    let mut daemon = TestDaemon::start();
    daemon.add_node("n", "raw", memory(1 << 20), false);
    daemon.start_nbd();
    let refused = daemon
        .error("metrics-server-start", json!({ "addr": { "type": "inet", "data": { "host": "::", "port": "9" } } }));
    assert!(refused.starts_with("Could not listen on a socket of type 'inet': this daemon binds nothing"), "{refused}");
    assert_eq!(daemon.error("metrics-server-stop", json!({})), "Metrics server not running");
    daemon.ok_with("getfd", json!({ "fdname": "m" }), UnixListener::bind(&socket).unwrap());
    let start = json!({ "addr": { "type": "fd", "data": { "str": "m" } } });
    daemon.ok("metrics-server-start", start.clone());
    assert_eq!(daemon.error("metrics-server-start", start), "Metrics server already running");
    daemon.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "n", "name": "e", "writable": true }));
    run("qemu-io", &["-f", "raw", "-c", "write 0 64k", "-c", "read 0 64k", "-c", "flush", &daemon.uri("e")]);
    let answer = http(&socket, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\nContent-Type: application/openmetrics-text; version=1.0.0"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
    let script = "import sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families
for family in text_string_to_metric_families(sys.stdin.read()):
    for sample in family.samples:
        print(family.type, sample.name, sorted(sample.labels.items()), float(sample.value))
";
    std::fs::write(scratch.path("body"), body).unwrap();
    let parsed = run("sh", &["-c", &format!("exec {python} -c \"$0\" < {}", scratch.name("body")), script]);
    let has = |words: &[&str]| parsed.lines().any(|line| words.iter().all(|word| line.contains(word)));
    let labels = "('export', 'e'), ('kind', 'write'), ('node', 'n'), ('type', 'nbd')";
    assert!(has(&["counter doorless_requests_total", labels, " 1.0"]), "{parsed}");
    assert!(has(&["counter doorless_request_bytes_total", labels, " 65536.0"]), "{parsed}");
    assert!(has(&["histogram doorless_request_duration_seconds_bucket", "('le', '+Inf')", " 1.0"]), "{parsed}");
    assert!(has(&["gauge doorless_node_size_bytes", "1048576.0"]), "{parsed}");
    assert!(has(&["gauge doorless_fdset_descriptors"]), "{parsed}");

    // Who does not play along is hung up on, and the next one is answered.
    assert!(http(&socket, b"POST / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405 "));
    assert_eq!(http(&socket, &[b'x'; 9000]), "");
    let mut silent = UnixStream::connect(&socket).unwrap();
    silent.shutdown(Shutdown::Write).unwrap();
    assert_eq!(silent.read_to_end(&mut Vec::new()).unwrap(), 0);
    assert!(http(&socket, b"GET / HTTP/1.0\r\n\r\n").ends_with("# EOF\n"));
    daemon.ok("metrics-server-stop", json!({}));
    assert!(UnixStream::connect(&socket).is_err());
}

#[test]
fn serve_takes_scrapers_and_its_books_stay_right() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("image"), [0; 4096]).unwrap();
    let (metrics, monitor) = (scratch.path("metrics"), scratch.path("monitor"));
    let socket = scratch.name("socket");
    let serve = Serve::start(&[
        "--format",
        "raw",
        &scratch.name("image"),
        "--metrics",
        text(&metrics),
        "--monitor",
        text(&monitor),
        "--socket",
        &socket,
    ]);
    assert!(
        http(&metrics, b"GET /metrics HTTP/1.1\r\n\r\n")
            .contains("doorless_node_size_bytes{node=\"disk\",driver=\"raw\"} 4096\n")
    );
    let waiting = UnixStream::connect(&metrics).unwrap();
    if rustix::process::geteuid().is_root() {
        let audit = Monitor::connect(&monitor).unwrap().audit().unwrap();
        assert!(audit.is_clean(), "{audit:?}");
    }
    drop(waiting);
    assert!(serve.interrupt().success());
    assert!(!metrics.exists());
}
