// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `check`: is an image damaged, and can that be repaired?

use block::{CheckReport, Repair};
use serde_json::{Map, Value, json};

use confine::Requirement;

use crate::disk::{Disk, Named, Usage, format_of};
use crate::tool::{Result, confine, say, say_json, warn};

/// What is asked.
pub struct Request {
    /// The image, writable if it is to be repaired.
    pub image: Named,
    /// Its format, if its user says it.
    pub format: Option<String>,
    /// What is repaired.
    pub repair: Repair,
    /// Answer in JSON.
    pub json: bool,
    /// Say nothing but errors.
    pub quiet: bool,
    /// Others may write at the same time.
    pub force_share: bool,
    /// Which layers of confinement must be had.
    pub confinement: Requirement,
}

/// What `-r` says.
pub fn repair(what: Option<&str>) -> Repair {
    match what {
        None => Repair::Nothing,
        Some("leaks") => Repair::Leaks,
        Some(_) => Repair::All,
    }
}

/// Exit statuses besides 0, as qemu-img has them.
const INCOMPLETE: u8 = 1;
const CORRUPT: u8 = 2;
const LEAKS: u8 = 3;
const UNSUPPORTED: u8 = 63;

/// Checks; the exit status.
///
/// # Errors
/// The image cannot be opened.
pub fn run(request: Request) -> Result<u8> {
    let Request { image, format, repair, json, quiet, .. } = request;
    confine(request.confinement)?;
    let name = image.name.clone();
    let writable = repair != Repair::Nothing;
    let disk = Disk::file(image, Usage { writable, force_share: request.force_share, unflushed: false })?;
    let format = format_of(&disk.node, format.as_deref())?;
    let mut each = |text: &str| {
        if !quiet && !json {
            warn(text);
        }
    };
    let first = match block::check(&disk.node, &format, repair, &mut each) {
        Err(e) if e.kind == block::ErrorKind::Unsupported && e.to_string().ends_with("does not support checks") => {
            warn(&format!("qemu-img: {e}"));
            return Ok(UNSUPPORTED);
        }
        other => other?,
    };
    let mut report = first;
    if first.corruptions_fixed + first.leaks_fixed > 0 {
        if !quiet && !json {
            say(&format!(
                "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\nDouble checking \
                 the fixed image now...\n",
                first.leaks_fixed, first.corruptions_fixed
            ))?;
        }
        report = block::check(&disk.node, &format, Repair::Nothing, &mut each)?;
        report.corruptions_fixed = first.corruptions_fixed;
        report.leaks_fixed = first.leaks_fixed;
    }
    disk.close()?;
    if json {
        say_json(&as_json(&report, &name, &format))?;
    } else if !quiet {
        say(&as_text(&report))?;
    }
    Ok(match report {
        CheckReport { check_errors: 1.., .. } => INCOMPLETE,
        CheckReport { corruptions: 1.., .. } => CORRUPT,
        CheckReport { leaks: 1.., .. } => LEAKS,
        _ => 0,
    })
}

fn as_json(report: &CheckReport, name: &str, format: &str) -> Value {
    let mut answer = Map::from_iter([
        ("filename".to_owned(), json!(name)),
        ("format".into(), json!(format)),
        ("check-errors".into(), json!(report.check_errors)),
        ("image-end-offset".into(), json!(report.image_end_offset)),
    ]);
    for (member, number) in [
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("corruptions-fixed", report.corruptions_fixed),
        ("leaks-fixed", report.leaks_fixed),
    ] {
        if number > 0 {
            answer.insert(member.into(), json!(number));
        }
    }
    Value::Object(answer)
}

fn as_text(report: &CheckReport) -> String {
    let mut text = String::new();
    if report.corruptions + report.leaks + report.check_errors == 0 {
        text += "No errors were found on the image.\n";
    }
    if report.corruptions > 0 {
        text += &format!(
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.\n",
            report.corruptions
        );
    }
    if report.leaks > 0 {
        text += &format!(
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n",
            report.leaks
        );
    }
    if report.check_errors > 0 {
        text += &format!("\n{} internal errors have occurred during the check.\n", report.check_errors);
    }
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        text += &format!(
            "{}/{} = {}% allocated, {}% fragmented, {}% compressed clusters\n",
            report.allocated_clusters,
            report.total_clusters,
            percent(report.allocated_clusters, report.total_clusters),
            percent(report.fragmented_clusters, report.allocated_clusters),
            percent(report.compressed_clusters, report.allocated_clusters)
        );
    }
    if report.image_end_offset > 0 {
        text += &format!("Image end offset: {}\n", report.image_end_offset);
    }
    text
}

fn percent(part: u64, whole: u64) -> String {
    #[allow(clippy::cast_precision_loss, reason = "two decimals are shown")]
    let percent = part as f64 * 100.0 / whole as f64;
    format!("{percent:.2}")
}
