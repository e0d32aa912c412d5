// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `doorless policy`: what a policy would allow, without opening anything for anybody.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand};
use manager::chain::Policy as Wanted;
use manager::policy::{Asker, Audit, ByPolicy, Policy};

use crate::Confinement;

/// Where a policy is unless somebody says otherwise.
pub const PLACE: &str = "/etc/doorless/policy.toml";

/// Options of `policy`.
#[derive(Args)]
pub struct Options {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Say for each image whether it would be opened, and by which rule or why not. The exit status is 1 if one would not.
    Check(Check),
}

#[derive(Args)]
struct Check {
    /// The policy.
    #[arg(long, value_name = "FILE", default_value = PLACE)]
    policy: PathBuf,
    /// For whom: a number of a user; by default this one.
    #[arg(long = "as", value_name = "UID")]
    uid: Option<u32>,
    /// The images' format.
    #[arg(long, short)]
    format: Option<String>,
    /// Format of backing files whose overlay does not say.
    #[arg(long, value_name = "FORMAT")]
    backing_format: Option<String>,
    /// For reading alone.
    #[arg(long, short)]
    read_only: bool,
    /// The images; without any the policy itself is checked.
    images: Vec<PathBuf>,
    #[command(flatten)]
    confinement: Confinement,
}

/// Checks.
pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let Verb::Check(check) = &options.verb;
    let policy = Policy::load(&check.policy)?;
    let mut asker = Asker::this();
    asker.uid = check.uid.unwrap_or(asker.uid);
    let wanted = Wanted {
        format: check.format.clone(),
        backing_format: check.backing_format.clone(),
        read_only: check.read_only,
        ..Wanted::default()
    };
    let mut refused = false;
    for image in &check.images {
        let image = std::path::absolute(image).with_context(|| format!("'{}' is no path", image.display()))?;
        let mut audit = Audit::none();
        let opener = ByPolicy::new(&policy, &mut audit, asker, check.format.is_some());
        match opener.chain(&check.confinement.program(), &image, &wanted) {
            Ok(chain) => {
                let named = chain.layers.iter().map(|layer| layer.image.path.display().to_string());
                println!("allowed: {}", named.collect::<Vec<_>>().join(" over "));
            }
            Err(error) => {
                refused = true;
                println!("refused: {}: {:#}", image.display(), anyhow::Error::from(error));
            }
        }
    }
    if check.images.is_empty() {
        println!("the policy '{}' is sound", check.policy.display());
    }
    Ok(if refused { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
