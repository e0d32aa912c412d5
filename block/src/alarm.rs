// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a driver says, from the middle of a request, that it found its image damaged or lost its connection.

use std::fmt;
use std::sync::Arc;

use crate::host::Lost;

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
pub struct Alarm {
    hear: Option<Arc<Hear>>,
    lost: Option<Lost>,
}

impl Alarm {
    /// `hear` is called from any thread, with locks of the driver held: it must do no more than take note.
    pub fn new(hear: impl Fn(Corruption) + Send + Sync + 'static) -> Alarm {
        Alarm { hear: Some(Arc::new(hear)), lost: None }
    }

    /// The same, where `lost` hears about the node's connection.
    pub(crate) fn for_host(&self, lost: Option<Lost>) -> Alarm {
        Alarm { hear: self.hear.clone(), lost }
    }

    /// Says that the connection of the node of this name is lost.
    pub fn connection_lost(&self, node: &str) {
        tracing::warn!(node, "the connection to the server is lost");
        if let Some(lost) = &self.lost {
            lost(node);
        }
    }

    /// Says what was found.
    pub fn raise(&self, corruption: Corruption) {
        tracing::error!(node = corruption.node_name, fatal = corruption.fatal, "image is corrupt: {}", corruption.text);
        if let Some(hear) = &self.hear {
            hear(corruption);
        }
    }
}

impl fmt::Debug for Alarm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Alarm({})", if self.hear.is_some() { "heard" } else { "log only" })
    }
}
