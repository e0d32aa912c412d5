// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A real guest: Debian's cloud kernel and a busybox initramfs under qemu-system, with a disk on a socket.
//!
//! Always under software emulation: a /dev/kvm that is there but cannot run this kernel hangs a guest instead of refusing it.
#![allow(dead_code, missing_docs, clippy::unwrap_used, unreachable_pub)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::harness::Scratch;

const QEMU: &str = "qemu-system-x86_64";

/// An emulated guest on a busy machine may miss the ticks that its kernel looks for at boot, and would give up.
pub const COMMAND_LINE: &str = "no_timer_check console=ttyS0 quiet panic=-1";
/// Drivers of the disk and its file systems.
const MODULES: [&str; 7] = ["virtio_pci", "virtio_blk", "ext4", "vfat", "nls_cp437", "nls_ascii", "nls_utf8"];
/// A guest that has not powered off by then, or is silent for so long, hangs; emulated ones take about ten seconds.
const HANG_SECONDS: u16 = 200;

/// What a guest needs from the host, besides QEMU.
pub struct Kernel {
    image: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    /// The newest cloud kernel that `tools/install-judges` has unpacked, or else that the machine has.
    pub fn find() -> Option<Kernel> {
        let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/judges/kernel");
        Kernel::below(&unpacked).or_else(|| Kernel::below(Path::new("/")))
    }

    /// The same for a test: where there is none, the test is skipped by name, and fails in CI.
    pub fn judge(test: &str) -> Option<Kernel> {
        let kernel = Kernel::find();
        if kernel.is_none() {
            assert!(std::env::var_os("CI").is_none(), "{test} needs a cloud kernel, and CI must have it");
            eprintln!("skipped: {test}: needs a kernel of linux-image-cloud-amd64 (make judges)");
        }
        kernel
    }

    fn below(root: &Path) -> Option<Kernel> {
        let mut images: Vec<PathBuf> = fs::read_dir(root.join("boot"))
            .ok()?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                path.to_string_lossy().ends_with("cloud-amd64") && path.to_string_lossy().contains("vmlinuz-")
            })
            .collect();
        images.sort();
        let image = images.pop()?;
        let version = image.file_name()?.to_str()?.strip_prefix("vmlinuz-")?.to_owned();
        let modules = root.join("lib/modules").join(version);
        modules.is_dir().then_some(Kernel { image, modules })
    }

    /// The modules' files, each after those that it needs. What is built in has none.
    pub fn modules_in_order(&self, modules: &[&str]) -> Vec<PathBuf> {
        let dependencies = fs::read_to_string(self.modules.join("modules.dep")).unwrap();
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for module in modules {
            let file = format!("/{module}.ko");
            let Some(line) = dependencies.lines().find(|line| line.split(':').next().unwrap().ends_with(&file)) else {
                continue;
            };
            let (module, needs) = line.split_once(':').unwrap();
            // modules.dep lists what is needed first last.
            for needed in needs.split_whitespace().rev().chain([module]) {
                if seen.insert(needed.to_owned()) {
                    order.push(self.modules.join(needed));
                }
            }
        }
        order
    }
}

/// Boots, runs `script` with the disk as /dev/vda, powers off; what the script printed.
///
/// `drive` is QEMU's option for the disk without its interface.
pub fn run(kernel: &Kernel, scratch: &Scratch, drive: &str, script: &str) -> String {
    run_with(kernel, scratch, &["-drive", &format!("if=virtio,{drive}")], script)
}

/// The same with several disks: /dev/vda, /dev/vdb and so on.
pub fn run_disks(kernel: &Kernel, scratch: &Scratch, drives: &[String], script: &str) -> String {
    let drives: Vec<String> = drives.iter().map(|drive| format!("if=virtio,{drive}")).collect();
    let arguments: Vec<&str> = drives.iter().flat_map(|drive| ["-drive", drive]).collect();
    run_with(kernel, scratch, &arguments, script)
}

