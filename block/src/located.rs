// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where a whole range lies in one host file: for those who read it there themselves, while they do something else.

use std::os::fd::BorrowedFd;

use sys::file::Wait;

use crate::BlockNode;
use crate::driver::{Ask, Detail, Mapping, Target};

/// A place in a host file.
#[derive(Clone, Copy, Debug)]
pub struct Located<'a> {
    /// The file.
    pub fd: BorrowedFd<'a>,
    /// Byte offset in it. What is past the end reads as zeroes.
    pub offset: u64,
}

/// A host file that may be read by others than its driver.
#[derive(Clone, Copy, Debug)]
pub struct HostFile<'a> {
    /// The file.
    pub fd: BorrowedFd<'a>,
    /// What offsets and lengths must be multiples of, in bytes; memory must then begin at a page.
    pub block: usize,
}

impl BlockNode {
    /// Where `len` bytes from `offset` lie, if they lie in one piece, in a file whose `aio` is not `threads`, and the place can
    /// never change hands: a range of a writable qcow2 image is not told, because its clusters may be used otherwise meanwhile.
    /// Nothing is read to find out.
    pub fn locate(&self, offset: u64, len: usize) -> Option<Located<'_>> {
        self.check_range(offset, len as u64).ok()?;
        if let Some(HostFile { fd, block }) = self.driver().host_file() {
            let aligned = offset.is_multiple_of(block as u64) && len.is_multiple_of(block);
            return aligned.then_some(Located { fd, offset });
        }
        let ask = Ask { detail: Detail::Place, wait: Wait::Never };
        let Mapping { target, len: mapped, hold } = self.driver().map(offset, len as u64, ask).ok()?;
        match target {
            Target::Data { node, offset } | Target::Child { node, offset }
                if mapped >= len as u64 && hold.is_none() =>
            {
                node.locate(offset, len)
            }
            _ => None,
        }
    }
}
