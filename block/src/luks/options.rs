// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QEMU's options for a volume to be made, as they come with `qemu-img create -o` and `blockdev-create`.

use std::time::Duration;

use super::cipher::CipherSpec;
use super::keys::Hash;
use super::volume::FormatOptions;
use crate::drivers::{OptionValue, Options};
use crate::{Error, Result, Secret};

pub const CIPHER_ALG: &str = "the cipher: aes-128, aes-192 or aes-256, the default";
pub const CIPHER_MODE: &str = "its mode: xts, the default, or cbc";
pub const HASH_ALG: &str = "the hash of PBKDF2 and of the splitter: sha1, sha256, the default, or sha512";
pub const ITER_TIME: &str = "milliseconds that one try of a passphrase is to take on this machine, default 2000; \
                             the iterations have an upper bound";
pub const IVGEN_ALG: &str = "how sectors' initialisation vectors are made: plain, plain64, the default, or essiv";
pub const IVGEN_HASH_ALG: &str = "the hash for essiv: sha256";
pub const KEY_SECRET: &str = "the id of a `secret` object that holds the passphrase; required";

/// What `options` say; their names have `prefix` in front.
///
/// # Errors
/// There is no passphrase (QEMU's words), or something is asked for that is not supported.
pub fn read<'a>(options: &'a Options, prefix: &str) -> Result<(FormatOptions, &'a Secret)> {
    let value = |name: &str| options.get(format!("{prefix}{name}").as_str());
    let text = |name: &str| match value(name) {
        Some(OptionValue::Str(text)) => Some(text.as_str()),
        _ => None,
    };
    let Some(OptionValue::Secret(secret)) = value("key-secret") else {
        return Err(Error::invalid(format!("Parameter '{prefix}key-secret' is required for cipher")));
    };
    let default = FormatOptions::default();
    let ivgen = text("ivgen-alg").unwrap_or("plain64");
    let ivgen_hash = text("ivgen-hash-alg").or((ivgen == "essiv").then_some("sha256"));
    let cipher = CipherSpec::from_options(
        text("cipher-alg").unwrap_or("aes-256"),
        text("cipher-mode").unwrap_or("xts"),
        ivgen,
        ivgen_hash,
    )?;
    let iter_time = match value("iter-time") {
        // As for QEMU, 0 says nothing.
        Some(OptionValue::Size(millis)) if *millis > 0 => Duration::from_millis(*millis),
        _ => default.iter_time,
    };
    let hash = text("hash-alg").map_or(Ok(default.hash), Hash::named)?;
    Ok((FormatOptions { cipher, hash, iter_time, ..default }, secret))
}
