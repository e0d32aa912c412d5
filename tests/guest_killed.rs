// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A real guest's ext4 on a qcow2 disk of ours, with the guest, the daemon and the manager killed in the middle of its work:
//! what the guest has synced is there, and both the image and the file system are sound.
//!
//! The kills end processes, not the machine: what a host's loss of power may do is for the replays of recorded writes.
#![allow(missing_docs, clippy::unwrap_used)]

mod guest;
mod harness;

use std::path::Path;
use std::process::Command;

use guest::{Kernel, Running};
use harness::{Scratch, Serve, judges, run};

/// Kills in one run, unless DOORLESS_GUEST_KILLS says more.
const KILLS: u64 = 2;
/// New files in a batch.
const FILES: u64 = 8;
/// A kill comes at most so many lines after the first synced batch: several batches' worth.
const LINES_BEFORE_KILL: u64 = 120;

/// Batches of new files, some by rename, some synced on their own; each batch also renames, overwrites and deletes files of the
/// third batch before it. A batch begins only when the host has answered for the last but one, so that one that the host has
/// seen synced (`SYNCED`) is not yet touched, however late the kill comes.
const WORK: &str = r#"
    stty -echo
    mount -t ext4 -o discard /dev/vda /mnt
    cd /mnt
    rm -rf old
    if [ -d work ]; then mv work old; fi
    mkdir work
    cd work
    sync
    content() { yes "file $ROUND.$1.$2" | head -c $(( ($2 * 7 + $1 % 5 + 1) * 1777 )); }
    batch=1
    while true; do
        for file in 0 1 2 3 4 5 6 7; do
            echo "AT $batch.$file"
            case $file in
            0 | 5) content $batch $file > new; mv new $batch.$file ;;
            1 | 6) content $batch $file | dd of=$batch.$file bs=4k conv=fsync 2>/dev/null ;;
            *) content $batch $file > $batch.$file ;;
            esac
        done
        before=$((batch - 3))
        if [ $before -gt 0 ]; then
            mv $before.0 $before.kept
            content $batch 7 | dd of=$before.7 conv=notrunc,fsync bs=4k 2>/dev/null
            mv $before.6 $before.5
            rm $before.1 $before.2 $before.3 $before.4
        fi
        echo "AT $batch sync"
        sync
        echo "SYNCED $batch"
        if [ $batch -gt 1 ]; then read answer; fi
        batch=$((batch + 1))
    done
"#;

#[test]
fn a_guest_killed_with_its_daemon_finds_all_that_it_had_synced() {
    let test = "a_guest_killed_with_its_daemon_finds_all_that_it_had_synced";
    let Some(kernel) = kernel(test) else { return };
    let scratch = Scratch::new();
    let image = ext4_image(&scratch);
    let kills = std::env::var("DOORLESS_GUEST_KILLS").map_or(KILLS, |kills| kills.parse().unwrap());
    for round in 1..=kills {
        // Every cluster is shared with a snapshot when a round begins: the guest's overwrites copy.
        run("qemu-img", &["snapshot", "-c", "before", &image]);
        let (synced, lines) = work_until_killed(&kernel, &scratch, &image, round);
        let leaks = check_image(&image);
        let raw = scratch.name("disk.raw");
        run("qemu-img", &["convert", "-O", "raw", &image, &raw]);
        check_file_system(&raw);
        check_files(&scratch, &raw, round, synced);
        eprintln!(
            "round {round}: killed {lines} lines after the first sync, {synced} batches synced, {leaks} leaked clusters"
        );
        run("qemu-img", &["snapshot", "-d", "before", &image]);
    }
}

fn kernel(test: &str) -> Option<Kernel> {
    let tools = ["qemu-system-x86_64", "qemu-img", "busybox", "cpio", "mke2fs", "debugfs", "e2fsck"];
    if !judges(test, &tools) {
        return None;
    }
    Kernel::judge(test)
}

/// A qcow2 of 64 MiB with an empty ext4: clusters of several blocks, so that writes both allocate and copy.
fn ext4_image(scratch: &Scratch) -> String {
    let (raw, image) = (scratch.name("empty.raw"), scratch.name("disk.qcow2"));
    let made = tool("mke2fs", &["-q", "-F", "-t", "ext4", "-b", "4096", &raw, "64M"]);
    assert_eq!(made.0, 0, "{}", made.1);
    run("qemu-img", &["convert", "-O", "qcow2", "-o", "cluster_size=16k", &raw, &image]);
    image
}

