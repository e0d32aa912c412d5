// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Making an image. The header's first sector is written last, when everything that it names is on disk: until then there is no
//! image.
//!
//! ```text
//!  header | refcount table | refcount blocks | L1 table | LUKS header | with preallocation: L2 tables | clusters, in order
//! ```

use super::entry::{L1Entry, L2Entry, Rules};
use super::header::{self, EXT_LUKS, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES};
use super::refcounts::set_count_at;
use super::rewrite::{EXT_BACKING_FORMAT, EXT_DATA_FILE, Parts};
use crate::drivers::{OptionKind, OptionSpec, OptionValue, Options};
use crate::formats::{CreateRequest, preallocation_named};
use crate::luks::{self, FormatOptions};
use crate::{BlockNode, Error, Preallocation, Result, Secret};

/// QEMU's options, with its names.
pub const OPTIONS: &[OptionSpec] = &[
    spec("backing_file", OptionKind::Str, "file name of a base image, as text"),
    spec("backing_fmt", OptionKind::Str, "image format of the base image"),
    spec("cluster_size", OptionKind::Size, "bytes in a cluster, a power of two from 512 to 2 MiB, default 64 KiB"),
    spec("compat", OptionKind::Str, "compatibility level: v2 (0.10) or v3 (1.1), default v3"),
    spec("compression_type", OptionKind::Str, "how clusters are compressed: zlib or zstd"),
    spec("data_file", OptionKind::Str, "file name of an external data file, as text"),
    spec("data_file_raw", OptionKind::Bool, "the external data file stays valid as a raw image"),
    spec("encrypt.cipher-alg", OptionKind::Str, luks::options::CIPHER_ALG),
    spec("encrypt.cipher-mode", OptionKind::Str, luks::options::CIPHER_MODE),
    spec("encrypt.format", OptionKind::Str, "how the image is encrypted: luks"),
    spec("encrypt.hash-alg", OptionKind::Str, luks::options::HASH_ALG),
    spec("encrypt.iter-time", OptionKind::Size, luks::options::ITER_TIME),
    spec("encrypt.ivgen-alg", OptionKind::Str, luks::options::IVGEN_ALG),
    spec("encrypt.ivgen-hash-alg", OptionKind::Str, luks::options::IVGEN_HASH_ALG),
    spec("encrypt.key-secret", OptionKind::Secret, luks::options::KEY_SECRET),
    spec("encryption", OptionKind::Bool, "not supported: AES as it was used before LUKS is broken"),
    spec("extended_l2", OptionKind::Bool, "clusters have subclusters"),
    spec("lazy_refcounts", OptionKind::Bool, "refcount updates may be postponed"),
    spec("preallocation", OptionKind::Str, "off, metadata, falloc or full"),
    spec("refcount_bits", OptionKind::Size, "width of a reference count, a power of two up to 64, default 16"),
];

const fn spec(name: &'static str, kind: OptionKind, summary: &'static str) -> OptionSpec {
    OptionSpec { name, kind, summary }
}

const TOO_LARGE: &str = "The image size is too large for file format 'qcow2' (try using a larger cluster size)";
const NEWER: &str = "with compatibility level 1.1 and above (use version=v3 or greater)";

/// What is to be made, free of contradictions.
struct Wanted<'a> {
    rules: Rules,
    refcount_order: u32,
    size: u64,
    lazy_refcounts: bool,
    zstd: bool,
    data_file: Option<&'a str>,
    data_file_raw: bool,
    backing_file: Option<&'a str>,
    backing_format: Option<&'a str>,
    preallocation: Preallocation,
    luks: Option<(FormatOptions, &'a Secret)>,
}

