// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `-r`: a limit on how fast content is copied, for several threads together.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How fast content may be copied.
pub struct Pace {
    /// Bytes; `None` is no limit.
    per_second: Option<u64>,
    /// When all that was let through so far is through at that rate.
    through: Mutex<Instant>,
}

impl Pace {
    /// At most `per_second` bytes a second; 0 is any number.
    pub fn new(per_second: u64) -> Pace {
        Pace { per_second: (per_second > 0).then_some(per_second), through: Mutex::new(Instant::now()) }
    }

    /// Returns when the next `len` bytes may be copied.
    pub fn wait(&self, len: u64) {
        let now = Instant::now();
        if let Some(wait) = self.due(len, now).checked_duration_since(now) {
            std::thread::sleep(wait);
        }
    }

    /// When that is.
    fn due(&self, len: u64, now: Instant) -> Instant {
        let Some(rate) = self.per_second else { return now };
        let nanoseconds = u128::from(len) * 1_000_000_000 / u128::from(rate);
        let takes = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        let mut through = self.through.lock().unwrap_or_else(PoisonError::into_inner);
        let due = now.max(*through);
        *through = due + takes;
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_follow_each_other_at_the_rate() {
        let (pace, now) = (Pace::new(1000), Instant::now());
        let after = |len, passed| pace.due(len, now + Duration::from_millis(passed)) - now;
        assert_eq!(after(500, 0), Duration::ZERO);
        assert_eq!(after(250, 100), Duration::from_millis(500));
        assert_eq!(after(250, 100), Duration::from_millis(750));
        // Time in which nothing was asked for is not saved up.
        assert_eq!(after(100, 5000), Duration::from_secs(5));
        assert_eq!(after(100, 5000), Duration::from_millis(5100));
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        let (pace, now) = (Pace::new(0), Instant::now());
        assert!((0..10).all(|_| pace.due(u64::MAX, now) == now));
    }
}
