// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Every way out is tried and closed; a way that is opened on purpose is found; what the documentation says of layers is true.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use harness::{DOORLESS, doorless, program};
use manager::daemon::{Daemon, Launch};
use rustix::process::geteuid;
use serde_json::{Value, json};

/// Fewer would mean that some bait was not tried.
const ATTEMPTS: usize = 120;

fn attest(arguments: &[&str]) -> (bool, Value) {
    let (status, out, err) = doorless(&[&["attest", "--json"], arguments].concat());
    let report: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{err}"));
    assert!(report["attempts"].as_array().unwrap().len() >= ATTEMPTS);
    assert_eq!(report["held"].as_bool(), Some(status.success()));
    (status.success(), report)
}

/// Names of the attempts that were not denied.
fn open(report: &Value) -> Vec<String> {
    let attempts = report["attempts"].as_array().unwrap().iter().filter(|attempt| attempt["denied"] != true);
    attempts.map(|attempt| attempt["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn every_way_out_is_closed_for_this_user() {
    let (held, report) = attest(&[]);
    assert!(held, "{:?}", open(&report));
}

#[test]
fn every_way_out_is_closed_for_an_ordinary_user() {
    if !geteuid().is_root() {
        eprintln!("skipped: every_way_out_is_closed_for_an_ordinary_user: the test above is this one");
        return;
    }
    let place = tempfile::tempdir_in("/tmp").unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = place.path().join("doorless");
    fs::copy(DOORLESS, &program).unwrap();
    let mut command = Command::new(program);
    let output = command.args(["attest", "--json"]).current_dir("/tmp").uid(65534).gid(65534).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["attempts"].as_array().unwrap().len() >= ATTEMPTS);
    assert!(output.status.success() && report["held"] == true, "{:?}", open(&report));
}

#[test]
fn the_filter_alone_closes_every_way() {
    let others =
        ["limits", "user", "namespaces", "pid-namespace", "capabilities", "no-new-privs", "not-dumpable", "landlock"];
    let without: Vec<&str> = others.iter().flat_map(|layer| ["--without", layer]).collect();
    let (held, report) = attest(&without);
    assert!(held, "{:?}", open(&report));
    let in_force = report["layers"].as_array().unwrap().iter().filter(|layer| layer["in-force"] == true);
    assert_eq!(in_force.map(|layer| layer["name"].as_str().unwrap()).collect::<Vec<_>>(), ["seccomp"]);
}

#[test]
fn a_layer_that_is_missing_is_found() {
    let (held, report) = attest(&["--without", "seccomp"]);
    assert!(!held);
    for name in ["flock", "memfd-create", "mmap-exec", "socket-unix"] {
        assert!(open(&report).iter().any(|open| open == name), "{name} in {:?}", open(&report));
    }
}

#[test]
fn a_hole_in_the_filter_is_found() {
    for (hole, name) in
        [("flock", "flock"), ("memfd_create", "memfd-create"), ("socket", "socket-udp"), ("mmap", "mmap-exec")]
    {
        let (held, report) = attest(&["--hole", hole]);
        assert!(!held && open(&report).iter().all(|open| !open.is_empty()), "{hole}");
        assert!(open(&report).iter().any(|open| open == name), "{hole}: {name} in {:?}", open(&report));
    }
}

#[test]
fn a_ring_refuses_to_be_changed_when_the_filter_does_not() {
    let (held, report) = attest(&["--hole", "io_uring_register"]);
    assert!(held, "{:?}", open(&report));
    match report["attempts"].as_array().unwrap().iter().find(|attempt| attempt["name"] == "ring-register") {
        Some(attempt) => assert_eq!(attempt["errno"], "EACCES"),
        None => eprintln!("skipped: a_ring_refuses_to_be_changed_when_the_filter_does_not: no io_uring here"),
    }
}

#[test]
fn a_hole_for_openat_is_held_by_the_other_layers_and_by_nothing_else() {
    let (held, report) = attest(&["--hole", "openat"]);
    assert!(held, "{:?}", open(&report));
    let stopped = |name: &str| {
        let attempt = report["attempts"].as_array().unwrap().iter().find(|attempt| attempt["name"] == name).unwrap();
        attempt["layer"].as_str().unwrap().to_owned()
    };
    assert!(["landlock", "namespaces"].contains(&stopped("openat-write").as_str()), "{}", stopped("openat-write"));
    let without = ["--without", "landlock", "--without", "namespaces", "--without", "user"];
    let (held, report) = attest(&[&["--hole", "openat"], &without[..]].concat());
    let through = ["openat-write", "reopen", "openat-through"];
    assert!(!held && through.iter().all(|name| open(&report).iter().any(|open| open == name)), "{:?}", open(&report));
}

#[test]
fn a_daemon_that_attests_tells_what_it_tried() {
    let launch = Launch { attest: true, ..Launch::default() };
    let mut daemon = Daemon::start_with(&program(), &launch).unwrap();
    let confinement = daemon.execute("query-confinement", json!({}), &[]).unwrap();
    assert_eq!(confinement["held"], true);
    let attempts = confinement["attempts"].as_array().unwrap();
    assert!(attempts.len() > 100, "{}", attempts.len());
    // What its own io_uring is asked for is refused by the ring.
    let (ring, others): (Vec<&Value>, Vec<&Value>) =
        attempts.iter().partition(|attempt| attempt["name"].as_str().unwrap().starts_with("ring-"));
    assert!(others.iter().all(|attempt| attempt["layer"] == "seccomp"), "{others:#?}");
    let by_ring = |attempt: &&Value| attempt["errno"] == "EACCES" || attempt["name"] == "ring-register";
    assert!(ring.iter().all(by_ring), "{ring:#?}");
    for on in ["its own program", "a memfd", "a directory", "the process that started it"] {
        assert!(attempts.iter().any(|attempt| attempt["on"] == on), "{on}");
    }

    let mut silent = Daemon::start_with(&program(), &Launch::default()).unwrap();
    let confinement = silent.execute("query-confinement", json!({}), &[]).unwrap();
    assert_eq!((&confinement["held"], &confinement["attempts"]), (&Value::Null, &json!([])));
}

#[test]
fn a_layer_or_call_that_there_is_not_is_refused() {
    for (option, value) in [("--without", "landlok"), ("--hole", "openat9")] {
        let (status, _, said) = doorless(&["attest", option, value]);
        assert!(!status.success() && said.contains(&format!("'{value}'")), "{said}");
    }
}

const START: &str = "<!-- matrix -->\n";
const END: &str = "<!-- end of the matrix -->\n";

/// What a matrix depends on besides this program.
fn circumstances() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let version: Vec<&str> = release.split('.').take(2).collect();
    let who = if geteuid().is_root() { "root" } else { "an ordinary user" };
    format!("Measured as {who} on Linux {}.\n", version.join("."))
}

