// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command reference says what the table says.
#![allow(missing_docs, clippy::unwrap_used)]

#[test]
fn the_reference_of_the_monitor_is_fresh() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/qmp.md");
    let fresh = daemon::commands::table().reference();
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(path, &fresh).unwrap();
    }
    let written = std::fs::read_to_string(path).unwrap_or_default();
    assert!(written == fresh, "docs/qmp.md is stale: BLESS=1 cargo test -p doorless-daemon --test reference");
}
