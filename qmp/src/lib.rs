// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QEMU's machine protocol (QMP) with descriptors: what QEMU 10.0.2 does on the wire, for servers and clients.
//!
//! A server holds a [`Connection`] per client, which turns bytes and descriptors into [`Message`]s; a [`Session`] per
//! client, which knows what the client has negotiated; and one [`Table`] for all, which lists every type, command and
//! event once and gives dispatch, `query-commands`, `query-qmp-schema` and the reference:
//!
//! ```text
//! connection.receive()?;                                  // when the descriptor is readable
//! while session.wants_input() && let Some(message) = connection.next_message() {
//!     let answers = session.dispatch(&table, &mut state, message);
//!     connection.send(&answers);
//! }
//! connection.flush()?;
//! ```
//!
//! A client holds a [`Client`]. [`keyval`] reads the same arguments from a command line.
//!
//! # Layout
//! Bytes in: [`lexer`](Parser) and [`Parser`] (pure), [`Connection`], [`Message`]. Meaning: [`schema`], [`Table`],
//! [`Session`], [`Call`], [`Error`]. Bytes out: [`output`], the event lines of [`Session`]. Beside them: [`NamedFds`],
//! [`keyval`], [`Client`].

mod call;
mod check;
mod client;
mod connection;
mod error;
mod introspect;
pub mod keyval;
mod lexer;
mod message;
mod named_fds;
mod order;
pub mod output;
mod parser;
mod reference;
pub mod schema;
mod session;
mod table;
mod utf8;

pub use call::Call;
pub use client::{Client, ClientError, ReceivedEvent};
pub use connection::{Connection, Received};
pub use error::{Error, ErrorClass};
pub use message::{Message, PendingFds, Receipt};
pub use named_fds::NamedFds;
pub use parser::Parser;
pub use schema::{Arguments, Command, Definition, Event, Kind, Member, Type};
pub use session::{Session, event_line};
pub use table::{Table, TableError, Version};
