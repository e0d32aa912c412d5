// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `query-jobs`, `job-dismiss`, and what jobs refuse.

use qmp::{Arguments, Call, Command, Definition, Error, Event, Member, Type};
use serde_json::Value;

use super::words;
use crate::state::Daemon;

pub fn types() -> Vec<Definition> {
    vec![
        words("JobType", &["create", "vvfat-copy"], "The kinds of jobs."),
        words(
            "JobStatus",
            &["created", "running", "waiting", "pending", "aborting", "concluded", "null"],
            "Where a job is in its life.",
        ),
        Definition::structure(
            "JobInfo",
            [
                Member::required("id", Type::Str, "The job."),
                Member::required("type", Type::Named("JobType"), "Its kind."),
                Member::required("status", Type::Named("JobStatus"), "Where it is in its life."),
                Member::required("current-progress", Type::Int, "Of `total-progress`, how much is done."),
                Member::required("total-progress", Type::Int, "Steps of work."),
                Member::optional("error", Type::Str, "Why it failed, once it has concluded."),
            ],
            "A job.",
        ),
    ]
}

pub fn commands() -> Vec<Command<Daemon>> {
    vec![
        Command::new("query-jobs", "Lists the jobs.", Arguments::NONE, query)
            .returning(Type::Array(&Type::Named("JobInfo"))),
        Command::new(
            "job-cancel",
            "Ends a job before its time. No job of this version can be ended so: the answer says why.",
            [Member::required("id", Type::Str, "The job.")],
            |daemon, call| refuse(daemon, &call, "cancel"),
        ),
        Command::new(
            "job-complete",
            "Ends a job that waits for that. No job of this version does.",
            [Member::required("id", Type::Str, "The job.")],
            |daemon, call| refuse(daemon, &call, "complete"),
        ),
        Command::new(
            "job-finalize",
            "Lets a job take effect that waits for that. No job of this version does.",
            [Member::required("id", Type::Str, "The job.")],
            |daemon, call| refuse(daemon, &call, "finalize"),
        ),
        Command::new(
            "job-pause",
            "Holds a job up. No job of this version can be held up: the answer says so.",
            [Member::required("id", Type::Str, "The job.")],
            |daemon, call| refuse(daemon, &call, "pause"),
        ),
        Command::new(
            "job-resume",
            "Lets a job that is held up go on.",
            [Member::required("id", Type::Str, "The job.")],
            |daemon, call| refuse(daemon, &call, "resume"),
        ),
        Command::new(
            "job-dismiss",
            "Forgets a job that has concluded.",
            [Member::required("id", Type::Str, "The job.")],
            dismiss,
        ),
    ]
}

/// The event of a job's life.
pub fn status_event() -> Event {
    Event::new(
        "JOB_STATUS_CHANGE",
        [
            Member::required("id", Type::Str, "The job."),
            Member::required("status", Type::Named("JobStatus"), "Where it is in its life now."),
        ],
        "A job has come further.",
    )
}

fn query(daemon: &mut Daemon, _: Call<'_>) -> Result<Value, Error> {
    Ok(daemon.jobs.list().into())
}

fn refuse(daemon: &mut Daemon, call: &Call<'_>, verb: &str) -> Result<Value, Error> {
    daemon.jobs.refuse(call.arguments()["id"].as_str().unwrap_or_default(), verb)?;
    Ok(Value::Null)
}

fn dismiss(daemon: &mut Daemon, call: Call<'_>) -> Result<Value, Error> {
    daemon.jobs.dismiss(call.arguments()["id"].as_str().unwrap_or_default())?;
    Ok(Value::Null)
}
