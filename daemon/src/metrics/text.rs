// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The text format of OpenMetrics 1.0: families of samples, each family once and in one piece.

use std::fmt::Write;

use block::stats::{BUCKETS, Count, Kind, Stats, bucket_end};

use crate::state::Daemon;

/// Everything that there is to tell.
pub fn render(daemon: &Daemon) -> String {
    let mut text = Text(String::new());
    let mut counted = Vec::new();
    for (id, kind, export) in daemon.exports.running() {
        let node = export.node();
        let labels = [("export", id), ("type", kind), ("node", node.name())];
        counted.extend(counts(export.stats()).map(|(kind, count)| (labelled(&labels, Some(kind)), count)));
    }
    text.family("doorless_requests", "counter", None, "Requests of clients that succeeded.");
    for (labels, count) in &counted {
        text.sample("doorless_requests_total", labels, count.operations);
    }
    text.family("doorless_request_bytes", "counter", Some("bytes"), "Bytes of those requests.");
    for (labels, count) in &counted {
        text.sample("doorless_request_bytes_total", labels, count.bytes);
    }
    text.family("doorless_request_errors", "counter", None, "Requests of clients that failed or were refused.");
    for (labels, count) in &counted {
        text.sample("doorless_request_errors_total", labels, count.failed);
    }
    text.family(
        "doorless_request_duration_seconds",
        "histogram",
        Some("seconds"),
        "Time from a request's arrival to its answer.",
    );
    for (labels, count) in &counted {
        text.histogram("doorless_request_duration_seconds", labels, count);
    }
    text.family("doorless_export_clients", "gauge", None, "Clients that are connected.");
    for (id, kind, export) in daemon.exports.running() {
        let node = export.node();
        let labels = [("export", id), ("type", kind), ("node", node.name())];
        text.sample("doorless_export_clients", &labelled(&labels, None), export.clients().len() as u64);
    }
    text.family("doorless_node_size_bytes", "gauge", Some("bytes"), "Size of a node.");
    for node in daemon.graph.nodes() {
        let labels = labelled(&[("node", node.name()), ("driver", node.driver_name())], None);
        text.sample("doorless_node_size_bytes", &labels, node.len());
    }
    text.family("doorless_fdset_descriptors", "gauge", None, "Descriptors in an fd set.");
    for set in daemon.fdsets.list() {
        let id = set.id().to_string();
        text.sample("doorless_fdset_descriptors", &labelled(&[("fdset", &id)], None), set.fds().count() as u64);
    }
    text.0.push_str("# EOF\n");
    text.0
}

/// The kinds that somebody asked for.
fn counts(stats: &Stats) -> impl Iterator<Item = (Kind, Count)> {
    let all = Kind::ALL.iter().map(|&kind| (kind, stats.count(kind)));
    all.filter(|(_, count)| count.operations + count.failed > 0)
}

/// Labels as they stand between braces.
fn labelled(labels: &[(&str, &str)], kind: Option<Kind>) -> String {
    let kind = kind.map(|kind| ("kind", kind.word()));
    let mut text = String::new();
    for (name, value) in labels.iter().copied().chain(kind) {
        let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let comma = if text.is_empty() { "" } else { "," };
        let _ = write!(text, "{comma}{name}=\"{value}\"");
    }
    text
}

struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, unit: Option<&str>, help: &str) {
        let _ = writeln!(self.0, "# TYPE {name} {kind}");
        if let Some(unit) = unit {
            let _ = writeln!(self.0, "# UNIT {name} {unit}");
        }
        let _ = writeln!(self.0, "# HELP {name} {help}");
    }

    fn sample(&mut self, name: &str, labels: &str, value: u64) {
        let _ = writeln!(self.0, "{name}{{{labels}}} {value}");
    }

    /// Buckets hold everything up to their end. Every second of the ranges will do: powers of two.
    fn histogram(&mut self, name: &str, labels: &str, count: &Count) {
        let mut sum = 0;
        for index in 0..BUCKETS {
            sum += count.latencies[index];
            match bucket_end(index) {
                Some(end) if index % 2 == 1 => {
                    let (seconds, ns) = (end / 1_000_000_000, end % 1_000_000_000);
                    let _ = writeln!(self.0, "{name}_bucket{{{labels},le=\"{seconds}.{ns:09}\"}} {sum}");
                }
                Some(_) => {}
                None => {
                    let _ = writeln!(self.0, "{name}_bucket{{{labels},le=\"+Inf\"}} {sum}");
                }
            }
        }
        let (seconds, ns) = (count.time_ns / 1_000_000_000, count.time_ns % 1_000_000_000);
        let _ = writeln!(self.0, "{name}_count{{{labels}}} {sum}");
        let _ = writeln!(self.0, "{name}_sum{{{labels}}} {seconds}.{ns:09}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_cannot_break_out_of_their_quotes() {
        assert_eq!(labelled(&[("a", "x\"}\n\\")], Some(Kind::Read)), r#"a="x\"}\n\\",kind="read""#);
    }
}
