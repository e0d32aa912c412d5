// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Unlocking a volume, and making one.

use std::io;
use std::time::Duration;

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::cipher::{Cipher, CipherSpec, IvGenerator, Mode};
use super::header::{HEADER_BYTES, Header, SLOTS, Slot, material_bytes, slot_offset};
use super::keys::Hash;
use crate::{Error, Result};

/// Most work of PBKDF2 that one unlocking does, in iterations times pieces of the key: a quarter of a minute on a slow machine.
/// Whoever asked waits meanwhile, and in a daemon all other commands, too; without an end, a header could keep them for hours.
const MOST_WORK: u64 = 1 << 26;

/// Fewest iterations of a new header.
const FEWEST: u64 = 1000;

/// An unlocked volume.
#[derive(Debug)]
pub struct Volume {
    /// The volume's key at work. The first sector of a LUKS payload has the number 0.
    pub cipher: Cipher,
    /// Facts.
    pub header: Header,
}

/// How a new volume is made: QEMU's options of creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FormatOptions {
    /// `cipher-alg`, `cipher-mode`, `ivgen-alg` and `ivgen-hash-alg`.
    pub cipher: CipherSpec,
    /// `hash-alg`.
    pub hash: Hash,
    /// `iter-time`: what one try of a passphrase is to cost on this machine.
    pub iter_time: Duration,
    /// Whether the payload is in a file of its own.
    pub detached: bool,
}

impl FormatOptions {
    /// Bytes of the header with all key material: where the payload begins, if it is in the same file.
    pub fn header_bytes(&self) -> u64 {
        slot_offset(self.cipher, SLOTS)
    }
}

impl Default for FormatOptions {
    /// As QEMU has it: AES-256 in XTS with plain64, SHA-256, two seconds.
    fn default() -> FormatOptions {
        FormatOptions {
            cipher: CipherSpec { aes_bytes: 32, mode: Mode::Xts, iv: IvGenerator::Plain64 },
            hash: Hash::Sha256,
            iter_time: Duration::from_secs(2),
            detached: false,
        }
    }
}

/// Unlocks the volume whose header and key material stand in the first `room` bytes of what `read_at` reads: bytes from an
/// offset, zeroes past the end.
///
/// # Errors
/// `Invalid` for a passphrase that opens no slot, in QEMU's words; those of the header; `Unsupported` if trying would take too
/// long; `Io` from `read_at`.
pub fn open(read_at: &dyn Fn(u64, &mut [u8]) -> io::Result<()>, room: u64, passphrase: &[u8]) -> Result<Volume> {
    let header = read_header(read_at, room)?;
    let mut work = 0;
    for slot in header.slots.iter().flatten() {
        let key_bytes = header.cipher.key_bytes();
        work += header.hash.work(slot.iterations, key_bytes) + header.hash.work(header.iterations, 20);
        if work > MOST_WORK {
            return Err(Error::unsupported(format!(
                "unlocking would take {work} rounds of PBKDF2 ({} iterations in one keyslot), and at most {MOST_WORK} are done, \
                 because everybody waits meanwhile; give the passphrase fewer iterations (cryptsetup luksChangeKey --iter-time \
                 1000) or a keyslot in front of the others",
                slot.iterations
            )));
        }
        if let Some(key) = try_slot(read_at, &header, slot, passphrase)? {
            return Ok(Volume { cipher: Cipher::new(header.cipher, &key)?, header });
        }
    }
    Err(Error::invalid("Invalid password, cannot unlock any keyslot"))
}

/// The header alone, checked.
///
/// # Errors
/// As [`open`].
pub fn read_header(read_at: &dyn Fn(u64, &mut [u8]) -> io::Result<()>, room: u64) -> Result<Header> {
    let mut bytes = [0; HEADER_BYTES];
    read_at(0, &mut bytes).map_err(|e| Error::io("read the LUKS header", e))?;
    Header::parse(&bytes, room)
}

