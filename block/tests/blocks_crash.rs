// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VDI, VHD and VMDK after a crash at any moment: what was flushed is there, what was not is old or new, nothing is damaged but
//! for leaked room, and work goes on. `DOORLESS_CRASH_SCRIPTS` says how many scripts each kind of image gets (default 1).
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use std::sync::Arc;

use block::{Alarm, BlockNode, CreateRequest, NodeAccess, OpenRequest, OptionValue, Repair, ZeroFlags, driver_named};
use support::guest::{ATOM, Guest, bytes_of, tags_of};
use support::recording::{Journal, moments, recorded};
use support::{Random, judge, name_in, read, run};

/// Format, options, bytes of the disk.
type Kind = (&'static str, &'static [(&'static str, &'static str)], u64);

const KINDS: &[Kind] = &[
    ("vdi", &[], 3 << 20),
    ("vpc", &[("force_size", "on")], 5 << 20),
    ("vmdk", &[], 1 << 20),
    ("vmdk", &[("zeroed_grain", "on")], 1 << 20),
];

/// One state in so many is shown to qemu-img.
const FOREIGN_JUDGE: u64 = 50;

fn scripts() -> u64 {
    std::env::var("DOORLESS_CRASH_SCRIPTS").ok().and_then(|number| number.parse().ok()).unwrap_or(1)
}

