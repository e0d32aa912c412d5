// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a disk may show while many clients change it at once: exactly the freedom that NBD's ordering rules leave
//! (proto.md, "Ordering of messages and writes"), and a client to use it.
//!
//! A request takes effect at some moment between its sending and its reply. So a read may show what any change left that
//! began before the read ended, unless another change lay wholly between the end of that one and the beginning of the read.
//! A trim leaves old bytes or zeroes. What was asked over a connection that died may still happen until the server has let
//! go of it. Where nothing is under way, two reads show the same.
//!
//! A format that names new room with the next flush may lose with its daemon what no flush has covered: [`Model::crash`].
#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, dead_code)]

pub mod client;

use std::collections::BTreeSet;

/// Bytes of a sector: requests are multiples of it.
pub const SECTOR: usize = 512;
/// What a change leaves is told from others by words of this many bytes. All of them tell; none is whole for sure.
pub const WORD: usize = 8;

/// A moment; later ones are greater.
pub type Moment = u64;

/// A sector's content, word by word.
type Words = [u64; SECTOR / WORD];

/// Something that a sector may hold.
#[derive(Clone, Debug)]
struct Candidate {
    content: Content,
    began: Moment,
    /// `None` while it is under way.
    ended: Option<Moment>,
    /// When a change had ended that lay wholly behind this one.
    superseded: Option<Moment>,
}

#[derive(Clone, Debug)]
enum Content {
    /// The same word throughout; 0 is zeroes.
    Stamp(u64),
    /// Zeroes, or what was there.
    Trimmed,
    /// What a read has shown while nothing was under way.
    Known(Box<Words>),
}

impl Content {
    /// What it puts at a word; what a trim leaves alone is another's.
    fn word(&self, at: usize) -> u64 {
        match self {
            Content::Stamp(word) => *word,
            Content::Trimmed => 0,
            Content::Known(words) => words[at],
        }
    }
}

/// What a request does to its sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The same word throughout; 0 is zeroes.
    Stamp(u64),
    /// Zeroes, or nothing.
    Trim,
}

/// A request that is under way.
#[derive(Clone, Copy, Debug)]
pub struct UnderWay {
    pub began: Moment,
    pub first: usize,
    pub count: usize,
}

/// All sectors of a disk.
pub struct Model {
    sectors: Vec<Vec<Candidate>>,
    /// What was overwritten, or was not what a read has shown, until a flush has begun after that.
    buried: Vec<Vec<Candidate>>,
    now: Moment,
    under_way: BTreeSet<Moment>,
}

impl Model {
    /// A disk of zeroes.
    pub fn zeroes(sectors: usize) -> Model {
        let zeroes = Candidate { content: Content::Stamp(0), began: 0, ended: Some(0), superseded: None };
        let buried = vec![Vec::new(); sectors];
        Model { sectors: vec![vec![zeroes]; sectors], buried, now: 1, under_way: BTreeSet::new() }
    }

    pub fn sectors(&self) -> usize {
        self.sectors.len()
    }

    fn tick(&mut self) -> Moment {
        self.now += 1;
        self.now
    }

    /// A request is about to be sent: a read, or a change.
    pub fn begin(&mut self, first: usize, count: usize, change: Option<Change>) -> UnderWay {
        let began = self.tick();
        self.under_way.insert(began);
        if let Some(change) = change {
            let content = match change {
                Change::Stamp(word) => Content::Stamp(word),
                Change::Trim => Content::Trimmed,
            };
            for sector in &mut self.sectors[first..first + count] {
                sector.push(Candidate { content: content.clone(), began, ended: None, superseded: None });
            }
        }
        UnderWay { began, first, count }
    }

    /// A change has been answered.
    pub fn end_change(&mut self, request: UnderWay) {
        let now = self.tick();
        self.under_way.remove(&request.began);
        let oldest = self.under_way.first().copied().unwrap_or(now);
        for number in request.first..request.first + request.count {
            let sector = &mut self.sectors[number];
            let this = sector.iter_mut().find(|candidate| candidate.began == request.began).unwrap();
            this.ended = Some(now);
            if !matches!(this.content, Content::Trimmed) {
                for older in sector.iter_mut() {
                    if older.ended.is_some_and(|ended| ended < request.began) {
                        older.superseded.get_or_insert(now);
                    }
                }
            }
            bury(sector, &mut self.buried[number], oldest);
        }
    }

    /// A flush has been answered: what had ended before it began is there for good.
    pub fn end_flush(&mut self, request: UnderWay) {
        self.under_way.remove(&request.began);
        for buried in &mut self.buried {
            buried.retain(|candidate| candidate.superseded.is_none_or(|moment| moment >= request.began));
        }
    }

    /// The server is gone, and with it what no flush has covered: each sector may be what it was before, too.
    pub fn crash(&mut self) {
        self.settle();
        for (sector, buried) in self.sectors.iter_mut().zip(&mut self.buried) {
            sector.append(buried);
            sector.iter_mut().for_each(|candidate| candidate.superseded = None);
        }
    }

