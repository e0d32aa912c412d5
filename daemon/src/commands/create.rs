// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `blockdev-create`: an image made in a passed file or in a node, as a job.

use std::sync::Arc;

use block::{BlockNode, Claim, CreateRequest, OptionValue, Preallocation, Use, User, preallocation_named};
use fdset::Access;
use qmp::{Call, Command, Definition, Error, Member, Type};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::blockdev::{Inherited, add_node};
use super::{block_error, words};
use crate::state::Daemon;

/// QAPI's members of `BlockdevCreateOptionsQcow2` that are options of the format, and what the format calls them.
const QCOW2_OPTIONS: [(&str, &str); 10] = [
    ("backing-file", "backing_file"),
    ("backing-fmt", "backing_fmt"),
    ("cluster-size", "cluster_size"),
    ("compression-type", "compression_type"),
    ("data-file-raw", "data_file_raw"),
    ("extended-l2", "extended_l2"),
    ("lazy-refcounts", "lazy_refcounts"),
    ("preallocation", "preallocation"),
    ("refcount-bits", "refcount_bits"),
    ("version", "compat"),
];

pub fn types() -> Vec<Definition> {
    vec![
        words(
            "PreallocMode",
            &["off", "metadata", "falloc", "full"],
            "How room for an image is set aside when it is made.",
        ),
        words("BlockdevCreateDriver", &["file", "qcow2"], "Drivers that can make images."),
        words("BlockdevQcow2Version", &["v2", "v3"], "Compatibility levels 0.10 and 1.1."),
        words("Qcow2CompressionType", &["zlib", "zstd"], "How clusters are compressed."),
        Definition::union(
            "BlockdevCreateOptions",
            [Member::required("driver", Type::Named("BlockdevCreateDriver"), "The driver.")],
            "driver",
            [("file", Type::Named("BlockdevCreateOptionsFile")), ("qcow2", Type::Named("BlockdevCreateOptionsQcow2"))],
            "An image to be made.",
        ),
        Definition::structure(
            "BlockdevCreateOptionsFile",
            [
                Member::required("filename", Type::Str, "`/dev/fdset/ID`: what is there is cut to nothing first."),
                Member::required("size", Type::Size, "Bytes of the image."),
                Member::optional("preallocation", Type::Named("PreallocMode"), "Default `off`."),
                Member::optional("nocow", Type::Bool, "Not supported: must be false."),
            ],
            "A raw file.",
        ),
        Definition::structure(
            "BlockdevCreateOptionsQcow2",
            [
                Member::required("file", Type::Named("BlockdevRef"), "Where: what is there is lost."),
                Member::optional("data-file", Type::Named("BlockdevRef"), "Where its data goes, if not there."),
                Member::optional("data-file-raw", Type::Bool, "The data file stays valid as a raw image."),
                Member::optional("extended-l2", Type::Bool, "Clusters have subclusters."),
                Member::required("size", Type::Size, "Bytes of the disk, a multiple of 512."),
                Member::optional("version", Type::Named("BlockdevQcow2Version"), "Default `v3`."),
                Member::optional("backing-file", Type::Str, "File name of a base image, as text."),
                Member::optional("backing-fmt", Type::Named("BlockdevDriver"), "The base image's format."),
                Member::optional("cluster-size", Type::Size, "Bytes in a cluster, default 64 KiB."),
                Member::optional("preallocation", Type::Named("PreallocMode"), "Default `off`."),
                Member::optional("lazy-refcounts", Type::Bool, "Refcount updates may be postponed."),
                Member::optional("refcount-bits", Type::Int, "Width of a reference count, default 16."),
                Member::optional("compression-type", Type::Named("Qcow2CompressionType"), "Default `zlib`."),
            ],
            "A qcow2 image.",
        ),
    ]
}

