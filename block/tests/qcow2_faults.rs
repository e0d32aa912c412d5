// SPDX-License-Identifier: Apache-2.0 OR MIT
//! qcow2 over a host file that fails: the request says so, trying again works, and nothing that was there is lost.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use std::sync::Arc;

use rustix::io::Errno;
use support::guest::ATOM;
use support::image::{KINDS, Made, Start, make};
use support::recording::{Fault, Journal};
use support::session::{Request, Session};
use support::walk::walk;
use support::{Random, judge};

/// The same requests in every run of a kind.
fn script(session: &Session, random: &mut Random) -> Request {
    if random.below(12) == 0 && session.made.kind.start != Start::Snapshot {
        session.choose_size(random)
    } else {
        session.choose(random, 0..session.open.node.len() as usize / ATOM)
    }
}

/// Works with host operations failing from number `first` on; whether any did.
fn work_with_fault(made: &Arc<Made>, fault: Fault) -> Result<bool, String> {
    let session = Session::start(made);
    session.journal.set_fault(Some(fault));
    let mut random = Random(0xfa117);
    let mut failed = 0;
    for _ in 0..20 {
        let request = script(&session, &mut random);
        for attempt in 0.. {
            match session.perform(&request) {
                Ok(()) => break,
                Err(e) if e.raw_os_error() != Some(fault.errno.raw_os_error()) => {
                    return Err(format!("{request:?} answers {e}, not {}", fault.errno));
                }
                // A header of which nobody knows what it says: the image is left alone from then on.
                Err(_) if attempt > fault.count && fault.count > 1 => return left_alone(session).map(|()| true),
                Err(e) if attempt > fault.count => return Err(format!("{request:?} goes on to fail: {e}")),
                Err(_) => failed += 1,
            }
            session.guest().check_now(&session.open.all().map_err(|e| format!("read after {request:?}: {e}"))?)?;
        }
    }
    let reached = session.journal.operations() > fault.first;
    session.journal.set_fault(None);
    session.open.node.flush().map_err(|e| format!("the flush at the end: {e}"))?;
    let Session { open, guest, .. } = session;
    let guest = guest.into_inner().unwrap();
    let seen = open.all().map_err(|e| format!("read at the end: {e}"))?;
    guest.check_now(&seen)?;
    let files = open.close();
    walk(&files[0]).map_err(|e| format!("after {failed} failed requests: {e}"))?;
    let again = made.open(&Journal::silent(), &files).map_err(|e| format!("open again: {e}"))?;
    if again.all().map_err(|e| format!("read again: {e}"))? != seen {
        return Err("what was flushed is not there".into());
    }
    Ok(reached)
}

/// An image that is not written any more is read, and is what a crash could have left.
fn left_alone(session: Session) -> Result<(), String> {
    let Session { made, journal, open, guest, .. } = session;
    let guest = guest.into_inner().unwrap();
    guest.check_now(&open.all().map_err(|e| format!("read of an image that is left alone: {e}"))?)?;
    let files = open.close();
    walk(&files[0]).map_err(|e| format!("left alone: {e}"))?;
    let again = made.open(&Journal::silent(), &files).map_err(|e| format!("open what was left alone: {e}"))?;
    guest.check(&again.all().map_err(|e| format!("read what was left alone: {e}"))?, journal.now())
}

#[test]
fn a_host_operation_that_fails_fails_its_request_alone_and_trying_again_works() {
    if !judge("a_host_operation_that_fails_fails_its_request_alone_and_trying_again_works", "qemu-img") {
        return;
    }
    let mut found = Vec::new();
    let mut runs = 0;
    for kind in KINDS {
        let made = make(kind);
        'kind: for (errno, count) in [(Errno::NOSPC, 1), (Errno::IO, 3)] {
            // Every operation while there are few, then some.
            for first in (0..40).chain((40..).step_by(7)) {
                runs += 1;
                match work_with_fault(&made, Fault { first, count, errno, reads: false }) {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(e) => {
                        found.push(format!("{}, {errno} {count} times from operation {first} on: {e}", kind.name));
                        break 'kind;
                    }
                }
            }
        }
    }
    eprintln!("{runs} runs");
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn threads_go_on_after_a_fault_and_none_waits_for_ever() {
    if !judge("threads_go_on_after_a_fault_and_none_waits_for_ever", "qemu-img") {
        return;
    }
    for first in (0..40).step_by(3) {
        let made = make(&KINDS[first % KINDS.len()]);
        let session = Session::start(&made);
        session.journal.set_yielding();
        let errno = if first % 2 == 0 { Errno::IO } else { Errno::NOSPC };
        session.journal.set_fault(Some(Fault { first: first as u64, count: 4, errno, reads: false }));
        let share = session.open.node.len() as usize / ATOM / 3;
        std::thread::scope(|scope| {
            for thread in 0..3usize {
                let session = &session;
                scope.spawn(move || {
                    let mut random = Random(((first * 3 + thread) as u64 + 1) << 20);
                    for _ in 0..15 {
                        let request = session.choose(&mut random, thread * share..(thread + 1) * share);
                        let _ = session.perform(&request);
                        let _ = session.perform(&Request::Flush);
                    }
                });
            }
        });
        session.journal.set_fault(None);
        session.open.node.flush().unwrap();
        let Session { open, guest, .. } = session;
        guest.into_inner().unwrap().check_now(&open.all().unwrap()).unwrap();
        walk(&open.close()[0]).unwrap();
    }
}
