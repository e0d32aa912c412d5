// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an export, a client and a request cost where there are many.

use std::time::Instant;

use crate::client::{BLOCK, Client, Served};

/// Bytes of all disks together, however many there are: else few disks would fit the processor's cache, and many would not.
const DATA: usize = 512 << 20;
/// Requests that a client sends at once.
const BATCH: usize = 16;

/// A daemon's figures.
pub struct Crowd {
    /// Microseconds of CPU per request.
    pub cpu: f64,
    /// Resident KiB that an export adds.
    pub per_export: f64,
    /// Resident KiB that a client adds who has asked for [`BATCH`] blocks at once.
    pub per_client: f64,
    /// Microseconds until an export is served, or a client has been answered.
    pub set_up: f64,
}

impl Crowd {
    /// A daemon with so many exports and two clients of each, who ask in turn.
    pub fn measure(exports: usize, requests: usize) -> Crowd {
        let mut served = Served::start();
        // What the first of everything needs is no cost of one more.
        served.export("first", 1 << 20);
        let mut replies = Vec::new();
        served.client("first").read(BATCH, &mut replies);
        let began = Instant::now();
        let empty = served.resident();
        let names: Vec<String> = (0..exports).map(|number| format!("disk{number}")).collect();
        names.iter().for_each(|name| served.export(name, DATA / exports / BLOCK * BLOCK));
        let exported = served.resident();
        let mut clients: Vec<Client> = names.iter().chain(&names).map(|name| served.client(name)).collect();
        clients.iter_mut().for_each(|client| client.read(BATCH, &mut replies));
        let crowded = served.resident();
        let set_up = began.elapsed();
        let rounds = requests.div_ceil(BATCH * clients.len());
        let before = served.cpu();
        for _ in 0..rounds {
            clients.iter_mut().for_each(|client| client.read(BATCH, &mut replies));
        }
        let cpu = served.cpu() - before;
        let crowd = Crowd {
            cpu: cpu as f64 / 1e3 / (rounds * BATCH * clients.len()) as f64,
            per_export: (exported - empty) / exports as f64,
            per_client: (crowded - exported) / clients.len() as f64,
            set_up: set_up.as_secs_f64() * 1e6 / (exports + clients.len()) as f64,
        };
        drop(clients);
        served.stop();
        crowd
    }
}
