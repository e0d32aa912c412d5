// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is packaged is what the programs that read it accept, and as strict as it says.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;
#[path = "harness/policy.rs"]
mod policy;

use std::fs;
use std::path::Path;
use std::process::Command;

use harness::{Scratch, judges};
use policy::{Modules, packaging, tool, tools};

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
    let modules = Modules::unpack(&root, &scratch);
    let expand = |text: &str| {
        let linked = modules.link(&[modules.package("doorless", text, Some(&packaging("selinux/doorless.fc")))]);
        modules.expand(&linked, true)
    };
    let text = fs::read_to_string(packaging("selinux/doorless.te")).unwrap();
    let (expanded, _) = expand(&text);
    assert!(expanded.status.success(), "{}", String::from_utf8_lossy(&expanded.stderr));
    let (weaker, _) = expand(&format!("{text}\nallow doorless_t nfs_t:file open;\n"));
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
