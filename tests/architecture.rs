// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The structure holds: the only arrows between crates, unsafe in one room, files that can be read at a sitting.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// A crate of ours and the crates of ours that it may depend on; everything else is an error.
const ARROWS: &[(&str, &[&str])] = &[
    ("doorless", &["doorless-daemon", "doorless-img", "doorless-manager", "doorless-sys"]),
    (
        "doorless-daemon",
        &["doorless-block", "doorless-confine", "doorless-export", "doorless-qmp", "doorless-sys", "fdset"],
    ),
    ("doorless-export", &["doorless-block", "doorless-sys"]),
    ("doorless-block", &["doorless-sys"]),
    ("doorless-img", &["doorless-block", "doorless-confine", "doorless-sys"]),
    ("doorless-qmp", &[]),
    ("doorless-confine", &["doorless-sys"]),
    ("doorless-manager", &["doorless-qmp", "doorless-sys"]),
    ("doorless-sys", &[]),
    ("fdset", &[]),
];

/// Most lines in a source file.
const MAX_LINES: usize = 800;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn packages() -> Vec<Value> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

/// Every Rust file of the repository.
fn sources() -> Vec<PathBuf> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard", "*.rs"])
        .current_dir(root())
        .output();
    let listed =
        output.ok().filter(|output| output.status.success()).map(|output| String::from_utf8(output.stdout).unwrap());
    let listed = listed.unwrap_or_default();
    let files: Vec<PathBuf> = listed.lines().map(|line| root().join(line)).filter(|path| path.exists()).collect();
    if files.is_empty() {
        eprintln!("skipped: sources: this is no git checkout");
    }
    files
}

#[test]
fn crates_depend_on_each_other_only_along_the_arrows() {
    let packages = packages();
    let ours: Vec<&str> = packages.iter().map(|package| package["name"].as_str().unwrap()).collect();
    for package in &packages {
        let name = package["name"].as_str().unwrap();
        let (_, allowed) =
            ARROWS.iter().find(|(from, _)| *from == name).unwrap_or_else(|| panic!("{name} has no place"));
        // Tests may reach everything.
        let built = package["dependencies"].as_array().unwrap().iter().filter(|to| to["kind"] != "dev");
        for dependency in built {
            let to = dependency["name"].as_str().unwrap();
            assert!(!ours.contains(&to) || allowed.contains(&to), "{name} must not depend on {to}");
        }
    }
    assert_eq!(ours.len(), ARROWS.len());
}

#[test]
fn every_crate_but_sys_forbids_unsafe_code() {
    for package in packages() {
        let manifest = std::fs::read_to_string(package["manifest_path"].as_str().unwrap()).unwrap();
        let inherits = manifest.contains("[lints]\nworkspace = true");
        assert_eq!(inherits, package["name"] != "doorless-sys", "{}", package["name"]);
    }
    let workspace = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    assert!(workspace.contains("unsafe_code = \"forbid\""));
}

#[test]
fn the_fdset_library_has_few_dependencies() {
    let package = packages().into_iter().find(|package| package["name"] == "fdset").unwrap();
    let dependencies = package["dependencies"].as_array().unwrap();
    assert!(dependencies.iter().filter(|dependency| dependency["kind"].is_null()).count() <= 5);
}

#[test]
fn every_source_file_names_its_licence_and_can_be_read_at_a_sitting() {
    for path in sources() {
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("// SPDX-License-Identifier: Apache-2.0 OR MIT\n"), "{}", path.display());
        assert!(text.lines().count() <= MAX_LINES, "{} has over {MAX_LINES} lines", path.display());
    }
}
