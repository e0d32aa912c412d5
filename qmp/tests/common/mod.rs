// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A small server over a socket pair: two commands that take descriptors, one that takes none, and a part of the options
//! of `blockdev-add`.

#![allow(dead_code, clippy::unwrap_used, clippy::print_stdout)]

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::LazyLock;

use qmp::{
    Arguments, Call, Command, Connection, Definition, Error, Event, Member, NamedFds, Parser, Received, Session, Table,
    Type, Version,
};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, socketpair,
};
use serde_json::{Value, json};

/// What the commands work on.
#[derive(Default)]
pub struct State {
    /// Descriptors that `add-fd` took, in order.
    pub taken: Vec<OwnedFd>,
    /// Those that `getfd` named.
    pub named: NamedFds,
}

/// Which file a descriptor is for: its inode's number.
pub fn inode(fd: impl AsFd) -> u64 {
    rustix::fs::fstat(fd).unwrap().st_ino
}

/// A file of its own.
pub fn file() -> OwnedFd {
    rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap()
}

fn add_fd(state: &mut State, mut call: Call<'_>) -> Result<Value, Error> {
    let fd = call.claim_fd()?;
    if call.arguments().get("fdset-id").and_then(Value::as_i64).is_some_and(|id| id < 0) {
        return Err(Error::invalid_value("fdset-id", "a non-negative value"));
    }
    let answer = json!({ "inode": inode(&fd) });
    state.taken.push(fd);
    Ok(answer)
}

fn getfd(state: &mut State, mut call: Call<'_>) -> Result<Value, Error> {
    let fd = call.claim_fd()?;
    let name = call.arguments()["fdname"].as_str().unwrap_or_default().to_owned();
    state.named.add(&name, fd)?;
    Ok(Value::Null)
}

fn closefd(state: &mut State, call: Call<'_>) -> Result<Value, Error> {
    state.named.remove(call.arguments()["fdname"].as_str().unwrap_or_default())?;
    Ok(Value::Null)
}

fn nothing(_: &mut State, _: Call<'_>) -> Result<Value, Error> {
    Ok(Value::Null)
}

fn echo(_: &mut State, call: Call<'_>) -> Result<Value, Error> {
    Ok(Value::Object(call.into_arguments()))
}

/// The table, built once.
pub static TABLE: LazyLock<Table<State>> = LazyLock::new(|| table().unwrap());

fn table() -> Result<Table<State>, qmp::TableError> {
    let version = Version { qemu: (10, 0, 2), package: "test".to_owned() };
    let mut urgent = Command::new("urgent", "Overtakes.", Arguments::NONE, nothing);
    urgent.oob = true;
    Table::new(version, types(), commands(urgent), vec![Event::new("TEST", [Member::required("n", Type::Int, "")], "")])
}

fn commands(urgent: Command<State>) -> Vec<Command<State>> {
    let fdname = Member::required("fdname", Type::Str, "");
    vec![
        Command::new(
            "add-fd",
            "Takes a descriptor.",
            [Member::optional("fdset-id", Type::Int, ""), Member::optional("opaque", Type::Str, "")],
            add_fd,
        ),
        Command::new(
            "remove-fd",
            "Takes none.",
            [Member::required("fdset-id", Type::Int, ""), Member::optional("fd", Type::Int, "")],
            nothing,
        ),
        Command::new("getfd", "Names a descriptor.", [fdname], getfd),
        Command::new("closefd", "Closes it.", [fdname], closefd),
        Command::new("echo", "Answers what it is told.", [Member::optional("value", Type::Any, "")], echo)
            .returning(Type::Any),
        urgent,
        Command::new("blockdev-add", "Checks options.", Arguments::Of("BlockdevOptions"), nothing),
        Command::new(
            "blockdev-reopen",
            "Checks lists.",
            [Member::required("options", Type::Array(&Type::Named("BlockdevOptions")), "")],
            nothing,
        ),
        Command::new(
            "nbd-server-start",
            "Checks small numbers.",
            [
                Member::required("addr", Type::Named("SocketAddressLegacy"), ""),
                Member::optional("tls-creds", Type::Str, ""),
                Member::optional("tls-authz", Type::Str, ""),
                Member::optional("max-connections", Type::Uint32, ""),
            ],
            nothing,
        ),
        Command::new("block-export-add", "Checks alternates in lists.", Arguments::Of("BlockExportOptions"), nothing),
    ]
}

