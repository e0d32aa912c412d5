// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A daemon that never lets go: when it dies, another takes its place with everything that it was passed and told.
//!
//! What it was doing when it died, its clients do again: an NBD client that reconnects waits in the queue of the listening
//! socket, which stays open here; a vhost-user front end brings the record of what was under way; the kernel is asked to
//! repeat what a FUSE file was asked. What nobody had flushed may be lost, as in a power failure.

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::daemon::{Daemon, Launch};
use crate::inspector::Program;
use crate::journal::{Carried, Journal, Step};
use crate::{Error, Result, upgrade};

/// Deaths that are longer ago are forgotten.
const WINDOW: Duration = Duration::from_secs(60);
/// The first pause, when there is one, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// How often a daemon may die. Half of the deaths that are allowed within a minute are answered at once, each of the others
/// after a pause of 10 ms, then twice as long, up to a second; one more ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restarts {
    /// Deaths within a minute; 0 for a daemon that is not started again.
    pub per_minute: u32,
}

impl Default for Restarts {
    fn default() -> Restarts {
        Restarts { per_minute: 20 }
    }
}

impl Restarts {
    /// How long to wait after the `nth` death within the window, from 1; `None` to give up.
    fn pause(self, nth: u32) -> Option<Duration> {
        if nth > self.per_minute {
            return None;
        }
        match nth.checked_sub(self.per_minute.div_ceil(2)) {
            None | Some(0) => Some(Duration::ZERO),
            Some(late) => Some(PAUSES.0.saturating_mul(1 << (late - 1).min(16)).min(PAUSES.1)),
        }
    }
}

/// What follows a death.
#[derive(Debug)]
pub enum Verdict {
    /// It ended by itself, in order.
    Ended,
    /// Another is to be started after this pause.
    Again(Duration),
    /// It has died too often.
    GivenUp,
}

/// A death, for people.
#[derive(Clone, Copy, Debug)]
pub struct Death {
    /// The process that died.
    pub pid: u32,
    /// Of what; not known of another manager's child.
    pub status: Option<ExitStatus>,
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Death { pid, status } = self;
        match (status, status.and_then(|status| status.signal())) {
            (_, Some(signal)) => write!(f, "the daemon, process {pid}, was killed by signal {signal}"),
            (Some(status), None) => write!(f, "the daemon, process {pid}, ended with {status}"),
            (None, None) => write!(f, "the daemon, process {pid}, ended"),
        }
    }
}

/// A daemon and its journal.
#[derive(Debug)]
pub struct Kept {
    program: Program,
    launch: Launch,
    restarts: Restarts,
    journal: Journal,
    daemon: Option<Daemon>,
    deaths: VecDeque<Instant>,
    /// What the next steps are a part of.
    part: String,
    /// How many have taken a predecessor's place.
    successors: u32,
}

impl Kept {
    /// Starts a daemon.
    ///
    /// # Errors
    /// Those of [`Daemon::start_with`].
    pub fn start(program: &Program, launch: Launch, restarts: Restarts) -> Result<Kept> {
        let daemon = Some(Daemon::start_with(program, &launch)?);
        Ok(Kept { daemon, ..Kept::without(program, launch, restarts, Journal::default()) })
    }

    /// Goes on keeping a daemon that was brought to where `journal` ends.
    pub(crate) fn adopt(
        program: &Program,
        launch: Launch,
        restarts: Restarts,
        journal: Journal,
        daemon: Daemon,
    ) -> Kept {
        Kept { daemon: Some(daemon), ..Kept::without(program, launch, restarts, journal) }
    }

    fn without(program: &Program, launch: Launch, restarts: Restarts, journal: Journal) -> Kept {
        let (program, part) = (program.clone(), String::new());
        Kept { program, launch, restarts, journal, daemon: None, deaths: VecDeque::new(), part, successors: 0 }
    }