/// The volume's key, if the passphrase is the slot's.
fn try_slot(
    read_at: &dyn Fn(u64, &mut [u8]) -> io::Result<()>,
    header: &Header,
    slot: &Slot,
    passphrase: &[u8],
) -> Result<Option<Zeroizing<Vec<u8>>>> {
    let Header { cipher, hash, .. } = *header;
    let mut slot_key = Zeroizing::new(vec![0; cipher.key_bytes()]);
    hash.derive(passphrase, &slot.salt, slot.iterations, &mut slot_key);
    let len = header.material_bytes();
    // At most 256,000 bytes.
    let mut material = Zeroizing::new(vec![0; len.next_multiple_of(super::SECTOR)]);
    read_at(slot.offset, &mut material).map_err(|e| Error::io("read the key material", e))?;
    Cipher::new(cipher, &slot_key)?.decrypt(0, &mut material);
    let key = hash.merge(&material[..len], cipher.key_bytes());
    let mut digest = [0; 20];
    hash.derive(&key, &header.salt, header.iterations, &mut digest);
    Ok(bool::from(digest.ct_eq(&header.digest)).then_some(key))
}

/// A new volume that `passphrase` opens, in slot 0: what to write at the start of the file, up to the payload, and the volume.
///
/// # Errors
/// `Io` if the host has no random bytes.
pub fn format(options: &FormatOptions, passphrase: &[u8]) -> Result<(Vec<u8>, Volume)> {
    let FormatOptions { cipher, hash, iter_time, detached } = *options;
    let end = options.header_bytes();
    let key = random(cipher.key_bytes())?;
    let limit = MOST_WORK / 2 / hash.work(1, cipher.key_bytes());
    let iterations = hash.iterations_in(iter_time, cipher.key_bytes()).clamp(FEWEST, limit);
    let bounded = |iterations: u64| u32::try_from(iterations).unwrap_or(u32::MAX);
    let mut header = Header {
        cipher,
        hash,
        payload: if detached { 0 } else { end },
        digest: [0; 20],
        salt: random_array()?,
        iterations: bounded((iterations / 8).max(FEWEST)),
        uuid: uuid(random_array()?),
        slots: [None; SLOTS],
    };
    let slot = Slot { iterations: bounded(iterations), salt: random_array()?, offset: slot_offset(cipher, 0) };
    header.slots[0] = Some(slot);
    hash.derive(&key, &header.salt, header.iterations, &mut header.digest);

    let mut slot_key = Zeroizing::new(vec![0; cipher.key_bytes()]);
    hash.derive(passphrase, &slot.salt, slot.iterations, &mut slot_key);
    let len = material_bytes(cipher);
    let mut material = random(len)?;
    hash.split(&key, &mut material);
    material.resize(len.next_multiple_of(super::SECTOR), 0);
    Cipher::new(cipher, &slot_key)?.encrypt(0, &mut material);

    // About 2 MiB.
    let mut bytes = vec![0; usize::try_from(end).unwrap_or(0)];
    bytes[..HEADER_BYTES].copy_from_slice(&header.to_bytes());
    let at = usize::try_from(slot.offset).unwrap_or(0);
    bytes[at..at + material.len()].copy_from_slice(&material);
    Ok((bytes, Volume { cipher: Cipher::new(cipher, &key)?, header }))
}

fn random(len: usize) -> Result<Zeroizing<Vec<u8>>> {
    // Sectors more, so that growing to whole ones moves nothing that must be wiped.
    let mut bytes = Zeroizing::new(Vec::with_capacity(len.next_multiple_of(super::SECTOR)));
    bytes.resize(len, 0);
    fill_random(&mut bytes)?;
    Ok(bytes)
}

fn random_array<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    fill_random(&mut bytes)?;
    Ok(bytes)
}

fn fill_random(mut buf: &mut [u8]) -> Result<()> {
    while !buf.is_empty() {
        let got = rustix::rand::getrandom(&mut *buf, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| Error::io("get random bytes", e.into()))?;
        buf = buf.split_at_mut(got).1;
    }
    Ok(())
}

/// A random UUID (RFC 9562, version 4).
fn uuid(bytes: [u8; 16]) -> String {
    let number = u128::from_be_bytes(bytes) & !(0xf << 76) & !(0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let digits = format!("{number:032x}");
    [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-")
}