    /// A read has been answered. The first sector that holds what it must not, if there is one, and why.
    pub fn end_read(&mut self, request: UnderWay, bytes: &[u8]) -> Result<(), String> {
        let now = self.tick();
        self.under_way.remove(&request.began);
        let oldest = self.under_way.first().copied().unwrap_or(now);
        assert_eq!(bytes.len(), request.count * SECTOR);
        for (index, bytes) in bytes.chunks(SECTOR).enumerate() {
            let number = request.first + index;
            let mut words: Words = [0; SECTOR / WORD];
            for (word, bytes) in words.iter_mut().zip(bytes.chunks(WORD)) {
                *word = u64::from_be_bytes(bytes.try_into().unwrap());
            }
            let sector = &mut self.sectors[number];
            let visible = |candidate: &&Candidate| candidate.superseded.is_none_or(|moment| moment > request.began);
            let wrong = (0..words.len()).find(|&at| {
                // Byte by byte if need be: where a read meets a write, a processor's copy may be at any byte of a word.
                let whole = sector.iter().filter(visible).any(|candidate| candidate.content.word(at) == words[at]);
                !whole
                    && !(0..WORD).all(|byte| {
                        let differs = |word: u64| (word ^ words[at]) >> (8 * byte) & 0xff != 0;
                        sector.iter().filter(visible).any(|candidate| !differs(candidate.content.word(at)))
                    })
            });
            if let Some(at) = wrong {
                return Err(format!(
                    "sector {number}, word {at} is {:#x}; read from {} to {now}; allowed: {sector:?}",
                    words[at], request.began
                ));
            }
            // Nothing was under way here from before the read began: what it shows is what there has been since.
            if sector.iter().all(|candidate| candidate.ended.is_some_and(|ended| ended < request.began)) {
                let (content, at) = (Content::Known(Box::new(words)), request.began);
                for older in sector.iter_mut() {
                    older.superseded.get_or_insert(at);
                }
                sector.push(Candidate { content, began: at, ended: Some(at), superseded: None });
                bury(sector, &mut self.buried[number], oldest);
            }
        }
        Ok(())
    }

    /// The connection died before the answer came. A change may happen yet.
    pub fn lose(&mut self, request: UnderWay) {
        self.under_way.remove(&request.began);
    }

    /// The server has let go of every connection that died: what has not happened never will.
    pub fn settle(&mut self) {
        let now = self.tick();
        assert!(self.under_way.is_empty());
        for candidate in self.sectors.iter_mut().flatten() {
            candidate.ended.get_or_insert(now);
        }
    }
}

/// Takes out what no read that is under way may see, the oldest of which began at `oldest`.
fn bury(sector: &mut Vec<Candidate>, buried: &mut Vec<Candidate>, oldest: Moment) {
    buried.extend(sector.extract_if(.., |candidate| candidate.superseded.is_some_and(|moment| moment < oldest)));
}

#[test]
fn the_model_itself_tells_what_a_crash_may_lose() {
    let stamped = |word: u64| word.to_be_bytes().repeat(SECTOR / WORD);
    let mut model = Model::zeroes(1);
    let write = |model: &mut Model, word| {
        let request = model.begin(0, 1, Some(Change::Stamp(word)));
        model.end_change(request);
    };
    write(&mut model, 1);
    let flush = model.begin(0, 0, None);
    write(&mut model, 2);
    model.end_flush(flush);
    write(&mut model, 3);
    let before = model.begin(0, 1, None);
    assert!(model.end_read(before, &stamped(2)).is_err(), "overwritten, as long as nobody crashes");
    model.crash();
    for (word, may) in [(0, false), (1, true), (2, true), (3, true)] {
        let (sectors, buried) = (model.sectors.clone(), model.buried.clone());
        let mut fork = Model { sectors, buried, now: model.now, under_way: BTreeSet::new() };
        let read = fork.begin(0, 1, None);
        assert_eq!(fork.end_read(read, &stamped(word)).is_ok(), may, "{word}");
        if may {
            let others = 1 + word % 3;
            let read = fork.begin(0, 1, None);
            assert!(fork.end_read(read, &stamped(others)).is_err(), "what a read has shown stays");
        }
    }
}

#[test]
fn the_model_itself_tells_stale_from_fresh() {
    let stamped = |word: u64| word.to_be_bytes().repeat(SECTOR / WORD);
    let mut model = Model::zeroes(1);
    let write = |model: &mut Model, word| {
        let request = model.begin(0, 1, Some(Change::Stamp(word)));
        model.end_change(request);
    };
    write(&mut model, 1);
    let early = model.begin(0, 1, None);
    write(&mut model, 2);
    let late = model.begin(0, 1, None);
    assert!(model.end_read(late, &stamped(1)).is_err(), "overwritten before the read began");
    assert!(model.end_read(early, &stamped(1)).is_ok(), "overwritten while the read was under way");
    let during = model.begin(0, 1, None);
    let third = model.begin(0, 1, Some(Change::Stamp(u64::MAX)));
    let mut torn = stamped(2);
    torn[..WORD / 2].fill(0xff);
    assert!(model.end_read(during, &torn).is_ok(), "half a word of a write that is under way");
    model.end_change(third);
    let after = model.begin(0, 1, None);
    assert!(model.end_read(after, &torn).is_err(), "half a word when the write is done");
    let [a, b] = [3, 4].map(|word| model.begin(0, 1, Some(Change::Stamp(word))));
    model.end_change(a);
    model.end_change(b);
    let read = model.begin(0, 1, None);
    assert!(model.end_read(read, &stamped(3)).is_ok(), "of two at once either may be last");
    let read = model.begin(0, 1, None);
    assert!(model.end_read(read, &stamped(4)).is_err(), "but not both in turn");
    let trim = model.begin(0, 1, Some(Change::Trim));
    model.end_change(trim);
    for word in [0, 3] {
        let (sectors, buried) = (model.sectors.clone(), model.buried.clone());
        let mut fork = Model { sectors, buried, now: model.now, under_way: BTreeSet::new() };
        let read = fork.begin(0, 1, None);
        assert!(fork.end_read(read, &stamped(word)).is_ok(), "trimmed or not");
    }
}
