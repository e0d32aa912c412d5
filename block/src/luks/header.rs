// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The header of LUKS version 1 and every rule by which one is refused (LUKS1 On-Disk Format, 2.1 and 2.2). Numbers are
//! big-endian, offsets in the header are sectors of 512 bytes.
//!
//! ```text
//!   0 "LUKS\xba\xbe"      72 hash, 32 bytes         132 salt of the digest, 32 bytes
//!   6 u16 version, 1     104 u32 payload offset     164 u32 its iterations
//!   8 cipher, 32 bytes   108 u32 bytes of the key   168 UUID, 40 bytes
//!  40 mode, 32 bytes     112 digest of the key, 20  208 eight key slots of 48 bytes:
//!     0 u32 state    4 u32 iterations    8 salt, 32 bytes    40 u32 offset of key material    44 u32 stripes
//! ```

use super::cipher::{CipherSpec, SECTOR};
use super::keys::Hash;
use crate::{Error, Result};

/// First six bytes, of every version.
pub const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";

/// Bytes in the header.
pub const HEADER_BYTES: usize = 592;
/// Key slots in the header.
pub const SLOTS: usize = 8;
/// Parts that key material is split into: the one number that is in use.
pub const STRIPES: u32 = 4000;

const ENABLED: u32 = 0x00ac_71f3;
const DISABLED: u32 = 0x0000_dead;

/// A checked header: keys have the length that the cipher wants, key material lies behind the header and before the payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the payload and the key material are encrypted with.
    pub cipher: CipherSpec,
    /// For PBKDF2 and the splitter.
    pub hash: Hash,
    /// Where the payload begins, in bytes. 0 says that the header is not in the same file.
    pub payload: u64,
    /// By which the right key is known.
    pub digest: [u8; 20],
    /// Of the digest.
    pub salt: [u8; 32],
    /// Of the digest; at least 1.
    pub iterations: u32,
    /// Untrusted text.
    pub uuid: String,
    /// `None` for a slot that is not in use.
    pub slots: [Option<Slot>; SLOTS],
}

/// A key slot that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Of PBKDF2; at least 1.
    pub iterations: u32,
    /// Of PBKDF2.
    pub salt: [u8; 32],
    /// Where its key material is, in bytes.
    pub offset: u64,
}

impl Header {
    /// Reads a header that stands with its key material in the first `room` bytes.
    ///
    /// # Errors
    /// `Corrupt` for what breaks the format, `Unsupported` for what this version cannot do, with what was found.
    pub fn parse(bytes: &[u8; HEADER_BYTES], room: u64) -> Result<Header> {
        if !bytes.starts_with(&MAGIC) {
            return Err(Error::corrupt("Volume is not in LUKS format"));
        }
        let version = u16::from_be_bytes([bytes[6], bytes[7]]);
        if version != 1 {
            return Err(Error::unsupported(format!(
                "LUKS version {version} is not supported; version 1 is (cryptsetup luksFormat --type luks1)"
            )));
        }
        let cipher = CipherSpec::from_header(text(bytes, 8, 32)?, text(bytes, 40, 32)?, u32_at(bytes, 108))?;
        let mut header = Header {
            cipher,
            hash: Hash::named(text(bytes, 72, 32)?)?,
            payload: sectors(u32_at(bytes, 104)),
            digest: array(bytes, 112),
            salt: array(bytes, 132),
            iterations: u32_at(bytes, 164),
            uuid: text(bytes, 168, 40)?.to_owned(),
            slots: [None; SLOTS],
        };
        if header.iterations == 0 {
            return Err(Error::corrupt("LUKS key digest has no iterations"));
        }
        for (number, slot) in header.slots.iter_mut().enumerate() {
            *slot = Slot::parse(bytes, number)?;
        }
        header.check_places(room)?;
        Ok(header)
    }

