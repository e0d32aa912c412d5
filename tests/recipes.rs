// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The recipes in docs/recipes.md are what the programs that they are for understand.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::path::Path;

use harness::{judges, run, text};

#[test]
fn libvirt_s_schema_knows_the_domains() {
    if !judges("libvirt_s_schema_knows_the_domains", &["virt-xml-validate", "xmllint"]) {
        return;
    }
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/libvirt");
    for domain in ["vhostuser.xml", "nbd.xml"] {
        let path = directory.join(domain);
        run("virt-xml-validate", &[text(&path), "domain"]);
    }
    // The judge judges: an element that is not known is refused.
    let wrong = harness::Scratch::new();
    let domain = std::fs::read_to_string(directory.join("nbd.xml")).unwrap().replace("<vcpu>", "<again/><vcpu>");
    std::fs::write(wrong.path("wrong.xml"), domain).unwrap();
    let status =
        std::process::Command::new("virt-xml-validate").args([&wrong.name("wrong.xml"), "domain"]).output().unwrap();
    assert!(!status.status.success());
}
