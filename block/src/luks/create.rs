// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Making a volume. The header's first sector is written last: until then there is no volume.

use super::{SECTOR, options, volume};
use crate::drivers::{OptionKind, OptionSpec, OptionValue};
use crate::formats::{CreateRequest, preallocation_named};
use crate::{Error, Preallocation, Result};

/// QEMU's options, with its names.
pub const OPTIONS: &[OptionSpec] = &[
    OptionSpec { name: "cipher-alg", kind: OptionKind::Str, summary: options::CIPHER_ALG },
    OptionSpec { name: "cipher-mode", kind: OptionKind::Str, summary: options::CIPHER_MODE },
    OptionSpec { name: "hash-alg", kind: OptionKind::Str, summary: options::HASH_ALG },
    OptionSpec { name: "iter-time", kind: OptionKind::Size, summary: options::ITER_TIME },
    OptionSpec { name: "ivgen-alg", kind: OptionKind::Str, summary: options::IVGEN_ALG },
    OptionSpec { name: "ivgen-hash-alg", kind: OptionKind::Str, summary: options::IVGEN_HASH_ALG },
    OptionSpec { name: "key-secret", kind: OptionKind::Secret, summary: options::KEY_SECRET },
    OptionSpec { name: "preallocation", kind: OptionKind::Str, summary: "off, falloc or full" },
];

/// See [`crate::create`].
pub fn create(request: &CreateRequest) -> Result<()> {
    let (format, secret) = options::read(&request.options, "")?;
    let preallocation = match request.options.get("preallocation") {
        Some(OptionValue::Str(mode)) => preallocation_named(mode)?,
        _ => Preallocation::Off,
    };
    // A volume's room is where its payload is: there are no tables that could say more.
    let preallocation = if preallocation == Preallocation::Metadata { Preallocation::Off } else { preallocation };
    let size = request.size.checked_next_multiple_of(SECTOR as u64).and_then(|size| {
        let end = size.checked_add(format.header_bytes())?;
        i64::try_from(end).is_ok().then_some(end)
    });
    let end = size.ok_or_else(|| Error::invalid("The requested file size is too large"))?;
    // It takes its time: before anything is lost.
    let (header, _) = volume::format(&format, secret.bytes())?;
    let failed = |e| Error::io("write the volume", e);
    let file = &request.file;
    file.resize(0, Preallocation::Off)?;
    file.resize(end, preallocation)?;
    let (first_sector, rest) = header.split_at(SECTOR);
    file.write_growing(rest, SECTOR as u64, false).map_err(failed)?;
    file.flush().map_err(failed)?;
    file.write_growing(first_sector, 0, false).map_err(failed)?;
    file.flush().map_err(failed)
}