/// The part of QEMU's types that the tests use, members in QEMU's order.
fn types() -> Vec<Definition> {
    let reference = Type::Named("BlockdevRef");
    let file = Member::required("file", reference, "");
    vec![
        Definition::enumeration("BlockdevDriver", ["file", "null-co", "qcow2", "raw"], ""),
        Definition::enumeration("Discard", ["ignore", "unmap"], ""),
        Definition::enumeration("OverlapMode", ["none", "constant", "cached", "all"], ""),
        Definition::structure("OverlapFlags", [Member::optional("template", Type::Named("OverlapMode"), "")], ""),
        Definition::alternate("Qcow2OverlapChecks", [Type::Named("OverlapFlags"), Type::Named("OverlapMode")], ""),
        Definition::structure(
            "BlockdevCacheOptions",
            [Member::optional("direct", Type::Bool, ""), Member::optional("no-flush", Type::Bool, "")],
            "",
        ),
        Definition::union(
            "BlockdevOptions",
            [
                Member::required("driver", Type::Named("BlockdevDriver"), ""),
                Member::optional("node-name", Type::Str, ""),
                Member::optional("discard", Type::Named("Discard"), ""),
                Member::optional("cache", Type::Named("BlockdevCacheOptions"), ""),
                Member::optional("read-only", Type::Bool, ""),
            ],
            "driver",
            [
                ("file", Type::Named("BlockdevOptionsFile")),
                ("null-co", Type::Named("BlockdevOptionsNull")),
                ("qcow2", Type::Named("BlockdevOptionsQcow2")),
                ("raw", Type::Named("BlockdevOptionsRaw")),
            ],
            "",
        ),
        Definition::structure("BlockdevOptionsFile", [Member::required("filename", Type::Str, "")], "")
            .feature("dynamic-auto-read-only"),
        Definition::structure(
            "BlockdevOptionsNull",
            [
                Member::optional("size", Type::Int, ""),
                Member::optional("latency-ns", Type::Uint64, ""),
                Member::optional("read-zeroes", Type::Bool, ""),
            ],
            "",
        ),
        Definition::structure(
            "BlockdevOptionsQcow2",
            [
                file,
                Member::optional("backing", Type::Named("BlockdevRefOrNull"), ""),
                Member::optional("overlap-check", Type::Named("Qcow2OverlapChecks"), ""),
            ],
            "",
        ),
        Definition::structure(
            "BlockdevOptionsRaw",
            [file, Member::optional("offset", Type::Int, ""), Member::optional("size", Type::Int, "")],
            "",
        ),
        Definition::alternate("BlockdevRef", [Type::Named("BlockdevOptions"), Type::Str], ""),
        Definition::alternate("BlockdevRefOrNull", [Type::Named("BlockdevOptions"), Type::Str, Type::Null], ""),
        Definition::enumeration("SocketAddressType", ["inet", "unix"], ""),
        Definition::structure("UnixSocketAddress", [Member::required("path", Type::Str, "")], ""),
        Definition::structure(
            "InetSocketAddress",
            [
                Member::required("host", Type::Str, ""),
                Member::required("port", Type::Str, ""),
                Member::optional("to", Type::Uint16, ""),
            ],
            "",
        ),
        Definition::structure("UnixWrapper", [Member::required("data", Type::Named("UnixSocketAddress"), "")], ""),
        Definition::structure("InetWrapper", [Member::required("data", Type::Named("InetSocketAddress"), "")], ""),
        Definition::union(
            "SocketAddressLegacy",
            [Member::required("type", Type::Named("SocketAddressType"), "")],
            "type",
            [("inet", Type::Named("InetWrapper")), ("unix", Type::Named("UnixWrapper"))],
            "",
        ),
        Definition::enumeration("BlockExportType", ["nbd"], ""),
        Definition::structure(
            "BlockDirtyBitmap",
            [Member::required("node", Type::Str, ""), Member::required("name", Type::Str, "")],
            "",
        ),
        Definition::alternate("BlockDirtyBitmapOrStr", [Type::Str, Type::Named("BlockDirtyBitmap")], ""),
        Definition::structure(
            "BlockExportOptionsNbd",
            [
                Member::optional("name", Type::Str, ""),
                Member::optional("bitmaps", Type::Array(&Type::Named("BlockDirtyBitmapOrStr")), ""),
            ],
            "",
        ),
        Definition::union(
            "BlockExportOptions",
            [
                Member::required("type", Type::Named("BlockExportType"), ""),
                Member::required("id", Type::Str, ""),
                Member::required("node-name", Type::Str, ""),
            ],
            "type",
            [("nbd", Type::Named("BlockExportOptionsNbd"))],
            "",
        ),
    ]
}

