// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opening by rule: nothing is opened before it was looked at, and what is opened is what was looked at.
//!
//! A name is resolved once, beneath its rule's root and through no link, to a descriptor that can do nothing (`O_PATH`). Type,
//! owner, mode and names are checked on that, so no FIFO and no tape notices; then the same file is opened through that
//! descriptor. Whoever swaps names in between swaps what nobody looks at any more.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path};
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Stat, major, minor};
use rustix::io::Errno;

use super::audit::{Audit, Decision};
use super::rules::{Client, Owner, Policy, Rule};
use super::{Asker, Check, Refusal};
use crate::chain::{self, Chain, Opener, Policy as Wanted};
use crate::inspector::{Inspection, Program};
use crate::opening::{Opened, Rights, identity, lexically_normal};
use crate::{Error, Result};

/// Opens the files of one request.
pub struct ByPolicy<'a> {
    policy: &'a Policy,
    audit: &'a mut Audit,
    asker: Asker,
    /// Whether the asker has said the format of the top.
    format_said: bool,
    /// The rule by which the top was opened.
    top: Option<Arc<Rule>>,
    /// The rule of the file that was opened last.
    last: Option<Arc<Rule>>,
    /// Whether a refusal was written down.
    refused: bool,
}

/// What is known of a file so far.
#[derive(Default)]
struct Facts {
    rule: Option<Arc<Rule>>,
    identity: Option<(u64, u64)>,
}

impl<'a> ByPolicy<'a> {
    /// For a request of `asker`, who has said the format of the image or not.
    pub fn new(policy: &'a Policy, audit: &'a mut Audit, asker: Asker, format_said: bool) -> ByPolicy<'a> {
        ByPolicy { policy, audit, asker, format_said, top: None, last: None, refused: false }
    }

    /// Opens `path` and everything it is built from, as the asker has `wanted` it.
    ///
    /// # Errors
    /// It is not allowed, which is in the audit log by then, or cannot be written down there.
    pub fn chain(mut self, program: &Program, path: &Path, wanted: &Wanted) -> Result<Chain> {
        let opened = chain::open_with(program, path, wanted, &mut self);
        if let (Err(error), false) = (&opened, self.refused) {
            let rights = if wanted.read_only { Rights::ReadOnly } else { Rights::ReadWrite };
            let facts = Facts { rule: self.top.clone(), identity: None };
            let refusal = refusal(Check::Image, error.to_string());
            self.note(path, rights, &facts, Some(&refusal))?;
        }
        opened
    }

    /// Opens, and writes down what came of it.
    fn open(&mut self, path: &Path, rights: Rights, rules: &[Arc<Rule>]) -> Result<Opened> {
        let mut facts = Facts::default();
        let outcome = decide(self.asker, path, rights, rules, &mut facts);
        self.note(path, rights, &facts, outcome.as_ref().err())?;
        self.last = facts.rule;
        outcome.map_err(|refusal| Error::Refused(refusal.to_string()))
    }

    fn note(&mut self, path: &Path, rights: Rights, facts: &Facts, refusal: Option<&Refusal>) -> Result<()> {
        let rule = facts.rule.as_ref().map(|rule| rule.name.as_str());
        let Facts { identity, .. } = *facts;
        self.refused |= refusal.is_some();
        self.audit.note(&Decision { asker: self.asker, path, identity, rights, rule, refusal })
    }

    /// The rules that the asker may use.
    fn rules(&self) -> std::result::Result<Vec<Arc<Rule>>, Refusal> {
        let Some(Client { rules, .. }) = self.policy.client(self.asker.uid) else {
            return Err(refusal(Check::Client, format!("user {} may ask for nothing", self.asker.uid)));
        };
        Ok(rules.iter().filter_map(|name| self.policy.rule(name)).cloned().collect())
    }

    /// Writes a refusal down, and makes it an error.
    fn refuse<T>(&mut self, path: &Path, rights: Rights, facts: &Facts, refusal: &Refusal) -> Result<T> {
        self.note(path, rights, facts, Some(refusal))?;
        Err(Error::Refused(refusal.to_string()))
    }
}

impl Opener for ByPolicy<'_> {
    fn top(&mut self, path: &Path, rights: Rights) -> Result<Opened> {
        let rules = match self.rules() {
            Ok(rules) => rules,
            Err(refusal) => return self.refuse(path, rights, &Facts::default(), &refusal),
        };
        let plain = path.is_absolute()
            && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        if !plain {
            let text = format!("'{}' is not an absolute path without '..'", path.display());
            return self.refuse(path, rights, &Facts::default(), &refusal(Check::Name, text));
        }
        let opened = self.open(path, rights, &rules)?;
        self.top = self.last.clone();
        Ok(opened)
    }

    fn named(&mut self, base: &Path, name: &str, rights: Rights) -> Result<Opened> {
        let path = lexically_normal(&base.join(name));
        if name.split_once(':').is_some_and(|(protocol, _)| !protocol.contains('/')) {
            let text = format!("the image names '{}'; only plain files are opened", name.escape_debug());
            return self.refuse(&path, rights, &Facts::default(), &refusal(Check::Name, text));
        }
        let rules = self.top.iter().flat_map(|top| {
            let backing = top.backing.iter().filter_map(|name| self.policy.rule(name)).cloned();
            std::iter::once(Arc::clone(top)).chain(backing)
        });
        let rules: Vec<_> = rules.collect();
        self.open(&path, rights, &rules)
    }

    fn accept(&mut self, image: &Opened, inspection: &Inspection, layers: usize) -> Result<()> {
        let (Some(rule), Some(top)) = (self.last.clone(), self.top.clone()) else { return Ok(()) };
        let format = &inspection.format;
        let refused = if layers >= top.depth {
            Some(refusal(Check::Depth, format!("the chain has more than {} layers", top.depth)))
        } else if layers == 0 && !self.format_said && !rule.probe {
            let text = "the format must be said: a guest that owns a raw disk could make it look like any other";
            Some(refusal(Check::Format, text.to_owned()))
        } else if !rule.formats.contains(format) {
            let text = format!("the format is {format}; the rule '{}' allows {}", rule.name, rule.formats.join(", "));
            Some(refusal(Check::Format, text))
        } else {
            None
        };
        let Some(refusal) = refused else { return Ok(()) };
        let facts = Facts { rule: Some(rule), identity: Some(image.identity) };
        self.refuse(&image.path, image.rights, &facts, &refusal)
    }
}

