// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A foreign image, written to.

use std::os::unix::fs::MetadataExt;

use block::{Graph, Preallocation, Wait, ZeroFlags};

/// Requests that one input may make.
const MOST_REQUESTS: usize = 24;
/// What those can take at most besides the image: a few clusters and tables of 2 MiB each.
const MOST_ROOM: u64 = MOST_REQUESTS as u64 * (10 << 20);

/// A qcow2 image that is opened for writing. Its last byte says how many requests of four bytes stand before it: what to do,
/// where (two bytes, in units of 256 bytes; from the end of the disk if the first bit is set), and how long.
pub fn image_write(data: &[u8]) {
    let Some((&count, rest)) = data.split_last() else { return };
    let tail = (usize::from(count) % MOST_REQUESTS * 4).min(rest.len());
    let (image, requests) = rest.split_at(rest.len() - tail);
    let memory = super::memory(image);
    let mut graph = Graph::new();
    super::node(&mut graph, "file", Some(memory.try_clone().unwrap()), &[], true).unwrap();
    let opened = super::node(&mut graph, "qcow2", None, &["file"], true);
    let Ok(disk) = opened else { return };
    let mut buffer = vec![0; 64 << 10];
    for &[what, high, low, len] in requests.as_chunks::<4>().0 {
        let size = disk.len();
        let at = u64::from(u16::from_be_bytes([high & 0x7f, low])) * 256;
        let at = if high & 0x80 == 0 { at.min(size) } else { size.saturating_sub(at) };
        let len = (u64::from(len) * 128 + 1).min(size - at);
        let bytes = &mut buffer[..usize::try_from(len).unwrap()];
        let durable = what & 0x80 != 0;
        match what % 8 {
            0 | 1 => {
                bytes.fill(what | 1);
                let _ = disk.write(bytes, at, durable);
            }
            2 => {
                let flags = ZeroFlags { may_unmap: what & 0x40 != 0, fast_only: what & 0x20 != 0 };
                let _ = disk.write_zeroes(at, len, flags, durable);
            }
            3 => {
                let _ = disk.discard(at, len);
            }
            4 => {
                let cluster = disk.info().cluster_size.unwrap_or(512).min(64 << 10);
                let start = at / cluster * cluster;
                let bytes = &mut buffer[..usize::try_from(cluster.min(size - start)).unwrap()];
                bytes.fill(what);
                let _ = disk.write_compressed(bytes, start);
            }
            5 => {
                let new = if what & 0x40 == 0 { size.saturating_add(at) } else { at };
                let _ = disk.resize(new.min(size.saturating_add(1 << 24)) / 512 * 512, Preallocation::Off);
            }
            6 => {
                let _ = disk.flush();
            }
            _ => {
                let _ = disk.read(bytes, at, Wait::Allowed);
                let _ = disk.status(at, len.max(1));
            }
        }
    }
    drop(disk);
    drop(graph);
    let taken = memory.metadata().unwrap().blocks() * 512;
    let allowed = (image.len() as u64).next_multiple_of(4096) + MOST_ROOM;
    assert!(taken <= allowed, "an image of {} bytes takes {taken} now", image.len());
}
