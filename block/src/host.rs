// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where a file node's descriptors come from, and which of them it holds at the moment.

use std::os::fd::AsFd;

use crate::claims::Demand;
use crate::{BlockNode, Error, Result};

/// A descriptor in use; dropping it closes it.
pub type Descriptor = Box<dyn AsFd + Send + Sync>;

/// Gives a descriptor that can be written, or one that cannot, to the node of this name.
pub type Opener = Box<dyn Fn(bool, &str) -> Result<Descriptor> + Send + Sync>;

/// Told the name of the node whose connection is lost, from any thread; takes note and returns.
pub type Lost = std::sync::Arc<dyn Fn(&str) + Send + Sync>;

/// The host's side of a file node.
pub struct Host {
    open: Opener,
    /// Read-only until somebody writes (QAPI's `auto-read-only`).
    auto_read_only: bool,
    /// Whether the descriptor in use can be written.
    writable: bool,
    /// Whether image locks are taken.
    locking: bool,
    /// Whether flushes reach the disk.
    flushing: bool,
    lost: Option<Lost>,
    /// What stands for a directory, until the driver has it.
    files: Option<Vec<(String, Descriptor)>>,
}

impl Host {
    /// Descriptors come from `open`.
    pub fn new(open: Opener, auto_read_only: bool, locking: bool) -> Host {
        Host { open, auto_read_only, writable: false, locking, flushing: true, lost: None, files: None }
    }

    /// The same, but a flush does nothing: whoever has the file brings it to disk (QAPI's `cache.no-flush`).
    #[must_use]
    pub fn unflushed(self) -> Host {
        Host { flushing: false, ..self }
    }

    /// Whether flushes reach the disk.
    pub(crate) fn flushes(&self) -> bool {
        self.flushing
    }

    /// One descriptor, for tests and for inspection: it serves whatever is asked.
    pub fn fixed(descriptor: impl AsFd + Send + Sync + 'static) -> Host {
        let descriptor = std::sync::Arc::new(descriptor);
        Host::new(Box::new(move |_, _| Ok(Box::new(Shared(std::sync::Arc::clone(&descriptor))))), false, false)
    }

    /// A connected socket, and whom to ask for another when the connection is lost.
    pub fn socket(socket: impl AsFd + Send + Sync + 'static, lost: Lost) -> Host {
        let socket = std::sync::Mutex::new(Some(socket));
        let take = move |_: bool, _: &str| {
            let socket = socket.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
            socket.map(|socket| Box::new(socket) as Descriptor).ok_or_else(|| Error::invalid("the socket is in use"))
        };
        Host { lost: Some(lost), ..Host::new(Box::new(take), false, false) }
    }

    /// A directory: descriptors that can be read, with their paths.
    pub fn directory(files: Vec<(String, Descriptor)>) -> Host {
        let none = |_: bool, _: &str| Err(Error::invalid("a directory is not one descriptor"));
        Host { files: Some(files), ..Host::new(Box::new(none), false, false) }
    }

    pub(crate) fn is_directory(&self) -> bool {
        self.files.is_some()
    }

    /// The descriptors of a directory, once.
    pub(crate) fn files(&mut self) -> Vec<(String, Descriptor)> {
        self.files.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Whom to tell that the connection is lost.
    pub(crate) fn lost(&self) -> Option<Lost> {
        self.lost.clone()
    }

    /// The descriptor that the node called `name` starts with.
    pub(crate) fn first(&mut self, writable: bool, name: &str) -> Result<Descriptor> {
        self.writable = writable && !self.auto_read_only;
        (self.open)(self.writable, name)
    }

    /// Brings descriptor and locks in line with what the node's users do.
    pub(crate) fn settle(&mut self, node: &BlockNode, demand: Demand) -> Result<()> {
        if self.auto_read_only && node.writable() && self.writable != demand.writes {
            return self.change(node, demand.writes, demand);
        }
        self.lock(node, demand)
    }

    /// Follows a node that becomes writable or read-only.
    pub(crate) fn reopen(&mut self, node: &BlockNode, writable: bool, demand: Demand) -> Result<()> {
        if self.lost.is_some() || self.is_directory() {
            // A socket serves both ways, a directory only one, as its driver says.
            return Ok(());
        }
        let wanted = writable && (!self.auto_read_only || demand.writes);
        if wanted == self.writable { Ok(()) } else { self.change(node, wanted, demand) }
    }

    fn change(&mut self, node: &BlockNode, writable: bool, demand: Demand) -> Result<()> {
        let descriptor = (self.open)(writable, node.name())?;
        // Locks belong to the open file: they are given back on the old one before the new one is asked for them.
        self.lock(node, Demand::default())?;
        let before = node.driver().replace(descriptor)?;
        match self.lock(node, demand) {
            Ok(()) => {
                self.writable = writable;
                Ok(())
            }
            Err(e) => {
                node.driver().replace(before)?;
                self.lock(node, demand)?;
                Err(e)
            }
        }
    }

    fn lock(&self, node: &BlockNode, demand: Demand) -> Result<()> {
        if self.locking { node.driver().lock(demand).map_err(|e| Error::invalid(e.to_string())) } else { Ok(()) }
    }
}

/// A descriptor with several holders.
struct Shared<T>(std::sync::Arc<T>);

impl<T: AsFd> AsFd for Shared<T> {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}
