// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Names in a FAT directory: which there can be, which are the same, and the 8.3 name that each has besides its own.
//!
//! A long name may be anything in UTF-16 but a few characters; two that differ in case alone are the same. The short one is
//! the name itself in capitals where that fits, else its beginning and `~1`, `~2` and so on, without a search of what is
//! taken: a directory of many files costs no more for each than one of few.

use std::collections::{HashMap, HashSet};

/// Most UTF-16 units of a long name.
pub(super) const MOST_UNITS: usize = 255;

/// An 8.3 name as a directory entry has it: padded with blanks, without the dot.
pub(super) type Short = [u8; 11];

/// Why there can be no such name; it completes "a FAT name cannot".
pub(super) fn objection(name: &str) -> Option<String> {
    if name.is_empty() {
        return Some("be empty".into());
    }
    if name == "." || name == ".." {
        return Some("be '.' or '..'".into());
    }
    if let Some(bad) = name.chars().find(|&c| c < ' ' || c == '\u{7f}' || "\"*/:<>?\\|".contains(c)) {
        return Some(format!("have {bad:?} in it"));
    }
    if name.ends_with(['.', ' ']) {
        return Some("end in a dot or a blank".into());
    }
    let units = name.encode_utf16().count();
    (units > MOST_UNITS).then(|| format!("have {units} characters, only up to {MOST_UNITS}"))
}

/// What two names have in common that a FAT directory takes for one.
pub(super) fn folded(name: &str) -> String {
    let upper = |c: char| {
        let mut upper = c.to_uppercase();
        match (upper.next(), upper.next()) {
            (Some(one), None) => one,
            _ => c,
        }
    };
    name.chars().map(upper).collect()
}

/// The sum of a short name that ties its long entries to it.
pub(super) fn checksum(short: &Short) -> u8 {
    short.iter().fold(0, |sum: u8, &byte| sum.rotate_right(1).wrapping_add(byte))
}

/// The name in capitals, if it is an 8.3 name as it stands.
pub(super) fn exact(name: &str) -> Option<Short> {
    let (base, extension) = match name.rsplit_once('.') {
        Some((_, "")) => return None,
        Some(parts) => parts,
        None => (name, ""),
    };
    let fits = |text: &str, most: usize| text.len() <= most && text.bytes().all(|byte| is_plain(upper(byte)));
    if base.is_empty() || !fits(base, 8) || !fits(extension, 3) {
        return None;
    }
    let mut short = [b' '; 11];
    short.iter_mut().zip(base.bytes()).for_each(|(to, byte)| *to = upper(byte));
    short[8..].iter_mut().zip(extension.bytes()).for_each(|(to, byte)| *to = upper(byte));
    Some(short)
}

/// A short name as people write it.
pub(super) fn shown(short: &Short) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    match (text(&short[..8]), text(&short[8..])) {
        (base, extension) if extension.is_empty() => base,
        (base, extension) => format!("{base}.{extension}"),
    }
}

fn upper(byte: u8) -> u8 {
    byte.to_ascii_uppercase()
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_uppercase() || byte.is_ascii_digit() || b"!#$%&'()-@^_`{}~".contains(&byte)
}

/// The short names of one directory.
#[derive(Debug, Default)]
pub(super) struct ShortNames {
    taken: HashSet<Short>,
    /// The next number to try, by what stands before and behind the `~` and how many digits it has.
    next: HashMap<(Vec<u8>, [u8; 3], u32), u32>,
}

impl ShortNames {
    /// Takes a name that stands for itself.
    pub(super) fn take(&mut self, short: Short) {
        self.taken.insert(short);
    }

    /// A name with a number for a `name` that has none of its own. All that stand for themselves are taken by then.
    pub(super) fn numbered(&mut self, name: &str) -> Short {
        let stripped = name.trim_start_matches(['.', ' ']);
        let (base, tail) = stripped.rsplit_once('.').unwrap_or((stripped, ""));
        let plain = |text: &str, most: usize| -> Vec<u8> {
            let kept = text.chars().filter(|&c| c != ' ' && c != '.');
            let plain = kept.map(|c| u8::try_from(c).map(upper).ok().filter(|&byte| is_plain(byte)).unwrap_or(b'_'));
            plain.take(most).collect()
        };
        let mut base = plain(base, 6);
        if base.is_empty() {
            base.push(b'_');
        }
        let mut extension = [b' '; 3];
        extension.iter_mut().zip(plain(tail, 3)).for_each(|(to, byte)| *to = byte);
        for digits in 1..=6 {
            let begin = base[..base.len().min(7 - digits as usize)].to_vec();
            let next = self.next.entry((begin.clone(), extension, digits)).or_insert(10u32.pow(digits - 1));
            while *next < 10u32.pow(digits) {
                let mut short = [b' '; 11];
                let numbered = begin.iter().copied().chain(format!("~{next}").into_bytes());
                short.iter_mut().zip(numbered).for_each(|(to, byte)| *to = byte);
                short[8..].copy_from_slice(&extension);
                *next += 1;
                if self.taken.insert(short) {
                    return short;
                }
            }
        }
        // A directory has fewer than 65,536 entries, and there were a million numbers.
        [b'~'; 11]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_its_own_short_one_where_it_fits() {
        assert_eq!(exact("readme.txt").as_ref(), Some(b"README  TXT"));
        assert_eq!(exact("A").as_ref(), Some(b"A          "));
        assert_eq!(exact("12345678.123").as_ref(), Some(b"12345678123"));
        for long in ["123456789", "a.b.c", "a.html", ".profile", "a b", "ä", "a.", "a+b"] {
            assert_eq!(exact(long), None, "{long}");
        }
        assert_eq!(shown(b"README  TXT"), "README.TXT");
        assert_eq!(shown(b"A          "), "A");
    }

    #[test]
    fn others_get_numbers_that_nobody_has() {
        let mut names = ShortNames::default();
        names.take(*b"LONGNA~2TXT");
        let long = |names: &mut ShortNames, name: &str| shown(&names.numbered(name));
        assert_eq!(long(&mut names, "long name one.txt"), "LONGNA~1.TXT");
        assert_eq!(long(&mut names, "Long.Name.Two.txt"), "LONGNA~3.TXT");
        assert_eq!(long(&mut names, ".profile"), "PROFIL~1");
        assert_eq!(long(&mut names, "äöü"), "___~1");
        assert_eq!(long(&mut names, "....x+y"), "X_Y~1");
        let many: HashSet<String> = (0..2000).map(|n| long(&mut names, &format!("longname {n}.txt"))).collect();
        assert_eq!(many.len(), 2000);
        assert!(many.contains("LONGN~10.TXT") && many.contains("LONG~999.TXT") && many.contains("LON~1000.TXT"));
    }

    #[test]
    fn names_that_no_fat_can_have_are_objected_to() {
        for bad in ["", ".", "..", "a:b", "a\\b", "a\nb", "a ", "a.", "a?"] {
            assert!(objection(bad).is_some(), "{bad:?}");
        }
        assert!(objection(&"x".repeat(255)).is_none());
        assert!(objection(&"x".repeat(256)).is_some());
        assert!(objection(&"😀".repeat(128)).is_some(), "two units each");
        assert_eq!(folded("Straße Ä"), folded("STRAßE ä"));
    }
}
