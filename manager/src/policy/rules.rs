// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The rules, read from TOML and checked as a whole: a policy that contradicts itself is refused, not half understood.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use serde::Deserialize;

use super::users;
use crate::opening::Rights;
use crate::{Error, Result};

/// Most layers in a chain, unless a rule says less.
const DEPTH: usize = 8;

/// A policy, with its roots open: a root that is swapped afterwards changes nothing.
#[derive(Debug)]
pub struct Policy {
    rules: BTreeMap<String, Arc<Rule>>,
    clients: Vec<Client>,
}

/// Files that may be opened, and how.
#[derive(Debug)]
pub struct Rule {
    /// Its name, for other rules, clients and the audit log.
    pub name: String,
    /// Its directory.
    pub root: PathBuf,
    /// The same, open (`O_PATH`).
    pub directory: OwnedFd,
    /// The most that it gives.
    pub rights: Rights,
    /// Whose files.
    pub owners: Vec<Owner>,
    /// Which formats.
    pub formats: Vec<String>,
    /// Whether a format that was not said may be guessed.
    pub probe: bool,
    /// Most layers of a chain whose top it allows.
    pub depth: usize,
    /// Whether files with several names are let through.
    pub hard_links: bool,
    /// Which block devices.
    pub devices: Vec<Devices>,
    /// Rules beneath whose roots its images' backing and data files may lie, besides its own.
    pub backing: Vec<String>,
}

/// Whose a file may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Whoever asks.
    Asker,
    /// Anybody.
    Any,
    /// This user.
    User(u32),
}

/// Block devices by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Devices {
    /// Major number.
    pub major: u32,
    /// Minor number; `None` for all.
    pub minor: Option<u32>,
}

/// Somebody who may ask.
#[derive(Clone, Debug)]
pub struct Client {
    /// Who; `None` is anybody else.
    pub user: Option<u32>,
    /// The names of rules.
    pub rules: Vec<String>,
    /// What is too much.
    pub limits: Limits,
}