fn make(format: &str, options: &[(&'static str, &str)], size: u64) -> Vec<u8> {
    let (file, content) = recorded(&Journal::silent(), 0, Vec::new());
    let value = |text: &str| if text == "on" { OptionValue::Bool(true) } else { OptionValue::Str(text.into()) };
    let options = options.iter().map(|(name, text)| (*name, value(text))).collect();
    let request = CreateRequest { file, data_file: None, extents: Vec::new(), parent_cid: None, size, options };
    block::create(format, &request).unwrap();
    content.lock().unwrap().clone()
}

fn open(format: &str, file: Arc<BlockNode>) -> block::Result<BlockNode> {
    let entry = driver_named(format).unwrap();
    let driver = (entry.open)(OpenRequest {
        descriptor: None,
        files: Vec::new(),
        filename: String::new(),
        children: [("file", file)].into(),
        detached: [].into(),
        options: [].into(),
        writable: true,
        facts_only: false,
        node_name: "image".into(),
        alarm: Alarm::default(),
    })?;
    Ok(BlockNode::new("image", entry.name, "", NodeAccess { writable: true, unmap: true }, driver))
}

/// Whether nothing but leaks is found.
fn is_sound(format: &str, image: &[u8]) -> Result<(), String> {
    let (file, _) = recorded(&Journal::silent(), 0, image.to_vec());
    let mut said = Vec::new();
    match block::check(&file, format, Repair::Nothing, &mut |text| said.push(text.to_owned())) {
        // The second copies of a VMDK's grain tables are written with the first ones, and may be older or newer.
        Ok(report) if report.corruptions == 0 || format == "vmdk" && said.iter().all(|text| !is_damage(text)) => Ok(()),
        other => Err(format!("the check says {other:?}: {said:?}")),
    }
}

fn is_damage(said: &str) -> bool {
    said.starts_with("ERROR") && !said.contains("two copies")
}

/// Opens what a crash left, looks at it, and works on.
fn judge_state(format: &str, guest: &Guest, at: usize, image: &[u8], number: u64, foreign: bool) -> Result<(), String> {
    is_sound(format, image)?;
    if foreign && format != "vpc" {
        let dir = tempfile::tempdir().unwrap();
        let (path, name) = name_in(dir.path(), "image");
        std::fs::write(path, image).unwrap();
        // It opens it and sees the same; of VDI's leaks it says that they are errors.
        run("qemu-img", &["compare", "-q", "-f", format, "-F", format, &name, &name]);
    }
    let (file, content) = recorded(&Journal::silent(), 0, image.to_vec());
    let node = open(format, file).map_err(|e| format!("open: {e}"))?;
    let bytes = read(&node, 0, node.len() as usize).map_err(|e| format!("read: {e}"))?;
    guest.check(&bytes, at)?;
    let mut tags = tags_of(&bytes).unwrap();
    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ number);
    for write in 0..3u64 {
        let first = random.below(tags.len() as u64) as usize;
        let count = (1 + random.below(24) as usize).min(tags.len() - first);
        let new: Vec<u64> = (first..first + count).map(|at| (0xaf7e + write) << 48 | at as u64).collect();
        node.write(&bytes_of(new.iter().copied()), (first * ATOM) as u64, false).map_err(|e| format!("write: {e}"))?;
        tags[first..first + count].copy_from_slice(&new);
    }
    node.flush().map_err(|e| format!("flush: {e}"))?;
    drop(node);
    let image = content.lock().unwrap().clone();
    is_sound(format, &image).map_err(|e| format!("after it was written again: {e}"))?;
    let (file, _) = recorded(&Journal::silent(), 0, image);
    let node = open(format, file).map_err(|e| format!("open again: {e}"))?;
    if read(&node, 0, node.len() as usize).map_err(|e| format!("read again: {e}"))? != bytes_of(tags) {
        return Err("what was written after the crash is gone".into());
    }
    Ok(())
}

/// A guest at work: writes, zeroes, flushes.
fn work(node: &BlockNode, journal: &Arc<Journal>, guest: &mut Guest, random: &mut Random, requests: u64) {
    let atoms = node.len() as usize / ATOM;
    for _ in 0..requests {
        let first = random.below(atoms as u64) as usize;
        let most = if random.below(2) == 0 { 8 } else { 600 };
        let count = (1 + random.below(most) as usize).min(atoms - first);
        let (offset, len) = ((first * ATOM) as u64, (count * ATOM) as u64);
        match random.below(8) {
            0 => {
                let since = guest.tick();
                node.flush().unwrap();
                guest.flushed(since, journal.now());
            }
            1 => {
                guest.begin(first, vec![vec![0]; count], journal.now());
                node.write_zeroes(offset, len, ZeroFlags { may_unmap: true, fast_only: false }, false).unwrap();
                guest.end(first, count);
            }
            _ => {
                let tags = guest.new_tags(first, count);
                guest.begin(first, tags.iter().map(|&tag| vec![tag]).collect(), journal.now());
                node.write(&bytes_of(tags), offset, false).unwrap();
                guest.end(first, count);
            }
        }
    }
}

#[test]
fn after_a_crash_at_any_moment_flushed_data_is_there_and_nothing_is_damaged() {
    if !judge("after_a_crash_at_any_moment_flushed_data_is_there_and_nothing_is_damaged", "qemu-img") {
        return;
    }
    let mut states = 0;
    for &(format, options, size) in KINDS {
        let made = make(format, options, size);
        for script in 0..scripts() {
            let mut random = Random(0xc4a5_4000 + (script << 8) + size + options.len() as u64);
            let journal = Journal::new();
            let (file, _) = recorded(&journal, 0, made.clone());
            let node = open(format, file).unwrap();
            let mut guest = Guest::new(&vec![0; node.len() as usize / ATOM], node.len());
            work(&node, &journal, &mut guest, &mut random, 20);
            guest.check_now(&read(&node, 0, node.len() as usize).unwrap()).unwrap();
            drop(node);
            let events = journal.events();
            let mut seed = Random(random.next());
            moments(std::slice::from_ref(&made), &events, |moment| {
                moment.states(&mut random, 1, 1, |files, how| {
                    states += 1;
                    let foreign = seed.below(FOREIGN_JUDGE) == 0;
                    if let Err(e) = judge_state(format, &guest, moment.at, &files[0], states, foreign) {
                        panic!(
                            "{format} {options:?}, script {script}: a crash at event {} that leaves {how}: {e}",
                            moment.at
                        );
                    }
                });
            });
        }
    }
    eprintln!("{states} states judged");
    assert!(states > 100, "{states}");
}
