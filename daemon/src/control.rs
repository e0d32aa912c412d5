// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The control thread: it sleeps until a monitor, a signal or another thread has something for it.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use confine::Confined;
use export::{Attention, Rings};
use fdset::Lifetime;
use qmp::Table;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use sys::signal::Signals;

use crate::monitor::{Monitor, Source};
use crate::state::{Daemon, FdsetEvents};
use crate::wake::Wake;

/// A monitor to be.
#[derive(Debug)]
pub struct MonitorSetup {
    /// Where its clients come from.
    pub source: Source,
    /// Whether its output is spread over indented lines.
    pub pretty: bool,
    /// How long what its clients pass lives; `None` is as the daemon's [`Setup::fdsets`] say, for all such monitors together.
    pub lifetime: Option<Lifetime>,
    /// The user whose processes alone are served; `None` for whoever can connect.
    pub peer_uid: Option<u32>,
}

/// What the daemon serves with: everything that had to be opened is open.
pub struct Setup {
    /// Its monitors.
    pub monitors: Vec<MonitorSetup>,
    /// What fd sets take, and how long they keep it.
    pub fdsets: fdset::Settings,
    /// Which events about them go out.
    pub fdset_events: FdsetEvents,
    /// Signals that end it.
    pub signals: Signals,
    /// What ends it besides `quit` and signals.
    pub ends: Ends,
    /// Memory files for vhost-user exports to be.
    pub inflight: Vec<std::os::fd::OwnedFd>,
    /// What exports read with, if not with threads alone.
    pub rings: Rings,
}

/// What ends a daemon besides `quit` and signals.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ends {
    /// The last monitor that came connected has gone: for a daemon that belongs to its manager.
    pub with_monitors: bool,
    /// NBD clients have been served, and none is left.
    pub with_clients: bool,
}

/// Serves until `quit`, a signal, or the end of the monitors. The proof says that this process can open nothing any more.
///
/// # Errors
/// A monitor's socket cannot be used, or polling fails.
pub fn serve(
    confined: Confined,
    setup: Setup,
    startup: impl FnOnce(&Table<Daemon>, &mut Daemon) -> Result<(), qmp::Error>,
) -> Result<(), ServeError> {
    let table = crate::commands::table();
    let wake = Arc::new(Wake::new()?);
    let mut daemon = Daemon::new(confined, setup.fdsets, Arc::clone(&wake));
    daemon.fdset_events = setup.fdset_events;
    daemon.ledger.enter(setup.signals.as_fd().as_raw_fd(), "signals");
    daemon.exports.keep_inflight(setup.inflight);
    daemon.exports.lend(setup.rings);
    daemon.exports.close();
    startup(&table, &mut daemon)?;
    daemon.exports.open();
    let mut monitors = Vec::new();
    for (id, monitor) in setup.monitors.into_iter().enumerate() {
        monitors.push(Monitor::new(id, monitor, &table, &mut daemon)?);
    }
    let abandoned = |monitors: &[Monitor]| {
        setup.ends.with_monitors
            && monitors.iter().any(Monitor::is_over)
            && monitors.iter().all(|monitor| monitor.is_over() || monitor.listens())
    };
    let served_out = |daemon: &Daemon| setup.ends.with_clients && daemon.exports.is_served_out();
    let mut attention = Attention::default();
    while !daemon.quit && !abandoned(&monitors) && !served_out(&daemon) {
        let ready = wait(&setup.signals, &wake, &monitors, &daemon, &mut attention)?;
        if ready.signal && setup.signals.next()?.is_some() {
            daemon.quit = true;
        }
        if ready.woken {
            wake.clear();
        }
        let asked = !ready.monitors.is_empty();
        if asked {
            attention.asked(Instant::now());
        }
        daemon.reap_exports();
        daemon.hear_alarms();
        daemon.ask_for_sockets();
        daemon.release_jobs();
        daemon.expire_leases();
        daemon.answer_scrapers();
        announce(&mut daemon, &mut monitors);
        for index in ready.monitors {
            let answer = monitors[index].advance(&table, &mut daemon);
            announce(&mut daemon, &mut monitors);
            monitors[index].answer(&answer);
        }
        for index in 0..monitors.len() {
            let answer = monitors[index].retry(&table, &mut daemon);
            announce(&mut daemon, &mut monitors);
            monitors[index].answer(&answer);
        }
        // A client that turns out to have gone here is news for the others.
        loop {
            for monitor in &mut monitors {
                monitor.flush(&mut daemon);
            }
            if daemon.events.is_empty() {
                break;
            }
            announce(&mut daemon, &mut monitors);
        }
        if asked {
            attention.answered(Instant::now());
        }
    }
    Ok(())
}

/// Why the daemon ended before its time.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A descriptor of its own failed it.
    #[error("the control thread cannot go on: {0}")]
    Io(#[from] io::Error),
    /// Something that the command line asked for cannot be done.
    #[error("{0}")]
    Startup(#[from] qmp::Error),
}

/// The timeout of a poll that only looks.
const NOT_AT_ALL: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

struct Ready {
    signal: bool,
    woken: bool,
    monitors: Vec<usize>,
}

fn wait(
    signals: &Signals,
    wake: &Wake,
    monitors: &[Monitor],
    daemon: &Daemon,
    attention: &mut Attention,
) -> io::Result<Ready> {
    let mut fds = vec![PollFd::new(signals, PollFlags::IN), PollFd::new(wake, PollFlags::IN)];
    let mut polled = Vec::new();
    for (index, monitor) in monitors.iter().enumerate() {
        if let Some((fd, flags)) = monitor.interest() {
            fds.push(PollFd::from_borrowed_fd(fd, flags));
            polled.push(index);
        }
    }
    let busy = monitors.iter().any(Monitor::is_busy).then(Instant::now);
    let next = monitors.iter().filter_map(Monitor::deadline).chain(daemon.fdsets.next_deadline()).chain(busy).min();
    let timeout = next.map(until);
    let seen = if busy.is_some() { None } else { attention.look_out(|| look(&mut fds))? };
    if seen.is_none() {
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    let fired: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    let ready = polled.iter().zip(&fired[2..]).filter(|&(&index, &fired)| fired || monitors[index].is_busy());
    Ok(Ready { signal: fired[0], woken: fired[1], monitors: ready.map(|(&index, _)| index).collect() })
}

/// Whether there is something to do, without sleeping.
fn look(fds: &mut [PollFd<'_>]) -> io::Result<Option<()>> {
    match poll(fds, Some(&NOT_AT_ALL)) {
        Ok(0) | Err(Errno::INTR) => Ok(None),
        Ok(_) => Ok(Some(())),
        Err(e) => Err(e.into()),
    }
}

/// The time until `deadline`, rounded up so that it has passed when the sleep is over.
fn until(deadline: Instant) -> Timespec {
    let left = deadline.saturating_duration_since(Instant::now());
    let rounded = if left.is_zero() { left } else { left + Duration::from_millis(1) };
    Timespec::try_from(rounded).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 })
}

/// Tells every monitor what has happened.
fn announce(daemon: &mut Daemon, monitors: &mut [Monitor]) {
    let jobs = daemon.jobs.take_events().into_iter().map(|data| ("JOB_STATUS_CHANGE", data));
    daemon.events.extend(jobs);
    for (name, data) in daemon.events.drain(..) {
        for monitor in &mut *monitors {
            monitor.notify(name, &data, SystemTime::now());
        }
    }
}
