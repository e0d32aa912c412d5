// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The same bytes to QEMU's storage daemon and to a session here: the answers must be the same bytes.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

use common::{State, TABLE, answers_to, skip};
use qmp::{Client, Session};
use serde_json::{Value, json};

const JUDGE: &str = "qemu-storage-daemon";
const HELLO: &[u8] = br#"{"execute":"qmp_capabilities","id":"hello"}"#;
/// Ends whatever is open, then marks the end of the answers.
const END: &[u8] = b"\x01\n{\"execute\":\"no-end\",\"id\":\"the end\"}\n";

/// A running judge.
struct Judge {
    child: Child,
    socket: std::path::PathBuf,
    /// Whether it prints one member on a line.
    pretty: bool,
    _dir: tempfile::TempDir,
}

impl Judge {
    /// `None`, after saying so, where the judge is not installed.
    fn start(test: &str, monitor: &str) -> Option<Judge> {
        let dir = tempfile::tempdir().unwrap();
        let (socket, ready) = (dir.path().join("monitor"), dir.path().join("pid"));
        let chardev = format!("socket,path={},server=on,wait=off,id=m", socket.display());
        let child = Command::new(JUDGE)
            .args(["--chardev", &chardev, "--monitor", monitor, "--pidfile", ready.to_str().unwrap()])
            .stdout(Stdio::null())
            .spawn();
        let Ok(mut child) = child else {
            skip(test, JUDGE);
            return None;
        };
        // It greets a client twice, or hangs up, that comes before its monitor is set up; the file is the last that it makes.
        while !ready.exists() {
            assert!(child.try_wait().unwrap().is_none(), "{JUDGE} has ended");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        Some(Judge { child, socket, pretty: monitor.contains("pretty=on"), _dir: dir })
    }

    /// The greeting, and all that is answered to `input` up to the mark.
    fn answers(&self, input: &[u8]) -> Vec<u8> {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        // Only so that a hung judge fails the test instead of hanging it.
        stream.set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
        let mut sender = stream.try_clone().unwrap();
        let input = [input, END].concat();
        std::thread::spawn(move || sender.write_all(&input));
        let mut all = Vec::new();
        let mut block = [0; 65536];
        while !ended(&all, self.pretty) {
            let n = stream.read(&mut block).unwrap();
            assert!(n > 0, "{:?}", String::from_utf8_lossy(&all));
            all.extend_from_slice(&block[..n]);
        }
        all
    }
}

impl Drop for Judge {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// How an answer ends.
fn end_of_answer(pretty: bool) -> &'static str {
    // Printed prettily, an object inside of an answer ends a line, too; only the answer's own brace begins one.
    if pretty { "\r\n}\r\n" } else { "}\r\n" }
}

fn ended(answers: &[u8], pretty: bool) -> bool {
    let mark = b"\"the end\"";
    let marked = answers.windows(mark.len()).position(|window| window == mark);
    marked.is_some_and(|at| answers[at..].ends_with(end_of_answer(pretty).as_bytes()))
}

/// What we answer, without the greeting.
fn ours(input: &[u8], pretty: bool) -> String {
    let bytes = answers_to(&mut Session::new(pretty), &mut State::default(), &[input, END].concat());
    String::from_utf8(bytes).unwrap()
}

/// What the judge answers, without its greeting (which tells another package).
fn theirs(judge: &Judge, input: &[u8], pretty: bool) -> String {
    let text = String::from_utf8(judge.answers(input)).unwrap();
    let end = end_of_answer(pretty);
    text[text.find(end).unwrap() + end.len()..].to_owned()
}

fn compare(judge: &Judge, inputs: impl IntoIterator<Item = Vec<u8>>) {
    for input in inputs {
        let shown = String::from_utf8_lossy(&input[..input.len().min(300)]).into_owned();
        assert_eq!(ours(&input, false), theirs(judge, &input, false), "input {shown:?}");
    }
}

/// Inputs of the corpus, each after a negotiation.
fn corpus() -> Vec<Vec<u8>> {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/qmp_parser");
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let inputs: Vec<_> = files.iter().map(|file| [HELLO, &std::fs::read(file).unwrap()].concat()).collect();
    assert!(inputs.len() >= 100, "{}", inputs.len());
    inputs
}

#[test]
fn corpus_is_answered_byte_for_byte_as_by_qemu() {
    let Some(judge) = Judge::start("corpus_is_answered_byte_for_byte_as_by_qemu", "chardev=m") else { return };
    compare(&judge, corpus());
}

#[test]
fn pretty_output_is_qemus() {
    let Some(judge) = Judge::start("pretty_output_is_qemus", "chardev=m,pretty=on") else { return };
    let input = br#"{"execute":"qmp_capabilities"}
        {"execute":"x","id":[{},[],{"a":[1,{"b":{}}],"c":"d"},null,[[]]]}"#;
    assert_eq!(ours(input, true), theirs(&judge, input, true));
}

#[test]
fn random_token_soup_is_answered_as_by_qemu() {
    const PIECES: &[&[u8]] = &[
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
        b"{",
        b"}",
        b"\"id\"",
        b"'a'",
        b"\"execute\":\"x\"",
        b"1",
        b"-",
        b"0",
        b"1.5",
        b".",
        b"e",
        b"true",
        b"null",
        b"nul",
        b"N",
        b" ",
        b"\n",
        b"\t",
        b"\"",
        b"'",
        b"\\",
        b"\\u00e9",
        b"\x01",
        b"\xff",
        b"\xc3\xa9",
        b"\xc3",
        b"\x7f",
        b"%",
        b"+",
        b"\"id\":",
        b"\"arguments\":{}",
        b"\"b\":[",
        b"],",
        b"\"exec-oob\":\"y\"",
    ];
    let Some(judge) = Judge::start("random_token_soup_is_answered_as_by_qemu", "chardev=m") else { return };
    let mut seed = 0x2545_F491_4F6C_DD1D_u64;
    let mut next = |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        usize::try_from(seed >> 33).unwrap() % below
    };
    compare(
        &judge,
        (0..400).map(|_| {
            let mut input = HELLO.to_vec();
            for _ in 0..next(25) {
                input.extend_from_slice(PIECES[next(PIECES.len())]);
            }
            input
        }),
    );
}