    /// How many daemons have taken a predecessor's place.
    pub fn successors(&self) -> u32 {
        self.successors
    }

    /// Its second monitor's listener.
    pub(crate) fn monitor(&self) -> Option<&OwnedFd> {
        self.launch.monitor.as_ref()
    }

    /// The daemon that runs now.
    ///
    /// # Errors
    /// It has died, and no other was started yet.
    pub fn daemon(&mut self) -> Result<&mut Daemon> {
        self.daemon.as_mut().ok_or_else(|| Error::Refused("the daemon has died, and another is not there yet".into()))
    }

    /// Its process id; `None` between two.
    pub fn pid(&self) -> Option<u32> {
        self.daemon.as_ref().map(Daemon::pid)
    }

    /// What was done.
    pub fn journal(&self) -> &Journal {
        &self.journal
    }

    /// An fd set's id that was never used.
    pub fn next_set(&mut self) -> i64 {
        self.journal.next_set()
    }

    /// Says what the steps from now on are a part of.
    pub fn begin(&mut self, part: &str) {
        part.clone_into(&mut self.part);
    }

    /// Has the daemon undo the steps of a part, the last first; a successor will not hear of them. Exports are closed on their
    /// clients.
    ///
    /// # Errors
    /// The daemon refuses, or has gone; then the part is forgotten all the same.
    pub fn take_back(&mut self, part: &str) -> Result<()> {
        let undoing = self.journal.undoing(part);
        self.journal.forget(part);
        for (command, arguments) in undoing {
            let daemon = self.daemon()?;
            match arguments.get("id") {
                Some(id) if command == "block-export-del" => daemon.end_export(id)?,
                _ => drop(daemon.execute(command, arguments, &[])?),
            }
        }
        Ok(())
    }

    /// Looks at the sizes of a part's images: they were changed on purpose.
    pub fn resized(&mut self, part: &str) {
        let steps = self.journal.steps().iter().filter(|step| step.part == part);
        steps.flat_map(|step| &step.carried).for_each(|carried| carried.resized());
    }

    /// Runs a command that changes the daemon's state, and notes it.
    ///
    /// # Errors
    /// The daemon refuses, or has gone; then nothing is noted.
    pub fn execute(&mut self, command: &str, arguments: Value, carried: &[Arc<Carried>]) -> Result<Value> {
        self.execute_resumable(command, arguments, Value::Null, carried)
    }

    /// The same with arguments that only successors are given: for what goes on, rather than begins.
    ///
    /// # Errors
    /// Those of [`execute`](Kept::execute).
    pub fn execute_resumable(
        &mut self,
        command: &str,
        arguments: Value,
        again: Value,
        carried: &[Arc<Carried>],
    ) -> Result<Value> {
        let fds: Vec<_> = carried.iter().map(std::os::fd::AsFd::as_fd).collect();
        let answer = self.daemon()?.execute(command, arguments.clone(), &fds)?;
        let (part, command) = (self.part.clone(), command.to_owned());
        self.journal.note(Step { part, command, arguments, again, carried: carried.to_vec() });
        Ok(answer)
    }

    /// Runs a command that changes nothing.
    ///
    /// # Errors
    /// The daemon refuses, or has gone.
    pub fn ask(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.daemon()?.execute(command, arguments, &[])
    }

