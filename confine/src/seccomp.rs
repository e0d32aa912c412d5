// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The filter: what [`rules`] does not allow is refused.
//!
//! Refused means `EPERM` unless the plan says [`Denial::Kill`]: see there for the choice. Calls of another architecture
//! (32-bit code in a 64-bit process) end the process in any case; those of the x32 ABI have numbers that no rule names.
//!
//! `clone3` hides its flags behind a pointer, so nothing could tell a thread from a process. It answers `ENOSYS`, as on a
//! kernel without it, and libc takes `clone`, whose flags are checked. A filter has one answer for what it refuses, so
//! there are two filters.

use std::collections::BTreeMap;

use rustix::io::Errno;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op,
    SeccompCondition as Condition, SeccompFilter, SeccompRule as Rule, TargetArch,
};

use crate::rules::{self, Allowed, Check};
use crate::{Denial, Plan};

#[cfg(target_arch = "x86_64")]
const ARCH: TargetArch = TargetArch::x86_64;
#[cfg(target_arch = "aarch64")]
const ARCH: TargetArch = TargetArch::aarch64;

/// By call: the alternatives of which one must hold, none if it is always allowed.
type Rules = BTreeMap<i64, Vec<Rule>>;

/// What is in force, or what is missing and why.
pub fn apply(plan: &Plan) -> Result<String, String> {
    let nothing = if plan.hole.is_some() { "one of which is a hole" } else { "none of which opens anything" };
    install(plan)
        .map(|calls| format!("leaves {calls} system calls, {nothing}"))
        .map_err(|e| format!("the kernel refused the filter: {e}"))
}

/// How many calls are left. Every thread that there is gets the filters, and those that will be inherit them.
fn install(plan: &Plan) -> Result<usize, seccompiler::Error> {
    let hidden = Rules::from([(libc::SYS_clone3, vec![])]);
    let hidden = SeccompFilter::new(hidden, SeccompAction::Allow, errno(Errno::NOSYS), ARCH)?;
    let rings: &[Allowed] = if plan.rings { rules::RINGS } else { &[] };
    let mut rules = compile(&[rules::of(plan.role), &[rings]].concat())?;
    if let Some(hole) = plan.hole {
        rules.insert(hole, Vec::new());
    }
    let calls = rules.len();
    let denied = match plan.denial {
        Denial::Refuse => errno(Errno::PERM),
        Denial::Kill => SeccompAction::KillProcess,
    };
    let allowed = SeccompFilter::new(rules, denied, SeccompAction::Allow, ARCH)?;
    // The stricter answer of two filters wins. Of two errnos it would be that of the filter that came last.
    for filter in [hidden, allowed] {
        seccompiler::apply_filter_all_threads(&BpfProgram::try_from(filter)?)?;
    }
    Ok(calls)
}

fn errno(errno: Errno) -> SeccompAction {
    SeccompAction::Errno(errno.raw_os_error().unsigned_abs())
}

fn compile(tables: &[&[Allowed]]) -> Result<Rules, BackendError> {
    let mut rules = Rules::new();
    for &Allowed { call, checks } in tables.iter().copied().flatten() {
        let alternatives = rules.entry(call).or_default();
        for conditions in conjunctions(checks)? {
            alternatives.push(Rule::new(conditions)?);
        }
    }
    Ok(rules)
}

/// Every way in which all of `checks` can hold at once; none if there are no checks.
fn conjunctions(checks: &[Check]) -> Result<Vec<Vec<Condition>>, BackendError> {
    let Some((first, rest)) = checks.split_first() else { return Ok(Vec::new()) };
    let rest = conjunctions(rest)?;
    let mut all = Vec::new();
    for condition in conditions(*first)? {
        let head = vec![condition];
        if rest.is_empty() {
            all.push(head);
        } else {
            all.extend(rest.iter().map(|tail| [head.as_slice(), tail].concat()));
        }
    }
    Ok(all)
}

/// The conditions of which one must hold for a check to hold.
fn conditions(check: Check) -> Result<Vec<Condition>, BackendError> {
    let low = |argument, op, value: u32| Condition::new(argument, Len::Dword, op, value.into());
    match check {
        Check::OneOf(argument, values) => {
            values.iter().map(|value| low(argument, Op::Eq, value.cast_unsigned())).collect()
        }
        Check::Request(argument, values) => {
            values.iter().map(|&value| Condition::new(argument, Len::Dword, Op::Eq, value)).collect()
        }
        Check::Without(argument, bits) => Ok(vec![low(argument, Op::MaskedEq(u64::from(bits.cast_unsigned())), 0)?]),
        Check::Within(argument, bits) => Ok(vec![low(argument, Op::MaskedEq(u64::from(!bits.cast_unsigned())), 0)?]),
        Check::Null(argument) => Ok(vec![Condition::new(argument, Len::Qword, Op::Eq, 0)?]),
        Check::OwnProcess(argument) => {
            let own = rustix::process::getpid().as_raw_nonzero().get();
            Ok(vec![low(argument, Op::Eq, own.cast_unsigned())?])
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::Role;

    #[test]
    fn a_line_without_checks_never_shares_its_call_with_a_line_that_has_some() {
        // It would silently not count.
        for role in [Role::Daemon, Role::Inspector, Role::Tool, Role::Client] {
            let lines: Vec<&Allowed> = rules::of(role).iter().copied().flatten().collect();
            for line in &lines {
                let same: Vec<_> = lines.iter().filter(|other| other.call == line.call).collect();
                assert!(same.len() == 1 || same.iter().all(|line| !line.checks.is_empty()), "call {}", line.call);
            }
        }
    }

    #[test]
    fn no_call_that_opens_starts_or_reaches_out_is_in_any_table() {
        let never = [
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_open_by_handle_at,
            libc::SYS_name_to_handle_at,
            libc::SYS_open_tree,
            libc::SYS_fsopen,
            libc::SYS_fsmount,
            libc::SYS_mount,
            libc::SYS_socket,
            libc::SYS_socketpair,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_listen,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_kill,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_pidfd_open,
            libc::SYS_pidfd_getfd,
            libc::SYS_io_uring_setup,
            libc::SYS_io_uring_register,
            libc::SYS_memfd_create,
            libc::SYS_userfaultfd,
            libc::SYS_seccomp,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_newfstatat,
            libc::SYS_statx,
            libc::SYS_fchmod,
            libc::SYS_fchown,
            libc::SYS_flock,
        ];
        for role in [Role::Daemon, Role::Inspector, Role::Tool, Role::Client] {
            let rules = compile(rules::of(role)).unwrap();
            assert_eq!(never.iter().find(|call| rules.contains_key(call)), None);
        }
    }

    #[test]
    fn an_io_uring_can_be_asked_only_where_one_was_made() {
        for role in [Role::Daemon, Role::Inspector, Role::Tool] {
            assert!(!compile(rules::of(role)).unwrap().contains_key(&libc::SYS_io_uring_enter));
        }
        let rings = compile(&[rules::RINGS]).unwrap();
        assert_eq!(rings.keys().copied().collect::<Vec<_>>(), [libc::SYS_io_uring_enter]);
    }

    #[test]
    fn two_checks_of_several_values_hold_in_every_pair() {
        let checks = [Check::OneOf(1, &[1, 2]), Check::OneOf(2, &[3, 4, 5])];
        let all = conjunctions(&checks).unwrap();
        assert_eq!(all.len(), 6);
        assert!(all.iter().all(|conditions| conditions.len() == 2));
    }
}
