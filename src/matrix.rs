// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What each layer of confinement is worth alone, in pairs, and with all others: `doorless attest --matrix`, and with it
//! docs/isolation.md.

use std::fmt::Write;

use manager::attest::{Trap, Weakness};
use manager::inspector::Program;
use serde_json::Value;

/// What became of the attempts in one process.
struct Run {
    attempts: Vec<Value>,
    /// Whether every layer that was asked for was had.
    whole: bool,
}

impl Run {
    fn open(&self) -> usize {
        self.attempts.iter().filter(|attempt| attempt["denied"] != true).count()
    }
}

fn run(trap: &Trap, program: &Program, layers: Option<&[&str]>) -> manager::Result<Run> {
    let only = layers.map(|layers| layers.iter().map(|layer| (*layer).to_owned()).collect::<Vec<_>>());
    let report = trap.spring(program, "best-effort", &Weakness { only: only.clone(), ..Weakness::default() })?;
    let whole = report["layers"].as_array().into_iter().flatten().all(|layer| {
        let asked = only.as_ref().is_none_or(|only| only.iter().any(|name| layer["name"] == name.as_str()));
        !asked || layer["in-force"] == true
    });
    let attempts = report["attempts"].as_array().cloned().unwrap_or_default();
    Ok(Run { attempts, whole })
}

/// The tables, as Markdown.
///
/// # Errors
/// A process cannot be started.
pub fn markdown(trap: &Trap, program: &Program) -> manager::Result<String> {
    let layers = daemon::attest::layers();
    let mut columns = vec![("none".to_owned(), run(trap, program, Some(&[]))?)];
    for layer in &layers {
        columns.push(((*layer).to_owned(), run(trap, program, Some(&[layer]))?));
    }
    columns.push(("all".to_owned(), run(trap, program, None)?));

    let mut text = String::new();
    let mut heading = "| attempt |".to_owned();
    for (name, run) in &columns {
        let _ = write!(heading, " {name}{} |", if run.whole { "" } else { " (cannot be had)" });
    }
    let _ = writeln!(text, "{heading}\n|---|{}", "---|".repeat(columns.len()));
    for row in rows(&columns) {
        let _ = writeln!(text, "{row}");
    }
    let mut last = "| **ways out that are open** |".to_owned();
    for (_, run) in &columns {
        let _ = write!(last, " **{}** |", run.open());
    }
    let _ = writeln!(text, "{last}\n\nOpen ways with two layers; on the diagonal, with one:\n");

    let _ = writeln!(
        text,
        "| |{}\n|---|{}",
        layers.iter().map(|it| format!(" {it} |")).collect::<String>(),
        "---|".repeat(layers.len())
    );
    for (index, one) in layers.iter().enumerate() {
        let mut row = format!("| {one} |");
        for (other_index, other) in layers.iter().enumerate() {
            match index.cmp(&other_index) {
                std::cmp::Ordering::Less => row.push_str(" |"),
                std::cmp::Ordering::Equal => {
                    let _ = write!(row, " {} |", columns[index + 1].1.open());
                }
                std::cmp::Ordering::Greater => {
                    let _ = write!(row, " {} |", run(trap, program, Some(&[one, other]))?.open());
                }
            }
        }
        let _ = writeln!(text, "{row}");
    }
    Ok(text)
}

/// A row for each attempt; baits on which all columns agree share one.
fn rows(columns: &[(String, Run)]) -> Vec<String> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut rows: Vec<(String, String, Vec<String>)> = Vec::new();
    for (index, attempt) in columns[0].1.attempts.iter().enumerate() {
        let cells = columns.iter().fold(String::new(), |cells, (_, run)| {
            let attempt = run.attempts.get(index).unwrap_or(&Value::Null);
            let cell = if attempt["denied"] == true { text(&attempt["errno"]) } else { "**A**".to_owned() };
            format!("{cells} {cell} |")
        });
        let on = text(&attempt["on"]);
        let what = text(&attempt["what"]);
        let what = what.strip_suffix(&on).unwrap_or(&what).trim_end().to_owned();
        match rows.iter_mut().find(|(same, same_cells, _)| *same == what && *same_cells == cells) {
            Some((_, _, targets)) => targets.push(on),
            None => rows.push((what, cells, vec![on])),
        }
    }
    rows.iter().map(|(what, cells, on)| format!("| {what} {} |{cells}", on.join(", ")).replace("  |", " |")).collect()
}
