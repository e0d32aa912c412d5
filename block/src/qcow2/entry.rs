// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Entries of the L1 and L2 tables (qcow2.txt, "Cluster mapping").

/// Bits 9 to 55.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1 << 0;
/// Subclusters in a cluster.
pub const SUBCLUSTERS: u64 = 32;

/// An entry of the L1 table.
///
/// ```text
///  0 -  8  reserved       9 - 55  offset of an L2 table, 0: none       63  refcount is exactly one
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// The entry for a table that nobody else uses.
    pub fn exclusive(table: u64) -> L1Entry {
        L1Entry(table | COPIED)
    }

    /// Offset of the L2 table; 0 is none.
    pub fn offset(self) -> u64 {
        self.0 & OFFSET
    }

    /// Whether the table may be changed in place: no snapshot uses it.
    pub fn is_exclusive(self) -> bool {
        self.0 & COPIED != 0
    }
}

/// An entry of an L2 table; `bitmap` is the second half of an extended one.
///
/// ```text
///  standard:    0  reads as zeroes (version 3, not extended)   9 - 55  offset of the cluster   63  refcount is exactly one
///  compressed:  62 set; x = 62 - (cluster_bits - 8)   0 - x-1  offset in bytes   x - 61  512-byte sectors besides the first
///  bitmap:      0 - 31  subcluster is allocated       32 - 63  subcluster reads as zeroes
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L2Entry {
    pub word: u64,
    pub bitmap: u64,
}

/// What a cluster, or a subcluster, is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The layer below decides.
    Unallocated,
    /// Zeroes.
    Zero,
    /// Stored as it is; the cluster starts at this offset.
    Stored(u64),
    /// Stored compressed.
    Compressed,
    /// Against the rules.
    Invalid,
}

/// Bytes in a slice of an L2 table, unless a whole table is smaller.
pub const SLICE_BYTES: u64 = 4096;

/// What an image's header says about the meaning of entries, and the numbers that follow.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    pub cluster_bits: u32,
    pub version: u32,
    pub extended: bool,
    pub external_data: bool,
}

impl Rules {
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes, as a power of two, of the smallest run that has a kind of its own: a cluster, or a subcluster.
    pub fn unit_bits(self) -> u32 {
        self.cluster_bits - if self.extended { SUBCLUSTERS.ilog2() } else { 0 }
    }

    pub fn units_per_cluster(self) -> u64 {
        if self.extended { SUBCLUSTERS } else { 1 }
    }

    /// Words in an L2 entry.
    pub fn entry_words(self) -> u64 {
        if self.extended { 2 } else { 1 }
    }

    /// Entries in an L2 table, which is one cluster.
    pub fn l2_entries(self) -> u64 {
        self.cluster_size() / 8 / self.entry_words()
    }

    /// Words in a slice.
    pub fn slice_words(self) -> u64 {
        SLICE_BYTES.min(self.cluster_size()) / 8
    }

    /// Entries in a slice.
    pub fn slice_entries(self) -> u64 {
        self.slice_words() / self.entry_words()
    }

    /// Slices in a table.
    pub fn slices_per_table(self) -> u64 {
        self.l2_entries() / self.slice_entries()
    }
}

impl L2Entry {
    /// Neither data nor zeroes: the layer below decides.
    pub const UNALLOCATED: L2Entry = L2Entry { word: 0, bitmap: 0 };

    /// A cluster stored at `place`, which nobody else uses.
    pub fn stored(place: u64, rules: Rules) -> L2Entry {
        L2Entry { word: place | COPIED, bitmap: if rules.extended { 0xffff_ffff } else { 0 } }
    }

    /// A cluster of zeroes; `place`, if there is one, stays its own.
    pub fn zero(place: Option<u64>, rules: Rules) -> L2Entry {
        let word = place.map_or(0, |place| place | COPIED);
        if rules.extended {
            L2Entry { word, bitmap: 0xffff_ffff << SUBCLUSTERS }
        } else {
            L2Entry { word: word | ZERO, bitmap: 0 }
        }
    }

    /// `len` bytes of compressed data at `offset`; `None` if the entry has no room for such an offset.
    pub fn compressed(offset: u64, len: u64, cluster_bits: u32) -> Option<L2Entry> {
        let shift = 62 - (cluster_bits - 8);
        let sectors = (offset + len - 1) / 512 - offset / 512;
        (offset >> shift == 0).then_some(L2Entry { word: COMPRESSED | sectors << shift | offset, bitmap: 0 })
    }

    /// The host cluster that it owns or shares, whether its content counts or not.
    pub fn place(self, rules: Rules) -> Option<u64> {
        let offset = self.word & OFFSET;
        let is_one = offset != 0 || (rules.external_data && self.word & COPIED != 0);
        (is_one && !self.is_compressed() && offset.is_multiple_of(rules.cluster_size())).then_some(offset)
    }

