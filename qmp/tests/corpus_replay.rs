// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Every input that ever mattered to the parser: none makes it panic, lose its way or depend on how bytes are cut.

#![allow(clippy::unwrap_used)]

use qmp::Parser;
use serde_json::Value;

/// All messages of `input`, fed in pieces of `piece` bytes.
fn messages(input: &[u8], piece: usize) -> Vec<Result<Value, String>> {
    let mut parser = Parser::new();
    let mut messages = Vec::new();
    for mut bytes in input.chunks(piece) {
        loop {
            let (used, message) = parser.feed(bytes);
            bytes = &bytes[used..];
            match message {
                Some(message) => messages.push(message),
                None => break,
            }
        }
        assert!(bytes.is_empty());
    }
    messages.extend(parser.finish());
    messages
}

#[test]
fn every_file_of_the_corpus_parses_alike_however_it_is_cut() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/qmp_parser");
    let mut files = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let input = std::fs::read(&path).unwrap();
        let whole = messages(&input, usize::MAX);
        for piece in [1, 2, 3, 7] {
            assert_eq!(messages(&input, piece), whole, "{}", path.display());
        }
        // After the way back is asked for, a command is understood whatever came before.
        let command = b"\x01\n{\"execute\":\"x\"}";
        let last = messages(&[&input[..], command].concat(), usize::MAX).pop();
        assert_eq!(last, Some(Ok(serde_json::json!({ "execute": "x" }))), "{}", path.display());
        files += 1;
    }
    assert!(files >= 100, "{files}");
}
