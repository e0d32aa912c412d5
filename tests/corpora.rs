// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Every input that ever mattered, once more: none makes a parser panic, hang or leave its rules.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

mod fuzzed;

use std::path::Path;

/// Feeds every file of a corpus, in order of names.
fn replay(target: &str, feed: fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 10, "{} has lost its inputs", directory.display());
    for file in files {
        // The last line of a failing test's output says which input it was.
        println!("{}", file.display());
        feed(&std::fs::read(&file).unwrap());
    }
}

#[test]
fn the_parser_of_qmp_survives_its_corpus() {
    replay("qmp_parser", fuzzed::qmp_parser);
}

#[test]
fn the_monitor_survives_its_corpus() {
    replay("monitor", fuzzed::monitor);
}

#[test]
fn the_nbd_handshake_survives_its_corpus() {
    replay("nbd_handshake", fuzzed::nbd_handshake);
}

#[test]
fn the_nbd_handshake_with_tls_survives_its_corpus() {
    replay("nbd_tls", fuzzed::nbd_tls);
}

#[test]
fn names_of_certificates_survive_their_corpus() {
    replay("certificate", fuzzed::certificate);
}

#[test]
fn what_is_fed_to_nbd_transmission_gets_that_far() {
    for (input, least) in [("x-read", 4096), ("x-status-payload-many", 3 * 32)] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/nbd_requests").join(input);
        let negotiation = fuzzed::transmit(b"!");
        assert!(fuzzed::transmit(&std::fs::read(path).unwrap()) >= negotiation + least, "{input}");
    }
}

#[test]
fn nbd_transmission_survives_its_corpus() {
    replay("nbd_requests", fuzzed::nbd_requests);
}

#[test]
fn what_is_fed_to_the_nbd_client_answers_it() {
    for (input, requests) in [("x-simple", 6), ("x-structured", 7), ("x-extended", 7), ("x-facts", 2), ("x-list", 1)] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/nbd_client").join(input);
        assert_eq!(fuzzed::answered(&std::fs::read(path).unwrap()), requests, "{input}");
    }
}

#[test]
fn the_nbd_client_survives_its_corpus() {
    replay("nbd_client", fuzzed::nbd_client);
}

#[test]
fn the_formats_survive_their_corpus() {
    replay("image", fuzzed::image);
}

#[test]
fn the_check_survives_its_corpus() {
    replay("image_check", fuzzed::image_check);
}

#[test]
fn formats_that_are_written_survive_their_corpus() {
    replay("image_write", fuzzed::image_write);
}

#[test]
fn disks_of_blocks_in_one_table_survive_their_corpora() {
    replay("vdi", fuzzed::vdi);
    replay("vmdk", fuzzed::vmdk);
    replay("vpc", fuzzed::vpc);
}

#[test]
fn the_fuse_file_survives_its_corpus() {
    replay("fuse_requests", fuzzed::fuse_requests);
}

#[test]
fn a_vhost_user_export_survives_the_messages_of_its_corpus() {
    replay("vhost_user_messages", fuzzed::vhost_user_messages);
}

#[test]
fn a_vhost_user_export_survives_the_rings_of_its_corpus() {
    replay("vhost_user_rings", fuzzed::vhost_user_rings);
}

#[test]
fn formats_that_are_only_read_survive_their_corpus() {
    replay("read_only", fuzzed::read_only);
}

#[test]
fn what_a_guest_makes_of_a_fat_disk_survives_its_corpus() {
    replay("vvfat", fuzzed::vvfat);
}
