// SPDX-License-Identifier: Apache-2.0 OR MIT
//! No more rights than an unprivileged user that owns nothing has, and no way to get some.
//!
//! Every function answers what is in force, or what is missing and why. The calls act on one thread, which is the process.

use rustix::io::Errno;
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, dumpable_behavior, getegid, geteuid, getgroups, getrlimit, getuid,
    set_dumpable_behavior, setrlimit,
};
use rustix::thread::{CapabilitySet, CapabilitySets, Gid, Uid};

/// First of the user ids that no distribution hands out (systemd's table of uids calls 1879048192 to 2147483647 unused).
/// The process id is added: two daemons are never the same user.
const FIRST_UID: u32 = 1_900_000_000;
/// Process ids stay below this (`PID_MAX_LIMIT` of Linux is 4,194,304).
const UIDS: u32 = 200_000_000;
/// The user to be where a container maps only few ids.
const NOBODY: u32 = 65534;
/// Most descriptors: how many are held is this project's business, but a table of them takes memory.
const DESCRIPTORS: u64 = 1 << 20;

type Applied = Result<String, String>;

fn failed(what: &str) -> impl FnOnce(Errno) -> String {
    move |e| format!("{what}: {e}")
}

pub fn limit() -> Applied {
    let hard = getrlimit(Resource::Nofile).maximum;
    let descriptors = hard.map_or(DESCRIPTORS, |hard| hard.min(DESCRIPTORS));
    set_limit(Resource::Nofile, Some(descriptors)).map_err(failed("set the limit of descriptors"))?;
    set_limit(Resource::Core, Some(0)).map_err(failed("set the limit of core dumps"))?;
    // A write past this limit would be a signal that ends the process, not an error.
    let longest = getrlimit(Resource::Fsize).maximum;
    set_limit(Resource::Fsize, longest).map_err(failed("set the limit of file sizes"))?;
    let files =
        longest.map_or_else(|| "files of any size".to_owned(), |bytes| format!("files of {bytes} bytes at most"));
    Ok(format!("no core dumps, {descriptors} descriptors, {files}"))
}

fn set_limit(resource: Resource, limit: Option<u64>) -> Result<(), Errno> {
    setrlimit(resource, Rlimit { current: limit, maximum: limit })
}

/// Root's files belong to root even without capabilities: so be somebody else.
pub fn change_user(run_as: Option<(u32, u32)>) -> Applied {
    let current = (geteuid().as_raw(), getegid().as_raw());
    let (uid, _) = match run_as {
        Some((0, _) | (_, 0)) => return Err("the user to become is root, or its group is".into()),
        Some(wanted) if wanted == current && getuid().as_raw() == wanted.0 => wanted,
        Some(wanted) => {
            become_user(wanted).map_err(|e| format!("become user {} of group {}: {e}", wanted.0, wanted.1))?
        }
        None if current.0 == 0 || getuid().is_root() => {
            let own = FIRST_UID + sys::process::id() % UIDS;
            become_user((own, own))
                .or_else(|_| become_user((NOBODY, NOBODY)))
                .map_err(|e| format!("become another user than root: {e}"))?
        }
        None => return Ok(format!("runs as user {}, who started it, not as root", current.0)),
    };
    Ok(format!("runs as user {uid}, who owns nothing"))
}

fn become_user((uid, gid): (u32, u32)) -> Result<(u32, u32), Errno> {
    // Where a user namespace forbids it there may be nothing to leave.
    match rustix::thread::set_thread_groups(&[]) {
        Err(e) if getgroups().map_or(true, |groups| !groups.is_empty()) => return Err(e),
        _ => {}
    }
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::thread::set_thread_res_gid(group, group, group)?;
    rustix::thread::set_thread_res_uid(user, user, user)?;
    Ok((uid, gid))
}

/// Needs CAP_SETPCAP; a process without it cannot gain from its bounding set once no_new_privs is set.
pub fn empty_bounding_set() {
    for capability in capabilities() {
        if rustix::thread::remove_capability_from_bounding_set(capability).is_err() {
            break;
        }
    }
}

/// Every capability that the kernel has.
fn capabilities() -> impl Iterator<Item = CapabilitySet> {
    let all = (0..u64::BITS).map(|bit| CapabilitySet::from_bits_retain(1 << bit));
    // One more than the kernel has is an error.
    all.take_while(|&capability| rustix::thread::capability_is_in_bounding_set(capability).is_ok())
}

pub fn drop_capabilities() -> Applied {
    let none = CapabilitySet::empty();
    let none = CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::clear_ambient_capability_set().map_err(failed("clear the ambient set"))?;
    rustix::thread::set_capabilities(None, none).map_err(failed("drop capabilities"))?;
    let left = rustix::thread::capabilities(None).map_err(failed("look at the capabilities that are left"))?;
    if left != none {
        return Err(format!("some are left: {left:?}"));
    }
    let bounded = capabilities().any(|it| rustix::thread::capability_is_in_bounding_set(it) == Ok(true));
    let bounding = if bounded { " but in the bounding set, which an ordinary user cannot empty" } else { "" };
    Ok(format!("none in any set{bounding}"))
}

pub fn set_no_new_privs() -> Applied {
    rustix::thread::set_no_new_privs(true).map_err(failed("set no_new_privs"))?;
    match rustix::thread::no_new_privs() {
        Ok(true) => Ok("no program that it runs could have more rights".into()),
        answer => Err(format!("it was set and reads {answer:?}")),
    }
}

pub fn set_not_dumpable() -> Applied {
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("make the process not dumpable"))?;
    match dumpable_behavior() {
        Ok(DumpableBehavior::NotDumpable) => Ok("processes of its user cannot trace it or read its memory".into()),
        answer => Err(format!("it was set and reads {answer:?}")),
    }
}
