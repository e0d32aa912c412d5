// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The verbs for what an image keeps besides its disk: `bitmap` and `snapshot`.

use std::path::PathBuf;

use ::img::bitmap::Action as BitmapAction;
use ::img::snapshot::Action as SnapshotAction;
use anyhow::{bail, ensure};
use clap::{ArgAction, ArgMatches, Args, FromArgMatches};
use manager::opening::Rights;

use super::images::{Common, bytes};

#[derive(Args)]
pub struct Bitmap {
    #[command(flatten)]
    common: Common,
    /// The image's format.
    #[arg(short, long)]
    format: Option<String>,
    #[command(flatten)]
    actions: Actions,
    /// With --add: bytes to a bit, a power of two from 512 (default: the image's clusters, 4k to 64k).
    #[arg(short, long, value_name = "SIZE", value_parser = bytes)]
    granularity: Option<u64>,
    /// With --merge: the image that the merged bitmaps are in.
    #[arg(short = 'b', long, value_name = "FILE")]
    source_file: Option<PathBuf>,
    /// Format of that image.
    #[arg(short = 'F', long, value_name = "FORMAT")]
    source_format: Option<String>,
    image: PathBuf,
    /// The bitmap.
    name: String,
}

/// What is to be done to a bitmap, in the order of the command line.
struct Actions(Vec<BitmapAction>);

/// Options that are actions without a value.
const PLAIN: [(&str, &str, BitmapAction); 5] = [
    ("add", "Make the bitmap, which then tracks writes.", BitmapAction::Add(None)),
    ("remove", "Take the bitmap out of the image.", BitmapAction::Remove),
    ("clear", "Take every mark out of the bitmap.", BitmapAction::Clear),
    ("enable", "Let the bitmap track writes.", BitmapAction::Enable),
    ("disable", "Let the bitmap track writes no longer.", BitmapAction::Disable),
];

impl Args for Actions {
    fn augment_args(mut command: clap::Command) -> clap::Command {
        let action = |name: &'static str| clap::Arg::new(name).long(name).action(ArgAction::Append);
        for (name, help, _) in PLAIN {
            command = command.arg(action(name).help(help).num_args(0).default_missing_value("on"));
        }
        command.arg(action("merge").help("Give the bitmap the marks of this one.").value_name("BITMAP"))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Actions::augment_args(command)
    }
}

impl FromArgMatches for Actions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Actions, clap::Error> {
        let mut found = Vec::new();
        for (name, _, action) in PLAIN {
            found.extend(matches.indices_of(name).into_iter().flatten().map(|at| (at, action.clone())));
        }
        let sources = matches.get_many::<String>("merge").into_iter().flatten().cloned().map(BitmapAction::Merge);
        found.extend(matches.indices_of("merge").into_iter().flatten().zip(sources));
        found.sort_by_key(|(at, _)| *at);
        Ok(Actions(found.into_iter().map(|(_, action)| action).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Actions::from_arg_matches(matches)?;
        Ok(())
    }
}

#[derive(Args)]
pub struct Snapshot {
    #[command(flatten)]
    common: Common,
    /// The image's format.
    #[arg(short, long)]
    format: Option<String>,
    /// Tell which there are; so it is without any of these options.
    #[arg(short, long)]
    list: bool,
    /// Keep the present state under this name.
    #[arg(short, long, value_name = "NAME")]
    create: Option<String>,
    /// Go back to the state of this id or name.
    #[arg(short, long, value_name = "NAME")]
    apply: Option<String>,
    /// Let the state of this name go.
    #[arg(short, long, value_name = "NAME")]
    delete: Option<String>,
    image: PathBuf,
}

pub fn bitmap(verb: Bitmap) -> anyhow::Result<u8> {
    let mut actions = verb.actions.0;
    ensure!(!actions.is_empty(), "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge");
    let has = |wanted: fn(&BitmapAction) -> bool| actions.iter().any(wanted);
    ensure!(
        verb.granularity.is_none() || has(|action| matches!(action, BitmapAction::Add(_))),
        "granularity only supported with --add"
    );
    ensure!(verb.source_format.is_none() || verb.source_file.is_some(), "-F only supported with -b");
    ensure!(
        verb.source_file.is_none() || has(|action| matches!(action, BitmapAction::Merge(_))),
        "Merge bitmap source file only supported with --merge"
    );
    for action in &mut actions {
        if let BitmapAction::Add(granularity) = action {
            *granularity = verb.granularity;
        }
    }
    let common = &verb.common;
    let layer = common.alone(&verb.image, verb.format.as_deref(), Rights::ReadWrite)?;
    let source = match &verb.source_file {
        // One image has one user.
        Some(path) if path.canonicalize().ok() != verb.image.canonicalize().ok() => {
            Some(common.alone(path, verb.source_format.as_deref(), Rights::ReadOnly)?)
        }
        _ => None,
    };
    let confinement = common.requirement();
    Ok(::img::bitmap::run(::img::bitmap::Request { layer, source, name: verb.name, actions, confinement })?)
}

pub fn snapshot(verb: Snapshot) -> anyhow::Result<u8> {
    let action = match (verb.list, verb.create, verb.apply, verb.delete) {
        (_, None, None, None) => SnapshotAction::List,
        (false, Some(name), None, None) => SnapshotAction::Create(name),
        (false, None, Some(name), None) => SnapshotAction::Apply(name),
        (false, None, None, Some(name)) => SnapshotAction::Delete(name),
        _ => bail!("Cannot mix '-l', '-a', '-c', '-d'"),
    };
    let rights = if action == SnapshotAction::List { Rights::ReadOnly } else { Rights::ReadWrite };
    Ok(::img::snapshot::run(::img::snapshot::Request {
        layer: verb.common.alone(&verb.image, verb.format.as_deref(), rights)?,
        action,
        force_share: verb.common.force_share,
        confinement: verb.common.requirement(),
    })?)
}
