// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Host files in memory that note what is done to them, fail on demand, and can be seen as a crash would leave them.
//!
//! What a crash may leave: everything that came before a completed flush of its file, and of the rest any choice, sector by
//! sector: each sector of 512 bytes holds any of the versions that were written since, each file has any of the lengths.
//! Nothing here knows of a format.
#![allow(dead_code, clippy::unwrap_used, clippy::cast_possible_truncation, reason = "each test takes what it needs")]

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use block::{Ask, BlockNode, Driver, Mapping, NodeAccess, Preallocation, Prepared, Result, Target, Wait, ZeroFlags};
use rustix::io::Errno;

use super::Random;

pub const SECTOR: usize = 512;

/// What was done to a file.
#[derive(Clone)]
pub enum What {
    Write(u64, Arc<[u8]>),
    /// Zeroes written or a hole punched: first byte and length.
    Zero(u64, u64),
    Resize(u64),
    /// Completed; it covers the events before this index.
    Flush(usize),
}

#[derive(Clone)]
pub struct Event {
    /// Index of the file.
    pub file: usize,
    pub what: What,
}

/// Operations to fail: `count` from the one numbered `first` on, among those that `kinds` names.
#[derive(Clone, Copy)]
pub struct Fault {
    pub first: u64,
    pub count: u64,
    pub errno: Errno,
    pub reads: bool,
}

#[derive(Default)]
struct Log {
    events: Vec<Event>,
    /// Operations so far, without reads unless the fault is for them.
    operations: u64,
    fault: Option<Fault>,
}

/// One order of events for all files of an image.
#[derive(Default)]
pub struct Journal {
    log: Mutex<Log>,
    /// Whether events are kept.
    silent: AtomicBool,
    /// Whether threads give way around every operation, so that others get in between.
    yielding: AtomicBool,
}

impl Journal {
    pub fn new() -> Arc<Journal> {
        Arc::default()
    }

    /// One that keeps no events.
    pub fn silent() -> Arc<Journal> {
        let journal = Journal::new();
        journal.silent.store(true, Ordering::SeqCst);
        journal
    }

    pub fn set_yielding(&self) {
        self.yielding.store(true, Ordering::SeqCst);
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap()
    }

    /// Events so far: a moment at which a crash may come.
    pub fn now(&self) -> usize {
        self.log().events.len()
    }

    pub fn events(&self) -> Vec<Event> {
        self.log().events.clone()
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        self.log().operations
    }

    /// From now on, operation numbers are counted anew.
    pub fn set_fault(&self, fault: Option<Fault>) {
        let mut log = self.log();
        log.operations = 0;
        log.fault = fault;
    }

    fn give_way(&self) {
        if self.yielding.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
    }

    /// Counts an operation, and fails it if that is wanted.
    fn count(&self, is_read: bool) -> io::Result<()> {
        let mut log = self.log();
        if is_read && !log.fault.is_some_and(|fault| fault.reads) {
            return Ok(());
        }
        let number = log.operations;
        log.operations += 1;
        match log.fault {
            Some(Fault { first, count, errno, .. }) if (first..first.saturating_add(count)).contains(&number) => {
                Err(errno.into())
            }
            _ => Ok(()),
        }
    }
}

/// A host file under a journal, as a node's driver.
struct Recording {
    journal: Arc<Journal>,
    file: usize,
    content: Arc<Mutex<Vec<u8>>>,
}

/// A file of the journal, number `file`, with what it holds at first; and what it holds at any time.
pub fn recorded(journal: &Arc<Journal>, file: usize, content: Vec<u8>) -> (Arc<BlockNode>, Arc<Mutex<Vec<u8>>>) {
    let mut content = content;
    content.resize(content.len().next_multiple_of(SECTOR), 0);
    let content = Arc::new(Mutex::new(content));
    let driver = Recording { journal: Arc::clone(journal), file, content: Arc::clone(&content) };
    let access = NodeAccess { writable: true, unmap: true };
    let name = format!("file{file}");
    (Arc::new(BlockNode::new(name.clone(), "file", name, access, Box::new(driver))), content)
}

