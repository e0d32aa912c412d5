// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Medians, and ratios that are taken within a round.

use crate::load::Measured;

/// Every measurement.
#[derive(Default)]
pub struct Report(Vec<Row>);

struct Row {
    round: usize,
    workload: &'static str,
    server: &'static str,
    measured: Measured,
}

impl Report {
    pub fn add(&mut self, round: usize, workload: &'static str, server: &'static str, measured: Measured) {
        self.0.push(Row { round, workload, server, measured });
    }

    /// A table for each workload: medians, and our ratios to each peer.
    pub fn print(&self) {
        for workload in distinct(self.0.iter().map(|row| row.workload)) {
            println!("\n{workload}");
            println!(
                "  {:<20} {:>10} {:>9} {:>10} {:>9} {:>9} {:>9} {:>8}   doorless against it: cpu/req, iops",
                "server", "iops", "MiB/s", "cpu/req us", "p50 us", "p99 us", "start ms", "MiB"
            );
            let mut rows: Vec<&Row> = self.0.iter().filter(|row| row.workload == workload).collect();
            rows.sort_by_key(|row| row.server != "doorless");
            for server in distinct(rows.iter().map(|row| row.server)) {
                let of = |value: fn(&Measured) -> f64| {
                    median(rows.iter().filter(|row| row.server == server).map(|row| value(&row.measured)).collect())
                };
                let ratio = |value: fn(&Measured) -> f64| {
                    let ours = |round| rows.iter().find(|row| row.server == "doorless" && row.round == round);
                    median(
                        rows.iter()
                            .filter(|row| row.server == server)
                            .filter_map(|row| Some(value(&ours(row.round)?.measured) / value(&row.measured)))
                            .collect(),
                    )
                };
                println!(
                    "  {server:<20} {:>10.0} {:>9.0} {:>10.2} {:>9.1} {:>9.1} {:>9.1} {:>8.1}   {:.2} x cpu, {:.2} x iops",
                    of(|m| m.iops),
                    of(|m| m.mib),
                    of(|m| m.cpu),
                    of(|m| m.p50),
                    of(|m| m.p99),
                    of(|m| m.start),
                    of(|m| m.memory),
                    ratio(|m| m.cpu),
                    ratio(|m| m.iops),
                );
            }
        }
    }

    /// Every measurement as JSON.
    pub fn json(&self) -> String {
        let rows = self.0.iter().map(|row| {
            let Measured { iops, mib, cpu, p50, p99, start, memory } = &row.measured;
            serde_json::json!({
                "round": row.round, "workload": row.workload, "server": row.server, "iops": iops, "mib-per-second": mib,
                "cpu-us-per-request": cpu, "p50-us": p50, "p99-us": p99, "start-ms": start, "resident-mib": memory,
            })
        });
        serde_json::Value::from_iter(rows).to_string()
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn distinct<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = Vec::new();
    for name in names {
        if !seen.contains(&name) {
            seen.push(name);
        }
    }
    seen
}
