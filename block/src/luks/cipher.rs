// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Encryption of sectors: AES in the modes XTS (IEEE 1619) and CBC, each sector with an initialisation vector made of its number.
//!
//! Blocks go to AES many at a time: the processor's own instructions work on several at once, where it has some.

use aes::cipher::array::Array;
use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes128, Aes192, Aes256, Block};
use sha2::{Digest, Sha256};
use zeroize::{Zeroize, Zeroizing};

use crate::{Error, Result};

/// Bytes of a sector, the unit that has an initialisation vector of its own.
pub const SECTOR: usize = 512;

/// Sectors whose tweaks are encrypted together.
const TWEAKS: usize = 8;

/// How blocks of a sector depend on each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// IEEE 1619. The key is twice as long: one half for the tweaks.
    Xts,
    /// Each block depends on the one before it.
    Cbc,
}

/// How a sector's number becomes its initialisation vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IvGenerator {
    /// The number's low 32 bits.
    Plain,
    /// All 64 bits.
    Plain64,
    /// The number encrypted with the key's SHA-256 hash as key.
    EssivSha256,
}

/// What a volume is encrypted with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CipherSpec {
    /// Bytes of an AES key: 16, 24 or 32.
    pub aes_bytes: usize,
    /// The mode.
    pub mode: Mode,
    /// The initialisation vectors.
    pub iv: IvGenerator,
}

impl CipherSpec {
    /// What a LUKS header names: `aes`, `xts-plain64`, 64 bytes of key.
    ///
    /// # Errors
    /// `Unsupported`, with what was found, for anything but AES in XTS with plain or plain64 and in CBC with those or
    /// essiv:sha256; `Corrupt` for a number of bytes that is no key's.
    pub fn from_header(name: &str, mode: &str, key_bytes: u32) -> Result<CipherSpec> {
        let known = match mode {
            "xts-plain64" => Some((Mode::Xts, IvGenerator::Plain64)),
            "xts-plain" => Some((Mode::Xts, IvGenerator::Plain)),
            "cbc-plain64" => Some((Mode::Cbc, IvGenerator::Plain64)),
            "cbc-plain" => Some((Mode::Cbc, IvGenerator::Plain)),
            "cbc-essiv:sha256" => Some((Mode::Cbc, IvGenerator::EssivSha256)),
            _ => None,
        };
        let (Some((mode, iv)), "aes") = (known, name) else {
            return Err(Error::unsupported(format!(
                "the volume is encrypted with '{}-{}'; supported are aes-xts-plain64, aes-xts-plain, aes-cbc-plain64, \
                 aes-cbc-plain and aes-cbc-essiv:sha256",
                name.escape_debug(),
                mode.escape_debug()
            )));
        };
        let aes_bytes = match (mode, key_bytes) {
            (Mode::Xts, 32) | (Mode::Cbc, 16) => 16,
            (Mode::Xts, 48) | (Mode::Cbc, 24) => 24,
            (Mode::Xts, 64) | (Mode::Cbc, 32) => 32,
            _ => return Err(Error::corrupt(format!("Cipher aes in this mode has no keys of {key_bytes} bytes"))),
        };
        Ok(CipherSpec { aes_bytes, mode, iv })
    }

    /// What QEMU's options of creation name: `cipher-alg`, `cipher-mode`, `ivgen-alg`, `ivgen-hash-alg`.
    ///
    /// # Errors
    /// `Unsupported`, with what was asked.
    pub fn from_options(algorithm: &str, mode: &str, ivgen: &str, ivgen_hash: Option<&str>) -> Result<CipherSpec> {
        let refused = |option: &str, value: &str| {
            Err(Error::unsupported(format!("{option} '{}' is not supported", value.escape_debug())))
        };
        let aes_bytes = match algorithm {
            "aes-128" => 16,
            "aes-192" => 24,
            "aes-256" => 32,
            other => return refused("cipher-alg", other),
        };
        let mode = match mode {
            "xts" => Mode::Xts,
            "cbc" => Mode::Cbc,
            other => return refused("cipher-mode", other),
        };
        let iv = match (ivgen, ivgen_hash, mode) {
            ("plain", None, _) => IvGenerator::Plain,
            ("plain64", None, _) => IvGenerator::Plain64,
            ("essiv", Some("sha256"), Mode::Cbc) => IvGenerator::EssivSha256,
            ("essiv", Some("sha256") | None, _) => return refused("ivgen-alg with this mode or without a hash", ivgen),
            ("essiv" | "plain" | "plain64", Some(hash), _) => return refused("ivgen-hash-alg", hash),
            (other, _, _) => return refused("ivgen-alg", other),
        };
        Ok(CipherSpec { aes_bytes, mode, iv })
    }

