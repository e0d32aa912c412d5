// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `--aio`: who waits for reads that the page cache cannot answer.

use std::io;

use export::Rings;
use sys::ring::Ring;

/// Rings made for a daemon: clients beyond these have threads alone.
const RINGS: usize = 16;
/// Reads of one client at once.
const READS: u32 = 64;

/// The choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aio {
    /// Rings where the kernel gives them, else threads: `docs/performance.md` says what rings save.
    #[default]
    Auto,
    /// Threads alone.
    Threads,
    /// io_uring, or no daemon.
    IoUring,
}

impl Aio {
    /// The choice that a word stands for.
    pub fn named(word: &str) -> Option<Aio> {
        [("auto", Aio::Auto), ("threads", Aio::Threads), ("io_uring", Aio::IoUring)]
            .into_iter()
            .find_map(|(name, aio)| (name == word).then_some(aio))
    }

    /// Makes the rings, while that is possible: before the process is confined.
    ///
    /// # Errors
    /// They were asked for and the kernel gives none.
    pub fn rings(self) -> io::Result<Rings> {
        let made = |count| (0..count).map(|_| Ring::new(READS)).collect::<io::Result<Vec<Ring>>>();
        match self {
            Aio::Threads => Ok(Rings::none("none, as --aio=threads says: threads wait for reads")),
            // Containers refuse them, and so does an old kernel: nothing that a user should be warned of each time.
            Aio::Auto => Ok(made(RINGS).map_or_else(
                |e| {
                    tracing::info!("the kernel gives no restricted io_uring ({e}): threads wait for reads");
                    Rings::none(format!(
                        "none, because the kernel gives no restricted io_uring ({e}): threads wait for reads"
                    ))
                },
                Rings::new,
            )),
            Aio::IoUring => made(RINGS).map(Rings::new),
        }
    }
}
