// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `doorless attest`: a process that is confined like the daemon tries every way out, on bait that really is there.

use std::process::ExitCode;

use clap::Args;
use manager::attest::{Trap, Weakness};
use serde_json::{Value, json};

use crate::{Confinement, matrix, table};

/// Options of `attest`.
#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    confinement: Confinement,
    /// For programs.
    #[arg(long, conflicts_with = "matrix")]
    json: bool,
    /// Instead, try with no layer, each alone, each pair, and all; print what each is worth, as Markdown.
    #[arg(long)]
    matrix: bool,
    /// Leave this layer out, to see what it is good for; may be repeated.
    #[arg(long, value_name = "LAYER")]
    without: Vec<String>,
    /// Let the filter allow this system call, to see that the hole is found: openat, socket, fchmod, mmap, execve and others.
    #[arg(long, value_name = "CALL")]
    hole: Option<String>,
}

/// Tries, and tells; the exit status is 0 if every way is closed.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let program = options.confinement.program();
    let trap = Trap::set()?;
    if options.matrix {
        print!("{}", matrix::markdown(&trap, &program)?);
        return Ok(ExitCode::SUCCESS);
    }
    let weakness = Weakness { only: None, without: options.without.clone(), hole: options.hole.clone() };
    // A layer that is left out on purpose is not one that must be had.
    let level = if options.without.is_empty() { options.confinement.confine.to_string() } else { "best-effort".into() };
    let report = trap.spring(&program, &level, &weakness)?;
    let attempts = report["attempts"].as_array().map(Vec::as_slice).unwrap_or_default();
    let open = attempts.iter().filter(|attempt| attempt["denied"] != true).count();
    // No attempt is no proof.
    let held = open == 0 && !attempts.is_empty();
    if options.json {
        println!("{:#}", json!({ "held": held, "layers": report["layers"], "attempts": attempts }));
    } else {
        print(&report, attempts);
        match held {
            true => println!("\nEvery one of {} attempts was denied.", attempts.len()),
            false => println!("\n{open} of {} attempts were NOT denied.", attempts.len()),
        }
    }
    Ok(if held { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(report: &Value, attempts: &[Value]) {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let mut layers = vec![["layer", "in force", "what it does"].map(str::to_owned).to_vec()];
    for layer in report["layers"].as_array().into_iter().flatten() {
        let in_force = if layer["in-force"] == true { "yes" } else { "NO" };
        layers.push(vec![text(&layer["name"]), in_force.to_owned(), text(&layer["detail"])]);
    }
    let mut rows = vec![["attempt", "outcome", "stopped by", "the kernel said"].map(str::to_owned).to_vec()];
    for attempt in attempts {
        let outcome = if attempt["denied"] == true { "denied" } else { "NOT DENIED" };
        rows.push(vec![text(&attempt["what"]), outcome.to_owned(), text(&attempt["layer"]), text(&attempt["errno"])]);
    }
    for (index, lines) in [layers, rows].iter().enumerate() {
        if index > 0 {
            println!();
        }
        for line in table::lines(lines) {
            println!("{line}");
        }
    }
}
