// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `nbd-server-move` and `nbd-client-add`: connected NBD clients go on in another daemon, for upgrades without a gap.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use export::nbd::{Moved, Style};
use qmp::{Call, Command, Definition, Error, Member, Type};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::Deserialize;
use serde_json::{Value, json};

use super::words;
use crate::state::Daemon;

/// Descriptors in one message (`SCM_MAX_FD` of the kernel).
const MOST_FDS: usize = 253;

pub fn types() -> Vec<Definition> {
    vec![
        words("NbdReplyStyle", &["simple", "structured", "extended"], "How an NBD client's requests and replies look."),
        Definition::structure(
            "NbdMetaContext",
            [
                Member::required("id", Type::Uint32, "The number that it goes by."),
                Member::required("name", Type::Str, "Its name."),
            ],
            "A metadata context that an NBD client has chosen.",
        ),
        Definition::structure("NbdClientState", state(), "What an NBD client has negotiated, and said since."),
    ]
}

fn with_socket(state: [Member; 4]) -> [Member; 5] {
    let [export, style, contexts, received] = state;
    [Member::required("fd", Type::Str, "The name that `getfd` gave its socket."), export, style, contexts, received]
}

fn state() -> [Member; 4] {
    [
        Member::required("export", Type::Str, "The export's name."),
        Member::required("style", Type::Named("NbdReplyStyle"), "How its requests and replies look."),
        Member::required("contexts", Type::Array(&Type::Named("NbdMetaContext")), "Its metadata contexts."),
        Member::required(
            "received",
            Type::Str,
            "The beginning of its next request, in hexadecimal digits; may be empty.",
        ),
    ]
}

pub fn commands() -> Vec<Command<Daemon>> {
    vec![
        Command::new(
            "nbd-server-move",
            "Stops the NBD server as `nbd-server-stop` does, but its clients are not hung up on: each is stopped between two \
             requests, with nothing under way, and its socket is sent on a passed socket, 253 at most with each byte. Clients that \
             still negotiate after 100 ms, use TLS or do not stop in time are hung up on. Until an NBD server is started again, nodes \
             that are removed are not flushed, as if the clients' new daemon had the same open files. Not in QEMU.",
            [
                Member::required("fd", Type::Str, "The name that `getfd` gave the connected stream socket."),
                Member::optional("milliseconds", Type::Uint32, "How long clients may take to stop; default 5000."),
            ],
            move_clients,
        )
        .returning(Type::Array(&Type::Named("NbdClientState"))),
        Command::new(
            "nbd-client-add",
            "Goes on with a client of another daemon's NBD server, as `nbd-server-move` gave it. Not in QEMU.",
            with_socket(state()),
            add,
        ),
    ]
}

#[derive(Deserialize)]
struct Move {
    fd: String,
    milliseconds: Option<u32>,
}

fn move_clients(daemon: &mut Daemon, mut call: Call<'_>) -> Result<Value, Error> {
    let Move { fd, milliseconds } = call.parse()?;
    if !daemon.exports.nbd_is_running() {
        return Err(Error::generic("NBD server not running"));
    }
    let socket = daemon.named_fds().take(&fd)?;
    let patience = Duration::from_millis(milliseconds.unwrap_or(5000).into());
    let moved = daemon.exports.move_nbd(patience)?;
    daemon.graph.hand_over(true);
    daemon.reap_exports();
    for some in moved.chunks(MOST_FDS) {
        let fds: Vec<BorrowedFd<'_>> = some.iter().map(|client| client.socket.as_fd()).collect();
        // Whoever cannot be sent is hung up on with the rest.
        send(&socket, &fds).map_err(|e| Error::generic(format!("Could not send the clients' sockets: {e}")))?;
    }
    Ok(moved.iter().map(shown).collect())
}

fn send(socket: &OwnedFd, fds: &[BorrowedFd<'_>]) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(fds));
    // A receiver that does not take them must not hold up the daemon.
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(socket, &[IoSlice::new(&[0])], &mut control, flags).map(drop)
}

fn shown(client: &Moved) -> Value {
    let Moved { export, style, contexts, received, .. } = client;
    let contexts: Vec<Value> = contexts.iter().map(|(id, name)| json!({ "id": id, "name": name })).collect();
    let received: String = received.iter().map(|byte| format!("{byte:02x}")).collect();
    json!({ "export": export, "style": style.word(), "contexts": contexts, "received": received })
}

#[derive(Deserialize)]
struct Add {
    fd: String,
    export: String,
    style: String,
    contexts: Vec<Context>,
    received: String,
}

#[derive(Deserialize)]
struct Context {
    id: u32,
    name: String,
}

fn add(daemon: &mut Daemon, mut call: Call<'_>) -> Result<Value, Error> {
    let Add { fd, export, style, contexts, received } = call.parse()?;
    let style = Style::named(&style).ok_or_else(|| Error::generic("Parameter 'style' is no style"))?;
    let received = bytes(&received).ok_or_else(|| Error::generic("'received' is not pairs of hexadecimal digits"))?;
    let socket = daemon.named_fds().take(&fd)?;
    let contexts = contexts.into_iter().map(|Context { id, name }| (id, name)).collect();
    let taken = daemon.exports.take_nbd_client(Moved { socket, export, style, contexts, received })?;
    taken.map_err(Error::generic)?;
    Ok(Value::Null)
}

fn bytes(hexadecimal: &str) -> Option<Vec<u8>> {
    let (pairs, odd) = hexadecimal.as_bytes().as_chunks::<2>();
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let pair = |[high, low]: &[u8; 2]| Some(digit(*high)? << 4 | digit(*low)?);
    if odd.is_empty() { pairs.iter().map(pair).collect() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_bytes_only_in_pairs() {
        assert_eq!(bytes("00fF7a"), Some(vec![0, 255, 0x7a]));
        assert_eq!(bytes(""), Some(Vec::new()));
        assert_eq!(bytes("0"), None);
        assert_eq!(bytes("+1"), None);
        assert_eq!(bytes("0g"), None);
    }
}