    /// The header as it stands on disk.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let in_sectors = |offset: u64| u32::try_from(offset / SECTOR as u64).unwrap_or(u32::MAX).to_be_bytes();
        put(0, &MAGIC);
        put(6, &1u16.to_be_bytes());
        put(8, b"aes");
        put(40, self.cipher.mode_name().as_bytes());
        put(72, self.hash.name().as_bytes());
        put(104, &in_sectors(self.payload));
        put(108, &u32::try_from(self.cipher.key_bytes()).unwrap_or(0).to_be_bytes());
        put(112, &self.digest);
        put(132, &self.salt);
        put(164, &self.iterations.to_be_bytes());
        put(168, &self.uuid.as_bytes()[..self.uuid.len().min(39)]);
        for (number, slot) in self.slots.iter().enumerate() {
            let at = 208 + 48 * number;
            put(at, &if slot.is_some() { ENABLED } else { DISABLED }.to_be_bytes());
            if let Some(slot) = slot {
                put(at + 4, &slot.iterations.to_be_bytes());
                put(at + 8, &slot.salt);
            }
            put(at + 40, &in_sectors(slot.map_or_else(|| slot_offset(self.cipher, number), |slot| slot.offset)));
            put(at + 44, &STRIPES.to_be_bytes());
        }
        bytes
    }

    /// Bytes of a slot's key material.
    pub fn material_bytes(&self) -> usize {
        material_bytes(self.cipher)
    }

    /// Key material overlaps neither the header, nor other key material, nor the payload, and all of it is there.
    fn check_places(&self, room: u64) -> Result<()> {
        let end = if self.payload == 0 { room } else { self.payload.min(room) };
        let len = (self.material_bytes() as u64).next_multiple_of(SECTOR as u64);
        let mut taken = vec![(0, HEADER_BYTES as u64, "the header".to_owned())];
        for (number, slot) in self.slots.iter().enumerate() {
            let Some(Slot { offset, .. }) = *slot else { continue };
            // At most 2^41 and a little.
            let range = (offset, offset + len, format!("keyslot {number}"));
            if range.1 > end {
                return Err(Error::corrupt(format!(
                    "Keyslot {number} ends at {}, but only {end} bytes are there for key material",
                    range.1
                )));
            }
            if let Some((_, _, other)) = taken.iter().find(|(start, end, _)| range.0 < *end && *start < range.1) {
                return Err(Error::corrupt(format!("Keyslot {number} is overlapping with {other}")));
            }
            taken.push(range);
        }
        Ok(())
    }
}

impl Slot {
    fn parse(bytes: &[u8; HEADER_BYTES], number: usize) -> Result<Option<Slot>> {
        let at = 208 + 48 * number;
        match u32_at(bytes, at) {
            DISABLED => return Ok(None),
            ENABLED => {}
            other => return Err(Error::corrupt(format!("Keyslot {number} state ({other:#x}) is neither on nor off"))),
        }
        let (iterations, stripes) = (u32_at(bytes, at + 4), u32_at(bytes, at + 44));
        if iterations == 0 {
            return Err(Error::corrupt(format!("Keyslot {number} iteration count is zero")));
        }
        if stripes != STRIPES {
            return Err(Error::corrupt(format!("Keyslot {number} is corrupted (stripes {stripes} != {STRIPES})")));
        }
        Ok(Some(Slot { iterations, salt: array(bytes, at + 8), offset: sectors(u32_at(bytes, at + 40)) }))
    }
}

/// Bytes of a slot's key material.
pub fn material_bytes(cipher: CipherSpec) -> usize {
    cipher.key_bytes() * STRIPES as usize
}

/// Where a new header has a slot's key material, in bytes: each begins at a multiple of 4096, as others have it.
pub fn slot_offset(cipher: CipherSpec, number: usize) -> u64 {
    4096 + (material_bytes(cipher) as u64).next_multiple_of(4096) * number as u64
}

fn sectors(count: u32) -> u64 {
    u64::from(count) * SECTOR as u64
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_be_bytes(array(bytes, at))
}

fn array<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

/// Text with a zero byte at its end.
fn text(bytes: &[u8; HEADER_BYTES], at: usize, len: usize) -> Result<&str> {
    let field = &bytes[at..at + len];
    let end = field.iter().position(|&byte| byte == 0);
    end.and_then(|end| std::str::from_utf8(&field[..end]).ok())
        .ok_or_else(|| Error::corrupt(format!("LUKS header text at {at} has no end or is no text")))
}
