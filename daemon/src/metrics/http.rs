// SPDX-License-Identifier: Apache-2.0 OR MIT
//! As much of HTTP/1.1 (RFC 9112) as a scraper needs: one request to a connection, no bodies, two answers.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

/// How long a scraper may take, and how long it is kept waiting, each.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// Longest request that is read, bytes.
const MAX_REQUEST: usize = 8 << 10;

/// Reads one request and answers it with the text that `render` makes. Returns early when `stop` is readable.
pub fn answer(socket: &OwnedFd, stop: &OwnedFd, render: impl FnOnce() -> Option<String>) {
    let deadline = Instant::now() + PATIENCE;
    let mut request = Vec::new();
    while !is_whole(&request) {
        let mut piece = [0; 1024];
        match wait(socket, stop, PollFlags::IN, deadline)
            .and_then(|()| Ok(rustix::net::recv(socket, &mut piece, RecvFlags::DONTWAIT)?.0))
        {
            Ok(len) if len > 0 && request.len() + len <= MAX_REQUEST => request.extend(&piece[..len]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            _ => return,
        }
    }
    let response = respond(&request, render);
    let deadline = Instant::now() + PATIENCE;
    let mut rest = &response[..];
    while !rest.is_empty() {
        match wait(socket, stop, PollFlags::OUT, deadline)
            .and_then(|()| Ok(rustix::net::send(socket, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?))
        {
            Ok(len) => rest = &rest[len..],
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

fn is_whole(request: &[u8]) -> bool {
    request.windows(4).any(|end| end == b"\r\n\r\n") || request.windows(2).any(|end| end == b"\n\n")
}

fn respond(request: &[u8], render: impl FnOnce() -> Option<String>) -> Vec<u8> {
    let line = request.split(|&byte| byte == b'\r' || byte == b'\n').next().unwrap_or_default();
    let mut words = line.split(|&byte| byte == b' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = target.split(|&byte| byte == b'?').next().unwrap_or_default();
    let (status, kind, body) = match (method, path) {
        (b"GET", b"/metrics" | b"/") => match render() {
            Some(text) => ("200 OK", "application/openmetrics-text; version=1.0.0; charset=utf-8", text),
            None => ("503 Service Unavailable", "text/plain", "the daemon is busy or ends\n".to_owned()),
        },
        (b"GET", _) => ("404 Not Found", "text/plain", "there is /metrics only\n".to_owned()),
        _ => ("405 Method Not Allowed", "text/plain", "GET /metrics\n".to_owned()),
    };
    let allow = if status.starts_with("405") { "Allow: GET\r\n" } else { "" };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n{allow}Connection: close\r\n\r\n",
        body.len()
    );
    [head.into_bytes(), body.into_bytes()].concat()
}

fn wait(socket: &OwnedFd, stop: &OwnedFd, what: PollFlags, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut fds = [PollFd::new(socket, what), PollFd::new(stop, PollFlags::IN)];
    match poll(&mut fds, Some(&timeout)) {
        Ok(0) => Err(io::ErrorKind::TimedOut.into()),
        Ok(_) if !fds[1].revents().is_empty() => Err(io::ErrorKind::Interrupted.into()),
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(request: &[u8]) -> String {
        let answer = String::from_utf8(respond(request, || Some("text".into()))).expect("text");
        answer.lines().next().unwrap_or_default().to_owned()
    }

    #[test]
    fn scrapers_get_metrics_and_nobody_gets_anything_else() {
        assert_eq!(status(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"), "HTTP/1.1 200 OK");
        assert_eq!(status(b"GET /metrics?name=x HTTP/1.0\n\n"), "HTTP/1.1 200 OK");
        assert_eq!(status(b"GET /etc/passwd HTTP/1.1\r\n\r\n"), "HTTP/1.1 404 Not Found");
        assert_eq!(status(b"POST /metrics HTTP/1.1\r\n\r\n"), "HTTP/1.1 405 Method Not Allowed");
        assert_eq!(status(b"\r\n\r\n"), "HTTP/1.1 405 Method Not Allowed");
        assert_eq!(status(b"\xff\xfe\r\n\r\n"), "HTTP/1.1 405 Method Not Allowed");
        assert!(!is_whole(b"GET / HTTP/1.1\r\n"));
    }
}