impl Recording {
    /// Applies an event and notes it.
    fn happen(&self, what: What) {
        let mut content = self.content.lock().unwrap();
        apply(&mut content, &what);
        if !self.journal.silent.load(Ordering::Relaxed) {
            self.journal.log().events.push(Event { file: self.file, what });
        }
        drop(content);
        self.journal.give_way();
    }
}

fn apply(content: &mut Vec<u8>, what: &What) {
    let reach = |content: &mut Vec<u8>, end: usize| {
        if content.len() < end {
            content.resize(end.next_multiple_of(SECTOR), 0);
        }
    };
    match what {
        What::Write(offset, bytes) => {
            let at = *offset as usize;
            reach(content, at + bytes.len());
            content[at..at + bytes.len()].copy_from_slice(bytes);
        }
        What::Zero(offset, len) => {
            let end = content.len().min((offset + len) as usize);
            if let Some(range) = content.get_mut(*offset as usize..end) {
                range.fill(0);
            }
        }
        What::Resize(len) => content.resize((*len as usize).next_multiple_of(SECTOR), 0),
        What::Flush(_) => {}
    }
}

impl Driver for Recording {
    fn len(&self) -> u64 {
        self.content.lock().unwrap().len() as u64
    }

    fn map(&self, _: u64, len: u64, ask: Ask) -> io::Result<Mapping<'_>> {
        if ask.wait == Wait::Never {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(Mapping::fixed(Target::Computed, len))
    }

    fn read_computed(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.journal.count(true)?;
        let content = self.content.lock().unwrap();
        let at = offset as usize;
        buf.copy_from_slice(&content[at..at + buf.len()]);
        drop(content);
        self.journal.give_way();
        Ok(())
    }

    fn prepare_write(&self, _: u64, len: u64) -> io::Result<Prepared<'_>> {
        Ok(Prepared::in_place(Target::Computed, len))
    }

    fn write_computed(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.journal.give_way();
        if let Err(e) = self.journal.count(false) {
            // A write that fails may have written its start.
            if buf.len() > SECTOR {
                self.happen(What::Write(offset, buf[..SECTOR].into()));
            }
            return Err(e);
        }
        self.happen(What::Write(offset, buf.into()));
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: ZeroFlags) -> io::Result<()> {
        self.journal.count(false)?;
        self.happen(What::Zero(offset, len));
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.journal.count(false)?;
        self.happen(What::Zero(offset, len));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let covers = self.journal.now();
        self.journal.give_way();
        self.journal.count(false)?;
        self.happen(What::Flush(covers));
        Ok(())
    }

    fn grows(&self) -> bool {
        true
    }

    fn resize(&self, len: u64, _: Preallocation) -> Result<()> {
        self.journal.give_way();
        self.journal.count(false).map_err(|e| block::Error::io("set the size of the file", e))?;
        self.happen(What::Resize(len));
        Ok(())
    }
}

/// A moment at which a crash may come.
pub struct Moment<'a> {
    /// Events before it.
    pub at: usize,
    /// The files, by number, with what is on disk for certain.
    certain: Vec<Vec<u8>>,
    /// What came since.
    pending: Vec<&'a Event>,
}

/// Calls `visit` for the moment before each flush of a file that completed, and for the end: what may be left at any other
/// moment may be left at one of these, too.
pub fn moments<'a>(start: &[Vec<u8>], events: &'a [Event], mut visit: impl FnMut(&Moment<'a>)) {
    let mut certain: Vec<Vec<u8>> = start.to_vec();
    for file in &mut certain {
        file.resize(file.len().next_multiple_of(SECTOR), 0);
    }
    let mut pending: Vec<(usize, &Event)> = Vec::new();
    for at in 0..=events.len() {
        let event = events.get(at);
        let Some(Event { file, what: What::Flush(covers) }) = event else {
            match event {
                Some(event) => pending.push((at, event)),
                None => {
                    let pending = pending.iter().map(|(_, event)| *event).collect();
                    visit(&Moment { at, certain: certain.clone(), pending });
                }
            }
            continue;
        };
        let moment = Moment { at, certain, pending: pending.iter().map(|(_, event)| *event).collect() };
        visit(&moment);
        certain = moment.certain;
        pending.retain(|(index, event)| {
            let is_over = event.file == *file && index < covers;
            if is_over {
                apply(&mut certain[*file], &event.what);
            }
            !is_over
        });
    }
}

