// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Encrypted images in the verbs of `doorless img`, beside qemu-img.
#![allow(missing_docs, clippy::unwrap_used)]

mod beside;
mod harness;

use std::path::Path;

use beside::{done, err, json, ours};
use harness::{Scratch, judges, noise, run_in};

const JUDGES: [&str; 1] = ["qemu-img"];
const OBJECT: [&str; 2] = ["--object", "secret,id=s,file=secret"];
const LUKS: &str = "driver=luks,key-secret=s,file.filename=";
const QCOW2: &str = "driver=qcow2,encrypt.key-secret=s,file.filename=";

fn prepared() -> Scratch {
    let scratch = Scratch::new();
    let dir = scratch.path("");
    std::fs::write(dir.join("secret"), "correct horse!").unwrap();
    std::fs::write(dir.join("secret64"), "Y29ycmVjdCBob3JzZSE=\n").unwrap();
    let mut disk = noise(3 << 20, 5);
    disk[1 << 20..2 << 20].fill(0);
    std::fs::write(dir.join("disk.raw"), &disk).unwrap();
    scratch
}

fn qemu(dir: &Path, arguments: &[&str]) -> String {
    run_in(dir, "qemu-img", arguments)
}

fn qcow2_options(more: &str) -> String {
    format!("encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10{more}")
}

/// Both programs read the same from an encrypted image.
fn holds_the_disk(dir: &Path, options: &str) {
    let raw = "driver=raw,file.filename=disk.raw";
    let arguments = ["compare", OBJECT[0], OBJECT[1], "--image-opts", options, raw];
    assert_eq!(qemu(dir, &arguments), "Images are identical.\n", "{options}");
    assert_eq!(done(dir, &arguments), "Images are identical.\n", "{options}");
}

#[test]
fn what_is_encrypted_is_made_converted_and_compared() {
    if !judges("what_is_encrypted_is_made_converted_and_compared", &JUDGES) {
        return;
    }
    let scratch = prepared();
    let dir = scratch.path("");
    let [object, secret] = OBJECT;
    for (format, options, prefix) in [
        ("luks", "key-secret=s,iter-time=10,cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,hash-alg=sha1", LUKS),
        ("qcow2", &qcow2_options(",cluster_size=4k,encrypt.cipher-alg=aes-128"), QCOW2),
    ] {
        let opts = format!("{prefix}image");
        done(&dir, &["convert", object, secret, "-O", format, "-o", options, "disk.raw", "image"]);
        holds_the_disk(&dir, &opts);
        // Back, over an image that is there, and from one that QEMU made.
        done(&dir, &["convert", object, secret, "--image-opts", "-O", "raw", &opts, "copy.raw"]);
        assert_eq!(std::fs::read(dir.join("copy.raw")).unwrap(), std::fs::read(dir.join("disk.raw")).unwrap());
        let line = qemu(&dir, &["create", object, secret, "-f", format, "-o", options, "image", "3M"]);
        assert_eq!(
            done(&dir, &["create", object, secret, "-f", format, "-o", options, "other", "3M"])
                .replace("other", "image"),
            line
        );
        for image in ["image", "other"] {
            let opts = format!("{prefix}{image}");
            let source = "driver=raw,file.filename=disk.raw";
            let arguments = ["convert", object, secret, "-n", "--image-opts", "--target-image-opts", source, &opts];
            done(&dir, &arguments);
            holds_the_disk(&dir, &opts);
        }
    }
}

#[test]
fn an_encrypted_image_is_told_of_without_its_key() {
    if !judges("an_encrypted_image_is_told_of_without_its_key", &JUDGES) {
        return;
    }
    let scratch = prepared();
    let dir = scratch.path("");
    let [object, secret] = OBJECT;
    for (format, options) in [
        ("luks", "key-secret=s,iter-time=10,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256".to_owned()),
        ("qcow2", qcow2_options("")),
    ] {
        qemu(&dir, &["create", "-q", object, secret, "-f", format, "-o", &options, "image", "3M"]);
        assert_eq!(done(&dir, &["info", "image"]), qemu(&dir, &["info", "image"]));
        let arguments = ["info", "--output=json", "image"];
        assert_eq!(json(&done(&dir, &arguments)), json(&qemu(&dir, &arguments)));
        let opts = format!("{}image", if format == "luks" { LUKS } else { QCOW2 });
        assert!(done(&dir, &["info", object, secret, "--image-opts", &opts]).contains("encrypted: yes"));
    }
    assert!(done(&dir, &["check", "image"]).contains("No errors"));
}