/// Finds the rule and opens by it; what was learned on the way is left in `facts`.
fn decide(
    asker: Asker,
    path: &Path,
    rights: Rights,
    rules: &[Arc<Rule>],
    facts: &mut Facts,
) -> std::result::Result<Opened, Refusal> {
    // The longest root is the one that is meant.
    let above = rules.iter().filter(|rule| path.starts_with(&rule.root));
    let Some(rule) = above.max_by_key(|rule| rule.root.components().count()) else {
        let roots: Vec<String> = rules.iter().map(|rule| format!("'{}'", rule.root.display())).collect();
        let roots = if roots.is_empty() { "anything".to_owned() } else { roots.join(" or ") };
        return Err(refusal(Check::Root, format!("'{}' is not beneath {roots}", path.display())));
    };
    facts.rule = Some(Arc::clone(rule));
    if rights == Rights::ReadWrite && rule.rights == Rights::ReadOnly {
        return Err(refusal(Check::Rights, format!("the rule '{}' lets files be read only", rule.name)));
    }
    let inside = path.strip_prefix(&rule.root).unwrap_or(path);
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let handle = rustix::fs::openat2(&rule.directory, inside, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve);
    let handle = handle.map_err(|e| refusal(Check::Reach, reach(path, e)))?;
    let stat = rustix::fs::fstat(&handle).map_err(|e| refusal(Check::Reach, reach(path, e)))?;
    let who = identity(&handle).map_err(|e| refusal(Check::Reach, format!("'{}': {e}", path.display())))?;
    facts.identity = Some(who);
    let device = admit(asker, path, rights, rule, &stat)?;
    let file = reopen(&handle, rights).map_err(|e| refusal(Check::Reach, format!("'{}': {e}", path.display())))?;
    if identity(&file).ok() != Some(who) {
        return Err(refusal(Check::Replaced, format!("'{}' is not what it was a moment before", path.display())));
    }
    Ok(Opened { file: file.into(), path: path.to_owned(), identity: who, rights, device })
}

/// The checks on what was found; whether it is a block device.
fn admit(asker: Asker, path: &Path, rights: Rights, rule: &Rule, stat: &Stat) -> std::result::Result<bool, Refusal> {
    let device = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => false,
        FileType::BlockDevice => {
            let (major, minor) = (major(stat.st_rdev), minor(stat.st_rdev));
            let allowed = rule.devices.iter().any(|of| of.major == major && of.minor.is_none_or(|of| of == minor));
            if !allowed {
                let text = format!("'{}' is the block device {major}:{minor}", path.display());
                return Err(refusal(Check::Type, format!("{text}, which the rule '{}' does not allow", rule.name)));
            }
            true
        }
        other => {
            let text = format!("'{}' is a {}, no regular file", path.display(), kind(other));
            return Err(refusal(Check::Type, text));
        }
    };
    let owned = rule.owners.iter().any(|owner| match owner {
        Owner::Any => true,
        Owner::Asker => stat.st_uid == asker.uid,
        Owner::User(number) => stat.st_uid == *number,
    });
    if !owned {
        let text = format!(
            "'{}' belongs to user {}, not to one that the rule '{}' names",
            path.display(),
            stat.st_uid,
            rule.name
        );
        return Err(refusal(Check::Owner, text));
    }
    let needed = if rights == Rights::ReadOnly { 0o400 } else { 0o600 };
    if stat.st_mode & needed != needed {
        let text =
            format!("'{}' has the mode {:03o}, by which its owner may not", path.display(), stat.st_mode & 0o777);
        return Err(refusal(Check::Mode, text));
    }
    if !device && stat.st_nlink > 1 && !rule.hard_links {
        let text =
            format!("'{}' has {} names, and could be another's under one of them", path.display(), stat.st_nlink);
        return Err(refusal(Check::HardLinks, text));
    }
    Ok(device)
}

/// The file behind an `O_PATH` descriptor, opened: the same file, whatever its names are now.
fn reopen(handle: &OwnedFd, rights: Rights) -> io::Result<OwnedFd> {
    let access = if rights == Rights::ReadOnly { OFlags::RDONLY } else { OFlags::RDWR };
    let flags = access | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    Ok(rustix::fs::open(format!("/proc/self/fd/{}", handle.as_raw_fd()), flags, Mode::empty())?)
}

fn reach(path: &Path, errno: Errno) -> String {
    let why = match errno {
        Errno::LOOP | Errno::XDEV => "a link leads there, and links are not followed".to_owned(),
        other => io::Error::from(other).to_string(),
    };
    format!("'{}': {why}", path.display())
}

fn kind(kind: FileType) -> &'static str {
    match kind {
        FileType::Directory => "directory",
        FileType::CharacterDevice => "character device",
        FileType::Fifo => "FIFO",
        FileType::Socket => "socket",
        FileType::Symlink => "symbolic link",
        _ => "file of another kind",
    }
}

fn refusal(check: Check, text: String) -> Refusal {
    Refusal { check, text }
}
