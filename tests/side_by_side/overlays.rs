// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `blockdev-snapshot` alone and in transactions, refused and done.
#![allow(clippy::unwrap_used, unreachable_pub)]

use serde_json::{Value, json};

/// `@0` to `@3` are qcow2 images, `@3` a larger one; `@4` names `@0` as its backing file.
pub fn commands() -> Vec<String> {
    let run = |command: &str, arguments: Value| json!({ "execute": command, "arguments": arguments }).to_string();
    let query = |command: &str| json!({ "execute": command }).to_string();
    let add = |name: &str, disk: &str, more: Value| {
        let mut node = json!({ "driver": "qcow2", "node-name": name, "file": { "driver": "file", "node-name": format!("{name}-file"), "filename": disk } });
        node.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        run("blockdev-add", node)
    };
    let snapshot = |node: &str, overlay: &str| run("blockdev-snapshot", json!({ "node": node, "overlay": overlay }));
    let export = |id: &str, node: &str, writable: bool| {
        run("block-export-add", json!({ "type": "nbd", "id": id, "node-name": node, "name": id, "writable": writable }))
    };
    let action = |node: &str, overlay: &str| json!({ "type": "blockdev-snapshot", "data": { "node": node, "overlay": overlay } });
    let none = json!({ "backing": null });
    vec![
        query("qmp_capabilities"),
        add("base", "@0", json!({})),
        add("one", "@1", none.clone()),
        query("blockdev-snapshot"),
        run("blockdev-snapshot", json!({ "node": "base" })),
        run("blockdev-snapshot", json!({ "node": "base", "overlay": 1 })),
        run("blockdev-snapshot", json!({ "node": "base", "overlay": "one", "zz": 1 })),
        snapshot("none", "one"),
        snapshot("base", "none"),
        snapshot("base", "base"),
        run(
            "blockdev-add",
            json!({ "driver": "raw", "node-name": "window", "file": { "driver": "file", "filename": "@4" } }),
        ),
        snapshot("base", "window"),
        run("blockdev-del", json!({ "node-name": "window" })),
        "@start".into(),
        export("e", "base", true),
        add("ro", "@2", json!({ "backing": null, "read-only": true })),
        snapshot("base", "ro"),
        run("blockdev-del", json!({ "node-name": "ro" })),
        add("two", "@2", none.clone()),
        export("t", "two", true),
        snapshot("base", "two"),
        run("block-export-del", json!({ "id": "t" })),
        add("three", "@3", none.clone()),
        add("four", "@4", json!({ "backing": "three" })),
        snapshot("base", "four"),
        run("blockdev-del", json!({ "node-name": "four" })),
        run("transaction", json!({ "actions": [action("base", "one"), { "type": "abort", "data": {} }] })),
        query("query-block-exports"),
        query("query-named-block-nodes"),
        snapshot("base", "one"),
        query("query-block-exports"),
        query("query-named-block-nodes"),
        snapshot("base", "two"),
        export("b", "base", true),
        run("blockdev-del", json!({ "node-name": "base" })),
        run("transaction", json!({ "actions": [action("one", "two"), action("one", "three")] })),
        query("query-block-exports"),
        run("transaction", json!({ "actions": [action("one", "two"), action("two", "three")] })),
        query("query-block-exports"),
        query("query-named-block-nodes"),
        run("block-export-del", json!({ "id": "e" })),
        run("blockdev-del", json!({ "node-name": "one" })),
        run("blockdev-del", json!({ "node-name": "three" })),
        run("blockdev-del", json!({ "node-name": "two" })),
        run("blockdev-del", json!({ "node-name": "one" })),
        query("query-named-block-nodes"),
        run("blockdev-del", json!({ "node-name": "base" })),
    ]
}
