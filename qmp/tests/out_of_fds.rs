// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Receipt when the process has no descriptor to spare. Alone in its process, whose limit it lowers.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::fd::AsFd;

use common::{Served, all_closed, desc, file, inode};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;

#[test]
fn lost_fds_fail_the_next_claim_with_the_reason_and_leak_nothing() {
    let mut served = Served::negotiated(false);
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let stale = file();
    let limit = getrlimit(Resource::Nofile);
    served.ask(&json!({ "execute": "query-version" }), &[stale.as_fd()]);
    served.send(br#"{"execute":"add-fd"}"#, &[write.as_fd(); 3]);
    drop(write);

    // The first free number: one descriptor finds room, two do not.
    let probe = file();
    let free = std::os::fd::AsRawFd::as_raw_fd(&probe);
    drop(probe);
    let current = Some(u64::try_from(free).unwrap() + 1);
    setrlimit(Resource::Nofile, Rlimit { current, maximum: limit.maximum }).unwrap();
    let answers = served.answers();
    setrlimit(Resource::Nofile, limit).unwrap();

    // Not the descriptor that waited from before: it would be the wrong file.
    assert_eq!(answers.len(), 1);
    assert_eq!(answers[0]["error"]["class"], "GenericError");
    assert!(desc(&answers[0]).starts_with("File descriptors were lost on receipt: 1 arrived"), "{answers:?}");
    assert!(all_closed(&read));

    // It is told once, and the session goes on.
    let next = served.ask(&json!({ "execute": "add-fd" }), &[]);
    assert_eq!(desc(&next), "No file descriptor supplied via SCM_RIGHTS");
    let fd = file();
    let next = served.ask(&json!({ "execute": "add-fd" }), &[fd.as_fd()]);
    assert_eq!(next["return"]["inode"], inode(&fd));
}
