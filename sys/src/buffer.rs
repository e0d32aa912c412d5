// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory that a device can reach: bytes that begin at a page, with room for a header right before them.

/// What every device is content with.
const PAGE: usize = 4096;

/// Bytes at the beginning of a page.
#[derive(Debug, Default)]
pub struct Buffer {
    memory: Vec<u8>,
    start: usize,
    lead: usize,
    len: usize,
}

impl Buffer {
    /// Room for `len` bytes, and for at most a page of `lead` bytes before them; all of it zeroes.
    pub fn new(lead: usize, len: usize) -> Buffer {
        let lead = lead.min(PAGE);
        let memory = vec![0; PAGE + lead.next_multiple_of(PAGE) + len];
        let first = memory.as_ptr().addr() + lead;
        Buffer { start: first.next_multiple_of(PAGE) - memory.as_ptr().addr(), memory, lead, len }
    }

    /// The bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }

    /// The room before them.
    pub fn lead(&mut self) -> &mut [u8] {
        &mut self.memory[self.start - self.lead..self.start]
    }

    /// Both, in one piece.
    pub fn whole(&self) -> &[u8] {
        &self.memory[self.start - self.lead..self.start + self.len]
    }

    /// How many bytes there are, the room before them not counted.
    #[allow(clippy::len_without_is_empty, reason = "an empty one is not a special case")]
    pub fn len(&self) -> usize {
        self.len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_begin_at_a_page_and_the_lead_ends_there() {
        for (lead, len) in [(0, 0), (0, 1), (16, 4096), (28, 100), (4096, 5), (4096, 1 << 20)] {
            let mut buffer = Buffer::new(lead, len);
            assert!(buffer.bytes().as_ptr().addr().is_multiple_of(PAGE));
            assert_eq!((buffer.bytes().len(), buffer.len(), buffer.lead().len()), (len, len, lead));
            buffer.lead().fill(1);
            buffer.bytes().fill(2);
            assert_eq!(buffer.whole(), [vec![1; lead], vec![2; len]].concat());
        }
    }
}
