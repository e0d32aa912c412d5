// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The system calls that are left. Everything else answers EPERM.
//!
//! EPERM rather than death: a daemon that serves other clients goes on, and an attempt to get out can be reported. There is
//! nothing behind the refused calls that a second try could reach.
//!
//! Arguments are looked at where a call is harmless only with some: memory is never executable, `fcntl` sets no flags of
//! descriptors that are shared with others, `ioctl` asks block devices and nothing else, `clone` makes threads and no
//! processes. `clone3` hides its arguments behind a pointer, so it answers ENOSYS and libc takes `clone`.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as ArgLen, SeccompCmpOp as Op, SeccompCondition as Condition,
    SeccompFilter, SeccompRule as Rule, TargetArch,
};
use sys::call as nr;

use crate::Role;

#[cfg(target_arch = "x86_64")]
const ARCH: TargetArch = TargetArch::x86_64;
#[cfg(target_arch = "aarch64")]
const ARCH: TargetArch = TargetArch::aarch64;

type Rules = BTreeMap<i64, Vec<Rule>>;

/// What is in force, or what is missing and why.
pub fn apply(role: Role) -> Result<String, String> {
    let refuse = |e: &dyn std::fmt::Display| format!("the kernel refused the filter: {e}");
    let no_clone3 = Rules::from([(nr::CLONE3, vec![])]);
    let enosys = SeccompAction::Errno(rustix::io::Errno::NOSYS.raw_os_error().unsigned_abs());
    let eperm = SeccompAction::Errno(rustix::io::Errno::PERM.raw_os_error().unsigned_abs());
    let rules = allowed(role).map_err(|e| refuse(&e))?;
    let count = rules.len();
    // The stricter answer of two filters wins, so the first may allow what the second does not.
    for (rules, matched, otherwise) in [(no_clone3, enosys, SeccompAction::Allow), (rules, SeccompAction::Allow, eperm)]
    {
        let filter = SeccompFilter::new(rules, otherwise, matched, ARCH).map_err(|e| refuse(&e))?;
        let program: BpfProgram = filter.try_into().map_err(|e: seccompiler::BackendError| refuse(&e))?;
        seccompiler::apply_filter_all_threads(&program).map_err(|e| refuse(&e))?;
    }
    Ok(format!("leaves {count} system calls, none of which opens anything"))
}

/// Calls by name, and what their arguments must be.
fn allowed(role: Role) -> Result<Rules, seccompiler::BackendError> {
    let mut rules = Rules::new();
    for &call in nr::ALWAYS {
        rules.insert(call, vec![]);
    }
    if role == Role::Daemon {
        for &call in nr::DAEMON {
            rules.insert(call, vec![]);
        }
        rules.insert(nr::CLONE, vec![Rule::new(vec![bits(0, nr::CLONE_THREAD_FLAGS)?])?]);
        rules.insert(nr::IOCTL, equal(1, nr::IOCTLS)?);
        // Names of threads.
        rules.insert(nr::PRCTL, equal(0, &[nr::PR_SET_NAME])?);
        rules.insert(nr::GETSOCKOPT, equal(1, nr::SOCKET_LEVELS)?);
        rules.insert(nr::SETSOCKOPT, equal(1, nr::SOCKET_LEVELS)?);
    }
    rules.insert(nr::FCNTL, equal(1, nr::FCNTLS)?);
    rules.insert(nr::MMAP, vec![Rule::new(vec![without(2, nr::PROT_EXEC)?])?]);
    rules.insert(nr::MPROTECT, vec![Rule::new(vec![without(2, nr::PROT_EXEC)?])?]);
    Ok(rules)
}

/// Any of `values` in argument `index`.
fn equal(index: u8, values: &[u64]) -> Result<Vec<Rule>, seccompiler::BackendError> {
    values.iter().map(|&value| Rule::new(vec![Condition::new(index, ArgLen::Dword, Op::Eq, value)?])).collect()
}

/// All of `mask` set in argument `index`.
fn bits(index: u8, mask: u64) -> Result<Condition, seccompiler::BackendError> {
    Condition::new(index, ArgLen::Qword, Op::MaskedEq(mask), mask)
}

/// None of `mask` set in argument `index`.
fn without(index: u8, mask: u64) -> Result<Condition, seccompiler::BackendError> {
    Condition::new(index, ArgLen::Qword, Op::MaskedEq(mask), 0)
}