/// What of the pending events reached the disk.
enum Choice<'a> {
    /// Whole events.
    Events(&'a dyn Fn(usize) -> bool),
    /// Each sector and each length by itself, one in so many.
    Sectors(&'a mut Random, u64),
}

impl Moment<'_> {
    /// Calls `judge` with states that a crash may leave now and a word about each: all subsets of up to `exhaustive` events, or
    /// else none, all, each alone and all but each; then `samples` states torn at random.
    pub fn states(
        &self,
        random: &mut Random,
        exhaustive: usize,
        samples: u64,
        mut judge: impl FnMut(Vec<Vec<u8>>, &str),
    ) {
        let count = self.pending.len();
        let mut whole = |picked: &dyn Fn(usize) -> bool, how: &str| judge(self.state(Choice::Events(picked)), how);
        if count <= exhaustive {
            for subset in 0..1u64 << count {
                whole(&|event| subset >> event & 1 == 1, &format!("events {subset:#b} of {count}"));
            }
        } else {
            whole(&|_| false, "no event");
            whole(&|_| true, "every event");
            // Many events: some of them, spread evenly.
            let stride = count.div_ceil(4 << exhaustive);
            for one in (random.below(stride as u64) as usize..count).step_by(stride) {
                whole(&|event| event == one, &format!("event {one} of {count} alone"));
                whole(&|event| event != one, &format!("all but event {one} of {count}"));
                whole(&|event| event < one, &format!("the first {one} of {count} events"));
            }
        }
        if count > 0 {
            for _ in 0..samples {
                let seed = random.next();
                let one_in = [2, 2, 8, 1 << 32][random.below(4) as usize];
                if one_in == 1 << 32 {
                    let chance = |event: usize| Random(seed ^ ((event as u64 + 1) * 0x9e37_79b9)).below(1000) < 500;
                    judge(self.state(Choice::Events(&chance)), &format!("half of {count} events, seed {seed:#x}"));
                } else {
                    let choice = Choice::Sectors(&mut Random(seed), one_in);
                    judge(self.state(choice), &format!("sectors of {count} events, one in {one_in}, seed {seed:#x}"));
                }
            }
        }
    }

    fn state(&self, mut choice: Choice<'_>) -> Vec<Vec<u8>> {
        let mut files = self.certain.clone();
        let mut lengths: Vec<usize> = files.iter().map(Vec::len).collect();
        // How long the files were at the time.
        let mut reached = lengths.clone();
        for (index, event) in self.pending.iter().enumerate() {
            let mut picked = || match &mut choice {
                Choice::Events(picked) => picked(index),
                Choice::Sectors(random, one_in) => random.below(*one_in) == 0,
            };
            let (content, length) = (&mut files[event.file], &mut lengths[event.file]);
            let now = &mut reached[event.file];
            let end = match &event.what {
                What::Write(offset, bytes) => (*offset as usize + bytes.len()).next_multiple_of(SECTOR).max(*now),
                What::Resize(len) => (*len as usize).next_multiple_of(SECTOR),
                What::Zero(..) | What::Flush(_) => *now,
            };
            // The content of every sector is kept apart from the length, which is chosen by itself.
            if content.len() < end {
                content.resize(end, 0);
            }
            match &event.what {
                What::Write(offset, bytes) => {
                    let (first, past) = (*offset as usize, *offset as usize + bytes.len());
                    let mut at = first;
                    while at < past {
                        let next = ((at / SECTOR + 1) * SECTOR).min(past);
                        if picked() {
                            content[at..next].copy_from_slice(&bytes[at - first..next - first]);
                        }
                        at = next;
                    }
                }
                What::Zero(offset, len) => {
                    let past = content.len().min((offset + len) as usize);
                    let mut at = *offset as usize;
                    while at < past {
                        let next = ((at / SECTOR + 1) * SECTOR).min(past);
                        if picked() {
                            content[at..next].fill(0);
                        }
                        at = next;
                    }
                }
                What::Resize(_) | What::Flush(_) => {}
            }
            if end < *now && picked() {
                content[end..].fill(0);
            }
            if end != *now && picked() {
                *length = end;
            }
            *now = end;
        }
        for (content, length) in files.iter_mut().zip(lengths) {
            content.resize(length, 0);
        }
        files
    }
}
