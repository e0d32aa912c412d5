// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One function for each place where foreign bytes come in. The fuzz targets feed them forever (fuzz/README.md); the test
//! `corpora` feeds them what is committed.
#![allow(dead_code, missing_docs, clippy::unwrap_used, unreachable_pub)]

mod disks;
mod image_write;
mod nbd;
mod nbd_client;
mod read_only;
mod vhost_user;
mod vvfat;

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use block::{BlockNode, Graph, Host, NodeAccess, NodeSpec, Repair, inspect};
use confine::{Plan, Role};
use daemon::control::MonitorSetup;
use daemon::monitor::{Monitor, Source};
use daemon::state::Daemon;
use export::fuse;
use fdset::{FdPolicy, Lifetime};
use qmp::Parser;

pub use disks::{vdi, vmdk, vpc};
pub use image_write::image_write;
pub use nbd::{nbd_handshake, nbd_requests, nbd_tls, transmit};
pub use nbd_client::{answered, nbd_client};
pub use read_only::read_only;
pub use vhost_user::{vhost_user_messages, vhost_user_rings};
pub use vvfat::vvfat;

/// Bytes from a monitor's client, cut into messages.
pub fn qmp_parser(data: &[u8]) {
    let mut parser = Parser::new();
    let mut rest = data;
    while !rest.is_empty() {
        let (used, message) = parser.feed(rest);
        assert!(used > 0 || message.is_some(), "the parser stands still");
        rest = &rest[used..];
    }
    parser.finish();
}

/// A monitor's client, with descriptors: a byte 0xFF passes one and says by the byte after it what kind.
pub fn monitor(data: &[u8]) {
    // A fuzzer must go on writing its corpus, so nothing is given up; the proof says so.
    let confined = confine::confine(&Plan::new(Role::Daemon).only(&[]).best_effort()).unwrap();
    let table = daemon::commands::table();
    let settings = fdset::Settings { policy: FdPolicy::Strict, ..Default::default() };
    let wake = Arc::new(daemon::Wake::new().unwrap());
    let mut daemon = Daemon::new(confined, settings, wake);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let source = Source::Connected(theirs.into());
    let setup = MonitorSetup { source, pretty: false, lifetime: Some(Lifetime::Monitor), peer_uid: None };
    let mut monitor = Monitor::new(0, setup, &table, &mut daemon).unwrap();
    let mut answers = ours.try_clone().unwrap();
    let reader = std::thread::spawn(move || {
        let _ = answers.read_to_end(&mut Vec::new());
    });
    let mut rest = data;
    while !rest.is_empty() && !monitor.is_over() {
        let plain = rest.iter().position(|&byte| byte == 0xFF).unwrap_or(rest.len());
        let sent = match plain {
            0 => {
                let fd = descriptor(rest.get(1).copied().unwrap_or(0));
                let sent = send(&ours, b" ", Some(&fd));
                rest = &rest[rest.len().min(2)..];
                sent
            }
            _ => {
                let (now, later) = rest.split_at(plain.min(4096));
                rest = later;
                send(&ours, now, None)
            }
        };
        if !sent {
            break;
        }
        drain(&mut monitor, &table, &mut daemon);
    }
    ours.shutdown(Shutdown::Write).unwrap();
    while !monitor.is_over() {
        drain(&mut monitor, &table, &mut daemon);
    }
    drop(ours);
    reader.join().unwrap();
}

fn drain(monitor: &mut Monitor, table: &qmp::Table<Daemon>, daemon: &mut Daemon) {
    loop {
        let answer = monitor.advance(table, daemon);
        daemon.reap_exports();
        daemon.jobs.reap();
        monitor.answer(&answer);
        monitor.flush(daemon);
        if !monitor.is_busy() || daemon.quit {
            break;
        }
    }
}

fn send(socket: &UnixStream, bytes: &[u8], fd: Option<&OwnedFd>) -> bool {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    }
    sendmsg(socket, &[std::io::IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL).is_ok()
}

fn descriptor(kind: u8) -> OwnedFd {
    match kind {
        b'n' => File::open("/dev/null").unwrap().into(),
        b'd' => File::open("/").unwrap().into(),
        b's' => UnixStream::pair().unwrap().0.into(),
        b'q' => memory(include_bytes!("../../fixtures/demo.qcow2")).into(),
        _ => memory(&[0; 4096]).into(),
    }
}

fn memory(content: &[u8]) -> File {
    let fd = rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(fd);
    file.write_all(content).unwrap();
    file
}

/// A certificate, of which the name of its subject is read.
pub fn certificate(data: &[u8]) {
    let _ = export::nbd::tls::distinguished_name(data);
}

