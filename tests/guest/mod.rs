// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A real guest: Debian's cloud kernel and a busybox initramfs under qemu-system, with a disk on a socket.
//!
//! Always under software emulation: a /dev/kvm that is there but cannot run this kernel hangs a guest instead of refusing it.
#![allow(dead_code, missing_docs, clippy::unwrap_used, unreachable_pub)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::harness::Scratch;

/// Drivers of the disk and its file system.
const MODULES: [&str; 3] = ["virtio_pci", "virtio_blk", "ext4"];
/// A guest that has not powered off by then hangs; emulated ones take about ten seconds.
const HANG_SECONDS: &str = "200";

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
    fn modules_in_order(&self) -> Vec<PathBuf> {
        let dependencies = fs::read_to_string(self.modules.join("modules.dep")).unwrap();
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for module in MODULES {
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

/// The same with a disk on the socket of a vhost-user-blk export.
pub fn run_vhost_user(kernel: &Kernel, scratch: &Scratch, socket: &str, queues: u16, script: &str) -> String {
    let chardev = format!("socket,id=disk,path={socket}");
    let device = format!("vhost-user-blk-pci,chardev=disk,num-queues={queues}");
    let memory = "memory-backend-memfd,id=ram,size=256M,share=on";
    let arguments = ["-object", memory, "-machine", "memory-backend=ram", "-smp", "2"];
    run_with(kernel, scratch, &[&arguments[..], &["-chardev", &chardev, "-device", &device]].concat(), script)
}

fn run_with(kernel: &Kernel, scratch: &Scratch, disk: &[&str], script: &str) -> String {
    let root = scratch.path("initramfs");
    let initrd = scratch.path("initrd");
    for directory in ["bin", "dev", "proc", "sys", "mnt", "modules"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists()).unwrap();
    fs::copy(busybox, root.join("bin/busybox")).unwrap();
    let mut insert = String::new();
    for module in kernel.modules_in_order() {
        let name = module.file_name().unwrap().to_str().unwrap().to_owned();
        fs::copy(&module, root.join("modules").join(&name)).unwrap();
        insert.push_str(&format!("insmod /modules/{name}\n"));
    }
    let init = format!(
        "#!/bin/busybox sh\n/bin/busybox --install -s /bin\nexport PATH=/bin\n\
         mount -t devtmpfs dev /dev\nmount -t proc proc /proc\nmount -t sysfs sys /sys\n{insert}\
         echo BEGIN\n( set -e\n{script}\n) 2>&1\necho END $?\nsync\npoweroff -f\n"
    );
    fs::write(root.join("init"), init).unwrap();
    fs::set_permissions(root.join("init"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let pack = format!("cd '{}' && find . | cpio --quiet -o -H newc > '{}'", root.display(), initrd.display());
    assert!(Command::new("sh").args(["-c", &pack]).status().unwrap().success());

    let serial = scratch.path("serial");
    let output = Command::new("timeout")
        .args([HANG_SECONDS, "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-accel", "tcg", "-m", "256", "-net", "none"])
        .args(["-kernel", kernel.image.to_str().unwrap(), "-initrd", initrd.to_str().unwrap()])
        .args(["-append", "console=ttyS0 quiet panic=-1"])
        .args(["-serial", &format!("file:{}", serial.display())])
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
