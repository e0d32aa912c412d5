// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `blockdev-create`, `query-jobs`, `job-dismiss`, and what jobs refuse.

use block::Preallocation;
use fdset::Access;
use qmp::{Arguments, Call, Command, Definition, Error, Event, Member, Type};
use serde::Deserialize;
use serde_json::Value;

use super::words;
use crate::state::Daemon;

pub fn types() -> Vec<Definition> {
    vec![
        words("JobType", &["create"], "The kinds of jobs."),
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
        words("PreallocMode", &["off", "falloc", "full"], "How room for an image is set aside when it is made."),
        Definition::union(
            "BlockdevCreateOptions",
            [Member::required("driver", Type::Named("BlockdevCreateDriver"), "The driver.")],
            "driver",
            [("file", Type::Named("BlockdevCreateOptionsFile"))],
            "An image to be made.",
        ),
        words("BlockdevCreateDriver", &["file"], "Drivers that can make images."),
        Definition::structure(
            "BlockdevCreateOptionsFile",
            [
                Member::required("filename", Type::Str, "`/dev/fdset/ID`: what is there is cut to nothing first."),
                Member::required("size", Type::Size, "Bytes of the image."),
                Member::optional("preallocation", Type::Named("PreallocMode"), "Default `off`."),
                Member::optional("nocow", Type::Bool, "Not supported: must be false."),
            ],
            "A raw file.",
        ),
    ]
}

pub fn commands() -> Vec<Command<Daemon>> {
    vec![
        Command::new(
            "blockdev-create",
            "Makes an image in a passed file, as a job.",
            [
                Member::required("job-id", Type::Str, "The job to be."),
                Member::required("options", Type::Named("BlockdevCreateOptions"), "The image."),
            ],
            create,
        ),
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

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Create {
    job_id: String,
    options: CreateOptions,
}

#[derive(Deserialize)]
struct CreateOptions {
    filename: String,
    size: i64,
    preallocation: Option<String>,
    nocow: Option<bool>,
}

fn create(daemon: &mut Daemon, mut call: Call<'_>) -> Result<Value, Error> {
    let Create { job_id, options: CreateOptions { filename, size, preallocation, nocow } } = call.parse()?;
    if nocow == Some(true) {
        return Err(Error::generic("'nocow' is not supported; leave it out"));
    }
    let size = u64::try_from(size)
        .map_err(|_| Error::generic(format!("Value '{size}' is out of range for parameter 'size'")))?;
    let preallocation = match preallocation.as_deref() {
        None | Some("off") => Preallocation::Off,
        Some("falloc") => Preallocation::Allocate,
        Some(_) => Preallocation::Full,
    };
    let opened = fdset::path::set_id(&filename).and_then(|set| {
        let user = format!("job {job_id}");
        daemon.fdsets.open_for(set, Access::CREATE, &user)
    });
    let opened = opened.map_err(|e| {
        tracing::info!(filename, "{}", e.detail());
        e.to_string()
    });
    daemon
        .jobs
        .start(job_id, "create", move || block::create_file(opened?, size, preallocation).map_err(|e| e.to_string()))?;
    Ok(Value::Null)
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
