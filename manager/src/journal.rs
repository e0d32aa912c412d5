// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a daemon was passed and told, so that another can be brought to the same state.
//!
//! A step is a command with the descriptors that rode on it, which the journal keeps open: the successor gets the very same
//! open files, with their locks, and the very same listening sockets, in whose queues clients wait meanwhile. Names that
//! commands refer to (nodes, fd sets, exports) are given by the manager, never chosen by the daemon, so that steps mean the
//! same the next time.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde_json::{Value, json};

use crate::opening::{Opened, Rights};
use crate::{Error, Result};

/// A descriptor that was passed and is kept.
#[derive(Debug)]
pub struct Carried {
    descriptor: OwnedFd,
    image: Option<Image>,
}

/// What an image was when it was passed.
#[derive(Debug)]
pub(crate) struct Image {
    pub path: PathBuf,
    /// Device and inode.
    pub identity: (u64, u64),
    /// Bytes of the file.
    pub size: AtomicU64,
    pub rights: Rights,
}

impl Carried {
    /// A listening socket, a device, a certificate: nothing that could change behind the descriptor.
    pub fn other(descriptor: OwnedFd) -> Arc<Carried> {
        Arc::new(Carried { descriptor, image: None })
    }

    /// An image, by another number for the same open file.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn image(opened: &Opened) -> Result<Arc<Carried>> {
        let failed = |source| Error::Open { path: opened.path.clone(), purpose: " once more", source };
        let descriptor: OwnedFd = opened.file.try_clone().map_err(failed)?.into();
        let size = size(&descriptor).map_err(failed)?;
        let (path, identity, rights) = (opened.path.clone(), opened.identity, opened.rights);
        Ok(Carried::known(descriptor, Image { path, identity, size: size.into(), rights }))
    }

    /// An image of which it was written down what it is.
    pub(crate) fn known(descriptor: OwnedFd, image: Image) -> Arc<Carried> {
        Arc::new(Carried { descriptor, image: Some(image) })
    }

    /// What it was, if it is an image.
    pub(crate) fn as_image(&self) -> Option<&Image> {
        self.image.as_ref()
    }

    /// Takes the size that an image has now for the one that it should have: it was changed on purpose.
    pub fn resized(&self) {
        if let (Some(image), Ok(size)) = (&self.image, size(&self.descriptor)) {
            image.size.store(size, Relaxed);
        }
    }

    /// Refuses an image that is not what it was: another file, or shorter; or longer although it is only read.
    fn check(&self) -> Result<()> {
        let Some(Image { path, identity, size: before, rights }) = &self.image else { return Ok(()) };
        let failed = |source| Error::Open { path: path.clone(), purpose: " once more", source };
        let now = crate::opening::identity(&self.descriptor).map_err(failed)?;
        if now != *identity {
            return Err(Error::Image { path: path.clone(), text: "is not the file that was passed".into() });
        }
        let now = size(&self.descriptor).map_err(failed)?;
        let before = before.load(Relaxed);
        // A writable image may have grown with what was written.
        if now < before || (now > before && *rights == Rights::ReadOnly) {
            let text = format!("has {now} bytes, and had {before} when it was passed: somebody else changes it");
            return Err(Error::Image { path: path.clone(), text });
        }
        Ok(())
    }
}

impl AsFd for Carried {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Bytes of a file; 0 for a block device, whose size its driver watches.
fn size(descriptor: &OwnedFd) -> std::io::Result<u64> {
    Ok(u64::try_from(rustix::fs::fstat(descriptor)?.st_size).unwrap_or(0))
}

/// A command that was carried out.
#[derive(Clone, Debug)]
pub struct Step {
    /// What it is a part of: taken back together.
    pub part: String,
    /// The command.
    pub command: String,
    /// Its arguments, an object.
    pub arguments: Value,
    /// Arguments that a successor is given besides, an object or null.
    pub again: Value,
    /// What rode on it.
    pub carried: Vec<Arc<Carried>>,
}

impl Step {
    /// The arguments for a successor.
    fn repeated(&self) -> Value {
        let mut arguments = self.arguments.clone();
        if let (Some(arguments), Some(again)) = (arguments.as_object_mut(), self.again.as_object()) {
            arguments.extend(again.clone());
        }
        arguments
    }

    /// Whether it can be done before what another daemon has is free.
    fn is_early(&self) -> bool {
        self.command == "add-fd"
    }

    /// The command that takes it back, if it takes one.
    fn undone(&self) -> Option<(&'static str, Value)> {
        let named = |key: &str| self.arguments.get(key).cloned().unwrap_or_default();
        match self.command.as_str() {
            "add-fd" => Some(("remove-fd", json!({ "fdset-id": named("fdset-id") }))),
            "blockdev-add" => Some(("blockdev-del", json!({ "node-name": named("node-name") }))),
            "block-export-add" => Some(("block-export-del", json!({ "id": named("id"), "mode": "hard" }))),
            _ => None,
        }
    }
}

/// Everything that was done to bring a daemon to its state, in order.
#[derive(Clone, Default)]
pub struct Journal {
    steps: Vec<Step>,
    /// The next fd set's id: none is used twice, whatever was taken back.
    next_set: i64,
}

impl Journal {
    /// An fd set's id that was never used.
    pub fn next_set(&mut self) -> i64 {
        self.next_set += 1;
        self.next_set - 1
    }