/// The same with a disk on the socket of a vhost-user-blk export.
pub fn run_vhost_user(kernel: &Kernel, scratch: &Scratch, socket: &str, queues: u16, script: &str) -> String {
    let chardev = format!("socket,id=disk,path={socket}");
    let device = format!("vhost-user-blk-pci,chardev=disk,num-queues={queues}");
    let memory = "memory-backend-memfd,id=ram,size=256M,share=on";
    let arguments = ["-object", memory, "-machine", "memory-backend=ram", "-smp", "2"];
    run_with(kernel, scratch, &[&arguments[..], &["-chardev", &chardev, "-device", &device]].concat(), script)
}

/// Boots with the disk as the root file system, and more on the kernel's command line; what its own `/init` printed.
pub fn run_root(kernel: &Kernel, scratch: &Scratch, drive: &str, append: &str) -> String {
    let enter = "mount -t ext4 /dev/vda /mnt\nfor it in dev proc; do mount --move /$it /mnt/$it; done\n\
                 exec switch_root /mnt /init\n";
    let initrd = pack(kernel, scratch, enter);
    let append = format!("{COMMAND_LINE} {append}");
    // Of options that come twice the last counts.
    let disk = ["-drive", &format!("if=virtio,{drive}"), "-m", "512", "-append", &append];
    run_initrd(kernel, scratch, &initrd, &disk)
}

/// Copies of the kernel and of an initramfs that runs `script`, for others to boot; the script's output goes to the serial console.
pub fn boot_files(kernel: &Kernel, scratch: &Scratch, script: &str) -> (PathBuf, PathBuf) {
    let image = scratch.path("vmlinuz");
    fs::copy(&kernel.image, &image).unwrap();
    (image, initrd(kernel, scratch, script))
}

/// What a script printed, from all that came over the serial console.
pub fn said(serial: &str) -> Option<String> {
    let (_, rest) = serial.split_once("BEGIN\n")?;
    Some(rest.split_once("END 0")?.0.to_owned())
}

/// The same with one queue, and a file as the second disk: /dev/vdb.
pub fn run_vhost_user_beside(kernel: &Kernel, scratch: &Scratch, socket: &str, file: &str, script: &str) -> String {
    let chardev = format!("socket,id=disk,path={socket}");
    let memory = "memory-backend-memfd,id=ram,size=256M,share=on";
    let arguments = ["-object", memory, "-machine", "memory-backend=ram", "-smp", "1", "-chardev", &chardev];
    let file = format!("if=virtio,format=raw,readonly=on,file={file}");
    let disks = ["-device", "vhost-user-blk-pci,chardev=disk,num-queues=1", "-drive", &file];
    run_with(kernel, scratch, &[&arguments[..], &disks].concat(), script)
}

/// A guest that runs until it is killed, and its serial console.
pub struct Running {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// Every line so far.
    pub said: Vec<String>,
}

