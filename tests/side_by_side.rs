// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The same sequences of commands to QEMU and to the daemon must give the same answers. Fd sets are held against
//! `qemu-system-x86_64 -machine none`, the block layer's commands against `qemu-storage-daemon`, which knows no fd sets.
//!
//! Numbers of descriptors and names of files are normalised. What differs on purpose is listed with its reason in
//! [`DIFFERENCES`]; an entry that no longer occurs fails the test like a difference that is not listed.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "side_by_side/block.rs"]
mod block;
mod harness;
#[path = "side_by_side/overlays.rs"]
mod overlays;
#[path = "side_by_side/side.rs"]
mod side;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::Command;

use harness::{DOORLESS, Scratch, judges};
use serde_json::{Value, json};
use side::{Side, Step};

/// How many generated sequences are run against `qemu-system-x86_64`.
const SEQUENCES: u64 = 200;

/// Differences that are meant: a text that only one of the two says, and why.
const DIFFERENCES: &[(&str, &str)] = &[
    (
        "Cannot change the option 'driver'",
        "a reopen with another driver: QEMU looks at the other driver's options first and complains about one of them",
    ),
    ("Value '-1' is out of range for parameter 'size'", "QEMU takes a negative size, and the job fails"),
];

/// A small generator of numbers, the same on every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % limit
    }

    fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.below(of.len())]
    }
}

/// Values for `fdset-id`, good and bad.
const SETS: &[&str] = &[
    "0",
    "1",
    "2",
    "3",
    "7",
    "2147483647",
    "2147483648",
    "9223372036854775807",
    "-1",
    "-9223372036854775808",
    "9223372036854775808",
    "18446744073709551616",
    "1.0",
    "1e0",
    "true",
    "null",
    "\"1\"",
    "[]",
    "{}",
    "01",
    "-0",
];
const OPAQUES: &[&str] = &[
    "\"\"",
    "\"disk\"",
    "'single \\' quoted'",
    "\"\\u00e9\\u0000\\ud83d\\ude00\\/\\b\"",
    "\"é😀\u{7f}\"",
    "1",
    "null",
    "[\"a\"]",
    "\"\\ud800\"",
    "\"\\x\"",
];
const IDS: &[&str] = &[
    "1",
    "-1",
    "1.5",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "\"x\"",
    "null",
    "true",
    "[1,[2]]",
    "{\"a\":{\"b\":null}}",
    "\"\\u0001\"",
];
const NAMES: &[&str] = &["\"n0\"", "\"n1\"", "\"\"", "\"0n\"", "\"é\"", "1", "null"];
/// Whole messages that are wrong in themselves, after which the parser stands at a beginning.
const WRONG: &[&str] = &[
    "{}",
    "[]",
    "42",
    "\"text\"",
    "null",
    "true",
    "{\"execute\":1}",
    "{\"execute\":null}",
    "{\"execute\":\"\"}",
    "{\"execute\":\"nothing\"}",
    "{\"execute\":\"add_fd\"}",
    "{\"execute\":\"ADD-FD\"}",
    "{\"arguments\":{}}",
    "{\"execute\":\"query-fdsets\",\"arguments\":[]}",
    "{\"execute\":\"query-fdsets\",\"arguments\":null}",
    "{\"execute\":\"query-fdsets\",\"arguments\":{\"x\":1}}",
    "{\"execute\":\"query-fdsets\",\"extra\":1}",
    "{\"exec-oob\":\"query-fdsets\"}",
    "{\"execute\":\"query-fdsets\",\"exec-oob\":\"query-fdsets\"}",
    "{\"execute\":\"query-fdsets\",\"execute\":\"query-fdsets\"}",
    "{\"execute\":\"query-fdsets\",}",
    "{\"execute\" \"x\"}",
    "{execute:\"x\"}",
    "{\"a\":}",
    "[1,]",
    "[1 2]",
    "{\"a\":1 \"b\":2}",
    "{1:2}",
    "]",
    "}",
    "{\"a\":\"\\ud800\"}\n",
    "{\"a\":\"\\q\"}\n",
    "nul\n",
    "True\n",
    "0x10\n",
    "012 ",
    "-\n",
    "1.\n",
    "1e\n",
    "NaN\n",
    "'single'",
    "{'execute':'query-fdsets'}",
    "\"a\tb\"\n",
    "\u{1}",
    "@\n",
    "//\n",
    "{\"execute\":\"qmp_capabilities\"}",
    "{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[\"bogus\"]}}",
    "{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":\"oob\"}}",
    "{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[1]}}",
    "{\"execute\":\"remove-fd\"}",
    "{\"execute\":\"closefd\"}",
    "{\"execute\":\"getfd\"}",
    "{\"execute\":\"add-fd\",\"arguments\":{\"fdset-id\":1,\"fdset_id\":2}}",
    "{\"execute\":\"add-fd\",\"arguments\":{\"opaque\":1,\"fdset-id\":\"x\"}}",
    " \t\r\n{ \"execute\" : \"query-fdsets\" } \n",
    "{\"execute\":\"query-fdsets\"}{\"execute\":\"query-fdsets\",\"id\":2}",
    "\u{feff}\n",
];

