// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `blockdev-create`: formats made in nodes, as a job, judged by qemu-img.
#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::fs::File;

use harness::{Scratch, TestDaemon, judges, run};
use serde_json::{Value, json};

fn file(scratch: &Scratch, name: &str) -> File {
    File::options().read(true).write(true).create(true).truncate(true).open(scratch.path(name)).unwrap()
}

/// A node over a new file.
fn add_file(daemon: &mut TestDaemon, scratch: &Scratch, name: &str) {
    let filename = format!("/dev/fdset/{}", daemon.add_fd(file(scratch, name)));
    daemon.ok("blockdev-add", json!({ "driver": "file", "node-name": name, "filename": filename }));
}

/// Runs the job to its end; its error.
fn create(daemon: &mut TestDaemon, options: &Value) -> Option<String> {
    daemon.ok("blockdev-create", json!({ "job-id": "j", "options": options }));
    while daemon.daemon.next_event().unwrap().1 != json!({ "id": "j", "status": "concluded" }) {}
    let error = daemon.ok("query-jobs", json!({}))[0]["error"].as_str().map(str::to_owned);
    daemon.ok("job-dismiss", json!({ "id": "j" }));
    error
}

#[test]
fn blockdev_create_makes_qcow2_images_with_qemus_options() {
    if !judges("blockdev_create_makes_qcow2_images_with_qemus_options", &["qemu-img"]) {
        return;
    }
    let scratch = Scratch::new();
    std::fs::write(scratch.path("base"), vec![0; 1 << 20]).unwrap();
    let mut daemon = TestDaemon::start();
    for (options, told) in [
        (json!({}), &[("/virtual-size", json!(1 << 20)), ("/cluster-size", json!(65536))][..]),
        (json!({ "version": "v2", "cluster-size": 4096 }), &[("/format-specific/data/compat", json!("0.10"))]),
        (
            json!({ "refcount-bits": 1, "extended-l2": true, "compression-type": "zstd", "preallocation": "metadata" }),
            &[("/format-specific/data/extended-l2", json!(true)), ("/format-specific/data/refcount-bits", json!(1))],
        ),
        (
            json!({ "backing-file": "base", "backing-fmt": "raw", "lazy-refcounts": true }),
            &[("/backing-filename", json!("base")), ("/backing-filename-format", json!("raw"))],
        ),
    ] {
        let disk = file(&scratch, "disk");
        let set = daemon.add_fd(&disk);
        // In a node of its own, and in one that is made for it.
        let own = json!({ "driver": "file", "filename": format!("/dev/fdset/{set}") });
        let mut named = own.clone();
        named["node-name"] = json!("named");
        daemon.ok("blockdev-add", named);
        for place in [json!("named"), own] {
            if place != "named" {
                daemon.ok("blockdev-del", json!({ "node-name": "named" }));
            }
            let mut wanted = options.clone();
            wanted["driver"] = json!("qcow2");
            wanted["file"] = place;
            wanted["size"] = json!(1 << 20);
            assert_eq!(create(&mut daemon, &wanted), None, "{wanted}");
            let info = run("qemu-img", &["info", "-f", "qcow2", "--output=json", &scratch.name("disk")]);
            let info: Value = serde_json::from_str(&info).unwrap();
            for (pointer, value) in told {
                assert_eq!(info.pointer(pointer), Some(value), "{pointer} in {info}");
            }
            run("qemu-img", &["check", "-q", "-f", "qcow2", &scratch.name("disk")]);
            disk.set_len(0).unwrap();
        }
        let named = daemon.ok("query-named-block-nodes", json!({}));
        assert_eq!(named, json!([]), "what was made for the job went with it");
        daemon.ok("remove-fd", json!({ "fdset-id": set }));
    }
}

#[test]
fn an_image_is_made_with_its_data_elsewhere_and_can_be_opened_at_once() {
    let scratch = Scratch::new();
    let mut daemon = TestDaemon::start();
    add_file(&mut daemon, &scratch, "image");
    add_file(&mut daemon, &scratch, "data");
    let wanted = json!({ "driver": "qcow2", "file": "image", "data-file": "data", "size": 1 << 20 });
    assert_eq!(create(&mut daemon, &wanted), None);
    daemon.ok("blockdev-add", json!({ "driver": "qcow2", "node-name": "disk", "file": "image", "data-file": "data" }));
}

#[test]
fn an_image_that_cannot_be_made_fails_its_job_and_leaves_the_nodes_alone() {
    let scratch = Scratch::new();
    let mut daemon = TestDaemon::start();
    add_file(&mut daemon, &scratch, "image");
    let wanted = |size: u64, file: &str| json!({ "driver": "qcow2", "file": file, "size": size });
    for (wanted, said) in [
        (wanted(512, "none"), "Cannot find device='none' nor node-name='none'"),
        (wanted(100, "image"), "Image size must be a multiple of 512 bytes"),
        (
            json!({ "driver": "qcow2", "file": { "driver": "file", "filename": "/etc/passwd" }, "size": 512 }),
            "this daemon opens no files",
        ),
        (
            json!({ "driver": "qcow2", "file": "image", "size": 512, "cluster-size": 1000 }),
            "Cluster size must be a power of two",
        ),
    ] {
        let error = create(&mut daemon, &wanted).unwrap();
        assert!(error.contains(said), "{wanted}: {error}");
    }
    // Nobody makes an image under another's feet.
    assert_eq!(create(&mut daemon, &wanted(1 << 20, "image")), None);
    daemon.ok("blockdev-add", json!({ "driver": "qcow2", "node-name": "disk", "file": "image" }));
    let error = create(&mut daemon, &wanted(1 << 20, "image")).unwrap();
    assert!(error.contains("Permission conflict on node 'image'"), "{error}");
    daemon.ok("blockdev-del", json!({ "node-name": "disk" }));
    assert_eq!(create(&mut daemon, &wanted(1 << 20, "image")), None);
}

