// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two answers of a daemon make rates: requests and bytes a second, and how long the requests of that time took.

use std::path::Path;

use serde_json::{Value, json};

use super::sample::{Count, Fdset, Sample};

/// A daemon between two looks.
#[derive(Clone, Debug)]
pub struct DaemonRates {
    /// Its process.
    pub pid: u32,
    /// Its exports.
    pub exports: Vec<ExportRates>,
    /// Its nodes.
    pub nodes: Vec<NodeRates>,
    /// Its fd sets.
    pub fdsets: Vec<Fdset>,
}

/// An export.
#[derive(Clone, Debug)]
pub struct ExportRates {
    pub id: String,
    pub kind: String,
    pub node: String,
    pub rates: Rates,
    pub clients: Vec<ClientRates>,
}

/// A client.
#[derive(Clone, Debug)]
pub struct ClientRates {
    pub id: u64,
    pub peer: String,
    pub rates: Rates,
}

/// A node.
#[derive(Clone, Debug)]
pub struct NodeRates {
    pub name: String,
    pub driver: String,
    pub size: u64,
    pub rates: Rates,
}

/// What somebody asked, a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    pub reads: f64,
    pub writes: f64,
    /// Everything but reads and writes; zeroes are writes.
    pub others: f64,
    pub failures: f64,
    /// Bytes.
    pub read_bytes: f64,
    /// Bytes.
    pub written_bytes: f64,
    /// Of all requests of that time, nanoseconds; `None` if there were none.
    pub latency: Option<Percentiles>,
}

/// Half, 99 % and 99.9 % of the requests took no longer, nanoseconds: the end of the range that they fall into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Percentiles {
    pub half: u64,
    pub p99: u64,
    pub p999: u64,
}

/// What happened from `before` to `now`; without a before, nothing yet.
pub fn between(before: Option<&Sample>, now: &Sample) -> DaemonRates {
    let seconds = before.map_or(1.0, |before| now.at.duration_since(before.at).as_secs_f64()).max(1e-6);
    // Another process at the same socket has counted from zero.
    let before = before.filter(|before| before.statistics.pid == now.statistics.pid);
    let ends = &now.statistics.latency_ends;
    let rates = |old: Option<&[Count]>, new: &[Count]| match before {
        // What is new since counts from nothing.
        Some(_) => rates(old.unwrap_or_default(), new, seconds, ends),
        None => Rates::default(),
    };
    let exports = now.statistics.exports.iter().map(|export| {
        let old = before.and_then(|before| before.statistics.exports.iter().find(|old| old.id == export.id));
        let clients = export.clients.iter().map(|client| {
            let old = old.and_then(|old| old.clients.iter().find(|old| old.id == client.id));
            let rates = rates(old.map(|old| &old.requests[..]), &client.requests);
            ClientRates { id: client.id, peer: client.peer.clone(), rates }
        });
        ExportRates {
            id: export.id.clone(),
            kind: export.r#type.clone(),
            node: export.node_name.clone(),
            rates: rates(old.map(|old| &old.requests[..]), &export.requests),
            clients: clients.collect(),
        }
    });
    let nodes = now.statistics.nodes.iter().map(|node| {
        let old = before.and_then(|before| before.statistics.nodes.iter().find(|old| old.node_name == node.node_name));
        NodeRates {
            name: node.node_name.clone(),
            driver: node.drv.clone(),
            size: node.virtual_size,
            rates: rates(old.map(|old| &old.requests[..]), &node.requests),
        }
    });
    DaemonRates {
        pid: now.statistics.pid,
        exports: exports.collect(),
        nodes: nodes.collect(),
        fdsets: now.fdsets.clone(),
    }
}

#[allow(clippy::cast_precision_loss, reason = "rates for people")]
fn rates(old: &[Count], new: &[Count], seconds: f64, ends: &[u64]) -> Rates {
    let mut rates = Rates::default();
    let mut latencies: Vec<u64> = Vec::new();
    for count in new {
        let old = old.iter().find(|old| old.kind == count.kind);
        // An export of the same name that came after counts from zero: then all of it is new.
        let since = |what: fn(&Count) -> u64| {
            let before = old.map_or(0, what);
            what(count).checked_sub(before).unwrap_or(what(count))
        };
        let (operations, bytes) = (since(|count| count.operations) as f64, since(|count| count.bytes) as f64);
        match count.kind.as_str() {
            "read" => (rates.reads, rates.read_bytes) = (operations / seconds, bytes / seconds),
            "write" | "zeroes" => {
                rates.writes += operations / seconds;
                rates.written_bytes += bytes / seconds;
            }
            _ => rates.others += operations / seconds,
        }
        rates.failures += since(|count| count.failed) as f64 / seconds;
        latencies.resize(latencies.len().max(count.latencies.len()), 0);
        for (index, number) in count.latencies.iter().enumerate() {
            let before = old.and_then(|old| old.latencies.get(index)).copied().unwrap_or(0);
            latencies[index] = latencies[index].saturating_add(number.checked_sub(before).unwrap_or(*number));
        }
    }
    rates.latency = percentiles(&latencies, ends);
    rates
}

