// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The order in which QEMU's objects give their members.
//!
//! The order of members means nothing in JSON. Keeping QEMU's makes transcripts equal byte for byte, and it decides
//! which of two mistakes in one message is told: QEMU keeps members in 512 chains and reports the first it comes upon.

/// The number of the chain that holds `key`.
pub(crate) fn chain(key: &str) -> u32 {
    let length = u32::try_from(key.len()).unwrap_or(u32::MAX);
    let mut sum = 0x238F_13AF_u32.wrapping_mul(length);
    for (i, byte) in key.bytes().enumerate() {
        sum = sum.wrapping_add(u32::from(byte) << (i * 5 % 24));
    }
    sum.wrapping_mul(1_103_515_243).wrapping_add(12345) % 512
}
