// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the guest's driver reads of the device: features and configuration space (virtio 1.3, 5.2.3 and 5.2.4).

use super::proto::MAX_CONFIG;

/// Bytes of a sector, the unit of capacities and positions whatever the device's block size is.
pub const SECTOR: u64 = 512;
/// Most sectors of a range to discard or to make zeroes: 1 GiB.
pub const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Most ranges in one such request.
pub const MAX_RANGES: u32 = 16;
/// Most data buffers of a request that Linux is asked to keep to; longer chains are served too.
const MAX_SEGMENTS: u32 = 126;
/// Where `writeback` stands.
const WRITEBACK: usize = 32;

/// Feature bits.
pub mod feature {
    /// `seg_max` counts.
    pub const SEG_MAX: u64 = 1 << 2;
    /// The device cannot be written.
    pub const RO: u64 = 1 << 5;
    /// `blk_size` counts.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// There is a cache to flush.
    pub const FLUSH: u64 = 1 << 9;
    /// The guest may switch the cache off.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// Several queues.
    pub const MQ: u64 = 1 << 12;
    /// Discards.
    pub const DISCARD: u64 = 1 << 13;
    /// Writes of zeroes.
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// Tables of descriptors outside the ring's own (2.7.5.3).
    pub const INDIRECT: u64 = 1 << 28;
    /// Notifications by position (2.7.10).
    pub const EVENT_IDX: u64 = 1 << 29;
    /// vhost-user's own: protocol features are to be negotiated.
    pub const PROTOCOL: u64 = 1 << 30;
    /// The modern device.
    pub const VERSION_1: u64 = 1 << 32;
}

/// The facts that features and configuration space follow from.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    /// Size in bytes; what passes the last whole sector cannot be reached.
    pub len: u64,
    /// Bytes of a logical block: a power of two from 512.
    pub block_size: u32,
    /// Queues.
    pub queues: u16,
    /// Whether guests may write.
    pub writable: bool,
    /// Whether they never rest in a cache, and the guest cannot change that.
    pub writethrough: bool,
    /// Whether the guest's writes may rest in a cache until it flushes.
    pub write_back: bool,
}

impl Disk {
    /// The features on offer.
    pub fn features(&self) -> u64 {
        use feature::{
            BLK_SIZE, CONFIG_WCE, DISCARD, EVENT_IDX, FLUSH, INDIRECT, MQ, PROTOCOL, RO, SEG_MAX, VERSION_1,
            WRITE_ZEROES,
        };
        let always = SEG_MAX | BLK_SIZE | FLUSH | INDIRECT | EVENT_IDX | PROTOCOL | VERSION_1;
        let changing = if self.writable { DISCARD | WRITE_ZEROES } else { RO };
        let cache = if self.writethrough { 0 } else { CONFIG_WCE };
        always | changing | cache | if self.queues > 1 { MQ } else { 0 }
    }

    /// `struct virtio_blk_config`, and zeroes to the end of what can be asked for.
    pub fn config(&self) -> [u8; MAX_CONFIG] {
        let mut bytes = [0; MAX_CONFIG];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &(self.len / SECTOR).to_le_bytes());
        put(12, &MAX_SEGMENTS.to_le_bytes());
        put(20, &self.block_size.to_le_bytes());
        put(WRITEBACK, &[u8::from(self.write_back)]);
        put(34, &self.queues.to_le_bytes());
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        put(44, &(self.block_size / 512).to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        // write_zeroes_may_unmap
        put(56, &[1]);
        bytes
    }
}

/// What a write of `bytes` at `offset` of configuration space sets `writeback` to; `None` if it touches anything else.
pub fn written_cache_mode(offset: usize, bytes: &[u8]) -> Option<bool> {
    match bytes {
        [mode] if offset == WRITEBACK => Some(*mode != 0),
        _ => None,
    }
}

/// The payload of the message that writes `writeback`.
pub fn cache_mode_payload(write_back: bool) -> Vec<u8> {
    let head = [u32::try_from(WRITEBACK).unwrap_or(u32::MAX), 1, 0].map(u32::to_ne_bytes);
    let mut payload = head.as_flattened().to_vec();
    payload.push(write_back.into());
    payload
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_space_says_what_the_disk_is() {
        let disk = Disk {
            len: (7 << 30) + 511,
            block_size: 4096,
            queues: 3,
            writable: true,
            writethrough: false,
            write_back: true,
        };
        let config = disk.config();
        assert_eq!(config[..8], (7u64 << 21).to_le_bytes());
        assert_eq!(config[20..24], 4096u32.to_le_bytes());
        assert_eq!((config[32], config[34]), (1, 3));
        assert_ne!(disk.features() & feature::MQ, 0);
        let read_only = Disk { writable: false, queues: 1, ..disk };
        assert_eq!(read_only.features() & (feature::MQ | feature::DISCARD | feature::RO), feature::RO);
    }

    #[test]
    fn only_the_cache_mode_can_be_written() {
        assert_eq!(written_cache_mode(32, &[0]), Some(false));
        assert_eq!(written_cache_mode(32, &[1]), Some(true));
        assert_eq!(written_cache_mode(33, &[1]), None);
        assert_eq!(written_cache_mode(32, &[1, 0]), None);
    }
}
