// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `info`: what an image says about itself.

use block::{BlockNode, Info, InfoValue};
use serde_json::{Map, Value, json};

use crate::disk::{Disk, Layer, Usage};
use crate::options::human;
use crate::tool::{Result, confine, say, say_json};

/// What is asked.
pub struct Request {
    /// The images, each with its name: one, or a chain with the top first. None is opened over another.
    pub layers: Vec<Layer>,
    /// Directory of each layer's image as its user wrote it, which its backing name is relative to.
    pub directories: Vec<String>,
    /// Answer for the whole chain.
    pub chain: bool,
    /// Answer in JSON.
    pub json: bool,
    /// Others may write at the same time.
    pub force_share: bool,
    /// Go on without a layer of confinement that cannot be had.
    pub best_effort: bool,
}

/// Tells; the exit status.
///
/// # Errors
/// An image cannot be opened.
pub fn run(request: Request) -> Result<u8> {
    confine(request.best_effort)?;
    let mut answers = Vec::new();
    let mut texts = Vec::new();
    for (layer, directory) in request.layers.into_iter().zip(request.directories) {
        let name = layer.image.name.clone();
        let disk = Disk::open(vec![layer], Usage { writable: false, force_share: request.force_share })?;
        let length = disk.file_len();
        let about = About { node: &disk.node, info: disk.node.info(), name: &name, length, directory: &directory };
        answers.push(about.json());
        texts.push(about.text());
    }
    if !request.json {
        say(&texts.join("\n"))?;
    } else if request.chain {
        say_json(&Value::Array(answers))?;
    } else {
        say_json(&answers.remove(0))?;
    }
    Ok(0)
}

struct About<'a> {
    node: &'a BlockNode,
    info: Info,
    name: &'a str,
    length: u64,
    directory: &'a str,
}

impl About<'_> {
    fn full_backing(&self) -> Option<String> {
        let name = self.info.backing_name.as_deref()?;
        let is_whole = name.starts_with('/') || name.split('/').next().is_some_and(|start| start.contains(':'));
        Some(if is_whole { name.to_owned() } else { format!("{}{name}", self.directory) })
    }

    fn specifics(&self) -> Map<String, Value> {
        let value = |value: &InfoValue| match value {
            InfoValue::Bool(value) => json!(value),
            InfoValue::Int(value) => json!(value),
            InfoValue::Str(value) => json!(value),
        };
        self.info.specifics.iter().map(|(name, fact)| ((*name).to_owned(), value(fact))).collect()
    }

    fn json(&self) -> Value {
        let file = json!({
            "children": [],
            "virtual-size": self.length,
            "filename": self.name,
            "format": "file",
            "actual-size": self.info.allocated_size.unwrap_or(0),
            "format-specific": { "type": "file", "data": {} },
            "dirty-flag": false,
        });
        let mut answer = Map::from_iter([
            ("children".to_owned(), json!([{ "name": "file", "info": file }])),
            ("virtual-size".into(), json!(self.node.len())),
            ("filename".into(), json!(self.name)),
            ("format".into(), json!(self.node.driver_name())),
            ("actual-size".into(), json!(self.info.allocated_size.unwrap_or(0))),
            ("dirty-flag".into(), json!(self.info.dirty)),
        ]);
        let mut put = |name: &str, value: Option<Value>| value.map(|value| answer.insert(name.to_owned(), value));
        put("cluster-size", self.info.cluster_size.map(|size| json!(size)));
        put("backing-filename", self.info.backing_name.as_ref().map(|name| json!(name)));
        put("backing-filename-format", self.info.backing_format.as_ref().map(|name| json!(name)));
        put("full-backing-filename", self.full_backing().map(|name| json!(name)));
        if self.node.driver_name() == "qcow2" {
            put("format-specific", Some(json!({ "type": "qcow2", "data": self.specifics() })));
        }
        Value::Object(answer)
    }

    /// Text from the image is escaped: it goes to a terminal.
    fn text(&self) -> String {
        let length = self.node.len();
        let taken = human(self.info.allocated_size.unwrap_or(0));
        let mut text = format!(
            "image: {}\nfile format: {}\nvirtual size: {} ({length} bytes)\ndisk size: {taken}\n",
            self.name,
            self.node.driver_name(),
            human(length)
        );
        if let Some(size) = self.info.cluster_size {
            text += &format!("cluster_size: {size}\n");
        }
        if self.info.dirty {
            text += "cleanly shut down: no\n";
        }
        if let (Some(name), Some(full)) = (&self.info.backing_name, self.full_backing()) {
            text += &format!("backing file: {}", name.escape_debug());
            text += &if *name == full { "\n".to_owned() } else { format!(" (actual path: {})\n", full.escape_debug()) };
        }
        if let Some(format) = &self.info.backing_format {
            text += &format!("backing file format: {}\n", format.escape_debug());
        }
        if !self.info.specifics.is_empty() {
            text += "Format specific information:\n";
            for (name, fact) in &self.info.specifics {
                let fact = match fact {
                    InfoValue::Bool(value) => value.to_string(),
                    InfoValue::Int(value) => value.to_string(),
                    InfoValue::Str(value) => value.escape_debug().to_string(),
                };
                text += &format!("    {}: {fact}\n", name.replace('-', " "));
            }
        }
        text + &format!(
            "Child node '/file':\n    filename: {}\n    protocol type: file\n    file length: {} ({} bytes)\n    disk size: {taken}\n",
            self.name,
            human(self.length),
            self.length
        )
    }
}
