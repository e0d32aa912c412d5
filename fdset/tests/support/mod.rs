// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Descriptors to pass.
#![allow(dead_code, reason = "each test program uses its own part")]
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use fdset::{FdSets, SetInfo};
use rustix::fs::{CWD, MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, memfd_create, openat};
use rustix::io::Errno;

/// An image file of 64 KiB with a name of its own, for as long as this lives.
pub struct Image(pub PathBuf);

impl Image {
    pub fn new() -> Image {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("fdset-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, vec![0x5a; 0x1_0000]).unwrap();
        Image(path)
    }

    pub fn open(&self, flags: OFlags) -> OwnedFd {
        openat(CWD, &self.0, flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    pub fn read_only(&self) -> OwnedFd {
        self.open(OFlags::RDONLY)
    }

    pub fn read_write(&self) -> OwnedFd {
        self.open(OFlags::RDWR)
    }

    /// With `O_DIRECT`, or a named skip where the file system has none.
    pub fn direct(&self, flags: OFlags, test: &str) -> Option<OwnedFd> {
        match openat(CWD, &self.0, flags | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty()) {
            Ok(fd) => Some(fd),
            Err(Errno::INVAL) => {
                skip(test, "a temporary directory on a file system with O_DIRECT");
                None
            }
            Err(errno) => panic!("open with O_DIRECT: {errno}"),
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Says that `test` needs what is not here; where that must not be, fails.
pub fn skip(test: &str, needs: &str) {
    println!("skipped: {test}: needs {needs}");
    assert!(std::env::var_os("CI").is_none(), "{test} needs {needs}");
}

/// A memfd with `seals`, opened for reading and writing.
pub fn memfd(seals: SealFlags) -> OwnedFd {
    let fd = memfd_create("image", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, 4096).unwrap();
    fcntl_add_seals(&fd, seals).unwrap();
    fd
}

/// The file of `fd` again, with other flags.
pub fn again(fd: impl AsFd, flags: OFlags) -> OwnedFd {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    openat(CWD, path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

/// Ids and descriptor numbers, in the order of the listing.
pub fn listing(sets: &FdSets) -> Vec<(i64, Vec<i32>)> {
    sets.list().map(|set| (set.id(), numbers(&set))).collect()
}

pub fn numbers(set: &SetInfo) -> Vec<i32> {
    set.fds().map(fdset::FdInfo::number).collect()
}