    /// Notes a step.
    pub fn note(&mut self, step: Step) {
        self.steps.push(step);
    }

    /// Takes back every step of a part; its descriptors are closed unless another part has them.
    pub fn forget(&mut self, part: &str) {
        self.steps.retain(|step| step.part != part);
    }

    /// The commands that take a part back, in order.
    pub fn undoing(&self, part: &str) -> Vec<(&'static str, Value)> {
        self.steps.iter().rev().filter(|step| step.part == part).filter_map(Step::undone).collect()
    }

    /// The commands that take everything back, in order.
    pub fn all_undoing(&self) -> Vec<(&'static str, Value)> {
        self.steps.iter().rev().filter_map(Step::undone).collect()
    }

    /// Goes on from what was written down.
    pub(crate) fn resume(steps: Vec<Step>, next_set: i64) -> Journal {
        Journal { steps, next_set }
    }

    /// The id that [`next_set`](Journal::next_set) gives next.
    pub(crate) fn sets(&self) -> i64 {
        self.next_set
    }

    /// The steps.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Looks at every image that was passed.
    ///
    /// # Errors
    /// One is not what it was.
    pub fn check(&self) -> Result<()> {
        self.steps.iter().flat_map(|step| &step.carried).try_for_each(|carried| carried.check())
    }

    /// Brings what was written to images to disk, so that whoever closes them soon has little left to write.
    pub fn sync(&self) {
        let carried = self.steps.iter().flat_map(|step| &step.carried);
        for carried in carried.filter(|carried| carried.image.as_ref().is_some_and(|of| of.rights == Rights::ReadWrite))
        {
            // What fails here fails where it matters.
            let _ = rustix::fs::fdatasync(&carried.descriptor);
        }
    }

    /// Gives every step to `execute`, with the arguments for a successor.
    ///
    /// # Errors
    /// The first that it returns.
    pub fn replay(&self, execute: impl FnMut(&str, Value, &[BorrowedFd<'_>]) -> Result<Value>) -> Result<()> {
        replay(self.steps.iter(), execute)
    }

    /// The same for those steps alone that bring descriptors into sets, which disturb nobody who still uses them.
    ///
    /// # Errors
    /// The first that `execute` returns.
    pub(crate) fn replay_early(
        &self,
        execute: impl FnMut(&str, Value, &[BorrowedFd<'_>]) -> Result<Value>,
    ) -> Result<()> {
        replay(self.steps.iter().filter(|step| step.is_early()), execute)
    }

    /// The same for all others.
    ///
    /// # Errors
    /// The first that `execute` returns.
    pub(crate) fn replay_late(
        &self,
        execute: impl FnMut(&str, Value, &[BorrowedFd<'_>]) -> Result<Value>,
    ) -> Result<()> {
        replay(self.steps.iter().filter(|step| !step.is_early()), execute)
    }
}

fn replay<'a>(
    steps: impl Iterator<Item = &'a Step>,
    mut execute: impl FnMut(&str, Value, &[BorrowedFd<'_>]) -> Result<Value>,
) -> Result<()> {
    for step in steps {
        let fds: Vec<BorrowedFd<'_>> = step.carried.iter().map(|carried| carried.as_fd()).collect();
        execute(&step.command, step.repeated(), &fds)?;
    }
    Ok(())
}

impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let steps = self.steps.iter().map(|step| (&step.part, &step.command, step.carried.len()));
        f.debug_list().entries(steps).finish()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::opening::open_named;

    fn step(part: &str, command: &str, carried: Vec<Arc<Carried>>) -> Step {
        let (part, command) = (part.to_owned(), command.to_owned());
        Step { part, command, arguments: json!({ "a": 1 }), again: json!({ "resumed": true }), carried }
    }

    #[test]
    fn an_image_that_was_cut_short_is_refused_and_one_that_grew_only_if_it_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        std::fs::write(&path, [1; 1024]).unwrap();
        let journal = |rights| {
            let mut journal = Journal::default();
            let image = Carried::image(&open_named(&path, rights).unwrap()).unwrap();
            journal.note(step("disk", "add-fd", vec![image]));
            journal
        };
        let (read, written) = (journal(Rights::ReadOnly), journal(Rights::ReadWrite));
        read.check().unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(2048).unwrap();
        written.check().unwrap();
        assert!(read.check().unwrap_err().to_string().contains("2048 bytes, and had 1024"));
        file.set_len(1023).unwrap();
        assert!(written.check().unwrap_err().to_string().contains("somebody else changes it"));
    }

    #[test]
    fn a_successor_hears_what_was_not_taken_back_in_order() {
        let mut journal = Journal::default();
        for (part, command) in [("a", "one"), ("b", "two"), ("a", "three"), ("b", "four")] {
            journal.note(step(part, command, Vec::new()));
        }
        journal.forget("a");
        let mut heard = Vec::new();
        let hear = |command: &str, arguments: Value, _: &[BorrowedFd<'_>]| {
            heard.push((command.to_owned(), arguments));
            Ok(Value::Null)
        };
        journal.replay(hear).unwrap();
        let arguments = json!({ "a": 1, "resumed": true });
        assert_eq!(heard, [("two".to_owned(), arguments.clone()), ("four".to_owned(), arguments)]);
    }
}
