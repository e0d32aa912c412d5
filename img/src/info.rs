// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `info`: what an image says about itself.

use block::{Facts, InfoValue, Snapshot};
use serde_json::{Map, Value, json};

use confine::Requirement;

use crate::disk::{Disk, Layer, Usage};
use crate::options::human;
use crate::snapshot;
use crate::tool::{Result, confine, printable, say, say_json};

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
    /// Which layers of confinement must be had.
    pub confinement: Requirement,
}

/// Tells; the exit status.
///
/// # Errors
/// An image cannot be opened.
pub fn run(request: Request) -> Result<u8> {
    confine(request.confinement)?;
    let mut answers = Vec::new();
    let mut texts = Vec::new();
    for (layer, directory) in request.layers.into_iter().zip(request.directories) {
        let name = layer.image.name.clone();
        let usage = Usage { writable: false, force_share: request.force_share, unflushed: false };
        let format = layer.format.clone();
        // No key is asked for: what is told stands outside of what is encrypted.
        let (facts, length) = Disk::facts(layer, usage)?;
        let about = About { facts, format: &format, name: &name, length, directory: &directory };
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
    facts: Facts,
    format: &'a str,
    name: &'a str,
    length: u64,
    directory: &'a str,
}

impl About<'_> {
    fn full_backing(&self) -> Option<String> {
        let name = self.facts.info.backing_name.as_deref()?;
        let is_whole = name.starts_with('/') || name.split('/').next().is_some_and(|start| start.contains(':'));
        Some(if is_whole { name.to_owned() } else { format!("{}{name}", self.directory) })
    }

    /// Facts that QEMU has for the format, too.
    fn specifics(&self) -> &[(&'static str, InfoValue)] {
        if ["luks", "qcow2", "vmdk"].contains(&self.format) { &self.facts.info.specifics } else { &[] }
    }

    fn json(&self) -> Value {
        let file = json!({
            "children": [],
            "virtual-size": self.length,
            "filename": self.name,
            "format": "file",
            "actual-size": self.facts.info.allocated_size.unwrap_or(0),
            "format-specific": { "type": "file", "data": {} },
            "dirty-flag": false,
        });
        let mut answer = Map::from_iter([
            ("children".to_owned(), json!([{ "name": "file", "info": file }])),
            ("virtual-size".into(), json!(self.facts.len)),
            ("filename".into(), json!(self.name)),
            ("format".into(), json!(self.format)),
            ("actual-size".into(), json!(self.facts.info.allocated_size.unwrap_or(0))),
            ("dirty-flag".into(), json!(self.facts.info.dirty)),
        ]);
        let mut put = |name: &str, value: Option<Value>| value.map(|value| answer.insert(name.to_owned(), value));
        put("cluster-size", self.facts.info.cluster_size.map(|size| json!(size)));
        put("backing-filename", self.facts.info.backing_name.as_ref().map(|name| json!(name)));
        put("backing-filename-format", self.facts.info.backing_format.as_ref().map(|name| json!(name)));
        put("full-backing-filename", self.full_backing().map(|name| json!(name)));
        let snapshots: Vec<Value> = self.facts.snapshots.iter().map(snapshot_json).collect();
        put("snapshots", (!snapshots.is_empty()).then(|| snapshots.into()));
        put("encrypted", self.facts.info.encrypted.then_some(Value::Bool(true)));
        let specifics = self.specifics();
        let data = || specifics.iter().map(|(name, fact)| ((*name).to_owned(), value(fact))).collect::<Map<_, _>>();
        put("format-specific", (!specifics.is_empty()).then(|| json!({ "type": self.format, "data": data() })));
        Value::Object(answer)
    }

    /// Text from the image is escaped: it goes to a terminal.
    fn text(&self) -> String {
        let length = self.facts.len;
        let taken = human(self.facts.info.allocated_size.unwrap_or(0));
        let mut text = format!(
            "image: {}\nfile format: {}\nvirtual size: {} ({length} bytes)\ndisk size: {taken}\n",
            self.name,
            self.format,
            human(length)
        );
        if self.facts.info.encrypted {
            text += "encrypted: yes\n";
        }
        if let Some(size) = self.facts.info.cluster_size {
            text += &format!("cluster_size: {size}\n");
        }
        if self.facts.info.dirty {
            text += "cleanly shut down: no\n";
        }
        if let (Some(name), Some(full)) = (&self.facts.info.backing_name, self.full_backing()) {
            text += &format!("backing file: {}", printable(name));
            text += &if *name == full { "\n".to_owned() } else { format!(" (actual path: {})\n", printable(&full)) };
        }
        if let Some(format) = &self.facts.info.backing_format {
            text += &format!("backing file format: {}\n", printable(format));
        }
        text += &snapshot::table(&self.facts.snapshots);
        if !self.specifics().is_empty() {
            text += "Format specific information:\n";
            for (name, fact) in self.specifics() {
                lines(&mut text, 1, &name.replace('-', " "), fact);
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

fn value(fact: &InfoValue) -> Value {
    match fact {
        InfoValue::Bool(value) => json!(value),
        InfoValue::Int(value) => json!(value),
        InfoValue::Str(value) => json!(value),
        InfoValue::List(values) => values.iter().map(value).collect(),
        InfoValue::Map(members) => {
            members.iter().map(|(name, fact)| ((*name).to_owned(), value(fact))).collect::<Map<_, _>>().into()
        }
    }
}

/// A fact as people read it, `level` steps to the right.
fn lines(text: &mut String, level: usize, name: &str, fact: &InfoValue) {
    let shown = match fact {
        InfoValue::Bool(value) => format!(" {value}"),
        InfoValue::Int(value) => format!(" {value}"),
        InfoValue::Str(value) => format!(" {}", printable(value)),
        InfoValue::List(_) | InfoValue::Map(_) => String::new(),
    };
    *text += &format!("{}{name}:{shown}\n", " ".repeat(4 * level));
    match fact {
        InfoValue::List(values) => {
            for (index, value) in values.iter().enumerate() {
                lines(text, level + 1, &format!("[{index}]"), value);
            }
        }
        InfoValue::Map(members) => {
            for (name, member) in members {
                lines(text, level + 1, &name.replace('-', " "), member);
            }
        }
        _ => {}
    }
}

fn snapshot_json(snapshot: &Snapshot) -> Value {
    let mut shown = json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date.0,
        "date-nsec": snapshot.date.1,
        "vm-clock-sec": snapshot.vm_clock / 1_000_000_000,
        "vm-clock-nsec": snapshot.vm_clock % 1_000_000_000,
    });
    if let Some(icount) = snapshot.icount {
        shown["icount"] = json!(icount);
    }
    shown
}
