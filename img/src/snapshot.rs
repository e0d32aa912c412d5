// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `snapshot`: states of the disk that an image keeps.

use std::time::{SystemTime, UNIX_EPOCH};

use block::Snapshot;

use confine::Requirement;

use crate::disk::{Disk, Layer, Usage};
use crate::options::human;
use crate::tool::{Error, Result, confine, printable, say};

/// What is to be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Action {
    /// Tell which there are.
    #[default]
    List,
    /// Keep the present state under this name.
    Create(String),
    /// Go back to the state with this id, or else of this name.
    Apply(String),
    /// Let the state of this name go, the oldest if there are several.
    Delete(String),
}

/// What is asked.
pub struct Request {
    /// The image; writable, unless it is only listed.
    pub layer: Layer,
    /// What is to be done.
    pub action: Action,
    /// Others may write at the same time.
    pub force_share: bool,
    /// Which layers of confinement must be had.
    pub confinement: Requirement,
}

/// Does it; the exit status.
///
/// # Errors
/// The image cannot be opened, or keeps no such state.
pub fn run(request: Request) -> Result<u8> {
    let Request { layer, action, force_share, confinement } = request;
    confine(confinement)?;
    let disk = Disk::open(vec![layer], Usage { writable: action != Action::List, force_share, unflushed: false })?;
    let kept = disk.node.snapshots();
    match &action {
        // A format that keeps none has none.
        Action::List => say(&table(&kept.map_or(Ok(Vec::new()), block::Snapshots::list)?))?,
        Action::Create(name) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let date = (u32::try_from(now.as_secs()).unwrap_or(u32::MAX), now.subsec_nanos());
            kept.and_then(|kept| kept.create(name, date)).map_err(|e| refused("create", name, &e))?;
        }
        Action::Apply(name) => {
            kept.and_then(|kept| kept.apply(name)).map_err(|e| refused("apply", name, &e))?;
        }
        Action::Delete(name) => {
            let none = || Error::Text(format!("Could not delete snapshot '{name}': snapshot not found"));
            let kept = kept.map_err(|_| none())?;
            if !kept.list()?.iter().any(|snapshot| snapshot.name == *name) {
                return Err(none());
            }
            kept.delete(None, Some(name)).map_err(|e| refused("delete", name, &e))?;
        }
    }
    disk.close()?;
    Ok(0)
}

fn refused(doing: &str, name: &str, e: &block::Error) -> Error {
    Error::Text(format!("Could not {doing} snapshot '{name}': {e}"))
}

/// The snapshots as people read them; nothing if there are none.
pub fn table(snapshots: &[Snapshot]) -> String {
    if snapshots.is_empty() {
        return String::new();
    }
    let row = |cells: [&str; 6]| {
        let [id, name, size, date, clock, icount] = cells;
        format!("{id:<7} {name:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}\n")
    };
    let mut text = "Snapshot list:\n".to_owned() + &row(["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]);
    for snapshot in snapshots {
        let seconds = snapshot.vm_clock / 1_000_000_000;
        let thousandths = snapshot.vm_clock / 1_000_000 % 1000;
        text += &row([
            &printable(&snapshot.id),
            &printable(&snapshot.name),
            &human(snapshot.vm_state_size),
            &date(snapshot.date.0),
            &format!("{:04}:{:02}:{:02}.{thousandths:03}", seconds / 3600, seconds / 60 % 60, seconds % 60),
            &snapshot.icount.map_or("--".to_owned(), |icount| icount.to_string()),
        ]);
    }
    text
}

fn date(seconds: u32) -> String {
    sys::clock::local(seconds).map_or(String::new(), |local| {
        let ((year, month, day), (hour, minute, second)) = (local.date, local.time);
        format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
    })
}
