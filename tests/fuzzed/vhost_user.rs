// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Front ends of vhost-user-blk, and the rings of their guests.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};

use block::Graph;
use export::Workers;
use export::vhost_user_blk::{Export, Settings};
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::{memory, node};

const DISK: usize = 1 << 20;
/// Bytes of a guest's memory, and what its front end adds to its addresses.
const GUEST: usize = 1 << 16;
const USER: u64 = 1 << 28;
/// Where the rings of [`vhost_user_rings`] are, and what a guest has for the rest.
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const REST: usize = 0x3000;
/// Entries of its queue.
const SIZE: u8 = 16;

static EXPORT: OnceLock<Mutex<(Export, PathBuf)>> = OnceLock::new();

/// A front end: records of a request's number, flags and the length of its payload, and the payload. Of the flags, the low
/// half counts descriptors, and bits 4 and 5 say of what kind; bit 6 asks for an answer, bit 7 sends the payload alone.
pub fn vhost_user_messages(data: &[u8]) {
    talk(|socket| {
        let mut rest = data;
        while let Some((&[number, flags, len], body)) = rest.split_first_chunk() {
            let (payload, after) = body.split_at(usize::from(len).min(body.len()));
            rest = after;
            let fds: Vec<OwnedFd> = (0..flags & 0xf).map(|_| descriptor(flags >> 4 & 3)).collect();
            let need_reply = if flags & 0x40 == 0 { 0 } else { 8 };
            let bytes = match flags & 0x80 {
                0 => message(number.into(), need_reply, payload),
                _ => payload.to_vec(),
            };
            if bytes.is_empty() || !send(socket, &bytes, &fds) {
                break;
            }
        }
    });
}

/// A guest whose queue runs: a byte of flags (1: event idx, 2: in-flight memory), `avail.idx`, 16 heads, 16 descriptors, in-flight
/// memory of a queue if it is asked for, and the rest of its memory from [`REST`].
pub fn vhost_user_rings(data: &[u8]) {
    let mut rest = data;
    let mut take = |len: usize| {
        let (now, later) = rest.split_at(len.min(rest.len()));
        rest = later;
        now
    };
    let flags = take(1).first().copied().unwrap_or(0);
    let guest = memory(&[0; GUEST]);
    let area = memory(&[0; 320]);
    let ring = take(2 + 2 * usize::from(SIZE));
    guest.write_all_at(ring, AVAILABLE + 2).unwrap();
    guest.write_all_at(take(16 * usize::from(SIZE)), 0).unwrap();
    if flags & 2 != 0 {
        area.write_all_at(take(320), 0).unwrap();
    }
    let rest = take(GUEST - REST);
    guest.write_all_at(rest, REST as u64).unwrap();

    let event_idx = u64::from(flags & 1) << 29;
    let number = |number: u64| number.to_ne_bytes().to_vec();
    let state = |number: u32| [0, number].map(u32::to_ne_bytes).concat();
    let quads = |numbers: &[u64]| numbers.iter().flat_map(|number| number.to_ne_bytes()).collect::<Vec<u8>>();
    let none: &[OwnedFd] = &[];
    let file = |file: &std::fs::File| vec![OwnedFd::from(file.try_clone().unwrap())];
    talk(|socket| {
        let say = |number, payload: Vec<u8>, fds: &[OwnedFd]| send(socket, &message(number, 0, &payload), fds);
        // Features: protocol features, version 1, indirect descriptors. Protocol features: in-flight memory.
        say(2, number(1 << 30 | 1 << 32 | 1 << 28 | event_idx), none);
        say(16, number(1 << 12), none);
        if flags & 2 != 0 {
            let mut payload = quads(&[320, 0]);
            payload.extend([1, 0, SIZE, 0, 0, 0, 0, 0]);
            say(32, payload, &file(&area));
        }
        say(5, [quads(&[1]), quads(&[0, GUEST as u64, USER, 0])].concat(), &file(&guest));
        say(8, state(SIZE.into()), none);
        say(9, quads(&[0, USER, USER + USED, USER + AVAILABLE, 0]), none);
        say(13, number(0), &[descriptor(0)]);
        say(12, number(0), &[descriptor(0)]);
        say(18, state(1), none);
        // What was available has been served when this is answered.
        say(11, state(0), none);
    });
}

fn message(number: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let header = [number, 1 | flags, u32::try_from(payload.len()).unwrap()].map(u32::to_ne_bytes);
    [header.as_flattened(), payload].concat()
}

fn descriptor(kind: u8) -> OwnedFd {
    match kind {
        0 => eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap(),
        1 => memory(&[0; GUEST]).into(),
        2 => memory(&[0; 100]).into(),
        _ => UnixStream::pair().unwrap().0.into(),
    }
}

fn send(socket: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> bool {
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).is_ok_and(|sent| sent == bytes.len())
}

/// Has a front end speak to a writable export, and hears what it has to say to the end.
fn talk(speak: impl FnOnce(&UnixStream)) {
    let export = EXPORT.get_or_init(|| {
        let path = tempfile::tempdir().unwrap().keep().join("vhost-user");
        let listener = UnixListener::bind(&path).unwrap();
        let node = node(&mut Graph::new(), "file", Some(memory(&[7; DISK])), &[], true).unwrap();
        let inflight = memory(&[]).into();
        let settings = Settings {
            id: "fuzzed".into(),
            node,
            writable: true,
            writethrough: false,
            block_size: 512,
            queues: 2,
            inflight: Some(inflight),
            moved: None,
        };
        Mutex::new((Export::start(listener.into(), settings, Workers::new(), || ()).unwrap(), path))
    });
    let export = export.lock().unwrap_or_else(PoisonError::into_inner);
    let mut socket = UnixStream::connect(&export.1).unwrap();
    speak(&socket);
    let _ = socket.shutdown(Shutdown::Write);
    while socket.read(&mut [0; 4096]).is_ok_and(|read| read > 0) {}
}
