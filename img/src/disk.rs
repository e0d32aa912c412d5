// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images that were opened before, as nodes.

use std::fs::File;
use std::sync::Arc;

use block::{
    BlockNode, Claim, Facts, Graph, Host, NodeAccess, NodeSpec, OptionKind, OptionValue, Options, Result, Secret, Use,
    User,
};

/// An opened file and what its user calls it.
pub struct Named {
    /// The file.
    pub file: File,
    /// Its name in messages and answers.
    pub name: String,
}

/// An image of a chain.
pub struct Layer {
    /// The image.
    pub image: Named,
    /// The name of its driver.
    pub format: String,
    /// Where its data is, if not in itself.
    pub data_file: Option<Named>,
    /// Its extents that are files of their own, in order.
    pub extents: Vec<Named>,
    /// Its passphrase, if it is encrypted.
    pub secret: Option<Secret>,
}

/// How an image is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// The top of the chain is written.
    pub writable: bool,
    /// Others may write it at the same time: no image locks are taken.
    pub force_share: bool,
    /// Nothing is brought to disk: whoever has the files does that.
    pub unflushed: bool,
}

/// A chain of images as nodes; the top can be read and, perhaps, written.
pub struct Disk {
    graph: Graph,
    claim: Option<Claim>,
    /// The top.
    pub node: Arc<BlockNode>,
}

impl Disk {
    /// Opens a chain, the top first. Parses it: the process is confined by then.
    ///
    /// # Errors
    /// A layer is broken, or another program uses it in a way that excludes this use.
    pub fn open(layers: Vec<Layer>, usage: Usage) -> Result<Disk> {
        let mut graph = Graph::new();
        let mut below: Option<Arc<BlockNode>> = None;
        for (index, layer) in layers.into_iter().enumerate().rev() {
            let usage = Usage { writable: usage.writable && index == 0, ..usage };
            let format = layer.format.clone();
            let options = unlocking(&format, layer.secret.as_ref())?;
            let mut children = add_files(&mut graph, layer, usage)?;
            if let Some(below) = &below {
                children.push(("backing", below.name().to_owned()));
            }
            below = Some(graph.add(NodeSpec {
                name: None,
                driver: driver(&format)?,
                access: access(usage),
                host: None,
                filename: String::new(),
                children: children.into_iter().collect(),
                detached: ["backing"].into(),
                options,
            })?);
        }
        let node = below.ok_or_else(|| block::Error::invalid("there is no image"))?;
        let mut disk = Disk { graph, claim: None, node };
        disk.claim_top(usage)?;
        Ok(disk)
    }

    /// What an image says about itself, and the bytes of its file. Neither a key nor what is below it is needed.
    ///
    /// # Errors
    /// It is broken, or another program uses it in a way that excludes reading it.
    pub fn facts(layer: Layer, usage: Usage) -> Result<(Facts, u64)> {
        let mut graph = Graph::new();
        let format = layer.format.clone();
        let files = add_files(&mut graph, layer, usage)?;
        let mut children = block::Children::new();
        let mut claims = Vec::new();
        for (edge, name) in &files {
            children.insert(edge, Arc::clone(graph.get(name)?));
            let shared = usage.force_share;
            let user = User::Export { id: "img".into() };
            claims.push(graph.claim(name, Use { user, writes: false, resizes: false, shares_writes: shared })?);
        }
        let len = children.get("file").map_or(0, |file| file.len());
        let facts = block::facts(&format, children);
        claims.into_iter().for_each(|claim| graph.release(claim));
        Ok((facts?, len))
    }

    /// Opens the file of an image alone, whatever its format.
    ///
    /// # Errors
    /// Another program uses it in a way that excludes this use.
    pub fn file(named: Named, usage: Usage) -> Result<Disk> {
        let mut graph = Graph::new();
        let node = add_file(&mut graph, named, usage)?;
        let mut disk = Disk { graph, claim: None, node };
        disk.claim_top(usage)?;
        Ok(disk)
    }

    fn claim_top(&mut self, usage: Usage) -> Result<()> {
        let user = User::Export { id: "img".into() };
        let name = self.node.name().to_owned();
        let usage = Use {
            user,
            writes: usage.writable,
            resizes: usage.writable,
            shares_writes: usage.force_share && !usage.writable,
        };
        self.claim = Some(self.graph.claim(&name, usage)?);
        Ok(())
    }

