// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `bitmap`: dirty bitmaps that an image keeps, changed by one action after the other.

use std::sync::Arc;

use block::BlockNode;
use block::bitmap::Bitmap;

use confine::Requirement;

use crate::disk::{Disk, Layer, Usage};
use crate::tool::{Error, Result, confine};

/// Granularity without a wish: the image's clusters, within these bounds.
const GRANULARITIES: (u64, u64) = (4096, 65536);

/// What is to be done to a bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Make it; with a granularity in bytes.
    Add(Option<u64>),
    /// Take it out of the image.
    Remove,
    /// Take every mark away.
    Clear,
    /// Let it track writes.
    Enable,
    /// Let it track them no longer.
    Disable,
    /// Give it the marks of the bitmap called so.
    Merge(String),
}

/// What is asked.
pub struct Request {
    /// The image, writable.
    pub layer: Layer,
    /// The image whose bitmaps are merged, if it is another.
    pub source: Option<Layer>,
    /// The bitmap.
    pub name: String,
    /// In order. When one fails, those before it are done all the same.
    pub actions: Vec<Action>,
    /// Which layers of confinement must be had.
    pub confinement: Requirement,
}

/// Does it; the exit status.
///
/// # Errors
/// An image cannot be opened, or an action cannot be done, in QEMU's words.
pub fn run(request: Request) -> Result<u8> {
    let Request { layer, source, name, actions, confinement } = request;
    confine(confinement)?;
    let disk = Disk::open(vec![layer], Usage { writable: true, force_share: false, unflushed: false })?;
    let source = source.map(|source| Disk::open(vec![source], Usage::default())).transpose()?;
    let from = source.as_ref().map_or(&disk.node, |source| &source.node);
    let done = actions.iter().try_for_each(|action| {
        let (doing, done) = match action {
            Action::Add(granularity) => ("add", add(&disk.node, &name, *granularity)),
            Action::Remove => ("remove", remove(&disk.node, &name)),
            Action::Clear => ("clear", sound(&disk.node, &name).map(|bitmap| bitmap.clear())),
            Action::Enable => ("enable", enable(&disk.node, &name, true)),
            Action::Disable => ("disable", enable(&disk.node, &name, false)),
            Action::Merge(other) => ("merge", merge(&disk.node, &name, from, other)),
        };
        done.map_err(|why| Error::Text(format!("Operation {doing} on bitmap {name} failed: {why}")))
    });
    disk.close()?;
    done.map(|()| 0)
}

type Done<T> = std::result::Result<T, String>;

/// Makes a bitmap that is kept in the image and tracks writes.
///
/// # Errors
/// There is one of that name, or the image cannot keep it: QEMU's words.
pub fn add(node: &BlockNode, name: &str, granularity: Option<u64>) -> Done<()> {
    if name.is_empty() {
        return Err("Bitmap name cannot be empty".into());
    }
    let granularity = match granularity {
        Some(bytes) if !bytes.is_power_of_two() || !(512..=1 << 31).contains(&bytes) => {
            return Err("Granularity must be power of 2 and at least 512".into());
        }
        Some(bytes) => bytes,
        None => node.info().cluster_size.map_or(GRANULARITIES.1, |size| size.clamp(GRANULARITIES.0, GRANULARITIES.1)),
    };
    if node.bitmaps().get(name).is_some() {
        return Err(format!("Bitmap already exists: {name}"));
    }
    node.check_new_bitmap(name, granularity.ilog2()).map_err(|e| e.to_string())?;
    let bitmap = Bitmap::new(name, granularity.ilog2(), node.len());
    let bitmap = bitmap.ok_or_else(|| format!("a disk of {} bytes needs a coarser granularity", node.len()))?;
    bitmap.set_persistent(true);
    node.bitmaps().add(Arc::new(bitmap));
    Ok(())
}

fn remove(node: &BlockNode, name: &str) -> Done<()> {
    find(node, name)?;
    node.remove_stored_bitmap(name).map_err(|e| e.to_string())?;
    node.bitmaps().remove(name);
    Ok(())
}

/// Lets a bitmap track writes, or not.
///
/// # Errors
/// There is none of that name, or its content is lost: QEMU's words.
pub fn enable(node: &BlockNode, name: &str, enabled: bool) -> Done<()> {
    sound(node, name).map(|bitmap| node.bitmaps().set_enabled(&bitmap, enabled))
}

/// Gives a bitmap of `node` the marks of one of `from`.
///
/// # Errors
/// There are no such bitmaps, their content is lost, or they are of disks of different sizes: QEMU's words.
pub fn merge(node: &BlockNode, name: &str, from: &BlockNode, other: &str) -> Done<()> {
    let target = find(node, name)?;
    let source = sound(from, other)?;
    let target = if target.is_inconsistent() { sound(node, name)? } else { target };
    if source.len() != target.len() {
        return Err(format!(
            "Bitmaps are of different sizes (destination size is {}, source size is {}) and can't be merged",
            target.len(),
            source.len()
        ));
    }
    target.merge(&source);
    Ok(())
}

fn find(node: &BlockNode, name: &str) -> Done<Arc<Bitmap>> {
    node.bitmaps().get(name).ok_or_else(|| format!("Dirty bitmap '{name}' not found"))
}

fn sound(node: &BlockNode, name: &str) -> Done<Arc<Bitmap>> {
    let bitmap = find(node, name)?;
    if bitmap.is_inconsistent() {
        return Err(format!("Bitmap '{name}' is inconsistent and cannot be used; it can be removed (--remove)"));
    }
    Ok(bitmap)
}