pub fn commands() -> Vec<Command<Daemon>> {
    vec![Command::new(
        "blockdev-create",
        "Makes an image in a passed file or in a node, as a job.",
        [
            Member::required("job-id", Type::Str, "The job to be."),
            Member::required("options", Type::Named("BlockdevCreateOptions"), "The image."),
        ],
        create,
    )]
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Create {
    job_id: String,
    options: Map<String, Value>,
}

fn create(daemon: &mut Daemon, mut call: Call<'_>) -> Result<Value, Error> {
    let Create { job_id, options } = call.parse()?;
    match options.get("driver").and_then(Value::as_str) {
        Some("qcow2") => create_qcow2(daemon, job_id, options)?,
        _ => create_file(daemon, job_id, &options)?,
    }
    Ok(Value::Null)
}

fn create_file(daemon: &mut Daemon, job_id: String, options: &Map<String, Value>) -> Result<(), Error> {
    if options.get("nocow") == Some(&Value::Bool(true)) {
        return Err(Error::generic("'nocow' is not supported; leave it out"));
    }
    let size = size(options)?;
    let preallocation = text(options, "preallocation").map_or(Ok(Preallocation::Off), preallocation_named);
    let preallocation = preallocation.map_err(block_error)?;
    let filename = text(options, "filename").unwrap_or_default();
    let opened = fdset::path::set_id(filename).and_then(|set| {
        let user = format!("job {job_id}");
        daemon.fdsets.open_for(set, Access::CREATE, &user)
    });
    let opened = opened.map_err(|e| {
        tracing::info!(filename, "{}", e.detail());
        e.to_string()
    });
    daemon.jobs.start(job_id, "create", Vec::new(), move || {
        let opened = opened?;
        if preallocation == Preallocation::Metadata {
            return Err("Unsupported preallocation mode: metadata".into());
        }
        block::create_file(opened, size, preallocation).map_err(|e| e.to_string())
    })
}

fn create_qcow2(daemon: &mut Daemon, job_id: String, mut options: Map<String, Value>) -> Result<(), Error> {
    daemon.jobs.check_id(&job_id)?;
    let size = size(&options)?;
    let mut checked = block::Options::new();
    for (member, option) in QCOW2_OPTIONS {
        let value = match options.get(member) {
            None => continue,
            Some(Value::String(text)) => OptionValue::Str(text.clone()),
            Some(Value::Bool(is_on)) => OptionValue::Bool(*is_on),
            Some(number) => OptionValue::Size(number.as_u64().ok_or_else(|| out_of_range(number, member))?),
        };
        checked.insert(option, value);
    }
    let mut claims = Vec::new();
    let nodes = claimed(daemon, options.remove("file"), &job_id, &mut claims)
        .and_then(|file| Ok((file, claimed(daemon, options.remove("data-file"), &job_id, &mut claims)?)))
        .map_err(|e| e.to_string());
    daemon.jobs.start(job_id, "create", claims, move || {
        let (file, data_file) = nodes?;
        let file = file.ok_or("Parameter 'file' is missing")?;
        if let Some(data_file) = &data_file {
            checked.insert("data_file", OptionValue::Str(data_file.filename().to_owned()));
        }
        let request = CreateRequest { file, data_file, extents: Vec::new(), parent_cid: None, size, options: checked };
        block::create("qcow2", &request).map_err(|e| e.to_string())
    })
}

/// The node that a `BlockdevRef` names or describes, for the job alone to write; one that it describes goes with the claim.
fn claimed(
    daemon: &mut Daemon,
    reference: Option<Value>,
    job_id: &str,
    claims: &mut Vec<Claim>,
) -> Result<Option<Arc<BlockNode>>, Error> {
    let (name, is_own) = match reference {
        None => return Ok(None),
        Some(Value::Object(options)) => (add_node(daemon, options, Inherited::default())?, true),
        Some(name) => (name.as_str().unwrap_or_default().to_owned(), false),
    };
    let node = daemon.graph.get(&name).map(Arc::clone);
    let node = node.map_err(|_| Error::generic(format!("Cannot find device='' nor node-name='{name}'")))?;
    let user = User::Export { id: format!("job {job_id}") };
    match daemon.graph.claim(&name, Use { user, writes: true, resizes: true, shares_writes: false }) {
        Ok(claim) => claims.push(claim),
        Err(e) => {
            if is_own {
                // Made a moment ago, so nobody else uses it.
                let _ = daemon.graph.remove(&name);
            }
            return Err(block_error(e));
        }
    }
    if is_own {
        daemon.graph.set_owned(&name);
    }
    Ok(Some(node))
}

/// A signed number is refused by what it means and not by its type.
fn size(options: &Map<String, Value>) -> Result<u64, Error> {
    let size = options.get("size").unwrap_or(&Value::Null);
    size.as_u64().filter(|&size| i64::try_from(size).is_ok()).ok_or_else(|| out_of_range(size, "size"))
}

fn out_of_range(value: &Value, parameter: &str) -> Error {
    Error::generic(format!("Value '{value}' is out of range for parameter '{parameter}'"))
}

fn text<'a>(options: &'a Map<String, Value>, member: &str) -> Option<&'a str> {
    options.get(member).and_then(Value::as_str)
}