    /// Bytes of the whole key.
    pub fn key_bytes(self) -> usize {
        match self.mode {
            Mode::Xts => 2 * self.aes_bytes,
            Mode::Cbc => self.aes_bytes,
        }
    }

    /// The mode as a LUKS header names it.
    pub fn mode_name(self) -> &'static str {
        match (self.mode, self.iv) {
            (Mode::Xts, IvGenerator::Plain) => "xts-plain",
            (Mode::Xts, _) => "xts-plain64",
            (Mode::Cbc, IvGenerator::Plain) => "cbc-plain",
            (Mode::Cbc, IvGenerator::Plain64) => "cbc-plain64",
            (Mode::Cbc, IvGenerator::EssivSha256) => "cbc-essiv:sha256",
        }
    }
}

/// A key at work. It is wiped when the value goes.
pub struct Cipher(Box<dyn Sectors>);

impl Cipher {
    /// The cipher for a key of [`CipherSpec::key_bytes`].
    ///
    /// # Errors
    /// `Corrupt` for a key of another length.
    pub fn new(spec: CipherSpec, key: &[u8]) -> Result<Cipher> {
        match spec.aes_bytes {
            16 => Cipher::with::<Aes128>(spec, key),
            24 => Cipher::with::<Aes192>(spec, key),
            _ => Cipher::with::<Aes256>(spec, key),
        }
    }

    fn with<A: Aes>(spec: CipherSpec, key: &[u8]) -> Result<Cipher> {
        let aes = |key: &[u8]| {
            A::new_from_slice(key).map_err(|_| Error::corrupt(format!("a key of {} bytes does not fit", key.len())))
        };
        let iv = match spec.iv {
            IvGenerator::Plain => Iv::Plain,
            IvGenerator::Plain64 => Iv::Plain64,
            IvGenerator::EssivSha256 => {
                let mut hash = Sha256::digest(key);
                let essiv = Aes256::new(&hash);
                hash.zeroize();
                Iv::Essiv(Box::new(essiv))
            }
        };
        Ok(Cipher(match spec.mode {
            Mode::Xts => {
                let (data, tweak) = key.split_at(spec.aes_bytes.min(key.len()));
                Box::new(Xts { data: aes(data)?, tweak: aes(tweak)?, iv })
            }
            Mode::Cbc => Box::new(Cbc { data: aes(key)?, iv }),
        }))
    }

    /// Encrypts whole sectors, the first of which has the number `sector`. Bytes after the last whole sector stay as they are.
    pub fn encrypt(&self, sector: u64, buf: &mut [u8]) {
        self.0.encrypt(sector, buf.as_chunks_mut().0);
    }

    /// The reverse of [`Cipher::encrypt`].
    pub fn decrypt(&self, sector: u64, buf: &mut [u8]) {
        self.0.decrypt(sector, buf.as_chunks_mut().0);
    }
}

impl std::fmt::Debug for Cipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Cipher")
    }
}

trait Sectors: Send + Sync {
    fn encrypt(&self, first: u64, sectors: &mut [[u8; SECTOR]]);
    fn decrypt(&self, first: u64, sectors: &mut [[u8; SECTOR]]);
}

trait Aes: KeyInit + BlockCipherEncrypt<BlockSize = Sixteen> + BlockCipherDecrypt + Send + Sync + 'static {}

type Sixteen = aes::cipher::array::sizes::U16;

impl Aes for Aes128 {}
impl Aes for Aes192 {}
impl Aes for Aes256 {}

enum Iv {
    Plain,
    Plain64,
    Essiv(Box<Aes256>),
}

impl Iv {
    fn of(&self, sector: u64) -> Block {
        let number = if matches!(self, Iv::Plain) { sector & u64::from(u32::MAX) } else { sector };
        let mut iv = Array(u128::from(number).to_le_bytes());
        if let Iv::Essiv(aes) = self {
            aes.encrypt_block(&mut iv);
        }
        iv
    }
}

struct Xts<A> {
    data: A,
    tweak: A,
    iv: Iv,
}

impl<A: Aes> Xts<A> {
    /// Runs `work` between the two times that the tweaks are added to a sector's blocks.
    fn each(&self, first: u64, sectors: &mut [[u8; SECTOR]], work: impl Fn(&mut [Block])) {
        let mut number = first;
        for run in sectors.chunks_mut(TWEAKS) {
            let mut starts = [Block::default(); TWEAKS];
            for start in &mut starts {
                *start = self.iv.of(number);
                number = number.wrapping_add(1);
            }
            self.tweak.encrypt_blocks(&mut starts);
            for (sector, start) in run.iter_mut().zip(starts) {
                let mut tweaks = [0u128; SECTOR / 16];
                let mut tweak = u128::from_le_bytes(start.0);
                for slot in &mut tweaks {
                    *slot = tweak;
                    // Times x in GF(2^128).
                    tweak = tweak << 1 ^ ((tweak >> 127) * 0x87);
                }
                let blocks = sector.as_chunks_mut::<16>().0;
                add(blocks, &tweaks);
                work(Array::cast_slice_from_core_mut(blocks));
                add(blocks, &tweaks);
            }
        }
    }
}

