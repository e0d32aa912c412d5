// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A real libvirt runs the domains of docs/libvirt: a guest reads and writes its disk, over NBD and over vhost-user, and goes on
//! over upgrades of the daemon.
//!
//! Debian's libvirtd is unpacked, not installed, and runs as an ordinary user with directories of its own, so nothing of the
//! machine's libvirt is touched. Software emulation, as in the other tests with guests.
#![allow(missing_docs, clippy::unwrap_used)]

mod guest;
mod harness;

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use guest::{COMMAND_LINE, Kernel};
use harness::{Scratch, Serve, judges, noise, text};

/// The ordinary user, if the tests run as root: libvirtd as root would be the machine's.
const NOBODY: u32 = 65_534;
/// A guest that is there so long hangs; emulated ones take about ten seconds.
const HANG: Duration = Duration::from_secs(300);

/// A private libvirtd.
struct Libvirt {
    scratch: Scratch,
    process: Option<Child>,
}

impl Libvirt {
    /// `None` where it cannot be had.
    fn start(test: &str) -> Option<Libvirt> {
        let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/judges/libvirt/usr");
        if !judges(test, &["virsh", "qemu-system-x86_64", "setpriv", "busybox", "cpio"]) {
            return None;
        }
        if !unpacked.join("sbin/libvirtd").is_file() {
            assert!(std::env::var_os("CI").is_none(), "{test} needs Debian's libvirtd, and CI must have it");
            eprintln!("skipped: {test}: needs Debian's libvirtd (make judges)");
            return None;
        }
        // Copies, since that user may not be able to enter this directory. One driver: the others want more libraries.
        let scratch = Scratch::new();
        fs::set_permissions(scratch.path(""), Permissions::from_mode(0o755)).unwrap();
        for directory in ["run", ".config/libvirt", "drivers"] {
            fs::create_dir_all(scratch.path(directory)).unwrap();
        }
        fs::copy(unpacked.join("sbin/libvirtd"), scratch.path("libvirtd")).unwrap();
        let libraries = unpacked.join("lib/x86_64-linux-gnu");
        let driver = "libvirt_driver_qemu.so";
        let from = libraries.join("libvirt/connection-driver").join(driver);
        fs::copy(from, scratch.path("drivers").join(driver)).unwrap();
        for library in ["libvirt.so.0", "libvirt-qemu.so.0", "libvirt-lxc.so.0"] {
            fs::copy(libraries.join(library), scratch.path(library)).unwrap();
        }
        // Without virtlogd, which would be another daemon.
        fs::write(scratch.path(".config/libvirt/qemu.conf"), "stdio_handler = \"file\"\n").unwrap();
        for file in ["", "run", ".config", ".config/libvirt"] {
            give(&scratch.path(file));
        }
        let mut libvirt = Libvirt { scratch, process: None };
        let errors = fs::File::create(libvirt.scratch.path("log")).unwrap();
        let mut daemon = libvirt.command(&libvirt.scratch.name("libvirtd"));
        libvirt.process = Some(daemon.stdout(Stdio::null()).stderr(errors).spawn().unwrap());
        while !libvirt.scratch.path("run/libvirt/libvirt-sock").exists() {
            assert_eq!(libvirt.process.as_mut().unwrap().try_wait().unwrap(), None, "{}", libvirt.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(libvirt)
    }

    /// A program as the ordinary user, who has its home in the scratch directory.
    fn command(&self, program: &str) -> Command {
        let mut command = if rustix::process::geteuid().is_root() {
            let id = NOBODY.to_string();
            let mut command = Command::new("setpriv");
            command.args(["--reuid", &id, "--regid", &id, "--clear-groups", program]);
            command
        } else {
            Command::new(program)
        };
        for variable in ["XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"] {
            command.env_remove(variable);
        }
        let home = self.scratch.path("");
        command.env("HOME", &home).env("XDG_RUNTIME_DIR", home.join("run")).env("LD_LIBRARY_PATH", &home);
        command.env("LIBVIRT_DRIVER_DIR", home.join("drivers")).current_dir(&home);
        command
    }

    fn virsh(&self, arguments: &[&str]) -> Output {
        self.command("virsh").args(["-c", "qemu:///session"]).args(arguments).output().unwrap()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.scratch.path("log")).unwrap_or_default()
    }

    /// Runs a domain to its end; what its guest printed. `meanwhile` is called again and again.
    fn run(&self, domain: &str, mut meanwhile: impl FnMut()) -> String {
        let (file, serial) = (self.scratch.path("domain.xml"), self.scratch.path("serial"));
        fs::write(&file, domain).unwrap();
        give(&file);
        let created = self.virsh(&["create", text(&file)]);
        assert!(created.status.success(), "{}{}", String::from_utf8_lossy(&created.stderr), self.log());
        let begun = Instant::now();
        while String::from_utf8_lossy(&self.virsh(&["list", "--name"]).stdout).contains("doorless") {
            assert!(begun.elapsed() < HANG, "{}", fs::read_to_string(&serial).unwrap_or_default());
            meanwhile();
            std::thread::sleep(Duration::from_millis(200));
        }
        let printed = fs::read_to_string(&serial).unwrap_or_default().replace('\r', "");
        guest::said(&printed).unwrap_or_else(|| panic!("the guest's script failed:\n{printed}\n{}", self.log()))
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        for domain in ["doorless-nbd", "doorless-vhostuser"] {
            self.virsh(&["destroy", domain]);
        }
        if let Some(process) = &mut self.process {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

fn give(path: &Path) {
    if rustix::process::geteuid().is_root() {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
}

/// The documented domain with what a test needs besides: emulation, less memory, a kernel to boot, a console in a file.
fn domain(file: &str, scratch: &Scratch, (image, initrd): (&Path, &Path), socket: (&str, &str)) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/libvirt").join(file);
    let mut domain = fs::read_to_string(path).unwrap();
    let (image, initrd, serial) = (image.display(), initrd.display(), scratch.path("serial"));
    let boot = format!("hvm</type><kernel>{image}</kernel><initrd>{initrd}</initrd><cmdline>{COMMAND_LINE}</cmdline>");
    let console =
        format!("<devices><serial type='file'><source path='{}'/><target port='0'/></serial>", serial.display());
    let ours = [("type='kvm'", "type='qemu'"), ("'MiB'>1024<", "'MiB'>256<"), ("hvm</type>", &boot)];
    for (from, to) in ours.into_iter().chain([("<devices>", console.as_str()), socket]) {
        assert!(domain.contains(from), "{file} has no {from}");
        domain = domain.replacen(from, to, 1);
    }
    domain
}

/// Reads the whole disk three times while the daemon is replaced, and writes to it.
const SCRIPT: &str = "for round in 1 2 3; do echo 3 > /proc/sys/vm/drop_caches; md5sum /dev/vda; done\n\
                      echo 'written by the guest' | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null; sync";

fn a_domain_goes_on(test: &str, file: &str, options: &[&str], documented: &str) {
    let Some(libvirt) = Libvirt::start(test) else { return };
    let Some(kernel) = Kernel::judge(test) else { return };
    let (disk, socket) = (libvirt.scratch.path("disk.raw"), libvirt.scratch.path("s"));
    fs::write(&disk, noise(8 << 20, 5)).unwrap();
    let checksum = harness::run("md5sum", &[text(&disk)]).split_whitespace().next().unwrap().to_owned();
    let serve = Serve::start(&[&["--format", "raw"], options, &[text(&socket), text(&disk)]].concat());
    fs::set_permissions(&socket, Permissions::from_mode(0o777)).unwrap();
    let (image, initrd) = guest::boot_files(&kernel, &libvirt.scratch, SCRIPT);
    let domain = domain(file, &libvirt.scratch, (&image, &initrd), (documented, text(&socket)));
    let mut upgrades = 0;
    let said = libvirt.run(&domain, || {
        serve.upgrade();
        upgrades += 1;
    });
    assert_eq!(said.matches(&checksum).count(), 3, "{said}");
    assert!(upgrades > 1);
    assert!(serve.interrupt().success());
    assert!(fs::read(&disk).unwrap().starts_with(b"written by the guest\n"));
}

#[test]
fn a_libvirt_domain_goes_on_over_nbd_while_daemons_are_upgraded() {
    let test = "a_libvirt_domain_goes_on_over_nbd_while_daemons_are_upgraded";
    a_domain_goes_on(test, "nbd.xml", &["--name", "root", "--socket"], "/run/doorless/vm1.sock");
}

#[test]
fn a_libvirt_domain_goes_on_over_vhost_user_while_daemons_are_upgraded() {
    let test = "a_libvirt_domain_goes_on_over_vhost_user_while_daemons_are_upgraded";
    a_domain_goes_on(test, "vhostuser.xml", &["--queues", "2", "--vhost-user"], "/run/doorless/disk.sock");
}
