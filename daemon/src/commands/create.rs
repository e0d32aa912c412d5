// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `blockdev-create`: an image made in a passed file or in nodes, as a job.

use std::sync::Arc;

use block::{
    BlockNode, Claim, CreateRequest, NewExtent, OptionKind, OptionValue, Preallocation, Use, User, preallocation_named,
};
use fdset::Access;
use qmp::{Call, Command, Definition, Error, Member, Type};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::blockdev::{Inherited, add_node};
use super::{block_error, words};
use crate::state::Daemon;

/// A format of which images are made in nodes.
struct Format {
    driver: &'static str,
    /// QAPI's name of its options, and what they are of.
    structure: (&'static str, &'static str),
    /// Its options besides `file` and `size`: QAPI's name, type and meaning.
    options: &'static [(&'static str, Type, &'static str)],
}

/// The formats, one entry each. A member stands for the option of the format ([`block::FORMATS`]) that has its name, but for `-`
/// and `_`; those that do not are nodes, or listed in [`option_name`].
const FORMATS: &[Format] = &[
    Format {
        driver: "luks",
        structure: ("BlockdevCreateOptionsLUKS", "A LUKS volume."),
        options: &[
            LUKS[0],
            LUKS[1],
            LUKS[2],
            LUKS[3],
            LUKS[4],
            LUKS[5],
            LUKS[6],
            ("preallocation", Type::Named("PreallocMode"), "Default `off`."),
        ],
    },
    Format {
        driver: "qcow2",
        structure: ("BlockdevCreateOptionsQcow2", "A qcow2 image."),
        options: &[
            ("data-file", Type::Named("BlockdevRef"), "Where its data goes, if not there."),
            ("data-file-raw", Type::Bool, "The data file stays valid as a raw image."),
            ("extended-l2", Type::Bool, "Clusters have subclusters."),
            ("version", Type::Named("BlockdevQcow2Version"), "Default `v3`."),
            ("backing-file", Type::Str, "File name of a base image, as text."),
            ("backing-fmt", Type::Named("BlockdevDriver"), "The base image's format."),
            ("encrypt", Type::Named("QCryptoBlockCreateOptions"), "How it is encrypted; by default not."),
            ("cluster-size", Type::Size, "Bytes in a cluster, default 64 KiB."),
            ("preallocation", Type::Named("PreallocMode"), "Default `off`."),
            ("lazy-refcounts", Type::Bool, "Refcount updates may be postponed."),
            ("refcount-bits", Type::Int, "Width of a reference count, default 16."),
            ("compression-type", Type::Named("Qcow2CompressionType"), "Default `zlib`."),
        ],
    },
    Format {
        driver: "vdi",
        structure: ("BlockdevCreateOptionsVdi", "A VDI image."),
        options: &[(
            "preallocation",
            Type::Named("PreallocMode"),
            "`off`, the default, or `metadata`: a static image.",
        )],
    },
    Format {
        driver: "vmdk",
        structure: ("BlockdevCreateOptionsVmdk", "A VMDK image."),
        options: &[
            ("extents", Type::Array(&Type::Named("BlockdevRef")), "Where the extents go that have files of their own."),
            ("subformat", Type::Named("BlockdevVmdkSubformat"), "Default `monolithicSparse`."),
            ("adapter-type", Type::Named("BlockdevVmdkAdapterType"), "Default `ide`."),
            ("hwversion", Type::Str, "Virtual hardware version, default 4."),
            ("toolsversion", Type::Str, "Version of the guest's tools."),
            ("zeroed-grain", Type::Bool, "Grains can be zeroes without being stored."),
        ],
    },
    Format {
        driver: "vpc",
        structure: ("BlockdevCreateOptionsVpc", "A VHD image."),
        options: &[
            ("subformat", Type::Named("BlockdevVpcSubformat"), "Default `dynamic`."),
            ("force-size", Type::Bool, "Exactly the size given; else it is rounded up to what a geometry can say."),
        ],
    },
];

/// How something is encrypted with LUKS.
const LUKS: [(&str, Type, &str); 7] = [
    ("key-secret", Type::Str, "The id of a `secret` object that holds the passphrase; required."),
    ("cipher-alg", Type::Named("QCryptoCipherAlgo"), "Default `aes-256`."),
    ("cipher-mode", Type::Named("QCryptoCipherMode"), "Default `xts`."),
    ("ivgen-alg", Type::Named("QCryptoIVGenAlgo"), "Default `plain64`."),
    ("ivgen-hash-alg", Type::Named("QCryptoHashAlgo"), "Only for `essiv`: `sha256`."),
    ("hash-alg", Type::Named("QCryptoHashAlgo"), "Default `sha256`."),
    ("iter-time", Type::Int, "Milliseconds that one try of a passphrase is to take here, default 2000."),
];

