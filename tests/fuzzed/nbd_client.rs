// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A hostile NBD server, to which a node with the driver `nbd` is connected.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use block::{BlockNode, Graph, Host, NodeAccess, NodeSpec, Wait, ZeroFlags};

/// Requests that one input may make.
const MOST_REQUESTS: usize = 32;
/// What the server's socket takes at once.
const MOST_SAID: usize = 64 << 10;

/// How replies look; the option that asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Simple,
    Structured,
    Extended,
}

/// The first byte says what the rest is: 1 to 3, requests after a sound negotiation of simple replies, structured ones or extended
/// headers; 7, a server that is asked for its exports; 4 to 6, the same after 18 bytes of facts about the export (size, flags, smallest block, largest request); else a
/// negotiation, after which the server hangs up.
///
/// A request is what the client asks, where, and two bytes of length in front of what the server answers when it comes.
pub fn nbd_client(data: &[u8]) {
    answered(data);
}

/// The same; how many requests got an answer that was none of an error.
pub fn answered(data: &[u8]) -> usize {
    let Some((&choice, mut rest)) = data.split_first() else { return 0 };
    let (ours, theirs) = UnixStream::pair().unwrap();
    if !(1..=6).contains(&choice) {
        (&ours).write_all(&rest[..rest.len().min(MOST_SAID)]).unwrap();
        ours.shutdown(Shutdown::Write).unwrap();
        if choice == 7 {
            let socket: block::Descriptor = Box::new(OwnedFd::from(theirs));
            let listed = block::nbd_list::exports(&socket, Duration::from_secs(10));
            return listed.map_or(0, |listed| listed.len());
        }
        drop(open(theirs));
        return 0;
    }
    // HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES and FAST_ZERO for a disk of 1 MiB.
    let mut facts = *b"\0\0\0\0\0\x10\0\0\x08\x6d\0\0\x02\0\x02\0\0\0";
    if choice > 3 {
        let Some((own, after)) = rest.split_first_chunk() else { return 0 };
        (facts, rest) = (*own, after);
    }
    let style = [Style::Simple, Style::Structured, Style::Extended][usize::from(choice - 1) % 3];
    (&ours).write_all(&negotiation(style, &facts)).unwrap();
    let Some(disk) = open(theirs) else { return 0 };
    // What the client has said so far belongs to the negotiation.
    ours.set_nonblocking(true).unwrap();
    while matches!((&ours).read(&mut [0; 4096]), Ok(1..)) {}
    ours.set_nonblocking(false).unwrap();
    let mut asks = Vec::new();
    let mut answers = Vec::new();
    while let Some((&[what, place, high, low], after)) = rest.split_first_chunk()
        && asks.len() < MOST_REQUESTS
    {
        let (answer, after) = after.split_at(after.len().min(u16::from_be_bytes([high, low]).into()));
        asks.push([what, place]);
        answers.push(answer.to_vec());
        rest = after;
    }
    let server = std::thread::spawn(move || serve(&ours, style, answers));
    let answered = asks.into_iter().filter(|&[what, place]| ask(&disk, what, place)).count();
    drop(disk);
    server.join().unwrap();
    answered
}

/// What a server says that agrees to `style` and exports what `facts` say.
fn negotiation(style: Style, facts: &[u8; 18]) -> Vec<u8> {
    const ACK: u32 = 1;
    const UNSUPPORTED: u32 = 1 << 31 | 1;
    let reply = |option: u32, kind: u32, payload: &[u8]| {
        let mut reply = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
        reply.extend([option, kind, u32::try_from(payload.len()).unwrap()].into_iter().flat_map(u32::to_be_bytes));
        reply.extend(payload);
        reply
    };
    let has = |wanted| if style == wanted { ACK } else { UNSUPPORTED };
    let mut said = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    said.extend(reply(11, has(Style::Extended), b""));
    if style != Style::Extended {
        said.extend(reply(8, has(Style::Structured), b""));
    }
    if style != Style::Simple {
        said.extend(reply(10, 4, b"\0\0\0\x07base:allocation"));
        said.extend(reply(10, ACK, b""));
    }
    let (export, blocks) = facts.split_at(10);
    said.extend(reply(7, 3, &[&[0, 0], export].concat()));
    said.extend(reply(7, 3, &[&[0, 3], &blocks[..4], &[0, 0, 0x10, 0], &blocks[4..]].concat()));
    said.extend(reply(7, ACK, b""));
    said
}

