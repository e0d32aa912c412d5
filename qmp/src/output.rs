// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Values to bytes, in QEMU's hand: ASCII only, `": "` and `", "`, doubles with 17 digits, lines ended by CR LF.

use serde_json::{Number, Value};

/// `value` as one line (or, if `pretty`, several, indented by four), ended by CR LF.
pub fn line(value: &Value, pretty: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(128);
    write(&mut out, value, pretty.then_some(0));
    out.extend_from_slice(b"\r\n");
    out
}

/// `value` as text on one line, without an end.
pub fn text(value: &Value) -> String {
    let mut out = Vec::new();
    write(&mut out, value, None);
    String::from_utf8_lossy(&out).into_owned()
}

/// `indent` is the depth of a pretty print.
fn write(out: &mut Vec<u8>, value: &Value, indent: Option<usize>) {
    match value {
        Value::Null => out.extend_from_slice(b"null"),
        Value::Bool(true) => out.extend_from_slice(b"true"),
        Value::Bool(false) => out.extend_from_slice(b"false"),
        Value::Number(n) => write_number(out, n),
        Value::String(s) => write_string(out, s),
        Value::Array(list) => {
            out.push(b'[');
            for (i, element) in list.iter().enumerate() {
                separate(out, i == 0, indent);
                write(out, element, indent.map(|depth| depth + 1));
            }
            close(out, b']', indent);
        }
        Value::Object(map) => {
            out.push(b'{');
            let mut members: Vec<_> = map.iter().collect();
            members.sort_by_key(|(key, _)| crate::order::chain(key));
            for (i, (key, element)) in members.into_iter().enumerate() {
                separate(out, i == 0, indent);
                write_string(out, key);
                out.extend_from_slice(b": ");
                write(out, element, indent.map(|depth| depth + 1));
            }
            close(out, b'}', indent);
        }
    }
}

fn separate(out: &mut Vec<u8>, first: bool, indent: Option<usize>) {
    match indent {
        None if first => {}
        None => out.extend_from_slice(b", "),
        Some(depth) => {
            if !first {
                out.push(b',');
            }
            new_line(out, depth + 1);
        }
    }
}

fn close(out: &mut Vec<u8>, bracket: u8, indent: Option<usize>) {
    if let Some(depth) = indent {
        new_line(out, depth);
    }
    out.push(bracket);
}

fn new_line(out: &mut Vec<u8>, depth: usize) {
    out.extend_from_slice(b"\r\n");
    out.resize(out.len() + 4 * depth, b' ');
}

fn write_string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    for c in text.chars() {
        match c {
            '"' => out.extend_from_slice(b"\\\""),
            '\\' => out.extend_from_slice(b"\\\\"),
            '\u{8}' => out.extend_from_slice(b"\\b"),
            '\u{c}' => out.extend_from_slice(b"\\f"),
            '\n' => out.extend_from_slice(b"\\n"),
            '\r' => out.extend_from_slice(b"\\r"),
            '\t' => out.extend_from_slice(b"\\t"),
            ' '..='~' => out.push(c as u8),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.extend_from_slice(format!("\\u{unit:04X}").as_bytes());
                }
            }
        }
    }
    out.push(b'"');
}

fn write_number(out: &mut Vec<u8>, number: &Number) {
    let text = match number.as_f64() {
        Some(double) if number.is_f64() => general(double),
        _ => number.to_string(),
    };
    out.extend_from_slice(text.as_bytes());
}

/// A double as C's `%.17g` prints it.
fn general(double: f64) -> String {
    const DIGITS: i32 = 17;
    let scientific = format!("{double:.16e}");
    let Some((mantissa, exponent)) = scientific.split_once('e') else { return scientific };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..DIGITS).contains(&exponent) {
        let decimals = usize::try_from(DIGITS - 1 - exponent).unwrap_or(0);
        return trimmed(&format!("{double:.decimals$}")).to_owned();
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{}e{sign}{:02}", trimmed(mantissa), exponent.abs())
}

fn trimmed(digits: &str) -> &str {
    if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits }
}
