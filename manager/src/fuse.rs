// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Mounting `/dev/fuse` over a regular file, so that the daemon, which can mount nothing, serves a disk as a plain file.
//!
//! The administrator's manager makes a mount that hangs nowhere (fsmount(2)), passes its device, and hangs it over the file
//! that it has looked at (move_mount(2)) once the daemon serves it: no path leads to an unserved mount, and no name is
//! resolved twice. Other users have `fusermount3` do it.
//!
//! A process of its own, the warden, unmounts: it waits for the end of a pipe whose other end only the manager has. So the
//! mount goes whatever ends the manager, and lazily, so that it goes although somebody uses it. Should all processes die at
//! once, the next [`Mount::make`] clears the dead mount away.

use std::ffi::OsStr;
use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::mount::{self, FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use sys::signal::{self, Signals};

use crate::inspector::Program;
use crate::{Error, Result};

/// What mounts are called in `/proc/self/mountinfo`.
const TYPE: &str = "fuse.doorless";
/// The program that mounts for those who may not.
const FUSERMOUNT: &str = "fusermount3";
/// The hidden verb of the warden.
pub const WARDEN: &str = "unmount";

/// Whether others than the user may use a mounted file, as far as its permissions allow (QAPI's `FuseExportAllowOther`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AllowOther {
    /// No.
    Off,
    /// Yes, or it is an error.
    On,
    /// If it can be had.
    #[default]
    Auto,
}

impl AllowOther {
    /// QAPI's word.
    pub fn word(self) -> &'static str {
        match self {
            AllowOther::Off => "off",
            AllowOther::On => "on",
            AllowOther::Auto => "auto",
        }
    }
}

/// A mounted device, and whoever will unmount it. Dropping it unmounts.
#[derive(Debug)]
pub struct Mount {
    mountpoint: PathBuf,
    device: OwnedFd,
    /// What must still be hung over what.
    loose: Option<(OwnedFd, OwnedFd)>,
    /// Whether others were let in.
    shared: bool,
    warden: Warden,
}

#[derive(Debug)]
struct Warden {
    process: Child,
    /// Its end is the sign.
    alive: Option<ChildStdin>,
}

impl Mount {
    /// Prepares a mount over `mountpoint`, a regular file. A dead mount that an earlier run left there goes first.
    ///
    /// # Errors
    /// It is no regular file, there is no `/dev/fuse`, or this user may not mount.
    pub fn make(program: &Program, mountpoint: &Path, read_only: bool, others: AllowOther) -> Result<Mount> {
        let failed = |source| Error::Open { path: mountpoint.to_owned(), purpose: " to mount a disk there", source };
        let mountpoint = std::path::absolute(mountpoint).map_err(failed)?;
        clear_dead(&mountpoint);
        let place = rustix::fs::openat(CWD, &mountpoint, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| failed(e.into()))?;
        let stat = rustix::fs::fstat(&place).map_err(|e| failed(e.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Error::Refused(format!("'{}' is not a regular file", mountpoint.display())));
        }
        match by_ourselves(read_only, others) {
            Ok((device, tree, shared)) => {
                let warden = Warden::start(program, &mountpoint, Some(&tree))?;
                Ok(Mount { mountpoint, device, loose: Some((tree, place)), shared, warden })
            }
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                let (device, shared) = by_fusermount(&mountpoint, read_only, others)?;
                let warden = Warden::start(program, &mountpoint, None)?;
                Ok(Mount { mountpoint, device, loose: None, shared, warden })
            }
            Err(e) => Err(Error::Open { path: "/dev/fuse".into(), purpose: " and mount it", source: e }),
        }
    }

    /// The device, for the daemon.
    pub fn device(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// Where it is mounted.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Whether others than this user were let in.
    pub fn is_shared(&self) -> bool {
        self.shared
    }

    /// Makes it visible. The mount is alive for as long as somebody has the device.
    ///
    /// # Errors
    /// Those of move_mount(2).
    pub fn attach(mut self) -> Result<Attached> {
        if let Some((tree, place)) = self.loose.take() {
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
            mount::move_mount(&tree, "", &place, "", flags).map_err(|e| Error::Open {
                path: self.mountpoint.clone(),
                purpose: " to mount a disk there",
                source: e.into(),
            })?;
        }
        Ok(Attached { mountpoint: self.mountpoint, _warden: self.warden })
    }
}

/// A mount that is served. Dropping it unmounts.
#[derive(Debug)]
pub struct Attached {
    mountpoint: PathBuf,
    _warden: Warden,
}

