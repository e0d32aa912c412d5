// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A disk as a plain file: what programs that know nothing of disks do with it, what is refused, and that no mount stays.
//!
//! Most of it needs the right to mount. Where that is missing the tests skip by name.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;
#[path = "harness/mounted.rs"]
mod mounted;

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;

use harness::{Scratch, Serve, judges, noise, python_with, run, text};
use mounted::{Served, can_mount, mounts};
use rustix::fs::{FallocateFlags, OFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

const MIB: usize = 1 << 20;

#[test]
fn foreign_programs_find_the_image_byte_for_byte_and_hole_for_hole() {
    let test = "foreign_programs_find_the_image_byte_for_byte_and_hole_for_hole";
    if !can_mount(test) || !judges(test, &["qemu-img", "cp", "cmp"]) {
        return;
    }
    let scratch = Scratch::new();
    let (image, disk, copy) = (scratch.name("image"), scratch.name("disk"), scratch.name("copy"));
    let file = File::create(&image).unwrap();
    file.set_len(16 * MIB as u64).unwrap();
    file.write_all_at(&noise(MIB, 3), 4 * MIB as u64).unwrap();
    file.write_all_at(&noise(4096, 4), 9 * MIB as u64).unwrap();
    fs::write(&disk, "").unwrap();
    let map = |path: &str| run("qemu-img", &["map", "-f", "raw", "--output=json", path]);
    let expected = map(&image);
    let serve = Serve::start(&["--format", "raw", "--read-only", &image, "--fuse", &disk]);
    assert_eq!(serve.uri, disk);
    assert_eq!(map(&disk), expected);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &image, &disk]);
    run("cp", &["--sparse=auto", &disk, &copy]);
    run("cmp", &[&image, &copy]);
    let refused = OpenOptions::new().write(true).open(&disk).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ReadOnlyFilesystem);
    assert!(serve.interrupt().success());
    assert_eq!(mounts(Path::new(&disk)), 0);
}

#[test]
fn a_qcow2_image_may_be_replaced_by_its_own_content() {
    let test = "a_qcow2_image_may_be_replaced_by_its_own_content";
    if !can_mount(test) || !judges(test, &["qemu-img"]) {
        return;
    }
    let scratch = Scratch::new();
    let content = noise(MIB, 8);
    fs::write(scratch.path("raw"), &content).unwrap();
    let image = scratch.name("disk.qcow2");
    run("qemu-img", &["convert", "-O", "qcow2", &scratch.name("raw"), &image]);
    let before = fs::read(&image).unwrap();
    let serve = Serve::start(&["--read-only", &image, "--fuse", &image]);
    assert!(fs::read(&image).unwrap() == content);
    assert!(serve.interrupt().success());
    assert!(fs::read(&image).unwrap() == before);
}

/// A little generator: the same numbers every time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, most: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % most
    }
}

#[test]
fn any_order_of_reads_writes_and_holes_agrees_with_memory() {
    if !can_mount("any_order_of_reads_writes_and_holes_agrees_with_memory") {
        return;
    }
    let mut model = noise(3 * MIB, 11);
    let served = Served::start(&model, &[]);
    let disk = served.disk();
    let direct = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::DIRECT.bits().cast_signed())
        .open(served.scratch.path("disk"));
    let direct = direct.unwrap();
    let mut dice = Dice(42);
    let mut buffer = vec![0; 3 * MIB];
    for step in 0..600 {
        let at = dice.below(model.len());
        // Small ones mostly; up to more than the kernel gives at once.
        let most = [700, 5000, 100_000, 3 * MIB][dice.below(4)];
        let len = (1 + dice.below(most)).min(model.len() - at);
        let range = at..at + len;
        match dice.below(6) {
            0 | 1 => {
                let bytes = noise(len, step);
                disk.write_all_at(&bytes, at as u64).unwrap();
                model[range].copy_from_slice(&bytes);
            }
            2 => {
                fallocate(&disk, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at as u64, len as u64)
                    .unwrap();
                model[range].fill(0);
            }
            3 => {
                fallocate(&disk, FallocateFlags::ZERO_RANGE, at as u64, len as u64).unwrap();
                model[range].fill(0);
            }
            4 => {
                let file = if at.is_multiple_of(2) { &disk } else { &direct };
                file.read_exact_at(&mut buffer[..len], at as u64).unwrap();
                assert!(buffer[..len] == model[range], "step {step}: {len} bytes at {at}");
            }
            _ => disk.sync_all().unwrap(),
        }
    }
    // A read across the end is short.
    assert_eq!(disk.read_at(&mut buffer[..1000], model.len() as u64 - 10).unwrap(), 10);
    assert_eq!(disk.read_at(&mut buffer[..1000], model.len() as u64).unwrap(), 0);
    drop((disk, direct));
    assert!(served.end() == model);
}

