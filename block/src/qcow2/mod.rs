// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver `qcow2`.

use crate::driver::{ChildSpec, Driver, DriverEntry, OpenRequest};
use crate::{Error, Result};

pub(crate) const ENTRY: DriverEntry = DriverEntry {
    name: "qcow2",
    summary: "QEMU's copy-on-write format, versions 2 and 3",
    children: &[
        ChildSpec { name: "file", required: true, written: true },
        ChildSpec { name: "backing", required: false, written: false },
        ChildSpec { name: "data-file", required: false, written: true },
    ],
    options: &[],
    takes_descriptor: false,
    open,
};

fn open(_: OpenRequest) -> Result<Box<dyn Driver>> {
    Err(Error::unsupported("qcow2 is not written yet"))
}
