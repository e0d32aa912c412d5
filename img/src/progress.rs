// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How far a long verb is: a line that is written over, with rate and time left.

use std::io::{self, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::options::human;

/// Time between two lines.
const PAUSE: Duration = Duration::from_millis(100);

/// Progress towards a number of bytes, for several threads.
pub struct Progress {
    total: u64,
    is_shown: bool,
    started: Instant,
    last: Mutex<Instant>,
}

impl Progress {
    /// Nothing done of `total` bytes.
    pub fn new(total: u64, is_shown: bool) -> Progress {
        let now = Instant::now();
        Progress { total, is_shown, started: now, last: Mutex::new(now) }
    }

    /// `done` bytes are done.
    pub fn reached(&self, done: u64) {
        if !self.is_shown {
            return;
        }
        // Whoever comes while another one writes has nothing new to say.
        let Ok(mut last) = self.last.try_lock() else { return };
        if last.elapsed() >= PAUSE {
            *last = Instant::now();
            self.line(done);
        }
    }

    /// All is done.
    pub fn end(&self) {
        if self.is_shown {
            self.line(self.total);
            let _ = io::stdout().write_all(b"\n");
        }
    }

    #[allow(clippy::cast_precision_loss, reason = "two decimals are shown")]
    fn line(&self, done: u64) {
        let passed = self.started.elapsed().as_secs_f64().max(1e-9);
        let share = if self.total == 0 { 1.0 } else { done as f64 / self.total as f64 };
        let left = if share > 0.0 { passed / share - passed } else { 0.0 };
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate for people")]
        let rate = human((done as f64 / passed) as u64);
        let line = format!("\r    ({:.2}/100%)  {rate}/s, {left:.0} s left      ", share * 100.0);
        let _ = io::stdout().write_all(line.as_bytes()).and_then(|()| io::stdout().flush());
    }
}
