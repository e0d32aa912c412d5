// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A real guest mounts its disk from `doorless serve`, reads it, and writes to it.
#![allow(missing_docs, clippy::unwrap_used)]

mod guest;
mod harness;

use std::process::Command;

use guest::Kernel;
use harness::{Scratch, Serve, judges, noise, run};

/// An ext4 disk of 32 MiB with a file of noise: `disk.raw` in the directory, and the file's checksum as md5sum prints it.
fn ext4_disk(scratch: &Scratch) -> String {
    std::fs::create_dir(scratch.path("root")).unwrap();
    std::fs::write(scratch.path("root/noise"), noise(5 << 20, 9)).unwrap();
    let path = std::env::var("PATH").unwrap_or_default() + ":/sbin:/usr/sbin";
    let made = Command::new("mke2fs")
        .env("PATH", path)
        .args(["-q", "-F", "-t", "ext4", "-d", &scratch.name("root"), &scratch.name("disk.raw"), "32M"])
        .status()
        .unwrap();
    assert!(made.success());
    run("md5sum", &[&scratch.name("root/noise")]).split_whitespace().next().unwrap().to_owned()
}

fn kernel(test: &str) -> Option<Kernel> {
    if !judges(test, &["qemu-system-x86_64", "qemu-img", "busybox", "cpio", "debugfs", "md5sum"]) {
        return None;
    }
    Kernel::judge(test)
}

#[test]
fn a_guest_reads_a_qcow2_disk_under_its_own_snapshot() {
    let Some(kernel) = kernel("a_guest_reads_a_qcow2_disk_under_its_own_snapshot") else { return };
    let scratch = Scratch::new();
    let checksum = ext4_disk(&scratch);
    let image = scratch.name("disk.qcow2");
    run("qemu-img", &["convert", "-c", "-O", "qcow2", &scratch.name("disk.raw"), &image]);
    let before = std::fs::read(&image).unwrap();
    let serve = Serve::start(&["--read-only", "--socket", &scratch.name("s"), &image]);
    let drive = format!("format=raw,snapshot=on,file={}", serve.uri);
    let said = guest::run(
        &kernel,
        &scratch,
        &drive,
        "mount -t ext4 /dev/vda /mnt; md5sum /mnt/noise; echo scribble > /mnt/new; sync; cat /mnt/new; umount /mnt",
    );
    assert!(said.contains(&checksum) && said.contains("scribble"), "{said}");
    assert!(serve.interrupt().success());
    assert!(std::fs::read(&image).unwrap() == before, "the image is as it was");
}

