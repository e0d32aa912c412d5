// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The values of command line options: `driver=raw,file.driver=file,size=1G` or JSON.
//!
//! A dot goes into an object; if all keys of an object are numbers it is a list. A comma in a value is doubled. All
//! values are text here; what they are for is known to the schema ([`Table::option`](crate::Table::option)).

use serde_json::{Map, Value};

use crate::{Error, Parser};

/// Longest fragment of a key.
const MAX_FRAGMENT: usize = 127;

/// Reads one JSON value that is the whole of `text`.
///
/// # Errors
/// The parser's sentence.
pub fn json(text: &str) -> Result<Value, Error> {
    let mut parser = Parser::new();
    let (used, first) = parser.feed(text.as_bytes());
    let value = match first.or_else(|| parser.finish()) {
        Some(value) => value.map_err(Error::generic)?,
        None => return Err(Error::generic("Expecting a JSON value")),
    };
    match parser.feed(&text.as_bytes()[used..]).1.or_else(|| parser.finish()) {
        Some(_) => Err(Error::generic("Expecting at most one JSON value")),
        None => Ok(value),
    }
}

/// Reads `key=value,…`. A first value without a key has the key `implied`. Of a key given twice the last counts.
///
/// # Errors
/// The text does not have this form, uses a key in two ways, or asks for help, which whoever has any looks for before.
pub fn parse(text: &str, implied: Option<&str>) -> Result<Value, Error> {
    let mut root = Map::new();
    let mut implied = implied;
    let mut rest = text;
    while !rest.is_empty() {
        let key = &rest[..rest.find(['=', ',']).unwrap_or(rest.len())];
        let bare = !key.is_empty() && !rest[key.len()..].starts_with('=');
        if bare && matches!(key, "help" | "?") {
            return Err(Error::generic("Help is not available for this option"));
        }
        let value;
        match implied.take() {
            Some(implied) if bare => {
                (value, rest) = take_value(rest);
                root.insert(implied.to_owned(), Value::String(value));
            }
            _ => {
                let fragments = fragments(key)?;
                let Some(text) = rest[key.len()..].strip_prefix('=') else {
                    return Err(Error::generic(format!("Expected '=' after parameter '{key}'")));
                };
                (value, rest) = take_value(text);
                put(&mut root, key, &fragments, value)?;
            }
        }
    }
    for (key, value) in &mut root {
        listify(value, key)?;
    }
    Ok(Value::Object(root))
}

/// Reads the older form of options, that of `--chardev`: keys are plain, a key alone means `on` and one with `no` before
/// it `off`. Pairs come in the order in which they stand; which keys there are is for the caller to know.
pub fn flat(text: &str, implied: Option<&str>) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    let mut implied = implied;
    let mut rest = text;
    while !rest.is_empty() {
        let key = &rest[..rest.find(['=', ',']).unwrap_or(rest.len())];
        let after = &rest[key.len()..];
        if let Some(text) = after.strip_prefix('=') {
            let (value, next) = take_value(text);
            pairs.push((key.to_owned(), value));
            rest = next;
        } else if let Some(implied) = implied {
            let (value, next) = take_value(rest);
            pairs.push((implied.to_owned(), value));
            rest = next;
        } else {
            pairs.push(match key.strip_prefix("no") {
                Some(positive) => (positive.to_owned(), "off".to_owned()),
                None => (key.to_owned(), "on".to_owned()),
            });
            rest = after.strip_prefix(',').unwrap_or(after);
        }
        implied = None;
    }
    pairs
}

/// The value at the start of `text`, its doubled commas halved, and what follows the single one that ends it.
fn take_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    while let Some(comma) = rest.find(',') {
        value.push_str(&rest[..comma]);
        rest = &rest[comma + 1..];
        match rest.strip_prefix(',') {
            Some(more) => {
                value.push(',');
                rest = more;
            }
            None => return (value, rest),
        }
    }
    value.push_str(rest);
    (value, "")
}

/// The parts of a dotted key: names, and after the first also indices.
fn fragments(key: &str) -> Result<Vec<&str>, Error> {
    let mut fragments = Vec::new();
    let mut rest = key;
    loop {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let is_index = !fragments.is_empty() && digits > 0 && matches!(rest.as_bytes().get(digits), None | Some(b'.'));
        let len = if is_index { digits } else { name_len(rest) };
        let (fragment, after) = rest.split_at(len);
        if fragment.is_empty() || !(after.is_empty() || after.starts_with('.')) {
            return Err(Error::invalid_parameter(key));
        }
        if len > MAX_FRAGMENT {
            let what = if fragment == key { "Parameter" } else { "Parameter fragment" };
            return Err(Error::generic(format!("{what} '{fragment}' is too long")));
        }
        fragments.push(fragment);
        match after.strip_prefix('.') {
            Some(next) => rest = next,
            None => return Ok(fragments),
        }
    }
}