impl Attached {
    /// Where it is mounted.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }
}

/// Mounts with this process's own rights: the device, the mount that hangs nowhere yet, and whether others are let in.
fn by_ourselves(read_only: bool, others: AllowOther) -> io::Result<(OwnedFd, OwnedFd, bool)> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let device = rustix::fs::openat(CWD, "/dev/fuse", flags, Mode::empty())?;
    let context = mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let options = [
        ("source", "doorless".to_owned()),
        ("subtype", "doorless".to_owned()),
        ("fd", device.as_raw_fd().to_string()),
        ("rootmode", "100000".to_owned()),
        ("user_id", user.to_string()),
        ("group_id", group.to_string()),
    ];
    for (key, value) in options {
        mount::fsconfig_set_string(&context, key, value)?;
    }
    let shared = others != AllowOther::Off;
    if shared {
        mount::fsconfig_set_flag(&context, "allow_other")?;
        mount::fsconfig_set_flag(&context, "default_permissions")?;
    }
    mount::fsconfig_create(&context)?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let attributes = if read_only { attributes | MountAttrFlags::MOUNT_ATTR_RDONLY } else { attributes };
    let tree = mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    Ok((device, tree, shared))
}

/// Has `fusermount3` mount it: the device, and whether others are let in.
fn by_fusermount(mountpoint: &Path, read_only: bool, others: AllowOther) -> Result<(OwnedFd, bool)> {
    let attempts: &[bool] = match others {
        AllowOther::Off => &[false],
        AllowOther::On => &[true],
        AllowOther::Auto => &[true, false],
    };
    let mut said = String::new();
    for &shared in attempts {
        let mode = if read_only { "ro" } else { "rw" };
        let others = if shared { ",allow_other,default_permissions" } else { "" };
        let options = format!("{mode},nosuid,nodev,noexec,fsname=doorless,subtype=doorless{others}");
        let failed = Error::process("could not have fusermount3 mount /dev/fuse");
        match fusermount(mountpoint, &options) {
            Ok(Ok(device)) => return Ok((device, shared)),
            Ok(Err(why)) => said = why,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(Error::Refused(format!(
                    "only the administrator may mount, and there is no {FUSERMOUNT} (Debian's package fuse3) to do it for others"
                )));
            }
            Err(e) => return Err(failed(e)),
        }
    }
    Err(Error::Refused(format!("{FUSERMOUNT} would not mount it: {}", said.trim())))
}

