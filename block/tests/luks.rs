// SPDX-License-Identifier: Apache-2.0 OR MIT
//! LUKS volumes against QEMU and cryptsetup, and hostile headers.
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use block::luks::{self, CipherSpec, FormatOptions, Hash};
use block::{BlockNode, OptionValue, Secret, ZeroFlags};
use support::{Nodes, Random, in_memory, judge, memory, name_in, read, run, text, to_disk};

const PASSPHRASE: &str = "correct horse";

fn key(passphrase: &str) -> (&'static str, OptionValue) {
    ("key-secret", OptionValue::Secret(Secret::new(passphrase.into())))
}

fn open_with(file: &File, passphrase: &str) -> block::Result<(Nodes, Arc<BlockNode>)> {
    let mut nodes = Nodes::new();
    let name = nodes.file(file, true);
    let node = nodes.format("luks", &[("file", &name)], true, &[key(passphrase)])?;
    Ok((nodes, node))
}

fn open(file: &File) -> (Nodes, Arc<BlockNode>) {
    open_with(file, PASSPHRASE).unwrap()
}

fn why(file: &File, passphrase: &str) -> String {
    open_with(file, passphrase).err().unwrap().to_string()
}

/// A volume of ours, with `len` bytes of payload that were never written.
fn volume(options: &FormatOptions, len: u64) -> File {
    let (bytes, _) = luks::format(options, PASSPHRASE.as_bytes()).unwrap();
    let file = memory();
    file.write_all_at(&bytes, 0).unwrap();
    file.set_len(bytes.len() as u64 + len).unwrap();
    file
}

fn quick() -> FormatOptions {
    FormatOptions { iter_time: Duration::from_millis(1), ..FormatOptions::default() }
}

fn secret_file(dir: &Path) -> String {
    let (path, name) = name_in(dir, "passphrase");
    std::fs::write(path, PASSPHRASE).unwrap();
    format!("secret,id=s,file={name}")
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from(at * 7 / 3 % 251).unwrap()).collect()
}

/// What qemu-img reads from a volume.
fn as_qemu_reads(dir: &Path, volume: &str) -> Vec<u8> {
    let (plain, name) = name_in(dir, "plain");
    let secret = secret_file(dir);
    let image = format!("driver=luks,key-secret=s,file.filename={volume}");
    run("qemu-img", &["convert", "--object", &secret, "--image-opts", &image, "-O", "raw", &name]);
    std::fs::read(plain).unwrap()
}

#[test]
fn volumes_of_qemu_are_read_and_written_as_qemu_does() {
    if !judge("volumes_of_qemu_are_read_and_written_as_qemu_does", "qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let content = pattern(1 << 20);
    let (path, plain) = name_in(dir.path(), "content");
    std::fs::write(path, &content).unwrap();
    let secret = secret_file(dir.path());
    for options in [
        "cipher-alg=aes-256",
        "cipher-alg=aes-128,hash-alg=sha1",
        "cipher-alg=aes-192,hash-alg=sha512",
        "cipher-alg=aes-256,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256",
        "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=plain64",
        "cipher-alg=aes-256,ivgen-alg=plain",
    ] {
        let (path, name) = name_in(dir.path(), "volume");
        let options = format!("key-secret=s,iter-time=10,{options}");
        run("qemu-img", &["convert", "--object", &secret, "-O", "luks", "-o", &options, &plain, &name]);
        let file = in_memory(&path);
        let (_nodes, node) = open(&file);
        assert!(node.len() == 1 << 20 && read(&node, 0, 1 << 20).unwrap() == content, "{options}");
        assert_eq!(read(&node, 1001, 70_000).unwrap(), content[1001..71_001], "{options}");

        let mut expected = content.clone();
        for (offset, len) in [(0, 512), (5000, 3), (5003, 4096), (300_000, 300_001), ((1 << 20) - 7, 7)] {
            node.write(&vec![0xa7; len], offset as u64, false).unwrap();
            expected[offset..offset + len].fill(0xa7);
        }
        let flags = ZeroFlags { may_unmap: true, fast_only: false };
        node.write_zeroes(100_100, 99_999, flags, true).unwrap();
        expected[100_100..200_099].fill(0);
        assert!(read(&node, 0, 1 << 20).unwrap() == expected, "{options}");
        to_disk(&file, &path);
        assert!(as_qemu_reads(dir.path(), &name) == expected, "{options}");
    }
}

#[test]
fn volumes_of_cryptsetup_open_with_every_slot() {
    if !judge("volumes_of_cryptsetup_open_with_every_slot", "cryptsetup") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, name) = name_in(dir.path(), "volume");
    File::create(&path).unwrap().set_len(5 << 20).unwrap();
    let (first, first_name) = name_in(dir.path(), "first");
    std::fs::write(first, PASSPHRASE).unwrap();
    let quick = ["--pbkdf-force-iterations", "1000", "-q"];
    let format = ["luksFormat", "--type", "luks1", &name, &first_name];
    run("cryptsetup", &[&quick[..], &format].concat());
    for slot in 1..8 {
        let (other, other_name) = name_in(dir.path(), "other");
        std::fs::write(other, format!("passphrase {slot}")).unwrap();
        let number = slot.to_string();
        let add = ["luksAddKey", "--key-file", &first_name, "--key-slot", &number, &name, &other_name];
        run("cryptsetup", &[&quick[..], &add].concat());
    }
    let file = in_memory(&path);
    for slot in (1..8).rev() {
        open_with(&file, &format!("passphrase {slot}")).unwrap();
    }
    assert_eq!(why(&file, "passphrase 9"), "Invalid password, cannot unlock any keyslot");
    run("cryptsetup", &["-q", "luksKillSlot", "--key-file", &first_name, &name, "3"]);
    assert_eq!(why(&in_memory(&path), "passphrase 3"), "Invalid password, cannot unlock any keyslot");
}

