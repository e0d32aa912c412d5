// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An NBD client that comes back whenever it is hung up on, asks again what was not answered, and knows what the disk may show:
//! what it last flushed, or anything that it has written since.
#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, dead_code)]

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub const BLOCK: usize = 4096;
const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;

/// What a block may show.
#[derive(Clone, Default)]
struct Known {
    flushed: u8,
    /// Written since, the newest last.
    since: Vec<u8>,
    /// The newest is all that there is: nobody died since it was written.
    certain: bool,
}

pub struct Client {
    server: PathBuf,
    export: String,
    socket: Option<UnixStream>,
    blocks: Vec<Known>,
    random: u64,
    /// From the hang-up to the first answer, each time.
    pub pauses: Vec<Duration>,
    pub answered: u64,
    pub flushes: u64,
}

#[derive(Clone)]
struct Asked {
    command: u16,
    block: usize,
    value: u8,
}

impl Client {
    /// Of a disk of `blocks` zero blocks.
    pub fn new(server: &Path, export: &str, blocks: usize, seed: u64) -> Client {
        let blocks = vec![Known { certain: true, ..Known::default() }; blocks];
        let (server, export) = (server.to_owned(), export.to_owned());
        Client { server, export, socket: None, blocks, random: seed, pauses: Vec::new(), answered: 0, flushes: 0 }
    }

    fn roll(&mut self, sides: usize) -> usize {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.random >> 33).unwrap() % sides
    }

    /// Asks a batch, or a flush, and has every answer in the end, however often it must come back.
    pub fn work(&mut self) {
        let mut open = BTreeMap::new();
        if self.roll(10) == 0 {
            open.insert(0, Asked { command: FLUSH, block: 0, value: 0 });
        } else {
            for cookie in 0..1 + self.roll(8) as u64 {
                let block = self.roll(self.blocks.len());
                if open.values().any(|asked: &Asked| asked.block == block) {
                    continue;
                }
                let command = if self.roll(4) == 0 { READ } else { WRITE };
                let value = u8::try_from(1 + self.roll(255)).unwrap();
                if command == WRITE {
                    self.blocks[block].since.push(value);
                }
                open.insert(cookie, Asked { command, block, value });
            }
        }
        let mut hung_up = None;
        while !open.is_empty() {
            let waiting = open.len();
            let gone = self.exchange(&mut open).is_err();
            if let Some(since) = hung_up.filter(|_| open.len() < waiting) {
                self.pauses.push(Instant::now() - since);
                hung_up = None;
            }
            if gone {
                hung_up = hung_up.or(Some(Instant::now()));
                self.socket = None;
                // What was not flushed may be gone, and what is under way happen again.
                self.blocks.iter_mut().for_each(|block| block.certain &= block.since.is_empty());
            }
        }
    }

    /// Sends what is open and takes what is answered off it.
    fn exchange(&mut self, open: &mut BTreeMap<u64, Asked>) -> io::Result<()> {
        if self.socket.is_none() {
            // Nobody who serves may be there, but who listens always is.
            let mut socket = UnixStream::connect(&self.server).expect("connects wait in the listener's queue");
            negotiate(&mut socket, &self.export)?;
            self.socket = Some(socket);
        }
        let mut socket = self.socket.as_ref().unwrap();
        let mut bytes = Vec::new();
        for (cookie, Asked { command, block, value }) in &*open {
            let len = if *command == FLUSH { 0 } else { BLOCK };
            bytes.extend(0x2560_9513u32.to_be_bytes());
            bytes.extend([0, 0]);
            bytes.extend(command.to_be_bytes());
            bytes.extend(cookie.to_be_bytes());
            bytes.extend(((block * BLOCK) as u64).to_be_bytes());
            bytes.extend(u32::try_from(len).unwrap().to_be_bytes());
            if *command == WRITE {
                bytes.extend([*value; BLOCK]);
            }
        }
        socket.write_all(&bytes)?;
        while !open.is_empty() {
            let mut head = [0; 16];
            socket.read_exact(&mut head)?;
            assert_eq!(head[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], "an error came");
            let cookie = u64::from_be_bytes(head[8..].try_into().unwrap());
            let asked = open[&cookie].clone();
            if asked.command == READ {
                let mut data = [0; BLOCK];
                socket.read_exact(&mut data)?;
                self.check(asked.block, &data);
            }
            open.remove(&cookie);
            self.answered += 1;
            match asked.command {
                WRITE => self.blocks[asked.block].certain = true,
                FLUSH => {
                    self.flushes += 1;
                    for block in &mut self.blocks {
                        block.flushed =
                            if block.certain { block.since.pop().unwrap_or(block.flushed) } else { continue };
                        block.since.clear();
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// A write that was cut short may have torn at any byte.
    fn check(&self, block: usize, data: &[u8]) {
        let Known { flushed, since, certain } = &self.blocks[block];
        let newest = since.last().unwrap_or(flushed);
        for (at, byte) in data.iter().enumerate() {
            let allowed = if *certain { byte == newest } else { byte == flushed || since.contains(byte) };
            assert!(allowed, "byte {at} of block {block} is {byte}; flushed {flushed}, since {since:?}, {certain}");
        }
    }

    /// Looks at every block of what the image holds now.
    pub fn check_all(&self, disk: &[u8]) {
        for (block, data) in disk.chunks(BLOCK).enumerate() {
            self.check(block, data);
        }
    }
}

/// Chooses an export.
fn negotiate(socket: &mut UnixStream, export: &str) -> io::Result<()> {
    socket.read_exact(&mut [0; 18])?;
    let len = u32::try_from(export.len()).unwrap().to_be_bytes();
    socket.write_all(&[&[0, 0, 0, 3], &b"IHAVEOPT"[..], &[0, 0, 0, 1], &len, export.as_bytes()].concat())?;
    socket.read_exact(&mut [0; 10])
}

/// A histogram of times for people: how many were below each bound.
pub fn histogram(title: &str, times: &[Duration]) -> String {
    const BOUNDS: [u64; 10] = [1, 2, 5, 10, 20, 50, 100, 200, 500, u64::MAX];
    let mut sorted = times.to_vec();
    sorted.sort();
    let at = |tenths: usize| sorted.get((sorted.len() * tenths / 10).min(sorted.len().saturating_sub(1)));
    let [least, middle, nine, most] = [0, 5, 9, 10].map(|tenths| at(tenths).copied().unwrap_or_default());
    let mut text = format!(
        "{title}: {} times, at least {least:.1?}, median {middle:.1?}, nine of ten within {nine:.1?}, longest {most:.1?}\n",
        times.len()
    );
    let mut below = 0;
    for bound in BOUNDS {
        let count = sorted.iter().filter(|time| time.as_micros() < u128::from(bound) * 1000).count();
        if count > below {
            let bound = if bound == u64::MAX { "beyond".to_owned() } else { format!("< {bound} ms") };
            text.push_str(&format!("{bound:>10} {:>5} {}\n", count - below, "#".repeat((count - below).min(60))));
        }
        below = count;
    }
    text
}
