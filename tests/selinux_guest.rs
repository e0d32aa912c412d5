// SPDX-License-Identifier: Apache-2.0 OR MIT
//! SELinux enforcing, images on NFS, `virt_use_nfs` off: the daemon serves what it was passed and can open none of it.
//!
//! A real kernel with Debian's whole default policy and our module mounts its own NFS export, and an administrator's shell tries
//! one thing after another. What came of each is printed as a table.
#![allow(missing_docs, clippy::unwrap_used)]

mod guest;
mod harness;
#[path = "harness/policy.rs"]
mod policy;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use guest::Kernel;
use harness::{DOORLESS, Scratch, judges, noise, run};
use policy::{Modules, packaging, tools};

const SEARCHED: [&str; 4] = ["/bin", "/usr/bin", "/sbin", "/usr/sbin"];

/// Which of the guest's sections proves a claim, and what must and what must not stand there.
struct Row {
    section: &'static str,
    claim: &'static str,
    says: &'static [&'static str],
    never: &'static [&'static str],
}

const fn row(
    section: &'static str,
    claim: &'static str,
    says: &'static [&'static str],
    never: &'static [&'static str],
) -> Row {
    Row { section, claim, says, never }
}

const DENIED: &str = "denied";
/// The kernel's word that the daemon's domain lacks nothing but `open`.
const MAY_NOT_OPEN: &str = "denied  { open }";
const NFS: &str = "tcontext=system_u:object_r:nfs_t:s0 tclass=file permissive=0";

const CLAIMS: [Row; 15] = [
    row(
        "kernel",
        "SELinux enforces, virt_use_nfs is off, the image is nfs_t on NFS",
        &["enforce 1", "virt_use_nfs 0", " nfs4 ", "system_u:object_r:nfs_t:s0 /nfs/disk"],
        &[],
    ),
    row("machine-off", "svirt_t cannot open the image", &["status 1", DENIED, ":svirt_t:", NFS], &[]),
    row(
        "serve",
        "doorless_t serves it, to read and to write, and nothing is denied",
        &["ready: ", ":doorless_manager_t:", ":doorless_t:", "on the server: written through the daemon"],
        &[DENIED],
    ),
    row(
        "passed",
        "doorless_t reads a descriptor that it was passed",
        &["read: written through the daemon", ":doorless_t:", "status 0"],
        &[DENIED],
    ),
    row(
        "reopen",
        "doorless_t cannot open it again by /proc/self/fd",
        &["status 1", MAY_NOT_OPEN, ":doorless_t:", NFS],
        &[],
    ),
    row("reopen-to-write", "nor to write", &["status 1", MAY_NOT_OPEN, ":doorless_t:", NFS], &[]),
    row("path", "nor by its path", &["status 1", DENIED, ":doorless_t:"], &[]),
    row("machine-on", "virt_use_nfs on: svirt_t can open it", &["status 0"], &[DENIED]),
    row("reopen-on", "virt_use_nfs on: doorless_t still cannot", &["status 1", MAY_NOT_OPEN, ":doorless_t:", NFS], &[]),
    row("weakened", "control: a rule that gives doorless_t open is noticed", &["status 0"], &[DENIED]),
    row("restored", "and without that rule it cannot again", &["status 1", MAY_NOT_OPEN, ":doorless_t:", NFS], &[]),
    row(
        "first-first",
        "categories c1,c2: a daemon serves its own image",
        &["ready: ", ":doorless_t:s0:c1,c2"],
        &[DENIED],
    ),
    row(
        "second-first",
        "categories c1,c2: not the image of c3,c4",
        &["it did not arrive", DENIED, ":doorless_t:s0:c1,c2", ":s0:c3,c4 "],
        &["ready: "],
    ),
    row(
        "first-second",
        "categories c3,c4: not the image of c1,c2",
        &["it did not arrive", DENIED, ":doorless_t:s0:c3,c4", ":s0:c1,c2 "],
        &["ready: "],
    ),
    row("second-second", "categories c3,c4: its own, too", &["ready: ", ":doorless_t:s0:c3,c4"], &[DENIED]),
];

#[test]
fn a_confined_daemon_serves_an_image_on_nfs_that_selinux_lets_it_not_open() {
    let test = "a_confined_daemon_serves_an_image_on_nfs_that_selinux_lets_it_not_open";
    let needed = ["qemu-system-x86_64", "busybox", "cpio", "bunzip2", "mke2fs", "nbd-client", "runcon", "chcon", "ldd"];
    let (true, Some(tools)) = (judges(test, &needed), tools(test)) else { return };
    let Some(kernel) = Kernel::judge(test) else { return };
    let scratch = Scratch::new();
    let disk = guest_disk(&kernel, &scratch, &default_policy(&tools, &scratch));
    let append = "security=selinux selinux=1 enforcing=0 audit_backlog_limit=8192";
    let said = guest::run_root(&kernel, &scratch, &format!("format=raw,file={}", disk.display()), append);
    let mut failed = Vec::new();
    for Row { section, claim, says, never } in CLAIMS {
        let came = section_of(&said, section);
        let holds = says.iter().all(|it| came.contains(it)) && !never.iter().any(|it| came.contains(it));
        let kernel = came.lines().rfind(|line| line.starts_with(DENIED)).unwrap_or("nothing denied");
        eprintln!("{} {claim}\n       {kernel}", if holds { "holds " } else { "FAILED" });
        if !holds {
            failed.push(claim);
        }
    }
    assert!(failed.is_empty(), "{failed:?}\n{said}");
    let read = section_of(&said, "serve").lines().find_map(|line| line.strip_prefix("read ")).unwrap();
    let (through, server) = read.split_once(" and the server has ").unwrap();
    assert_eq!(through, server, "checksums");
}

