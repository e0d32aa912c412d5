// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A well-behaved client's latency beside others of the same daemon.

use std::io::{ErrorKind, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use crate::client::{BLOCK, Served};

/// Bytes of a disk.
const DISK: usize = 1 << 20;

/// Who else is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Neighbour {
    Nobody,
    /// A process that computes, and is no client at all: what sharing the processors costs by itself.
    Busy,
    /// Asks for much and never takes an answer.
    NeverReads,
    /// Sends a byte of a request a second.
    Dribbles,
    /// Keeps 128 requests under way.
    Floods,
    /// All bad ones at once.
    All,
}

impl Neighbour {
    pub const ALL: [Neighbour; 6] = [
        Neighbour::Nobody,
        Neighbour::Busy,
        Neighbour::NeverReads,
        Neighbour::Dribbles,
        Neighbour::Floods,
        Neighbour::All,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Neighbour::Nobody => "nobody",
            Neighbour::Busy => "two that compute and ask nothing",
            Neighbour::NeverReads => "one that never reads",
            Neighbour::Dribbles => "one that sends a byte a second",
            Neighbour::Floods => "one that floods",
            Neighbour::All => "all three",
        }
    }

    /// Whether it is a client that the target speaks of.
    pub fn is_bad(self) -> bool {
        !matches!(self, Neighbour::Nobody | Neighbour::Busy)
    }
}

/// The median and the 99th percentile of a client at depth 1, microseconds.
pub fn latency(neighbour: Neighbour, length: Duration) -> [f64; 2] {
    let mut served = Served::start();
    served.export("calm", DISK);
    served.export("bad", DISK);
    let over = AtomicBool::new(false);
    let latencies = thread::scope(|scope| {
        match neighbour {
            Neighbour::Nobody => {}
            Neighbour::Busy => (0..2).for_each(|_| drop(scope.spawn(|| computes(&over)))),
            Neighbour::NeverReads => never_reads(scope, &served, &over),
            Neighbour::Dribbles => dribbles(scope, &served, &over),
            Neighbour::Floods => floods(scope, &served, &over),
            Neighbour::All => {
                never_reads(scope, &served, &over);
                dribbles(scope, &served, &over);
                floods(scope, &served, &over);
            }
        }
        let mut client = served.client("calm");
        let mut latencies = Vec::with_capacity(1 << 20);
        let mut replies = Vec::new();
        let (begun, warm) = (Instant::now(), length / 8);
        while begun.elapsed() < length + warm {
            let asked = Instant::now();
            client.read(1, &mut replies);
            if begun.elapsed() > warm {
                latencies.push(asked.elapsed().as_nanos());
            }
        }
        over.store(true, Ordering::Relaxed);
        latencies
    });
    served.stop();
    let mut latencies = latencies;
    latencies.sort_unstable();
    let percentile = |of: usize| latencies[(latencies.len() - 1) * of / 100] as f64 / 1e3;
    [percentile(50), percentile(99)]
}

fn computes(over: &AtomicBool) {
    let mut state = 1u64;
    while !over.load(Ordering::Relaxed) {
        for _ in 0..1000 {
            state = std::hint::black_box(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
        }
    }
}

fn never_reads<'scope>(scope: &'scope Scope<'scope, '_>, served: &Served, over: &'scope AtomicBool) {
    let mut client = served.client("bad");
    scope.spawn(move || {
        let requests = client.requests(1000, 256 << 10);
        client.socket.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
        let mut at = 0;
        while !over.load(Ordering::Relaxed) {
            match client.socket.write(&requests[at..]) {
                Ok(sent) => at = (at + sent) % requests.len(),
                Err(e) => assert!(matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted), "{e}"),
            }
        }
    });
}

fn dribbles<'scope>(scope: &'scope Scope<'scope, '_>, served: &Served, over: &'scope AtomicBool) {
    let mut client = served.client("bad");
    scope.spawn(move || {
        let requests = client.requests(1000, BLOCK.try_into().unwrap());
        for byte in &requests {
            client.socket.write_all(&[*byte]).unwrap();
            for _ in 0..20 {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                thread::sleep(Duration::from_millis(50));
            }
        }
    });
}

fn floods<'scope>(scope: &'scope Scope<'scope, '_>, served: &Served, over: &'scope AtomicBool) {
    let mut client = served.client("bad");
    scope.spawn(move || {
        let mut sink = vec![0; 1 << 20];
        let requests = client.requests(128, BLOCK.try_into().unwrap());
        client.socket.write_all(&requests).unwrap();
        let mut owed = 0;
        while !over.load(Ordering::Relaxed) {
            // As many as have been answered are asked for again.
            owed += client.socket.read(&mut sink).unwrap();
            let answered = owed / (16 + BLOCK);
            owed %= 16 + BLOCK;
            let again = client.requests(answered, BLOCK.try_into().unwrap());
            client.socket.write_all(&again).unwrap();
        }
    });
}
