// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `doorless img`, and the same under the name `qemu-img`: image verbs with that program's options.
//!
//! This process opens what its arguments name, and what the images name as far as the policy of [`manager::chain`] goes; then it
//! confines itself, and only then looks into an image.

mod asked;
mod chains;
mod changing;
mod copying;
mod images;
mod keeping;
mod looking;
mod making;
mod measuring;
mod new_image;

pub use asked::Asked;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

/// Image verbs with qemu-img's options: every image is looked into by a process that can open nothing any more.
#[derive(Parser)]
#[command(args_override_self = true, arg_required_else_help = true)]
struct Options {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Change options of an image: compat, lazy_refcounts, refcount_bits, backing_file, backing_fmt.
    Amend(changing::Amend),
    /// Change the dirty bitmaps that an image keeps.
    Bitmap(keeping::Bitmap),
    /// Look for damage, and repair it.
    Check(looking::Check),
    /// Tell whether two images show a guest the same.
    Compare(looking::Compare),
    /// Copy an image, with what it is built from, into a new one.
    Convert(copying::Convert),
    /// Make an image.
    Create(making::Create),
    /// Tell what an image says about itself.
    Info(looking::Info),
    /// Tell where the bytes of an image are stored.
    Map(looking::Map),
    /// Tell how large the file of a new image will be.
    Measure(looking::Measure),
    /// Change the size of an image's disk.
    Resize(changing::Resize),
    /// Measure how fast an image is.
    Bench(measuring::Bench),
    /// Bring what an image has down into its backing file.
    Commit(chains::Commit),
    /// Copy an image, or a part of it, with the operands of dd.
    Dd(copying::Dd),
    /// Put an image over another backing file.
    Rebase(chains::Rebase),
    /// Keep states of an image's disk, go back to them, let them go.
    Snapshot(keeping::Snapshot),
}

/// Runs `arguments` under the name `name`; the exit status is qemu-img's.
pub fn run(name: &'static str, arguments: Vec<OsString>) -> anyhow::Result<ExitCode> {
    let words = std::iter::once(OsString::from(name)).chain(arguments);
    let parsed = Options::command().bin_name(name).try_get_matches_from(words);
    let options = match parsed.and_then(|matches| Options::from_arg_matches(&matches)) {
        Ok(options) => options,
        Err(e) => {
            let help = !e.use_stderr();
            e.print()?;
            return Ok(if help { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
    };
    let status = match options.verb {
        Verb::Amend(verb) => changing::amend(verb)?,
        Verb::Bitmap(verb) => keeping::bitmap(verb)?,
        Verb::Check(verb) => looking::check(verb)?,
        // 1 says that the images differ.
        Verb::Compare(verb) => match looking::compare(verb) {
            Ok(status) => status,
            Err(e) => {
                eprintln!("{name}: {e:#}");
                2
            }
        },
        Verb::Convert(verb) => copying::convert(verb)?,
        Verb::Create(verb) => making::create(verb)?,
        Verb::Info(verb) => looking::info(verb)?,
        Verb::Map(verb) => looking::map(verb)?,
        Verb::Measure(verb) => looking::measure(verb)?,
        Verb::Resize(verb) => changing::resize(verb)?,
        Verb::Bench(verb) => measuring::bench(verb)?,
        Verb::Commit(verb) => chains::commit(verb)?,
        Verb::Dd(verb) => copying::dd(verb)?,
        Verb::Rebase(verb) => chains::rebase(verb)?,
        Verb::Snapshot(verb) => keeping::snapshot(verb)?,
    };
    Ok(ExitCode::from(status))
}
