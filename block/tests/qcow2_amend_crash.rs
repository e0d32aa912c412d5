// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Refcounts get another width, or the image an older version: at any moment of a crash it is sound and holds what it held.
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::path::Path;

use block::{OptionValue, Options, Repair};
use support::recording::{Journal, moments, recorded};
use support::walk::walk;
use support::{Random, judge, name_in, run, text};

/// An image with data, and with a snapshot where the counts can say it.
fn image(dir: &Path, bits: u32, cluster: &str) -> Vec<u8> {
    let (_, path) = name_in(dir, "image.qcow2");
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", &format!("refcount_bits={bits},cluster_size={cluster}"), &path, "2M"],
    );
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 100k", "-c", "write -P 2 1M 300k", &path]);
    if bits > 1 {
        run("qemu-img", &["snapshot", "-c", "one", &path]);
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 3 64k 64k", &path]);
    }
    std::fs::read(path).unwrap()
}

fn sound(bytes: Vec<u8>) -> Result<(), String> {
    walk(&bytes)?;
    let (file, _) = recorded(&Journal::silent(), 0, bytes);
    let mut said = Vec::new();
    let report = block::check(&file, "qcow2", Repair::Nothing, &mut |finding| said.push(finding.to_owned()));
    match report {
        Ok(report) if report.corruptions + report.check_errors == 0 => Ok(()),
        other => Err(format!("{other:?}: {said:?}")),
    }
}

#[test]
fn another_refcount_width_survives_a_crash_at_any_moment() {
    if !judge("another_refcount_width_survives_a_crash_at_any_moment", "qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    for (from, to, cluster) in [(16, 64, "512"), (16, 2, "4k"), (1, 32, "512"), (64, 8, "64k")] {
        let before = image(dir.path(), from, cluster);
        let (journal, path) = (Journal::new(), dir.path().join("after.qcow2"));
        let (file, content) = recorded(&journal, 0, before.clone());
        let options = Options::from([("refcount_bits", OptionValue::Size(to))]);
        block::amend(&file, "qcow2", &options).unwrap();
        let after = content.lock().unwrap().clone();
        std::fs::write(&path, &after).unwrap();
        run("qemu-img", &["check", text(&path)]);
        let original = dir.path().join("image.qcow2");
        run("qemu-img", &["compare", text(&original), text(&path)]);
        let info = run("qemu-img", &["info", text(&path)]);
        assert!(info.contains(&format!("refcount bits: {to}\n")), "{info}");
        let events = journal.events();
        let start = [before];
        let (mut states, mut old, mut new) = (0, 0, 0);
        moments(&start, &events, |moment| {
            moment.states(&mut random, 4, 8, |files, how| {
                let bytes = files.into_iter().next().unwrap();
                // Bytes 96 to 99: the width.
                let width = 1u64 << bytes[99];
                assert!(width == u64::from(from) || width == to, "{width}");
                (old, new) = (old + u64::from(width != to), new + u64::from(width == to));
                states += 1;
                sound(bytes).unwrap_or_else(|e| panic!("{from} to {to}, event {}, {how}: {e}", moment.at));
            });
        });
        assert!(states > 3 && old > 0 && new > 0, "{states}: {old} {new}");
    }
}

#[test]
fn a_width_that_cannot_say_the_counts_is_refused() {
    if !judge("a_width_that_cannot_say_the_counts_is_refused", "qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let before = image(dir.path(), 16, "64k");
    for (bits, why) in [(1, "has a refcount of 2"), (3, "must be a power of two"), (128, "may not exceed 64 bits")] {
        let (file, content) = recorded(&Journal::silent(), 0, before.clone());
        let options = Options::from([("refcount_bits", OptionValue::Size(bits))]);
        let refused = block::amend(&file, "qcow2", &options).unwrap_err().to_string();
        assert!(refused.contains(why), "{bits}: {refused}");
        assert!(content.lock().unwrap().starts_with(&before), "{bits}: nothing has changed");
    }
}

#[test]
fn an_older_version_survives_a_crash_at_any_moment() {
    if !judge("an_older_version_survives_a_crash_at_any_moment", "qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let base = name_in(dir.path(), "base.raw").1;
    std::fs::write(&base, [9; 1 << 18]).unwrap();
    for backed in [true, false] {
        let (_, path) = name_in(dir.path(), "image.qcow2");
        let backing = ["-b", &base, "-F", "raw"];
        let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"];
        run("qemu-img", &[&create[..], &backing[..if backed { 4 } else { 0 }], &[&path, "256k"]].concat());
        run(
            "qemu-io",
            &["-f", "qcow2", "-c", "write -P 1 0 64k", "-c", "write -z 8k 16k", "-c", "write -z 128k 8k", &path],
        );
        run("qemu-img", &["snapshot", "-c", "one", &path]);
        run(
            "qemu-io",
            &["-f", "qcow2", "-c", "write -P 2 12k 4k", "-c", "write -z 32k 8k", "-c", "write -z 200k 4k", &path],
        );
        let before = std::fs::read(&path).unwrap();
        let of_snapshot = |image: &str| {
            let raw = name_in(dir.path(), "snapshot.raw").1;
            run("qemu-img", &["convert", "-l", "one", "-O", "raw", image, &raw]);
            std::fs::read(raw).unwrap()
        };
        let then = of_snapshot(&path);
        let journal = Journal::new();
        let (file, content) = recorded(&journal, 0, before.clone());
        block::amend(&file, "qcow2", &Options::from([("compat", OptionValue::Str("0.10".into()))])).unwrap();
        assert_eq!(content.lock().unwrap()[7], 2);
        let (start, state) = ([before], name_in(dir.path(), "state.qcow2").1);
        let (mut states, mut versions) = (0, [0; 4]);
        moments(&start, &journal.events(), |moment| {
            moment.states(&mut random, 2, 4, |files, how| {
                let bytes = files.into_iter().next().unwrap();
                versions[usize::from(bytes[7])] += 1;
                std::fs::write(&state, &bytes).unwrap();
                sound(bytes).unwrap_or_else(|e| panic!("event {}, {how}: {e}", moment.at));
                run("qemu-img", &["compare", &path, &state]);
                assert!(of_snapshot(&state) == then, "event {}, {how}", moment.at);
                states += 1;
            });
        });
        assert!(versions[2] > 0 && versions[3] > 5, "{states}: {versions:?}");
    }
}