#[test]
fn every_format_is_made_and_opened_at_once() {
    let test = "every_format_is_made_and_opened_at_once";
    if !judges(test, &["qemu-img", "qemu-io", "cryptsetup"]) {
        return;
    }
    let scratch = Scratch::new();
    std::fs::write(scratch.path("passphrase"), "open sesame").unwrap();
    let mut daemon = TestDaemon::start();
    daemon.ok("object-add", json!({ "qom-type": "secret", "id": "s", "data": "open sesame" }));
    daemon.start_nbd();
    let encrypt = json!({ "format": "luks", "key-secret": "s", "iter-time": 5, "cipher-alg": "aes-128" });
    let key = json!({ "format": "luks", "key-secret": "s" });
    for (number, (options, opened)) in [
        (json!({ "driver": "qcow2", "encrypt": encrypt }), json!({ "driver": "qcow2", "encrypt": key })),
        (
            json!({ "driver": "luks", "key-secret": "s", "iter-time": 5, "hash-alg": "sha1" }),
            json!({ "driver": "luks", "key-secret": "s" }),
        ),
        (json!({ "driver": "vdi" }), json!({ "driver": "vdi" })),
        (json!({ "driver": "vdi", "preallocation": "metadata" }), json!({ "driver": "vdi" })),
        (json!({ "driver": "vpc", "subformat": "fixed", "force-size": true }), json!({ "driver": "vpc" })),
        (json!({ "driver": "vpc", "force-size": true }), json!({ "driver": "vpc" })),
        (json!({ "driver": "vmdk", "adapter-type": "lsilogic" }), json!({ "driver": "vmdk" })),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("image{number}");
        add_file(&mut daemon, &scratch, &name);
        let with = |mut options: Value, more: Value| {
            options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            options
        };
        assert_eq!(
            create(&mut daemon, &with(options.clone(), json!({ "file": name, "size": 1 << 20 }))),
            None,
            "{options}"
        );
        daemon.ok("blockdev-add", with(opened.clone(), json!({ "node-name": "disk", "file": name })));
        daemon.export("disk", true);
        run("qemu-io", &["-f", "raw", "-c", "write -P 7 4k 100k", "-c", "flush", &daemon.uri("disk")]);
        let busy = create(&mut daemon, &with(options.clone(), json!({ "file": name, "size": 1 << 20 }))).unwrap();
        assert!(busy.contains("Permission conflict on node"), "{busy}");
        daemon.ok("block-export-del", json!({ "id": "disk", "mode": "hard" }));
        for node in ["disk", &name] {
            while daemon.daemon.execute("blockdev-del", json!({ "node-name": node }), &[]).is_err() {
                std::thread::yield_now();
            }
        }
        let driver = opened["driver"].as_str().unwrap();
        let key = match driver {
            "qcow2" => ",encrypt.format=luks,encrypt.key-secret=s",
            "luks" => ",key-secret=s",
            _ => "",
        };
        let image = format!("driver={driver}{key},file.driver=file,file.filename={}", scratch.name(&name));
        let secret = format!("secret,id=s,file={}", scratch.name("passphrase"));
        let read = ["-c", "read -P 7 4k 100k"];
        run("qemu-io", &[&["--object", &secret, "--image-opts", &image][..], &read].concat());
        if driver == "luks" {
            run(
                "cryptsetup",
                &["luksOpen", "--test-passphrase", "-d", &scratch.name("passphrase"), &scratch.name(&name)],
            );
        }
    }
    add_file(&mut daemon, &scratch, "one");
    for (options, said) in [
        (json!({ "driver": "luks" }), "Parameter 'key-secret' is required for cipher"),
        (json!({ "driver": "luks", "key-secret": "zz" }), "No secret with id 'zz'"),
        (
            json!({ "driver": "qcow2", "encrypt": { "format": "luks" } }),
            "Parameter 'encrypt.key-secret' is required for cipher",
        ),
        (json!({ "driver": "vmdk", "subformat": "monolithicFlat" }), "'extents' has 0 nodes"),
    ] {
        let mut wanted = options;
        wanted["file"] = json!("one");
        wanted["size"] = json!(1 << 20);
        let error = create(&mut daemon, &wanted).unwrap();
        assert!(error.contains(said), "{wanted}: {error}");
    }
    let raw = json!({ "job-id": "j", "options": { "driver": "raw", "file": "one", "size": 512 } });
    assert_eq!(daemon.error("blockdev-create", raw), "Parameter 'driver' does not accept value 'raw'");
}
