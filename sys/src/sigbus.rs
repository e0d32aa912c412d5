// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What happens when shared memory is gone while it is touched: the process goes on.
//!
//! Whoever passed a memory file may shorten it at any time (seals can forbid it, but not every VMM sets them, and huge pages
//! of a file system have none), and then an access to the mapping raises SIGBUS. The handler here looks the address up in the
//! list of guarded ranges, puts empty private memory over the whole range, notes that, and lets the access happen again. An
//! address that nobody guards is a bug like any other and ends the process as before.
//!
//! A handler may interrupt anything, so the list is one of atomics whose entries are never freed, only used again.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

/// An entry of the list. It is free while `start` is [`FREE`], being filled or emptied while it is [`BUSY`].
#[derive(Debug)]
struct Entry {
    start: AtomicUsize,
    len: AtomicUsize,
    fired: AtomicBool,
    next: *const Entry,
}

// SAFETY: `next` is set before the entry is published and never changes; everything else is atomic.
unsafe impl Sync for Entry {}

const FREE: usize = 0;
const BUSY: usize = 1;

static LIST: AtomicPtr<Entry> = AtomicPtr::new(std::ptr::null_mut());
static INSTALL: Once = Once::new();

/// A guarded range.
#[derive(Debug)]
pub struct Guard(&'static Entry);

impl Guard {
    /// Guards `len` bytes from `start`.
    ///
    /// # Safety
    /// The range is one mapping made by the caller and stays mapped until [`Guard::release`]; nothing else is in it, so that
    /// other memory can be put in its place.
    pub unsafe fn new(start: *mut u8, len: usize) -> Guard {
        INSTALL.call_once(install);
        let entry = entries().find(|entry| entry.claim()).unwrap_or_else(Entry::publish);
        entry.fired.store(false, Ordering::Relaxed);
        entry.len.store(len, Ordering::Relaxed);
        entry.start.store(start as usize, Ordering::Release);
        Guard(entry)
    }

    /// Whether memory was missing since it is guarded.
    pub fn has_fired(&self) -> bool {
        self.0.fired.load(Ordering::Acquire)
    }

    /// Guards the range no longer; to be called once, before the range is unmapped.
    pub fn release(&mut self) {
        self.0.start.store(FREE, Ordering::Release);
    }
}

impl Entry {
    fn claim(&self) -> bool {
        self.start.compare_exchange(FREE, BUSY, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// A new entry in the list, claimed.
    fn publish() -> &'static Entry {
        let mut next = LIST.load(Ordering::Acquire);
        let entry = Box::leak(Box::new(Entry {
            start: AtomicUsize::new(BUSY),
            len: AtomicUsize::new(0),
            fired: AtomicBool::new(false),
            next,
        }));
        loop {
            match LIST.compare_exchange(next, entry, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return entry,
                Err(now) => next = now,
            }
            entry.next = next;
        }
    }

    /// Puts empty memory over the range if `address` is in it.
    fn catch(&self, address: usize) -> bool {
        let start = self.start.load(Ordering::Acquire);
        let len = self.len.load(Ordering::Relaxed);
        if start == FREE || start == BUSY || address < start || address - start >= len {
            return false;
        }
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: `Guard::new`'s caller vouches that the range is its own mapping and may be replaced.
        let placed = unsafe { libc::mmap(start as *mut libc::c_void, len, rights, kind, -1, 0) };
        self.fired.store(true, Ordering::Release);
        placed != libc::MAP_FAILED
    }
}

fn entries() -> impl Iterator<Item = &'static Entry> {
    let mut next = LIST.load(Ordering::Acquire).cast_const();
    std::iter::from_fn(move || {
        // SAFETY: entries are leaked, so a pointer to one is good for ever; the list ends with null.
        let entry = unsafe { next.as_ref() }?;
        next = entry.next;
        Some(entry)
    })
}

fn install() {
    // SAFETY: an all-zero sigaction is a valid value; the handler below makes async-signal-safe calls only.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
    }
}

extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo; for SIGBUS it has an address.
    let address = unsafe { (*info).si_addr() } as usize;
    // SAFETY: the address of this thread's errno, which the interrupted code may be about to read.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { *errno };
    if !entries().any(|entry| entry.catch(address)) {
        // SAFETY: back to the default action: the access happens again and ends the process.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    }
    // SAFETY: as above.
    unsafe { *errno = before };
}
