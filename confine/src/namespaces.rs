// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Another world: a root directory with nothing in it, a network without an interface, no shared memory, queue or host name.
//!
//! Root makes these namespaces as it is, before it becomes another user. An ordinary user makes a user namespace first, in
//! which it is who it was; the capabilities that it gets there are dropped with the others.

use std::fs;
use std::io::Write;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsmount, fsopen, mount_change, move_mount, unmount,
};
use rustix::process::{
    DumpableBehavior, chroot, dumpable_behavior, fchdir, getegid, geteuid, getpid, pivot_root, set_dumpable_behavior,
};

/// What is in force, or what is missing and why.
type Applied = Result<String, String>;

/// As root. `None`: it may not, and may try it in a user namespace of its own.
pub fn leave_as_root() -> Option<Applied> {
    if !geteuid().is_root() {
        return None;
    }
    match sys::process::leave_namespaces(false) {
        Ok(()) => Some(empty_root().map(|root| detail("", root))),
        Err(Errno::PERM) => None,
        Err(e) => Some(Err(format!("make namespaces: {e}"))),
    }
}

/// As an ordinary user.
pub fn leave_as_user() -> Applied {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    // The files in /proc/self of a process that is not dumpable are root's, and a change of user made it so.
    let dumpable = dumpable_behavior().unwrap_or(DumpableBehavior::Dumpable);
    set_dumpable_behavior(DumpableBehavior::Dumpable).map_err(|e| format!("open /proc/self to itself: {e}"))?;
    sys::process::leave_namespaces(true).map_err(|e| format!("make a user namespace and others in it: {e}"))?;
    for (name, text) in [
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("{uid} {uid} 1\n")),
        ("gid_map", format!("{gid} {gid} 1\n")),
    ] {
        let path = format!("/proc/self/{name}");
        let written = fs::File::options().write(true).open(&path).and_then(|mut file| file.write_all(text.as_bytes()));
        written.map_err(|e| format!("write {path}: {e}"))?;
    }
    let root = empty_root()?;
    // Only root's process may go back to what it was after a change of user.
    if dumpable == DumpableBehavior::NotDumpable {
        set_dumpable_behavior(dumpable).map_err(|e| format!("close /proc/self again: {e}"))?;
    }
    Ok(detail("users, ", root))
}

fn detail(users: &str, root: &str) -> String {
    format!("its own {users}mounts, network, IPC, host name and control groups; {root}")
}

/// Puts an empty file system, read-only, in the place of the root directory.
fn empty_root() -> Result<&'static str, String> {
    let failed = |what: &'static str| move |e: Errno| format!("{what}: {e}");
    let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", flags).map_err(failed("keep mounts to itself"))?;
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("ask for an empty file system"))?;
    fsconfig_create(&context).map_err(failed("make an empty file system"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let empty =
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed("mount an empty file system"))?;
    move_mount(&empty, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(failed("put an empty file system over the root"))?;
    fchdir(&empty).map_err(failed("go into the empty file system"))?;
    let root = match pivot_root(".", ".") {
        Ok(()) => {
            unmount(".", UnmountFlags::DETACH).map_err(failed("let go of the old root"))?;
            "an empty root directory"
        }
        // The kernel's first file system, an initramfs, cannot be let go of.
        Err(Errno::INVAL) => {
            chroot(".").map_err(failed("change the root"))?;
            "an empty root directory, over the kernel's first"
        }
        Err(e) => return Err(failed("change the root")(e)),
    };
    let left = fs::read_dir("/").map_err(|e| format!("look into the new root: {e}"))?.count();
    if left == 0 { Ok(root) } else { Err(format!("the new root has {left} entries")) }
}

/// Whether this process is the first of its pid namespace, which only whoever started it can bring about.
pub fn first_process() -> Applied {
    match getpid().as_raw_nonzero().get() {
        1 => Ok("the first process of its own pid namespace: it sees no other".into()),
        pid => Err(format!("it was started as process {pid} among others")),
    }
}
