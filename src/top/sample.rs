// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Asking daemons, each on a thread of its own.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use manager::monitor::Monitor;
use serde::Deserialize;
use serde_json::Value;

/// What a daemon answered, and when.
#[derive(Clone, Debug)]
pub struct Sample {
    /// When.
    pub at: Instant,
    /// `query-statistics`.
    pub statistics: Statistics,
    /// `query-fdsets`, for people.
    pub fdsets: Vec<Fdset>,
}

/// Something new about a daemon.
pub struct Heard {
    /// Which one, in the order of the sockets.
    pub index: usize,
    /// Its answer, or why there is none.
    pub sample: Result<Sample, String>,
}

/// See the command's reference.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Statistics {
    pub pid: u32,
    pub latency_ends: Vec<u64>,
    pub exports: Vec<Export>,
    pub nodes: Vec<Node>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Export {
    pub id: String,
    pub r#type: String,
    pub node_name: String,
    pub requests: Vec<Count>,
    pub clients: Vec<Client>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Client {
    pub id: u64,
    pub peer: String,
    pub requests: Vec<Count>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Node {
    pub node_name: String,
    pub drv: String,
    pub virtual_size: u64,
    pub requests: Vec<Count>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Count {
    pub kind: String,
    pub operations: u64,
    pub bytes: u64,
    pub failed: u64,
    pub latencies: Vec<u64>,
}

/// An fd set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fdset {
    pub id: i64,
    pub descriptors: usize,
    /// The first descriptor's text.
    pub opaque: String,
    /// The nodes that have opened something of it.
    pub users: Vec<String>,
}

/// Asks every daemon once an interval.
pub fn start(sockets: &[PathBuf], interval: Duration) -> Receiver<Heard> {
    let (sender, receiver) = channel();
    for (index, socket) in sockets.iter().enumerate() {
        let (sender, socket) = (sender.clone(), socket.clone());
        thread::spawn(move || {
            // Ends when nobody listens any more.
            while ask_until_it_fails(index, &socket, interval, &sender) {
                thread::sleep(interval);
            }
        });
    }
    receiver
}

/// False if nobody listens.
fn ask_until_it_fails(index: usize, socket: &Path, interval: Duration, heard: &Sender<Heard>) -> bool {
    let say = |sample| heard.send(Heard { index, sample }).is_ok();
    let failed = |e: &dyn std::error::Error| {
        let causes = std::iter::successors(e.source(), |e| e.source());
        causes.fold(e.to_string(), |text, cause| format!("{text}: {cause}"))
    };
    let mut monitor = match Monitor::connect(socket) {
        Ok(monitor) => monitor,
        Err(e) => return say(Err(failed(&e))),
    };
    loop {
        match ask(&mut monitor) {
            Ok(sample) => {
                if !say(Ok(sample)) {
                    return false;
                }
            }
            Err(e) => return say(Err(e)),
        }
        thread::sleep(interval);
    }
}

fn ask(monitor: &mut Monitor) -> Result<Sample, String> {
    let statistics = monitor.statistics().map_err(|e| e.to_string())?;
    let at = Instant::now();
    let statistics = serde_json::from_value(statistics).map_err(|e| format!("its statistics make no sense: {e}"))?;
    let fdsets = monitor.fdsets().map_err(|e| e.to_string())?;
    Ok(Sample { at, statistics, fdsets: fdsets.as_array().into_iter().flatten().map(fdset).collect() })
}

fn fdset(set: &Value) -> Fdset {
    let fds = set["fds"].as_array().map(Vec::as_slice).unwrap_or_default();
    let users = fds.iter().flat_map(|fd| fd["detail"]["users"].as_array().into_iter().flatten());
    let mut users: Vec<String> = users.filter_map(|user| user.as_str().map(str::to_owned)).collect();
    users.dedup();
    Fdset {
        id: set["fdset-id"].as_i64().unwrap_or(-1),
        descriptors: fds.len(),
        opaque: fds.iter().find_map(|fd| fd["opaque"].as_str()).unwrap_or_default().to_owned(),
        users,
    }
}