    /// Bytes of the top's file.
    pub fn file_len(&self) -> u64 {
        let file = self.graph.edges(self.node.name()).find(|edge| edge.name == "file");
        let file = file.and_then(|edge| self.graph.get(&edge.child).ok());
        file.map_or(0, |file| file.len())
    }

    /// Brings everything to disk and closes the image.
    ///
    /// # Errors
    /// Those of the host.
    pub fn close(mut self) -> Result<()> {
        let flushed = self.node.flush().map_err(|e| block::Error::io("write the image", e));
        if let Some(claim) = self.claim.take() {
            self.graph.release(claim);
        }
        let name = self.node.name().to_owned();
        flushed.and_then(|()| self.graph.remove(&name))
    }
}

/// Adds the files that an image is in; the edges by which it finds them.
fn add_files(graph: &mut Graph, layer: Layer, usage: Usage) -> Result<Vec<(&'static str, String)>> {
    let file = add_file(graph, layer.image, usage)?;
    let mut children = vec![("file", file.name().to_owned())];
    if let Some(data_file) = layer.data_file {
        children.push(("data-file", add_file(graph, data_file, usage)?.name().to_owned()));
    }
    let list = driver_entry(&layer.format)?.children.iter().find(|child| child.is_list());
    let edges = list.map_or(&[][..], block::ChildSpec::edges);
    if layer.extents.len() > edges.len() {
        return Err(block::Error::unsupported(format!(
            "a {} image has at most {} extents in files of their own",
            layer.format,
            edges.len()
        )));
    }
    for (&edge, extent) in edges.iter().zip(layer.extents) {
        children.push((edge, add_file(graph, extent, usage)?.name().to_owned()));
    }
    Ok(children)
}

/// The options that let the format's driver read what is encrypted.
fn unlocking(format: &str, secret: Option<&Secret>) -> Result<Options> {
    let Some(secret) = secret else { return Ok(Options::new()) };
    let taken = |kind| matches!(kind, OptionKind::Secret | OptionKind::LuksSecret);
    let option = block::driver_named(format).and_then(|entry| entry.options.iter().find(|option| taken(option.kind)));
    let option = option.ok_or_else(|| block::Error::invalid(format!("images of format '{format}' take no secret")))?;
    Ok([(option.name, OptionValue::Secret(secret.clone()))].into())
}

fn access(usage: Usage) -> NodeAccess {
    NodeAccess { writable: usage.writable, unmap: true }
}

fn driver(format: &str) -> Result<&'static str> {
    driver_entry(format).map(|entry| entry.name)
}

fn driver_entry(format: &str) -> Result<&'static block::DriverEntry> {
    let entry = block::driver_named(format).filter(|entry| entry.is_format());
    entry.ok_or_else(|| block::Error::invalid(format!("Unknown driver '{}'", format.escape_debug())))
}

fn add_file(graph: &mut Graph, named: Named, usage: Usage) -> Result<Arc<BlockNode>> {
    let driver = block::host_driver(&named.file).map_err(|e| block::Error::io("look at the image", e))?;
    let file = Arc::new(named.file);
    let open = move |_: bool, _: &str| -> Result<block::Descriptor> {
        let file = file.try_clone().map_err(|e| block::Error::io("use the image", e))?;
        Ok(Box::new(file))
    };
    let host = Host::new(Box::new(open), false, !usage.force_share);
    graph.add(NodeSpec {
        name: None,
        driver,
        access: access(usage),
        host: Some(if usage.unflushed { host.unflushed() } else { host }),
        filename: named.name,
        children: [].into(),
        detached: [].into(),
        options: [].into(),
    })
}

/// The format of the image in a file: what its user says, or what it looks like.
///
/// # Errors
/// There is no such format, or it cannot be read.
pub fn format_of(file: &Arc<BlockNode>, said: Option<&str>) -> Result<String> {
    match said {
        Some(format) => driver(format).map(str::to_owned),
        None => Ok(block::inspect(file, None)?.format.to_owned()),
    }
}
