// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `doorless fdsets`: what a running daemon was passed, and whether its books are right.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use manager::monitor::{Audit, Monitor};
use serde_json::{Value, json};

use crate::table;

/// Options of `fdsets`.
#[derive(Args)]
pub struct Options {
    /// The socket of a monitor that is free: `doorless serve --monitor`, or a `--chardev` of the daemon.
    #[arg(long, value_name = "PATH")]
    monitor: PathBuf,
    /// Hold the daemon's books of all its descriptors against /proc/PID/fd; the exit status is 1 if they do not agree.
    #[arg(long)]
    audit: bool,
    /// For programs.
    #[arg(long)]
    json: bool,
}

/// Prints the sets, or the audit.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let mut monitor = Monitor::connect(&options.monitor)?;
    if options.audit {
        let audit = monitor.audit()?;
        if options.json {
            println!("{:#}", audit_json(&audit));
        } else {
            print_audit(&audit);
        }
        return Ok(if audit.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let sets = monitor.fdsets()?;
    if options.json {
        println!("{sets:#}");
    } else {
        print_sets(&sets);
    }
    Ok(ExitCode::SUCCESS)
}

fn print_sets(sets: &Value) {
    let heading = ["set", "fd", "access", "type", "device:inode", "bytes", "passed by", "ago", "used by", "opaque"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for set in sets.as_array().into_iter().flatten() {
        let id = set["fdset-id"].to_string();
        let fds = set["fds"].as_array().map(Vec::as_slice).unwrap_or_default();
        if fds.is_empty() {
            rows.push(vec![id.clone(), "none left: the set lives on for the nodes that use it".into()]);
        }
        rows.extend(fds.iter().map(|fd| [vec![id.clone()], row(fd)].concat()));
    }
    if rows.len() == 1 {
        println!("no fd sets");
        return;
    }
    for line in table::lines(&rows) {
        println!("{line}");
    }
}

/// The columns of a descriptor after its set.
fn row(fd: &Value) -> Vec<String> {
    let detail = &fd["detail"];
    let text = |value: &Value| value.as_str().map_or_else(|| "-".to_owned(), |text| text.escape_debug().to_string());
    let number = |value: &Value| value.as_u64().map_or_else(|| "-".to_owned(), |number| number.to_string());
    let mut access = text(&detail["access"]);
    if detail["direct"] == true {
        access.push_str(" direct");
    }
    let mut kind = text(&detail["type"]);
    if detail["deleted"] == true {
        kind.push_str(", no name");
    }
    if let Some(seals) = detail["seals"].as_str() {
        kind.push_str(&format!(", sealed: {seals}"));
    }
    let peer = &detail["peer"];
    let passed_by = match (peer["pid"].as_i64(), peer["uid"].as_i64()) {
        // In another pid namespace than the daemon's own.
        (Some(0), Some(uid)) => format!("user {uid}"),
        (Some(pid), Some(uid)) => format!("process {pid}, user {uid}"),
        _ => "command line".to_owned(),
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let ago =
        detail["since"].as_u64().map_or_else(|| "-".to_owned(), |since| format!("{} s", now.saturating_sub(since)));
    let users: Vec<String> = detail["users"].as_array().into_iter().flatten().map(text).collect();
    vec![
        number(&fd["fd"]),
        access,
        kind,
        format!("{}:{}", text(&detail["device"]), number(&detail["inode"])),
        number(&detail["size"]),
        passed_by,
        ago,
        if users.is_empty() { "nobody".to_owned() } else { users.join(", ") },
        text(&fd["opaque"]),
    ]
}

fn print_audit(audit: &Audit) {
    let mut rows = vec![["fd", "owner", "what"].map(str::to_owned).to_vec()];
    rows.extend(audit.entries.iter().map(|entry| vec![entry.fd.to_string(), entry.owner.clone(), entry.what.clone()]));
    for line in table::lines(&rows) {
        println!("{line}");
    }
    println!();
    for (fd, what) in &audit.unaccounted {
        println!("LEAK: descriptor {fd} ({what}) is open and in nobody's books");
    }
    for entry in &audit.missing {
        println!("WRONG: descriptor {} is in the books of {} ({}) and not open", entry.fd, entry.owner, entry.what);
    }
    for entry in &audit.doubled {
        println!("WRONG: descriptor {} is in the books twice, once as {} ({})", entry.fd, entry.owner, entry.what);
    }
    if audit.is_clean() {
        println!("process {}: {} descriptors, each in the books once, none beyond", audit.pid, audit.entries.len());
    }
}

fn audit_json(audit: &Audit) -> Value {
    let unaccounted: Vec<Value> =
        audit.unaccounted.iter().map(|(fd, target)| json!({ "fd": fd, "target": target })).collect();
    let numbers = |entries: &[manager::monitor::Entry]| entries.iter().map(|entry| entry.fd).collect::<Vec<_>>();
    json!({
        "pid": audit.pid,
        "clean": audit.is_clean(),
        "descriptors": audit.entries.iter()
            .map(|entry| json!({ "fd": entry.fd, "owner": entry.owner, "what": entry.what })).collect::<Vec<_>>(),
        "unaccounted": unaccounted,
        "missing": numbers(&audit.missing),
        "doubled": numbers(&audit.doubled),
    })
}
