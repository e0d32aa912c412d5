// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The schema of `blockdev-add`, made from the table of drivers.

use std::sync::LazyLock;

use block::{DRIVERS, DriverEntry, OptionKind};
use qmp::{Definition, Member, Type};

use super::words;

const OVERLAP_MODES: [&str; 4] = ["none", "constant", "cached", "all"];

const OVERLAP_FLAGS: [Member; 10] = [
    Member::optional("template", Type::Named("Qcow2OverlapCheckMode"), "What holds for the others; default `cached`."),
    Member::optional("main-header", Type::Bool, "The header."),
    Member::optional("active-l1", Type::Bool, "The L1 table."),
    Member::optional("active-l2", Type::Bool, "The L2 tables."),
    Member::optional("refcount-table", Type::Bool, "The refcount table."),
    Member::optional("refcount-block", Type::Bool, "The refcount blocks."),
    Member::optional("snapshot-table", Type::Bool, "The snapshot table."),
    Member::optional("inactive-l1", Type::Bool, "The L1 tables of snapshots."),
    Member::optional("inactive-l2", Type::Bool, "The L2 tables of snapshots, which takes reading them all."),
    Member::optional("bitmap-directory", Type::Bool, "The directory of dirty bitmaps, and what it names."),
];

/// Members that every node takes, before those of its driver.
const BASE: [Member; 8] = [
    Member::required("driver", Type::Named("BlockdevDriver"), "The image's format, or `file` for a passed descriptor."),
    Member::optional("node-name", Type::Str, "The node's name; mandatory at the top level."),
    Member::optional("discard", Type::Named("BlockdevDiscardOptions"), "What a discard does; by default nothing."),
    Member::optional("cache", Type::Named("BlockdevCacheOptions"), "How the host caches."),
    Member::optional("read-only", Type::Bool, "Whether the image is never written; default false."),
    Member::optional(
        "auto-read-only",
        Type::Bool,
        "Read-only until somebody writes: the set then needs a descriptor of each kind.",
    ),
    Member::optional("force-share", Type::Bool, "Not supported: must be false."),
    Member::optional("detect-zeroes", Type::Named("BlockdevDetectZeroesOptions"), "Only `off` is supported."),
];

/// Names of the definitions that are made from the table: made once, kept for ever.
static DRIVER_TYPES: LazyLock<Vec<(&'static str, &'static str)>> = LazyLock::new(|| {
    let leak = |name: String| -> &'static str { Box::leak(name.into_boxed_str()) };
    DRIVERS.iter().map(|driver| (driver.name, leak(format!("BlockdevOptions-{}", driver.name)))).collect()
});

/// `BlockdevOptions` and all that it speaks of.
pub fn types() -> Vec<Definition> {
    let names: Vec<&'static str> = DRIVERS.iter().map(|driver| driver.name).collect();
    let variants: Vec<(&'static str, Type)> =
        DRIVER_TYPES.iter().map(|&(driver, name)| (driver, Type::Named(name))).collect();
    let mut types = vec![
        words("BlockdevDriver", &names, "The drivers."),
        words("BlockdevQcow2EncryptionFormat", &["luks"], "How a qcow2 image is encrypted."),
        Definition::structure(
            "BlockdevQcow2Encryption",
            [
                Member::required("format", Type::Named("BlockdevQcow2EncryptionFormat"), "How."),
                Member::optional("key-secret", Type::Str, "The id of a `secret` object that holds the passphrase."),
            ],
            "What opens an encrypted qcow2 image.",
        ),
        words(
            "Qcow2OverlapCheckMode",
            &OVERLAP_MODES,
            "What is guarded: all of it, or what is known without reading more.",
        ),
        Definition::structure(
            "Qcow2OverlapCheckFlags",
            OVERLAP_FLAGS,
            "Structures of an image. Whatever is said, all are guarded but `inactive-l2`, which is as said, or as `template` has it.",
        ),
        Definition::alternate(
            "Qcow2OverlapChecks",
            [Type::Named("Qcow2OverlapCheckFlags"), Type::Named("Qcow2OverlapCheckMode")],
            "Which structures of an image nothing may be written over.",
        ),
        words("BlockdevDiscardOptions", &["ignore", "unmap"], "What a discard does."),
        words("BlockdevDetectZeroesOptions", &["off", "on", "unmap"], "Whether writes of zeroes are looked for."),
        words("OnOffAuto", &["auto", "on", "off"], "A switch that may choose for itself."),
        words("BlockdevAioOptions", &["threads", "native", "io_uring"], "How the host is asked."),
        Definition::structure(
            "BlockdevCacheOptions",
            [
                Member::optional(
                    "direct",
                    Type::Bool,
                    "Whether the host's cache is bypassed: the set then needs a descriptor opened with `O_DIRECT`. Nodes \
                     described inside of this one take it over.",
                ),
                Member::optional("no-flush", Type::Bool, "Not supported: must be false."),
            ],
            "How the host caches.",
        ),
        Definition::union("BlockdevOptions", BASE, "driver", variants, "A node to be made."),
        Definition::alternate(
            "BlockdevRef",
            [Type::Named("BlockdevOptions"), Type::Str],
            "A node to be made for its parent, or the name of one.",
        ),
        Definition::alternate(
            "BlockdevRefOrNull",
            [Type::Named("BlockdevOptions"), Type::Str, Type::Null],
            "As BlockdevRef; null says that there is none.",
        ),
    ];
    for (driver, (_, name)) in DRIVERS.iter().zip(DRIVER_TYPES.iter()) {
        types.push(Definition::structure(name, members(driver), driver.summary));
    }
    types
}

fn members(driver: &DriverEntry) -> Vec<Member> {
    let mut members = Vec::new();
    if driver.takes_descriptor {
        members.push(Member::required("filename", Type::Str, "`/dev/fdset/ID`: the set that holds the descriptor."));
        members.push(Member::optional(
            "locking",
            Type::Named("OnOffAuto"),
            "Whether image locks are taken, as QEMU takes them; default `auto`.",
        ));
    }
    for child in driver.children {
        let make = if child.required { Member::required } else { Member::optional };
        if child.is_list() {
            members.push(make(child.member(), Type::Array(&Type::Named("BlockdevRef")), "The nodes below, in order."));
            continue;
        }
        let ty = if child.name == "backing" { "BlockdevRefOrNull" } else { "BlockdevRef" };
        members.push(make(child.name, Type::Named(ty), "The node below."));
    }
    for option in driver.options {
        let ty = match option.kind {
            OptionKind::Bool => Type::Bool,
            // A signed number in QAPI, so that a negative one is refused by what it means and not by its type.
            OptionKind::Size => Type::Int,
            OptionKind::Seconds => Type::Uint32,
            OptionKind::Socket => Type::Named("SocketAddress"),
            OptionKind::Aio => Type::Named("BlockdevAioOptions"),
            OptionKind::Str | OptionKind::Directory | OptionKind::Secret => Type::Str,
            OptionKind::LuksSecret => Type::Named("BlockdevQcow2Encryption"),
            OptionKind::OverlapCheck => Type::Named("Qcow2OverlapChecks"),
        };
        let make = if matches!(option.kind, OptionKind::Socket | OptionKind::Directory) {
            Member::required
        } else {
            Member::optional
        };
        members.push(make(option.name, ty, option.summary));
    }
    members
}
