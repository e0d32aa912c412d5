// SPDX-License-Identifier: Apache-2.0 OR MIT
//! When passed descriptors go although nobody removed them: clients that leave.
//!
//! No clock runs here. The caller says when clients come and go and what time it is, and asks for the next deadline.

use std::time::{Duration, Instant};

/// What happens to descriptors when the last client of their monitor has gone.
///
/// | | who should use it |
/// |---|---|
/// | `Explicit` | Programs driven by a client that keeps state and comes back, as libvirt does after a restart: it expects its sets. A client that dies for good leaves its descriptors open: the next one lists the sets and removes what is not its own. |
/// | `Monitor` | One client for the whole life of the work, such as a pipeline step or a test: when it dies, by whatever cause, nothing stays open. A client that reconnects passes everything again. |
/// | `Lease` | A supervised client that crashes and restarts: it has this long to come back and find its sets; after that nothing stays open. |
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lifetime {
    /// Nothing: only a removal closes descriptors. QEMU since 9.1.
    #[default]
    Explicit,
    /// They are closed. The rule that fd sets were born with in 2012.
    Monitor,
    /// They are closed, unless a client comes back within this time.
    Lease(Duration),
}

/// What [`Lifetime::Monitor`] and [`Lifetime::Lease`] do with a set in use, that is one whose dups live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InUse {
    /// Closes its descriptors like all others: nobody can open them any more. The dups go on; the empty set goes with the
    /// last of them. The least that stays open.
    #[default]
    Close,
    /// Leaves it whole until its last dup is dropped, as in 2012. A running user can be opened again with other rights
    /// (`blockdev-reopen`, `auto-read-only`) without its client.
    Keep,
}

/// Whose leaving ends a descriptor's life: a monitor, or several that share a fate. Descriptors name theirs in
/// [`Provenance::keeper`](crate::Provenance::keeper); the default keeper has the lifetime of the
/// [`Settings`](crate::Settings).
///
/// A keeper that never had a client, such as that of descriptors from the command line, keeps for ever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Keeper(usize);

/// All keepers and their clients.
#[derive(Debug)]
pub(crate) struct Keepers(Vec<Watch>);

#[derive(Debug)]
struct Watch {
    lifetime: Lifetime,
    clients: usize,
    standing: Standing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Has a client, never had one, or needs none.
    Holds,
    /// The last client has gone; lapses then.
    Until(Instant),
    /// Its descriptors have been given up.
    Lapsed,
}

impl Keepers {
    /// The default keeper alone.
    pub(crate) fn new(lifetime: Lifetime) -> Keepers {
        let mut keepers = Keepers(Vec::new());
        keepers.add(lifetime);
        keepers
    }

    pub(crate) fn add(&mut self, lifetime: Lifetime) -> Keeper {
        self.0.push(Watch { lifetime, clients: 0, standing: Standing::Holds });
        Keeper(self.0.len() - 1)
    }

    pub(crate) fn connected(&mut self, keeper: Keeper) {
        if let Some(watch) = self.0.get_mut(keeper.0) {
            watch.clients += 1;
            watch.standing = Standing::Holds;
        }
    }

    /// A client has gone. One that never came does not count.
    pub(crate) fn disconnected(&mut self, keeper: Keeper, now: Instant) {
        let Some(watch) = self.0.get_mut(keeper.0).filter(|watch| watch.clients > 0) else { return };
        watch.clients -= 1;
        if watch.clients > 0 {
            return;
        }
        let lapses = match watch.lifetime {
            Lifetime::Explicit => None,
            Lifetime::Monitor => Some(now),
            // A lease past the end of time is one for ever.
            Lifetime::Lease(grace) => now.checked_add(grace),
        };
        watch.standing = lapses.map_or(Standing::Holds, Standing::Until);
    }

    /// Lets lapse what is due at `now`; whether anything was.
    pub(crate) fn expire(&mut self, now: Instant) -> bool {
        let mut any = false;
        for watch in &mut self.0 {
            if matches!(watch.standing, Standing::Until(due) if due <= now) {
                watch.standing = Standing::Lapsed;
                any = true;
            }
        }
        any
    }

    pub(crate) fn lapsed(&self, keeper: Keeper) -> bool {
        self.0.get(keeper.0).is_some_and(|watch| watch.standing == Standing::Lapsed)
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.0
            .iter()
            .filter_map(|watch| match watch.standing {
                Standing::Until(due) => Some(due),
                Standing::Holds | Standing::Lapsed => None,
            })
            .min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(30);

    #[test]
    fn lease_ends_when_nobody_came_back_in_time() {
        let start = Instant::now();
        let mut keepers = Keepers::new(Lifetime::Lease(GRACE));
        let keeper = Keeper::default();
        keepers.connected(keeper);
        keepers.disconnected(keeper, start);
        assert_eq!(keepers.next_deadline(), Some(start + GRACE));
        assert!(!keepers.expire(start + GRACE - Duration::from_nanos(1)));
        assert!(keepers.expire(start + GRACE));
        assert!(keepers.lapsed(keeper));
        assert_eq!(keepers.next_deadline(), None);
        assert!(!keepers.expire(start + 2 * GRACE), "it lapses once");
    }

    #[test]
    fn client_that_comes_back_in_time_keeps_the_lease() {
        let start = Instant::now();
        let mut keepers = Keepers::new(Lifetime::Lease(GRACE));
        let keeper = Keeper::default();
        keepers.connected(keeper);
        keepers.disconnected(keeper, start);
        keepers.connected(keeper);
        assert_eq!(keepers.next_deadline(), None);
        assert!(!keepers.expire(start + 2 * GRACE));
    }

    #[test]
    fn only_the_last_client_counts() {
        let start = Instant::now();
        let mut keepers = Keepers::new(Lifetime::Monitor);
        let keeper = Keeper::default();
        keepers.connected(keeper);
        keepers.connected(keeper);
        keepers.disconnected(keeper, start);
        assert!(!keepers.expire(start));
        keepers.disconnected(keeper, start);
        assert!(keepers.expire(start));
    }

    #[test]
    fn keeper_without_a_client_so_far_does_not_lapse() {
        let start = Instant::now();
        let mut keepers = Keepers::new(Lifetime::Monitor);
        keepers.disconnected(Keeper::default(), start);
        assert!(!keepers.expire(start + GRACE));
    }

    #[test]
    fn lease_beyond_the_end_of_time_never_ends() {
        let start = Instant::now();
        let mut keepers = Keepers::new(Lifetime::Lease(Duration::MAX));
        keepers.connected(Keeper::default());
        keepers.disconnected(Keeper::default(), start);
        assert_eq!(keepers.next_deadline(), None);
    }

    #[test]
    fn earliest_of_several_deadlines_is_next() {
        let start = Instant::now();
        let mut keepers = Keepers::new(Lifetime::Lease(2 * GRACE));
        let short = keepers.add(Lifetime::Lease(GRACE));
        for keeper in [Keeper::default(), short] {
            keepers.connected(keeper);
            keepers.disconnected(keeper, start);
        }
        assert_eq!(keepers.next_deadline(), Some(start + GRACE));
        assert!(keepers.expire(start + GRACE));
        assert!(keepers.lapsed(short) && !keepers.lapsed(Keeper::default()));
        assert_eq!(keepers.next_deadline(), Some(start + 2 * GRACE));
    }
}
