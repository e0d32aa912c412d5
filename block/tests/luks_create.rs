// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Encrypted images that we make, as QEMU and cryptsetup see them.
#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use block::{BlockNode, CreateRequest, Error, OptionValue, Options, Secret};
use support::{Nodes, judge, memory, name_in, read, run, text, to_disk};

const PASSPHRASE: &str = "correct horse";
const SIZE: u64 = 1 << 20;

type Given = [(&'static str, &'static str)];

fn options(given: &[(&'static str, &str)]) -> Options {
    let value = |name: &str, value: &str| match name.rsplit('.').next().unwrap() {
        "key-secret" => OptionValue::Secret(Secret::new(value.into())),
        "iter-time" | "cluster_size" => OptionValue::Size(value.parse().unwrap()),
        "extended_l2" | "data_file_raw" => OptionValue::Bool(value == "on"),
        _ => OptionValue::Str(value.to_owned()),
    };
    given.iter().map(|&(name, text)| (name, value(name, text))).collect()
}

fn create(format: &str, given: &[(&'static str, &str)], data: Option<&File>) -> Result<File, Error> {
    let file = memory();
    let mut nodes = Nodes::new();
    let (name, data) = (nodes.file(&file, true), data.map(|data| nodes.file(data, true)));
    let node = |name: &String| Arc::clone(nodes.graph.get(name).unwrap());
    let request = CreateRequest {
        file: node(&name),
        data_file: data.as_ref().map(node),
        extents: Vec::new(),
        parent_cid: None,
        size: SIZE,
        options: options(given),
    };
    block::create(format, &request).map(|()| file)
}

fn secret_of(driver: &str) -> (&'static str, OptionValue) {
    let name = if driver == "luks" { "key-secret" } else { "encrypt" };
    (name, OptionValue::Secret(Secret::new(PASSPHRASE.into())))
}

fn open(driver: &'static str, file: &File, data: Option<&File>) -> (Nodes, Arc<BlockNode>) {
    let mut nodes = Nodes::new();
    let (name, data) = (nodes.file(file, true), data.map(|data| nodes.file(data, true)));
    let mut children = vec![("file", name.as_str())];
    children.extend(data.as_deref().map(|data| ("data-file", data)));
    let node = nodes.format(driver, &children, true, &[secret_of(driver)]).unwrap();
    (nodes, node)
}

/// QEMU's options for the image at `name`.
fn image(driver: &str, name: &str, data: Option<&str>) -> String {
    let key = if driver == "luks" { "key-secret=s" } else { "encrypt.format=luks,encrypt.key-secret=s" };
    let data = data.map(|data| format!(",data-file.driver=file,data-file.filename={data}")).unwrap_or_default();
    format!("driver={driver},{key},file.driver=file,file.filename={name}{data}")
}

fn secret_object(dir: &Path) -> String {
    let (path, name) = name_in(dir, "passphrase");
    std::fs::write(path, PASSPHRASE).unwrap();
    format!("secret,id=s,file={name}")
}

#[test]
fn encrypted_images_of_ours_are_read_and_written_by_qemu() {
    if !judge("encrypted_images_of_ours_are_read_and_written_by_qemu", "qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let secret = secret_object(dir.path());
    let luks = [("encrypt.format", "luks"), ("encrypt.key-secret", PASSPHRASE), ("encrypt.iter-time", "5")];
    let plain = [("key-secret", PASSPHRASE), ("iter-time", "5")];
    let cases: &[(&str, &Given)] = &[
        ("qcow2", &[]),
        ("qcow2", &[("compat", "v2"), ("encrypt.cipher-alg", "aes-128"), ("encrypt.hash-alg", "sha1")]),
        ("qcow2", &[("cluster_size", "512"), ("encrypt.cipher-mode", "cbc"), ("encrypt.ivgen-alg", "essiv")]),
        ("qcow2", &[("cluster_size", "2097152"), ("preallocation", "metadata")]),
        ("qcow2", &[("preallocation", "full"), ("encrypt.hash-alg", "sha512")]),
        ("qcow2", &[("extended_l2", "on"), ("preallocation", "falloc")]),
        ("qcow2", &[("data_file", "somewhere"), ("preallocation", "metadata")]),
        ("luks", &[]),
        ("luks", &[("cipher-alg", "aes-192"), ("hash-alg", "sha512"), ("ivgen-alg", "plain")]),
        (
            "luks",
            &[("cipher-mode", "cbc"), ("ivgen-alg", "essiv"), ("ivgen-hash-alg", "sha256"), ("preallocation", "full")],
        ),
    ];
    for &(driver, given) in cases {
        let driver: &'static str = if driver == "luks" { "luks" } else { "qcow2" };
        let all = [if driver == "luks" { &plain[..] } else { &luks }, given].concat();
        let data = given.iter().any(|(name, _)| *name == "data_file").then(memory);
        let file = create(driver, &all, data.as_ref()).unwrap();
        let (_nodes, node) = open(driver, &file, data.as_ref());
        let mut model = vec![0; usize::try_from(SIZE).unwrap()];
        assert_eq!(node.len(), SIZE);
        if driver == "luks" {
            node.write(&model, 0, false).unwrap();
        }
        assert!(read(&node, 0, model.len()).unwrap() == model, "a new disk is full of zeroes: {given:?}");
        for (offset, len) in [(0, 512), (70_001, 3), (131_072, 65_536), (900_000, 100_000)] {
            node.write(&vec![0xa7; len], offset as u64, false).unwrap();
            model[offset..offset + len].fill(0xa7);
        }
        node.flush().unwrap();
        drop((_nodes, node));

        let (path, name) = name_in(dir.path(), "image");
        let (data_path, data_name) = name_in(dir.path(), "data");
        to_disk(&file, &path);
        data.iter().for_each(|data| to_disk(data, &data_path));
        let image = image(driver, &name, data.as_ref().map(|_| data_name.as_str()));
        let write = ["-c", "write -P 0x5c 300000 200000", "-c", "flush"];
        run("qemu-io", &[&["--object", &secret, "--image-opts", &image][..], &write].concat());
        model[300_000..500_000].fill(0x5c);
        if driver == "qcow2" {
            run("qemu-img", &["check", "--object", &secret, "--image-opts", &image]);
        }
        let (raw_path, raw) = name_in(dir.path(), "raw");
        run("qemu-img", &["convert", "--object", &secret, "--image-opts", &image, "-O", "raw", &raw]);
        assert!(std::fs::read(raw_path).unwrap() == model, "{driver} {given:?}");

        let open_file = |path: &Path| File::options().read(true).write(true).open(path).unwrap();
        let data = data.map(|_| open_file(&data_path));
        let (_nodes, node) = open(driver, &open_file(&path), data.as_ref());
        assert!(read(&node, 0, model.len()).unwrap() == model, "{driver} {given:?}");
    }
}

#[test]
fn a_volume_of_ours_opens_with_cryptsetup() {
    if !judge("a_volume_of_ours_opens_with_cryptsetup", "cryptsetup") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    secret_object(dir.path());
    let file = create("luks", &[("key-secret", PASSPHRASE), ("iter-time", "20")], None).unwrap();
    let (path, name) = name_in(dir.path(), "volume");
    to_disk(&file, &path);
    let dump = run("cryptsetup", &["luksDump", &name]);
    for found in
        ["Version:       \t1", "Cipher mode:   \txts-plain64", "Hash spec:     \tsha256", "Key Slot 0: ENABLED"]
    {
        assert!(dump.contains(found), "{found}: {dump}");
    }
    let passphrase = dir.path().join("passphrase");
    run("cryptsetup", &["luksOpen", "--test-passphrase", "--key-file", text(&passphrase), &name]);
}

#[test]
fn what_cannot_be_encrypted_so_is_refused_with_the_reason() {
    let key = ("encrypt.key-secret", PASSPHRASE);
    let luks = ("encrypt.format", "luks");
    let quick = ("encrypt.iter-time", "5");
    let cases: &[(&str, &Given, &str)] = &[
        ("qcow2", &[luks], "Parameter 'encrypt.key-secret' is required for cipher"),
        ("qcow2", &[key], "Parameter 'encrypt.format' is missing"),
        ("qcow2", &[("encrypt.format", "foo"), key], "Parameter 'format' does not accept value 'foo'"),
        ("qcow2", &[("encrypt.format", "aes"), key], "AES, which is broken"),
        ("qcow2", &[luks, key, ("encrypt.cipher-alg", "serpent-256")], "cipher-alg 'serpent-256' is not supported"),
        ("qcow2", &[luks, key, ("encrypt.hash-alg", "md5")], "the hash 'md5' is not supported"),
        ("qcow2", &[luks, key, quick, ("data_file", "d"), ("data_file_raw", "on")], "the data file would not be raw"),
        ("qcow2", &[luks, key, quick, ("compat", "v2"), ("preallocation", "full")], "full of noise"),
        ("luks", &[], "Parameter 'key-secret' is required for cipher"),
        ("luks", &[("key-secret", PASSPHRASE), ("preallocation", "some")], "does not accept value 'some'"),
    ];
    for &(format, given, reason) in cases {
        let error = create(format, given, None).unwrap_err().to_string();
        assert!(error.contains(reason), "{given:?}: {error}");
    }
}
