// SPDX-License-Identifier: Apache-2.0 OR MIT
//! No way to more rights than an unprivileged user that owns nothing has.

use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, Gid, Uid};

/// First of the user ids that no distribution hands out (systemd's table of uids calls 1879048192 to 2147483647 unused).
/// The process id is added: two daemons are never the same user.
const FIRST_UID: u32 = 1_900_000_000;
/// The user to be where a container maps only few ids.
const NOBODY: u32 = 65534;
/// Most descriptors: they are this project's business.
const DESCRIPTORS: u64 = 1 << 20;

/// What is in force, or what is missing and why.
pub fn apply() -> Result<String, String> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |e: Errno| format!("{what}: {e}")
    };
    let limits = rustix::process::getrlimit(Resource::Nofile);
    let most = limits.maximum.map_or(DESCRIPTORS, |maximum| maximum.min(DESCRIPTORS));
    setrlimit(Resource::Nofile, Rlimit { current: Some(most), maximum: Some(most) })
        .map_err(failed("limit descriptors"))?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }).map_err(failed("limit core dumps"))?;
    let user = if rustix::process::geteuid().is_root() { Some(become_nobody()?) } else { None };
    drop_capabilities().map_err(failed("drop capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(failed("set no_new_privs"))?;
    // Last: changing the user makes a process dumpable or not by itself.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("make the process not dumpable"))?;
    let user =
        user.map_or_else(|| "the user who started it".to_owned(), |uid| format!("user {uid}, which owns nothing"));
    Ok(format!("runs as {user}, without capabilities, no_new_privs, not dumpable, no core dumps"))
}

/// Root's files belong to root even without capabilities: so be somebody else.
fn become_nobody() -> Result<u32, String> {
    rustix::thread::set_thread_groups(&[]).map_err(|e| format!("leave root's groups: {e}"))?;
    let own = FIRST_UID + rustix::process::getpid().as_raw_nonzero().get().unsigned_abs() % 200_000_000;
    // Every capability that is needed below is still there until the user has changed.
    drop_bounding().map_err(|e| format!("empty the bounding set: {e}"))?;
    let mut last = Errno::INVAL;
    for id in [own, NOBODY] {
        let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
        let changed = rustix::thread::set_thread_res_gid(gid, gid, gid)
            .and_then(|()| rustix::thread::set_thread_res_uid(uid, uid, uid));
        match changed {
            Ok(()) => return Ok(id),
            Err(e) => last = e,
        }
    }
    Err(format!("become an unprivileged user: {last}"))
}

fn drop_capabilities() -> Result<(), Errno> {
    rustix::thread::clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
}

/// Needs CAP_SETPCAP; a process without it cannot gain from its bounding set once no_new_privs is set.
fn drop_bounding() -> Result<(), Errno> {
    for capability in CapabilitySet::all().iter() {
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // Newer than the kernel.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