fn sequence(seed: u64) -> Vec<Step> {
    let mut dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut steps = Vec::new();
    if dice.below(4) == 0 {
        for _ in 0..=dice.below(3) {
            let fds = dice.below(2);
            steps.push(Step::new(
                dice.one(&[" ", "{\"execute\":\"add-fd\"}", "[]", "{\"execute\":\"x\",\"id\":1}"]),
                fds,
            ));
        }
    }
    let enable = dice.one(&[
        "",
        "",
        ",\"arguments\":{}",
        ",\"arguments\":{\"enable\":[]}",
        ",\"arguments\":{\"enable\":[\"oob\"]}",
    ]);
    steps.push(Step::new(format!("{{\"execute\":\"qmp_capabilities\"{enable}}}"), 0));
    // Handles of descriptors that are in a set for certain.
    let mut live: Vec<usize> = Vec::new();
    let mut count = 0;
    for _ in 0..3 + dice.below(10) {
        let id = if dice.below(3) == 0 { format!(",\"id\":{}", dice.one(IDS)) } else { String::new() };
        let fds = [1, 1, 1, 0, 2][dice.below(5)];
        match dice.below(12) {
            0..=2 => {
                let set = dice.one(&["0", "1", "2", "7"]);
                steps
                    .push(Step::new(format!("{{\"execute\":\"add-fd\",\"arguments\":{{\"fdset-id\":{set}}}{id}}}"), 1));
                live.push(count);
                count += 1;
            }
            3 => {
                steps.push(Step::new(format!("{{\"execute\":\"add-fd\"{id}}}"), 1));
                live.push(count);
                count += 1;
            }
            4 => {
                // Only the wrong ones: what they add, if anything, is no handle.
                let set = dice.one(&SETS[8..]);
                let opaque = dice.one(OPAQUES);
                let text = format!(
                    "{{\"execute\":\"add-fd\",\"arguments\":{{\"fdset-id\":{set},\"opaque\":{opaque}}}{id}}}\n"
                );
                if !["-0"].contains(&set) {
                    steps.push(Step::new(text, fds));
                }
            }
            5 => {
                let opaque = dice.one(&OPAQUES[..5]);
                steps.push(Step::new(
                    format!("{{\"execute\":\"add-fd\",\"arguments\":{{\"opaque\":{opaque}}}{id}}}"),
                    1,
                ));
                live.push(count);
                count += 1;
            }
            6 if !live.is_empty() => {
                let handle = live.remove(dice.below(live.len()));
                let set = dice.one(&["0", "1", "2"]);
                steps.push(Step::new(
                    format!("{{\"execute\":\"remove-fd\",\"arguments\":{{\"fdset-id\":{set},\"fd\":${handle}}}{id}}}"),
                    0,
                ));
            }
            6 | 7 => {
                let (set, fd) = (
                    dice.one(SETS),
                    dice.one(&["", ",\"fd\":9999", ",\"fd\":-1", ",\"fd\":\"x\"", ",\"fd\":2147483648"]),
                );
                steps.push(Step::new(
                    format!("{{\"execute\":\"remove-fd\",\"arguments\":{{\"fdset-id\":{set}{fd}}}{id}}}"),
                    dice.below(2),
                ));
                live.clear();
            }
            8 => {
                let command = dice.one(&["getfd", "closefd"]);
                let name = dice.one(NAMES);
                steps.push(Step::new(
                    format!("{{\"execute\":\"{command}\",\"arguments\":{{\"fdname\":{name}}}{id}}}"),
                    fds.min(1),
                ));
            }
            9 => steps.push(Step::new(format!("{{\"execute\":\"query-fdsets\"{id}}}"), dice.below(2))),
            10 => {
                // The descriptor rides on the second half.
                steps.push(Step { more: true, ..Step::new("{\"execute\":\"add-fd\",", 0) });
                steps.push(Step::new("\"arguments\":{\"fdset-id\":3}}", 1));
                live.push(count);
                count += 1;
            }
            _ => steps.push(Step::new(dice.one(WRONG), dice.below(8) / 7)),
        }
    }
    steps.push(Step::new("{\"execute\":\"query-fdsets\"}", 0));
    steps
}