#[test]
fn a_guest_writes_to_a_raw_disk_and_the_host_sees_it() {
    let Some(kernel) = kernel("a_guest_writes_to_a_raw_disk_and_the_host_sees_it") else { return };
    let scratch = Scratch::new();
    let checksum = ext4_disk(&scratch);
    let disk = scratch.name("disk.raw");
    let serve = Serve::start(&["--format", "raw", "--socket", &scratch.name("s"), &disk]);
    let drive = format!("format=raw,file={}", serve.uri);
    let said = guest::run(
        &kernel,
        &scratch,
        &drive,
        "mount -t ext4 /dev/vda /mnt; md5sum /mnt/noise; echo 'written by the guest' > /mnt/new; sync; umount /mnt",
    );
    assert!(said.contains(&checksum), "{said}");
    assert!(serve.interrupt().success());
    let tool = |program: &str, arguments: &[&str]| {
        let path = std::env::var("PATH").unwrap_or_default() + ":/sbin:/usr/sbin";
        let output = Command::new(program).env("PATH", path).args(arguments).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    assert_eq!(tool("debugfs", &["-R", "cat /new", &disk]).1, "written by the guest\n");
    assert!(tool("e2fsck", &["-fn", &disk]).0, "the file system is clean");
}

/// QEMU is told of no other socket to come back to, so each upgrade must leave it the one that it has.
#[test]
fn a_guest_s_vhost_user_disk_is_upgraded_under_it_again_and_again() {
    let test = "a_guest_s_vhost_user_disk_is_upgraded_under_it_again_and_again";
    let Some(kernel) = kernel(test) else { return };
    let scratch = Scratch::new();
    let checksum = ext4_disk(&scratch);
    let (disk, socket) = (scratch.name("disk.raw"), scratch.name("s"));
    let serve = Serve::start(&["--format", "raw", "--vhost-user", &socket, "--queues", "2", &disk]);
    let script = "mount -t ext4 /dev/vda /mnt\nfor round in 1 2 3 4; do\n\
                  cp /mnt/noise /mnt/copy; sync; echo 3 > /proc/sys/vm/drop_caches; md5sum /mnt/copy; done\numount /mnt\n\
                  echo $(dmesg | grep -c 'I/O error') errors";
    let (said, upgrades) = std::thread::scope(|scope| {
        let guest = scope.spawn(|| guest::run_vhost_user(&kernel, &scratch, &socket, 2, script));
        let (mut daemons, mut upgrades) = (serve.daemons(), 0);
        while !guest.is_finished() {
            serve.upgrade();
            while !guest.is_finished() && serve.daemons() == daemons {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            (daemons, upgrades) = (serve.daemons(), upgrades + 1);
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        (guest.join().unwrap(), upgrades)
    });
    eprintln!("{upgrades} upgrades under a guest");
    assert_eq!(said.matches(&checksum).count(), 4, "{said}");
    assert!(said.contains("\n0 errors") && upgrades > 1, "{upgrades} upgrades: {said}");
    assert!(serve.interrupt().success());
    let path = std::env::var("PATH").unwrap_or_default() + ":/sbin:/usr/sbin";
    assert!(Command::new("e2fsck").env("PATH", path).args(["-fn", &disk]).output().unwrap().status.success());
}

#[test]
fn a_guest_uses_a_vhost_user_disk_over_two_queues_and_the_host_sees_it() {
    let Some(kernel) = kernel("a_guest_uses_a_vhost_user_disk_over_two_queues_and_the_host_sees_it") else { return };
    let scratch = Scratch::new();
    let checksum = ext4_disk(&scratch);
    let (disk, socket) = (scratch.name("disk.raw"), scratch.name("s"));
    let serve = Serve::start(&["--format", "raw", "--vhost-user", &socket, "--queues", "2", &disk]);
    assert_eq!(serve.uri, socket);
    let script = "echo $(cat /sys/block/vda/serial) $(ls /sys/block/vda/mq); mount -t ext4 -o discard /dev/vda /mnt; md5sum /mnt/noise\n\
                  cp /mnt/noise /mnt/copy; rm /mnt/noise; echo 'written by the guest' > /mnt/new; sync; fstrim /mnt; umount /mnt";
    let said = guest::run_vhost_user(&kernel, &scratch, &socket, 2, script);
    assert!(said.contains(&checksum) && said.contains("device 0 1\n"), "{said}");
    assert!(serve.interrupt().success());
    let path = std::env::var("PATH").unwrap_or_default() + ":/sbin:/usr/sbin";
    let tool = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).env("PATH", &path).args(arguments).output().unwrap();
        (output.status.success(), output.stdout)
    };
    assert_eq!(tool("debugfs", &["-R", "cat /new", &disk]).1, b"written by the guest\n");
    assert!(tool("debugfs", &["-R", "cat /copy", &disk]).1 == noise(5 << 20, 9), "what the guest copied");
    assert!(tool("e2fsck", &["-fn", &disk]).0, "the file system is clean");
}

#[test]
fn a_guest_reads_and_writes_vdi_vhd_and_a_vmdk_in_two_extents() {
    let test = "a_guest_reads_and_writes_vdi_vhd_and_a_vmdk_in_two_extents";
    if !judges(test, &["qemu-io"]) {
        return;
    }
    let Some(kernel) = kernel(test) else { return };
    let scratch = Scratch::new();
    let checksum = ext4_disk(&scratch);
    let raw = scratch.name("disk.raw");
    let rows = [
        ("vdi", "static=off", "64M"),
        ("vpc", "force_size=on", "64M"),
        ("vmdk", "subformat=twoGbMaxExtentSparse", "2200M"),
    ];
    let serves = rows.map(|(format, options, size)| {
        let image = scratch.name(&format!("disk.{format}"));
        run(harness::DOORLESS, &["img", "create", "-q", "-f", format, "-o", options, &image, size]);
        run(harness::DOORLESS, &["img", "convert", "-q", "-n", "-f", "raw", "-O", format, &raw, &image]);
        Serve::start(&["--socket", &scratch.name(format), &image])
    });
    let drives: Vec<String> = serves.iter().map(|serve| format!("format=raw,file={}", serve.uri)).collect();
    let script = "for disk in vda vdb vdc; do mount -t ext4 /dev/$disk /mnt; md5sum /mnt/noise; echo on $disk > /mnt/new; umount /mnt; done\n\
                  head -c 512 /dev/zero | tr '\\000' Z > /z; dd if=/z of=/dev/vdc bs=512 seek=4300800 conv=notrunc,fsync 2> /dev/null; sync";
    let said = guest::run_disks(&kernel, &scratch, &drives, script);
    assert_eq!(said.matches(&checksum).count(), 3, "{said}");
    for serve in serves {
        assert!(serve.interrupt().success());
    }
    for ((format, _, _), disk) in rows.into_iter().zip(["vda", "vdb", "vdc"]) {
        let (image, back) = (scratch.name(&format!("disk.{format}")), scratch.name("back.raw"));
        if format == "vmdk" {
            run("qemu-io", &["-r", "-f", format, "-c", "read -P 0x5a 2100M 512", &image]);
        }
        run("qemu-img", &["convert", "-f", format, "-O", "raw", &image, &back]);
        let path = std::env::var("PATH").unwrap_or_default() + ":/sbin:/usr/sbin";
        let output = Command::new("debugfs").env("PATH", path).args(["-R", "cat /new", &back]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), format!("on {disk}\n"), "{format}");
    }
}
