// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest's memory as the front end passed it: regions with three addresses each (the guest's, the front end's, ours).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use sys::guest::{Mapping, Slice};

use super::proto::{Fault, MAX_REGIONS, RegionAt, Request};

/// A region, mapped.
#[derive(Debug)]
struct Region {
    at: RegionAt,
    mapping: Mapping,
    /// What is mapped: for another process that goes on with it.
    file: OwnedFd,
}

/// A guest's memory. It never changes: another table of regions is another value.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// By guest address, without overlap.
    regions: Vec<Arc<Region>>,
}

impl Memory {
    /// This memory and one more region.
    ///
    /// # Errors
    /// It overlaps another one, is one too many, or cannot be mapped.
    pub fn with(&self, request: Request, at: RegionAt, file: OwnedFd) -> Result<Memory, Fault> {
        let refused = |what| Err(Fault::Memory(request, what));
        let (Some(guest_end), Some(_)) = (at.guest.checked_add(at.len), at.user.checked_add(at.len)) else {
            return refused("a region that passes the end of its address space");
        };
        if self.regions.len() >= MAX_REGIONS {
            return refused("more than 32 regions");
        }
        let overlaps = |other: &RegionAt| at.guest < other.guest + other.len && other.guest < guest_end;
        if self.regions.iter().any(|region| overlaps(&region.at)) {
            return refused("regions that overlap");
        }
        let Ok(mapping) = Mapping::new(file.as_fd(), at.offset, at.len) else {
            return refused("a region that cannot be mapped for reading and writing");
        };
        let place = self.regions.partition_point(|region| region.at.guest < at.guest);
        let mut regions = self.regions.clone();
        regions.insert(place, Arc::new(Region { at, mapping, file }));
        Ok(Memory { regions })
    }

    /// This memory without a region, which is named by all of its addresses.
    ///
    /// # Errors
    /// There is no such region.
    pub fn without(&self, request: Request, at: RegionAt) -> Result<Memory, Fault> {
        let same = |region: &RegionAt| (region.guest, region.user, region.len) == (at.guest, at.user, at.len);
        let place = self.regions.iter().position(|region| same(&region.at));
        let place = place.ok_or(Fault::Memory(request, "a region that there is not"))?;
        let mut regions = self.regions.clone();
        regions.remove(place);
        Ok(Memory { regions })
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Every region, and the file that it is a part of.
    pub fn regions(&self) -> impl Iterator<Item = (RegionAt, &OwnedFd)> {
        self.regions.iter().map(|region| (region.at, &region.file))
    }

    /// Whether a part of it turned out to be gone.
    pub fn is_broken(&self) -> bool {
        self.regions.iter().any(|region| region.mapping.is_broken())
    }

    /// Appends the pieces of `len` bytes from a guest address; false, with some of them appended, if not all of it is memory.
    #[must_use]
    pub fn pieces<'a>(&'a self, mut guest: u64, mut len: u64, into: &mut Vec<Slice<'a>>) -> bool {
        let mut index = self.regions.partition_point(|region| region.at.guest <= guest).wrapping_sub(1);
        loop {
            let Some(region) = self.regions.get(index) else { return false };
            let Some(there) = guest.checked_sub(region.at.guest).filter(|&at| at < region.at.len) else { return false };
            let piece = len.min(region.at.len - there);
            let Some(slice) = region.mapping.slice(there, piece) else { return false };
            into.push(slice);
            len -= piece;
            if len == 0 {
                return true;
            }
            // A buffer may go on in the region that follows without a gap.
            let Some(next) = guest.checked_add(piece) else { return false };
            guest = next;
            index += 1;
        }
    }

    /// `len` bytes from a guest address that lie in one region.
    pub fn at_guest(&self, guest: u64, len: u64) -> Option<Slice<'_>> {
        let index = self.regions.partition_point(|region| region.at.guest <= guest).checked_sub(1)?;
        let region = &self.regions[index];
        region.mapping.slice(guest - region.at.guest, len)
    }

    /// `len` bytes from an address of the front end's that lie in one region.
    pub fn at_user(&self, user: u64, len: u64) -> Option<Slice<'_>> {
        self.regions.iter().find_map(|region| {
            let at = user.checked_sub(region.at.user)?;
            region.mapping.slice(at, len)
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn memory(regions: &[(u64, u64, u64)]) -> Result<Memory, Fault> {
        let fd = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, 1 << 20).unwrap();
        let region = |&(guest, len, user)| RegionAt { guest, len, user, offset: 0 };
        regions
            .iter()
            .map(region)
            .try_fold(Memory::default(), |memory, at| memory.with(Request::SetMemTable, at, fd.try_clone().unwrap()))
    }

    fn lengths(memory: &Memory, guest: u64, len: u64) -> Option<Vec<usize>> {
        let mut slices = Vec::new();
        memory.pieces(guest, len, &mut slices).then(|| slices.iter().map(Slice::len).collect())
    }

    #[test]
    fn a_buffer_goes_on_in_the_next_region_but_not_over_a_gap() {
        let memory =
            memory(&[(0x9000, 0x1000, 0x50000), (0x1000, 0x1000, 0x10000), (0x2000, 0x3000, 0x30000)]).unwrap();
        assert_eq!(lengths(&memory, 0x1ff0, 0x20), Some(vec![0x10, 0x10]));
        assert_eq!(lengths(&memory, 0x1000, 0x4000), Some(vec![0x1000, 0x3000]));
        assert_eq!(lengths(&memory, 0x4ff0, 0x20), None);
        assert_eq!(lengths(&memory, 0xfff, 1), None);
        assert_eq!(lengths(&memory, 0x9fff, 1), Some(vec![1]));
        assert_eq!(lengths(&memory, 0x9fff, 2), None);
        assert_eq!(lengths(&memory, u64::MAX, 2), None);
        assert!(memory.at_user(0x10fff, 1).is_some() && memory.at_user(0x10fff, 2).is_none());
        assert!(memory.at_guest(0x9000, 0x1000).is_some() && memory.at_guest(0x8000, 1).is_none());
    }

    #[test]
    fn regions_that_overlap_or_wrap_are_refused() {
        assert!(memory(&[(0, 0x2000, 0), (0x1fff, 0x1000, 0x9000)]).is_err());
        assert!(memory(&[(0x1000, 0x1000, 0), (0, 0x4000, 0x9000)]).is_err());
        assert!(memory(&[(u64::MAX - 1, 0x1000, 0)]).is_err());
        assert!(memory(&[(0, 0x1000, u64::MAX)]).is_err());
        assert!(memory(&[(0, 0, 0)]).is_err());
    }

    #[test]
    fn a_region_leaves_by_its_addresses_alone() {
        let memory = memory(&[(0, 0x1000, 0x7000), (0x1000, 0x1000, 0x9000)]).unwrap();
        let at = |user| RegionAt { guest: 0, len: 0x1000, user, offset: 77 };
        assert!(memory.without(Request::RemMemReg, at(0x7001)).is_err());
        let memory = memory.without(Request::RemMemReg, at(0x7000)).unwrap();
        assert!(memory.at_guest(0, 1).is_none() && memory.at_guest(0x1000, 1).is_some());
    }
}
