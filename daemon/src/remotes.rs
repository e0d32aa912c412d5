// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sockets to servers that nodes use: which there are, and which of them are lost.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use block::Lost;

use crate::wake::Wake;

/// The books, shared with the sockets and with those who lose connections.
pub struct Remotes {
    books: Arc<Mutex<Books>>,
    wake: Arc<Wake>,
}

#[derive(Default)]
struct Books {
    /// Number of every socket, and the node that uses it.
    sockets: BTreeMap<i32, String>,
    /// Nodes whose connection was lost since the last look.
    lost: Vec<String>,
}

impl Remotes {
    /// No sockets. `wake` is told when a connection is lost.
    pub fn new(wake: Arc<Wake>) -> Remotes {
        Remotes { books: Arc::default(), wake }
    }

    /// Enters a socket that `node` will use.
    pub fn book(&self, socket: OwnedFd, node: &str) -> Booked {
        let books = Arc::clone(&self.books);
        books.lock().unwrap_or_else(PoisonError::into_inner).sockets.insert(socket.as_raw_fd(), node.to_owned());
        Booked { socket, books }
    }

    /// Whom a node tells that its connection is lost.
    pub fn lost(&self) -> Lost {
        let (books, wake) = (Arc::clone(&self.books), Arc::clone(&self.wake));
        Arc::new(move |node| {
            books.lock().unwrap_or_else(PoisonError::into_inner).lost.push(node.to_owned());
            wake.up();
        })
    }

    /// Nodes whose connection was lost since the last call.
    pub fn take_lost(&self) -> Vec<String> {
        std::mem::take(&mut self.books.lock().unwrap_or_else(PoisonError::into_inner).lost)
    }

    /// Number of every socket, and what it is.
    pub fn descriptors(&self) -> Vec<(i32, String)> {
        let books = self.books.lock().unwrap_or_else(PoisonError::into_inner);
        books.sockets.iter().map(|(&fd, node)| (fd, format!("the server of node '{node}'"))).collect()
    }
}

/// A socket in the books, which leaves them when it is closed.
pub struct Booked {
    socket: OwnedFd,
    books: Arc<Mutex<Books>>,
}

impl AsFd for Booked {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Booked {
    fn drop(&mut self) {
        // Before the number is free for another.
        self.books.lock().unwrap_or_else(PoisonError::into_inner).sockets.remove(&self.socket.as_raw_fd());
    }
}