/// Bytes at the start of `text` that are a QAPI name: a letter, then letters, digits, `-` and `_`; before it possibly a
/// vendor's domain, `__org.example_`, whose dots separate nothing.
fn name_len(text: &str) -> usize {
    let mut start = 0;
    if let Some(domain) = text.strip_prefix("__") {
        let len = domain.len()
            - domain.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.')).len();
        if !domain[len..].starts_with('_') {
            return 0;
        }
        start = len + 3;
    }
    let name = &text[start..];
    if !name.starts_with(|c: char| c.is_ascii_alphabetic()) {
        return 0;
    }
    let end = name.find(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '_')));
    start + end.unwrap_or(name.len())
}

fn put(root: &mut Map<String, Value>, key: &str, fragments: &[&str], value: String) -> Result<(), Error> {
    let Some((last, outer)) = fragments.split_last() else { return Err(Error::invalid_parameter(key)) };
    let mut map = root;
    let mut end = 0;
    for fragment in outer {
        end += fragment.len();
        let inner = map.entry(*fragment).or_insert_with(|| Value::Object(Map::new()));
        let Value::Object(inner) = inner else { return Err(inconsistent(&key[..end])) };
        map = inner;
        end += 1;
    }
    match map.insert((*last).to_owned(), Value::String(value)) {
        Some(Value::Object(_)) => Err(inconsistent(key)),
        _ => Ok(()),
    }
}

/// Turns objects whose keys are all indices into lists, from the inside out.
fn listify(value: &mut Value, path: &str) -> Result<(), Error> {
    let Value::Object(map) = value else { return Ok(()) };
    for (key, inner) in &mut *map {
        listify(inner, &format!("{path}.{key}"))?;
    }
    let is_index = |key: &String| key.starts_with(|c: char| c.is_ascii_digit());
    let indices = map.keys().filter(|&key| is_index(key)).count();
    if indices == 0 {
        return Ok(());
    }
    if indices < map.len() {
        return Err(inconsistent(path));
    }
    let mut elements: Vec<(u64, Value)> = Vec::new();
    for (key, element) in std::mem::take(map) {
        elements.push((key.parse().unwrap_or(u64::MAX), element));
    }
    elements.sort_by_key(|(index, _)| *index);
    elements.dedup_by_key(|(index, _)| *index);
    if let Some((missing, _)) = (0_u64..).zip(&elements).find(|(at, (index, _))| at != index) {
        return Err(Error::generic(format!("Parameter '{path}.{missing}' missing")));
    }
    *value = elements.into_iter().map(|(_, element)| element).collect();
    Ok(())
}

fn inconsistent(key: &str) -> Error {
    Error::generic(format!("Parameters '{key}.*' used inconsistently"))
}

/// `on` or `off`, or another word for them.
pub(crate) fn boolean(text: &str) -> Option<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

/// A sign and a number in C's notation (strtoull(3) with base 0), blanks before it allowed.
fn magnitude(text: &str) -> Option<(bool, u64)> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\u{b}', '\u{c}', '\r']);
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (radix, digits) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) => (16, hex),
        None if digits.starts_with('0') => (8, digits),
        None => (10, digits),
    };
    // from_str_radix would take a second sign.
    let number = digits.starts_with(|c: char| c.is_digit(radix)).then(|| u64::from_str_radix(digits, radix).ok());
    Some((negative, number??))
}

/// A signed number of 64 bits.
pub(crate) fn signed(text: &str) -> Option<i64> {
    match magnitude(text)? {
        (false, number) => number.try_into().ok(),
        (true, number) => 0_i64.checked_sub_unsigned(number),
    }
}

/// An unsigned number of 64 bits; as with strtoull(3) a minus sign wraps.
pub(crate) fn unsigned(text: &str) -> Option<u64> {
    magnitude(text).map(|(negative, number)| if negative { number.wrapping_neg() } else { number })
}

/// A number with a fraction, finite.
pub(crate) fn number(text: &str) -> Option<f64> {
    text.parse().ok().filter(|number: &f64| number.is_finite())
}

/// A number of bytes: decimal, with a fraction if a suffix (`k`, `M`, `G`, `T`, `P`, `E`) makes it whole enough, or
/// hexadecimal.
pub(crate) fn size(text: &str) -> Option<u64> {
    let text = text.trim_start();
    let text = text.strip_prefix('+').unwrap_or(text);
    if text.starts_with("0x") || text.starts_with("0X") {
        return unsigned(text);
    }
    let (number, shift) = match text.chars().next_back()?.to_ascii_lowercase() {
        'b' => (&text[..text.len() - 1], 0),
        'k' => (&text[..text.len() - 1], 10),
        'm' => (&text[..text.len() - 1], 20),
        'g' => (&text[..text.len() - 1], 30),
        't' => (&text[..text.len() - 1], 40),
        'p' => (&text[..text.len() - 1], 50),
        'e' => (&text[..text.len() - 1], 60),
        _ => (text, 0),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let all_digits = |digits: &str| digits.bytes().all(|digit| digit.is_ascii_digit());
    if whole.len() + fraction.len() == 0 || !all_digits(whole) || !all_digits(fraction) {
        return None;
    }
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let part: f64 = format!("0.{fraction}0").parse().ok()?;
    if shift == 0 && part > 0.0 {
        return None;
    }
    // At most half a byte more than 2^60.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    let part = (part * (1_u64 << shift) as f64 + 0.5) as u64;
    whole.checked_mul(1 << shift)?.checked_add(part)
}
