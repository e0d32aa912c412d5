// SPDX-License-Identifier: Apache-2.0 OR MIT
//! vhost-user-blk: a virtio block device for a guest whose memory its VMM shares (virtio 1.3, 5.2; QEMU
//! docs/interop/vhost-user.rst).
//!
//! [`export`] is a device on a listening socket, [`session`] holds the conversation with its front end ([`proto`] has the
//! messages, [`channel`] moves them), and [`queue`] is a thread for each virtqueue. A request's way: [`ring`] takes a chain of
//! descriptors, [`request`] reads what it asks, [`memory`] finds its buffers, and the node moves the data between the host
//! file and the guest's memory without a copy. [`inflight`] is how a restarted daemon knows what was under way.
//!
//! The crates of rust-vmm would have given rings and messages, too. A chain that is broken ends early and silently there,
//! where here it must end the device; in-flight tracking, the size-change message and pieces straight into an I/O vector were
//! to be written anyway. Their front end is what the tests and benchmarks drive this with.

mod channel;
mod completions;
mod config;
mod export;
mod inflight;
mod memory;
mod proto;
mod queue;
mod request;
mod ring;
mod session;

pub use export::{BLOCK_SIZES, Export, MOST_QUEUES, Settings};
