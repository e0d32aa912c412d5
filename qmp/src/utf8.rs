// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Modified UTF-8, as QEMU reads it: U+0000 may come as the two bytes C0 80, and noncharacters count as wrong.

/// Decodes the character at the start of `bytes`: its code point, or `None` if the sequence is wrong, and how many bytes
/// it takes up. A wrong sequence extends over its continuation bytes. `bytes` must not be empty.
pub(crate) fn decode(bytes: &[u8]) -> (Option<char>, usize) {
    let first = bytes[0];
    let more = match first {
        0x00..=0x7F => return (Some(char::from(first)), 1),
        0xC0..=0xDF => 1,
        0xE0..=0xEF => 2,
        0xF0..=0xF7 => 3,
        0xF8..=0xFB => 4,
        0xFC..=0xFD => 5,
        // A continuation byte on its own, or a byte that UTF-8 never has.
        0x80..=0xBF | 0xFE..=0xFF => return (None, 1),
    };
    let mut code = u32::from(first) & (0x3F >> more);
    let mut len = 1;
    for &byte in bytes[1..].iter().take(more) {
        if byte & 0xC0 != 0x80 {
            return (None, len);
        }
        code = code << 6 | u32::from(byte & 0x3F);
        len += 1;
    }
    if len <= more {
        return (None, len);
    }
    let shortest = match more {
        1 => 0x80,
        2 => 0x800,
        3 => 0x1_0000,
        _ => return (None, len),
    };
    if code < shortest && !(code == 0 && more == 1) {
        return (None, len);
    }
    (character(code), len)
}

/// The character of a code point; `None` for surrogates, noncharacters and what lies beyond Unicode.
pub(crate) fn character(code: u32) -> Option<char> {
    if (0xFDD0..=0xFDEF).contains(&code) || code & 0xFFFE == 0xFFFE {
        return None;
    }
    char::from_u32(code)
}

/// `bytes` up to a zero byte, as text: every wrong sequence becomes one U+FFFD.
pub(crate) fn lossy(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() && bytes[at] != 0 {
        let (c, len) = decode(&bytes[at..]);
        text.push(c.unwrap_or(char::REPLACEMENT_CHARACTER));
        at += len;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_one_byte_or_two() {
        assert_eq!(decode(b"\0"), (Some('\0'), 1));
        assert_eq!(decode(b"\xC0\x80"), (Some('\0'), 2));
    }

    #[test]
    fn overlong_surrogate_and_noncharacter_are_wrong_as_a_whole() {
        assert_eq!(decode(b"\xC1\xBF"), (None, 2));
        assert_eq!(decode(b"\xED\xA0\x80"), (None, 3));
        assert_eq!(decode(b"\xEF\xBF\xBF"), (None, 3));
        assert_eq!(decode(b"\xF4\x90\x80\x80"), (None, 4));
    }

    #[test]
    fn truncated_sequence_ends_before_the_next_character() {
        assert_eq!(decode(b"\xE2\x82a"), (None, 2));
        assert_eq!(lossy(b"\xE2\x82a\xFFb\0c"), "\u{FFFD}a\u{FFFD}b");
    }

    #[test]
    fn every_character_of_unicode_survives() {
        for c in ('\0'..=char::MAX).filter(|&c| character(u32::from(c)).is_some()) {
            let mut buf = [0; 4];
            let bytes = c.encode_utf8(&mut buf).as_bytes();
            assert_eq!(decode(bytes), (Some(c), bytes.len()));
        }
    }
}
