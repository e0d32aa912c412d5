// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What `query-fdsets` tells on request and QEMU's does not: what a descriptor is, where it came from, who uses it.

use std::time::UNIX_EPOCH;

use fdset::{FdInfo, Kind, Mode, SetInfo};
use qmp::{Definition, Member, Type};
use serde_json::{Map, Value, json};

use super::words;

pub fn types() -> Vec<Definition> {
    vec![
        words(
            "DescriptorType",
            &["regular", "directory", "fifo", "socket", "symlink", "block", "char", "other"],
            "What a descriptor refers to.",
        ),
        words("DescriptorAccess", &["read-only", "write-only", "read-write", "none"], "What it was opened for."),
        Definition::structure(
            "DescriptorPeer",
            [
                Member::required(
                    "pid",
                    Type::Int,
                    "Its process when it connected; 0 if it lives outside of the daemon's pid namespace.",
                ),
                Member::required("uid", Type::Int, "Its user."),
            ],
            "Who passed a descriptor.",
        ),
        Definition::structure(
            "FdsetFdDetail",
            [
                Member::required("access", Type::Named("DescriptorAccess"), "What it was opened for."),
                Member::required("direct", Type::Bool, "Whether it bypasses the host's cache (`O_DIRECT`)."),
                Member::optional("type", Type::Named("DescriptorType"), "What it refers to, if the kernel would say."),
                Member::optional("device", Type::Str, "`major:minor` of the file system, or of the device itself."),
                Member::optional("inode", Type::Int, "The file's number there."),
                Member::optional("size", Type::Int, "Bytes of a regular file, now."),
                Member::optional("seals", Type::Str, "Seals of a memfd, by name."),
                Member::optional("deleted", Type::Bool, "Whether no name leads to the file."),
                Member::optional("peer", Type::Named("DescriptorPeer"), "Who passed it; absent for the command line."),
                Member::optional("since", Type::Int, "When it was passed, seconds since 1970."),
                Member::required("users", Type::Array(&Type::Str), "The nodes that have opened it."),
            ],
            "A descriptor, looked at closely.",
        ),
    ]
}

/// The detail of `fd`, which is in `set`.
pub fn detail(set: &SetInfo, fd: &FdInfo) -> Value {
    let users: Vec<&str> =
        set.dups().filter(|dup| dup.opened_from() == fd.number()).filter_map(fdset::DupInfo::user).collect();
    let mut detail = Map::new();
    let mut put = |key: &str, value: Value| drop(detail.insert(key.to_owned(), value));
    put("access", access(fd.rights().mode()).into());
    put("direct", fd.rights().direct().into());
    put("users", users.into());
    if let Some(identity) = fd.identity() {
        let device = match identity.kind {
            Kind::Block(device) | Kind::Char(device) => device,
            _ => identity.device,
        };
        put("type", kind(identity.kind).into());
        put("device", device.to_string().into());
        put("inode", identity.inode.into());
        put("deleted", identity.deleted.into());
        if let Some(size) = identity.size {
            put("size", size.into());
        }
        if let Some(seals) = identity.seals {
            put("seals", seals.to_string().into());
        }
    }
    if let Some(peer) = fd.provenance().peer {
        put("peer", json!({ "pid": peer.pid, "uid": peer.uid }));
    }
    if let Some(since) = fd.provenance().at.and_then(|at| at.duration_since(UNIX_EPOCH).ok()) {
        put("since", since.as_secs().into());
    }
    Value::Object(detail)
}

fn access(mode: Mode) -> &'static str {
    match mode {
        Mode::ReadOnly => "read-only",
        Mode::WriteOnly => "write-only",
        Mode::ReadWrite => "read-write",
        Mode::Neither => "none",
    }
}

fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Regular => "regular",
        Kind::Directory => "directory",
        Kind::Fifo => "fifo",
        Kind::Socket => "socket",
        Kind::Symlink => "symlink",
        Kind::Block(_) => "block",
        Kind::Char(_) => "char",
        Kind::Other => "other",
    }
}
