// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Persistent bitmaps after a crash at any moment: the image is sound but for leaked clusters, and a bitmap that claims to be
//! right has a mark wherever the disk has changed.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use std::process::Command;
use std::sync::Arc;

use block::bitmap::Bitmap;
use block::{BlockNode, ZeroFlags};
use support::image::{KINDS, Made, make};
use support::recording::{Journal, moments, recorded};
use support::{Random, judge, text};

const GRANULARITY_BITS: u32 = 12;
/// One state in so many is shown to qemu-img.
const FOREIGN_JUDGE: u64 = 20;

fn add(node: &BlockNode, name: &str) {
    node.check_new_bitmap(name, GRANULARITY_BITS).unwrap();
    let bitmap = Arc::new(Bitmap::new(name, GRANULARITY_BITS, node.len()).unwrap());
    bitmap.set_persistent(true);
    node.bitmaps().add(Arc::clone(&bitmap));
    node.bitmaps().set_enabled(&bitmap, true);
}

fn work(node: &BlockNode, random: &mut Random) {
    for _ in 0..6 {
        let offset = random.below(node.len() - 20_000);
        let len = 1 + random.below(20_000);
        if random.below(3) == 0 {
            node.write_zeroes(offset, len, ZeroFlags { may_unmap: true, fast_only: false }, false).unwrap();
        } else {
            node.write(&vec![random.next() as u8 | 1; len as usize], offset, false).unwrap();
        }
        if random.below(3) == 0 {
            node.flush().unwrap();
        }
    }
}

/// A state of the image's files that a crash has left; `since` is what the disk was when its bitmaps were added.
fn judge_state(made: &Made, files: &[Vec<u8>], since: &[(&str, &[u8])], foreign: bool) {
    let (file, _) = recorded(&Journal::silent(), 0, files[0].clone());
    let mut said = Vec::new();
    let report = block::check(&file, "qcow2", block::Repair::Nothing, &mut |finding| said.push(finding.to_owned()));
    assert!(report.is_ok_and(|report| report.corruptions + report.check_errors == 0), "{said:?}");
    if foreign {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("image"), &files[0]).unwrap();
        let image = dir.path().join("image");
        let options = format!(
            r#"json:{{"driver":"qcow2","backing":null,"file":{{"driver":"file","filename":"{}"}}}}"#,
            text(&image)
        );
        let output = Command::new("qemu-img").args(["check", "-q", &options]).output().unwrap();
        assert!(matches!(output.status.code(), Some(0 | 3)), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let opened = made.open(&Journal::silent(), files).unwrap();
    let now = opened.all().unwrap();
    for bitmap in opened.node.bitmaps().list().iter().filter(|bitmap| !bitmap.is_inconsistent()) {
        let (_, before) = since.iter().find(|(name, _)| *name == bitmap.name()).unwrap();
        let run = 1 << GRANULARITY_BITS;
        for (index, (now, before)) in now.chunks(run).zip(before.chunks(run)).enumerate() {
            let is_marked = bitmap.run((index * run) as u64, 1).1;
            assert!(now == before || is_marked, "bitmap '{}' misses a change at {:#x}", bitmap.name(), index * run);
        }
    }
}

#[test]
fn after_a_crash_a_bitmap_is_known_to_be_lost_or_marks_every_change() {
    if !judge("after_a_crash_a_bitmap_is_known_to_be_lost_or_marks_every_change", "qemu-img") {
        return;
    }
    let (mut states, mut lost, mut kept) = (0u64, 0u64, 0u64);
    for kind in KINDS.iter().filter(|kind| !kind.options.contains("data_file") && !kind.options.contains("compat=0.10"))
    {
        let made = make(kind);
        let mut random = Random(0xb17 ^ kind.name.len() as u64);
        let mut files = made.files.clone();
        let mut contents: Vec<Vec<u8>> = Vec::new();
        // It is added; it goes on; it is removed, and another comes.
        for session in 0..3 {
            let journal = Journal::new();
            let start = files.clone();
            let opened = made.open(&journal, &files).unwrap();
            contents.push(opened.all().unwrap());
            match session {
                0 => add(&opened.node, "b"),
                1 => {}
                _ => {
                    opened.node.remove_stored_bitmap("b").unwrap();
                    opened.node.bitmaps().remove("b").unwrap();
                    add(&opened.node, "c");
                }
            }
            work(&opened.node, &mut random);
            files = opened.close();
            let since: Vec<(&str, &[u8])> = vec![("b", &contents[0]), ("c", contents.last().unwrap())];
            let events = journal.events();
            let mut samples = Random(random.next());
            moments(&start, &events, |moment| {
                moment.states(&mut samples, 2, 1, |files, how| {
                    states += 1;
                    eprintln!("{}, session {session}, event {}: {how}", kind.name, moment.at);
                    judge_state(&made, &files, &since, states.is_multiple_of(FOREIGN_JUDGE));
                    let opened = made.open(&Journal::silent(), &files).unwrap();
                    let list = opened.node.bitmaps().list();
                    lost += list.iter().filter(|bitmap| bitmap.is_inconsistent()).count() as u64;
                    kept += list.iter().filter(|bitmap| !bitmap.is_inconsistent()).count() as u64;
                });
            });
        }
    }
    assert!(
        lost > 100 && kept > 20,
        "{states} states, in which {lost} bitmaps were lost and {kept} kept, say too little"
    );
}
