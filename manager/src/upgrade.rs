// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One daemon in another's place while clients are connected.
//!
//! The new daemon is started and confined before anything stops. Then the old one stops its clients between two requests and
//! gives their sockets away (of vhost-user front ends all that they have said), and lets go of its nodes, which writes what they have in memory; the new one is told the journal,
//! and takes the clients. Requests that come meanwhile wait in the sockets, so each is answered once.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use qmp::ClientError;
use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType, recvmsg, socketpair,
};
use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::journal::Journal;
use crate::{Error, Result};

/// Descriptors in one message (`SCM_MAX_FD` of the kernel).
const MOST_FDS: usize = 253;
/// What is asked for as a socket's buffer, bytes.
const ROOM: usize = 4 << 20;
/// How long requests may take to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is ready before anything stops.
pub(crate) struct Begun {
    /// Our end of the socket over which NBD clients come.
    clients: OwnedFd,
    /// By export: the ends of the sockets over which vhost-user front ends come.
    front_ends: Vec<(Value, OwnedFd)>,
}

/// Gives the old daemon sockets to send its clients on, and the new one what disturbs nobody.
pub(crate) fn prepare(journal: &Journal, old: &mut Daemon, new: &mut Daemon) -> Result<Begun> {
    journal.replay_early(|command, arguments, fds| new.execute(command, arguments, fds))?;
    let clients = way_out(old, "moving")?;
    let ids = journal.steps().iter().filter(|step| step.arguments["type"] == "vhost-user-blk");
    let ids = ids.map(|step| step.arguments["id"].clone());
    let front_ends = ids.map(|id| way_out(old, &moving(&id)).map(|ours| (id, ours))).collect::<Result<_>>()?;
    journal.sync();
    Ok(Begun { clients, front_ends })
}

/// The name of the socket over which an export's front end goes.
fn moving(id: &Value) -> String {
    format!("moving {}", id.as_str().unwrap_or_default())
}

/// Gives a daemon one end of a new pair of sockets; the other one.
fn way_out(old: &mut Daemon, name: &str) -> Result<OwnedFd> {
    let failed = Error::process("could not prepare for the clients to move");
    let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let (ours, theirs) = pair.map_err(|e| failed(e.into()))?;
    // As much as the host allows: nobody reads before everything is sent.
    let _ = set_socket_send_buffer_size(&theirs, ROOM);
    old.execute("getfd", json!({ "fdname": name }), &[theirs.as_fd()])?;
    Ok(ours)
}

/// Moves everything. On an error neither daemon is of any use.
pub(crate) fn carry_over(begun: Begun, journal: &Journal, old: &mut Daemon, new: &mut Daemon) -> Result<()> {
    let states = match old.execute("nbd-server-move", json!({ "fd": "moving" }), &[]) {
        // There is no NBD server, and nobody to move.
        Err(Error::Daemon { source: ClientError::Qmp { .. }, .. }) => Value::Null,
        other => other?,
    };
    let states: &[Value] = states.as_array().map_or(&[], Vec::as_slice);
    let mut sockets = receive(&begun.clients, states.len())?.into_iter();
    for (id, _) in &begun.front_ends {
        // One that cannot go on is hung up on with the rest, and comes again.
        unless_refused(old.execute("vhost-user-move", json!({ "id": id, "fd": moving(id) }), &[]))?;
    }
    end_exports(old)?;
    for (command, arguments) in journal.all_undoing() {
        if command == "blockdev-del" {
            old.execute(command, arguments, &[])?;
        }
    }
    for (id, socket) in &begun.front_ends {
        new.execute("getfd", json!({ "fdname": "front end" }), &[socket.as_fd()])?;
        unless_refused(new.execute("vhost-user-client-add", json!({ "id": id, "fd": "front end" }), &[]))?;
    }
    journal.replay_late(|command, arguments, fds| new.execute(command, arguments, fds))?;
    for state in states {
        let Some(socket) = sockets.next() else { break };
        new.execute("getfd", json!({ "fdname": "client" }), &[socket.as_fd()])?;
        let mut client = state.clone();
        client["fd"] = json!("client");
        // One that cannot go on is hung up on, and comes again.
        unless_refused(new.execute("nbd-client-add", client, &[]))?;
    }
    Ok(())
}

/// Fails only where nothing can be said to the daemon any more.
fn unless_refused(answer: Result<Value>) -> Result<()> {
    match answer {
        Err(Error::Daemon { source: ClientError::Qmp { .. }, .. }) => Ok(()),
        other => other.map(drop),
    }
}

/// Closes what is left, and returns when no export is, so that nodes are free.
fn end_exports(old: &mut Daemon) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let exports = old.execute("query-block-exports", Value::Null, &[])?;
        let exports = exports.as_array().map_or(&[][..], Vec::as_slice);
        if exports.is_empty() {
            return Ok(());
        }
        for export in exports.iter().filter(|export| export["shutting-down"] == false) {
            old.execute("block-export-del", json!({ "id": export["id"], "mode": "hard" }), &[])?;
        }
        if Instant::now() > deadline {
            return Err(Error::Refused("requests of the old daemon do not end".into()));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Takes `count` sockets, which have been sent already.
fn receive(socket: &OwnedFd, count: usize) -> Result<Vec<OwnedFd>> {
    let mut sockets = Vec::new();
    while sockets.len() < count {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let came = recvmsg(socket, &mut [IoSliceMut::new(&mut [0])], &mut ancillary, flags);
        came.map_err(|e| Error::process("could not take the clients' sockets")(e.into()))?;
        let before = sockets.len();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                sockets.extend(fds);
            }
        }
        if sockets.len() == before {
            return Err(Error::Refused("the daemon sent fewer clients than it told of".into()));
        }
    }
    Ok(sockets)
}
