// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A client that keeps several requests under way and tells the model about each.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use super::{Change, Model, SECTOR, UnderWay, WORD};

/// Numbers that follow from a seed.
pub struct Dice(pub u64);

impl Dice {
    /// A number below `sides`.
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mixed = (self.0 ^ (self.0 >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        (mixed ^ (mixed >> 33)) % sides
    }
}

/// How replies come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    Simple,
    Structured,
    Extended,
}

pub struct Client {
    socket: UnixStream,
    style: Style,
}

struct Waiting {
    request: UnderWay,
    command: u16,
}

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const ZEROES: u16 = 6;

impl Client {
    /// Chooses the export called `disk`.
    pub fn negotiate(mut socket: UnixStream, style: Style) -> io::Result<Client> {
        socket.read_exact(&mut [0; 18])?;
        socket.write_all(&[0, 0, 0, 3])?;
        let asked = match style {
            Style::Simple => None,
            Style::Structured => Some(8u32),
            Style::Extended => Some(11),
        };
        if let Some(option) = asked {
            socket.write_all(&[b"IHAVEOPT", &option.to_be_bytes()[..], &[0; 4]].concat())?;
            option_replies(&mut socket)?;
        }
        socket.write_all(&[&b"IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x04disk"[..], &[0, 0]].concat())?;
        option_replies(&mut socket)?;
        Ok(Client { socket, style })
    }

    /// Sends `count` random requests at once and takes their replies, in any order. An error is the connection's end;
    /// `Ok(Err)` is what the disk must not show.
    pub fn batch(&mut self, model: &Mutex<Model>, dice: &mut Dice, count: usize) -> io::Result<Result<(), String>> {
        let mut waiting = BTreeMap::new();
        let mut bytes = Vec::new();
        {
            let mut model = model.lock().unwrap();
            for cookie in 0..count as u64 {
                let waits = self.random(&mut model, dice, cookie, &mut bytes);
                waiting.insert(cookie, waits);
            }
        }
        let mut outcome = Ok(());
        let done = self.exchange(&bytes, model, &mut waiting, &mut outcome);
        let mut model = model.lock().unwrap();
        for lost in waiting.into_values() {
            model.lose(lost.request);
        }
        done.map(|()| outcome)
    }

    /// Writes bytes and takes the answer.
    #[allow(dead_code, reason = "each test takes what it needs")]
    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        assert_eq!(self.style, Style::Simple);
        let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
        request.extend([0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]);
        request.extend(offset.to_be_bytes());
        request.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        request.extend(data);
        self.socket.write_all(&request)?;
        let mut reply = [0; 16];
        self.socket.read_exact(&mut reply)?;
        assert_eq!(reply[4..8], [0; 4], "a write failed");
        Ok(())
    }

    fn exchange(
        &mut self,
        bytes: &[u8],
        model: &Mutex<Model>,
        waiting: &mut BTreeMap<u64, Waiting>,
        outcome: &mut Result<(), String>,
    ) -> io::Result<()> {
        self.socket.write_all(bytes)?;
        while !waiting.is_empty() {
            let (cookie, data) = self.reply(waiting)?;
            let Waiting { request, command } = waiting.remove(&cookie).unwrap();
            let mut model = model.lock().unwrap();
            match command {
                READ => {
                    let checked = model.end_read(request, &data);
                    if outcome.is_ok() {
                        *outcome = checked;
                    }
                }
                FLUSH => model.end_flush(request),
                _ => model.end_change(request),
            }
        }
        Ok(())
    }

    fn random(&self, model: &mut Model, dice: &mut Dice, cookie: u64, bytes: &mut Vec<u8>) -> Waiting {
        const FUA: u16 = 1;
        const NO_HOLE: u16 = 2;
        const PAYLOAD_LEN: u16 = 32;
        let longest = if dice.roll(8) == 0 { 256 } else { 16 };
        let count = usize::try_from(1 + dice.roll(longest)).unwrap();
        let first = usize::try_from(dice.roll((model.sectors() - count) as u64)).unwrap();
        let command =
            [READ, READ, READ, WRITE, WRITE, WRITE, ZEROES, TRIM, FLUSH][usize::try_from(dice.roll(9)).unwrap()];
        let stamp = dice.roll(u64::MAX) | 1;
        let (first, count) = if command == FLUSH { (0, 0) } else { (first, count) };
        let change = match command {
            WRITE => Some(Change::Stamp(stamp)),
            ZEROES => Some(Change::Stamp(0)),
            TRIM => Some(Change::Trim),
            _ => None,
        };
        let mut flags = if change.is_some() && dice.roll(16) == 0 { FUA } else { 0 };
        if command == ZEROES && dice.roll(2) == 0 {
            flags |= NO_HOLE;
        }
        let request = model.begin(first, count, change);
        let (offset, len) = ((first * SECTOR) as u64, (count * SECTOR) as u64);
        if self.style == Style::Extended {
            flags |= if command == WRITE { PAYLOAD_LEN } else { 0 };
            bytes.extend(0x21e4_1c71u32.to_be_bytes());
        } else {
            bytes.extend(0x2560_9513u32.to_be_bytes());
        }
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        match self.style {
            Style::Extended => bytes.extend(len.to_be_bytes()),
            _ => bytes.extend(u32::try_from(len).unwrap().to_be_bytes()),
        }
        if command == WRITE {
            bytes.extend(stamp.to_be_bytes().repeat(count * SECTOR / WORD));
        }
        Waiting { request, command }
    }

    /// Cookie and data of the next reply; an error number in it is a failure of the test.
    fn reply(&mut self, waiting: &BTreeMap<u64, Waiting>) -> io::Result<(u64, Vec<u8>)> {
        let number = |bytes: &[u8]| bytes.iter().fold(0u64, |number, &byte| number << 8 | u64::from(byte));
        let mut head = [0; 32];
        self.socket.read_exact(&mut head[..16])?;
        let (magic, cookie) = (number(&head[..4]), number(&head[8..16]));
        if magic == 0x6744_6698 {
            assert_eq!(number(&head[4..8]), 0, "request {cookie} failed");
            let Waiting { request, command } = &waiting[&cookie];
            let mut data = vec![0; if *command == READ { request.count * SECTOR } else { 0 }];
            self.socket.read_exact(&mut data)?;
            return Ok((cookie, data));
        }
        let (header, len_at) = match magic {
            0x668e_33ef => (20, 16),
            0x6e8a_278c => (32, 24),
            other => panic!("no reply magic: {other:#x}"),
        };
        self.socket.read_exact(&mut head[16..header])?;
        let kind = number(&head[6..8]);
        let mut data = vec![0; usize::try_from(number(&head[len_at..header])).unwrap()];
        self.socket.read_exact(&mut data)?;
        match kind {
            0 => Ok((cookie, data)),
            1 => Ok((cookie, data.split_off(8))),
            other => panic!("request {cookie} was answered with chunk {other}: {data:?}"),
        }
    }
}

fn option_replies(socket: &mut UnixStream) -> io::Result<()> {
    loop {
        let mut header = [0; 20];
        socket.read_exact(&mut header)?;
        let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
        socket.read_exact(&mut vec![0; word(16) as usize])?;
        match word(12) {
            1 => return Ok(()),
            3 => {}
            error => panic!("an option was answered with {error:#x}"),
        }
    }
}
