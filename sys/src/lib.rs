// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The one crate with `unsafe`: what Linux offers and neither std nor rustix wraps safely.
//!
//! Everything here is a thin function with a safe face. A module stands for one corner of the kernel:
//! [`attempt`] makes calls that a confined process must not be able to make, [`clock`] tells local time to one,
//! [`fd`] takes ownership of inherited descriptors, [`file`] does positioned I/O that may refuse to sleep,
//! [`buffer`] is memory for devices, [`ring`] an io_uring that only reads,
//! [`disk`] asks block devices for their size, [`guest`] reaches memory that a guest shares, [`scatter`] reads files into it,
//! `sigbus` survives its loss, [`memory`] tells the allocator its limits, [`process`] knows who a process is,
//! [`signal`] turns signals into a readable descriptor, [`spawn`] starts a process that sees no other.

pub mod attempt;
pub mod background;
pub mod buffer;
pub mod clock;
pub mod disk;
pub mod fd;
pub mod file;
pub mod guest;
pub mod lock;
pub mod memory;
pub mod process;
pub mod ring;
pub mod scatter;
mod sigbus;
pub mod signal;
pub mod spawn;
