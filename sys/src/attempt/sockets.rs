// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reaching somebody who listens, over a socket of one's own.

use std::ffi::CStr;
use std::io;

use libc::{c_int, c_long, sa_family_t};

use super::{close, outcome};

/// connect(2) to a unix socket by its path.
pub fn unix_path(path: &CStr) -> io::Result<()> {
    unix(path.to_bytes(), 0)
}

/// connect(2) to a unix socket by its abstract name.
pub fn unix_abstract(name: &CStr) -> io::Result<()> {
    unix(name.to_bytes(), 1)
}

/// `before` is 1 for a name that begins with a zero byte.
fn unix(name: &[u8], before: usize) -> io::Result<()> {
    let mut address = libc::sockaddr_un { sun_family: family(libc::AF_UNIX), sun_path: [0; 108] };
    for (to, &from) in address.sun_path.iter_mut().skip(before).zip(name) {
        *to = from.cast_signed();
    }
    let length = size_of::<sa_family_t>() + before + name.len();
    let socket = open(libc::AF_UNIX, libc::SOCK_STREAM)?;
    // SAFETY: the address has more than `length` bytes, unless the name is too long for any address: then EINVAL.
    let connected = outcome(unsafe {
        libc::syscall(libc::SYS_connect, socket, &raw const address, length.min(size_of_val(&address)))
    });
    close(socket)?;
    connected.map(drop)
}

/// connect(2) to a TCP port of this host on which somebody listens.
pub fn tcp(port: u16) -> io::Result<()> {
    let address = loopback(port);
    let socket = open(libc::AF_INET, libc::SOCK_STREAM)?;
    // SAFETY: the address is a local of the size that is given.
    let connected =
        outcome(unsafe { libc::syscall(libc::SYS_connect, socket, &raw const address, size_of_val(&address)) });
    close(socket)?;
    connected.map(drop)
}

/// sendto(2) of a UDP packet with nothing in it to a port of this host.
pub fn udp(port: u16) -> io::Result<()> {
    let address = loopback(port);
    let socket = open(libc::AF_INET, libc::SOCK_DGRAM)?;
    // SAFETY: the buffer is empty; the address is a local of the size that is given.
    let sent = outcome(unsafe {
        libc::syscall(libc::SYS_sendto, socket, c"".as_ptr(), 0, 0, &raw const address, size_of_val(&address))
    });
    close(socket)?;
    sent.map(drop)
}

fn open(family: c_int, kind: c_int) -> io::Result<c_long> {
    // SAFETY: no pointers.
    outcome(unsafe { libc::syscall(libc::SYS_socket, family, kind | libc::SOCK_CLOEXEC, 0) })
}

fn loopback(port: u16) -> libc::sockaddr_in {
    let here = libc::in_addr { s_addr: u32::from(std::net::Ipv4Addr::LOCALHOST).to_be() };
    libc::sockaddr_in { sin_family: family(libc::AF_INET), sin_port: port.to_be(), sin_addr: here, sin_zero: [0; 8] }
}

fn family(number: c_int) -> sa_family_t {
    number.unsigned_abs() as sa_family_t
}