#[test]
fn wrong_arguments_are_told_as_by_qemu() {
    let Some(judge) = Judge::start("wrong_arguments_are_told_as_by_qemu", "chardev=m") else { return };
    let blockdev = [
        json!({}),
        json!({ "driver": "zz" }),
        json!({ "driver": 1 }),
        json!({ "driver": "raw" }),
        json!({ "driver": "raw", "file": 1 }),
        json!({ "driver": "raw", "file": null }),
        json!({ "driver": "raw", "file": [] }),
        json!({ "driver": "raw", "file": {} }),
        json!({ "driver": "raw", "file": { "driver": "zz" } }),
        json!({ "driver": "raw", "file": { "driver": "file", "filename": 1 } }),
        json!({ "driver": "raw", "file": { "driver": "file", "filename": "a", "bogus": 1 } }),
        json!({ "driver": "raw", "file": { "driver": "raw", "file": { "driver": "raw" } } }),
        json!({ "driver": "raw", "file": "x", "size": -1, "offset": "a" }),
        json!({ "driver": "raw", "file": "x", "size": 1.5 }),
        json!({ "driver": "raw", "file": "x", "size": "1" }),
        json!({ "driver": "raw", "file": "x", "size": true }),
        json!({ "driver": "raw", "file": "x", "size": 9_223_372_036_854_775_808_u64 }),
        json!({ "driver": "raw", "file": "x", "zzz": 1 }),
        json!({ "driver": "null-co", "filename": "x" }),
        json!({ "driver": "null-co", "latency-ns": "1" }),
        json!({ "driver": "null-co", "latency-ns": 1.0 }),
        json!({ "driver": "null-co", "read-zeroes": 1 }),
        json!({ "driver": "raw", "node-name": 1 }),
        json!({ "driver": "raw", "read-only": "on" }),
        json!({ "driver": "raw", "cache": [] }),
        json!({ "driver": "raw", "cache": { "direct": 1 } }),
        json!({ "driver": "raw", "cache": { "dire": 1 } }),
        json!({ "driver": "raw", "discard": "x" }),
        json!({ "driver": "raw", "discard": null }),
        json!({ "driver": "qcow2", "file": "x", "backing": 3 }),
        json!({ "driver": "qcow2", "file": "x", "backing": { "driver": null } }),
        json!({ "driver": "qcow2", "file": "x", "overlap-check": 5 }),
        json!({ "driver": "qcow2", "file": "x", "overlap-check": "zz" }),
        json!({ "driver": "qcow2", "file": "x", "overlap-check": { "template": "zz" } }),
    ];
    let blockdev = blockdev.into_iter().map(|arguments| ("blockdev-add", arguments));
    let unix = json!({ "type": "unix", "data": { "path": "/nonexistent/x" } });
    let others = [
        ("blockdev-reopen", json!({})),
        ("blockdev-reopen", json!({ "options": {} })),
        ("blockdev-reopen", json!({ "options": [1] })),
        ("blockdev-reopen", json!({ "options": [{ "driver": "raw", "file": "x" }, { "drive": "zz" }] })),
        ("blockdev-reopen", json!({ "options": [{ "driver": "raw", "file": { "driver": "raw", "file": {} } }] })),
        ("nbd-server-start", json!({ "addr": { "type": "unix" } })),
        ("nbd-server-start", json!({ "addr": { "type": "zz", "data": {} } })),
        ("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": 1 } } })),
        ("nbd-server-start", json!({ "addr": unix, "max-connections": 4_294_967_296_u64 })),
        ("nbd-server-start", json!({ "addr": unix, "max-connections": -1 })),
        ("nbd-server-start", json!({ "addr": unix, "max-connections": 1.5 })),
        ("nbd-server-start", json!({ "addr": { "type": "inet", "data": { "host": "a", "port": "1", "to": 65536 } } })),
        ("nbd-server-start", json!({ "addr": { "type": "inet", "data": { "host": "a", "port": "1", "to": "1" } } })),
        ("block-export-add", json!({ "type": "nbd", "id": "a" })),
        ("block-export-add", json!({ "type": "nbd", "id": "a", "node-name": "x", "bitmaps": [1] })),
        ("block-export-add", json!({ "type": "nbd", "id": "a", "node-name": "x", "bitmaps": [{ "node": "a" }] })),
        (
            "block-export-add",
            json!({ "type": "nbd", "id": "a", "node-name": "x", "bitmaps": [{ "node": "a", "name": "b", "c": 1 }] }),
        ),
        ("query-version", json!({ "a": 1 })),
        ("query-commands", json!({ "a": 1 })),
        ("qmp_capabilities", json!({ "enable": ["oob"] })),
        ("qmp_capabilities", json!({ "enable": ["bogus"] })),
        ("qmp_capabilities", json!({ "enable": [1] })),
        ("qmp_capabilities", json!({ "a": 1 })),
    ];
    compare(
        &judge,
        blockdev.chain(others).map(|(name, arguments)| {
            [HELLO, json!({ "execute": name, "arguments": arguments }).to_string().as_bytes()].concat()
        }),
    );
}

