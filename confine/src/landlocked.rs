// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Landlock without a rule: whatever the kernel can handle is denied.

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, RestrictionStatus, Ruleset, RulesetAttr, RulesetStatus,
    Scope,
};

/// The newest interface whose rights are asked for; an older kernel handles those that it knows.
const NEWEST: ABI = ABI::V7;

/// What is in force, or what is missing and why.
pub fn apply() -> Result<String, String> {
    let restricted = || -> Result<RestrictionStatus, landlock::RulesetError> {
        Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(NEWEST))?
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(Scope::from_all(NEWEST))?
            .create()?
            .restrict_self()
    };
    match restricted() {
        Ok(status) if status.ruleset == RulesetStatus::FullyEnforced => {
            Ok("denies every file, TCP port, abstract socket and signal outside".into())
        }
        Ok(status) if status.ruleset == RulesetStatus::PartiallyEnforced => {
            Ok("denies what this kernel's older Landlock knows: files, and from 6.7 on TCP".into())
        }
        Ok(_) => Err("the kernel has no Landlock, or it is switched off (lsm= at boot)".into()),
        Err(e) => Err(format!("the kernel refused the ruleset: {e}")),
    }
}
