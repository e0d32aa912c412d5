// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Local time, as the C library knows it.

use std::mem::MaybeUninit;

/// A moment where the user is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Local {
    /// Year, and month from 1.
    pub date: (i32, i32, i32),
    /// Hour, minute, second.
    pub time: (i32, i32, i32),
}

/// Reads the rules of the user's time zone, which stand in a file. Before the process is confined; later it uses what it knows.
pub fn learn_zone() {
    let _ = local(0);
}

/// Local time `seconds` after 1970 began; `None` for a year that cannot be counted.
pub fn local(seconds: u32) -> Option<Local> {
    let mut broken_down = MaybeUninit::<libc::tm>::zeroed();
    let seconds = libc::time_t::from(seconds);
    // SAFETY: both pointers are to values of this frame, and a `tm` of zeroes is one.
    let tm = unsafe {
        if libc::localtime_r(&raw const seconds, broken_down.as_mut_ptr()).is_null() {
            return None;
        }
        broken_down.assume_init()
    };
    Some(Local { date: (tm.tm_year + 1900, tm.tm_mon + 1, tm.tm_mday), time: (tm.tm_hour, tm.tm_min, tm.tm_sec) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_later_is_the_same_hour_of_another_day() {
        let (noon, next) = (local(43_200), local(43_200 + 86_400));
        assert!(noon.zip(next).is_some_and(|(noon, next)| noon.time == next.time && noon.date != next.date));
    }
}
