// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The way of replies to the client, who may take his time: nothing that the kernel reads for him is under way meanwhile.

use std::io;

use super::channel::Channel;
use super::reads::Reads;

/// A channel, and the reads whose replies go through it.
pub struct Way<'a> {
    /// Where the client is.
    pub channel: &'a mut Channel,
    /// What a ring reads for him.
    pub reads: Reads<'a>,
}

impl Way<'_> {
    /// Sends all of `bytes`. If that takes longer than no time, reads under way are finished first: whoever waits for them to
    /// end must not wait for this client.
    ///
    /// # Errors
    /// As [`Channel::write_all`].
    pub fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        if self.reads.event().is_some() {
            // The kernel reads while the client is sent to.
            self.reads.submit()?;
            let sent = self.channel.write_now(bytes)?;
            bytes = &bytes[sent..];
            if bytes.is_empty() {
                return Ok(());
            }
            self.reads.finish()?;
        }
        self.channel.write_all(bytes, None)
    }
}
