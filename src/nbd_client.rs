// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A small NBD client, so that the demo needs no other software: fixed newstyle, simple replies, one request at a time.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, bail, ensure};

/// A session with an export.
pub struct NbdClient {
    socket: UnixStream,
    /// Size of the export in bytes.
    pub size: u64,
}

impl NbdClient {
    /// Connects and asks for the export called `name`.
    pub fn connect(path: &Path, name: &str) -> anyhow::Result<NbdClient> {
        let mut socket = UnixStream::connect(path).context("could not connect to the NBD socket")?;
        let greeting: [u8; 18] = take(&mut socket)?;
        ensure!(greeting.starts_with(b"NBDMAGICIHAVEOPT"), "the socket does not speak NBD");
        let name_len = u32::try_from(name.len())?;
        // Client flags (fixed newstyle, no zeroes), then NBD_OPT_EXPORT_NAME.
        socket.write_all(&3u32.to_be_bytes())?;
        socket.write_all(&[b"IHAVEOPT", &1u32.to_be_bytes()[..], &name_len.to_be_bytes(), name.as_bytes()].concat())?;
        let size = u64::from_be_bytes(take(&mut socket).context("the server knows no such export")?);
        let _flags: [u8; 2] = take(&mut socket)?;
        Ok(NbdClient { socket, size })
    }

    /// Fills `buf` from `offset`.
    pub fn read(&mut self, buf: &mut [u8], offset: u64) -> anyhow::Result<()> {
        let len = u32::try_from(buf.len())?;
        let mut request = [0; 28];
        request[0..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
        request[16..24].copy_from_slice(&offset.to_be_bytes());
        request[24..28].copy_from_slice(&len.to_be_bytes());
        self.socket.write_all(&request)?;
        let reply: [u8; 16] = take(&mut self.socket)?;
        ensure!(reply.starts_with(&0x6744_6698_u32.to_be_bytes()), "the server broke the protocol");
        let error = u32::from_be_bytes([reply[4], reply[5], reply[6], reply[7]]);
        if error != 0 {
            bail!("reading {len} bytes at {offset} failed with error {error}");
        }
        Ok(self.socket.read_exact(buf)?)
    }
}

fn take<const N: usize>(socket: &mut UnixStream) -> anyhow::Result<[u8; N]> {
    let mut bytes = [0; N];
    socket.read_exact(&mut bytes)?;
    Ok(bytes)
}
