// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The distinguished name in a certificate's subject (RFC 5280, 4.1.2.6), as text in the order in which it stands there:
//! what GnuTLS, and so QEMU's `tls-authz`, calls a client.

/// Attribute types with short names (RFC 4514, section 3, and those that GnuTLS knows besides), by their OID's bytes.
const SHORT: &[(&[u8], &str)] = &[
    (&[0x55, 4, 3], "CN"),
    (&[0x55, 4, 4], "surName"),
    (&[0x55, 4, 5], "serialNumber"),
    (&[0x55, 4, 6], "C"),
    (&[0x55, 4, 7], "L"),
    (&[0x55, 4, 8], "ST"),
    (&[0x55, 4, 9], "STREET"),
    (&[0x55, 4, 10], "O"),
    (&[0x55, 4, 11], "OU"),
    (&[0x55, 4, 12], "title"),
    (&[0x55, 4, 42], "givenName"),
    (&[0x55, 4, 43], "initials"),
    (&[0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 1, 1], "UID"),
    (&[0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 1, 25], "DC"),
    (&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 1], "EMAIL"),
];

const INTEGER: u8 = 0x02;
const OID: u8 = 0x06;
const UTF8_STRING: u8 = 0x0c;
const PRINTABLE_STRING: u8 = 0x13;
const TELETEX_STRING: u8 = 0x14;
const IA5_STRING: u8 = 0x16;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const VERSION: u8 = 0xa0;

/// The subject's name of a certificate (DER), for example `CN=host,O=Example`; `None` if the certificate is malformed.
pub fn subject(certificate: &[u8]) -> Option<String> {
    let (certificate, _) = take(certificate, SEQUENCE)?;
    let (mut rest, _) = take(certificate, SEQUENCE)?;
    if let Some((_, after)) = take(rest, VERSION) {
        rest = after;
    }
    // Serial number, signature, issuer, validity.
    for tag in [INTEGER, SEQUENCE, SEQUENCE, SEQUENCE] {
        (_, rest) = take(rest, tag)?;
    }
    let (mut names, _) = take(rest, SEQUENCE)?;
    let mut text = Vec::new();
    while !names.is_empty() {
        let set;
        (set, names) = take(names, SET)?;
        text.push(relative(set)?);
    }
    Some(text.join(","))
}

/// A relative distinguished name: attributes joined by plus signs.
fn relative(mut set: &[u8]) -> Option<String> {
    let mut text = Vec::new();
    while !set.is_empty() {
        let pair;
        (pair, set) = take(set, SEQUENCE)?;
        let (oid, value) = take(pair, OID)?;
        let (tag, content, _) = element(value)?;
        let key = SHORT.iter().find(|(known, _)| *known == oid);
        let string = match tag {
            UTF8_STRING | PRINTABLE_STRING | IA5_STRING | TELETEX_STRING => std::str::from_utf8(content).ok(),
            _ => None,
        };
        text.push(match (key, string) {
            (Some((_, key)), Some(string)) => format!("{key}={}", escaped(string)),
            (Some((_, key)), None) => format!("{key}=#{}", hex(value)),
            (None, _) => format!("{}=#{}", dotted(oid)?, hex(value)),
        });
    }
    Some(text.join("+"))
}

/// RFC 4514, section 2.4.
fn escaped(value: &str) -> String {
    let last = value.chars().count().saturating_sub(1);
    value.chars().enumerate().fold(String::new(), |mut out, (index, char)| {
        let special = matches!(char, ',' | '+' | '"' | '\\' | '<' | '>' | ';')
            || (char == '#' && index == 0)
            || (char == ' ' && (index == 0 || index == last));
        if special {
            out.push('\\');
        }
        out.push(char);
        out
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02X}")).collect()
}

/// An object identifier's numbers; `None` if one of them is out of all bounds.
fn dotted(oid: &[u8]) -> Option<String> {
    let mut arcs: Vec<u64> = Vec::new();
    let mut arc: u64 = 0;
    for byte in oid {
        arc = arc.checked_mul(128)? + u64::from(byte & 0x7f);
        if byte & 0x80 == 0 {
            if arcs.is_empty() {
                let first = (arc / 40).min(2);
                arcs.extend([first, arc - first * 40]);
            } else {
                arcs.push(arc);
            }
            arc = 0;
        }
    }
    Some(arcs.iter().map(u64::to_string).collect::<Vec<_>>().join("."))
}

/// The content of the element at the start if it has this tag, and what follows it.
fn take(bytes: &[u8], wanted: u8) -> Option<(&[u8], &[u8])> {
    let (tag, content, rest) = element(bytes)?;
    (tag == wanted).then_some((content, rest))
}

/// Tag and content of the element at the start (X.690, definite lengths), and what follows it.
fn element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let [tag, length, rest @ ..] = bytes else { return None };
    let (length, rest) = match usize::from(*length) {
        short @ 0..0x80 => (short, rest),
        long => {
            let count = long - 0x80;
            if !(1..=4).contains(&count) {
                return None;
            }
            let (digits, rest) = rest.split_at_checked(count)?;
            (digits.iter().fold(0, |length, digit| length << 8 | usize::from(*digit)), rest)
        }
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((*tag, content, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn der(tag: u8, content: &[u8]) -> Vec<u8> {
        let len = u8::try_from(content.len()).expect("short");
        [&[tag, 0x81, len][..], content].concat()
    }

    fn certificate(subject: &[u8]) -> Vec<u8> {
        let before = [der(VERSION, &[2, 1, 2]), der(INTEGER, &[1]), der(SEQUENCE, &[]), der(SEQUENCE, &[])].concat();
        let fields = [before, der(SEQUENCE, &[]), der(SEQUENCE, subject)].concat();
        der(SEQUENCE, &der(SEQUENCE, &fields))
    }

    fn attribute(oid: &[u8], tag: u8, value: &[u8]) -> Vec<u8> {
        der(SET, &der(SEQUENCE, &[der(OID, oid), der(tag, value)].concat()))
    }

    #[test]
    fn a_name_is_told_in_its_order_with_what_is_special_escaped() {
        let name = [
            attribute(&[0x55, 4, 6], PRINTABLE_STRING, b"GB"),
            attribute(&[0x55, 4, 10], UTF8_STRING, "Ex, ample \u{fc} ".as_bytes()),
            attribute(&[0x2a, 3, 0x83, 0x00], UTF8_STRING, b"x"),
            attribute(&[0x55, 4, 3], UTF8_STRING, b"#a+b"),
        ]
        .concat();
        let told = subject(&certificate(&name)).expect("well formed");
        assert_eq!(told, "C=GB,O=Ex\\, ample \u{fc}\\ ,1.2.3.384=#0C810178,CN=\\#a\\+b");
    }

    #[test]
    fn a_certificate_cut_anywhere_has_no_name() {
        let whole = certificate(&attribute(&[0x55, 4, 3], UTF8_STRING, b"host"));
        assert_eq!(subject(&whole).as_deref(), Some("CN=host"));
        for len in 0..whole.len() {
            assert_eq!(subject(&whole[..len]), None);
        }
        assert_eq!(subject(&[0x30, 0x84, 0xff, 0xff, 0xff, 0xff]), None);
    }
}
