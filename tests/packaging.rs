// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is packaged is what the programs that read it accept, and as strict as it says.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use harness::{Scratch, judges};

fn packaging(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging").join(file)
}

/// A root directory with Debian's tools of AppArmor and SELinux and its default policy, unpacked by `tools/install-judges`.
fn tools(test: &str) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/judges/policy");
    if root.join("usr/share/selinux/default/base.pp.bz2").is_file() {
        return Some(root);
    }
    assert!(std::env::var_os("CI").is_none(), "{test} needs Debian's policy tools, and CI must have them");
    eprintln!("skipped: {test}: needs Debian's policy tools (make judges)");
    None
}

fn tool(root: &Path, program: &str) -> Command {
    let mut command = Command::new(root.join(program));
    let libraries =
        ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|lib| root.join(lib).display().to_string());
    command.env("LD_LIBRARY_PATH", libraries.join(":"));
    command
}

fn succeeds(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {said}");
    output
}

#[test]
fn apparmor_parses_the_profile_and_not_a_broken_one() {
    let Some(root) = tools("apparmor_parses_the_profile_and_not_a_broken_one") else { return };
    let parse = |profile: &Path| {
        let base = root.join("etc/apparmor.d");
        let mut parser = tool(&root, "sbin/apparmor_parser");
        parser.arg("-QT").arg("--base").arg(&base).arg("-I").arg(&base).arg(profile).output().unwrap()
    };
    let profile = packaging("apparmor/usr.bin.doorless");
    let parsed = parse(&profile);
    assert!(parsed.status.success(), "{}", String::from_utf8_lossy(&parsed.stderr));
    let scratch = Scratch::new();
    let text = fs::read_to_string(profile).unwrap().replacen("capability setgid,", "capability setgod,", 1);
    fs::write(scratch.path("broken"), text).unwrap();
    assert!(!parse(&scratch.path("broken")).status.success());
}

#[test]
fn the_systemd_unit_is_exposed_by_at_most_half_a_point() {
    if !judges("the_systemd_unit_is_exposed_by_at_most_half_a_point", &["systemd-analyze"]) {
        return;
    }
    let exposure = |unit: &Path| {
        // The threshold is in tenths.
        let command = ["security", "--offline=true", "--threshold=5", "--no-pager"];
        Command::new("systemd-analyze").args(command).arg(unit).output().unwrap()
    };
    let scratch = Scratch::new();
    let unit = fs::read_to_string(packaging("systemd/doorless@.service")).unwrap();
    // An instance, as systemd would make it of the template.
    fs::write(scratch.path("doorless@disk.service"), &unit).unwrap();
    let strict = exposure(&scratch.path("doorless@disk.service"));
    assert!(strict.status.success(), "{}", String::from_utf8_lossy(&strict.stdout));
    let weak = unit.replacen("PrivateNetwork=yes\n", "", 1);
    assert_ne!(weak, unit);
    fs::write(scratch.path("doorless@weak.service"), weak).unwrap();
    assert!(!exposure(&scratch.path("doorless@weak.service")).status.success());
}

#[test]
fn the_selinux_module_links_with_the_default_policy_and_a_weaker_one_does_not() {
    let test = "the_selinux_module_links_with_the_default_policy_and_a_weaker_one_does_not";
    let Some(root) = tools(test) else { return };
    if !judges(test, &["bunzip2"]) {
        return;
    }
    let scratch = Scratch::new();
    let mut modules = Vec::new();
    for entry in fs::read_dir(root.join("usr/share/selinux/default")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "bz2") {
            continue;
        }
        let module = scratch.path(path.file_stem().unwrap().to_str().unwrap());
        fs::write(&module, succeeds(Command::new("bunzip2").arg("-kc").arg(&path)).stdout).unwrap();
        if module.file_name().unwrap() != "base.pp" {
            modules.push(module);
        }
    }
    assert!(modules.len() > 300, "{} modules", modules.len());
    let expand = |text: &str| {
        fs::write(scratch.path("doorless.te"), text).unwrap();
        let (module, package) = (scratch.path("doorless.mod"), scratch.path("doorless.pp"));
        succeeds(
            tool(&root, "usr/bin/checkmodule").args(["-M", "-m", "-o"]).arg(&module).arg(scratch.path("doorless.te")),
        );
        succeeds(
            tool(&root, "usr/bin/semodule_package")
                .arg("-o")
                .arg(&package)
                .arg("-m")
                .arg(&module)
                .arg("-f")
                .arg(packaging("selinux/doorless.fc")),
        );
        let linked = scratch.path("all.pp");
        let mut link = tool(&root, "usr/bin/semodule_link");
        succeeds(link.arg("-o").arg(&linked).arg(scratch.path("base.pp")).args(&modules).arg(&package));
        tool(&root, "usr/bin/semodule_expand").arg(linked).arg(scratch.path("policy")).output().unwrap()
    };
    let text = fs::read_to_string(packaging("selinux/doorless.te")).unwrap();
    let expanded = expand(&text);
    assert!(expanded.status.success(), "{}", String::from_utf8_lossy(&expanded.stderr));
    let weaker = expand(&format!("{text}\nallow doorless_t nfs_t:file open;\n"));
    let said = String::from_utf8_lossy(&weaker.stderr);
    assert!(!weaker.status.success() && said.contains("allow doorless_t nfs_t:file { open }"), "{said}");
}

#[test]
fn the_pod_keeps_the_rules_of_the_restricted_standard() {
    let pod = fs::read_to_string(packaging("kubernetes/pod.yaml")).unwrap();
    for rule in [
        "runAsNonRoot: true",
        "allowPrivilegeEscalation: false",
        "readOnlyRootFilesystem: true",
        "drop: [\"ALL\"]",
        "type: Localhost",
        "localhostProfile: profiles/doorless.json",
        "automountServiceAccountToken: false",
    ] {
        assert!(pod.contains(rule), "no '{rule}'");
    }
    for forbidden in
        ["hostPath:", "privileged: true", "hostPort:", "runAsUser: 0", "hostNetwork: true", "hostPID: true", "add:"]
    {
        assert!(!pod.contains(forbidden), "'{forbidden}'");
    }
}
