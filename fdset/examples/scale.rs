// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an add, an open and a removal cost with many descriptors, against ten: `cargo run --release --example scale`.
//!
//! Few and many are measured in turn, round by round, and the medians compared, so that a busy machine slows both.
//! The many need `RLIMIT_NOFILE` of a little more than their number; where it cannot be raised, the run with 100,000 is
//! skipped by name and one that fits is made instead.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::fs::File;
use std::hint::black_box;
use std::time::{Duration, Instant};

use fdset::{Access, FdSets};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const FEW: usize = 10;
const MANY: usize = 100_000;
const PER_SET: usize = 10;
const ROUNDS: usize = 41;
const CALLS: usize = 2_000;

fn main() -> Result<(), Box<dyn Error>> {
    let room = raise_limit(MANY + 1_000).saturating_sub(1_000) / PER_SET * PER_SET;
    if room < MANY {
        println!("skipped: {MANY} descriptors: needs RLIMIT_NOFILE of {} (have {})", MANY + 1_000, room + 1_000);
    }
    compare(room.min(MANY))
}

fn compare(many: usize) -> Result<(), Box<dyn Error>> {
    let image = File::open("/proc/self/exe")?;
    let (small, large) = (filled(&image, FEW)?, filled(&image, many)?);
    println!("{FEW} descriptors in {} set, {many} in {} sets", FEW / PER_SET, many / PER_SET);
    println!("{:<16}{:>12}{:>12}{:>8}", "call", "few (ns)", "many (ns)", "ratio");
    for (name, call) in CALLS_MEASURED {
        let (mut few, mut lots) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            few.push(timed(call, &small, &image, FEW / PER_SET, round)?);
            lots.push(timed(call, &large, &image, many / PER_SET, round)?);
        }
        let (few, lots) = (median(few), median(lots));
        println!("{name:<16}{few:>12.0}{lots:>12.0}{:>8.2}", lots / few);
    }
    Ok(())
}

/// One measured call; leaves the sets as they were.
type Call = fn(&FdSets, &File, i64) -> Result<(), Box<dyn Error>>;

const CALLS_MEASURED: [(&str, Call); 4] = [
    ("open, drop", |sets, _, id| {
        black_box(sets.open(id, Access::READ_ONLY)?);
        Ok(())
    }),
    ("look up", |sets, _, id| {
        black_box(sets.open(id, Access::READ_WRITE).is_err());
        Ok(())
    }),
    ("add, remove", |sets, image, id| {
        let added = sets.add(image.try_clone()?.into(), Some(id), None)?;
        sets.remove(id, Some(added.fd.into()))?;
        Ok(())
    }),
    ("new set, remove", |sets, image, _| {
        let added = sets.add(image.try_clone()?.into(), None, None)?;
        sets.remove(added.set_id, None)?;
        Ok(())
    }),
];

/// Nanoseconds per call.
fn timed(call: Call, sets: &FdSets, image: &File, count: usize, round: usize) -> Result<f64, Box<dyn Error>> {
    let ids: Vec<i64> = (0..CALLS).map(|n| spread(round * CALLS + n, count)).collect::<Result<_, _>>()?;
    let start = Instant::now();
    for id in ids {
        call(sets, image, id)?;
    }
    Ok(per_call(start.elapsed()))
}

#[allow(clippy::cast_precision_loss, reason = "a few milliseconds in nanoseconds")]
fn per_call(elapsed: Duration) -> f64 {
    elapsed.as_nanos() as f64 / CALLS as f64
}

/// Hits all sets in an order that no cache foresees.
fn spread(n: usize, count: usize) -> Result<i64, std::num::TryFromIntError> {
    i64::try_from(n.wrapping_mul(0x9e37_79b9) % count)
}

fn filled(image: &File, count: usize) -> Result<FdSets, Box<dyn Error>> {
    let sets = FdSets::new();
    for n in 0..count {
        let opaque = format!("descriptor {n}");
        sets.add(image.try_clone()?.into(), Some(i64::try_from(n / PER_SET)?), Some(opaque))?;
    }
    Ok(sets)
}

/// Raises the limit of open descriptors towards `wanted`; tells what it is then.
fn raise_limit(wanted: usize) -> usize {
    let limit = getrlimit(Resource::Nofile);
    let goal = u64::try_from(wanted).ok();
    let within = Rlimit { current: limit.maximum.min(goal), maximum: limit.maximum };
    // Above the hard limit with privilege only, below it always.
    if setrlimit(Resource::Nofile, Rlimit { current: goal, maximum: limit.maximum.max(goal) }).is_err() {
        let _ = setrlimit(Resource::Nofile, within);
    }
    getrlimit(Resource::Nofile).current.and_then(|now| usize::try_from(now).ok()).unwrap_or(usize::MAX)
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}