/// Compares two answers; an excused difference is noted.
fn compare(step: &Step, theirs: &str, ours: &str, excused: &mut BTreeSet<&'static str>, found: &mut Vec<String>) {
    if theirs == ours {
        return;
    }
    match DIFFERENCES.iter().find(|(text, _)| theirs.contains(text) != ours.contains(text)) {
        Some((text, _)) => drop(excused.insert(text)),
        None => found.push(format!("{:?} with {} descriptors\n  QEMU: {theirs}  ours: {ours}", step.text, step.fds)),
    }
}

#[test]
fn two_hundred_sequences_on_fd_sets_are_answered_as_qemu_answers_them() {
    if !judges("two_hundred_sequences_on_fd_sets_are_answered_as_qemu_answers_them", &["qemu-system-x86_64"]) {
        return;
    }
    let scratch = Scratch::new();
    let start = |number: usize| {
        let [theirs, ours] = ["theirs", "ours"].map(|side| format!("{side}{number}"));
        let monitor = format!("unix:{},server=on,wait=off", scratch.name(&theirs));
        let options = ["-machine", "none", "-nodefaults", "-display", "none", "-qmp", &monitor];
        let path = scratch.path(&theirs);
        let theirs = (Side::start(Command::new("qemu-system-x86_64").args(options), &path, Vec::new()), path);
        let chardev = format!("socket,id=m,path={},server=on,wait=off", scratch.name(&ours));
        let options = ["daemon", "--fd-policy=compat", "--chardev", &chardev, "--monitor", "m"];
        let path = scratch.path(&ours);
        (theirs, (Side::start(Command::new(DOORLESS).args(options), &path, Vec::new()), path))
    };
    let mut aborted = 0;
    let (mut theirs, mut ours) = start(aborted);
    let disk = tempfile::tempfile().unwrap();
    let (mut excused, mut found) = (BTreeSet::new(), Vec::new());
    let (mut answers, mut errors) = (0, 0);
    for seed in 0..SEQUENCES {
        let steps = sequence(seed);
        let clean_up = ["n0", "n1", "", "é"]
            .map(|name| format!("{{\"execute\":\"closefd\",\"arguments\":{{\"fdname\":\"{name}\"}}}}"));
        let steps: Vec<Step> = steps.into_iter().chain(clean_up.map(|text| Step::new(text, 0))).collect();
        // When QEMU's main thread gets no processor for a while, the errors of one malformed message fill the queue in front of it,
        // and its other thread aborts (`QMP_REQ_QUEUE_LEN_MAX`).
        let played: Vec<(String, String)> = loop {
            let play = |step| Some((theirs.0.try_play(step, &disk)?, ours.0.play(step, &disk)));
            if let Some(played) = steps.iter().map(play).collect() {
                break played;
            }
            aborted += 1;
            assert!(aborted < 10, "QEMU aborts again and again");
            (theirs, ours) = start(aborted);
        };
        let before = found.len();
        for (step, (theirs, ours)) in steps.iter().zip(played) {
            answers += ours.lines().count();
            errors += ours.lines().filter(|line| line.contains("\"error\"") && line.contains("desc")).count();
            compare(step, &theirs, &ours, &mut excused, &mut found);
        }
        if found.len() > before {
            found.push(format!("... in sequence {seed}"));
        }
        for (side, path) in [&mut theirs, &mut ours] {
            for set in ["0", "1", "2", "3", "4", "5", "6", "7", "8", "2147483647", "2147483648", "9223372036854775807"]
            {
                side.play(
                    &Step::new(format!("{{\"execute\":\"remove-fd\",\"arguments\":{{\"fdset-id\":{set}}}}}"), 0),
                    &disk,
                );
            }
            side.reconnect(path);
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
    assert!(
        errors > 500 && answers - errors > 1000,
        "{answers} answers, {errors} of them errors: the generator says too little"
    );
}

/// Members of a node that are compared; QEMU has more that say how its block layer is built.
const NODE_MEMBERS: [&str; 5] = ["node-name", "drv", "ro", "file", "dirty-bitmaps"];

#[test]
fn commands_on_nodes_exports_and_objects_are_answered_as_qemu_storage_daemon_answers_them() {
    let test = "commands_on_nodes_exports_and_objects_are_answered_as_qemu_storage_daemon_answers_them";
    if !judges(test, &["qemu-storage-daemon"]) {
        return;
    }
    let scratch = Scratch::new();
    let disks = ["disk0", "disk1"].map(|name| {
        std::fs::write(scratch.path(name), vec![0; 65536]).unwrap();
        scratch.name(name)
    });
    let excused = beside_qemu_storage_daemon(&scratch, &disks, block::COMMANDS, &NODE_MEMBERS);
    let stale: Vec<_> = DIFFERENCES.iter().filter(|(text, _)| !excused.contains(text)).collect();
    assert!(stale.is_empty(), "these differences are gone: {stale:?}");
}

#[test]
fn overlays_come_as_with_qemu_storage_daemon() {
    if !judges("overlays_come_as_with_qemu_storage_daemon", &["qemu-storage-daemon", "qemu-img"]) {
        return;
    }
    let scratch = Scratch::new();
    let disks = ["disk0", "disk1", "disk2", "disk3", "disk4"].map(|name| {
        let (path, size) = (scratch.name(name), if name == "disk3" { "2M" } else { "1M" });
        let below = if name == "disk4" { &["-u", "-F", "qcow2", "-b", "disk0"][..] } else { &[] };
        harness::run("qemu-img", &[&["create", "-q", "-f", "qcow2"], below, &[&path, size]].concat());
        path
    });
    let members = ["node-name", "drv", "ro", "backing_file_depth"];
    beside_qemu_storage_daemon(&scratch, &disks, &overlays::commands(), &members);
}

/// Gives the commands to both; differences that are meant and occurred.
fn beside_qemu_storage_daemon<S: AsRef<str>>(
    scratch: &Scratch,
    disks: &[String],
    commands: &[S],
    members: &[&str],
) -> BTreeSet<&'static str> {
    const MARKS: [&str; 5] = ["@0", "@1", "@2", "@3", "@4"];
    let chardev = |name: &str| format!("socket,id=m,path={},server=on,wait=off", scratch.name(name));
    let mut theirs_replaced: Vec<_> = disks.iter().cloned().zip(MARKS).collect();
    theirs_replaced.push((scratch.name("none"), "@none"));
    let mut theirs = Side::start(
        Command::new("qemu-storage-daemon").args(["--chardev", &chardev("theirs"), "--monitor", "m"]),
        &scratch.path("theirs"),
        theirs_replaced,
    );
    let mut ours_replaced: Vec<_> =
        (10..).map(|set| format!("/dev/fdset/{set}")).zip(MARKS).take(disks.len()).collect();
    ours_replaced.push(("/dev/fdset/99".to_owned(), "@none"));
    let mut ours = Side::start(
        Command::new(DOORLESS).args(["daemon", "--chardev", &chardev("ours"), "--monitor", "m"]),
        &scratch.path("ours"),
        ours_replaced,
    );
    for disk in disks {
        std::fs::copy(disk, format!("{disk}-ours")).unwrap();
    }
    let (mut excused, mut found) = (BTreeSet::new(), Vec::new());
    for (place, text) in commands.iter().map(AsRef::as_ref).enumerate() {
        let side_text = |side: &Side| {
            side.replaced.iter().fold(text.to_owned(), |text, (own, common)| {
                text.replace(&format!("\"{common}\""), &format!("\"{own}\""))
            })
        };
        let (their_text, our_text) = (side_text(&theirs), side_text(&ours));
        let nothing = tempfile::tempfile().unwrap();
        let (their_answer, our_answer) = if text == "@start" {
            let (their_nbd, our_nbd) = (scratch.name("nbd"), scratch.name("our-nbd"));
            let start = |address: Value| {
                let command = json!({ "execute": "nbd-server-start", "arguments": { "addr": address } });
                Step::new(command.to_string(), 0)
            };
            let _ = std::fs::remove_file(&our_nbd);
            let listener = OwnedFd::from(UnixListener::bind(&our_nbd).unwrap());
            let listener = File::from(listener);
            ours.play(&Step::new(r#"{"execute":"getfd","arguments":{"fdname":"nbd"}}"#, 1), &listener);
            (
                theirs.play(&start(json!({ "type": "unix", "data": { "path": their_nbd } })), &nothing),
                ours.play(&start(json!({ "type": "fd", "data": { "str": "nbd" } })), &nothing),
            )
        } else {
            (theirs.play(&Step::new(their_text, 0), &nothing), ours.play(&Step::new(our_text, 0), &nothing))
        };
        let trimmed = |answer: &str| -> String {
            answer
                .lines()
                .map(|line| {
                    let mut answer: Value = serde_json::from_str(line).unwrap();
                    for node in
                        answer["return"].as_array_mut().into_iter().flatten().filter(|_| text.contains("named-block"))
                    {
                        node.as_object_mut().unwrap().retain(|key, _| members.contains(&key.as_str()));
                    }
                    format!("{answer}\n")
                })
                .collect()
        };
        compare(&Step::new(text, 0), &trimmed(&their_answer), &trimmed(&our_answer), &mut excused, &mut found);
        if place == 0 {
            // From here on our sets hold what QEMU opens.
            for (set, disk) in (10..).zip(disks) {
                let add = Step::new(json!({ "execute": "add-fd", "arguments": { "fdset-id": set } }).to_string(), 1);
                // A copy: they would lock each other out.
                let disk = format!("{disk}-ours");
                ours.play(&add, &File::open(&disk).unwrap());
                ours.play(&add, &File::options().read(true).write(true).open(&disk).unwrap());
            }
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
    excused
}
