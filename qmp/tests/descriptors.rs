// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Descriptors and the commands that they came with.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::fd::{AsFd, OwnedFd};

use common::{Served, all_closed, desc, file, inode};
use rustix::pipe::{PipeFlags, pipe_with};
use serde_json::{Value, json};

const ADD_FD: &str = r#"{"execute":"add-fd"}"#;
const NO_FD: &str = "No file descriptor supplied via SCM_RIGHTS";

/// A pipe whose read end tells when the write end is closed everywhere.
fn pipe() -> (OwnedFd, OwnedFd) {
    pipe_with(PipeFlags::CLOEXEC).unwrap()
}

fn took(answer: &Value) -> u64 {
    answer["return"]["inode"].as_u64().unwrap_or_else(|| panic!("{answer}"))
}

#[test]
fn fd_rides_on_any_byte_of_the_command() {
    let command = format!(" \t{ADD_FD}");
    for at in 0..command.len() {
        let (mut served, fd) = (Served::negotiated(false), file());
        let (before, after) = command.split_at(at);
        if !before.is_empty() {
            served.send(before.as_bytes(), &[]);
        }
        served.send(after.as_bytes(), &[fd.as_fd()]);
        assert_eq!(took(&served.answers()[0]), inode(&fd), "at {at}");
    }
}

#[test]
fn fd_on_one_half_of_a_split_command_is_its_own() {
    for on_first in [true, false] {
        let (mut served, fd) = (Served::negotiated(false), file());
        let fds = [fd.as_fd()];
        served.send(&ADD_FD.as_bytes()[..9], if on_first { &fds } else { &[] });
        assert_eq!(served.answers(), Vec::<Value>::new());
        served.send(&ADD_FD.as_bytes()[9..], if on_first { &[] } else { &fds });
        assert_eq!(took(&served.answers()[0]), inode(&fd));
    }
}

