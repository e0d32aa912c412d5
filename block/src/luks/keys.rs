// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From a passphrase to a key and back: PBKDF2 (RFC 8018) and the anti-forensic splitter (LUKS1 On-Disk Format, 2.4), which
//! spreads a key over so much room that no single sector that survives gives it away.

use std::time::{Duration, Instant};

use pbkdf2::pbkdf2_hmac;
use sha1::Sha1;
use sha2::{Digest, Sha256, Sha512};
use zeroize::Zeroizing;

use crate::{Error, Result};

/// The hash that both are built from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hash {
    /// SHA-1.
    Sha1,
    /// SHA-256.
    Sha256,
    /// SHA-512.
    Sha512,
}

impl Hash {
    /// The hash of that name, as LUKS headers and QEMU's `hash-alg` spell it.
    ///
    /// # Errors
    /// `Unsupported`, with the name.
    pub fn named(name: &str) -> Result<Hash> {
        match name {
            "sha1" => Ok(Hash::Sha1),
            "sha256" => Ok(Hash::Sha256),
            "sha512" => Ok(Hash::Sha512),
            other => Err(Error::unsupported(format!(
                "the hash '{}' is not supported; sha1, sha256 and sha512 are",
                other.escape_debug()
            ))),
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Hash::Sha1 => "sha1",
            Hash::Sha256 => "sha256",
            Hash::Sha512 => "sha512",
        }
    }

    fn digest_bytes(self) -> usize {
        match self {
            Hash::Sha1 => 20,
            Hash::Sha256 => 32,
            Hash::Sha512 => 64,
        }
    }

    /// What `iterations` cost for a key of `len` bytes: iterations, times the pieces that the key is made of.
    pub fn work(self, iterations: u32, len: usize) -> u64 {
        u64::from(iterations) * len.div_ceil(self.digest_bytes()) as u64
    }

    /// Fills `key` with what a passphrase gives.
    pub fn derive(self, passphrase: &[u8], salt: &[u8], iterations: u32, key: &mut [u8]) {
        match self {
            Hash::Sha1 => pbkdf2_hmac::<Sha1>(passphrase, salt, iterations, key),
            Hash::Sha256 => pbkdf2_hmac::<Sha256>(passphrase, salt, iterations, key),
            Hash::Sha512 => pbkdf2_hmac::<Sha512>(passphrase, salt, iterations, key),
        }
    }

    /// Iterations that take this machine about `time` for a key of `len` bytes.
    pub fn iterations_in(self, time: Duration, len: usize) -> u64 {
        let mut key = Zeroizing::new(vec![0; len]);
        let mut tried: u32 = 1 << 12;
        loop {
            let start = Instant::now();
            self.derive(b"a passphrase of some length", &[7; 32], tried, &mut key);
            let took = start.elapsed();
            if took >= Duration::from_millis(20) || tried >= 1 << 24 {
                let wanted = u128::from(tried) * time.as_nanos() / took.as_nanos().max(1);
                return u64::try_from(wanted).unwrap_or(u64::MAX);
            }
            tried *= 2;
        }
    }

    /// Makes every bit of a block depend on all of its piece.
    fn diffuse(self, block: &mut [u8]) {
        match self {
            Hash::Sha1 => diffuse::<Sha1>(block),
            Hash::Sha256 => diffuse::<Sha256>(block),
            Hash::Sha512 => diffuse::<Sha512>(block),
        }
    }

    /// Spreads `key` over all of `room`, a multiple of its length, in which everything but the last part is random already.
    pub fn split(self, key: &[u8], room: &mut [u8]) {
        let last = room.len() - key.len();
        let (random, rest) = room.split_at_mut(last);
        let sum = self.sum(random, key.len());
        for (byte, (key, sum)) in rest.iter_mut().zip(key.iter().zip(sum.iter())) {
            *byte = key ^ sum;
        }
    }

    /// The key of `len` bytes that [`Hash::split`] spread.
    pub fn merge(self, room: &[u8], len: usize) -> Zeroizing<Vec<u8>> {
        let (random, rest) = room.split_at(room.len() - len);
        let mut key = self.sum(random, len);
        for (byte, last) in key.iter_mut().zip(rest) {
            *byte ^= last;
        }
        key
    }

    fn sum(self, random: &[u8], len: usize) -> Zeroizing<Vec<u8>> {
        let mut sum = Zeroizing::new(vec![0; len]);
        for block in random.chunks_exact(len) {
            for (byte, add) in sum.iter_mut().zip(block) {
                *byte ^= add;
            }
            self.diffuse(&mut sum);
        }
        sum
    }
}

fn diffuse<D: Digest>(block: &mut [u8]) {
    for (number, piece) in (0u32..).zip(block.chunks_mut(<D as Digest>::output_size())) {
        let hash = D::new().chain_update(number.to_be_bytes()).chain_update(&*piece).finalize();
        piece.copy_from_slice(&hash[..piece.len()]);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_split_can_be_merged() {
        for hash in [Hash::Sha1, Hash::Sha256, Hash::Sha512] {
            for len in [16, 24, 32, 48, 64] {
                let key: Vec<u8> = (0..len).map(|byte| u8::try_from(byte * 3).unwrap()).collect();
                let mut room: Vec<u8> = (0..len * 50).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect();
                hash.split(&key, &mut room);
                assert_eq!(*hash.merge(&room, len), key);
                room[3] ^= 1;
                assert_ne!(*hash.merge(&room, len), key);
            }
        }
    }

    #[test]
    fn pbkdf2_is_that_of_rfc_6070() {
        let mut key = [0; 20];
        Hash::Sha1.derive(b"password", b"salt", 2, &mut key);
        assert_eq!(key[..4], [0xea, 0x6c, 0x01, 0x4d]);
    }
}
