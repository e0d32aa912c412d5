// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A front end goes on in another process: its session as the messages that would bring it about.
//!
//! First comes the front end's socket, with one byte; then messages as a front end sends them; [`END`] says that none is
//! missing. The receiver checks them like any front end's: they come from a process that read what a guest wrote.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

use super::super::config;
use super::super::proto::{RegionAt, Request, request_header};
use super::{Known, Session};

/// The last message.
pub const END: Request = Request::SetOwner;

/// In [`Request::SetVringCall`] and its like: no descriptor belongs to it.
const NO_DESCRIPTOR: u64 = 0x100;

/// Messages that are sent at once: a descriptor comes with the first of them, or none.
struct Sender<'a> {
    to: BorrowedFd<'a>,
    bytes: Vec<u8>,
    fd: Option<OwnedFd>,
}

impl Sender<'_> {
    fn put(&mut self, request: Request, payload: &[u8]) {
        self.bytes.extend(request_header(request, payload.len()));
        self.bytes.extend(payload);
    }

    /// What has a descriptor begins a new piece: it comes with a piece's first byte.
    fn put_with(&mut self, request: Request, payload: &[u8], fd: BorrowedFd<'_>) -> io::Result<()> {
        self.flush()?;
        self.fd = Some(fd.try_clone_to_owned()?);
        self.put(request, payload);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<BorrowedFd<'_>> = self.fd.iter().map(AsFd::as_fd).collect();
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        // A receiver that does not take it must not hold up the export's end.
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = sendmsg(self.to, &[IoSlice::new(&self.bytes)], &mut control, flags)?;
        if sent != self.bytes.len() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.bytes.clear();
        self.fd = None;
        Ok(())
    }
}

/// Sends a session whose queues have stopped.
///
/// # Errors
/// The socket has no room or failed: then nobody can go on with the session.
pub fn send(session: &Session<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let mut sender = Sender { to, bytes: vec![0], fd: Some(session.channel.as_fd().try_clone_to_owned()?) };
    sender.flush()?;
    sender.put(Request::SetFeatures, &session.features.to_ne_bytes());
    sender.put(Request::SetProtocolFeatures, &session.protocol.to_ne_bytes());
    let write_back = session.host.disk.write_back.load(Ordering::Relaxed);
    sender.put(Request::SetConfig, &config::cache_mode_payload(write_back));
    for (at, file) in session.memory.regions() {
        sender.put_with(Request::AddMemReg, &region(at), file.as_fd())?;
    }
    if let (Some(area), Some(file)) = (&session.area, session.area_file.as_ref().or(session.host.inflight)) {
        sender.put_with(Request::SetInflightFd, &area.description().to_bytes(24), file.as_fd())?;
    }
    if let Some(back) = &session.back {
        sender.put_with(Request::SetBackendReqFd, &[], back.as_fd())?;
    }
    for (index, queue) in (0..).zip(&session.queues) {
        send_queue(&mut sender, index, queue)?;
    }
    sender.put(END, &[]);
    sender.flush()
}

fn send_queue(sender: &mut Sender<'_>, index: u32, queue: &Known) -> io::Result<()> {
    let event = |fd: bool| (u64::from(index) | if fd { 0 } else { NO_DESCRIPTOR }).to_ne_bytes();
    let state = |number: u32| [index, number].map(u32::to_ne_bytes).as_flattened().to_vec();
    if let Some(call) = queue.call.current() {
        sender.put_with(Request::SetVringCall, &event(true), call.as_fd())?;
    }
    if let Some(err) = &queue.err {
        sender.put_with(Request::SetVringErr, &event(true), err.as_fd())?;
    }
    if queue.size != 0 {
        sender.put(Request::SetVringNum, &state(queue.size.into()));
    }
    sender.put(Request::SetVringBase, &state(queue.next_available.into()));
    if let Some(at) = queue.at {
        let mut payload = state(0);
        for address in [at.descriptors, at.used, at.available, 0] {
            payload.extend(address.to_ne_bytes());
        }
        sender.put(Request::SetVringAddr, &payload);
    }
    if let Some(enabled) = queue.enabled {
        sender.put(Request::SetVringEnable, &state(enabled.into()));
    }
    if let Some(kick) = &queue.kick {
        sender.put_with(Request::SetVringKick, &event(true), kick.as_fd())?;
    }
    Ok(())
}

fn region(at: RegionAt) -> Vec<u8> {
    let RegionAt { guest, len, user, offset } = at;
    let mut payload = vec![0; 8];
    for number in [guest, len, user, offset] {
        payload.extend(number.to_ne_bytes());
    }
    payload
}

/// The front end's socket, which comes first; what follows is left for the session.
///
/// # Errors
/// There is none: no front end was there, or the sender has gone.
pub fn receive_socket(from: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    recvmsg(from, &mut [IoSliceMut::new(&mut [0])], &mut control, flags)?;
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    fds.flatten().next().ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}
