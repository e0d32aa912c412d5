// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How long a queue looks for more before it sleeps.
//!
//! To fall asleep and be woken costs more than a few microseconds of looking, on both sides; to look in vain costs all of
//! them. So the time grows while it pays and shrinks when it does not.

use std::time::{Duration, Instant};

/// The first guess.
const FIRST: Duration = Duration::from_micros(4);

/// A queue's patience.
#[derive(Debug)]
pub struct Polling {
    most: Duration,
    now: Duration,
}

impl Polling {
    /// Looks for `most` at most; zero is never.
    pub fn new(most: Duration) -> Polling {
        Polling { most, now: FIRST.min(most) }
    }

    /// Asks `ready` again and again, until it says so or patience ends; whether it said so.
    ///
    /// # Errors
    /// Those of `ready`.
    pub fn look<E>(&mut self, mut ready: impl FnMut() -> Result<bool, E>) -> Result<bool, E> {
        if self.most.is_zero() {
            return Ok(false);
        }
        let started = Instant::now();
        loop {
            for _ in 0..16 {
                if ready()? {
                    self.now = (self.now * 2).clamp(FIRST.min(self.most), self.most);
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
            if started.elapsed() >= self.now {
                self.now /= 2;
                return Ok(false);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(polling: &mut Polling, answer: bool) -> bool {
        polling.look(|| Ok::<bool, ()>(answer)).unwrap_or(false)
    }

    #[test]
    fn patience_grows_while_it_pays_and_shrinks_when_it_does_not() {
        let mut polling = Polling::new(Duration::from_micros(50));
        assert!((0..9).all(|_| ask(&mut polling, true)));
        assert_eq!(polling.now, Duration::from_micros(50));
        assert!(!ask(&mut polling, false));
        assert_eq!(polling.now, Duration::from_micros(25));
        assert!((0..40).all(|_| !ask(&mut polling, false)));
        assert_eq!(polling.now, Duration::ZERO);
        assert!(ask(&mut polling, true));
        assert_eq!(polling.now, FIRST);
    }

    #[test]
    fn without_patience_nothing_is_asked() {
        assert!(!ask(&mut Polling::new(Duration::ZERO), true));
    }
}
