// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `query-block`, `query-blockstats`, and what they cannot tell: `query-statistics`.

use block::BlockNode;
use block::stats::{BUCKETS, Count, Kind, Stats, bucket_end};
use qmp::{Arguments, Call, Command, Definition, Error, Member, Type};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::words;
use crate::state::Daemon;

/// The children that hold a node's own data, the first that it has: what QEMU shows as `parent`.
const STORED_IN: [&str; 2] = ["data-file", "file"];

pub fn types() -> Vec<Definition> {
    vec![
        Definition::structure(
            "BlockInfo",
            [Member::required("device", Type::Str, "A device's name.")],
            "A device; there are none.",
        ),
        Definition::structure("BlockDeviceStats", device_stats(), "What was asked of a node, in QEMU's words."),
        Definition::structure(
            "BlockStats",
            [
                Member::optional("node-name", Type::Str, "The node."),
                Member::required("stats", Type::Named("BlockDeviceStats"), "What its exports' clients asked of it."),
                Member::optional("parent", Type::Named("BlockStats"), "The node that its data is stored in."),
            ],
            "A node's statistics.",
        ),
        words(
            "RequestKind",
            &["read", "write", "zeroes", "discard", "flush", "status"],
            "What a request asks for; `status` is where data is.",
        ),
        Definition::structure(
            "RequestCount",
            [
                Member::required("kind", Type::Named("RequestKind"), "What was asked for."),
                Member::required("operations", Type::Int, "Requests that succeeded."),
                Member::required("bytes", Type::Int, "Their bytes."),
                Member::required("failed", Type::Int, "Requests that failed or were refused."),
                Member::required("time-ns", Type::Int, "Time that those which succeeded took together, nanoseconds."),
                Member::required(
                    "latencies",
                    Type::Array(&Type::Int),
                    "How many of them took how long, by the ranges of `latency-ends`; ranges at the end that are empty are left out.",
                ),
            ],
            "Requests of one kind.",
        ),
        Definition::structure(
            "ClientStatistics",
            [
                Member::required("id", Type::Int, "The client's number."),
                Member::required("peer", Type::Str, "Who it is, as far as the kernel tells."),
                Member::required("requests", Type::Array(&Type::Named("RequestCount")), "What it asked."),
            ],
            "A client that is connected.",
        ),
        Definition::structure(
            "ExportStatistics",
            [
                Member::required("id", Type::Str, "The export."),
                Member::required("type", Type::Named("BlockExportType"), "Its kind."),
                Member::required("node-name", Type::Str, "Its node."),
                Member::required(
                    "requests",
                    Type::Array(&Type::Named("RequestCount")),
                    "What all its clients asked, ever.",
                ),
                Member::required("clients", Type::Array(&Type::Named("ClientStatistics")), "Those that are connected."),
            ],
            "An export.",
        ),
        Definition::structure(
            "NodeStatistics",
            [
                Member::required("node-name", Type::Str, "The node."),
                Member::required("drv", Type::Str, "Its driver."),
                Member::required("virtual-size", Type::Int, "Bytes that a guest sees."),
                Member::required(
                    "requests",
                    Type::Array(&Type::Named("RequestCount")),
                    "What its exports' clients asked.",
                ),
            ],
            "A node.",
        ),
        Definition::structure(
            "Statistics",
            [
                Member::required("pid", Type::Int, "This process."),
                Member::required(
                    "latency-ends",
                    Type::Array(&Type::Int),
                    "Where the ranges of latencies end, nanoseconds; a last range without an end follows.",
                ),
                Member::required("exports", Type::Array(&Type::Named("ExportStatistics")), "The exports."),
                Member::required("nodes", Type::Array(&Type::Named("NodeStatistics")), "The nodes."),
            ],
            "What was asked of this process. Kinds of requests that nobody made are left out everywhere.",
        ),
    ]
}

/// QEMU's members that are not merely sums per kind.
const OTHERS: [(&str, &str); 3] =
    [("rd_merged", "Always 0: requests are never merged."), ("wr_merged", "Always 0."), ("unmap_merged", "Always 0.")];
/// QEMU's prefixes, and what they count here.
const PREFIXES: [(&str, &[Kind]); 4] = [
    ("rd", &[Kind::Read]),
    ("wr", &[Kind::Write, Kind::Zeroes]),
    ("flush", &[Kind::Flush]),
    ("unmap", &[Kind::Discard]),
];
/// QEMU's members for what does not exist here.
const NEVER: [&str; 10] = [
    "invalid_rd_operations",
    "invalid_wr_operations",
    "invalid_flush_operations",
    "invalid_unmap_operations",
    "zone_append_bytes",
    "zone_append_operations",
    "zone_append_merged",
    "zone_append_total_time_ns",
    "failed_zone_append_operations",
    "invalid_zone_append_operations",
];

