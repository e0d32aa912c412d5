// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The service's loop: requests from a socket, daemons that die, signals. One thread; what takes time is bounded.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recv, send, sockopt};
use sys::signal::{self, Signals};

use super::api::{Answer, MOST_BYTES, Request};
use super::running::Running;
use super::{Service, notify};
use crate::listening::{Listening, SocketFile};
use crate::policy::Asker;
use crate::{Error, Result};

/// Most clients with a request under way, of all users and of one.
const MOST_CLIENTS: usize = 64;
const MOST_OF_A_USER: usize = 8;
/// How long a client may take to say what it wants.
const SPEECH: Duration = Duration::from_secs(5);

/// A client whose request is not whole yet.
struct Client {
    socket: OwnedFd,
    asker: Asker,
    said: Vec<u8>,
    until: Instant,
}

/// Serves requests at `manager.sock` in the service's directory, until SIGINT or SIGTERM; the daemons live on. SIGHUP reads the
/// policy once more. `tell` hears what happens.
///
/// # Errors
/// Somebody serves there already, or the host fails.
pub fn run(service: &mut Service, signals: &Signals, mut tell: impl FnMut(&str)) -> Result<()> {
    let (listener, _file) = listen(service)?;
    let mut clients: Vec<Client> = Vec::new();
    notify::ready();
    loop {
        service.news().iter().for_each(|news| tell(news));
        let due = service.look_after();
        service.news().iter().for_each(|news| tell(news));
        let speech = clients.iter().map(|client| client.until).min();
        let next = due.into_iter().chain(speech).min();
        let pidfds: Vec<OwnedFd> = service.daemons.values_mut().filter_map(Running::pidfd).collect();
        let mut fds = vec![PollFd::new(signals, PollFlags::IN)];
        let full = clients.len() >= MOST_CLIENTS;
        fds.push(PollFd::new(&listener, if full { PollFlags::empty() } else { PollFlags::IN }));
        fds.extend(clients.iter().map(|client| PollFd::new(&client.socket, PollFlags::IN)));
        fds.extend(pidfds.iter().map(|pidfd| PollFd::new(pidfd, PollFlags::IN)));
        let timeout = next.map(|next| next.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
        let timeout = timeout.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(Error::process("could not wait for requests")(e.into())),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if ready[0] {
            match signals.next().map_err(Error::process("could not read a signal"))? {
                Some(signal::HUP) => match service.reload() {
                    Ok(withdrawn) => tell(&format!("the policy was read again; withdrawn: {withdrawn:?}")),
                    Err(e) => tell(&format!("the old policy holds: {}", e.chain())),
                },
                Some(_) => return Ok(()),
                None => {}
            }
        }
        let spoke: Vec<bool> = ready[2..2 + clients.len()].to_vec();
        let now = Instant::now();
        let mut said = spoke.into_iter();
        clients.retain_mut(|client| {
            let spoke = said.next().unwrap_or(false);
            if spoke { hear(service, client) } else { client.until > now }
        });
        if ready[1] {
            welcome(&listener, &mut clients);
        }
    }
}

/// The socket, at which everybody may ask: the policy says who is answered.
fn listen(service: &Service) -> Result<(OwnedFd, SocketFile)> {
    let path: PathBuf = service.place.directory.join("manager.sock");
    let failed = |source| Error::Open { path: path.clone(), purpose: " to listen there", source };
    let listening = Listening::bind(path.clone())?;
    let listener = listening.as_fd().try_clone_to_owned().map_err(failed)?;
    let file = listening.publish()?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).map_err(failed)?;
    Ok((listener, file))
}

fn welcome(listener: &OwnedFd, clients: &mut Vec<Client>) {
    let Ok(socket) = accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) else { return };
    let Ok(peer) = sockopt::socket_peercred(&socket) else { return };
    let asker = Asker { pid: peer.pid.as_raw_pid(), uid: peer.uid.as_raw(), gid: peer.gid.as_raw() };
    if clients.iter().filter(|client| client.asker.uid == asker.uid).count() < MOST_OF_A_USER {
        clients.push(Client { socket, asker, said: Vec::new(), until: Instant::now() + SPEECH });
    }
}

/// Takes what a client says, and answers when it is a whole line. Whether there is more to come.
fn hear(service: &mut Service, client: &mut Client) -> bool {
    let mut room = [0; 4096];
    match recv(&client.socket, &mut room, RecvFlags::empty()) {
        Ok((_, 0)) => return false,
        Ok((_, count)) => client.said.extend(&room[..count]),
        Err(Errno::AGAIN | Errno::INTR) => return true,
        Err(_) => return false,
    }
    if u64::try_from(client.said.len()).unwrap_or(u64::MAX) > MOST_BYTES {
        return false;
    }
    let Some(end) = client.said.iter().position(|&byte| byte == b'\n') else { return true };
    let answer = match serde_json::from_slice::<Request>(&client.said[..end]) {
        Ok(request) => service.handle(client.asker, request).unwrap_or_else(|e| Answer::Error(e.chain())),
        Err(e) => Answer::Error(format!("that is no request: {e}")),
    };
    let line = serde_json::to_string(&answer).unwrap_or_else(|_| "{\"error\":\"no answer\"}".into());
    let _ = answer_all(&client.socket, format!("{line}\n").as_bytes());
    false
}

/// Sends an answer to a client that may be slow to take it, for a second at most.
fn answer_all(socket: &OwnedFd, mut bytes: &[u8]) -> io::Result<()> {
    let second = Timespec { tv_sec: 1, tv_nsec: 0 };
    while !bytes.is_empty() {
        match send(socket, bytes, SendFlags::NOSIGNAL) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                if poll(&mut [PollFd::new(socket, PollFlags::OUT)], Some(&second))? == 0 {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}