#[test]
fn encrypted_images_are_changed_with_their_key_alone() {
    if !judges("encrypted_images_are_changed_with_their_key_alone", &JUDGES) {
        return;
    }
    let scratch = prepared();
    let dir = scratch.path("");
    let [object, secret] = OBJECT;
    let options = qcow2_options("");
    qemu(&dir, &["convert", object, secret, "-O", "qcow2", "-o", &options, "disk.raw", "image"]);
    let opts = format!("{QCOW2}image");
    let missing = "Parameter 'encrypt.key-secret' is required for cipher";
    for verb in [&["snapshot", "-c", "one"][..], &["map"], &["resize"], &["commit"], &["bitmap", "--add"]] {
        let more: &[&str] = match verb[0] {
            "resize" => &["4M"],
            "bitmap" => &["b"],
            _ => &[],
        };
        let refused = ours(&dir, &[verb, &["image"], more].concat());
        let text = err(&refused);
        assert!(
            refused.status.code() == Some(1) && (text.contains(missing) || verb[0] == "commit"),
            "{verb:?}: {text}"
        );
    }
    done(&dir, &["snapshot", "-c", "one", object, secret, "--image-opts", &opts]);
    done(&dir, &["bitmap", "--add", object, secret, "--image-opts", &opts, "marks"]);
    done(&dir, &["resize", object, secret, "--image-opts", &opts, "4M"]);
    let map = ["map", "--output=json", object, secret, "--image-opts", &opts];
    assert!(json(&done(&dir, &map)).as_array().unwrap().iter().any(|run| run["data"] == true));
    done(&dir, &["snapshot", "-a", "one", object, secret, "--image-opts", &opts]);
    holds_the_disk(&dir, &opts);
    // An encrypted backing file.
    qemu(&dir, &["create", "-q", "-u", "-f", "qcow2", "-b", "image", "-F", "qcow2", "top", "3M"]);
    let top = "driver=qcow2,file.filename=top,backing.encrypt.key-secret=s";
    holds_the_disk(&dir, top);
}

#[test]
fn passphrases_come_from_files_and_never_from_the_command_line() {
    let scratch = prepared();
    let dir = scratch.path("");
    let create = |object: &str| {
        let options = "key-secret=s,iter-time=10";
        ours(&dir, &["create", "--object", object, "-f", "luks", "-o", options, "image", "1M"])
    };
    for (object, why) in [
        ("secret,id=s,data=correct horse", "file=FILE"),
        ("secret,id=s", "Parameter 'file' is missing"),
        ("secret,file=secret", "Parameter 'id' is missing"),
        ("secret,id=s,file=none", "Unable to read none"),
        ("secret,id=t,file=secret", "No secret with id 's'"),
        ("secret,id=s,file=secret,format=what", "does not accept value 'what'"),
        ("secret,id=s,file=secret,format=base64", "not valid base64"),
        ("what,id=s", "Parameter 'qom-type' does not accept value 'what'"),
    ] {
        let refused = create(object);
        assert!(refused.status.code() == Some(1) && err(&refused).contains(why), "{object}: {}", err(&refused));
        assert!(!dir.join("image").exists(), "{object}");
    }
    assert!(create("secret,id=s,file=secret64,format=base64").status.success());
    let compared = ["compare", OBJECT[0], OBJECT[1], "--image-opts", &format!("{LUKS}image"), &format!("{LUKS}image")];
    assert_eq!(done(&dir, &compared), "Images are identical.\n");
    for (options, why) in [
        ("filename=image", "Must specify either driver or file"),
        ("driver=raw,file.filename=image,what=1", "does not support the option 'what'"),
        ("driver=luks,key-secret=t,file.filename=image", "No secret with id 't'"),
        ("image", "Cannot find device='image'"),
    ] {
        let refused = ours(&dir, &["info", OBJECT[0], OBJECT[1], "--image-opts", options]);
        assert!(refused.status.code() == Some(1) && err(&refused).contains(why), "{options}: {}", err(&refused));
    }
}
