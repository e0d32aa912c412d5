// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which set ids are free, as ranges: the lowest free id costs the same with ten sets and with ten thousand.

use std::collections::BTreeMap;

/// Free ids from 0 to `i64::MAX`: first of each range to its last. Ranges neither touch nor overlap.
#[derive(Debug)]
pub(crate) struct FreeIds(BTreeMap<i64, i64>);

impl FreeIds {
    pub(crate) fn all() -> FreeIds {
        FreeIds(BTreeMap::from([(0, i64::MAX)]))
    }

    /// The lowest free id. There is always one: no process has 2^63 sets.
    pub(crate) fn lowest(&self) -> i64 {
        self.0.first_key_value().map_or(i64::MAX, |(&first, _)| first)
    }

    /// The ids that are taken, in ascending order.
    pub(crate) fn taken(&self) -> impl Iterator<Item = i64> {
        // Between the end of one free range and the start of the next; `None` for past the last id.
        let ends = std::iter::once(Some(0)).chain(self.0.values().map(|last| last.checked_add(1)));
        let starts = self.0.keys().map(|&first| first - 1).chain(std::iter::once(i64::MAX));
        ends.zip(starts).filter_map(|(from, to)| from.map(|from| from..=to)).flatten()
    }

    /// Takes `id`, if it is free.
    pub(crate) fn take(&mut self, id: i64) {
        let Some((&first, &last)) = self.0.range(..=id).next_back() else { return };
        if last < id {
            return;
        }
        self.0.remove(&first);
        if first < id {
            self.0.insert(first, id - 1);
        }
        if id < last {
            self.0.insert(id + 1, last);
        }
    }

    /// Gives back `id`, which was taken.
    pub(crate) fn give(&mut self, id: i64) {
        let (mut first, mut last) = (id, id);
        if let Some((&before, &end)) = self.0.range(..id).next_back()
            && end == id - 1
        {
            first = before;
        }
        if let Some(end) = id.checked_add(1).and_then(|after| self.0.remove(&after)) {
            last = end;
        }
        self.0.insert(first, last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_filled_from_below() {
        let mut free = FreeIds::all();
        for id in [0, 1, 2, 3, 7] {
            free.take(id);
        }
        assert_eq!(free.lowest(), 4);
        free.give(2);
        free.give(0);
        assert_eq!(free.lowest(), 0);
        free.take(0);
        assert_eq!(free.lowest(), 2);
    }

    #[test]
    fn ids_given_back_in_any_order_join_to_one_range() {
        let mut free = FreeIds::all();
        for id in 0..6 {
            free.take(id);
        }
        free.take(i64::MAX);
        for id in [3, 1, 0, 5, i64::MAX, 2, 4] {
            free.give(id);
        }
        assert_eq!(free.0, FreeIds::all().0);
    }

    #[test]
    fn taken_ids_are_told_in_order_up_to_the_last() {
        let mut free = FreeIds::all();
        let ids = [0, 1, 5, i64::MAX - 1, i64::MAX];
        for id in ids.into_iter().rev() {
            free.take(id);
        }
        assert_eq!(free.taken().collect::<Vec<_>>(), ids);
        for id in ids {
            free.give(id);
        }
        assert_eq!(free.taken().count(), 0);
    }

    #[test]
    fn taking_a_taken_id_changes_nothing() {
        let mut free = FreeIds::all();
        free.take(0);
        free.take(5);
        let before = free.0.clone();
        free.take(0);
        free.take(5);
        assert_eq!(free.0, before);
    }
}
