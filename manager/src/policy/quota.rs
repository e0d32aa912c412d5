// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who has how much, and asks how often.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use super::rules::Limits;
use super::{Check, Refusal};

/// What a limit on requests is about.
const MINUTE: Duration = Duration::from_secs(60);

/// The books, by user.
#[derive(Debug, Default)]
pub struct Quotas {
    users: BTreeMap<u32, Account>,
}

#[derive(Debug, Default)]
struct Account {
    disks: u32,
    descriptors: u32,
    /// Requests within the last minute, the oldest first.
    requests: VecDeque<Instant>,
}

impl Quotas {
    /// Counts a request.
    ///
    /// # Errors
    /// There were too many within a minute.
    pub fn request(&mut self, uid: u32, limits: Limits, now: Instant) -> Result<(), Refusal> {
        let account = self.users.entry(uid).or_default();
        while account.requests.front().is_some_and(|&then| now.saturating_duration_since(then) >= MINUTE) {
            account.requests.pop_front();
        }
        let most = limits.requests_per_minute;
        // What is refused for this reason is not counted on: a flood ends a minute after it stops.
        if u64::try_from(account.requests.len()).unwrap_or(u64::MAX) >= u64::from(most) {
            return Err(over(format!("user {uid} has made {most} requests within a minute")));
        }
        account.requests.push_back(now);
        Ok(())
    }

    /// Takes a disk of `descriptors` images into the books.
    ///
    /// # Errors
    /// It would be too many disks or descriptors.
    pub fn enter(&mut self, uid: u32, limits: Limits, descriptors: u32) -> Result<(), Refusal> {
        let account = self.users.entry(uid).or_default();
        let all = account.descriptors.saturating_add(descriptors);
        if account.disks >= limits.disks {
            return Err(over(format!("user {uid} has {} disks, of {} at most", account.disks, limits.disks)));
        }
        if all > limits.descriptors {
            return Err(over(format!("user {uid} would have {all} descriptors, of {} at most", limits.descriptors)));
        }
        account.disks += 1;
        account.descriptors = all;
        Ok(())
    }

    /// Takes a disk out of the books.
    pub fn leave(&mut self, uid: u32, descriptors: u32) {
        if let Some(account) = self.users.get_mut(&uid) {
            account.disks = account.disks.saturating_sub(1);
            account.descriptors = account.descriptors.saturating_sub(descriptors);
        }
    }

    /// Disks and descriptors of a user.
    pub fn held(&self, uid: u32) -> (u32, u32) {
        self.users.get(&uid).map_or((0, 0), |account| (account.disks, account.descriptors))
    }
}

fn over(text: String) -> Refusal {
    Refusal { check: Check::Quota, text }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { disks: 2, descriptors: 5, requests_per_minute: 3 };

    #[test]
    fn a_user_s_requests_of_a_minute_are_counted_and_nobody_elses() {
        let mut quotas = Quotas::default();
        let start = Instant::now();
        for _ in 0..3 {
            quotas.request(1, LIMITS, start).unwrap();
        }
        assert_eq!(quotas.request(1, LIMITS, start).unwrap_err().check, Check::Quota);
        quotas.request(2, LIMITS, start).unwrap();
        quotas.request(1, LIMITS, start + MINUTE).unwrap();
    }

    #[test]
    fn disks_and_descriptors_are_bounded_until_they_are_given_back() {
        let mut quotas = Quotas::default();
        quotas.enter(1, LIMITS, 3).unwrap();
        assert!(quotas.enter(1, LIMITS, 3).unwrap_err().text.contains("6 descriptors, of 5"));
        quotas.enter(1, LIMITS, 2).unwrap();
        assert!(quotas.enter(1, LIMITS, 0).unwrap_err().text.contains("2 disks, of 2"));
        quotas.leave(1, 3);
        quotas.enter(1, LIMITS, 3).unwrap();
        assert_eq!(quotas.held(1), (2, 5));
        assert_eq!(quotas.held(2), (0, 0));
    }
}
