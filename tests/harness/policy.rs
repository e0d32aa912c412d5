// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Debian's policy tools and its default policy of SELinux, with modules of ours.
#![allow(dead_code, missing_docs, clippy::unwrap_used, unreachable_pub)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::harness::Scratch;

pub fn packaging(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging").join(file)
}

/// A root directory with Debian's tools of AppArmor and SELinux and its default policy, unpacked by `tools/install-judges`.
pub fn tools(test: &str) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/judges/policy");
    if root.join("usr/share/selinux/default/base.pp.bz2").is_file() {
        return Some(root);
    }
    assert!(std::env::var_os("CI").is_none(), "{test} needs Debian's policy tools, and CI must have them");
    eprintln!("skipped: {test}: needs Debian's policy tools (make judges)");
    None
}

pub fn tool(root: &Path, program: &str) -> Command {
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

/// Every module of the default policy, unpacked.
pub struct Modules<'a> {
    root: &'a Path,
    scratch: &'a Scratch,
    base: PathBuf,
    pub others: Vec<PathBuf>,
}

impl<'a> Modules<'a> {
    pub fn unpack(root: &'a Path, scratch: &'a Scratch) -> Modules<'a> {
        let mut others = Vec::new();
        for entry in fs::read_dir(root.join("usr/share/selinux/default")).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "bz2") {
                continue;
            }
            let module = scratch.path(path.file_stem().unwrap().to_str().unwrap());
            fs::write(&module, succeeds(Command::new("bunzip2").arg("-kc").arg(&path)).stdout).unwrap();
            if module.file_name().unwrap() != "base.pp" {
                others.push(module);
            }
        }
        assert!(others.len() > 300, "{} modules", others.len());
        Modules { root, scratch, base: scratch.path("base.pp"), others }
    }

    /// Compiles and packs a module.
    pub fn package(&self, name: &str, text: &str, contexts: Option<&Path>) -> PathBuf {
        let file = |ending: &str| self.scratch.path(&format!("{name}.{ending}"));
        let (source, module, package) = (file("te"), file("mod"), file("packed"));
        fs::write(&source, text).unwrap();
        succeeds(tool(self.root, "usr/bin/checkmodule").args(["-M", "-m", "-o"]).arg(&module).arg(source));
        let mut pack = tool(self.root, "usr/bin/semodule_package");
        pack.arg("-o").arg(&package).arg("-m").arg(&module);
        if let Some(contexts) = contexts {
            pack.arg("-f").arg(contexts);
        }
        succeeds(&mut pack);
        package
    }

    /// Links packages with the whole default policy.
    pub fn link(&self, packages: &[PathBuf]) -> PathBuf {
        let linked = self.scratch.path("linked");
        let mut link = tool(self.root, "usr/bin/semodule_link");
        succeeds(link.arg("-o").arg(&linked).arg(&self.base).args(&self.others).args(packages));
        linked
    }

    /// Makes what the kernel loads, with assertions (`neverallow`) checked or not.
    pub fn expand(&self, linked: &Path, assertions: bool) -> (Output, PathBuf) {
        let policy = self.scratch.path("policy");
        let mut expand = tool(self.root, "usr/bin/semodule_expand");
        if !assertions {
            expand.arg("-a");
        }
        (expand.arg(linked).arg(&policy).output().unwrap(), policy)
    }
}