fn percentiles(latencies: &[u64], ends: &[u64]) -> Option<Percentiles> {
    let all: u64 = latencies.iter().fold(0, |sum, &number| sum.saturating_add(number));
    let at = |thousandths: u64| {
        // The rank of the request that is meant, counted from 1.
        let rank = u128::from(all) * u128::from(thousandths);
        let mut sum = 0u128;
        let index = latencies.iter().position(|&number| {
            sum += u128::from(number) * 1000;
            sum >= rank
        });
        // The last range has no end: what lies there took at least as long as its beginning.
        index.and_then(|index| ends.get(index).or(ends.last())).copied()
    };
    if all == 0 {
        return None;
    }
    Some(Percentiles { half: at(500)?, p99: at(990)?, p999: at(999)? })
}

/// For programs.
pub fn to_json(socket: &Path, daemon: &Result<DaemonRates, String>) -> Value {
    let monitor = socket.to_string_lossy();
    let daemon = match daemon {
        Ok(daemon) => daemon,
        Err(error) => return json!({ "monitor": monitor, "error": error }),
    };
    let exports = daemon.exports.iter().map(|export| {
        let clients =
            export.clients.iter().map(|client| merged(json!({ "id": client.id, "peer": client.peer }), &client.rates));
        let mut shown = json!({ "id": export.id, "type": export.kind, "node-name": export.node });
        shown["clients"] = clients.collect();
        merged(shown, &export.rates)
    });
    let nodes = daemon.nodes.iter().map(|node| {
        merged(json!({ "node-name": node.name, "drv": node.driver, "virtual-size": node.size }), &node.rates)
    });
    let fdsets = daemon.fdsets.iter().map(
        |set| json!({ "fdset-id": set.id, "descriptors": set.descriptors, "opaque": set.opaque, "users": set.users }),
    );
    json!({
        "monitor": monitor,
        "pid": daemon.pid,
        "exports": exports.collect::<Vec<_>>(),
        "nodes": nodes.collect::<Vec<_>>(),
        "fdsets": fdsets.collect::<Vec<_>>(),
    })
}

fn merged(mut shown: Value, rates: &Rates) -> Value {
    let Rates { reads, writes, others, failures, read_bytes, written_bytes, latency } = *rates;
    let numbers = [
        ("reads", reads),
        ("writes", writes),
        ("others", others),
        ("failures", failures),
        ("read-bytes", read_bytes),
        ("written-bytes", written_bytes),
    ];
    for (name, value) in numbers {
        shown[name] = json!(value);
    }
    shown["latency-ns"] = latency
        .map_or(Value::Null, |Percentiles { half, p99, p999 }| json!({ "p50": half, "p99": p99, "p99.9": p999 }));
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(kind: &str, operations: u64, latencies: &[u64]) -> Count {
        Count { kind: kind.into(), operations, bytes: operations * 512, failed: 1, latencies: latencies.to_vec() }
    }

    #[test]
    fn rates_are_what_came_between_two_looks() {
        let (old, new) =
            ([count("read", 100, &[100])], [count("read", 300, &[200, 100]), count("flush", 4, &[0, 0, 4])]);
        let rates = rates(&old, &new, 2.0, &[10, 20, 40]);
        assert_eq!((rates.reads, rates.read_bytes, rates.others, rates.failures), (100.0, 51_200.0, 2.0, 0.5));
        assert_eq!(rates.latency, Some(Percentiles { half: 20, p99: 40, p999: 40 }));
    }

    #[test]
    fn percentiles_are_the_ends_of_ranges() {
        let ends = [10, 20, 30];
        assert_eq!(percentiles(&[0, 0], &ends), None);
        assert_eq!(percentiles(&[1000], &ends), Some(Percentiles { half: 10, p99: 10, p999: 10 }));
        assert_eq!(percentiles(&[985, 10, 4, 1], &ends), Some(Percentiles { half: 10, p99: 20, p999: 30 }));
        assert_eq!(percentiles(&[0, 0, 0, 5], &ends), Some(Percentiles { half: 30, p99: 30, p999: 30 }), "no end");
        assert_eq!(percentiles(&[1], &[]), None, "an answer that makes no sense");
    }
}