fn device_stats() -> Vec<Member> {
    let counted = |name: &'static str, doc: &'static str| Member::required(name, Type::Int, doc);
    let mut members = vec![
        counted("rd_bytes", "Bytes read."),
        counted("rd_operations", "Reads."),
        counted("rd_total_time_ns", "Time that reads took together."),
        counted("failed_rd_operations", "Reads that failed or were refused."),
        counted("wr_bytes", "Bytes written, zeroes among them."),
        counted("wr_operations", "Writes."),
        counted("wr_total_time_ns", "Time that writes took together."),
        counted("failed_wr_operations", "Writes that failed or were refused."),
        counted("unmap_bytes", "Bytes discarded."),
        counted("unmap_operations", "Discards."),
        counted("unmap_total_time_ns", "Time that discards took together."),
        counted("failed_unmap_operations", "Discards that failed or were refused."),
        counted("flush_operations", "Flushes."),
        counted("flush_total_time_ns", "Time that flushes took together."),
        counted("failed_flush_operations", "Flushes that failed."),
        counted("wr_highest_offset", "The end of the write that went furthest; writes of nodes above count."),
        Member::required("account_failed", Type::Bool, "Always false: what fails takes no part in times."),
        Member::required("account_invalid", Type::Bool, "Always false."),
        Member::required("timed_stats", Type::Array(&Type::Any), "Always empty."),
    ];
    members.extend(OTHERS.map(|(name, doc)| counted(name, doc)));
    members.extend(NEVER.map(|name| counted(name, "Always 0.")));
    members
}

pub fn commands() -> Vec<Command<Daemon>> {
    vec![
        Command::new("query-block", "Lists devices, of which a storage daemon has none.", Arguments::NONE, no_devices)
            .returning(Type::Array(&Type::Named("BlockInfo"))),
        Command::new(
            "query-blockstats",
            "Tells what was asked of every node, in QEMU's words.",
            [Member::optional(
                "query-nodes",
                Type::Bool,
                "Whether nodes are meant; default false, which means devices, and there are none.",
            )],
            block_stats,
        )
        .returning(Type::Array(&Type::Named("BlockStats"))),
        Command::new(
            "query-statistics",
            "Tells what was asked of exports and nodes and by which clients, with latencies.",
            Arguments::NONE,
            statistics,
        )
        .returning(Type::Named("Statistics")),
    ]
}

fn no_devices(_: &mut Daemon, _: Call<'_>) -> Result<Value, Error> {
    Ok(json!([]))
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct QueryNodes {
    query_nodes: Option<bool>,
}

fn block_stats(daemon: &mut Daemon, mut call: Call<'_>) -> Result<Value, Error> {
    let QueryNodes { query_nodes } = call.parse()?;
    if query_nodes != Some(true) {
        return Ok(json!([]));
    }
    Ok(daemon.graph.nodes().into_iter().rev().map(|node| node_stats(daemon, node)).collect())
}

fn node_stats(daemon: &Daemon, node: &BlockNode) -> Value {
    let mut shown = json!({ "node-name": node.name(), "stats": in_qemus_words(node) });
    let below = |edge: &str| daemon.graph.edges(node.name()).find(|found| found.name == edge);
    let below = STORED_IN.into_iter().find_map(below);
    if let Some(child) = below.and_then(|edge| daemon.graph.get(&edge.child).ok()) {
        shown["parent"] = node_stats(daemon, child);
    }
    shown
}

fn in_qemus_words(node: &BlockNode) -> Value {
    let mut stats = Map::new();
    for (prefix, kinds) in PREFIXES {
        let sum = |what: fn(&Count) -> u64| kinds.iter().map(|&kind| what(&node.stats().count(kind))).sum::<u64>();
        if prefix != "flush" {
            stats.insert(format!("{prefix}_bytes"), sum(|count| count.bytes).into());
        }
        stats.insert(format!("{prefix}_operations"), sum(|count| count.operations).into());
        stats.insert(format!("{prefix}_total_time_ns"), sum(|count| count.time_ns).into());
        stats.insert(format!("failed_{prefix}_operations"), sum(|count| count.failed).into());
    }
    let never = NEVER.into_iter().chain(OTHERS.map(|(name, _)| name));
    stats.extend(never.map(|name| (name.to_owned(), 0.into())));
    stats.insert("wr_highest_offset".into(), node.furthest_write().into());
    stats.insert("account_failed".into(), false.into());
    stats.insert("account_invalid".into(), false.into());
    stats.insert("timed_stats".into(), json!([]));
    Value::Object(stats)
}

fn statistics(daemon: &mut Daemon, _: Call<'_>) -> Result<Value, Error> {
    let exports = daemon.exports.running().map(|(id, kind, export)| {
        let clients = export.clients().into_iter();
        let clients: Vec<Value> = clients
            .map(|client| json!({ "id": client.id, "peer": client.peer, "requests": requests(&client.stats) }))
            .collect();
        json!({
            "id": id, "type": kind, "node-name": export.node().name(), "requests": requests(export.stats()),
            "clients": clients,
        })
    });
    let exports: Vec<Value> = exports.collect();
    let nodes = daemon.graph.nodes().into_iter().map(|node| {
        json!({
            "node-name": node.name(), "drv": node.driver_name(), "virtual-size": node.len(),
            "requests": requests(node.stats()),
        })
    });
    let nodes: Vec<Value> = nodes.collect();
    let ends: Vec<u64> = (0..BUCKETS).filter_map(bucket_end).collect();
    Ok(json!({ "pid": sys::process::id(), "latency-ends": ends, "exports": exports, "nodes": nodes }))
}

fn requests(stats: &Stats) -> Vec<Value> {
    let counts = Kind::ALL.iter().map(|&kind| (kind, stats.count(kind)));
    let some = counts.filter(|(_, count)| count.operations + count.failed > 0);
    some.map(|(kind, count)| {
        let used = count.latencies.iter().rposition(|&number| number > 0).map_or(0, |last| last + 1);
        json!({
            "kind": kind.word(), "operations": count.operations, "bytes": count.bytes, "failed": count.failed,
            "time-ns": count.time_ns, "latencies": count.latencies[..used],
        })
    })
    .collect()
}
