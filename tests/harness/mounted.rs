// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the tests of disks as files share: whether they can be had here, and one that is served.
#![allow(dead_code, unreachable_pub)]

use std::fs::{self, File, OpenOptions};
use std::path::Path;

use manager::fuse::{AllowOther, Mount};

use crate::harness::{Scratch, Serve, program, text};

/// Whether this process may mount.
pub fn can_mount(test: &str) -> bool {
    let scratch = Scratch::new();
    fs::write(scratch.path("probe"), "").unwrap();
    match Mount::make(&program(), &scratch.path("probe"), true, AllowOther::Off) {
        Ok(_) if rustix::process::geteuid().is_root() => true,
        Ok(_) => {
            eprintln!("skipped: {test}: needs root");
            false
        }
        Err(e) => {
            eprintln!("skipped: {test}: cannot mount: {e}");
            false
        }
    }
}

/// Types of the mounts over a path.
pub fn mounts(path: &Path) -> usize {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.lines().filter(|line| line.split(' ').nth(4) == Some(text(path))).count()
}

/// Waits until nothing is mounted there. Ends by the test's own time limit if that never comes.
pub fn until_unmounted(path: &Path) {
    while mounts(path) > 0 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

pub struct Served {
    pub scratch: Scratch,
    pub serve: Serve,
}

impl Served {
    /// A raw image of `content` as the file `disk`.
    pub fn start(content: &[u8], options: &[&str]) -> Served {
        let scratch = Scratch::new();
        fs::write(scratch.path("image"), content).unwrap();
        fs::write(scratch.path("disk"), "what the disk hides").unwrap();
        let (image, disk) = (scratch.name("image"), scratch.name("disk"));
        let serve = Serve::start(&[&["--format", "raw", &image, "--fuse", &disk], options].concat());
        Served { scratch, serve }
    }

    pub fn disk(&self) -> File {
        OpenOptions::new().read(true).write(true).open(self.scratch.path("disk")).unwrap()
    }

    /// Ends it properly; the image's bytes.
    pub fn end(self) -> Vec<u8> {
        assert!(self.serve.interrupt().success());
        assert_eq!(mounts(&self.scratch.path("disk")), 0);
        assert_eq!(fs::read(self.scratch.path("disk")).unwrap(), b"what the disk hides");
        fs::read(self.scratch.path("image")).unwrap()
    }
}