#[test]
fn writers_in_parallel_lose_nothing() {
    let test = "writers_in_parallel_lose_nothing";
    if !can_mount(test) || !judges(test, &["fio"]) {
        return;
    }
    let served = Served::start(&vec![0; 16 * MIB], &[]);
    let file = format!("--filename={}", served.scratch.name("disk"));
    for engine in [["--ioengine=libaio", "--direct=1"], ["--ioengine=psync", "--direct=0"]] {
        let common =
            ["--name=x", "--size=4m", "--offset_increment=4m", "--numjobs=4", "--rw=randrw", "--bsrange=512-64k"];
        let verify = ["--iodepth=16", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0"];
        run("fio", &[&common[..], &verify, &engine, &[&file]].concat());
    }
}

#[test]
fn seeking_finds_data_and_holes() {
    if !can_mount("seeking_finds_data_and_holes") {
        return;
    }
    let served = Served::start(&vec![7; MIB], &[]);
    let disk = served.disk();
    fallocate(&disk, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 256 << 10, 256 << 10).unwrap();
    assert_eq!(seek(&disk, SeekFrom::Hole(0)), Ok(256 << 10));
    assert_eq!(seek(&disk, SeekFrom::Data(300 << 10)), Ok(512 << 10));
    assert_eq!(seek(&disk, SeekFrom::Hole(600 << 10)), Ok(1 << 20));
    assert_eq!(seek(&disk, SeekFrom::End(-1)), Ok((1 << 20) - 1));
    assert_eq!(seek(&disk, SeekFrom::Data(1 << 20)), Err(Errno::NXIO));
    assert_eq!(seek(&disk, SeekFrom::Hole(1 << 20)), Err(Errno::NXIO));
}

#[test]
fn a_loop_device_takes_a_file_system_that_fsck_finds_sound() {
    let test = "a_loop_device_takes_a_file_system_that_fsck_finds_sound";
    if !can_mount(test) || !judges(test, &["losetup", "mkfs.ext4", "e2fsck", "mount", "umount"]) {
        return;
    }
    let served = Served::start(&vec![0; 48 * MIB], &[]);
    let disk = served.scratch.name("disk");
    let Ok(device) = Command::new("losetup").args(["--find", "--show", &disk]).output() else { return };
    if !device.status.success() {
        let why = String::from_utf8_lossy(&device.stderr).trim().to_owned();
        eprintln!("skipped: {test}: no loop device: {why}");
        return;
    }
    let device = String::from_utf8(device.stdout).unwrap().trim().to_owned();
    let tree = served.scratch.path("tree");
    fs::create_dir(&tree).unwrap();
    let (content, file) = (served.scratch.name("content"), tree.join("file"));
    fs::write(&content, noise(5 * MIB, 9)).unwrap();
    // By other programs: a file that this process has open is open, for a moment, in whatever another test starts.
    run("mkfs.ext4", &["-q", &device]);
    run("mount", &[&device, text(&tree)]);
    run("cp", &[&content, text(&file)]);
    run("umount", &[text(&tree)]);
    run("mount", &[&device, text(&tree)]);
    run("cmp", &[&content, text(&file)]);
    run("umount", &[text(&tree)]);
    run("losetup", &["--detach", &device]);
    run("e2fsck", &["-fn", &disk]);
    let image = served.scratch.name("image");
    assert!(served.serve.interrupt().success());
    run("e2fsck", &["-fn", &image]);
}

#[test]
fn a_shared_mapping_reaches_the_image_and_is_no_way_past_the_end() {
    let test = "a_shared_mapping_reaches_the_image_and_is_no_way_past_the_end";
    let (true, Some(python)) = (can_mount(test), python_with(test, "mmap")) else { return };
    let served = Served::start(&noise(MIB, 5), &[]);
    let script = "import mmap, sys
file = open(sys.argv[1], 'r+b')
try:
    area = mmap.mmap(file.fileno(), 0)
except OSError as error:
    sys.exit('no mapping: ' + str(error)) if error.errno != 19 else sys.exit(0)
assert len(area) == 1 << 20
area[4090:4100] = b'0123456789'
area.flush()
file.seek(4090)
assert file.read(10) == b'0123456789'
area.close()
print('mapped')
";
    let said = run(python, &["-c", script, &served.scratch.name("disk")]);
    let image = served.end();
    if said.is_empty() {
        return eprintln!("skipped: {test}: this kernel maps no file that is open for direct I/O (Linux 6.6 does)");
    }
    assert_eq!(&image[4090..4100], b"0123456789");
}

#[test]
fn a_file_that_may_not_grow_keeps_its_size_whatever_is_tried() {
    if !can_mount("a_file_that_may_not_grow_keeps_its_size_whatever_is_tried") {
        return;
    }
    let served = Served::start(&vec![1; MIB], &[]);
    let disk = served.disk();
    let errno = |result: std::io::Result<()>| Errno::from_io_error(&result.unwrap_err());
    for size in [0, 1, MIB as u64 + 1, (1 << 63) - 1] {
        assert_eq!(errno(disk.set_len(size)), Some(Errno::PERM), "{size}");
    }
    disk.set_len(MIB as u64).unwrap();
    assert_eq!(disk.write_at(&[2; 100], MIB as u64 - 60).unwrap(), 60, "what fits");
    assert_eq!(disk.write_at(&[2; 100], MIB as u64).unwrap_err().kind(), ErrorKind::StorageFull);
    assert_eq!(disk.write_at(&[2; 100], (1 << 62) + 5).unwrap_err().kind(), ErrorKind::StorageFull);
    let allocate = |mode, at, len| fallocate(&disk, mode, at, len);
    assert_eq!(allocate(FallocateFlags::empty(), 0, 2 << 20), Err(Errno::OPNOTSUPP));
    assert_eq!(allocate(FallocateFlags::ZERO_RANGE, 1 << 19, 1 << 20), Err(Errno::NOSPC));
    assert_eq!(allocate(FallocateFlags::COLLAPSE_RANGE, 0, 4096), Err(Errno::OPNOTSUPP));
    // Beyond the end there is nothing to punch.
    assert_eq!(allocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 1 << 40, 4096), Ok(()));
    assert_eq!(File::create(served.scratch.path("disk")).unwrap_err().kind(), ErrorKind::PermissionDenied, "O_TRUNC");
    assert_eq!(disk.metadata().unwrap().len(), MIB as u64);
    drop(disk);
    assert_eq!(served.end()[..MIB - 60], vec![1; MIB - 60]);
}

