// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a driver says, from the middle of a request, that it found its image damaged.

use std::fmt;
use std::sync::Arc;

/// What a driver found (QAPI's `BLOCK_IMAGE_CORRUPTED`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corruption {
    /// The node.
    pub node_name: String,
    /// What is wrong, for people.
    pub text: String,
    /// Byte of the host file where it is wrong, if there is one such place.
    pub offset: Option<u64>,
    /// For how many bytes.
    pub size: Option<u64>,
    /// Whether the image cannot be written any more.
    pub fatal: bool,
}

type Hear = dyn Fn(Corruption) + Send + Sync;

/// Takes what drivers found. Without a listener it goes to the log.
#[derive(Clone, Default)]
pub struct Alarm(Option<Arc<Hear>>);

impl Alarm {
    /// `hear` is called from any thread, with locks of the driver held: it must do no more than take note.
    pub fn new(hear: impl Fn(Corruption) + Send + Sync + 'static) -> Alarm {
        Alarm(Some(Arc::new(hear)))
    }

    /// Says what was found.
    pub fn raise(&self, corruption: Corruption) {
        tracing::error!(node = corruption.node_name, fatal = corruption.fatal, "image is corrupt: {}", corruption.text);
        if let Some(hear) = &self.0 {
            hear(corruption);
        }
    }
}

impl fmt::Debug for Alarm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Alarm({})", if self.0.is_some() { "heard" } else { "log only" })
    }
}