pub fn types() -> Vec<Definition> {
    let drivers: Vec<&str> = std::iter::once("file").chain(FORMATS.iter().map(|format| format.driver)).collect();
    let variants = FORMATS.iter().map(|format| (format.driver, Type::Named(format.structure.0)));
    let variants: Vec<_> =
        std::iter::once(("file", Type::Named("BlockdevCreateOptionsFile"))).chain(variants).collect();
    let mut types = vec![
        words(
            "PreallocMode",
            &["off", "metadata", "falloc", "full"],
            "How room for an image is set aside when it is made.",
        ),
        words("BlockdevCreateDriver", &drivers, "Drivers that can make images."),
        words("BlockdevQcow2Version", &["v2", "v3"], "Compatibility levels 0.10 and 1.1."),
        words("Qcow2CompressionType", &["zlib", "zstd"], "How clusters are compressed."),
        words("QCryptoBlockFormat", &["luks"], "How an image can be encrypted."),
        words("QCryptoCipherAlgo", &["aes-128", "aes-192", "aes-256"], "Ciphers."),
        words("QCryptoCipherMode", &["cbc", "xts"], "How blocks of a sector depend on each other."),
        words("QCryptoHashAlgo", &["sha1", "sha256", "sha512"], "Hashes."),
        words("QCryptoIVGenAlgo", &["plain", "plain64", "essiv"], "How initialisation vectors are made."),
        words("BlockdevVpcSubformat", &["dynamic", "fixed"], "Kinds of VHD images."),
        words(
            "BlockdevVmdkSubformat",
            &["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized"],
            "Kinds of VMDK images.",
        ),
        words("BlockdevVmdkAdapterType", &["ide", "buslogic", "lsilogic", "legacyESX"], "What a VMDK is attached to."),
        Definition::union(
            "QCryptoBlockCreateOptions",
            [Member::required("format", Type::Named("QCryptoBlockFormat"), "How.")],
            "format",
            [("luks", Type::Named("QCryptoBlockCreateOptionsLUKS"))],
            "How an image to be made is encrypted.",
        ),
        Definition::structure("QCryptoBlockCreateOptionsLUKS", optional(&LUKS), "With LUKS, version 1."),
        Definition::union(
            "BlockdevCreateOptions",
            [Member::required("driver", Type::Named("BlockdevCreateDriver"), "The driver.")],
            "driver",
            variants,
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
    ];
    types.extend(FORMATS.iter().map(|Format { structure: (name, doc), options, .. }| {
        let mut members = vec![
            Member::required("file", Type::Named("BlockdevRef"), "Where: what is there is lost."),
            Member::required("size", Type::Size, "Bytes of the disk, a multiple of 512."),
        ];
        members.extend(optional(options));
        Definition::structure(name, members, doc)
    }));
    types
}

fn optional(options: &[(&'static str, Type, &'static str)]) -> Vec<Member> {
    options.iter().map(|(name, ty, doc)| Member::optional(name, *ty, doc)).collect()
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
        Some("file") | None => create_file(daemon, job_id, &options)?,
        Some(driver) => {
            let format = FORMATS.iter().find(|format| format.driver == driver);
            let format = format.ok_or_else(|| Error::generic("Parameter 'driver' is missing"))?;
            create_in_node(daemon, job_id, format.driver, options)?;
        }
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

fn create_in_node(
    daemon: &mut Daemon,
    job_id: String,
    format: &'static str,
    mut options: Map<String, Value>,
) -> Result<(), Error> {
    daemon.jobs.check_id(&job_id)?;
    let size = size(&options)?;
    let mut claims = Vec::new();
    let mut node = |daemon: &mut Daemon, reference| claimed(daemon, reference, &job_id, &mut claims);
    let extents = match options.remove("extents") {
        Some(Value::Array(extents)) => extents,
        _ => Vec::new(),
    };
    let (file, data_file) = (options.remove("file"), options.remove("data-file"));
    let request = || -> Result<CreateRequest, Error> {
        let mut checked = checked_options(daemon, format, options)?;
        let file = node(daemon, file)?.ok_or_else(|| Error::generic("Parameter 'file' is missing"))?;
        let data_file = node(daemon, data_file)?;
        if let Some(data_file) = &data_file {
            checked.insert("data_file", OptionValue::Str(data_file.filename().to_owned()));
        }
        let mut made = Vec::new();
        for extent in extents {
            let extent = node(daemon, Some(extent))?.map(|node| NewExtent { name: node.filename().to_owned(), node });
            made.extend(extent);
        }
        Ok(CreateRequest { file, data_file, extents: made, parent_cid: None, size, options: checked })
    };
    let request = request().map_err(|e| e.to_string());
    daemon.jobs.start(job_id, "create", claims, move || block::create(format, &request?).map_err(|e| e.to_string()))
}

/// The options as the format has them.
fn checked_options(daemon: &Daemon, format: &str, options: Map<String, Value>) -> Result<block::Options, Error> {
    let known = block::format_named(format).map_or(&[][..], |format| format.create_options);
    let mut flat: Vec<(String, Value)> = Vec::new();
    for (member, value) in options {
        match value {
            Value::Object(below) => {
                flat.extend(below.into_iter().map(|(name, value)| (format!("{member}.{name}"), value)));
            }
            value => flat.push((option_name(&member).to_owned(), value)),
        }
    }
    let mut checked = block::Options::new();
    for (member, value) in flat {
        let Some(spec) = known.iter().find(|spec| spec.name.replace('_', "-") == member) else { continue };
        let value = match (spec.kind, value) {
            (OptionKind::Secret, Value::String(id)) => OptionValue::Secret(daemon.objects.secret(&id)?),
            (_, Value::String(text)) => OptionValue::Str(text),
            (_, Value::Bool(is_on)) => OptionValue::Bool(is_on),
            (_, number) => OptionValue::Size(number.as_u64().ok_or_else(|| out_of_range(&number, &member))?),
        };
        checked.insert(spec.name, value);
    }
    Ok(checked)
}

/// What a format calls an option that QAPI calls otherwise.
fn option_name(member: &str) -> &str {
    if member == "version" { "compat" } else { member }
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
    let node = node.map_err(|_| Error::generic(format!("Cannot find device='{name}' nor node-name='{name}'")))?;
    let usage = Use { user: User::Job { id: job_id.to_owned() }, writes: true, resizes: true, shares_writes: false };
    match daemon.graph.claim_alone(&name, usage) {
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
