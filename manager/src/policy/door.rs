// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The one way in: policy, quotas and audit log together.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::Map;

use super::audit::Decision;
use super::{Asker, Audit, ByPolicy, Check, Policy, Quotas, Refusal};
use crate::chain::{Chain, Policy as Wanted};
use crate::inspector::Program;
use crate::opening::Rights;
use crate::{Error, Result};

/// What an asker was given: a disk in the books, until it is [returned](Door::give_back).
#[derive(Clone, Debug)]
pub struct Grant {
    /// Who has it.
    pub asker: Asker,
    /// The image.
    pub path: PathBuf,
    /// How it was wanted.
    pub wanted: Wanted,
    /// Device and inode of every file of it, the image first.
    pub files: Vec<(u64, u64)>,
}

/// Opens what policy allows.
#[derive(Debug)]
pub struct Door {
    policy: Policy,
    quotas: Quotas,
    audit: Audit,
}

impl Door {
    /// A door that nobody has been through.
    pub fn new(policy: Policy, audit: Audit) -> Door {
        Door { policy, quotas: Quotas::default(), audit }
    }

    /// Opens the image at `path` and everything it is built from, for `asker`.
    ///
    /// # Errors
    /// It is refused; the audit log says so by then.
    pub fn open(&mut self, program: &Program, asker: Asker, path: &Path, wanted: &Wanted) -> Result<(Chain, Grant)> {
        let limits = match self.policy.client(asker.uid) {
            Some(client) => client.limits,
            None => {
                let text = format!("user {} may ask for nothing", asker.uid);
                return self.refuse(asker, path, wanted, &Refusal { check: Check::Client, text });
            }
        };
        if let Err(refusal) = self.quotas.request(asker.uid, limits, Instant::now()) {
            return self.refuse(asker, path, wanted, &refusal);
        }
        let said = wanted.format.is_some();
        let chain = ByPolicy::new(&self.policy, &mut self.audit, asker, said).chain(program, path, wanted)?;
        let files = files(&chain);
        let count = u32::try_from(files.len()).unwrap_or(u32::MAX);
        if let Err(refusal) = self.quotas.enter(asker.uid, limits, count) {
            return self.refuse(asker, path, wanted, &refusal);
        }
        let grant = Grant { asker, path: path.to_owned(), wanted: wanted.clone(), files };
        Ok((chain, grant))
    }

    /// Lets `asker` have a daemon called `name` besides `daemons` others.
    ///
    /// # Errors
    /// It is refused; the audit log says so by then.
    pub fn admit(&mut self, asker: Asker, name: &str, daemons: usize) -> Result<()> {
        let refusal = match self.policy.client(asker.uid) {
            None => Err(Refusal { check: Check::Client, text: format!("user {} may ask for nothing", asker.uid) }),
            Some(client) => self.quotas.request(asker.uid, client.limits, Instant::now()).and_then(|()| {
                let most = client.limits.disks;
                let fits = u32::try_from(daemons).is_ok_and(|daemons| daemons < most);
                let text = format!("user {} has {daemons} daemons, as many as disks are allowed", asker.uid);
                if fits { Ok(()) } else { Err(Refusal { check: Check::Quota, text }) }
            }),
        };
        let mut details = Map::from_iter([("what".to_owned(), name.into())]);
        let Err(refusal) = refusal else { return self.audit.event(asker, "start", details) };
        details.insert("decision".into(), "refused".into());
        details.insert("check".into(), refusal.check.word().into());
        details.insert("reason".into(), refusal.text.clone().into());
        self.audit.event(asker, "start", details)?;
        Err(Error::Refused(refusal.to_string()))
    }

    /// Takes a disk that somebody had before this manager was started into the books, whatever the limits are now.
    pub fn take_over(&mut self, grant: &Grant) {
        let none = super::rules::Limits { disks: u32::MAX, descriptors: u32::MAX, requests_per_minute: u32::MAX };
        // Without limits nothing is refused.
        let _ = self.quotas.enter(grant.asker.uid, none, u32::try_from(grant.files.len()).unwrap_or(u32::MAX));
    }

    /// Takes a disk out of the books.
    pub fn give_back(&mut self, grant: &Grant) {
        self.quotas.leave(grant.asker.uid, u32::try_from(grant.files.len()).unwrap_or(u32::MAX));
    }

    /// Puts another policy in place, opens the audit log again under its name, and tells which of `grants` it would not give:
    /// by index. Those it would give are left alone.
    ///
    /// # Errors
    /// The audit log cannot be opened; then the old policy stays.
    pub fn replace(&mut self, program: &Program, policy: Policy, grants: &[&Grant]) -> Result<Vec<usize>> {
        self.audit.reopen()?;
        self.policy = policy;
        let withdrawn = grants.iter().enumerate().filter(|(_, grant)| !self.still_gives(program, grant));
        Ok(withdrawn.map(|(index, _)| index).collect())
    }

    /// Whether the very files of a grant would be opened once more. Nothing is written down.
    fn still_gives(&self, program: &Program, grant: &Grant) -> bool {
        let mut dry = Audit::none();
        let said = grant.wanted.format.is_some();
        let opened =
            ByPolicy::new(&self.policy, &mut dry, grant.asker, said).chain(program, &grant.path, &grant.wanted);
        opened.is_ok_and(|chain| files(&chain) == grant.files)
    }

    /// Whose decisions are written down where.
    pub fn audit(&mut self) -> &mut Audit {
        &mut self.audit
    }

    /// What is counted.
    pub fn quotas(&self) -> &Quotas {
        &self.quotas
    }

    /// Writes down that `asker` did something besides opening.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn note(&mut self, asker: Asker, event: &str, what: &str) -> Result<()> {
        self.audit.event(asker, event, Map::from_iter([("what".to_owned(), what.into())]))
    }

    fn refuse<T>(&mut self, asker: Asker, path: &Path, wanted: &Wanted, refusal: &Refusal) -> Result<T> {
        let rights = if wanted.read_only { Rights::ReadOnly } else { Rights::ReadWrite };
        let decision = Decision { asker, path, identity: None, rights, rule: None, refusal: Some(refusal) };
        self.audit.note(&decision)?;
        Err(Error::Refused(refusal.to_string()))
    }
}

/// Device and inode of every file of a chain, the image first.
fn files(chain: &Chain) -> Vec<(u64, u64)> {
    let layers = chain.layers.iter();
    let files = layers.flat_map(|layer| std::iter::once(&layer.image).chain(&layer.data_file).chain(&layer.extents));
    files.map(|file| file.identity).collect()
}
