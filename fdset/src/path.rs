// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `/dev/fdset/N`: the only file name that fd sets know, read as QEMU reads it.
//!
//! The prefix is literal, so `//dev/fdset/1` and `/dev/fdset` are other files. The rest goes through C's `strtol`
//! (base 10) and must end there: leading blanks, a sign and zeroes pass (` 1`, `+1`, `01`, even `-0`), everything else
//! (`1x`, `1/`, `0x1`, `1/../2`, nothing at all) does not. Ids stop at `INT_MAX`, though sets may have larger ones.

use crate::Error;

/// What every path of an fd set starts with.
pub const PREFIX: &str = "/dev/fdset/";

/// The set that `path` names, from 0 to `i32::MAX`.
///
/// # Errors
/// [`Error::NotAnFdset`] without the prefix, where QEMU would open a file of that name; [`Error::BadPath`] if the rest
/// is no number in range.
pub fn set_id(path: &str) -> Result<i64, Error> {
    let number = path.strip_prefix(PREFIX).ok_or_else(|| Error::NotAnFdset { path: path.to_owned() })?;
    strtol(number)
        .filter(|&id| i32::try_from(id).is_ok_and(|id| id >= 0))
        .ok_or_else(|| Error::BadPath { path: path.to_owned() })
}

/// C's `strtol(text, &end, 10)` for a text that must end at `end`; `None` also where it sets `ERANGE`.
fn strtol(text: &str) -> Option<i64> {
    // isspace(3) of the C locale, which knows the vertical tab and no Unicode.
    let text = text.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    // `parse` would take a second sign.
    if !digits.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn blanks_sign_and_zeroes_are_accepted_as_by_strtol() {
        for (rest, id) in [
            ("0", 0),
            ("1", 1),
            ("01", 1),
            ("+1", 1),
            (" 1", 1),
            ("\t\n\x0b\x0c\r +0012", 12),
            ("-0", 0),
            ("00000000000000000000000000000000000000007", 7),
            ("2147483647", 2_147_483_647),
        ] {
            assert_eq!(set_id(&format!("/dev/fdset/{rest}")).unwrap(), id, "{rest:?}");
        }
    }

    #[test]
    fn anything_but_one_number_in_range_cannot_be_parsed() {
        for rest in [
            "",
            " ",
            "+",
            "-",
            "-1",
            "+-1",
            "++1",
            "1x",
            "1/",
            "1 ",
            "0x1",
            "1/../2",
            "../1",
            "2147483648",
            "1\0",
            "1.0",
            "9223372036854775808",
            "\u{a0}1",
            "١",
            "1_0",
        ] {
            let path = format!("/dev/fdset/{rest}");
            let error = set_id(&path).unwrap_err();
            assert!(matches!(error, Error::BadPath { .. }), "{rest:?}");
            assert_eq!(error.to_string(), format!("Could not parse fdset {path}"));
            assert_eq!(error.errno(), rustix::io::Errno::INVAL.raw_os_error());
        }
    }

    #[test]
    fn other_spellings_of_the_prefix_are_other_files() {
        for path in
            ["//dev/fdset/1", "/dev/fdset", "file:/dev/fdset/1", "/dev/./fdset/1", "dev/fdset/1", "", "/etc/passwd"]
        {
            assert!(matches!(set_id(path).unwrap_err(), Error::NotAnFdset { .. }), "{path:?}");
        }
    }
}