#[test]
fn volumes_of_ours_open_in_qemu_and_cryptsetup() {
    let test = "volumes_of_ours_open_in_qemu_and_cryptsetup";
    if !judge(test, "qemu-img") || !judge(test, "cryptsetup") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let content = pattern(300_032);
    for (algorithm, mode, ivgen, ivgen_hash, hash) in [
        ("aes-256", "xts", "plain64", None, Hash::Sha256),
        ("aes-128", "xts", "plain64", None, Hash::Sha1),
        ("aes-256", "cbc", "essiv", Some("sha256"), Hash::Sha512),
    ] {
        let cipher = CipherSpec::from_options(algorithm, mode, ivgen, ivgen_hash).unwrap();
        let file = volume(&FormatOptions { cipher, hash, ..quick() }, content.len() as u64);
        let (_nodes, node) = open(&file);
        node.write(&content, 0, true).unwrap();
        let (path, name) = name_in(dir.path(), "volume");
        to_disk(&file, &path);
        assert!(as_qemu_reads(dir.path(), &name) == content, "{cipher:?}");
        let dump = run("cryptsetup", &["luksDump", &name]);
        assert!(dump.contains(cipher.mode_name()) && dump.contains("Key Slot 0: ENABLED"), "{dump}");
        let passphrase = dir.path().join("passphrase");
        run("cryptsetup", &["open", "--test-passphrase", "--key-file", text(&passphrase), &name]);
    }
}

#[test]
fn a_detached_header_opens_its_payload() {
    let (bytes, _) = luks::format(&FormatOptions { detached: true, ..quick() }, PASSPHRASE.as_bytes()).unwrap();
    let (header, payload) = (memory(), memory());
    header.write_all_at(&bytes, 0).unwrap();
    payload.set_len(8192).unwrap();
    let mut nodes = Nodes::new();
    let (header, payload) = (nodes.file(&header, false), nodes.file(&payload, true));
    let children = [("file", payload.as_str()), ("header", header.as_str())];
    let node = nodes.format("luks", &children, true, &[key(PASSPHRASE)]).unwrap();

    node.write(&[7; 1000], 4000, false).unwrap();

    assert_eq!((node.len(), read(&node, 4000, 1000).unwrap()), (8192, vec![7; 1000]));
    let alone = nodes.format("luks", &[("file", &header)], false, &[key(PASSPHRASE)]);
    assert!(alone.unwrap_err().to_string().contains("header is detached"));
}

#[test]
fn what_was_never_written_is_noise_and_data() {
    let (_nodes, node) = open(&volume(&quick(), 65_536));
    let extent = node.status(0, 65_536).unwrap();
    assert_eq!((extent.kind, extent.len), (block::ExtentKind::Data, 65_536));
    assert_ne!(read(&node, 0, 512).unwrap(), vec![0; 512]);
    let fast = node.write_zeroes(0, 4096, ZeroFlags { may_unmap: true, fast_only: true }, false);
    assert_eq!(fast.unwrap_err().kind(), std::io::ErrorKind::Unsupported);
}

#[test]
fn writes_that_share_a_sector_lose_nothing() {
    const WRITERS: usize = 4;
    let (_nodes, node) = open(&volume(&quick(), 4096));
    node.write(&[0; 4096], 0, false).unwrap();
    for round in 1..=60u8 {
        // Stripes that cross sectors, each in one writer's hands; together they cover everything.
        std::thread::scope(|scope| {
            for writer in 0..WRITERS {
                let node = &node;
                scope.spawn(move || {
                    for stripe in (writer..4096 / 64).step_by(WRITERS) {
                        node.write(&[round; 64], stripe as u64 * 64, false).unwrap();
                    }
                });
            }
        });
        assert_eq!(read(&node, 0, 4096).unwrap(), vec![round; 4096]);
    }
}