/// Runs it; what it says if it refuses.
fn fusermount(mountpoint: &Path, options: &str) -> io::Result<std::result::Result<OwnedFd, String>> {
    let (ours, theirs) = UnixStream::pair()?;
    fcntl_setfd(&theirs, FdFlags::empty())?;
    let mut command = Command::new(FUSERMOUNT);
    command.args(["-o", options, "--"]).arg(mountpoint).env("_FUSE_COMMFD", theirs.as_raw_fd().to_string());
    let output = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).output()?;
    drop(theirs);
    if !output.status.success() {
        return Ok(Err(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    recvmsg(&ours, &mut [IoSliceMut::new(&mut [0])], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let device = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let device = device.ok_or(io::ErrorKind::UnexpectedEof)?;
    // Nobody else reads from it, so the flag disturbs nobody.
    rustix::fs::fcntl_setfl(&device, rustix::fs::fcntl_getfl(&device)? | OFlags::NONBLOCK)?;
    Ok(Ok(device))
}

impl Warden {
    fn start(program: &Program, mountpoint: &Path, tree: Option<&OwnedFd>) -> Result<Warden> {
        let doing = "could not start the process that unmounts";
        let mut command = Command::new(&program.executable);
        command.arg(WARDEN).arg(mountpoint).stdin(Stdio::piped()).stdout(Stdio::null());
        if let Some(tree) = tree {
            fcntl_setfd(tree, FdFlags::empty()).map_err(io::Error::from).map_err(Error::process(doing))?;
            command.arg(format!("--tree={}", tree.as_raw_fd()));
        }
        // A Ctrl-C is for the manager, which then unmounts in its own time.
        let mut process = command.process_group(0).spawn().map_err(Error::process(doing))?;
        if let Some(tree) = tree {
            fcntl_setfd(tree, FdFlags::CLOEXEC).map_err(io::Error::from).map_err(Error::process(doing))?;
        }
        let alive = process.stdin.take();
        Ok(Warden { process, alive })
    }
}

impl Drop for Warden {
    fn drop(&mut self) {
        self.alive = None;
        let _ = self.process.wait();
    }
}

/// The warden's process: unmounts when standard input ends. `tree` is the mount's inherited number, for the administrator's.
///
/// # Errors
/// It cannot be unmounted.
pub fn unmount_when_abandoned(mountpoint: &Path, tree: Option<i32>) -> io::Result<()> {
    let _deaf = Signals::block(&[signal::INT, signal::TERM, signal::HUP])?;
    let tree = tree.map(sys::fd::inherited).transpose()?;
    io::stdin().read_to_end(&mut Vec::new())?;
    match tree {
        // unmount(2) takes the topmost, whoever's it is.
        Some(tree) if is_covered(&tree)? => Err(io::Error::other(format!(
            "something else is mounted over '{}': unmount that, and then what is below",
            mountpoint.display()
        ))),
        // By its descriptor: it goes wherever it has been moved.
        Some(tree) => match mount::unmount(format!("/proc/self/fd/{}", tree.as_raw_fd()), UnmountFlags::DETACH) {
            // It never hung anywhere, or somebody was quicker.
            Err(Errno::INVAL) => Ok(()),
            other => Ok(other?),
        },
        None => {
            let mut command = Command::new(FUSERMOUNT);
            command.args(["-u", "-q", "-z", "--"]).arg(mountpoint);
            command.stdin(Stdio::null()).stderr(Stdio::null()).status().map(drop)
        }
    }
}

/// Whether another mount hangs over this one.
fn is_covered(tree: &OwnedFd) -> io::Result<bool> {
    let facts = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", tree.as_raw_fd()))?;
    let Some(id) = facts.lines().find_map(|line| line.strip_prefix("mnt_id:")) else { return Ok(false) };
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    Ok(table.lines().any(|line| line.split(' ').nth(1) == Some(id.trim())))
}

/// Unmounts what hangs over `mountpoint` if it is a mount of ours that nobody serves any more.
fn clear_dead(mountpoint: &Path) {
    while rustix::fs::stat(mountpoint).is_err_and(|e| e == Errno::NOTCONN) && is_ours(mountpoint) {
        if mount::unmount(mountpoint, UnmountFlags::DETACH).is_err() {
            let mut command = Command::new(FUSERMOUNT);
            command.args(["-u", "-q", "-z", "--"]).arg(mountpoint).stdin(Stdio::null()).stderr(Stdio::null());
            if !command.status().is_ok_and(|status| status.success()) {
                return;
            }
        }
    }
}

/// Whether the topmost mount at that very path is of our type.
fn is_ours(mountpoint: &Path) -> bool {
    let Ok(table) = std::fs::read("/proc/self/mountinfo") else { return false };
    topmost_type(&table, mountpoint.as_os_str()).is_some_and(|kind| kind == TYPE.as_bytes())
}

/// The type of the last mount at `mountpoint` in a table as in proc_pid_mountinfo(5).
fn topmost_type<'a>(table: &'a [u8], mountpoint: &OsStr) -> Option<&'a [u8]> {
    let lines = table.split(|&byte| byte == b'\n').rev();
    for line in lines {
        let mut fields = line.split(|&byte| byte == b' ');
        if fields.nth(4).is_some_and(|field| unescape(field) == mountpoint.as_bytes()) {
            return fields.skip_while(|field| *field != b"-").nth(1);
        }
    }
    None
}

/// Blanks and the like are written as a backslash and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let code = after.first_chunk::<3>().filter(|_| byte == b'\\');
        let value =
            code.and_then(|code| std::str::from_utf8(code).ok()).and_then(|text| u8::from_str_radix(text, 8).ok());
        bytes.push(value.unwrap_or(byte));
        rest = if value.is_some() { &after[3..] } else { after };
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_topmost_mount_at_a_path_is_found_in_the_table() {
        let table = b"22 1 254:0 / / rw - ext4 /dev/root rw\n\
            40 22 0:37 / /tmp/a\\040b rw,nosuid shared:1 - fuse.doorless doorless rw\n\
            41 40 0:38 / /tmp/a\\040b rw - tmpfs tmpfs rw\n\
            42 22 0:39 / /tmp/c rw - fuse.doorless doorless rw\n";
        let kind = |path: &str| topmost_type(table, OsStr::new(path)).map(String::from_utf8_lossy);
        assert_eq!(kind("/tmp/a b").as_deref(), Some("tmpfs"));
        assert_eq!(kind("/tmp/c").as_deref(), Some("fuse.doorless"));
        assert_eq!(kind("/tmp"), None);
    }
}