#[test]
fn before_negotiation_and_with_oob_answers_are_qemus() {
    let Some(judge) = Judge::start("before_negotiation_and_with_oob_answers_are_qemus", "chardev=m") else { return };
    let capabilities = |enable: &str| format!(r#"{{"execute":"qmp_capabilities","arguments":{{"enable":{enable}}}}}"#);
    let oob = capabilities(r#"["oob"]"#);
    let mut inputs: Vec<String> = vec![
        r#"{"execute":"x","id":3}"#.into(),
        r#"{"execute":"query-version","arguments":{"a":1}}"#.into(),
        r#"{"exec-oob":"qmp_capabilities"}"#.into(),
        r#"[]{"id":1}{"execute":1}nul {]"#.into(),
        r#"{"execute":"qmp_capabilities","arguments":{"a":1}}{"execute":"x"}"#.into(),
        capabilities(r#"["bogus"]"#),
        capabilities("[1]"),
        capabilities("1"),
        capabilities(r#"["oob","oob"]"#) + r#"{"exec-oob":"x"}"#,
        capabilities("[]") + r#"{"exec-oob":"x"}"#,
    ];
    for after in [
        r#"{"exec-oob":"query-version","id":1}"#,
        r#"{"exec-oob":"a","execute":"b"}"#,
        r#"{"exec-oob":"nope","id":1}"#,
        r#"{"exec-oob":1,"id":1}"#,
        r#"{"exec-oob":"query-version","arguments":{"a":1}}"#,
        r#"{"exec-oob":"query-version","arguments":1}"#,
    ] {
        inputs.push(oob.clone() + after);
    }
    compare(&judge, inputs.into_iter().map(String::into_bytes));
}

#[test]
fn introspection_of_common_commands_is_qemus() {
    let Some(judge) = Judge::start("introspection_of_common_commands_is_qemus", "chardev=m") else { return };
    let mut client = Client::new(UnixStream::connect(&judge.socket).unwrap()).unwrap();
    let answer = client.execute("query-qmp-schema", serde_json::Map::new(), &[]).unwrap();
    let theirs = by_name(&answer);
    let introspection = TABLE.introspection();
    let ours = by_name(&introspection);
    for command in ["qmp_capabilities", "query-version", "query-commands", "query-qmp-schema"] {
        let mut seen = Vec::new();
        assert_eq!(spelled_out(&ours, command, &mut seen), spelled_out(&theirs, command, &mut Vec::new()), "{command}");
    }
    // The parts that the test's table takes over whole.
    for (command, member) in [("blockdev-reopen", "options"), ("nbd-server-start", "max-connections")] {
        let shape = |infos: &BTreeMap<String, Value>| {
            let arguments = &infos[infos[command]["arg-type"].as_str().unwrap()];
            let members = arguments["members"].as_array().unwrap();
            let mut member = members.iter().find(|info| info["name"] == member).unwrap().clone();
            let ty = infos[member["type"].as_str().unwrap()].clone();
            member["type"] = ty["meta-type"].clone();
            member
        };
        assert_eq!(shape(&ours), shape(&theirs), "{command}");
    }
}

fn by_name(schema: &Value) -> BTreeMap<String, Value> {
    let infos = schema.as_array().unwrap();
    let map: BTreeMap<_, _> =
        infos.iter().map(|info| (info["name"].as_str().unwrap().to_owned(), info.clone())).collect();
    assert_eq!(map.len(), infos.len());
    map
}

/// The description of `name` with every type's own in place of its number.
fn spelled_out(infos: &BTreeMap<String, Value>, name: &str, seen: &mut Vec<String>) -> Value {
    if seen.iter().any(|outer| outer == name) {
        return json!("recursive");
    }
    seen.push(name.to_owned());
    let mut info = infos[name].clone();
    if name.starts_with(|c: char| c.is_ascii_digit() || c == '[') {
        info["name"] = json!("numbered");
    }
    for key in ["arg-type", "ret-type", "element-type"] {
        if let Some(Value::String(inner)) = info.get(key).cloned() {
            info[key] = spelled_out(infos, &inner, seen);
        }
    }
    for list in ["members", "variants"] {
        for part in info.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            if let Some(Value::String(inner)) = part.get("type").cloned() {
                part["type"] = spelled_out(infos, &inner, seen);
            }
        }
    }
    seen.pop();
    info
}

#[test]
fn options_are_refused_as_by_qemu() {
    let long = "a".repeat(128);
    let mut texts: Vec<String> = [
        "",
        "raw",
        "=x",
        "driver=raw",
        "driver",
        "driver=",
        "x",
        "a=1",
        ",driver=null-co",
        "driver=null-co,=x",
        "driver=null-co,,x,node-name=a",
        "driver=null-co,,",
        "help",
        "?",
        "driver=null-co,help",
        "help,a=1",
        "helpx",
        "driver=null-co,helpx",
        "{",
        "{}",
        r#"{"driver":"zz"} x"#,
        r#"{"driver":"zz"}{}"#,
        r#"{"driver":1}"#,
        "{@}",
        r#"{"driver":"null-co","a":""#,
        r#"{"driver":nu"#,
        r#"{"driver":"null-co","a":1}}"#,
        "driver=raw,offset=1k",
        "driver=raw,file.driver=zz",
        "driver=raw,file.driver=null-co,file.zz=1",
        "driver=raw,file.driver=null-co,offset=1k",
        "driver=raw,file.driver=null-co,cache=x",
    ]
    .map(str::to_owned)
    .into();
    for rest in [
        "size",
        "size=1k",
        "size=1 ",
        "size=9223372036854775808",
        "size=--1",
        "size=0x",
        "size=1.0",
        "size=",
        "size=08",
        "read-zeroes=maybe",
        "read-zeroes=On",
        "read-only",
        "cache.direct=x",
        "cache=x",
        "cache.direct=on,cache=x",
        "cache=x,cache.direct=on",
        "cache..direct=on",
        ".x=1",
        "x.=1",
        "9x=1",
        "0=1",
        "x!=1",
        "X_Y=1",
        "cache.0=1",
        "cache.1=1",
        "cache.0=1,cache.x=2",
        "cache.x=1,cache.0=2",
        "cache.00=1",
        "cache.01=1",
        "a.2147483648=1",
        "driver=raw",
        "é=1",
        "__com.x_y=1",
        "__com.x=1",
        "__9com_x=1",
        "_x=1",
        "x_=1",
        "x--=1",
        "latency-ns=1k",
        "latency-ns=",
        "latency-ns=18446744073709551616",
        "size.x=1",
        "size.0=1",
        "node-name.x=1",
        "discard.x=1",
        "discard=zz",
        "a.9x=1",
        "a.9=1,a.b.c=1",
        "cache.direct=on,cache.no-flush=1",
        "a.0.b=1,a.1=2",
        "a.0=1,a.00=2",
        "a.b.0=1,a.b.x=2",
        "a.b.1=1",
        "a.b=1,a.b.c=2",
        "zzz.a=1",
        "?=1",
        "help=1",
        "no-help",
    ] {
        texts.push(format!("driver=null-co,node-name=a,{rest}"));
    }
    texts.extend([long.clone() + "=1", long.clone() + ".b=1", format!("a.{long}=1"), format!("a={long}")]);
    for text in texts {
        let value = TABLE.option(qmp::Type::Named("BlockdevOptions"), &text, Some("driver"));
        let error = value.expect_err(&text).desc;
        let Ok(judge) = Command::new(JUDGE).args(["--blockdev", &text]).output() else {
            return skip("options_are_refused_as_by_qemu", JUDGE);
        };
        let said = String::from_utf8(judge.stderr).unwrap();
        assert_eq!(format!("{JUDGE}: --blockdev {text}: {error}\n"), said);
    }
}