#[test]
fn any_mix_of_requests_leaves_what_a_vector_holds() {
    let (_nodes, node) = open(&volume(&quick(), 1 << 20));
    node.write(&vec![0; 1 << 20], 0, false).unwrap();
    let (mut model, mut random) = (vec![0; 1 << 20], Random(71));
    for _ in 0..3000 {
        let start = random.below(1 << 20);
        let most = if random.below(10) == 0 { 600_000 } else { 3000 };
        let len = random.below(most).min((1 << 20) - start);
        let range = usize::try_from(start).unwrap()..usize::try_from(start + len).unwrap();
        match random.below(3) {
            0 => assert!(read(&node, start, range.len()).unwrap() == model[range]),
            1 => {
                let byte = u8::try_from(random.below(256)).unwrap();
                node.write(&vec![byte; range.len()], start, false).unwrap();
                model[range].fill(byte);
            }
            _ => {
                node.write_zeroes(start, len, ZeroFlags::default(), false).unwrap();
                model[range].fill(0);
            }
        }
    }
    assert!(read(&node, 0, 1 << 20).unwrap() == model);
}

#[test]
fn a_secret_is_never_shown() {
    let shown = format!("{:?}", key("hunter2"));
    assert!(!shown.contains("hunter2") && !shown.contains("104"), "{shown}");
}

#[test]
fn hostile_headers_are_refused_with_the_reason() {
    let u32_at = |at: usize, value: u32| (at, value.to_be_bytes().to_vec());
    let text_at = |at: usize, text: &str| (at, [text.as_bytes(), &[0]].concat());
    for (name, (at, bytes), reason) in [
        ("no magic", (0, vec![0]), "not in LUKS format"),
        ("version 2", (6, vec![0, 2]), "LUKS version 2 is not supported"),
        ("cipher", text_at(8, "serpent"), "serpent-xts-plain64"),
        ("mode", text_at(40, "xts-random"), "aes-xts-random"),
        ("text without an end", (40, vec![b'x'; 32]), "no end"),
        ("hash", text_at(72, "whirlpool"), "'whirlpool' is not supported"),
        ("huge key", u32_at(108, u32::MAX), "no keys of 4294967295 bytes"),
        ("no key", u32_at(108, 0), "no keys of 0 bytes"),
        ("digest without iterations", u32_at(164, 0), "no iterations"),
        ("digest of hours", u32_at(164, u32::MAX), "rounds of PBKDF2"),
        ("slot of hours", u32_at(212, u32::MAX), "give the passphrase fewer iterations"),
        ("slot without iterations", u32_at(212, 0), "iteration count is zero"),
        ("slot state", u32_at(208, 1), "neither on nor off"),
        ("huge stripes", u32_at(252, u32::MAX), "stripes 4294967295 != 4000"),
        ("no stripes", u32_at(252, 0), "stripes 0 != 4000"),
        ("key material in the header", u32_at(248, 1), "overlapping with the header"),
        ("key material in the payload", u32_at(248, 4000), "only"),
        ("key material nowhere", u32_at(248, u32::MAX), "only"),
        (
            "two slots in one place",
            (256, [&[0, 0xac, 0x71, 0xf3, 0, 0, 4, 0][..], &[0; 32], &[0, 0, 0, 9, 0, 0, 15, 160]].concat()),
            "overlapping with keyslot 0",
        ),
        ("payload past the end", u32_at(104, u32::MAX), "the LUKS payload begins at"),
        ("no payload", u32_at(104, 0), "header is detached"),
        ("other key material", (9000, vec![1, 2, 3]), "Invalid password"),
        ("other digest", (112, vec![1, 2, 3]), "Invalid password"),
    ] {
        let file = volume(&quick(), 4096);
        file.write_all_at(&bytes, at as u64).unwrap();
        let error = why(&file, PASSPHRASE);
        assert!(error.contains(reason), "{name}: {error}");
    }
    let short = memory();
    short.write_all_at(b"LUKS\xba\xbe\0\x01", 0).unwrap();
    why(&short, PASSPHRASE);
}

/// Prints megabytes a second; says nothing about right or wrong. `DOORLESS_MEASURE=1 cargo test --release ... --nocapture`
#[test]
fn speed_is_measured_on_demand() {
    if std::env::var_os("DOORLESS_MEASURE").is_none() {
        return;
    }
    let mut buf = vec![1; 1 << 20];
    for (algorithm, mode) in [("aes-128", "xts"), ("aes-256", "xts"), ("aes-256", "cbc")] {
        let spec = CipherSpec::from_options(algorithm, mode, "plain64", None).unwrap();
        let cipher = luks::Cipher::new(spec, &vec![3; spec.key_bytes()]).unwrap();
        for (what, work) in [("encrypt", true), ("decrypt", false)] {
            let start = std::time::Instant::now();
            for sector in 0..256 {
                if work { cipher.encrypt(sector, &mut buf) } else { cipher.decrypt(sector, &mut buf) }
            }
            eprintln!("{algorithm}-{mode} {what}: {:.0} MB/s", 256.0 * 1.048_576 / start.elapsed().as_secs_f64());
        }
    }
}
