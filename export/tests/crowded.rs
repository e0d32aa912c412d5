// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Clients that want too much, and what others of the same server notice of it.
#![allow(missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

mod client;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use block::{Ask, Driver, Mapping, Prepared, Target, Wait, ZeroFlags};
use client::{Fixture, READ, request};

const MIB: u64 = 1 << 20;
/// Workers that there are for everybody.
const WORKERS: usize = 64;
/// Requests of one client at the workers.
const OF_ONE: usize = 16;
/// Nothing here takes so long, unless it hangs.
const HANGS: Duration = Duration::from_secs(120);

/// What has been asked of a disk, and whether it hangs.
#[derive(Default)]
struct Asked {
    begun: BTreeMap<u64, usize>,
    let_go: bool,
}

/// A disk on which nothing is ready; reads of what is not the first sector hang until they are let go.
#[derive(Clone, Default)]
struct Hanging(Arc<(Mutex<Asked>, Condvar)>);

impl Hanging {
    /// Waits until so many reads hang.
    fn await_begun(&self, count: usize) {
        let (asked, changed) = &*self.0;
        let enough = |asked: &mut Asked| asked.begun.values().sum::<usize>() < count;
        let (_asked, waited) = changed.wait_timeout_while(asked.lock().unwrap(), HANGS, enough).unwrap();
        assert!(!waited.timed_out(), "fewer than {count} reads have begun");
    }

    fn begun(&self, offset: u64) -> usize {
        self.0.0.lock().unwrap().begun.get(&offset).copied().unwrap_or_default()
    }

    fn let_go(&self) {
        self.0.0.lock().unwrap().let_go = true;
        self.0.1.notify_all();
    }
}

impl Driver for Hanging {
    fn len(&self) -> u64 {
        MIB
    }

    fn map(&self, offset: u64, len: u64, ask: Ask) -> io::Result<Mapping<'_>> {
        if ask.wait == Wait::Never {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if offset > 0 {
            let (asked, changed) = &*self.0;
            let mut asked = asked.lock().unwrap();
            *asked.begun.entry(offset).or_default() += 1;
            changed.notify_all();
            drop(changed.wait_while(asked, |asked| !asked.let_go).unwrap());
        }
        Ok(Mapping::fixed(Target::Zero, len))
    }

    fn prepare_write(&self, _: u64, _: u64) -> io::Result<Prepared<'_>> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

fn reads(count: usize, offset: u64) -> Vec<u8> {
    (0..count as u64).flat_map(|cookie| request(0, READ, cookie, offset, 512)).collect()
}

#[test]
fn what_a_client_who_has_left_was_waiting_for_is_not_done_any_more() {
    let disk = Hanging::default();
    let fixture = Fixture::driver(Box::new(disk.clone()));
    let mut hanging: Vec<_> = (0..WORKERS / OF_ONE).map(|_| fixture.client()).collect();
    hanging.iter_mut().for_each(|client| client.socket.write_all(&reads(OF_ONE, 512)).unwrap());
    disk.await_begun(WORKERS);
    // No worker is left for this one.
    let mut leaving = fixture.client();
    leaving.socket.write_all(&reads(OF_ONE + 100, 1024)).unwrap();
    drop(leaving);
    fixture.changed.recv_timeout(HANGS).expect("it waits for nobody");
    assert_eq!(fixture.export.clients(), hanging.len());
    disk.let_go();
    for client in &mut hanging {
        (0..OF_ONE).for_each(|_| assert_eq!(client.reply(512).error, 0));
    }
    assert_eq!((disk.begun(512), disk.begun(1024)), (WORKERS, 0));
}

#[test]
fn a_client_that_floods_keeps_nobody_from_being_answered() {
    let disk = Hanging::default();
    let fixture = Fixture::driver(Box::new(disk.clone()));
    let mut flooding = fixture.client();
    let mut socket = flooding.socket.try_clone().unwrap();
    // Many more than it may have under way; every one of them hangs.
    let flood = std::thread::spawn(move || socket.write_all(&reads(50_000, 512)).unwrap());
    disk.await_begun(OF_ONE);
    let mut other = fixture.client();
    for _ in 0..200 {
        // Several at once, so that they go to the workers.
        other.socket.write_all(&reads(8, 0)).unwrap();
        (0..8).for_each(|_| assert_eq!(other.reply(512).error, 0));
    }
    assert_eq!(disk.begun(512), OF_ONE, "no more of one client's at once");
    disk.let_go();
    (0..50_000).for_each(|_| assert_eq!(flooding.reply(512).error, 0));
    flood.join().unwrap();
}

#[test]
fn a_client_that_never_reads_keeps_nobody_from_being_answered() {
    let fixture = Fixture::raw(MIB, false);
    let mut silent: Vec<_> = (0..20).map(|_| fixture.client()).collect();
    for client in &mut silent {
        client.socket.set_nonblocking(true).unwrap();
        let request = request(0, READ, 1, 0, MIB as u32);
        // Until the server takes no more, because it cannot get rid of its answers.
        while client.socket.write(&request).is_ok_and(|sent| sent == request.len()) {}
    }
    let mut other = fixture.client();
    for _ in 0..200 {
        assert_eq!(other.call(0, READ, 0, 4096, &[]).error, 0);
    }
    // They get what they asked for when they want it.
    silent[0].socket.set_nonblocking(false).unwrap();
    let mut head = [0; 16];
    silent[0].socket.read_exact(&mut head).unwrap();
    assert_eq!(head[..4], [0x67, 0x44, 0x66, 0x98]);
}
