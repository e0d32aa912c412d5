// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disk images of formats with one table: opened, read, written, checked and repaired.
//!
//! The first byte of an input is flags: 1 the rest is the image itself, else it is changes to a sound one (three bytes where, one
//! byte how many, and these); 2 a VHD's checksums are made right; 4 the image is written to; 8 (VMDK) the rest is a descriptor's
//! text over two extents.

use std::io::{Read, Seek};
use std::sync::Arc;

use block::{BlockNode, CreateRequest, Graph, NodeAccess, Repair, Wait, ZeroFlags};

use super::{memory, node};

/// Bytes of the sound images' disks.
const SIZE: u64 = 4 << 20;

pub fn vdi(data: &[u8]) {
    disk("vdi", data);
}

pub fn vpc(data: &[u8]) {
    disk("vpc", data);
}

pub fn vmdk(data: &[u8]) {
    match data.split_first() {
        Some((flags, text)) if flags & 8 != 0 => descriptor(text, flags & 4 != 0),
        _ => disk("vmdk", data),
    }
}

fn disk(format: &'static str, data: &[u8]) {
    let Some((&flags, rest)) = data.split_first() else { return };
    let mut image = if flags & 1 != 0 { rest.to_vec() } else { changed(sound(format), rest) };
    if flags & 2 != 0 && format == "vpc" {
        mend_sums(&mut image);
    }
    let mut graph = Graph::new();
    let file = node(&mut graph, "file", Some(memory(&image)), &[], true).unwrap();
    let check = |repair| block::check(&file, format, repair, &mut |_| ());
    let before = check(Repair::Nothing);
    if let Ok(opened) = node(&mut graph, format, None, &["file"], flags & 4 != 0) {
        use_disk(&opened, flags & 4 != 0);
        drop(opened);
        graph.remove(format).unwrap();
    }
    if before.is_err() {
        return;
    }
    let Ok(repaired) = check(Repair::All) else { return };
    let Ok(after) = check(Repair::Nothing) else { panic!("a repair left what cannot be checked: {repaired:?}") };
    if repaired.corruptions + repaired.check_errors == 0 {
        assert_eq!(after.corruptions, 0, "{before:?} {repaired:?}");
    }
}

/// The whole of a small disk; both ends of a large one.
fn use_disk(disk: &BlockNode, writes: bool) {
    let len = disk.len();
    let mut buffer = vec![0; 1 << 18];
    for start in [0, len.saturating_sub(buffer.len() as u64)] {
        let take = usize::try_from(len.min(buffer.len() as u64)).unwrap();
        let _ = disk.read(&mut buffer[..take], start, Wait::Allowed);
        let mut at = start;
        while at < start + take as u64 {
            let Ok(status) = disk.status(at, start + take as u64 - at) else { break };
            assert!(status.len > 0, "block status stands still at {at}");
            at += status.len;
        }
        if writes && take >= 1024 {
            let written = disk.write(&[0x5a; 1024], start, false).is_ok();
            if written && disk.flush().is_ok() {
                let mut back = [0; 1024];
                disk.read(&mut back, start, Wait::Allowed).unwrap();
                assert_eq!(back, [0x5a; 1024], "what was written is there");
            }
            let _ = disk.write_zeroes(start, 512, ZeroFlags { may_unmap: true, fast_only: false }, false);
            let _ = disk.discard(start, take as u64);
        }
    }
}

fn descriptor(text: &[u8], writable: bool) {
    let mut graph = Graph::new();
    let named = |graph: &mut Graph, name: &str, content: &[u8]| {
        graph.add(block::NodeSpec {
            name: Some(name.into()),
            driver: "file",
            access: NodeAccess { writable, unmap: true },
            host: Some(block::Host::fixed(memory(content))),
            filename: name.into(),
            children: [].into(),
            detached: [].into(),
            options: [].into(),
        })
    };
    named(&mut graph, "file", text).unwrap();
    named(&mut graph, "extents.0", &[1; 8192]).unwrap();
    named(&mut graph, "extents.1", &sound("vmdk")).unwrap();
    let children = [("file", "file"), ("extents.0", "extents.0"), ("extents.1", "extents.1")];
    for count in 1..=3 {
        let opened = graph.add(block::NodeSpec {
            name: Some(format!("disk{count}")),
            driver: "vmdk",
            access: NodeAccess { writable, unmap: true },
            host: None,
            filename: String::new(),
            children: children[..count].iter().map(|(edge, name)| (*edge, (*name).to_owned())).collect(),
            detached: ["backing"].into(),
            options: [].into(),
        });
        if let Ok(opened) = opened {
            use_disk(&opened, writable);
            drop(opened);
            graph.remove(&format!("disk{count}")).unwrap();
        }
    }
}

/// An image with two blocks that hold something.
fn sound(format: &'static str) -> Vec<u8> {
    static SOUND: std::sync::Mutex<Vec<(&str, Vec<u8>)>> = std::sync::Mutex::new(Vec::new());
    let mut sound = SOUND.lock().unwrap();
    if let Some((_, image)) = sound.iter().find(|(name, _)| *name == format) {
        return image.clone();
    }
    let file = memory(&[]);
    let mut graph = Graph::new();
    let image = node(&mut graph, "file", Some(file.try_clone().unwrap()), &[], true).unwrap();
    let request = CreateRequest {
        file: Arc::clone(&image),
        data_file: None,
        extents: Vec::new(),
        parent_cid: None,
        size: SIZE,
        options: [].into(),
    };
    block::create(format, &request).unwrap();
    let disk = node(&mut graph, format, None, &["file"], true).unwrap();
    disk.write(&[1; 4096], 0, false).unwrap();
    disk.write(&[2; 4096], SIZE - 4096, false).unwrap();
    drop(disk);
    graph.remove(format).unwrap();
    let mut bytes = Vec::new();
    let mut file = file;
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    sound.push((format, bytes.clone()));
    bytes
}

fn changed(mut image: Vec<u8>, mut changes: &[u8]) -> Vec<u8> {
    while let Some((&[a, b, c, len], rest)) = changes.split_first_chunk() {
        let at = u32::from_le_bytes([a, b, c, 0]) as usize;
        let (bytes, rest) = rest.split_at(usize::from(len).min(rest.len()));
        changes = rest;
        if len == 0 {
            // Cut off there.
            image.truncate(at.max(1));
        } else if let Some(room) = image.get_mut(at..at + bytes.len()) {
            room.copy_from_slice(bytes);
        }
    }
    image
}

fn mend_sums(image: &mut [u8]) {
    let end = image.len().saturating_sub(512);
    let header = image.get(16..24).map_or(0, |field| u64::from_be_bytes(field.try_into().unwrap()));
    for (at, len, sum_at) in [(0, 512, 64), (end, 512, 64), (usize::try_from(header).unwrap_or(0), 1024, 36)] {
        let Some(structure) = at.checked_add(len).and_then(|stop| image.get_mut(at..stop)) else { continue };
        structure[sum_at..sum_at + 4].fill(0);
        let sum = !structure.iter().fold(0u32, |sum, &byte| sum.wrapping_add(byte.into()));
        structure[sum_at..sum_at + 4].copy_from_slice(&sum.to_be_bytes());
    }
}