/// A kernel's FUSE requests: records of opcode, file, length (two bytes) and body behind a sound header; opcode 255 is a body
/// without one.
pub fn fuse_requests(data: &[u8]) {
    let node = node(&mut Graph::new(), "file", Some(memory(&[7; 1 << 20])), &[], true).unwrap();
    let file = fuse::File::new(fuse::Settings { node, writable: true, growable: false, shared: true, uid: 1, gid: 2 });
    let mut room = vec![0; fuse::REPLY_ROOM];
    let mut rest = data;
    while let Some((&[opcode, node, low, high], body)) = rest.split_first_chunk() {
        let len = usize::from(u16::from_le_bytes([low, high])).min(body.len());
        let (body, after) = body.split_at(len);
        rest = after;
        let mut bytes = Vec::new();
        if opcode != 255 {
            bytes.extend(u32::try_from(40 + len).unwrap().to_ne_bytes());
            bytes.extend(u32::from(opcode).to_ne_bytes());
            bytes.extend([9u64.to_ne_bytes(), u64::from(node).to_ne_bytes(), [0; 8], [0; 8]].concat());
        }
        bytes.extend(body);
        let Some(request) = fuse::Request::parse(&bytes) else { continue };
        let Some(len) = file.answer(&request, &mut room) else { continue };
        assert_eq!(u32::from_ne_bytes(room[0..4].try_into().unwrap()) as usize, len);
        let error = i32::from_ne_bytes(room[4..8].try_into().unwrap());
        assert!((-511..=0).contains(&error) && (error == 0 || len == 16), "the kernel would not take error {error}");
        assert_eq!(file.node().len(), 1 << 20);
    }
}

/// Adds a node of its driver's name over `file`, or over the nodes called `children`.
fn node(
    graph: &mut Graph,
    driver: &'static str,
    file: Option<File>,
    children: &[&'static str],
    writable: bool,
) -> block::Result<Arc<BlockNode>> {
    graph.add(NodeSpec {
        name: Some(driver.into()),
        driver,
        access: NodeAccess { writable, unmap: true },
        host: file.map(Host::fixed),
        filename: "/dev/fdset/0".into(),
        children: children.iter().map(|&edge| (edge, "file".to_owned())).collect(),
        detached: ["backing"].into(),
        options: [].into(),
    })
}

/// An image of unknown format: probed, then opened and read as what it seems to be, or else as qcow2.
pub fn image(data: &[u8]) {
    let mut graph = Graph::new();
    let file = node(&mut graph, "file", Some(memory(data)), &[], false).unwrap();
    let probed = inspect(&file, None).map_or("qcow2", |found| found.format);
    let opened = node(&mut graph, probed, None, &["file"], false)
        // An external data file, perhaps.
        .or_else(|_| node(&mut graph, "qcow2", None, &["file", "data-file"], false));
    let Ok(disk) = opened else { return };
    look_at(&disk);
}

/// The whole of a small disk; both ends of a large one.
pub fn look_at(disk: &BlockNode) {
    let len = disk.len();
    let mut buffer = vec![0; 1 << 20];
    for start in [0, len.saturating_sub(buffer.len() as u64)] {
        let take = usize::try_from(len.min(buffer.len() as u64)).unwrap();
        let _ = disk.read(&mut buffer[..take], start, block::Wait::Allowed);
        let mut at = start;
        while at < start + take as u64 {
            let Ok(status) = disk.status(at, start + take as u64 - at) else { break };
            assert!(status.len > 0, "block status stands still at {at}");
            at += status.len;
        }
    }
}

/// A damaged qcow2 image: checked, repaired, and checked again. What was repaired is sound, and stays so.
pub fn image_check(data: &[u8]) {
    let mut graph = Graph::new();
    let file = node(&mut graph, "file", Some(memory(data)), &[], true).unwrap();
    let check = |repair| block::check(&file, "qcow2", repair, &mut |_| ());
    let Ok(before) = check(Repair::Nothing) else { return };
    let Ok(repaired) = check(Repair::All) else { return };
    // A count that was put right may leave flags that do not fit, in tables that cannot be changed: one in every entry.
    let flags = repaired.allocated_clusters + repaired.total_clusters;
    let allowed = before.corruptions + before.leaks + repaired.corruptions_fixed + flags;
    assert!(repaired.corruptions <= allowed, "{before:?} {repaired:?}");
    let after = check(Repair::Nothing).unwrap();
    if repaired.corruptions + repaired.leaks + repaired.check_errors == 0 {
        assert_eq!((after.corruptions, after.leaks), (0, 0), "{before:?} {repaired:?}");
    }
}
