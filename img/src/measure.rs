// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `measure`: how large the file of a new image will be.

use block::{ExtentKind, OptionValue, Options};
use serde_json::json;

use confine::Requirement;

use crate::disk::{Disk, Layer, Usage};
use crate::tool::{Error, Result, confine, say, say_json};

/// What is measured.
pub enum Source {
    /// An empty disk of so many bytes.
    Size(u64),
    /// A chain.
    Chain(Vec<Layer>),
}

/// What is asked.
pub struct Request {
    /// What the new image will hold.
    pub source: Source,
    /// Its format.
    pub format: String,
    /// Its options.
    pub options: Options,
    /// Answer in JSON.
    pub json: bool,
    /// Others may write at the same time.
    pub force_share: bool,
    /// Which layers of confinement must be had.
    pub confinement: Requirement,
}

/// Tells; the exit status.
///
/// # Errors
/// The image cannot be opened, or the format cannot be measured.
pub fn run(request: Request) -> Result<u8> {
    let Request { source, format, options, json, force_share, confinement } = request;
    confine(confinement)?;
    let number = |name: &str, default: u64| match options.get(name) {
        Some(OptionValue::Size(number)) => *number,
        _ => default,
    };
    let is_qcow2 = match format.as_str() {
        "qcow2" => true,
        "raw" => false,
        other => return Err(Error::Text(format!("Format driver '{other}' does not support size measurement"))),
    };
    let cluster = if is_qcow2 { number("cluster_size", 65536) } else { 512 };
    if !cluster.is_power_of_two() || !(512..=2 << 20).contains(&cluster) {
        return Err(Error::Text("Cluster size must be a power of two between 512 and 2048k".into()));
    }
    let preallocates =
        matches!(options.get("preallocation"), Some(OptionValue::Str(mode)) if mode == "full" || mode == "falloc");
    let (size, data) = match source {
        Source::Size(size) => (size, 0),
        Source::Chain(layers) => {
            let disk = Disk::open(layers, Usage { writable: false, force_share, unflushed: false })?;
            (disk.node.len(), data_clusters(&disk, cluster)? * cluster)
        }
    };
    let (required, full) = if is_qcow2 {
        let entry = if options.get("extended_l2") == Some(&OptionValue::Bool(true)) { 16 } else { 8 };
        let full = qcow2(size, cluster, number("refcount_bits", 16), entry)
            .ok_or_else(|| Error::Text("The image size is too large (try using a larger cluster size)".into()))?;
        let aligned = size.next_multiple_of(cluster);
        (if preallocates { full } else { full - aligned + data.min(aligned) }, full)
    } else {
        // Holes count towards the size of a file.
        (size, size)
    };
    if json {
        say_json(&json!({ "required": required, "fully-allocated": full }))?;
    } else {
        say(&format!("required size: {required}\nfully allocated size: {full}\n"))?;
    }
    Ok(0)
}

/// Clusters that hold data.
fn data_clusters(disk: &Disk, cluster: u64) -> Result<u64> {
    let len = disk.node.len();
    let (mut at, mut clusters, mut counted_to) = (0, 0, 0);
    while at < len {
        let extent = disk.node.status(at, len - at);
        let extent =
            extent.map_err(|e| Error::Text(format!("error while reading block status at offset {at}: {e}")))?;
        let end = at + extent.len;
        if extent.kind == ExtentKind::Data {
            let (first, last) = ((at / cluster).max(counted_to), end.div_ceil(cluster));
            clusters += last.saturating_sub(first);
            counted_to = counted_to.max(last);
        }
        at = end;
    }
    Ok(clusters)
}

/// Bytes of a qcow2 file that holds `size` bytes of data.
fn qcow2(size: u64, cluster: u64, refcount_bits: u64, entry: u64) -> Option<u64> {
    let aligned = size.checked_next_multiple_of(cluster)?;
    let per_table = cluster / entry;
    let l2_clusters = (aligned / cluster).div_ceil(per_table);
    if l2_clusters * 8 > 32 << 20 {
        return None;
    }
    let l1 = (l2_clusters * 8).next_multiple_of(cluster);
    let without_counts = (cluster + l2_clusters * cluster + l1).checked_add(aligned)? / cluster;
    let per_block = cluster * 8 / refcount_bits.max(1);
    let (mut blocks, mut table) = (0, 0);
    loop {
        let all = without_counts + blocks + table;
        let (more_blocks, more_table) = (all.div_ceil(per_block), (all.div_ceil(per_block) * 8).div_ceil(cluster));
        if (more_blocks, more_table) == (blocks, table) {
            return all.checked_mul(cluster);
        }
        (blocks, table) = (more_blocks, more_table);
    }
}
