// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How long a thread looks out for the next request before it sleeps.
//!
//! To be woken costs more than most requests do. So for a client that asks again at once, as one that sets up a machine's disks
//! over a monitor does, or one that waits for each block it reads, the thread stays awake for a moment after an answer.
//! Where that is in vain (a slow client, one that runs on the same processor, a machine that is busy with other work) it sleeps
//! at once the next times, twice as often after every failure. An idle daemon costs nothing.

use std::time::{Duration, Instant};

/// How long after an answer a quick client asks again, unless said otherwise. About what it costs to wake two threads, one after
/// the other.
const PATIENCE: Duration = Duration::from_micros(100);
/// After so many failures in a row, one look in 2^this is risked.
const MOST_FAILURES: u32 = 10;

/// What is known of how quickly a client's requests follow its answers.
#[derive(Debug)]
pub struct Attention {
    patience: Duration,
    answered: Option<Instant>,
    quick: bool,
    failures: u32,
    /// How often to sleep at once before looking out again.
    rests: u32,
}

impl Default for Attention {
    fn default() -> Attention {
        Attention::lasting(PATIENCE)
    }
}

impl Attention {
    /// One that looks out for at most so long.
    pub fn lasting(patience: Duration) -> Attention {
        Attention { patience, answered: None, quick: false, failures: 0, rests: 0 }
    }

    /// Answers have gone out.
    pub fn answered(&mut self, now: Instant) {
        self.answered = Some(now);
    }

    /// A client has something to say.
    pub fn asked(&mut self, now: Instant) {
        let since = self.answered.take().map(|answered| now.saturating_duration_since(answered));
        self.quick = since.is_some_and(|since| since < self.patience);
    }

    /// Looks again and again before the next sleep, if that is worth it, until there is something; `None` if it is time to sleep.
    ///
    /// # Errors
    /// Those of `look`.
    pub fn look_out<T, E>(&mut self, mut look: impl FnMut() -> Result<Option<T>, E>) -> Result<Option<T>, E> {
        let Some(end) = self.patience(Instant::now()) else { return Ok(None) };
        loop {
            if let Some(something) = look()? {
                self.paid();
                return Ok(Some(something));
            }
            if Instant::now() >= end {
                self.in_vain();
                return Ok(None);
            }
            std::hint::spin_loop();
        }
    }

    /// Until when to look out; `None` to sleep at once.
    fn patience(&mut self, now: Instant) -> Option<Instant> {
        let end = self.answered.filter(|_| self.quick)? + self.patience;
        if self.rests > 0 {
            self.rests -= 1;
            return None;
        }
        (now < end).then_some(end)
    }

    /// Something came while the thread looked out.
    fn paid(&mut self) {
        self.failures = 0;
    }

    /// Nothing came.
    fn in_vain(&mut self) {
        self.quick = false;
        self.failures = (self.failures + 1).min(MOST_FAILURES);
        self.rests = 1 << self.failures;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A command that is asked `gap` microseconds after the last answer, and answered at once.
    fn round(attention: &mut Attention, now: &mut Instant, gap: u64) {
        *now += Duration::from_micros(gap);
        attention.asked(*now);
        attention.answered(*now);
    }

    #[test]
    fn it_looks_out_a_moment_for_quick_clients_and_not_at_all_for_others() {
        let (mut attention, mut now) = (Attention::default(), Instant::now());
        assert_eq!(attention.patience(now), None, "nobody has asked");
        round(&mut attention, &mut now, 0);
        assert_eq!(attention.patience(now), None, "one command is no haste");
        round(&mut attention, &mut now, 50);
        assert_eq!(attention.patience(now), Some(now + PATIENCE));
        attention.paid();
        assert_eq!(attention.patience(now + PATIENCE), None, "it is over");
        round(&mut attention, &mut now, 5000);
        assert_eq!(attention.patience(now), None, "it was slow the last time");
        round(&mut attention, &mut now, 50);
        assert_eq!(attention.patience(now), Some(now + PATIENCE), "and quick again");
    }

    #[test]
    fn where_it_is_in_vain_it_is_tried_ever_more_rarely_until_it_pays() {
        let (mut attention, mut now) = (Attention::default(), Instant::now());
        let mut looked = |times: u64, pays: bool| {
            let mut count = 0;
            for _ in 0..times {
                round(&mut attention, &mut now, 10);
                if attention.patience(now).is_some() {
                    count += 1;
                    if pays { attention.paid() } else { attention.in_vain() }
                }
            }
            count
        };
        assert!(looked(20_000, false) < 40, "of twenty thousand");
        let before = looked(2000, true);
        assert!(before > 900, "{before}: from the first success on");
        assert_eq!(looked(1000, true), 1000);
    }
}
