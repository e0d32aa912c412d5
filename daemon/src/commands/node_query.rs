// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `query-named-block-nodes`.

use block::{BlockNode, InfoValue};
use qmp::{Call, Command, Definition, Error, Member, Type};
use serde_json::{Map, Value, json};

use super::bitmap;
use crate::state::Daemon;

pub fn types() -> Vec<Definition> {
    vec![
        Definition::structure(
            "ImageInfo",
            [
                Member::required("filename", Type::Str, "What the image's file was called when it was added."),
                Member::required("format", Type::Str, "The driver."),
                Member::optional("dirty-flag", Type::Bool, "Whether the image was not closed properly."),
                Member::optional("actual-size", Type::Int, "Bytes that it takes on the host."),
                Member::required("virtual-size", Type::Int, "Bytes that a guest sees."),
                Member::optional("cluster-size", Type::Int, "Bytes in a cluster."),
                Member::optional(
                    "backing-filename",
                    Type::Str,
                    "The backing file's name in the image; never followed.",
                ),
                Member::optional("backing-filename-format", Type::Str, "The backing file's format in the image."),
                Member::optional("format-specific", Type::Any, "What only this format has: `type` and `data`."),
            ],
            "An image.",
        ),
        Definition::structure(
            "BlockdevCacheInfo",
            [
                Member::required("writeback", Type::Bool, "Whether writes may stay in the host's cache."),
                Member::required("direct", Type::Bool, "Whether the host's cache is bypassed."),
                Member::required("no-flush", Type::Bool, "Whether flushes are ignored."),
            ],
            "How the host caches.",
        ),
        Definition::structure(
            "BlockdevChild",
            [
                Member::required("child", Type::Str, "The edge: `file`, `backing`, `data-file`."),
                Member::required("node-name", Type::Str, "The node at its end."),
            ],
            "A node below a node.",
        ),
        Definition::structure(
            "BlockDeviceInfo",
            [
                Member::required("file", Type::Str, "What the image's file was called when it was added."),
                Member::optional("node-name", Type::Str, "The node."),
                Member::required("ro", Type::Bool, "Whether it is read-only."),
                Member::required("drv", Type::Str, "The driver."),
                Member::required("backing_file_depth", Type::Int, "Number of layers below it."),
                Member::optional("children", Type::Array(&Type::Named("BlockdevChild")), "The nodes below it."),
                Member::required("active", Type::Bool, "Always true."),
                Member::required("encrypted", Type::Bool, "Whether the image is encrypted."),
                Member::required("detect_zeroes", Type::Named("BlockdevDetectZeroesOptions"), "Always `off`."),
                Member::required("bps", Type::Int, "Always 0: no throttling."),
                Member::required("bps_rd", Type::Int, "Always 0."),
                Member::required("bps_wr", Type::Int, "Always 0."),
                Member::required("iops", Type::Int, "Always 0."),
                Member::required("iops_rd", Type::Int, "Always 0."),
                Member::required("iops_wr", Type::Int, "Always 0."),
                Member::required("write_threshold", Type::Int, "Always 0."),
                Member::optional("dirty-bitmaps", Type::Array(&Type::Named("BlockDirtyInfo")), "Its dirty bitmaps."),
                Member::required("image", Type::Named("ImageInfo"), "The image."),
                Member::required("cache", Type::Named("BlockdevCacheInfo"), "How the host caches."),
            ],
            "A node.",
        ),
    ]
}

pub fn commands() -> Vec<Command<Daemon>> {
    vec![
        Command::new(
            "query-named-block-nodes",
            "Lists the nodes, the newest first.",
            [Member::optional(
                "flat",
                Type::Bool,
                "Accepted: backing images are nodes of their own and never nested here.",
            )],
            query,
        )
        .returning(Type::Array(&Type::Named("BlockDeviceInfo"))),
    ]
}

fn query(daemon: &mut Daemon, _: Call<'_>) -> Result<Value, Error> {
    Ok(daemon.graph.nodes().into_iter().map(|node| describe(daemon, node)).collect())
}

fn describe(daemon: &Daemon, node: &BlockNode) -> Value {
    let mut shown = shown(daemon, node);
    if let Some(bitmaps) = bitmap::describe(node) {
        shown["dirty-bitmaps"] = bitmaps;
    }
    shown
}

fn shown(daemon: &Daemon, node: &BlockNode) -> Value {
    let edges = daemon.graph.edges(node.name());
    let children: Vec<Value> = edges.map(|edge| json!({ "child": edge.name, "node-name": edge.child })).collect();
    json!({
        "node-name": node.name(),
        "drv": node.driver_name(),
        "file": node.filename(),
        "ro": !node.writable(),
        "active": true,
        "encrypted": node.info().encrypted,
        "detect_zeroes": "off",
        "backing_file_depth": daemon.graph.backing_depth(node.name()),
        "bps": 0, "bps_rd": 0, "bps_wr": 0,
        "iops": 0, "iops_rd": 0, "iops_wr": 0,
        "write_threshold": 0,
        "cache": { "writeback": true, "direct": node.bypasses_cache(), "no-flush": false },
        "children": children,
        "image": image(node),
    })
}

fn image(node: &BlockNode) -> Value {
    let info = node.info();
    let mut image = Map::from_iter([
        ("filename".to_owned(), json!(node.filename())),
        ("format".into(), json!(node.driver_name())),
        ("virtual-size".into(), json!(node.len())),
        ("dirty-flag".into(), json!(info.dirty)),
    ]);
    let mut optional = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            image.insert(name.into(), value);
        }
    };
    optional("actual-size", info.allocated_size.map(Value::from));
    optional("cluster-size", info.cluster_size.map(Value::from));
    optional("backing-filename", info.backing_name.map(Value::from));
    optional("backing-filename-format", info.backing_format.map(Value::from));
    if node.driver_name() != "raw" {
        let data: Map<String, Value> =
            info.specifics.into_iter().map(|(name, value)| (name.to_owned(), specific(value))).collect();
        optional("format-specific", Some(json!({ "type": node.driver_name(), "data": data })));
    }
    Value::Object(image)
}

fn specific(value: InfoValue) -> Value {
    match value {
        InfoValue::Bool(value) => value.into(),
        InfoValue::Int(value) => value.into(),
        InfoValue::Str(value) => value.into(),
        InfoValue::List(values) => values.into_iter().map(specific).collect(),
        InfoValue::Map(members) => {
            members.into_iter().map(|(name, value)| (name.to_owned(), specific(value))).collect::<Map<_, _>>().into()
        }
    }
}