fn open(socket: UnixStream) -> Option<Arc<BlockNode>> {
    let opened = Graph::new().add(NodeSpec {
        name: Some("nbd".into()),
        driver: "nbd",
        access: NodeAccess { writable: true, unmap: true },
        host: Some(Host::socket(socket, Arc::new(|_| ()))),
        filename: String::new(),
        children: [].into(),
        detached: [].into(),
        options: [].into(),
    });
    opened.ok()
}

/// Says one answer for every request that has come, and hangs up when there are none left or one leaves the client waiting.
fn serve(mut socket: &UnixStream, style: Style, answers: Vec<Vec<u8>>) {
    for answer in answers {
        let mut header = [0; 32];
        let len = if style == Style::Extended { 32 } else { 28 };
        if socket.read_exact(&mut header[..len]).is_err() {
            break;
        }
        let (command, range) = (number(&header[6..8]), number(&header[24..len]));
        if command == 1 {
            let _ = std::io::copy(&mut socket.take(range), &mut std::io::sink());
        }
        let wanted = if command == 0 { range } else { 0 };
        if socket.write_all(&answer).is_err() || !is_whole(&answer, style, wanted) {
            break;
        }
    }
    let _ = socket.shutdown(Shutdown::Write);
    let _ = std::io::copy(&mut socket, &mut std::io::sink());
}

/// Whether an answer gets to the end of a reply, to a request for `wanted` bytes.
fn is_whole(mut answer: &[u8], style: Style, wanted: u64) -> bool {
    while answer.len() >= 16 {
        let is_simple = number(&answer[..4]) == 0x6744_6698;
        let (head, len) = match style {
            _ if is_simple => (16, if number(&answer[4..8]) == 0 { wanted } else { 0 }),
            Style::Extended if answer.len() >= 32 => (32, number(&answer[24..32])),
            Style::Structured if answer.len() >= 20 => (20, number(&answer[16..20])),
            _ => return false,
        };
        let Some(rest) = usize::try_from(len).ok().and_then(|len| answer[head..].get(len..)) else { return false };
        if is_simple || answer[5] & 1 == 1 {
            return true;
        }
        answer = rest;
    }
    false
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// One request, somewhere on the disk; whether it was answered.
fn ask(disk: &BlockNode, what: u8, place: u8) -> bool {
    let size = disk.len();
    let len = [1, 512, 4096, 16 << 10][usize::from(what >> 4) % 4].min(size);
    let last = size - len;
    let at = match place {
        0..128 => (u64::from(place) * 512).min(last),
        _ => last - (u64::from(place - 128) * 512).min(last),
    };
    let mut bytes = vec![what; usize::try_from(len).unwrap()];
    match what % 8 {
        0 | 1 => disk.read(&mut bytes, at, Wait::Allowed).is_ok(),
        2 => disk.write(&bytes, at, what & 0x80 != 0).is_ok(),
        3 => {
            let flags = ZeroFlags { may_unmap: what & 0x40 != 0, fast_only: what & 0x80 != 0 };
            disk.write_zeroes(at, len, flags, false).is_ok()
        }
        4 => disk.discard(at, len).is_ok(),
        5 => disk.flush().is_ok(),
        _ => match disk.status(at, len) {
            Ok(status) => {
                assert!(len == 0 || (1..=len).contains(&status.len), "block status of {} in {len} bytes", status.len);
                true
            }
            Err(_) => false,
        },
    }
}