/// What a client may have.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Limits {
    /// Disks at once.
    pub disks: u32,
    /// Descriptors of images at once, over all disks.
    pub descriptors: u32,
    /// Requests in a minute, those that are refused included.
    pub requests_per_minute: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { disks: 16, descriptors: 128, requests_per_minute: 120 }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Written {
    version: u32,
    #[serde(default, rename = "rule")]
    rules: Vec<WrittenRule>,
    #[serde(default, rename = "client")]
    clients: Vec<WrittenClient>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct WrittenRule {
    name: String,
    root: PathBuf,
    access: Access,
    #[serde(default = "asker")]
    owners: Vec<String>,
    formats: Vec<String>,
    #[serde(default)]
    probe: bool,
    depth: Option<usize>,
    #[serde(default)]
    hard_links: bool,
    #[serde(default)]
    devices: Vec<String>,
    #[serde(default)]
    backing: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Access {
    ReadOnly,
    ReadWrite,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct WrittenClient {
    user: String,
    rules: Vec<String>,
    #[serde(default)]
    limits: Limits,
}

fn asker() -> Vec<String> {
    vec!["asker".into()]
}

impl Policy {
    /// Reads a policy from a file, and opens its roots.
    ///
    /// # Errors
    /// The file cannot be read, does not belong to root or this user, or may be written by others; or its text is wrong.
    pub fn load(path: &Path) -> Result<Policy> {
        let failed = |source| Error::Open { path: path.to_owned(), purpose: " as a policy", source };
        let file = std::fs::File::open(path).map_err(failed)?;
        let stat = rustix::fs::fstat(&file).map_err(|e| failed(e.into()))?;
        let own = stat.st_uid == 0 || stat.st_uid == rustix::process::geteuid().as_raw();
        if !own || stat.st_mode & 0o022 != 0 {
            return Err(Error::Refused(format!(
                "the policy '{}' could be changed by others: it must belong to root or to this user, with a mode like 0644",
                path.display()
            )));
        }
        let text = std::io::read_to_string(file).map_err(failed)?;
        Policy::parse(&text).map_err(|e| match e {
            Error::Refused(text) => Error::Refused(format!("the policy '{}': {text}", path.display())),
            other => other,
        })
    }

    /// Reads a policy, and opens its roots.
    ///
    /// # Errors
    /// The text is no policy, refers to what is not there, or names a root that is no directory or behind a link.
    pub fn parse(text: &str) -> Result<Policy> {
        let written: Written = toml::from_str(text).map_err(|e| Error::Refused(e.to_string()))?;
        let refused = |text: String| Err(Error::Refused(text));
        if written.version != 1 {
            return refused(format!("version {} is not known; there is 1", written.version));
        }
        let mut rules = BTreeMap::new();
        for rule in written.rules {
            let rule = check(rule)?;
            if let Some(twice) = rules.insert(rule.name.clone(), Arc::new(rule)) {
                return refused(format!("two rules are called '{}'", twice.name));
            }
        }
        let known = |names: &[String], of: &str| match names.iter().find(|name| !rules.contains_key(*name)) {
            Some(name) => Err(Error::Refused(format!("{of} refers to a rule '{name}' that is not there"))),
            None => Ok(()),
        };
        for rule in rules.values() {
            known(&rule.backing, &format!("the rule '{}'", rule.name))?;
        }
        let mut clients: Vec<Client> = Vec::new();
        for WrittenClient { user, rules: names, limits } in written.clients {
            known(&names, &format!("the client '{user}'"))?;
            let number = match user.as_str() {
                "*" => None,
                name => match users::number(name) {
                    Some(number) => Some(number),
                    None => return refused(format!("there is no user '{name}' in /etc/passwd")),
                },
            };
            if clients.iter().any(|client| client.user == number) {
                return refused(format!("the user '{user}' is there twice"));
            }
            clients.push(Client { user: number, rules: names, limits });
        }
        Ok(Policy { rules, clients })
    }

    /// What this user is to the policy.
    pub fn client(&self, uid: u32) -> Option<&Client> {
        let named = self.clients.iter().find(|client| client.user == Some(uid));
        named.or_else(|| self.clients.iter().find(|client| client.user.is_none()))
    }

    /// The rule of that name.
    pub fn rule(&self, name: &str) -> Option<&Arc<Rule>> {
        self.rules.get(name)
    }
}

/// A rule that makes sense by itself.
fn check(written: WrittenRule) -> Result<Rule> {
    let WrittenRule { name, root, access, owners, formats, probe, depth, hard_links, devices, backing } = written;
    let refused = |text: String| Err(Error::Refused(format!("the rule '{name}': {text}")));
    let plain =
        root.is_absolute() && root.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !plain {
        return refused(format!("the root '{}' is not an absolute path without '..'", root.display()));
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let directory = match rustix::fs::openat2(CWD, &root, flags, Mode::empty(), resolve) {
        Ok(directory) => directory,
        Err(rustix::io::Errno::LOOP) => {
            return refused(format!(
                "a link leads to the root '{}'; name it by the path behind the link",
                root.display()
            ));
        }
        Err(e) => return refused(format!("the root '{}' cannot be opened: {e}", root.display())),
    };
    let mut whose = Vec::new();
    for owner in owners {
        whose.push(match owner.as_str() {
            "asker" => Owner::Asker,
            "*" => Owner::Any,
            name => match users::number(name) {
                Some(number) => Owner::User(number),
                None => return refused(format!("there is no user '{name}' in /etc/passwd")),
            },
        });
    }
    let mut numbers = Vec::new();
    for device in devices {
        let Some(parsed) = parse_devices(&device) else {
            return refused(format!("'{device}' is not MAJOR:MINOR or MAJOR:*"));
        };
        numbers.push(parsed);
    }
    if formats.is_empty() {
        return refused("without a format it allows nothing".into());
    }
    let rights = match access {
        Access::ReadOnly => Rights::ReadOnly,
        Access::ReadWrite => Rights::ReadWrite,
    };
    let depth = depth.unwrap_or(DEPTH);
    Ok(Rule {
        name,
        root,
        directory,
        rights,
        owners: whose,
        formats,
        probe,
        depth,
        hard_links,
        devices: numbers,
        backing,
    })
}

fn parse_devices(text: &str) -> Option<Devices> {
    let (major, minor) = text.split_once(':')?;
    let minor = if minor == "*" { None } else { Some(minor.parse().ok()?) };
    Some(Devices { major: major.parse().ok()?, minor })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        Policy::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn a_policy_that_is_not_understood_as_a_whole_is_refused() {
        let rule = "[[rule]]\nname = 'a'\nroot = '/'\naccess = 'read-only'\nformats = ['raw']\n";
        Policy::parse(&format!("version = 1\n{rule}")).unwrap();
        assert!(refused("").contains("missing field `version`"));
        assert!(refused("version = 2").contains("version 2 is not known"));
        assert!(refused(&format!("version = 1\n{rule}{rule}")).contains("two rules"));
        assert!(refused(&format!("version = 1\n{rule}colour = 'red'")).contains("unknown field `colour`"));
        assert!(refused(&format!("version = 1\n{rule}backing = ['b']")).contains("a rule 'b' that is not there"));
        assert!(refused(&format!("version = 1\n{rule}owners = ['nobody calls himself so']")).contains("no user"));
        assert!(refused(&format!("version = 1\n{rule}devices = ['8']")).contains("MAJOR:MINOR"));
        assert!(refused(&format!("version = 1\n{}", rule.replace("'/'", "'relative'"))).contains("absolute"));
        assert!(refused(&format!("version = 1\n{}", rule.replace("'/'", "'/nowhere'"))).contains("cannot be opened"));
        assert!(refused(&format!("version = 1\n{}", rule.replace("'/'", "'/proc/self'"))).contains("a link leads to"));
    }

    #[test]
    fn a_client_is_found_by_name_before_the_rest() {
        let text =
            "version = 1\n[[client]]\nuser = '*'\nrules = []\n[[client]]\nuser = '7'\nrules = []\nlimits.disks = 1";
        let policy = Policy::parse(text).unwrap();
        assert_eq!(policy.client(7).unwrap().limits.disks, 1);
        assert_eq!(policy.client(8).unwrap().limits, Limits::default());
        assert!(Policy::parse("version = 1").unwrap().client(0).is_none());
    }
}