impl Running {
    /// Boots as `run` does and leaves the script running. The process is QEMU's own.
    pub fn start(kernel: &Kernel, scratch: &Scratch, drive: &str, script: &str) -> Running {
        let initrd = initrd(kernel, scratch, script);
        let mut child = Command::new(QEMU)
            .args(arguments(kernel, &initrd, "stdio"))
            .args(["-drive", &format!("if=virtio,{drive}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Running { child, input, output, said: Vec::new() }
    }

    /// The next line of the console, without its end. The end of the script or of the guest is a failure.
    pub fn line(&mut self) -> String {
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            if self.output.buffer().is_empty() {
                let patience = Timespec { tv_sec: HANG_SECONDS.into(), tv_nsec: 0 };
                let mut readable = [PollFd::new(self.output.get_ref(), PollFlags::IN)];
                assert!(
                    poll(&mut readable, Some(&patience)).unwrap() > 0,
                    "the guest hangs:\n{}",
                    self.said.join("\n")
                );
            }
            let some = self.output.fill_buf().unwrap();
            assert!(!some.is_empty(), "the guest ended:\n{}", self.said.join("\n"));
            let len = some.iter().position(|byte| *byte == b'\n').map_or(some.len(), |at| at + 1);
            line.extend_from_slice(&some[..len]);
            self.output.consume(len);
        }
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        self.said.push(line.clone());
        assert!(!line.starts_with("END "), "the guest's script ended:\n{}", self.said.join("\n"));
        line
    }

    /// An empty line on the console, for a script that reads one.
    pub fn answer(&mut self) {
        self.input.write_all(b"\n").unwrap();
    }

    /// The guest's end without a warning.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// QEMU's arguments but for the disk.
fn arguments(kernel: &Kernel, initrd: &Path, serial: &str) -> Vec<String> {
    let mut arguments: Vec<String> = [
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-accel",
        "tcg",
        "-m",
        "256",
        "-net",
        "none",
    ]
    .map(str::to_owned)
    .to_vec();
    let (image, initrd) = (kernel.image.to_str().unwrap(), initrd.to_str().unwrap());
    for option in ["-kernel", image, "-initrd", initrd, "-append", COMMAND_LINE, "-serial", serial] {
        arguments.push(option.to_owned());
    }
    arguments
}

/// Packs the initramfs that runs `script` and powers off.
fn initrd(kernel: &Kernel, scratch: &Scratch, script: &str) -> PathBuf {
    let script =
        format!("mount -t sysfs sys /sys\necho BEGIN\n( set -e\n{script}\n) 2>&1\necho END $?\nsync\npoweroff -f\n");
    pack(kernel, scratch, &script)
}

/// Packs the initramfs whose init loads the disk's drivers and goes on as told.
fn pack(kernel: &Kernel, scratch: &Scratch, go_on: &str) -> PathBuf {
    let root = scratch.path("initramfs");
    let initrd = scratch.path("initrd");
    for directory in ["bin", "dev", "proc", "sys", "mnt", "modules"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists()).unwrap();
    fs::copy(busybox, root.join("bin/busybox")).unwrap();
    let mut insert = String::new();
    for module in kernel.modules_in_order(&MODULES) {
        let name = module.file_name().unwrap().to_str().unwrap().to_owned();
        fs::copy(&module, root.join("modules").join(&name)).unwrap();
        insert.push_str(&format!("insmod /modules/{name}\n"));
    }
    let init = format!(
        "#!/bin/busybox sh\n/bin/busybox --install -s /bin\nexport PATH=/bin\n\
         mount -t devtmpfs dev /dev\nmount -t proc proc /proc\n{insert}{go_on}"
    );
    fs::write(root.join("init"), init).unwrap();
    fs::set_permissions(root.join("init"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let pack = format!("cd '{}' && find . | cpio --quiet -o -H newc > '{}'", root.display(), initrd.display());
    assert!(Command::new("sh").args(["-c", &pack]).status().unwrap().success());
    initrd
}

fn run_with(kernel: &Kernel, scratch: &Scratch, disk: &[&str], script: &str) -> String {
    let initrd = initrd(kernel, scratch, script);
    run_initrd(kernel, scratch, &initrd, disk)
}

fn run_initrd(kernel: &Kernel, scratch: &Scratch, initrd: &Path, disk: &[&str]) -> String {
    let serial = scratch.path("serial");
    let output = Command::new("timeout")
        .args([&HANG_SECONDS.to_string(), QEMU])
        .args(arguments(kernel, initrd, &format!("file:{}", serial.display())))
        .args(disk)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&fs::read(&serial).unwrap_or_default()).replace('\r', "");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "qemu-system: {}\n{errors}\n{said}", output.status);
    let (_, rest) = said.split_once("BEGIN\n").unwrap_or_else(|| panic!("the guest did not begin:\n{said}\n{errors}"));
    let (result, _) = rest.split_once("END 0").unwrap_or_else(|| panic!("the guest's script failed:\n{rest}"));
    result.to_owned()
}
