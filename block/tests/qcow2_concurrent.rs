// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Several threads on one qcow2 image: whoever reads finds what some write put there that was not written over before, and never a
//! foreign byte.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use block::{Ask, Detail, Target, Wait, ZeroFlags};
use support::guest::{ATOM, bytes_of, tags_of};
use support::image::{KINDS, make};
use support::recording::Journal;
use support::walk::walk;
use support::{Random, judge, read, run, text};

/// What happened to an atom, from when to when.
#[derive(Clone, Copy)]
struct Access {
    tag: u64,
    began: u64,
    ended: u64,
    what: What,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Write,
    /// May or may not have put zeroes there.
    Discard,
    Read,
}

/// Whether each read found something that can have been there: not written over by a write that began when the source had
/// ended, and ended before the read began.
fn judge_atom(accesses: &[Access]) -> Result<(), String> {
    for read in accesses.iter().filter(|access| access.what == What::Read) {
        let sources = accesses
            .iter()
            .filter(|source| source.what != What::Read && source.tag == read.tag && source.began < read.ended);
        let is_over = |source: &Access| {
            accesses
                .iter()
                .any(|other| other.what == What::Write && other.began > source.ended && other.ended < read.began)
        };
        if !sources.clone().any(|source| !is_over(source)) {
            let known = sources.count();
            return Err(format!("{:#x} was read, from {known} sources that were all written over", read.tag));
        }
    }
    Ok(())
}

#[test]
fn threads_that_overlap_never_show_a_foreign_byte() {
    if !judge("threads_that_overlap_never_show_a_foreign_byte", "qemu-img") {
        return;
    }
    for (number, kind) in KINDS.iter().enumerate() {
        let made = make(kind);
        let journal = Journal::silent();
        journal.set_yielding();
        let open = made.open(&journal, &made.files).unwrap();
        let atoms = made.tags.len();
        let cluster = open.node.info().cluster_size.unwrap() as usize / ATOM;
        let first = |tag| vec![Access { tag, began: 0, ended: 0, what: What::Write }];
        let history: Vec<Mutex<Vec<Access>>> = made.tags.iter().map(|&tag| Mutex::new(first(tag))).collect();
        let (clock, next_tag) = (AtomicU64::new(1), AtomicU64::new(1));
        let tick = || clock.fetch_add(1, Ordering::SeqCst);
        let note = |at: usize, tag, began, ended, what| {
            history[at].lock().unwrap().push(Access { tag, began, ended, what });
        };
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let (open, tick, note, next_tag) = (&open, &tick, &note, &next_tag);
                scope.spawn(move || {
                    let mut random = Random((number as u64 * 4 + thread + 1) << 24);
                    for _ in 0..80 {
                        // Half of them in one corner, where they meet.
                        let among = if random.below(2) == 0 { (8 * cluster).min(atoms) } else { atoms };
                        let at = random.below(among as u64) as usize;
                        let most = [4, cluster, 3 * cluster][random.below(3) as usize];
                        let count = (1 + random.below(most as u64) as usize).min(atoms - at);
                        let (offset, len) = ((at * ATOM) as u64, (count * ATOM) as u64);
                        let began = tick();
                        match random.below(10) {
                            0..4 => {
                                let tag = next_tag.fetch_add(1, Ordering::SeqCst) << 24;
                                let tags = (at..at + count).map(|at| tag | at as u64);
                                open.node.write(&bytes_of(tags), offset, random.below(8) == 0).unwrap();
                                let ended = tick();
                                (at..at + count).for_each(|at| note(at, tag | at as u64, began, ended, What::Write));
                            }
                            4 => {
                                let flags = ZeroFlags { may_unmap: random.below(2) == 0, fast_only: false };
                                open.node.write_zeroes(offset, len, flags, false).unwrap();
                                let ended = tick();
                                (at..at + count).for_each(|at| note(at, 0, began, ended, What::Write));
                            }
                            5 => {
                                open.node.discard(offset, len).unwrap();
                                let ended = tick();
                                (at..at + count).for_each(|at| note(at, 0, began, ended, What::Discard));
                            }
                            6 => open.node.flush().unwrap(),
                            _ => {
                                let tags = tags_of(&read(&open.node, offset, len as usize).unwrap());
                                let ended = tick();
                                // Two writes that overlap may share a sector, but not an atom of it: those are written whole.
                                let tags = tags.unwrap_or_else(|at| panic!("{}: a mixture at {at}", kind.name));
                                tags.iter()
                                    .enumerate()
                                    .for_each(|(i, &tag)| note(at + i, tag, began, ended, What::Read));
                            }
                        }
                    }
                });
            }
        });
        let now = tags_of(&open.all().unwrap()).unwrap();
        for (at, tag) in now.iter().enumerate() {
            note(at, *tag, tick(), u64::MAX, What::Read);
        }
        for (at, accesses) in history.iter().enumerate() {
            judge_atom(&accesses.lock().unwrap()).unwrap_or_else(|e| panic!("{}, atom {at}: {e}", kind.name));
        }
        let files = open.close();
        walk(&files[0]).unwrap_or_else(|e| panic!("{}: {e}", kind.name));
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::write(&image, &files[0]).unwrap();
        if files.len() == 1 {
            let name = format!(
                r#"json:{{"driver":"qcow2","backing":null,"file":{{"driver":"file","filename":"{}"}}}}"#,
                text(&image)
            );
            run("qemu-img", &["check", "-q", &name]);
        }
        assert!(made.open(&Journal::silent(), &files).unwrap().all().unwrap() == bytes_of(now));
    }
}

#[test]
fn a_compressed_cluster_is_read_although_another_part_of_it_is_written_meanwhile() {
    if !judge("a_compressed_cluster_is_read_although_another_part_of_it_is_written_meanwhile", "qemu-img") {
        return;
    }
    let made = make(KINDS.iter().find(|kind| kind.name == "compressed").unwrap());
    let (driver, _files) = made.driver(&Journal::silent(), &made.files).unwrap();
    let ask = Ask { detail: Detail::Place, wait: Wait::Allowed };
    let mapped = driver.map(0, ATOM as u64, ask).unwrap();
    assert!(matches!(mapped.target, Target::Computed), "the reader has looked and not read yet");
    let prepared = driver.prepare_write(1024, 512).unwrap();
    let Target::Data { node, offset } = prepared.target else { panic!("{prepared:?}") };
    node.write_growing(&[9; 512], offset, false).unwrap();
    prepared.commit().unwrap();
    let mut seen = [0; ATOM];
    driver.read_computed(&mut seen, 0).unwrap();
    assert_eq!(seen[..], bytes_of([made.tags[0]])[..]);
}