#[test]
fn a_growable_file_grows_by_writes_truncation_and_allocation() {
    if !can_mount("a_growable_file_grows_by_writes_truncation_and_allocation") {
        return;
    }
    let served = Served::start(&vec![1; 4096], &["--growable"]);
    let disk = served.disk();
    let size = || disk.metadata().unwrap().len();
    disk.write_all_at(&[2; 8192], 4096).unwrap();
    assert_eq!(size(), 12288);
    disk.set_len(65536).unwrap();
    fallocate(&disk, FallocateFlags::empty(), 1 << 20, 4096).unwrap();
    assert_eq!(size(), (1 << 20) + 4096);
    let mut bytes = vec![9; 12288];
    disk.read_exact_at(&mut bytes, 8192).unwrap();
    assert_eq!((&bytes[..4096], &bytes[4096..]), (&[2; 4096][..], &[0; 8192][..]));
    disk.set_len(8192).unwrap();
    assert_eq!(size(), 8192);
    // Eight exbibytes: no file system of the host has files of that size, or this one says so itself.
    let refused = disk.set_len((1 << 63) - 1).unwrap_err();
    assert_eq!(Errno::from_io_error(&refused), Some(Errno::FBIG));
    assert_eq!(size(), 8192);
    // As a copy does it: truncated to nothing, then written.
    let content = noise(MIB, 13);
    fs::write(served.scratch.path("disk"), &content).unwrap();
    drop(disk);
    assert!(served.end() == content);
}

#[test]
fn the_owner_may_let_others_in_only_where_others_may_come() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    if !can_mount("the_owner_may_let_others_in_only_where_others_may_come") {
        return;
    }
    let mode = |mode| fs::Permissions::from_mode(mode);
    let shared = Served::start(&[0; 4096], &["--allow-other", "on"]);
    let disk = shared.disk();
    assert_eq!(disk.metadata().unwrap().mode(), 0o100_600);
    disk.set_permissions(mode(0o644)).unwrap();
    std::os::unix::fs::fchown(&disk, Some(12), Some(34)).unwrap();
    let seen = disk.metadata().unwrap();
    assert_eq!((seen.mode(), seen.uid(), seen.gid()), (0o100_644, 12, 34));
    assert!(disk.set_permissions(mode(0o755)).is_err(), "nobody executes a disk");
    let own = Served::start(&[0; 4096], &["--allow-other", "off"]);
    let refused = own.disk().set_permissions(mode(0o644)).unwrap_err();
    assert_eq!(Errno::from_io_error(&refused), Some(Errno::OPNOTSUPP));
}

#[test]
fn nbd_clients_and_the_file_see_each_other_at_once() {
    let test = "nbd_clients_and_the_file_see_each_other_at_once";
    if !can_mount(test) || !judges(test, &["qemu-io"]) {
        return;
    }
    let scratch = Scratch::new();
    let (image, disk, socket) = (scratch.name("image"), scratch.name("disk"), scratch.name("socket"));
    fs::write(&image, vec![0; MIB]).unwrap();
    fs::write(&disk, "").unwrap();
    let serve = Serve::start(&["--format", "raw", &image, "--fuse", &disk, "--socket", &socket]);
    assert!(serve.said.contains(&format!("file: {disk}")), "{:?}", serve.said);
    let file = OpenOptions::new().read(true).write(true).open(&disk).unwrap();
    let mut byte = [1];
    file.read_exact_at(&mut byte, 5000).unwrap();
    run("qemu-io", &["-f", "raw", "-c", "write -P 0x5a 4096 4096", &serve.uri]);
    file.read_exact_at(&mut byte, 5000).unwrap();
    assert_eq!(byte, [0x5a], "nothing is cached");
    file.write_all_at(&[0x33; 4096], 4096).unwrap();
    run("qemu-io", &["-f", "raw", "-c", "read -P 0x33 4096 4096", &serve.uri]);
}
