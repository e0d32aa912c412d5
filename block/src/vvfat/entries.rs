// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Entries of a FAT directory: 32 bytes each, long names in entries of their own before the short one.

use super::names::{self, Short, ShortNames};
use super::tree::{Child, Folder, Tree};

/// Bytes of an entry.
pub(super) const ENTRY: usize = 32;
/// Attributes.
pub(super) const VOLUME: u8 = 0x08;
pub(super) const DIRECTORY: u8 = 0x10;
pub(super) const ARCHIVE: u8 = 0x20;
pub(super) const LONG: u8 = 0x0f;

/// UTF-16 units in an entry of a long name, and where they stand in it.
pub(super) const UNITS: usize = 13;
pub(super) const UNIT_PLACES: [usize; UNITS] = [1, 3, 5, 7, 9, 14, 16, 18, 20, 22, 24, 28, 30];

/// 1980-01-01 and 2107-12-31 23:59:58, seconds since 1970: what FAT can say.
const EARLIEST: i64 = 315_532_800;
const LATEST: i64 = 4_354_819_198;

/// How many entries a directory takes: with `root`, its label and no entries for itself and its parent.
pub(super) fn count(folder: &Folder, root: bool) -> usize {
    let long = |name: &String| if is_short(name) { 0 } else { name.encode_utf16().count().div_ceil(UNITS) };
    let own = if root { 1 } else { 2 };
    own + folder.children.keys().map(|name| 1 + long(name)).sum::<usize>()
}

fn is_short(name: &str) -> bool {
    names::exact(name).is_some_and(|short| names::shown(&short) == name)
}

/// The bytes of directory `number`. `place` tells where each child begins: its first cluster, 0 for none.
pub(super) fn bytes(tree: &Tree, number: usize, label: &Short, place: impl Fn(Child) -> u32) -> Vec<u8> {
    let folder = &tree.folders[number];
    let mut bytes = Vec::with_capacity(count(folder, number == 0) * ENTRY);
    if number == 0 {
        bytes.extend(entry(label, VOLUME, folder.time, 0, 0));
    } else {
        bytes.extend(entry(b".          ", DIRECTORY, folder.time, place(Child::Folder(number)), 0));
        // The root is the cluster 0 here, even where it has one.
        let above = if folder.parent == 0 { 0 } else { place(Child::Folder(folder.parent)) };
        bytes.extend(entry(b"..         ", DIRECTORY, tree.folders[folder.parent].time, above, 0));
    }
    let mut shorts = ShortNames::default();
    folder.children.keys().filter_map(|name| names::exact(name)).for_each(|short| shorts.take(short));
    for (name, &child) in &folder.children {
        let short = names::exact(name).unwrap_or_else(|| shorts.numbered(name));
        if !is_short(name) {
            long(name, names::checksum(&short), &mut bytes);
        }
        let (attributes, time, len) = match child {
            Child::Folder(number) => (DIRECTORY, tree.folders[number].time, 0),
            Child::File(number) => (ARCHIVE, tree.files[number].time, tree.files[number].len),
        };
        bytes.extend(entry(&short, attributes, time, place(child), len));
    }
    bytes
}

fn entry(short: &Short, attributes: u8, time: i64, cluster: u32, len: u32) -> [u8; ENTRY] {
    let (date, time) = date_and_time(time);
    let [low0, low1, high0, high1] = cluster.to_le_bytes();
    let mut entry = [0; ENTRY];
    entry[..11].copy_from_slice(short);
    entry[11] = attributes;
    for (at, field) in [(14, time), (16, date), (18, date), (22, time), (24, date)] {
        entry[at..at + 2].copy_from_slice(&field.to_le_bytes());
    }
    entry[20..22].copy_from_slice(&[high0, high1]);
    entry[26..28].copy_from_slice(&[low0, low1]);
    entry[28..].copy_from_slice(&len.to_le_bytes());
    entry
}

/// The last part of the name comes first, marked; behind the name stand a zero and ones.
fn long(name: &str, checksum: u8, bytes: &mut Vec<u8>) {
    let mut units: Vec<u16> = name.encode_utf16().collect();
    let entries = units.len().div_ceil(UNITS);
    if !units.len().is_multiple_of(UNITS) {
        units.push(0);
    }
    units.resize(entries * UNITS, 0xffff);
    for (index, part) in units.chunks(UNITS).enumerate().rev() {
        let last = if index + 1 == entries { 0x40 } else { 0 };
        let mut entry = [0; ENTRY];
        // At most 20: a name has 255 units.
        entry[0] = u8::try_from(index + 1).unwrap_or(0) | last;
        entry[11] = LONG;
        entry[13] = checksum;
        for (at, unit) in UNIT_PLACES.into_iter().zip(part) {
            entry[at..at + 2].copy_from_slice(&unit.to_le_bytes());
        }
        bytes.extend(entry);
    }
}

/// Seconds since 1970 as FAT has them, in UTC: the date, and the time to two seconds.
fn date_and_time(seconds: i64) -> (u16, u16) {
    let seconds = seconds.clamp(EARLIEST, LATEST);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // The civil calendar, counted from 0000-03-01, in eras of 400 years.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month, year) =
        (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 }, year + 400 * era);
    let year = if month <= 2 { year + 1 } else { year };
    let date = (year - 1980) << 9 | month << 5 | day;
    let time = (second / 3600) << 11 | (second / 60 % 60) << 5 | (second % 60 / 2);
    (u16::try_from(date).unwrap_or(0), u16::try_from(time).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_in_utc_and_within_what_fat_can_say() {
        let date = |year: u16, month: u16, day: u16| (year - 1980) << 9 | month << 5 | day;
        assert_eq!(date_and_time(0), (date(1980, 1, 1), 0));
        assert_eq!(date_and_time(951_826_154), (date(2000, 2, 29), 12 << 11 | 9 << 5 | 7));
        assert_eq!(date_and_time(1_735_689_599), (date(2024, 12, 31), 23 << 11 | 59 << 5 | 29));
        assert_eq!(date_and_time(i64::MAX), (date(2107, 12, 31), 23 << 11 | 59 << 5 | 29));
    }

    #[test]
    fn a_long_name_is_cut_into_thirteens_and_filled_up() {
        let mut bytes = Vec::new();
        long("fourteen chars", 7, &mut bytes);
        assert_eq!(bytes.len(), 64);
        assert_eq!((bytes[0], bytes[32], bytes[13]), (0x42, 1, 7));
        assert_eq!(bytes[1..7], [b's', 0, 0, 0, 0xff, 0xff]);
        assert_eq!(bytes[33], b'f');
        bytes.clear();
        long("thirteen char", 7, &mut bytes);
        assert_eq!(bytes.len(), 32);
    }
}
