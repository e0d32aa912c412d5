// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Numbers and options as qemu-img's command line has them.

use std::collections::BTreeMap;

use block::{OptionKind, OptionSpec, OptionValue, Options};

use crate::secrets::Secrets;

/// A number of bytes: digits, perhaps with a fraction, and a suffix for a power of 1024.
pub fn size(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole = whole.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    // Enough digits for any size that a disk can have.
    let digits: String = fraction.chars().take(12).collect();
    let part = if digits.is_empty() { 0 } else { digits.parse::<u128>().ok()? };
    let scale = 10u128.checked_pow(u32::try_from(digits.len()).ok()?)?;
    whole.checked_add(u64::try_from((part << shift) / scale).ok()?)
}

/// Options of `-o`, read.
#[derive(Debug, Default)]
pub struct Parsed {
    /// By the types of the format's table.
    pub options: Options,
    /// `size`, in bytes.
    pub size: Option<u64>,
    /// Ids of the secrets among the options, by the options' names.
    pub ids: BTreeMap<&'static str, String>,
}

/// `name=value,name=value` by the types of `known`; a comma in a value is written twice. Secrets are looked up in `secrets`.
///
/// # Errors
/// QEMU's words for an option that does not exist or a value of another type.
pub fn parse(texts: &[String], known: &[OptionSpec], secrets: &Secrets) -> Result<Parsed, String> {
    let mut parsed = Parsed::default();
    for pair in texts.iter().flat_map(|text| split(text)) {
        let (name, value) = pair.split_once('=').unwrap_or((&pair, "on"));
        let not_a_size = || format!("Parameter '{name}' expects a non-negative number below 2^64");
        if name == "size" {
            parsed.size = Some(size(value).ok_or_else(not_a_size)?);
            continue;
        }
        let spec = known.iter().find(|spec| spec.name == name);
        let spec = spec.ok_or_else(|| format!("Invalid parameter '{}'", name.escape_debug()))?;
        let value = match spec.kind {
            OptionKind::Bool => match value {
                "on" | "yes" | "true" | "y" => OptionValue::Bool(true),
                "off" | "no" | "false" | "n" => OptionValue::Bool(false),
                _ => return Err(format!("Parameter '{name}' expects 'on' or 'off'")),
            },
            OptionKind::Size => OptionValue::Size(size(value).ok_or_else(not_a_size)?),
            OptionKind::Secret | OptionKind::LuksSecret => {
                parsed.ids.insert(spec.name, value.to_owned());
                OptionValue::Secret(secrets.get(value)?)
            }
            _ => OptionValue::Str(value.to_owned()),
        };
        parsed.options.insert(spec.name, value);
    }
    Ok(parsed)
}

/// The options with which an image of format `format` can be made.
///
/// # Errors
/// QEMU's words for a format that cannot be made.
pub fn known(format: &str) -> Result<&'static [OptionSpec], String> {
    let found = block::format_named(format).map(|format| format.create_options);
    found.ok_or_else(|| match block::driver_named(format) {
        Some(_) => format!("Format driver '{format}' does not support image creation"),
        None => format!("Unknown file format '{}'", format.escape_debug()),
    })
}

/// What `-o help` answers.
pub fn help(format: &str, known: &[OptionSpec]) -> String {
    let mut text = format!("Supported {format} options:\n");
    for spec in known {
        let kind = match spec.kind {
            OptionKind::Bool => "bool (on/off)",
            OptionKind::Size => "size",
            _ => "str",
        };
        text += &format!("  {}=<{kind}> - {}\n", spec.name, spec.summary);
    }
    text + "  size=<size> - bytes of the disk\n"
}

