// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Jobs: work that goes on after the command that asked for it has been answered. Each runs on a thread of its own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use block::Claim;
use qmp::Error;
use serde_json::{Value, json};

use crate::wake::Wake;

/// Where a job is in its life (QAPI's `JobStatus`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Its thread works.
    Running,
    /// It has ended, with or without an error, and waits to be dismissed.
    Concluded,
}

impl Status {
    /// QAPI's word.
    pub fn word(self) -> &'static str {
        match self {
            Status::Running => "running",
            Status::Concluded => "concluded",
        }
    }
}

struct Job {
    kind: &'static str,
    status: Status,
    error: Option<String>,
    /// What its work uses.
    claims: Vec<Claim>,
}

/// How a job's thread ended.
struct Outcome {
    id: String,
    error: Option<String>,
}

/// All jobs by id.
pub struct Jobs {
    jobs: BTreeMap<String, Job>,
    ended: Receiver<Outcome>,
    end: Sender<Outcome>,
    wake: Arc<Wake>,
    events: Vec<Value>,
}

impl Jobs {
    /// None yet. `wake` is told when one has ended.
    pub fn new(wake: Arc<Wake>) -> Jobs {
        let (end, ended) = channel();
        Jobs { jobs: BTreeMap::new(), ended, end, wake, events: Vec::new() }
    }

    /// Whether a job may be called `id`.
    ///
    /// # Errors
    /// The id is malformed or taken: QEMU's words.
    pub fn check_id(&self, id: &str) -> Result<(), Error> {
        if !block::id_is_well_formed(id) {
            return Err(Error::generic(format!("Invalid job ID '{id}'")));
        }
        if self.jobs.contains_key(id) {
            return Err(Error::generic(format!("Job ID '{id}' already in use")));
        }
        Ok(())
    }

    /// Starts a job of QAPI's type `kind`; `work` is done on a thread and gives the job's error. [`reap`](Jobs::reap) gives
    /// `claims` back when it has concluded.
    ///
    /// # Errors
    /// The id is not [good](Jobs::check_id); the claims are then lost.
    pub fn start(
        &mut self,
        id: String,
        kind: &'static str,
        claims: Vec<Claim>,
        work: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> Result<(), Error> {
        self.check_id(&id)?;
        let (end, wake, own) = (self.end.clone(), Arc::clone(&self.wake), id.clone());
        let run = move || {
            let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            let error = worked.unwrap_or_else(|_| Err("the job broke down".into())).err();
            // The receiver lives as long as the daemon.
            let _ = end.send(Outcome { id: own, error });
            wake.up();
        };
        self.tell(&id, "created");
        self.tell(&id, "running");
        self.jobs.insert(id.clone(), Job { kind, status: Status::Running, error: None, claims });
        if let Err(e) = thread::Builder::new().name("job".into()).spawn(run) {
            self.conclude(Outcome { id, error: Some(format!("no thread for the job: {e}")) });
        }
        Ok(())
    }

    /// Takes note of jobs that have ended; what they used is to be released.
    pub fn reap(&mut self) -> Vec<Claim> {
        while let Ok(outcome) = self.ended.try_recv() {
            self.conclude(outcome);
        }
        let concluded = self.jobs.values_mut().filter(|job| job.status == Status::Concluded);
        concluded.flat_map(|job| std::mem::take(&mut job.claims)).collect()
    }

    /// What `JOB_STATUS_CHANGE` has to tell since the last call.
    pub fn take_events(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.events)
    }

    /// What a job is asked to do with itself, in a state in which it cannot: every such wish but `dismiss`.
    ///
    /// # Errors
    /// Always: there is none of that id, its state excludes the wish, or its work cannot be held up. QEMU's words where it has
    /// some.
    pub fn refuse(&self, id: &str, verb: &str) -> Result<(), Error> {
        let job = self.jobs.get(id).ok_or_else(|| Error::generic("Job not found"))?;
        let state = job.status.word();
        Err(Error::generic(match (verb, job.status) {
            ("resume", _) => "Can't resume a job that was not paused".to_owned(),
            ("cancel" | "pause", Status::Running) => {
                format!("Job '{id}' cannot be held up: making an image ends by itself")
            }
            _ => format!("Job '{id}' in state '{state}' cannot accept command verb '{verb}'"),
        }))
    }

    /// Forgets a job that has concluded.
    ///
    /// # Errors
    /// There is none of that id, or it runs: QEMU's words.
    pub fn dismiss(&mut self, id: &str) -> Result<(), Error> {
        let job = self.jobs.get(id).ok_or_else(|| Error::generic("Job not found"))?;
        if job.status != Status::Concluded {
            let state = job.status.word();
            return Err(Error::generic(format!("Job '{id}' in state '{state}' cannot accept command verb 'dismiss'")));
        }
        self.jobs.remove(id);
        self.tell(id, "null");
        Ok(())
    }

    /// Every job, as `query-jobs` shows it.
    pub fn list(&self) -> Vec<Value> {
        let show = |(id, job): (&String, &Job)| {
            let done = u8::from(job.status == Status::Concluded && job.error.is_none());
            let mut info = json!({
                "id": id,
                "type": job.kind,
                "status": job.status.word(),
                "current-progress": done,
                "total-progress": 1,
            });
            if let Some(error) = &job.error {
                info["error"] = json!(error);
            }
            info
        };
        self.jobs.iter().map(show).collect()
    }

    fn conclude(&mut self, Outcome { id, error }: Outcome) {
        let stages: &[&str] =
            if error.is_some() { &["aborting", "concluded"] } else { &["waiting", "pending", "concluded"] };
        for stage in stages {
            self.tell(&id, stage);
        }
        if let Some(job) = self.jobs.get_mut(&id) {
            job.status = Status::Concluded;
            job.error = error;
        }
    }

    fn tell(&mut self, id: &str, status: &str) {
        self.events.push(json!({ "id": id, "status": status }));
    }
}