fn add(blocks: &mut [[u8; 16]], tweaks: &[u128]) {
    for (block, tweak) in blocks.iter_mut().zip(tweaks) {
        *block = (u128::from_ne_bytes(*block) ^ tweak.to_le()).to_ne_bytes();
    }
}

impl<A: Aes> Sectors for Xts<A>
where
    A: BlockCipherDecrypt<BlockSize = Sixteen>,
{
    fn encrypt(&self, first: u64, sectors: &mut [[u8; SECTOR]]) {
        self.each(first, sectors, |blocks| self.data.encrypt_blocks(blocks));
    }

    fn decrypt(&self, first: u64, sectors: &mut [[u8; SECTOR]]) {
        self.each(first, sectors, |blocks| self.data.decrypt_blocks(blocks));
    }
}

struct Cbc<A> {
    data: A,
    iv: Iv,
}

impl<A: Aes> Sectors for Cbc<A> {
    fn encrypt(&self, first: u64, sectors: &mut [[u8; SECTOR]]) {
        for (number, sector) in (first..).zip(sectors) {
            let mut before = self.iv.of(number);
            for block in Array::cast_slice_from_core_mut(sector.as_chunks_mut::<16>().0) {
                xor(block, &before);
                self.data.encrypt_block(block);
                before = *block;
            }
        }
    }

    fn decrypt(&self, first: u64, sectors: &mut [[u8; SECTOR]]) {
        for (number, sector) in (first..).zip(sectors) {
            // Every block but the first is added to what stands before it, still encrypted.
            let stored = Zeroizing::new(*sector);
            let blocks: &mut [Block] = Array::cast_slice_from_core_mut(sector.as_chunks_mut::<16>().0);
            self.data.decrypt_blocks(blocks);
            let mut before = self.iv.of(number);
            for (block, stored) in blocks.iter_mut().zip(stored.as_chunks::<16>().0) {
                xor(block, &before);
                before = Array(*stored);
            }
        }
    }
}

fn xor(block: &mut Block, other: &Block) {
    for (byte, other) in block.iter_mut().zip(other) {
        *byte ^= other;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn spec(aes_bytes: usize, mode: Mode, iv: IvGenerator) -> CipherSpec {
        CipherSpec { aes_bytes, mode, iv }
    }

    #[test]
    fn xts_is_that_of_ieee_1619() {
        // Vector 1 of the standard: all zero, of which the first two blocks are the same in any longer unit.
        let cipher = Cipher::new(spec(16, Mode::Xts, IvGenerator::Plain64), &[0; 32]).unwrap();
        let mut sector = [0; SECTOR];
        cipher.encrypt(0, &mut sector);
        let expected = 0x917c_f69e_bd68_b2ec_9b9f_e9a3_eadd_a692_u128.to_be_bytes();
        assert_eq!(sector[..16], expected);
        let expected = 0xcd43_d2f5_9598_ed85_8c02_c265_2fbf_922e_u128.to_be_bytes();
        assert_eq!(sector[16..32], expected);
    }

    #[test]
    fn every_cipher_reverses_itself_and_sectors_differ() {
        for mode in [Mode::Xts, Mode::Cbc] {
            for iv in [IvGenerator::Plain, IvGenerator::Plain64, IvGenerator::EssivSha256] {
                for aes_bytes in [16, 24, 32] {
                    let spec = spec(aes_bytes, mode, iv);
                    let key: Vec<u8> = (0..spec.key_bytes()).map(|byte| u8::try_from(byte * 3).unwrap()).collect();
                    let cipher = Cipher::new(spec, &key).unwrap();
                    let mut buf = [0x5a; 19 * SECTOR];
                    cipher.encrypt(5, &mut buf);
                    assert_ne!(buf[..SECTOR], buf[SECTOR..2 * SECTOR]);
                    // One by one, from the last to the first.
                    for sector in (0..19).rev() {
                        cipher.decrypt(5 + sector as u64, &mut buf[sector * SECTOR..][..SECTOR]);
                    }
                    assert_eq!(buf, [0x5a; 19 * SECTOR]);
                }
            }
        }
    }

    #[test]
    fn a_key_of_the_wrong_length_is_an_error() {
        for len in [0, 16, 31, 33, 64] {
            assert!(Cipher::new(spec(16, Mode::Xts, IvGenerator::Plain64), &vec![1; len]).is_err(), "{len}");
        }
    }
}
