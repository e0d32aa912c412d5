// SPDX-License-Identifier: Apache-2.0 OR MIT
//! qcow2 after a crash at any moment: the image is sound but for leaked clusters, what was flushed is there, what was not is old or
//! new, and work goes on.
//!
//! A guest works on recorded files; then the files are put into every state that a crash may have left (sampled where there
//! are too many), and each is opened and judged. `DOORLESS_CRASH_SCRIPTS` says how many scripts each kind of image gets
//! (default 1).
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use std::process::Command;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use support::guest::{ATOM, Guest, bytes_of, tags_of};
use support::image::{KINDS, Made, make};
use support::recording::{Journal, moments, recorded};
use support::session::{Request, Session};
use support::walk::walk;
use support::{Random, judge, text};

/// One state in so many is shown to qemu-img.
const FOREIGN_JUDGE: u64 = 60;

static STATES: AtomicU64 = AtomicU64::new(0);
static CHECKED: AtomicU64 = AtomicU64::new(0);

fn scripts() -> u64 {
    std::env::var("DOORLESS_CRASH_SCRIPTS").ok().and_then(|number| number.parse().ok()).unwrap_or(1)
}

/// Whether qemu-img finds nothing but leaks.
fn qemu_agrees(files: &[Vec<u8>]) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let mut options = r#"json:{"driver":"qcow2","backing":null"#.to_owned();
    for (content, (name, edge)) in files.iter().zip([("image", "file"), ("data", "data-file")]) {
        std::fs::write(dir.path().join(name), content).unwrap();
        options += &format!(r#","{edge}":{{"driver":"file","filename":"{}"}}"#, text(&dir.path().join(name)));
    }
    options.push('}');
    let output = Command::new("qemu-img").args(["check", "-q", &options]).output().unwrap();
    CHECKED.fetch_add(1, Ordering::Relaxed);
    match output.status.code() {
        Some(0 | 3) => Ok(()),
        code => Err(format!("qemu-img says {code:?}: {}", String::from_utf8_lossy(&output.stderr))),
    }
}

/// Whether our own check finds nothing but leaks.
fn checker_agrees(image: &[u8]) -> Result<(), String> {
    let (file, _) = recorded(&Journal::silent(), 0, image.to_vec());
    let mut said = Vec::new();
    let report = block::check(&file, "qcow2", block::Repair::Nothing, &mut |finding| said.push(finding.to_owned()));
    match report {
        Ok(report) if report.corruptions + report.check_errors == 0 => Ok(()),
        other => Err(format!("our check says {other:?}: {said:?}")),
    }
}

/// Opens what a crash at event `at` left, looks at it, and works on.
fn judge_state(made: &Made, guest: &Guest, at: usize, files: &[Vec<u8>], foreign: bool) -> Result<(), String> {
    walk(&files[0]).map_err(|e| format!("before it is opened: {e}"))?;
    checker_agrees(&files[0])?;
    if foreign {
        qemu_agrees(files)?;
    }
    let number = STATES.fetch_add(1, Ordering::Relaxed);
    let opened = made.open(&Journal::silent(), files).map_err(|e| format!("open: {e}"))?;
    let bytes = opened.all().map_err(|e| format!("read: {e}"))?;
    guest.check(&bytes, at)?;
    let mut tags = tags_of(&bytes).unwrap();
    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ number);
    for write in 0..4u64 {
        let first = random.below(tags.len() as u64) as usize;
        let count = (1 + random.below(24) as usize).min(tags.len() - first);
        let new: Vec<u64> = (first..first + count).map(|at| (0xaf7e + write) << 48 | at as u64).collect();
        let written = opened.node.write(&bytes_of(new.iter().copied()), (first * ATOM) as u64, false);
        written.map_err(|e| format!("write after the crash: {e}"))?;
        tags[first..first + count].copy_from_slice(&new);
    }
    opened.node.flush().map_err(|e| format!("flush after the crash: {e}"))?;
    let expected = bytes_of(tags);
    if opened.all().map_err(|e| format!("read what was written after the crash: {e}"))? != expected {
        return Err("what was written after the crash is not there".into());
    }
    let files = opened.close();
    walk(&files[0]).map_err(|e| format!("after it was written again: {e}"))?;
    let again = made.open(&Journal::silent(), &files).map_err(|e| format!("open again: {e}"))?;
    if again.all().map_err(|e| format!("read again: {e}"))? != expected {
        return Err("what was written after the crash is gone".into());
    }
    if foreign { qemu_agrees(&files) } else { Ok(()) }
}

