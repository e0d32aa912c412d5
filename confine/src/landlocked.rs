// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Landlock without a rule: whatever the kernel can handle is denied.

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, RestrictionStatus, Ruleset, RulesetAttr,
    RulesetStatus, Scope,
};

/// The newest interface whose rights are asked for; an older kernel handles those that it knows. Asking for more than was
/// tried is safe here: there is no rule whose meaning could change.
const NEWEST: ABI = ABI::V10;

/// What an interface added, as far as it takes away ways out. None of it touches descriptors that are open already.
const ADDED: [(i32, &str); 7] = [
    (1, "files"),
    (2, "links between directories"),
    (3, "truncation by path"),
    (4, "TCP"),
    (6, "abstract sockets and signals outside"),
    (9, "sockets by path"),
    (10, "UDP"),
];

/// What is in force, or what is missing and why. Interfaces below `oldest` do not count.
pub fn apply(oldest: i32) -> Result<String, String> {
    let status = restrict().map_err(|e| format!("the kernel refused the ruleset: {e}"))?;
    let abi = match status.landlock {
        LandlockStatus::NotEnabled => return Err("the kernel has Landlock, but it is switched off".into()),
        LandlockStatus::NotImplemented => return Err("the kernel has no Landlock, or a filter hides it".into()),
        LandlockStatus::Available { effective_abi, .. } => effective_abi as i32,
    };
    if status.ruleset == RulesetStatus::NotEnforced {
        return Err(format!("the kernel has Landlock ABI {abi} and did not enforce it"));
    }
    if abi < oldest {
        return Err(format!("ABI {abi} is in force, and the plan wants {oldest}: nothing denies {}", list(abi, false)));
    }
    let unknown = list(abi, false);
    let but = if unknown.is_empty() { unknown } else { format!("; this kernel's cannot deny {unknown}") };
    Ok(format!("ABI {abi} without a rule denies {}{but}", list(abi, true)))
}

fn restrict() -> Result<RestrictionStatus, landlock::RulesetError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?
        .restrict_self()
}

/// What an interface denies, or cannot.
fn list(abi: i32, denied: bool) -> String {
    let added = ADDED.iter().filter(|(since, _)| (abi >= *since) == denied);
    added.map(|(_, what)| *what).collect::<Vec<_>>().join(", ")
}