/// What qemu-img says before it makes an image of `size` bytes.
pub fn create_line(name: &str, format: &str, size: u64, parsed: &Parsed) -> String {
    let mut line = format!("Formatting '{name}', fmt={format}");
    let mut put = |name: &str, default: Option<&str>| {
        let value = match parsed.options.get(name) {
            Some(OptionValue::Bool(value)) => Some(if *value { "on" } else { "off" }.to_owned()),
            Some(OptionValue::Size(value)) => Some(value.to_string()),
            Some(OptionValue::Str(value)) => Some(value.clone()),
            _ => parsed.ids.get(name).cloned().or_else(|| default.map(str::to_owned)),
        };
        if let Some(value) = value {
            line += &format!(" {name}={value}");
        }
    };
    let size = size.to_string();
    // In QEMU's order, with its defaults; what is not in the list comes behind.
    let order: &[(&str, Option<&str>)] = match format {
        "qcow2" => &[
            ("encrypt.format", None),
            ("encrypt.key-secret", None),
            ("encrypt.cipher-alg", None),
            ("encrypt.cipher-mode", None),
            ("encrypt.ivgen-alg", None),
            ("encrypt.ivgen-hash-alg", None),
            ("encrypt.hash-alg", None),
            ("encrypt.iter-time", None),
            ("cluster_size", Some("65536")),
            ("extended_l2", Some("off")),
            ("preallocation", None),
            ("compression_type", Some("zlib")),
            ("size", Some(&size)),
            ("compat", None),
            ("data_file", None),
            ("backing_file", None),
            ("backing_fmt", None),
            ("data_file_raw", None),
            ("lazy_refcounts", Some("off")),
            ("refcount_bits", Some("16")),
        ],
        "luks" => &[
            ("size", Some(&size)),
            ("key-secret", None),
            ("cipher-alg", None),
            ("cipher-mode", None),
            ("ivgen-alg", None),
            ("ivgen-hash-alg", None),
            ("hash-alg", None),
            ("iter-time", None),
        ],
        _ => &[("size", Some(&size))],
    };
    for (name, default) in order {
        put(name, *default);
    }
    let defaults = [("compat6", "off"), ("hwversion", "undefined"), ("static", "off")];
    let rest = known(format).unwrap_or_default().iter().map(|spec| spec.name);
    for name in rest.filter(|name| !order.iter().any(|(listed, _)| listed == name)) {
        put(name, defaults.into_iter().find(|(known, _)| *known == name).map(|(_, value)| value));
    }
    line + "\n"
}

/// Splits at commas; one that is written twice is part of its piece. Empty pieces are left out.
pub fn split(text: &str) -> Vec<String> {
    let mut pieces = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            ',' if characters.peek() == Some(&',') => {
                characters.next();
                if let Some(last) = pieces.last_mut() {
                    last.push(',');
                }
            }
            ',' => pieces.push(String::new()),
            other => {
                if let Some(last) = pieces.last_mut() {
                    last.push(other);
                }
            }
        }
    }
    pieces.retain(|piece| !piece.is_empty());
    pieces
}

/// Bytes as people read them, as QEMU rounds them: three digits and a binary unit.
pub fn human(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    // The unit changes at 1000, so that there are never four digits.
    let index = (0..units.len() - 1).find(|&index| u128::from(bytes) < 1000u128 << (10 * index)).unwrap_or(6);
    #[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
    let scaled = bytes as f64 / (1u64 << (10 * index)) as f64;
    let decimals = match scaled {
        s if s >= 99.95 => 0,
        s if s >= 9.995 => 1,
        s if s >= 0.9995 => 2,
        _ => 3,
    };
    let shown = format!("{scaled:.decimals$}");
    let shown = if shown.contains('.') { shown.trim_end_matches('0').trim_end_matches('.') } else { &shown };
    format!("{shown} {}", units[index])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_suffixes_and_fractions() {
        let cases = [("512", 512), ("1k", 1024), ("1.5k", 1536), ("0.5G", 1 << 29), ("2T", 2 << 40)];
        for (text, bytes) in cases {
            assert_eq!(size(text), Some(bytes), "{text}");
        }
        for text in ["", "x", "1x", "1.2.3", "-1", "99999999999999999999", "17E"] {
            assert_eq!(size(text), None, "{text}");
        }
    }

    #[test]
    fn a_comma_twice_is_a_comma() {
        assert_eq!(split("a=1,,2,b=3"), ["a=1,2", "b=3"]);
    }

    #[test]
    fn people_read_three_digits() {
        let cases = [
            (0, "0 B"),
            (512, "512 B"),
            (1000, "0.977 KiB"),
            (589_824, "576 KiB"),
            (4 << 20, "4 MiB"),
            (1 << 40, "1 TiB"),
            (1_572_864, "1.5 MiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(human(bytes), text);
        }
    }
}