/// A server and its client's end of the socket.
pub struct Served {
    pub client: OwnedFd,
    pub connection: Connection,
    pub session: Session,
    pub state: State,
}

impl Served {
    /// A client that has just connected.
    pub fn new() -> Served {
        let (client, server) = pair();
        let connection = Connection::new(server).unwrap();
        Served { client, connection, session: Session::new(false), state: State::default() }
    }

    /// A client that has negotiated; with `oob` out-of-band execution is on.
    pub fn negotiated(oob: bool) -> Served {
        let mut served = Served::new();
        let enable: &[&str] = if oob { &["oob"] } else { &[] };
        let hello = json!({ "execute": "qmp_capabilities", "arguments": { "enable": enable } });
        served.send(hello.to_string().as_bytes(), &[]);
        assert_eq!(served.answers(), [json!({ "return": {} })]);
        served
    }

    /// Sends all of `bytes` at once, the descriptors with them.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        assert_eq!(send_with_fds(&self.client, bytes, fds), bytes.len());
    }

    /// Lets the server do what it can; its answers.
    pub fn answers(&mut self) -> Vec<Value> {
        let mut out = Vec::new();
        loop {
            while self.session.wants_input() {
                let Some(message) = self.connection.next_message() else { break };
                out.extend(self.session.accept(&TABLE, &mut self.state, message));
            }
            if let Some(answer) = self.session.step(&TABLE, &mut self.state) {
                out.extend(answer);
                continue;
            }
            if self.connection.receive().unwrap() != Received::Some {
                return values(&out);
            }
        }
    }

    /// Sends a command with descriptors and returns its answer.
    pub fn ask(&mut self, command: &Value, fds: &[BorrowedFd<'_>]) -> Value {
        self.send(command.to_string().as_bytes(), fds);
        let answers = self.answers();
        assert_eq!(answers.len(), 1, "{answers:?}");
        answers.into_iter().next().unwrap()
    }
}

/// A connected pair of unix sockets.
pub fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap()
}

/// One `sendmsg`; the bytes that it took.
pub fn send_with_fds(socket: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> usize {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap()
}

/// What `session` answers to `bytes`.
pub fn answers_to(session: &mut Session, state: &mut State, bytes: &[u8]) -> Vec<u8> {
    let mut parser = Parser::new();
    let mut out = Vec::new();
    let mut at = 0;
    loop {
        let (used, content) = parser.feed(&bytes[at..]);
        at += used;
        let Some(content) = content else { return out };
        out.extend(session.dispatch(&TABLE, state, qmp::Message { content, receipt: None }));
    }
}

/// The JSON values of some lines.
pub fn values(lines: &[u8]) -> Vec<Value> {
    serde_json::Deserializer::from_slice(lines).into_iter().collect::<Result<_, _>>().unwrap()
}

/// The text of an error.
pub fn desc(answer: &Value) -> &str {
    answer["error"]["desc"].as_str().unwrap_or_else(|| panic!("no error: {answer}"))
}

/// Whether every copy of the other end of this pipe has been closed.
pub fn all_closed(read_end: &OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(read_end, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
    fds[0].revents().contains(PollFlags::HUP)
}

/// Says that a test cannot be judged here; where it must be, that is a failure.
pub fn skip(test: &str, needs: &str) {
    assert!(std::env::var_os("CI").is_none(), "{test} needs {needs}");
    println!("skipped: {test}: needs {needs}");
}
