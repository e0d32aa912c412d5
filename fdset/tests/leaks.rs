// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The process holds what the sets say it holds. One test to this program: others would open descriptors meanwhile.
#![allow(clippy::unwrap_used)]

mod support;

use fdset::{Access, FdSets};
use support::Image;

/// The open descriptors of this process, that of the directory itself included.
fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn ten_thousand_rounds_leave_no_descriptor_behind() {
    let (image, sets) = (Image::new(), FdSets::new());
    let before = open_descriptors();
    for round in 0..10_000 {
        let id = sets.add(image.read_only(), None, None).unwrap().set_id;
        let added = sets.add(image.read_write(), Some(id), None).unwrap();
        let dup = sets.open(id, Access::READ_WRITE).unwrap();
        // Every way for something to end: refused, unmatched, removed before the dup and after it.
        sets.add(image.read_only(), Some(-1), None).unwrap_err();
        sets.open(id, Access::WRITE_ONLY).unwrap_err();
        if round % 2 == 0 {
            drop(dup);
            sets.remove(id, None).unwrap();
        } else {
            sets.remove(id, Some(added.fd.into())).unwrap();
            sets.remove(id, None).unwrap();
            drop(dup);
        }
        assert_eq!(id, 0);
    }
    assert_eq!(open_descriptors(), before);
    assert_eq!(sets.list().len(), 0);
}