fn section_of<'a>(said: &'a str, name: &str) -> &'a str {
    let (_, rest) = said.split_once(&format!("== {name}\n")).unwrap_or_else(|| panic!("no section {name}:\n{said}"));
    rest.split("\n== ").next().unwrap()
}

/// Debian's default policy with our module, and what the guest needs besides.
fn default_policy(tools: &Path, scratch: &Scratch) -> PathBuf {
    let modules = Modules::unpack(tools, scratch);
    let ours = fs::read_to_string(packaging("selinux/doorless.te")).unwrap();
    let packages = [
        modules.package("doorless", &ours, Some(&packaging("selinux/doorless.fc"))),
        modules.package("comparison", include_str!("guest/selinux/comparison.te"), None),
    ];
    // The boolean that weakens the policy is against its assertions; that these hold without it is another test.
    let (expanded, policy) = modules.expand(&modules.link(&packages), false);
    assert!(expanded.status.success(), "{}", String::from_utf8_lossy(&expanded.stderr));
    policy
}

/// The guest's root file system.
fn guest_disk(kernel: &Kernel, scratch: &Scratch, policy: &Path) -> PathBuf {
    let root = scratch.path("root");
    for directory in [
        "bin",
        "sbin",
        "lib",
        "lib64",
        "usr/bin",
        "usr/lib",
        "etc/selinux",
        "dev",
        "proc",
        "sys",
        "run",
        "tmp",
        "srv",
        "nfs",
        "images",
        "modules",
        "var/lib/nfs/v4recovery",
    ] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    for copy in ["bin/busybox", "usr/bin/busybox-in-the-cell", "usr/bin/busybox-as-a-machine"] {
        fs::copy(found("busybox"), root.join(copy)).unwrap();
    }
    with_libraries(&found("ls"), &root, "bin/ls-with-labels");
    for program in ["runcon", "chcon", "nbd-client"] {
        with_libraries(&found(program), &root, &format!("bin/{program}"));
    }
    with_libraries(Path::new(DOORLESS), &root, "usr/bin/doorless");
    let mut order = String::new();
    for module in kernel.modules_in_order(&["nbd", "nfs", "nfsv4", "nfsd"]) {
        let name = module.file_name().unwrap().to_str().unwrap().to_owned();
        fs::copy(&module, root.join("modules").join(&name)).unwrap();
        order += &format!("{name}\n");
    }
    fs::write(root.join("modules/order"), order).unwrap();
    fs::copy(policy, root.join("etc/selinux/policy")).unwrap();
    // Without this file the tools believe that there is no SELinux.
    fs::write(root.join("etc/selinux/config"), "SELINUX=enforcing\nSELINUXTYPE=default\n").unwrap();
    fs::write(root.join("claims"), include_str!("guest/selinux/claims")).unwrap();
    fs::write(root.join("init"), include_str!("guest/selinux/init")).unwrap();
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755)).unwrap();
    let mut image = b"the image\n".to_vec();
    image.extend(noise((1 << 20) - 10, 17));
    for file in ["srv/disk", "images/first", "images/second"] {
        fs::write(root.join(file), &image).unwrap();
        fs::set_permissions(root.join(file), fs::Permissions::from_mode(0o600)).unwrap();
    }
    let disk = scratch.path("disk.raw");
    let mke2fs = found("mke2fs");
    run(
        mke2fs.to_str().unwrap(),
        &["-q", "-F", "-t", "ext4", "-d", &scratch.name("root"), disk.to_str().unwrap(), "256M"],
    );
    disk
}

fn found(program: &str) -> PathBuf {
    SEARCHED.iter().map(|directory| Path::new(directory).join(program)).find(|path| path.is_file()).unwrap()
}

/// Copies a program and the libraries that it is linked with.
fn with_libraries(program: &Path, root: &Path, to: &str) {
    fs::copy(program, root.join(to)).unwrap();
    let libraries = run("ldd", &[program.to_str().unwrap()]);
    for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        let there = root.join(library.trim_start_matches('/'));
        if !there.exists() {
            fs::create_dir_all(there.parent().unwrap()).unwrap();
            fs::copy(library, there).unwrap();
        }
    }
}
