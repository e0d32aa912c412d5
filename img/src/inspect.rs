// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The confined inspector: standard input is an image, standard output gets one JSON object about it.

use std::io::{self, Write};

use block::{Graph, Host, NodeAccess, NodeSpec};
use confine::{Plan, Requirement, Role};
use serde_json::{Map, Value, json};

/// Why there is no answer. What is wrong with an image is an answer.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// Standard input is nothing to read from.
    #[error("could not take standard input: {0}")]
    Input(#[source] io::Error),
    /// A layer of confinement is missing.
    #[error(transparent)]
    Confine(#[from] confine::Error),
    /// Standard output is closed.
    #[error("could not answer: {0}")]
    Output(#[source] io::Error),
}

/// Takes standard input, confines the process, looks at the image, and answers. `format` keeps it from guessing.
///
/// # Errors
/// Those of [`InspectError`].
pub fn run(format: Option<&str>, confinement: Requirement) -> Result<(), InspectError> {
    let image = sys::fd::standard_input().map_err(InspectError::Input)?;
    let plan = Plan::new(Role::Inspector);
    sys::fd::close_inherited().map_err(InspectError::Input)?;
    confine::confine(&plan.requiring(confinement))?;
    let answer = inspect(image, format).unwrap_or_else(|e| json!({ "error": e.to_string() }));
    io::stdout().write_all(format!("{answer}\n").as_bytes()).map_err(InspectError::Output)
}

fn inspect(image: std::os::fd::OwnedFd, format: Option<&str>) -> block::Result<Value> {
    let mut graph = Graph::new();
    let driver = block::host_driver(&image).map_err(|e| block::Error::io("look at the image", e))?;
    let file = graph.add(NodeSpec {
        name: None,
        driver,
        access: NodeAccess::default(),
        host: Some(Host::fixed(image)),
        filename: "the image".into(),
        children: [].into(),
        detached: [].into(),
        options: [].into(),
    })?;
    let found = block::inspect(&file, format)?;
    let mut answer = Map::from_iter([
        ("format".to_owned(), json!(found.format)),
        ("virtual-size".into(), json!(found.virtual_size)),
        ("writable".into(), json!(found.writable)),
    ]);
    for (name, value) in
        [("backing", found.backing_name), ("backing-format", found.backing_format), ("data-file", found.data_file_name)]
    {
        if let Some(value) = value {
            answer.insert(name.into(), json!(value));
        }
    }
    if !found.extents.is_empty() {
        answer.insert("extents".into(), json!(found.extents));
    }
    if let Some(cid) = found.cid {
        answer.insert("cid".into(), json!(cid));
    }
    Ok(Value::Object(answer))
}