#[test]
fn fd_on_blank_before_negotiation_waits_for_the_claim() {
    let (mut served, fd) = (Served::new(), file());
    served.send(b" ", &[fd.as_fd()]);
    served.answers();
    served.send(br#"{"execute":"qmp_capabilities"}"#, &[]);
    served.answers();
    assert_eq!(took(&served.ask(&json!({ "execute": "add-fd" }), &[])), inode(&fd));
}

#[test]
fn fd_with_unrelated_command_waits_for_the_claim() {
    let (mut served, fd) = (Served::negotiated(false), file());
    served.ask(&json!({ "execute": "query-version" }), &[fd.as_fd()]);
    assert_eq!(served.session.pending().len(), 1);
    assert_eq!(took(&served.ask(&json!({ "execute": "add-fd" }), &[])), inode(&fd));
}

#[test]
fn fd_on_trailing_newline_goes_to_the_next_command() {
    let (mut served, fd) = (Served::negotiated(false), file());
    served.send(ADD_FD.as_bytes(), &[]);
    served.send(b"\r\n", &[fd.as_fd()]);
    served.send(ADD_FD.as_bytes(), &[]);
    let answers = served.answers();
    assert_eq!(desc(&answers[0]), NO_FD);
    assert_eq!(took(&answers[1]), inode(&fd));
}

#[test]
fn claim_without_fd_says_so_and_checks_types_first() {
    let mut served = Served::negotiated(false);
    let answer = served.ask(&json!({ "execute": "add-fd", "arguments": { "fdset-id": -1 } }), &[]);
    assert_eq!(desc(&answer), NO_FD);
    for id in [json!("1"), json!(1.5), json!(true), json!(null), json!(9_223_372_036_854_775_808_u64)] {
        let answer = served.ask(&json!({ "execute": "add-fd", "arguments": { "fdset-id": id } }), &[]);
        assert_eq!(desc(&answer), "Invalid parameter type for 'fdset-id', expected: integer");
    }
}

#[test]
fn claim_takes_the_first_and_closes_the_rest() {
    let mut served = Served::negotiated(false);
    let (first, (read, write)) = (file(), pipe());
    served.send(ADD_FD.as_bytes(), &[first.as_fd(), write.as_fd(), write.as_fd()]);
    drop(write);
    assert_eq!(took(&served.answers()[0]), inode(&first));
    assert!(all_closed(&read));
    assert_eq!(desc(&served.ask(&json!({ "execute": "add-fd" }), &[])), NO_FD);
}

#[test]
fn second_fd_replaces_the_pending_one() {
    let mut served = Served::negotiated(false);
    let ((read, write), second) = (pipe(), file());
    served.ask(&json!({ "execute": "query-version" }), &[write.as_fd()]);
    drop(write);
    assert!(!all_closed(&read));
    served.ask(&json!({ "execute": "query-version" }), &[second.as_fd()]);
    assert!(all_closed(&read));
    assert_eq!(took(&served.ask(&json!({ "execute": "add-fd" }), &[])), inode(&second));
}

#[test]
fn refused_commands_keep_the_pending_fd() {
    let (mut served, fd) = (Served::negotiated(true), file());
    served.ask(&json!({ "execute": "query-version" }), &[fd.as_fd()]);
    for refused in [
        json!([]),
        json!({ "execute": "no-such-command" }),
        json!({ "execute": "add-fd", "arguments": { "fdset-id": "1" } }),
        json!({ "exec-oob": "add-fd" }),
        json!({ "execute": "remove-fd", "arguments": { "fdset-id": 1 } }),
    ] {
        served.ask(&refused, &[]);
    }
    served.send(b"{]", &[]);
    served.answers();
    assert_eq!(took(&served.ask(&json!({ "execute": "add-fd" }), &[])), inode(&fd));
}

#[test]
fn failed_claim_closes_the_fd() {
    let mut served = Served::negotiated(false);
    for failing in [
        json!({ "execute": "add-fd", "arguments": { "fdset-id": -1 } }),
        json!({ "execute": "getfd", "arguments": { "fdname": "1a" } }),
    ] {
        let (read, write) = pipe();
        served.send(failing.to_string().as_bytes(), &[write.as_fd()]);
        drop(write);
        assert!(desc(&served.answers()[0]).starts_with("Parameter 'fd"));
        assert!(all_closed(&read));
    }
}

#[test]
fn pipelined_commands_get_their_own_fds() {
    for oob in [false, true] {
        let mut served = Served::negotiated(oob);
        let files: Vec<_> = (0..40).map(|_| file()).collect();
        for (i, fd) in files.iter().enumerate() {
            // Every third comes with bytes before it that carry none.
            if i % 3 == 0 {
                served.send(b"\n\n", &[]);
            }
            served.send(ADD_FD.as_bytes(), &[fd.as_fd()]);
        }
        let answers = served.answers();
        assert_eq!(answers.iter().map(took).collect::<Vec<_>>(), files.iter().map(inode).collect::<Vec<_>>());
    }
}

#[test]
fn command_between_two_fds_in_one_read_gets_neither() {
    let (mut served, first, second) = (Served::negotiated(true), file(), file());
    served.send(ADD_FD.as_bytes(), &[first.as_fd()]);
    served.send(ADD_FD.as_bytes(), &[]);
    served.send(ADD_FD.as_bytes(), &[second.as_fd()]);
    let answers = served.answers();
    assert_eq!(took(&answers[0]), inode(&first));
    assert_eq!(desc(&answers[1]), NO_FD);
    assert_eq!(took(&answers[2]), inode(&second));
}

#[test]
fn as_many_fds_as_the_kernel_passes_arrive_close_on_exec() {
    let (mut served, fd) = (Served::negotiated(false), file());
    served.ask(&json!({ "execute": "query-version" }), &[fd.as_fd(); 253]);
    assert_eq!(served.session.pending().len(), 253);
    served.ask(&json!({ "execute": "add-fd" }), &[]);
    let flags = rustix::io::fcntl_getfd(&served.state.taken[0]).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
}

#[test]
fn leaving_closes_what_is_pending_carried_and_unread() {
    let mut served = Served::negotiated(false);
    let (pending, carried, unread) = (pipe(), pipe(), pipe());
    served.ask(&json!({ "execute": "query-version" }), &[pending.1.as_fd()]);
    served.send(b" {", &[carried.1.as_fd()]);
    served.answers();
    served.send(b" ", &[unread.1.as_fd()]);
    let reads = [pending, carried, unread].map(|(read, _)| read);
    assert!(!reads.iter().any(all_closed));
    drop(served);
    assert!(reads.iter().all(all_closed));
}

#[test]
fn block_full_of_fd_blanks_holds_one_receipt() {
    let mut served = Served::negotiated(false);
    let pipes: Vec<_> = (0..100).map(|_| pipe()).collect();
    for (_, write) in &pipes {
        served.send(b" ", &[write.as_fd()]);
    }
    served.answers();
    let reads: Vec<_> = pipes.into_iter().map(|(read, _)| read).collect();
    assert_eq!(reads.iter().filter(|read| !all_closed(read)).count(), 1);
}

#[test]
fn named_fds_are_replaced_removed_and_told_missing() {
    let mut served = Served::negotiated(false);
    let (first, second) = (pipe(), pipe());
    let getfd = json!({ "execute": "getfd", "arguments": { "fdname": "" } });
    let closefd = json!({ "execute": "closefd", "arguments": { "fdname": "" } });
    assert_eq!(served.ask(&getfd, &[first.1.as_fd()]), json!({ "return": {} }));
    drop(first.1);
    served.ask(&getfd, &[second.1.as_fd()]);
    drop(second.1);
    assert!(all_closed(&first.0) && !all_closed(&second.0));
    assert_eq!(served.ask(&closefd, &[]), json!({ "return": {} }));
    assert!(all_closed(&second.0));
    assert_eq!(desc(&served.ask(&closefd, &[])), "File descriptor named '' not found");
    assert_eq!(served.state.named.take("x").unwrap_err().desc, "File descriptor named 'x' has not been found");
}