    /// Whether the place may be written: no snapshot uses it.
    pub fn is_exclusive(self) -> bool {
        self.word & COPIED != 0
    }

    /// The entry with its mark of being nobody else's set or taken away.
    pub fn with_exclusive(self, exclusive: bool) -> L2Entry {
        L2Entry { word: self.word & !COPIED | if exclusive { COPIED } else { 0 }, ..self }
    }

    pub fn is_compressed(self) -> bool {
        self.word & COMPRESSED != 0
    }

    /// The entry with the units of `stored` as data and those of `zero` as zeroes; the other units stay.
    pub fn with_units(self, stored: u32, zero: u32) -> L2Entry {
        let changed = u64::from(stored | zero);
        let kept = self.bitmap & !(changed | changed << SUBCLUSTERS);
        L2Entry { bitmap: kept | u64::from(stored) | u64::from(zero) << SUBCLUSTERS, ..self }
    }

    /// What `subcluster` (0 without extended entries) is.
    pub fn kind(self, subcluster: u64, rules: Rules) -> Kind {
        if self.word & COMPRESSED != 0 {
            // There is no room for a compressed cluster in a file that is to hold plain data.
            return if rules.external_data || self.bitmap != 0 { Kind::Invalid } else { Kind::Compressed };
        }
        let offset = self.word & OFFSET;
        let stored = || {
            if offset.is_multiple_of(1 << rules.cluster_bits) { Kind::Stored(offset) } else { Kind::Invalid }
        };
        // Offset 0 is a place only in an external data file, and only the copied flag tells it from none.
        let has_place = offset != 0 || (rules.external_data && self.word & COPIED != 0);
        if rules.extended {
            let allocated = self.bitmap >> subcluster & 1 == 1;
            let zero = self.bitmap >> (subcluster + SUBCLUSTERS) & 1 == 1;
            return match (allocated, zero) {
                (true, false) if has_place => stored(),
                (true, _) => Kind::Invalid,
                (false, true) => Kind::Zero,
                (false, false) => Kind::Unallocated,
            };
        }
        if self.word & ZERO != 0 {
            return if rules.version == 2 { Kind::Invalid } else { Kind::Zero };
        }
        if has_place { stored() } else { Kind::Unallocated }
    }

    /// Offset and length in bytes of a compressed cluster's data; the last sector may be cut by the end of the file.
    pub fn compressed_range(self, cluster_bits: u32) -> (u64, u64) {
        let shift = 62 - (cluster_bits - 8);
        let offset = self.word & ((1 << shift) - 1);
        let sectors = (self.word & (COMPRESSED - 1)) >> shift;
        (offset, (sectors + 1) * 512 - offset % 512)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules { cluster_bits: 16, version: 3, extended: false, external_data: false };

    fn kind(word: u64, rules: Rules) -> Kind {
        L2Entry { word, bitmap: 0 }.kind(0, rules)
    }

    #[test]
    fn the_zero_bit_is_against_the_rules_in_version_2() {
        assert_eq!(kind(1, RULES), Kind::Zero);
        assert_eq!(kind(1, Rules { version: 2, ..RULES }), Kind::Invalid);
    }

    #[test]
    fn offset_0_is_a_place_only_in_an_external_data_file() {
        assert_eq!(kind(COPIED, RULES), Kind::Unallocated);
        let external = Rules { external_data: true, ..RULES };
        assert_eq!(kind(COPIED, external), Kind::Stored(0));
        assert_eq!(kind(0, external), Kind::Unallocated);
    }

    #[test]
    fn an_unaligned_cluster_is_against_the_rules() {
        assert_eq!(kind(0x10000 | COPIED, RULES), Kind::Stored(0x10000));
        assert_eq!(kind(0x10200 | COPIED, RULES), Kind::Invalid);
    }

    #[test]
    fn a_subcluster_is_allocated_or_zero_or_neither_but_not_both() {
        let rules = Rules { extended: true, ..RULES };
        let entry = L2Entry { word: 0x10000, bitmap: 0b1001 | 0b1010 << 32 };
        let kinds: Vec<Kind> = (0..4).map(|subcluster| entry.kind(subcluster, rules)).collect();
        assert_eq!(kinds, [Kind::Stored(0x10000), Kind::Zero, Kind::Unallocated, Kind::Invalid]);
    }

    #[test]
    fn a_compressed_cluster_ends_with_its_last_sector() {
        // 64 KiB clusters: 54 bits of offset, 8 bits of sectors.
        let entry = L2Entry { word: COMPRESSED | 3 << 54 | 0x1_0123, bitmap: 0 };
        assert_eq!(entry.compressed_range(16), (0x1_0123, 4 * 512 - 0x123));
    }
}