/// Puts the files into the states that a crash can have left at any moment of a session, and judges each.
fn replay(session: Session, random: &mut Random, samples: u64) -> Result<(), String> {
    let Session { made, journal, open, guest, .. } = session;
    let guest = guest.into_inner().unwrap();
    guest.check_now(&open.all().map_err(|e| format!("read: {e}"))?)?;
    let files = open.close();
    walk(&files[0]).map_err(|e| format!("closed: {e}"))?;
    let events = journal.events();
    let mut seed = Random(random.next());
    let mut found = Ok(());
    moments(&made.files, &events, |moment| {
        moment.states(random, 2, samples, |files, how| {
            let foreign = seed.below(FOREIGN_JUDGE) == 0;
            if found.is_ok() {
                found = judge_state(&made, &guest, moment.at, &files, foreign)
                    .map_err(|e| format!("a crash at event {} of {} that leaves {how}: {e}", moment.at, events.len()));
            }
        });
    });
    found
}

/// Runs `script` for every kind of image and every number of a script, on two threads.
fn for_all_kinds(script: impl Fn(&Arc<Made>, u64) -> Result<(), String> + Sync) {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(kind) = KINDS.get(next.fetch_add(1, Ordering::SeqCst)) {
                    let made = make(kind);
                    for number in 0..scripts() {
                        if let Err(e) = script(&made, number) {
                            failed.lock().unwrap().push(format!("{}, script {number}: {e}", kind.name));
                            break;
                        }
                    }
                }
            });
        }
    });
    let (states, checked) = (STATES.load(Ordering::Relaxed), CHECKED.load(Ordering::Relaxed));
    eprintln!("{states} states judged so far, {checked} of them by qemu-img");
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn after_a_crash_at_any_moment_flushed_data_is_there_and_the_image_is_sound() {
    if !judge("after_a_crash_at_any_moment_flushed_data_is_there_and_the_image_is_sound", "qemu-img") {
        return;
    }
    for_all_kinds(|made, number| {
        let mut random = Random(0xc0ff_ee00 + (number << 8) + made.kind.name.len() as u64);
        let session = Session::start(made);
        session.work(&mut random, 40, made.kind.start != support::image::Start::Snapshot);
        replay(session, &mut random, 2)
    });
}

#[test]
fn after_a_crash_under_two_threads_flushed_data_is_there_and_the_image_is_sound() {
    if !judge("after_a_crash_under_two_threads_flushed_data_is_there_and_the_image_is_sound", "qemu-img") {
        return;
    }
    for_all_kinds(|made, number| {
        let session = Session::start(made);
        session.journal.set_yielding();
        let half = session.open.node.len() as usize / ATOM / 2;
        std::thread::scope(|scope| {
            for thread in 0..2usize {
                let session = &session;
                scope.spawn(move || {
                    let mut random = Random(0x7ead + ((number * 2 + thread as u64) << 16));
                    for _ in 0..16 {
                        let request = session.choose(&mut random, thread * half..(thread + 1) * half);
                        session.perform(&request).unwrap();
                    }
                    session.perform(&Request::Flush).unwrap();
                });
            }
        });
        replay(session, &mut Random(0x2_7ead + number), 2)
    });
}
