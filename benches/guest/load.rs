// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The load inside the guest: `load DEVICE BYTES DEPTH REQUESTS`, 4 KiB random reads past the guest's cache by DEPTH threads.
//! A program of its own without any dependency, linked statically, because the guest has no libraries.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Instant;

const O_DIRECT: i32 = 0o40000;
const BLOCK: u64 = 4096;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |at: usize| arguments[at].parse::<u64>().expect("a number");
    let (device, blocks, depth, requests) = (arguments[1].clone(), number(2) / BLOCK, number(3), number(4));
    let start = Instant::now();
    let threads: Vec<_> = (0..depth)
        .map(|thread| {
            let device = device.clone();
            std::thread::spawn(move || {
                let disk = OpenOptions::new().read(true).custom_flags(O_DIRECT).open(device).expect("the disk");
                let mut memory = vec![0u8; 2 * BLOCK as usize];
                let skip = memory.as_ptr().align_offset(BLOCK as usize);
                let buffer = &mut memory[skip..skip + BLOCK as usize];
                let mut place = thread * 0x9e37_79b9 + 1;
                for _ in 0..requests / depth {
                    place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    disk.read_exact_at(buffer, (place >> 20) % blocks * BLOCK).expect("a block");
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().expect("a thread"));
    println!("took {} ms", start.elapsed().as_millis());
}