/// Serves the image to a guest and kills daemon, manager and guest at a moment that the round chooses: the last batch that the
/// guest had called synced, and the lines that it had printed since the first.
fn work_until_killed(kernel: &Kernel, scratch: &Scratch, image: &str, round: u64) -> (u64, u64) {
    let mut serve = Serve::start(&["--restarts", "0", "--socket", &scratch.name(&format!("s{round}")), image]);
    let drive = format!("format=raw,discard=unmap,file={}", serve.uri);
    let mut guest = Running::start(kernel, scratch, &drive, &format!("ROUND={round}\n{WORK}"));
    let lines = (round.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) % LINES_BEFORE_KILL;
    let mut synced = 0;
    let mut seen = 0;
    while synced == 0 || seen < lines {
        let line = guest.line();
        seen += u64::from(synced > 0);
        if let Some(batch) = line.strip_prefix("SYNCED ") {
            let batch = batch.parse().unwrap();
            assert_eq!(batch, synced + 1, "{:?}", guest.said);
            synced = batch;
            guest.answer();
        }
    }
    let daemon = rustix::process::Pid::from_raw(serve.daemon_pid().try_into().unwrap()).unwrap();
    rustix::process::kill_process(daemon, rustix::process::Signal::KILL).unwrap();
    serve.kill();
    guest.kill();
    (synced, lines)
}

/// qemu-img finds the image sound; how many clusters leak, which is allowed.
fn check_image(image: &str) -> u64 {
    let (code, said) = tool("qemu-img", &["check", image]);
    assert!(code == 0 || code == 3, "qemu-img check: exit code {code}\n{said}");
    let leaks = said.lines().find_map(|line| line.split_once(" leaked clusters were found"));
    leaks.map_or(0, |(count, _)| count.parse().unwrap())
}

/// After the replay of the journal e2fsck has nothing to repair.
fn check_file_system(raw: &str) {
    let (code, said) = tool("e2fsck", &["-fy", raw]);
    assert!(code == 0 || code == 1, "e2fsck -fy: exit code {code}\n{said}");
    // ext4 does not journal the sums in its superblock: any check after a replay sets them right.
    let lines: Vec<&str> = said.lines().collect();
    for pair in lines.windows(2) {
        let sums =
            ["Free blocks count wrong (", "Free inodes count wrong ("].iter().any(|sum| pair[0].starts_with(sum));
        assert!(!pair[1].contains("? yes") || sums, "e2fsck repaired:\n{said}");
    }
    let (code, said) = tool("e2fsck", &["-fn", raw]);
    assert_eq!(code, 0, "e2fsck -fn:\n{said}");
}

/// Every file of the batches that nothing had touched since they were synced is there and whole.
fn check_files(scratch: &Scratch, raw: &str, round: u64, synced: u64) {
    let out = scratch.path(&format!("files{round}"));
    std::fs::create_dir(&out).unwrap();
    let (code, said) = tool("debugfs", &["-R", &format!("rdump /work {}", out.display()), raw]);
    assert_eq!(code, 0, "{said}");
    let work = out.join("work");
    for file in 0..FILES {
        assert_file(&work.join(format!("{synced}.{file}")), &content(round, synced, file));
    }
    // What batch `synced` itself has done to an earlier one.
    if let Some(before) = synced.checked_sub(3).filter(|before| *before > 0) {
        assert_file(&work.join(format!("{before}.kept")), &content(round, before, 0));
        assert_file(&work.join(format!("{before}.5")), &content(round, before, 6));
        let (old, mut new) = (content(round, before, 7), content(round, synced, 7));
        new.extend_from_slice(old.get(new.len()..).unwrap_or_default());
        assert_file(&work.join(format!("{before}.7")), &new);
        for gone in 1..=4 {
            assert!(!work.join(format!("{before}.{gone}")).exists(), "{before}.{gone} is back");
        }
    }
    std::fs::remove_dir_all(out).unwrap();
}

fn assert_file(path: &Path, expected: &[u8]) {
    let found = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let differs = found.iter().zip(expected).position(|(found, expected)| found != expected);
    let lengths = (found.len(), expected.len());
    assert!(found == expected, "{}: differs at {differs:?}, lengths {lengths:?}", path.display());
}

/// What the script's `content` prints.
fn content(round: u64, batch: u64, file: u64) -> Vec<u8> {
    let len = usize::try_from((file * 7 + batch % 5 + 1) * 1777).unwrap();
    format!("file {round}.{batch}.{file}\n").into_bytes().into_iter().cycle().take(len).collect()
}

/// Exit code, and both outputs.
fn tool(program: &str, arguments: &[&str]) -> (i32, String) {
    let path = std::env::var("PATH").unwrap_or_default() + ":/sbin:/usr/sbin";
    let output = Command::new(program).env("PATH", path).args(arguments).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8_lossy(&said).into_owned())
}
