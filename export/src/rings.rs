// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Rings that were made before the process was confined: who has much to read at once borrows one.
//!
//! A ring belongs to one thread at a time, which queues reads in it, tells the kernel of them once for a batch, and takes the
//! bytes back without any other thread having been woken. When none is left, workers read in its stead.

use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use sys::ring::Ring;

/// Rings that nobody uses now. Cloning shares them.
#[derive(Clone, Debug, Default)]
pub struct Rings {
    free: Arc<Mutex<Vec<Ring>>>,
    numbers: Arc<[RawFd]>,
    detail: Arc<str>,
}

impl Rings {
    /// These, in all of which nothing is under way.
    pub fn new(rings: Vec<Ring>) -> Rings {
        let numbers = rings.iter().map(|ring| ring.as_fd().as_raw_fd()).collect();
        let detail = format!("{} io_urings, made before confinement, that can do nothing but read", rings.len());
        Rings { free: Arc::new(Mutex::new(rings)), numbers, detail: detail.into() }
    }

    /// None, and why.
    pub fn none(why: impl Into<Arc<str>>) -> Rings {
        Rings { detail: why.into(), ..Rings::default() }
    }

    /// What they are, or why there are none, for people.
    pub fn detail(&self) -> &str {
        &self.detail
    }

    /// Whether there are any, used or not.
    pub fn exist(&self) -> bool {
        !self.numbers.is_empty()
    }

    /// Numbers of their descriptors.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.numbers.iter().copied()
    }

    /// One that nobody else uses, if there is one left. It comes back when the value goes, once nothing is under way in it.
    pub fn borrow(&self) -> Option<Borrowed> {
        let ring = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
        Some(Borrowed { ring: Some(ring), rings: self.clone() })
    }
}

/// A ring in use.
#[derive(Debug)]
pub struct Borrowed {
    /// There until the value goes.
    ring: Option<Ring>,
    rings: Rings,
}

impl Deref for Borrowed {
    type Target = Ring;

    fn deref(&self) -> &Ring {
        self.ring.as_ref().expect("it goes only with this value")
    }
}

impl DerefMut for Borrowed {
    fn deref_mut(&mut self) -> &mut Ring {
        self.ring.as_mut().expect("it goes only with this value")
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        // One in which something is still under way is no use to others: it ends here, after that.
        if let Some(ring) = self.ring.take().filter(|ring| ring.in_flight() == 0) {
            self.rings.free.lock().unwrap_or_else(PoisonError::into_inner).push(ring);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_ring_has_one_user_and_comes_back() {
        let Ok(ring) = Ring::new(2) else { return eprintln!("skipped: no io_uring here") };
        let rings = Rings::new(vec![ring]);
        assert_eq!(rings.descriptors().count(), 1);
        let borrowed = rings.borrow().unwrap();
        assert!(rings.borrow().is_none());
        drop(borrowed);
        assert!(rings.borrow().is_some());
    }

    #[test]
    fn no_ring_is_no_error() {
        assert!(!Rings::default().exist() && Rings::default().borrow().is_none());
    }
}
