// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images of the formats that are only read.

use std::os::unix::fs::FileExt;

use block::Graph;

use super::{look_at, memory, node};

const FORMATS: [&str; 7] = ["bochs", "cloop", "dmg", "parallels", "qcow", "qed", "vhdx"];
/// Of a VHDX most is nothing: sectors with their numbers in front.
const SECTOR: usize = 4096;
const SECTORS: usize = 2048;

/// The first byte says which format, the others are the image; see [`vhdx`] for one of them.
pub fn read_only(data: &[u8]) {
    let Some((kind, image)) = data.split_first() else { return };
    let format = FORMATS[usize::from(*kind) % FORMATS.len()];
    let image = if format == "vhdx" { memory(&vhdx(image)) } else { memory(image) };
    assert!(image.read_at(&mut [0], 0).is_ok());
    let mut graph = Graph::new();
    node(&mut graph, "file", Some(image), &[], false).unwrap();
    if let Ok(disk) = node(&mut graph, format, None, &["file"], false) {
        look_at(&disk);
    }
}

/// A number of two bytes and a sector, and so on; a short one is filled with zeroes. Checksums are put right, for a fuzzer does
/// not find them.
fn vhdx(data: &[u8]) -> Vec<u8> {
    let mut image = vec![0; SECTOR * SECTORS];
    for piece in data.chunks(2 + SECTOR) {
        let Some((number, sector)) = piece.split_first_chunk() else { break };
        let at = usize::from(u16::from_le_bytes(*number)) % SECTORS * SECTOR;
        image[at..at + sector.len()].copy_from_slice(sector);
    }
    let mut checked = vec![(64 << 10, SECTOR), (128 << 10, SECTOR), (192 << 10, 64 << 10), (256 << 10, 64 << 10)];
    let entries = (0..image.len()).step_by(SECTOR).filter(|&at| image[at..].starts_with(b"loge"));
    checked.extend(entries.map(|at| (at, u32::from_le_bytes(*image[at + 8..].first_chunk().unwrap()) as usize)));
    for (at, len) in checked {
        let Some(part) = image.get_mut(at..at.saturating_add(len)).filter(|part| part.len() >= 8) else { continue };
        part[4..8].fill(0);
        let sum = !part.iter().fold(!0u32, |sum, &byte| {
            (0..8).fold(sum ^ u32::from(byte), |sum, _| if sum & 1 == 1 { sum >> 1 ^ 0x82f6_3b78 } else { sum >> 1 })
        });
        part[4..8].copy_from_slice(&sum.to_le_bytes());
    }
    image
}
