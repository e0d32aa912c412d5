// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A client that may say anything, and a server to say it to.
#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use block::{BlockNode, Driver, Graph, Host, NodeAccess, NodeSpec};
use export::Workers;
use export::nbd::proto::{self, cmd_flag, opt, rep};
use export::nbd::{Export, Limits, Server, Settings};

/// A server with one export, on a socket in a directory of its own.
pub struct Fixture {
    pub server: Server,
    pub export: Arc<Export>,
    pub changed: Receiver<()>,
    pub file: File,
    dir: tempfile::TempDir,
}

impl Fixture {
    /// Exports a raw file of `size` bytes that holds [`pattern`].
    pub fn raw(size: u64, writable: bool) -> Fixture {
        Fixture::with_limits(size, writable, Limits::default())
    }

    pub fn with_limits(size: u64, writable: bool, limits: Limits) -> Fixture {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&pattern(0, size as usize)).unwrap();
        let mut graph = Graph::new();
        let node = graph
            .add(NodeSpec {
                name: Some("disk".into()),
                driver: "file",
                access: NodeAccess { writable, unmap: true },
                host: Some(Host::fixed(file.try_clone().unwrap())),
                filename: "/dev/fdset/0".into(),
                children: [].into(),
                detached: [].into(),
                options: [].into(),
            })
            .unwrap();
        Fixture::over(node, writable, limits, file)
    }

    /// The node that is exported.
    pub fn node(&self) -> Arc<BlockNode> {
        self.export.node()
    }

    /// Exports a driver of the test's own.
    pub fn driver(driver: Box<dyn Driver>) -> Fixture {
        let access = NodeAccess { writable: true, unmap: true };
        let node = Arc::new(BlockNode::new("disk", "test", "", access, driver));
        Fixture::over(node, true, Limits::default(), tempfile::tempfile().unwrap())
    }

    fn over(node: Arc<BlockNode>, writable: bool, limits: Limits, file: File) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("nbd")).unwrap();
        let (sender, changed) = channel();
        let notify = move || _ = sender.send(());
        let server = Server::start(listener.into(), limits, None, Workers::new(), notify).unwrap();
        let description = Some("a disk".to_owned());
        let export = server.add(Settings { description, writable, ..Settings::new("disk", node) }).unwrap();
        Fixture { server, export, changed, file, dir }
    }

    /// A fresh connection; the greeting is not read yet.
    pub fn connect(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("nbd")).unwrap()
    }

    /// A client that has chosen the export with simple replies.
    pub fn client(&self) -> Client {
        Client::negotiate(self.connect(), None)
    }

    /// A client with structured replies and block status.
    pub fn structured_client(&self) -> Client {
        Client::negotiate(self.connect(), Some(opt::STRUCTURED_REPLY))
    }

    /// A client with extended headers and block status.
    pub fn extended_client(&self) -> Client {
        Client::negotiate(self.connect(), Some(opt::EXTENDED_HEADERS))
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.dir.path().join("nbd").display())
    }
}

/// Bytes whose value follows from their offset.
pub fn pattern(offset: u64, len: usize) -> Vec<u8> {
    (offset..offset + len as u64).map(|at| (at / 512 + at % 251) as u8).collect()
}

pub struct Client {
    pub socket: UnixStream,
    pub size: u64,
    pub flags: u16,
    pub extended: bool,
}

/// A reply: the cookie, the error number, and the bytes of its data chunk if there is one.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    pub cookie: u64,
    pub error: u32,
    pub data: Vec<u8>,
}

impl Client {
    /// Chooses the export, after the option that asks for more than simple replies if there is one.
    pub fn negotiate(mut socket: UnixStream, style: Option<u32>) -> Client {
        greet(&mut socket);
        if let Some(style) = style {
            assert_eq!(option(&mut socket, style, &[]), [(rep::ACK, vec![])]);
            assert_eq!(
                option(&mut socket, opt::SET_META_CONTEXT, &context_query("disk", &["base:allocation"])).len(),
                2
            );
        }
        Client::go(socket, style == Some(opt::EXTENDED_HEADERS))
    }

    /// Chooses the export.
    pub fn go(mut socket: UnixStream, extended: bool) -> Client {
        let go = [string("disk"), vec![0, 0]].concat();
        let replies = option(&mut socket, opt::GO, &go);
        let export = replies.iter().find(|(kind, data)| *kind == rep::INFO && data[..2] == [0, 0]).unwrap();
        let size = u64::from_be_bytes(proto::field(&export.1, 2));
        let flags = u16::from_be_bytes(proto::field(&export.1, 10));
        Client { socket, size, flags, extended }
    }

    pub fn send(&mut self, flags: u16, command: u16, cookie: u64, offset: u64, len: u32, payload: &[u8]) {
        let header = match (self.extended, command) {
            (false, _) => request(flags, command, cookie, offset, len),
            (true, WRITE) => extended_request(flags | cmd_flag::PAYLOAD_LEN, command, cookie, offset, len.into()),
            (true, _) => extended_request(flags, command, cookie, offset, len.into()),
        };
        self.socket.write_all(&[&header[..], payload].concat()).unwrap();
    }

