// SPDX-License-Identifier: Apache-2.0 OR MIT
//! LUKS version 1: volumes that QEMU and cryptsetup make, as the driver `luks` and inside encrypted qcow2 images.
//!
//! [`header`] has the format and its rules, [`keys`] the way from a passphrase to a key, [`cipher`] the encryption of sectors,
//! [`volume`] opens and makes volumes. What is stored at a sector that was never written decrypts to noise: it is data, never
//! a hole.

mod cipher;
pub(crate) mod create;
mod driver;
mod facts;
pub(crate) mod header;
mod keys;
pub(crate) mod options;
mod volume;

pub use cipher::{Cipher, CipherSpec, IvGenerator, Mode, SECTOR};
pub(crate) use driver::ENTRY;
pub(crate) use facts::facts;
pub use header::{HEADER_BYTES, Header, Slot};
pub use keys::Hash;
pub use volume::{FormatOptions, Volume, format, open, read_header};