#[test]
fn the_matrix_in_the_documentation_is_what_attest_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/isolation.md");
    let text = fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(START).unwrap();
    let (documented, after) = rest.split_once(END).unwrap();
    let (status, matrix, said) = doorless(&["attest", "--matrix"]);
    assert!(status.success(), "{said}");
    let made = format!("{}\n{matrix}", circumstances());
    if std::env::var_os("BLESS").is_some() {
        fs::write(&path, format!("{before}{START}{made}{END}{after}")).unwrap();
        return;
    }
    let advice = "run BLESS=1 cargo test --test attest as root where every layer can be had";
    let all = |matrix: &str| {
        let row = matrix.lines().find(|row| row.starts_with("| **ways out")).unwrap_or_default().to_owned();
        row.trim_end_matches('|').trim().ends_with("**0**")
    };
    assert!(all(&made) && all(documented), "with all layers no way is open; {advice}");
    let no_rings = !matrix.contains("its own io_uring");
    if !documented.starts_with(&circumstances()) || matrix.contains("cannot be had") || no_rings {
        // What another kernel says differs in places; which attempts there are does not.
        eprintln!("skipped: the cells of the matrix: they were measured elsewhere");
        let names = |text: &str| {
            let rows = text.lines().filter_map(|row| row.strip_prefix("| ")?.split(" |").next().map(str::to_owned));
            let baits = [" an image", " a memfd that", " a directory that"];
            let cut = |row: String| {
                baits.iter().filter_map(|bait| row.find(bait)).min().map_or(row.clone(), |at| row[..at].to_owned())
            };
            rows.map(cut).collect::<std::collections::BTreeSet<_>>()
        };
        let missing: Vec<_> = names(&made).difference(&names(documented)).cloned().collect();
        assert!(missing.is_empty(), "{missing:?} are not documented; {advice}");
        return;
    }
    assert_eq!(made, documented, "{advice}");
}
