// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The load: random blocks of 4 KiB, each checked when it was read.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::front_end::{Ask, FrontEnd, Memory, Options, kind};
use crate::servers::{Format, Running};

const BLOCK: u64 = 4096;

/// What is asked of a server.
pub struct Workload {
    pub name: &'static str,
    pub format: Format,
    pub depth: u16,
    pub writes: bool,
}

/// What came out.
pub struct Measured {
    pub iops: f64,
    pub mib: f64,
    /// The server's CPU time per request, microseconds.
    pub cpu: f64,
    pub p50: f64,
    pub p99: f64,
    /// From start to the first block, milliseconds.
    pub start: f64,
    /// Resident, MiB.
    pub memory: f64,
}

/// A disk whose blocks say where they stand.
pub fn make_disk(path: &Path, size: u64) {
    let mut file = BufWriter::new(File::create(path).unwrap());
    for block in 0..size / BLOCK {
        file.write_all(&block.to_le_bytes().repeat(512)).unwrap();
    }
    file.into_inner().unwrap().sync_all().unwrap();
}

pub fn measure(server: &Running, workload: &Workload, size: u64, time: Duration) -> Measured {
    let memory = Memory::new(1);
    let options = Options { size: 128, ..Options::default() };
    let mut front = FrontEnd::start(&server.socket, &memory, options);
    let first = front.read(0, BLOCK);
    assert_eq!(first[..8], [0; 8]);
    let start = server.started.elapsed();
    let queue = &mut front.queues[0];
    let mut state = 88_172_645_463_325_252_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % (size / BLOCK)
    };
    let mut under_way = vec![(0, Instant::now()); usize::from(workload.depth)];
    let mut latencies = Vec::with_capacity(1 << 20);
    let kind = if workload.writes { kind::WRITE } else { kind::READ };
    let cpu = server.cpu();
    let began = Instant::now();
    for slot in 0..workload.depth {
        submit(queue, slot, kind, next(), &mut under_way);
    }
    queue.kick();
    let mut left = workload.depth;
    while left > 0 {
        let done = queue.wait();
        let now = Instant::now();
        for done in done {
            let (block, submitted) = under_way[usize::from(done.slot)];
            assert_eq!(done.status, 0);
            let mut there = [0; 8];
            queue.data(done.slot, 8).copy_to(&mut there);
            assert_eq!(u64::from_le_bytes(there), block);
            latencies.push(u32::try_from((now - submitted).as_nanos()).unwrap_or(u32::MAX));
            if now - began < time {
                submit(queue, done.slot, kind, next(), &mut under_way);
            } else {
                left -= 1;
            }
        }
        queue.kick();
    }
    let took = began.elapsed().as_secs_f64();
    let requests = latencies.len() as f64;
    latencies.sort_unstable();
    let percentile = |percent: usize| f64::from(latencies[(latencies.len() - 1) * percent / 100]) / 1000.0;
    Measured {
        iops: requests / took,
        mib: requests * BLOCK as f64 / took / f64::from(1 << 20),
        cpu: (server.cpu() - cpu).as_secs_f64() * 1e6 / requests,
        p50: percentile(50),
        p99: percentile(99),
        start: start.as_secs_f64() * 1e3,
        memory: server.memory() as f64 / f64::from(1 << 20),
    }
}

fn submit(queue: &mut crate::front_end::Queue<'_>, slot: u16, kind: u32, block: u64, under_way: &mut [(u64, Instant)]) {
    if kind == kind::WRITE {
        queue.data(slot, 8).copy_from(&block.to_le_bytes());
    }
    queue.submit(slot, Ask::new(kind, block * BLOCK / 512, BLOCK));
    under_way[usize::from(slot)] = (block, Instant::now());
}