impl<'a> Wanted<'a> {
    fn read(options: &'a Options, size: u64) -> Result<Wanted<'a>> {
        let text = |name: &str| match options.get(name) {
            Some(OptionValue::Str(text)) => Some(text.as_str()),
            _ => None,
        };
        let is_on = |name: &str| options.get(name) == Some(&OptionValue::Bool(true));
        let number = |name: &str, default: u64| match options.get(name) {
            Some(OptionValue::Size(number)) => *number,
            _ => default,
        };
        let unknown = |name: &str, value: &str| {
            Err(Error::invalid(format!("Parameter '{name}' does not accept value '{}'", value.escape_debug())))
        };
        if is_on("encryption") || text("encrypt.format") == Some("aes") {
            return Err(Error::unsupported(
                "no images are made that are encrypted with AES, which is broken; give 'encrypt.format' = 'luks'",
            ));
        }
        let luks = match text("encrypt.format") {
            Some("luks") => Some(luks::options::read(options, "encrypt.")?),
            Some(other) => return unknown("format", other),
            None if options.keys().any(|name| name.starts_with("encrypt.")) => {
                return Err(Error::invalid("Parameter 'encrypt.format' is missing"));
            }
            None => None,
        };
        let version = match text("compat") {
            None | Some("1.1" | "v3") => 3,
            Some("0.10" | "v2") => 2,
            Some(other) => return unknown("version", other),
        };
        let zstd = match text("compression_type") {
            None | Some("zlib") => false,
            Some("zstd") => true,
            Some(other) => return unknown("compression-type", other),
        };
        let preallocation = text("preallocation").map_or(Ok(Preallocation::Off), preallocation_named)?;
        let cluster_size = number("cluster_size", 65536);
        let refcount_bits = number("refcount_bits", 16);
        let wanted = Wanted {
            rules: Rules {
                cluster_bits: cluster_size.checked_ilog2().unwrap_or(0),
                version,
                extended: is_on("extended_l2"),
                external_data: text("data_file").is_some(),
            },
            refcount_order: refcount_bits.checked_ilog2().unwrap_or(0),
            size,
            lazy_refcounts: is_on("lazy_refcounts"),
            zstd,
            data_file: text("data_file"),
            data_file_raw: is_on("data_file_raw"),
            backing_file: text("backing_file").filter(|name| !name.is_empty()),
            backing_format: text("backing_fmt"),
            preallocation,
            luks,
        };
        wanted.check(cluster_size, refcount_bits)?;
        Ok(wanted)
    }

    /// Every rule by which QEMU refuses, in its words.
    fn check(&self, cluster_size: u64, refcount_bits: u64) -> Result<()> {
        let (new, rules) = (self.rules.version > 2, self.rules);
        let with_extended = !self.rules.extended && self.preallocation != Preallocation::Off;
        let refused: &[(bool, &str)] = &[
            (
                !cluster_size.is_power_of_two() || !(9..=21).contains(&rules.cluster_bits),
                "Cluster size must be a power of two between 512 and 2048k",
            ),
            (
                rules.extended && rules.cluster_bits < 14,
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            ),
            (rules.extended && !new, &format!("Extended L2 entries are only supported {NEWER}")),
            (
                !refcount_bits.is_power_of_two() || refcount_bits > 64,
                "Refcount width must be a power of two and may not exceed 64 bits",
            ),
            (
                !new && refcount_bits != 16,
                "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)",
            ),
            (self.lazy_refcounts && !new, &format!("Lazy refcounts only supported {NEWER}")),
            (self.zstd && !new, &format!("Non-zlib compression type is only supported {NEWER}")),
            (self.data_file.is_some() && !new, &format!("External data files are only supported {NEWER}")),
            (self.data_file_raw && self.data_file.is_none(), "data-file-raw requires data-file"),
            (
                self.data_file_raw && self.backing_file.is_some(),
                "Backing file and data-file-raw cannot be used at the same time",
            ),
            (
                self.backing_file.is_some() && with_extended,
                "Backing file and preallocation can only be used at the same time if extended_l2 is on",
            ),
            (
                self.backing_format.is_some() && self.backing_file.is_none(),
                "Backing format cannot be used without backing file",
            ),
            (self.backing_format.is_some_and(|format| format.len() > 15), "Backing format name too long"),
            (self.backing_file.is_some_and(|name| name.len() > 1023), "Backing file name too long"),
            (self.data_file.is_some_and(|name| name.len() > 1023), "Data file name too long"),
            (
                self.data_file_raw && self.luks.is_some(),
                "data-file-raw and encryption cannot be used at the same time: the data file would not be raw",
            ),
            (
                self.luks.is_some() && self.preallocation != Preallocation::Off && !new,
                "Preallocation of an encrypted image needs compatibility level 1.1 and above (use version=v3 or greater): \
                 without zero clusters the disk would be full of noise",
            ),
            (!self.size.is_multiple_of(512), "Image size must be a multiple of 512 bytes"),
            (i64::try_from(self.size).is_err(), TOO_LARGE),
        ];
        match refused.iter().find(|(is_so, _)| *is_so) {
            Some((_, text)) => Err(Error::invalid(*text)),
            None => Ok(()),
        }
    }
}

/// Where everything goes, in clusters.
struct Layout {
    table: u64,
    blocks: u64,
    l1: u64,
    luks: u64,
    l2: u64,
    data: u64,
    /// One past the last cluster in use.
    end: u64,
    /// L2 tables that the disk needs.
    tables: u64,
}

impl Layout {
    fn new(wanted: &Wanted<'_>) -> Result<Layout> {
        let rules = wanted.rules;
        let size = rules.cluster_size();
        let too_large = || Error::invalid(TOO_LARGE);
        let tables = wanted.size.div_ceil(size * rules.l2_entries());
        if tables * 8 > MAX_L1_BYTES {
            return Err(too_large());
        }
        let is_preallocated = wanted.preallocation != Preallocation::Off;
        let l1_clusters = (tables * 8).div_ceil(size).max(1);
        let luks_clusters = wanted.luks.map_or(0, |(options, _)| options.header_bytes().div_ceil(size));
        let l2_clusters = if is_preallocated { tables } else { 0 };
        let data_clusters = if is_preallocated && !rules.external_data { wanted.size.div_ceil(size) } else { 0 };
        let per_block = (8 << rules.cluster_bits) >> wanted.refcount_order;
        let (mut table_clusters, mut blocks) = (1, 1);
        loop {
            let end = 1 + table_clusters + blocks + l1_clusters + luks_clusters + l2_clusters + data_clusters;
            let more = (end.div_ceil(per_block), (blocks * 8).div_ceil(size));
            if more.0 <= blocks && more.1 <= table_clusters {
                let l1 = 1 + table_clusters + blocks;
                let luks = l1 + l1_clusters;
                let l2 = luks + luks_clusters;
                return Ok(Layout {
                    table: 1,
                    blocks: 1 + table_clusters,
                    l1,
                    luks,
                    l2,
                    data: l2 + l2_clusters,
                    end,
                    tables,
                });
            }
            (blocks, table_clusters) = (more.0.max(blocks), more.1.max(table_clusters));
            if table_clusters * size > MAX_REFCOUNT_TABLE_BYTES {
                return Err(too_large());
            }
        }
    }
}

/// See [`crate::create`].
pub fn create(request: &CreateRequest) -> Result<()> {
    let wanted = Wanted::read(&request.options, request.size)?;
    let layout = Layout::new(&wanted)?;
    let header = first_cluster(&wanted, &layout)?;
    let file = &request.file;
    let failed = |e| Error::io("write the image", e);
    // It takes its time: before anything is lost.
    let luks = wanted.luks.map(|(options, secret)| luks::format(&options, secret.bytes())).transpose()?;
    file.resize(0, Preallocation::Off)?;
    write_refcounts(file, &wanted, &layout)?;
    write_tables(file, &wanted, &layout)?;
    if let Some((header, _)) = luks {
        write(file, &header, layout.luks << wanted.rules.cluster_bits)?;
    }
    let end = layout.end << wanted.rules.cluster_bits;
    if file.len() < end {
        let mode =
            if wanted.preallocation == Preallocation::Metadata { Preallocation::Off } else { wanted.preallocation };
        file.resize(end, mode)?;
    }
    if let Some(data) = request.data_file.as_ref().filter(|_| wanted.rules.external_data) {
        data.resize(0, Preallocation::Off)?;
        let mode =
            if wanted.preallocation == Preallocation::Metadata { Preallocation::Off } else { wanted.preallocation };
        if wanted.data_file_raw || wanted.preallocation != Preallocation::Off {
            data.resize(wanted.size, mode)?;
        }
        data.flush().map_err(failed)?;
    }
    let (first_sector, rest) = header.split_at(512);
    file.write_growing(rest, 512, false).map_err(failed)?;
    file.flush().map_err(failed)?;
    file.write_growing(first_sector, 0, false).map_err(failed)?;
    file.flush().map_err(failed)
}

fn first_cluster(wanted: &Wanted<'_>, layout: &Layout) -> Result<Vec<u8>> {
    let rules = wanted.rules;
    let u32_of = |number: u64| u32::try_from(number).unwrap_or(u32::MAX).to_be_bytes();
    let place = |cluster: u64| (cluster << rules.cluster_bits).to_be_bytes();
    let bits = |set: &[(bool, u64)]| {
        set.iter().filter(|(is_set, _)| *is_set).fold(0, |bits, (_, bit)| bits | bit).to_be_bytes()
    };
    let mut parts = Parts::new(rules.version, rules.cluster_bits);
    parts.put(24, &wanted.size.to_be_bytes());
    parts.put(32, &u32_of(if wanted.luks.is_some() { header::CRYPT_LUKS } else { 0 }));
    parts.put(36, &u32_of(layout.tables));
    parts.put(40, &place(layout.l1));
    parts.put(48, &place(layout.table));
    parts.put(56, &u32_of(layout.blocks - layout.table));
    let incompatible = [
        (rules.external_data, header::DATA_FILE),
        (wanted.zstd, header::COMPRESSION),
        (rules.extended, header::EXTENDED_L2),
    ];
    parts.put(72, &bits(&incompatible));
    parts.put(80, &bits(&[(wanted.lazy_refcounts, header::LAZY_REFCOUNTS)]));
    parts.put(88, &bits(&[(wanted.data_file_raw, header::DATA_FILE_RAW)]));
    parts.put(96, &wanted.refcount_order.to_be_bytes());
    parts.put(104, &[u8::from(wanted.zstd)]);
    parts.set_extension(EXT_DATA_FILE, wanted.data_file.map(str::as_bytes));
    parts.set_extension(EXT_BACKING_FORMAT, wanted.backing_format.map(str::as_bytes));
    let luks = wanted.luks.map(|(options, _)| [place(layout.luks), options.header_bytes().to_be_bytes()].concat());
    parts.set_extension(EXT_LUKS, luks.as_deref());
    parts.set_backing_name(wanted.backing_file.unwrap_or_default());
    parts.encode()
}

/// Every cluster up to the end is in use once.
fn write_refcounts(file: &BlockNode, wanted: &Wanted<'_>, layout: &Layout) -> Result<()> {
    let (rules, order) = (wanted.rules, wanted.refcount_order);
    let (size, bits) = (rules.cluster_size(), rules.cluster_bits);
    let per_block = (8 << bits) >> order;
    let block_of = |clusters: u64| {
        let mut block = vec![0; usize::try_from(size).unwrap_or(0)];
        (0..clusters).for_each(|at| set_count_at(&mut block, at, order, 1));
        block
    };
    let full = block_of(per_block);
    let blocks = layout.l1 - layout.blocks;
    for index in 0..blocks {
        let covered = layout.end.saturating_sub(index * per_block).min(per_block);
        let last;
        let block = if covered == per_block {
            &full
        } else {
            last = block_of(covered);
            &last
        };
        write(file, block, (layout.blocks + index) << bits)?;
    }
    let mut table: Vec<u8> = (0..blocks).flat_map(|index| ((layout.blocks + index) << bits).to_be_bytes()).collect();
    table.resize(usize::try_from((layout.blocks - layout.table) * size).unwrap_or(0), 0);
    write(file, &table, layout.table << bits)
}

/// The L1 table, and with preallocation the L2 tables.
fn write_tables(file: &BlockNode, wanted: &Wanted<'_>, layout: &Layout) -> Result<()> {
    let rules = wanted.rules;
    let (size, bits) = (rules.cluster_size(), rules.cluster_bits);
    let is_preallocated = layout.data > layout.l2;
    let entry = |index: u64| match index < layout.tables && is_preallocated {
        true => L1Entry::exclusive((layout.l2 + index) << bits).0,
        false => 0,
    };
    let l1: Vec<u8> = (0..(layout.luks - layout.l1) * size / 8).flat_map(|index| entry(index).to_be_bytes()).collect();
    write(file, &l1, layout.l1 << bits)?;
    if !is_preallocated {
        return Ok(());
    }
    let clusters = wanted.size.div_ceil(size);
    let first = if rules.external_data { 0 } else { layout.data };
    let mut table = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    for index in 0..layout.tables {
        table.clear();
        for cluster in index * rules.l2_entries()..((index + 1) * rules.l2_entries()).min(clusters) {
            let place = (first + cluster) << bits;
            // What was never encrypted would read as noise.
            let is_noise = wanted.luks.is_some() && !rules.extended;
            let entry = if is_noise { L2Entry::zero(Some(place), rules) } else { L2Entry::stored(place, rules) };
            table.extend(entry.word.to_be_bytes());
            if rules.extended {
                // The room is there; what is in it is up to whoever writes first.
                table.extend([0; 8]);
            }
        }
        table.resize(usize::try_from(size).unwrap_or(0), 0);
        write(file, &table, (layout.l2 + index) << bits)?;
    }
    Ok(())
}

fn write(file: &BlockNode, bytes: &[u8], offset: u64) -> Result<()> {
    file.write_growing(bytes, offset, false).map_err(|e| Error::io("write the image", e))
}