    /// Takes note of the end of the daemon, which has come or is about to come.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn bury(&mut self) -> Result<(Death, Verdict)> {
        let daemon = self.daemon.take().ok_or_else(|| Error::Refused("there is no daemon".into()))?;
        let pid = daemon.pid();
        let status = daemon.wait().map_err(Error::process("could not wait for the daemon"))?;
        let death = Death { pid, status };
        if status.is_some_and(|status| status.success()) {
            return Ok((death, Verdict::Ended));
        }
        Ok((death, self.next(Instant::now())))
    }

    /// What follows a failure at `now`.
    fn next(&mut self, now: Instant) -> Verdict {
        self.deaths.push_back(now);
        while self.deaths.front().is_some_and(|&death| now.saturating_duration_since(death) > WINDOW) {
            self.deaths.pop_front();
        }
        let nth = u32::try_from(self.deaths.len()).unwrap_or(u32::MAX);
        self.restarts.pause(nth).map_or(Verdict::GivenUp, Verdict::Again)
    }

    /// Starts another daemon in place of the one that died, and brings it to where that one was. If that fails, it counts as
    /// one more death: what follows is in the error's place.
    ///
    /// # Errors
    /// An image is not what it was: then no daemon may have it.
    pub fn revive(&mut self) -> Result<std::result::Result<u32, (Error, Verdict)>> {
        self.journal.check()?;
        match self.successor() {
            Ok(daemon) => {
                let pid = daemon.pid();
                self.daemon = Some(daemon);
                self.successors += 1;
                Ok(Ok(pid))
            }
            Err(e) => Ok(Err((e, self.next(Instant::now())))),
        }
    }

    /// A daemon that is where the journal ends.
    fn successor(&self) -> Result<Daemon> {
        let mut daemon = Daemon::start_with(&self.program, &self.launch)?;
        match self.journal.replay(|command, arguments, fds| daemon.execute(command, arguments, fds)) {
            Ok(()) => Ok(daemon),
            Err(e) => {
                // Reaped: a number of a process that nobody waits for is never free again.
                let _ = daemon.kill();
                Err(e)
            }
        }
    }

    /// Has a daemon of `program` take the place of the one that runs, with its NBD clients: they notice a pause, which is
    /// returned. Other clients are hung up on and come again; FUSE files stay open.
    ///
    /// # Errors
    /// The new daemon could not be started, and the old one serves on; or it could not be brought to where the old one was, and
    /// both have gone: then it is [revived](Kept::revive).
    pub fn upgrade(&mut self, program: &Program) -> Result<Duration> {
        self.journal.check()?;
        let mut new = Daemon::start_with(program, &self.launch)?;
        let Some(old) = self.daemon.as_mut() else {
            let _ = new.kill();
            return Err(Error::Refused("the daemon has died, and another is about to be started".into()));
        };
        let begun = match upgrade::prepare(&self.journal, old, &mut new) {
            Ok(begun) => begun,
            Err(e) => {
                let _ = new.kill();
                return Err(e);
            }
        };
        let paused = Instant::now();
        if let Err(e) = upgrade::carry_over(begun, &self.journal, old, &mut new) {
            let _ = new.kill();
            if let Some(old) = self.daemon.take() {
                let _ = old.kill();
            }
            return Err(e);
        }
        let pause = paused.elapsed();
        self.program = program.clone();
        self.successors += 1;
        if let Some(old) = self.daemon.replace(new) {
            let _ = old.stop();
        }
        Ok(pause)
    }

    /// Asks the daemon to end, and waits for it.
    ///
    /// # Errors
    /// Waiting failed.
    pub fn stop(mut self) -> Result<()> {
        let Some(daemon) = self.daemon.take() else { return Ok(()) };
        daemon.stop().map(drop).map_err(Error::process("could not wait for the daemon"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_deaths_are_answered_at_once_and_the_last_not_at_all() {
        let restarts = Restarts { per_minute: 20 };
        let pauses: Vec<_> = (1..=21).map(|nth| restarts.pause(nth).map(|pause| pause.as_millis())).collect();
        assert!(pauses[..10].iter().all(|pause| *pause == Some(0)));
        assert_eq!(pauses[10..14], [Some(10), Some(20), Some(40), Some(80)]);
        assert_eq!(pauses[19..], [Some(1000), None]);
        assert_eq!(Restarts { per_minute: 0 }.pause(1), None);
        assert_eq!(Restarts { per_minute: 1 }.pause(1), Some(Duration::ZERO));
    }
}