    pub fn reply(&mut self, read_len: usize) -> Reply {
        let mut magic = [0; 4];
        self.socket.read_exact(&mut magic).unwrap();
        match u32::from_be_bytes(magic) {
            proto::SIMPLE_REPLY_MAGIC => {
                let rest: [u8; 12] = self.take();
                let error = u32::from_be_bytes(proto::field(&rest, 0));
                let mut data = vec![0; if error == 0 { read_len } else { 0 }];
                self.socket.read_exact(&mut data).unwrap();
                Reply { cookie: u64::from_be_bytes(proto::field(&rest, 4)), error, data }
            }
            proto::STRUCTURED_REPLY_MAGIC => {
                let rest: [u8; 16] = self.take();
                let kind = u16::from_be_bytes(proto::field(&rest, 2));
                let mut data = vec![0; u32::from_be_bytes(proto::field(&rest, 12)) as usize];
                self.socket.read_exact(&mut data).unwrap();
                let cookie = u64::from_be_bytes(proto::field(&rest, 4));
                let error = if kind & 0x8000 == 0 { 0 } else { u32::from_be_bytes(proto::field(&data, 0)) };
                Reply { cookie, error, data }
            }
            proto::EXTENDED_REPLY_MAGIC => {
                let rest: [u8; 28] = self.take();
                let kind = u16::from_be_bytes(proto::field(&rest, 2));
                let mut data = vec![0; u64::from_be_bytes(proto::field(&rest, 20)) as usize];
                self.socket.read_exact(&mut data).unwrap();
                let cookie = u64::from_be_bytes(proto::field(&rest, 4));
                let error = if kind & 0x8000 == 0 { 0 } else { u32::from_be_bytes(proto::field(&data, 0)) };
                Reply { cookie, error, data }
            }
            other => panic!("no reply magic: {other:#x}"),
        }
    }

    /// One request and its reply.
    pub fn call(&mut self, flags: u16, command: u16, offset: u64, len: u32, payload: &[u8]) -> Reply {
        self.send(flags, command, 77, offset, len, payload);
        let reply = self.reply(if command == READ { len as usize } else { 0 });
        assert_eq!(reply.cookie, 77);
        reply
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.socket.read_exact(&mut bytes).unwrap();
        bytes
    }
}

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISCONNECT: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const CACHE: u16 = 5;
pub const ZEROES: u16 = 6;
pub const STATUS: u16 = 7;

pub fn request(flags: u16, command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    [
        &proto::REQUEST_MAGIC.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &command.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &len.to_be_bytes(),
    ]
    .concat()
}

pub fn extended_request(flags: u16, command: u16, cookie: u64, offset: u64, len: u64) -> Vec<u8> {
    [
        &proto::EXTENDED_REQUEST_MAGIC.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &command.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &len.to_be_bytes(),
    ]
    .concat()
}

/// The payload of the metadata context options.
pub fn context_query(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut payload = [string(export), (queries.len() as u32).to_be_bytes().to_vec()].concat();
    payload.extend(queries.iter().flat_map(|query| string(query)));
    payload
}

/// Reads the greeting and answers it.
pub fn greet(socket: &mut UnixStream) {
    let mut greeting = [0; 18];
    socket.read_exact(&mut greeting).unwrap();
    assert_eq!(greeting[..8], *b"NBDMAGIC");
    socket.write_all(&3u32.to_be_bytes()).unwrap();
}

pub fn option_header(option: u32, len: u32) -> Vec<u8> {
    [&proto::OPTION_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &len.to_be_bytes()].concat()
}

/// Sends an option; returns its replies up to the last.
pub fn option(socket: &mut UnixStream, option: u32, payload: &[u8]) -> Vec<(u32, Vec<u8>)> {
    socket.write_all(&[&option_header(option, payload.len() as u32)[..], payload].concat()).unwrap();
    option_replies(socket)
}

pub fn option_replies(socket: &mut UnixStream) -> Vec<(u32, Vec<u8>)> {
    let mut replies = Vec::new();
    loop {
        let mut header = [0; 20];
        socket.read_exact(&mut header).unwrap();
        let kind = u32::from_be_bytes(proto::field(&header, 12));
        let mut data = vec![0; u32::from_be_bytes(proto::field(&header, 16)) as usize];
        socket.read_exact(&mut data).unwrap();
        replies.push((kind, data));
        if kind == rep::ACK || kind & 0x8000_0000 != 0 {
            return replies;
        }
    }
}

pub fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

/// True once the server has hung up.
pub fn is_closed(socket: &mut UnixStream) -> bool {
    matches!(socket.read(&mut [0; 1]), Ok(0) | Err(_))
}
